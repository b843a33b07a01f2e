from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest

from kvtool import models
from kvtool.capture.reader import open_capture
from kvtool.capture.runner import CaptureConfig, run_capture
from kvtool.classify.features import HeadTable, distance_edges, head_table
from kvtool.classify.kinds import KINDS, Means, kind_of, kinds_per_prompt, weighted_means
from kvtool.classify.runner import choose_importance, describe_heads, label_heads, run_classify
from kvtool.data.tasks import load_task
from kvtool.errors import DataError
from kvtool.models import LoadedModel
from kvtool.policies import expand_policies
from kvtool.policies.headfile import check_heads, read_head_file


def table(sink: Any, local: Any, retrieval: Any = None, **more: Any) -> HeadTable:
    """S prompts x 1 layer x heads; the profile's two bins are local and the rest."""
    s, near = (np.asarray(x, dtype=float)[:, None, :] for x in (sink, local))
    found = None if retrieval is None else np.asarray(retrieval, dtype=float)[:, None, :]
    profile = np.stack([near, 1 - near], axis=-1)
    others = {name: np.asarray(x, dtype=float)[:, None, :] for name, x in more.items()}
    return HeadTable(s, near, 1 - s - near, np.zeros_like(s), profile, np.zeros_like(s), found, **others)


def named(kinds: Any) -> list[str]:
    return [KINDS[k] for k in np.asarray(kinds).flatten()]


def test_kinds_by_hand() -> None:
    # Remaining attention 0.5: local share 0.8, 0.5, 0.2; then a sink, then a retrieval head that rests on the sink.
    features = table([[0.5, 0.5, 0.5, 0.9, 0.9]] * 8, [[0.4, 0.25, 0.1, 0.1, 0.1]] * 8, [[0, 0, 0, 0, 0.7]] * 8)
    labels = label_heads(features, 0, 50)
    assert named(labels.kinds) == ["positional", "mixed", "gathering", "sink", "gathering"]
    assert labels.confidence is not None
    assert (labels.confidence == 1).all()
    assert [labels.reading(0, h) for h in range(5)] == ["clear", "mixed", "clear", "clear", "clear"]


def test_far_attention_counts_by_what_it_follows() -> None:
    """All heads look far (0.9 of what is not on the sink); only what follows content makes a head gather."""
    means = Means(*(np.full(5, x) for x in (0.5, 0.05, 0.45)), content=np.asarray([1.0, 0.0, -1.0, -1.6, np.nan]))
    # Positional share (0.05 + 0.45 (1 - s) / 2) / 0.5, s cut to -1 ... 1; undefined counts as content.
    np.testing.assert_allclose(means.positional_share, [0.1, 0.55, 1.0, 1.0, 0.1])
    assert named(kind_of(means)) == ["gathering", "mixed", "positional", "positional", "gathering"]
    plain = Means(means.sink, means.local, means.far)
    assert named(kind_of(plain)) == ["gathering"] * 5


def test_order_of_the_rules() -> None:
    zero, one = np.zeros(4), np.ones(4)
    means = Means(
        sink=0.9 * one,
        local=0.1 * one,
        far=zero,
        retrieval=np.asarray([0, 0, 0.5, 0]),
        activity=np.asarray([1, 0.1, 0.1, 0.1]),
        induction=np.asarray([0, 0, 0, 0.3]),
    )
    assert named(kind_of(means)) == ["sink", "inactive", "gathering", "gathering"]


def test_undefined_features_do_not_count() -> None:
    features = table([[0.5]] * 4, [[0.05]] * 4, content=[[np.nan], [-1.0], [np.nan], [-0.8]])
    content = weighted_means(features, np.asarray([[0.25] * 4, [0.5, 0.5, 0, 0], [1, 0, 0, 0]])).content
    assert content is not None
    np.testing.assert_allclose(content[:, 0, 0], [-0.9, -1.0, -0.9])
    # A prompt without it takes the others' mean; where no prompt has it, far attention counts as following content.
    assert named(kinds_per_prompt(features)) == ["positional"] * 4
    nowhere = table([[0.5]] * 2, [[0.05]] * 2, content=[[np.nan], [np.nan]])
    assert named(kinds_per_prompt(nowhere)) == ["gathering"] * 2


def test_unsure_is_not_mixed() -> None:
    # A head that is local on half of the prompts and far on the others: its mean is mixed, and the draws say how sure.
    local = np.where(np.arange(6)[:, None] < 3, 1.0, 0.0)
    swinging = label_heads(table(np.zeros((6, 1)), local), 0, 2000)
    steady = label_heads(table(np.zeros((6, 1)), np.full((6, 1), 0.5)), 0, 50)
    assert named(swinging.kinds) == named(steady.kinds) == ["mixed"]
    assert swinging.confidence is not None
    # Draws of 3 of the 6: P(0.3 < Binomial(3, 1/2) / 3 < 0.7) = P(1 or 2 of 3) = 6/8
    assert swinging.confidence[0, 0] == pytest.approx(6 / 8, abs=0.03)
    assert swinging.reading(0, 0) == "unsure"
    assert steady.reading(0, 0) == "mixed"
    # With many prompts the same swing is no longer thin evidence: surely mixed, and the set says how.
    many = label_heads(table(np.zeros((60, 3)), np.tile(local, (10, 3))), 0, 300)
    assert many.reading(0, 0) == "mixed"
    assert many.sets is not None
    assert many.sets.names(0, 0) == ["positional", "gathering"]


def test_too_few_prompts_give_no_confidence() -> None:
    labels = label_heads(table([[0.1]] * 3, [[0.8]] * 3), 0, 50)
    assert labels.confidence is None
    assert labels.reliability is None
    assert labels.reading(0, 0) is None


def test_kv_heads_are_means_of_their_group() -> None:
    # Heads 0, 1 share KV head 0 and heads 2, 3 share KV head 1. Local shares 0.9 and 0.7: positional; 0.2 and 0.1: gathering.
    features = table([[0.0, 0.0, 0.0, 0.0]] * 4, [[0.9, 0.7, 0.2, 0.1]] * 4, [[0.0, 0.0, 0.1, 0.3]] * 4).grouped(2)
    np.testing.assert_allclose(features.local[0, 0], [0.8, 0.15])
    np.testing.assert_allclose(features.profile[0, 0], [[0.8, 0.2], [0.15, 0.85]])
    assert features.retrieval is not None
    np.testing.assert_allclose(features.retrieval[0, 0], [0.0, 0.2])
    assert named(label_heads(features, 0, 50).kinds) == ["positional", "gathering"]
    assert table([[0.0, 0.0]], [[0.5, 0.5]]).grouped(1).retrieval is None


def test_distance_bins_must_be_shared() -> None:
    def sample(*edges: int) -> Any:
        return SimpleNamespace(features=lambda: SimpleNamespace(edges=np.asarray(edges)))

    assert distance_edges([sample(0, 1, 2), sample(0, 1, 2)]) == [0, 1, 2]
    with pytest.raises(DataError, match="2 different sets"):
        distance_edges([sample(0, 1, 2), sample(0, 1)])


@pytest.fixture(scope="module")
def loaded(random_model: Callable[..., Any], byte_tokenizer: Any) -> LoadedModel:
    model = random_model("llama")
    return LoadedModel(model, byte_tokenizer, models.describe(model, "llama"))


@pytest.fixture(scope="module")
def captures(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with captures: ``c.h5`` and ``d.h5`` of the same sort, ``e.h5`` of text, ``old.h5`` as an older kvtool wrote them."""
    folder = tmp_path_factory.mktemp("captures")
    for name, task, n, seed in (("c", "niah", 8, 0), ("d", "niah", 4, 1), ("e", "text", 4, 0)):
        samples = load_task(task, loaded.tokenizer, n, 300, seed)
        config = CaptureConfig(task=task, model="llama", n=n, length=300, seed=seed, statistics=("last",))
        run_capture(config, loaded, samples, folder / f"{name}.h5")
    shutil.copy(folder / "c.h5", folder / "old.h5")
    with h5py.File(folder / "old.h5", "r+") as file:
        del file["repeats"]
        for sample in file["samples"].values():
            for name in set(sample["features"]) - {"sink_mass", "entropy", "distance_profile"}:
                del sample["features"][name]
            del sample["features"].attrs["local"], sample["features"].attrs["projected"]
        config_now = json.loads(file.attrs["config"])
        del config_now["permute"]
        file.attrs["config"] = json.dumps(config_now)
    return folder


def read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text())
    return value


def test_importance_is_headkvs_score_where_prompts_give_it() -> None:
    nan = np.nan
    features = table([[0.5, 0.5]] * 3, [[0.1, 0.1]] * 3, reasoning=[[0.25, 0.75], [nan, nan], [0.5, 0.0]])
    labels = label_heads(features, 0, 20)
    assert choose_importance(features, "auto", "c.h5") == ("reasoning", 2)
    assert choose_importance(features, "gain", "c.h5") == ("gain", 3)
    heads = describe_heads(features, labels, "reasoning")
    assert [(h["importance"], h["reasoning"], h["gain"]) for h in heads] == [(0.375, 0.375, 0.0)] * 2
    assert [h["importance"] for h in describe_heads(features, labels, "gain")] == [0.0, 0.0]
    for without in (table([[0.5]] * 3, [[0.1]] * 3), table([[0.5]] * 3, [[0.1]] * 3, reasoning=[[nan]] * 3)):
        assert choose_importance(without, "auto", "c.h5") == ("gain", 3)
        with pytest.raises(DataError, match="no prompt names its evidence"):
            choose_importance(without, "reasoning", "c.h5")


def test_heads_file(captures: Path, loaded: LoadedModel, tmp_path: Path, random_model: Callable[..., Any]) -> None:
    summary = run_classify(captures / "c.h5", tmp_path / "heads.json")
    assert sum(summary.counts.values()) == 2 * 4
    heads = read(tmp_path / "heads.json")
    with open_capture(captures / "c.h5") as capture:
        features = head_table(list(capture.samples))
        probes = capture.samples[0].probes()
        a, b = capture.samples[0].meta["evidence"][0]
        assert features.retrieval is not None
        np.testing.assert_allclose(features.retrieval[0], probes.attention[..., a:b].sum(-1).mean(-1), rtol=1e-6)
        # Importance over all heads from the definition: mean over prompts and fed tokens of the absolute summed gain.
        probes_of = [sample.probes() for sample in capture.samples]
        literal = np.mean([np.abs(p.gain.sum(-1) + p.gain_own).mean(-1) for p in probes_of], axis=0)
        np.testing.assert_allclose([h["importance"] for h in heads["heads"]], literal.flatten(), rtol=1e-6)
        stored = [sample.features() for sample in capture.samples]
        score = np.mean([f.content_follow - f.slot_follow for f in stored], axis=0)
        np.testing.assert_allclose([h["content"] for h in heads["heads"]], score.flatten(), rtol=1e-5)
        active = np.mean([f.head_output / f.head_output.mean(1, keepdims=True) for f in stored], axis=0)
        np.testing.assert_allclose([h["activity"] for h in heads["heads"]], active.flatten(), rtol=1e-5)
        induction = capture.repeats().induction
        np.testing.assert_allclose([h["induction"] for h in heads["heads"]], induction.flatten(), rtol=1e-6)
    assert [(h["layer"], h["head"]) for h in heads["heads"]] == [(layer, q) for layer in range(2) for q in range(4)]
    assert [(h["layer"], h["head"]) for h in heads["kv_heads"]] == [(layer, h) for layer in range(2) for h in range(2)]
    for kv in heads["kv_heads"]:
        members = [h for h in heads["heads"] if h["layer"] == kv["layer"] and h["head"] // 2 == kv["head"]]
        for name in ("sink", "local", "far", "entropy", "importance", "retrieval", "content", "output", "induction"):
            assert kv[name] == pytest.approx(np.mean([h[name] for h in members]), abs=1e-12)
    for head in heads["heads"]:
        assert sum(head["distance_profile"]) == pytest.approx(1, abs=1e-4)
        assert head["sink"] + head["local"] + head["far"] == pytest.approx(1, abs=1e-5)
        assert 0 <= head["far_entropy"] <= 1
    assert heads["missing"] == {}
    assert heads["data"] | {"prompts": ""} == {
        "n": 8, "task": "niah", "length": 300, "seed": 0, "compress_at": "prompt", "prompts": "", "permute": 8,
    }  # fmt: skip
    assert heads["versions"]["capture"]["torch"]
    assert heads["quality"]["heads"]["reliability"]["n_half"] == 4
    assert heads["quality"]["heads"]["coverage"] is None  # 12 prompts are needed
    assert (tmp_path / "heads_reliability.png").is_file()
    assert read_head_file(str(tmp_path / "heads.json")).kinds is not None
    policy = expand_policies((f"headkv:heads={tmp_path / 'heads.json'}",), ("10%",))
    assert check_heads(policy, loaded.info)
    other = models.describe(random_model("llama", seed=3), "other")
    with pytest.raises(DataError, match="not of other"):
        check_heads(policy, other)


def test_the_same_call_gives_the_same_file(captures: Path, tmp_path: Path) -> None:
    run_classify(captures / "c.h5", tmp_path / "a.json", seed=3)
    run_classify(captures / "c.h5", tmp_path / "b.json", seed=3)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_against_other_captures(captures: Path, tmp_path: Path) -> None:
    others = [captures / "d.h5", captures / "e.h5", captures / "c.h5"]
    summary = run_classify(captures / "c.h5", tmp_path / "heads.json", others=others)
    seed, task, same = summary.against
    assert (set(seed.differs), seed.n_shared, seed.n) == ({"seed"}, 0, 4)
    assert set(task.differs) == {"task"}
    assert (same.differs, same.n_shared, same.ari, same.changed) == ({}, 8, 1.0, ())
    assert "8 prompts are in both: not disjoint" in summary.text()
    stored = read(tmp_path / "heads.json")["against"]
    assert [a["ari"] for a in stored] == [a.ari for a in summary.against]


def test_another_models_capture_is_refused(
    captures: Path, tmp_path: Path, random_model: Callable[..., Any], byte_tokenizer: Any
) -> None:
    model = random_model("llama", seed=9)
    other = LoadedModel(model, byte_tokenizer, models.describe(model, "other"))
    config = CaptureConfig(task="niah", model="other", n=1, length=220, statistics=("last",))
    run_capture(config, other, load_task("niah", byte_tokenizer, 1, 220), tmp_path / "other.h5")
    with pytest.raises(DataError, match=r"other\.h5 is of other .* compare captures of one model"):
        run_classify(captures / "c.h5", tmp_path / "heads.json", others=[tmp_path / "other.h5"])
    assert not (tmp_path / "heads.json").exists()


def test_older_captures_say_what_they_lack(captures: Path, tmp_path: Path) -> None:
    summary = run_classify(captures / "old.h5", tmp_path / "heads.json")
    lacking = {"masses", "far_entropy", "offset_variance", "output", "content", "induction", "echo", "copy"}
    assert set(summary.missing) == lacking
    assert "8 of 8 prompts lack it (the capture is of an older kvtool; capture again)" in summary.text()
    heads = read(tmp_path / "heads.json")
    for head in heads["heads"]:
        assert all(head[name] is None for name in lacking - {"masses"})
        local = sum(x for x, edge in zip(head["distance_profile"], heads["distance_edges"], strict=True) if edge < 32)
        assert head["local"] == pytest.approx(local, abs=1e-4)
    # Text names no evidence.
    assert set(run_classify(captures / "e.h5", tmp_path / "text.json").missing) == {"retrieval"}
    assert not (tmp_path / "text_reliability.png").exists()  # 4 prompts are too few
