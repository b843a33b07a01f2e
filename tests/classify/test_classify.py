from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvtool import models
from kvtool.capture.reader import open_capture
from kvtool.capture.runner import CaptureConfig, run_capture
from kvtool.classify.features import HeadTable, distance_edges, head_table
from kvtool.classify.kinds import KINDS, classify_heads
from kvtool.classify.runner import read_heads, run_classify
from kvtool.data.tasks import load_task
from kvtool.errors import DataError
from kvtool.models import LoadedModel


def table(sink: Any, local: Any, retrieval: Any = None) -> HeadTable:
    """S prompts x 1 layer x heads; the profile's two bins are local and the rest."""
    s, near = (np.asarray(x, dtype=float)[:, None, :] for x in (sink, local))
    found = None if retrieval is None else np.asarray(retrieval, dtype=float)[:, None, :]
    profile = np.stack([near, 1 - near], axis=-1)
    return HeadTable(s, near, 1 - s - near, np.zeros_like(s), profile, np.zeros_like(s), found)


def test_kinds_by_hand() -> None:
    # Remaining attention 0.5: local share 0.8, 0.5, 0.2; then a sink, then a retrieval head that rests on the sink.
    features = table([[0.5, 0.5, 0.5, 0.9, 0.9]] * 8, [[0.4, 0.25, 0.1, 0.1, 0.1]] * 8, [[0, 0, 0, 0, 0.7]] * 8)
    kinds = classify_heads(features, np.random.default_rng(0))
    assert [KINDS[k] for k in kinds.kind[0]] == ["positional", "mixed", "gathering", "sink", "gathering"]
    assert kinds.confidence is not None
    assert (kinds.confidence == 1).all()
    assert kinds.unsure is not None
    assert not kinds.unsure.any()


def test_unsure_is_not_mixed() -> None:
    # A head that is local on half of the prompts and far on the others: its mean is mixed, and the draws say how sure.
    local = np.where(np.arange(6)[:, None] < 3, 1.0, 0.0)
    swinging = classify_heads(table(np.zeros((6, 1)), local), np.random.default_rng(0))
    steady = classify_heads(table(np.zeros((6, 1)), np.full((6, 1), 0.5)), np.random.default_rng(0))
    assert KINDS[swinging.kind[0, 0]] == KINDS[steady.kind[0, 0]] == "mixed"
    assert swinging.confidence is not None
    assert steady.confidence is not None
    # P(0.3 < Binomial(6, 1/2) / 6 < 0.7) = P(2, 3 or 4 of 6) = 50/64
    assert swinging.confidence[0, 0] == pytest.approx(50 / 64, abs=0.06)
    assert steady.confidence[0, 0] == 1


def test_too_few_prompts_give_no_confidence() -> None:
    kinds = classify_heads(table([[0.1]] * 3, [[0.8]] * 3), np.random.default_rng(0))
    assert kinds.confidence is None
    assert kinds.unsure is None


def test_kv_heads_are_means_of_their_group() -> None:
    # Heads 0, 1 share KV head 0 and heads 2, 3 share KV head 1. Local shares 0.9 and 0.7: positional; 0.2 and 0.1: gathering.
    features = table([[0.0, 0.0, 0.0, 0.0]] * 4, [[0.9, 0.7, 0.2, 0.1]] * 4, [[0.0, 0.0, 0.1, 0.3]] * 4).grouped(2)
    np.testing.assert_allclose(features.local[0, 0], [0.8, 0.15])
    np.testing.assert_allclose(features.profile[0, 0], [[0.8, 0.2], [0.15, 0.85]])
    assert features.retrieval is not None
    np.testing.assert_allclose(features.retrieval[0, 0], [0.0, 0.2])
    kinds = classify_heads(features, np.random.default_rng(0))
    assert [KINDS[k] for k in kinds.kind[0]] == ["positional", "gathering"]
    assert table([[0.0, 0.0]], [[0.5, 0.5]]).grouped(1).retrieval is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not JSON", "cannot be read"),
        ("[]", "another schema"),
        ('{"schema": "kvtool.heads/2"}', "another schema"),
        ('{"schema": "kvtool.heads/1"}', "incomplete"),
        ('{"schema": "kvtool.heads/1", "model": {"fingerprint": "x"}}', "incomplete"),
    ],
)
def test_a_damaged_heads_file_is_one_clear_line(
    text: str, message: str, tmp_path: Path, random_model: Callable[..., Any]
) -> None:
    (tmp_path / "heads.json").write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read_heads(tmp_path / "heads.json", models.describe(random_model("llama"), "toy"))
    assert "\n" not in str(caught.value)


def test_distance_bins_must_be_shared() -> None:
    def sample(*edges: int) -> Any:
        return SimpleNamespace(features=lambda: SimpleNamespace(edges=np.asarray(edges)))

    assert distance_edges([sample(0, 1, 2), sample(0, 1, 2)]) == [0, 1, 2]
    with pytest.raises(DataError, match="2 different sets"):
        distance_edges([sample(0, 1, 2), sample(0, 1)])


def test_heads_file(tmp_path: Path, random_model: Callable[..., Any], byte_tokenizer: Any) -> None:
    model = random_model("llama")
    loaded = LoadedModel(model, byte_tokenizer, models.describe(model, "llama"))
    run_capture(
        CaptureConfig(task="niah", model="llama", n=4, length=220),
        loaded,
        load_task("niah", byte_tokenizer, 4, 220),
        tmp_path / "c.h5",
    )
    summary = run_classify(tmp_path / "c.h5", tmp_path / "heads.json")
    assert sum(summary.counts.values()) == 2 * 4
    heads = read_heads(tmp_path / "heads.json", loaded.info)
    with open_capture(tmp_path / "c.h5") as capture:
        features = head_table(list(capture.samples))
        probes = capture.samples[0].probes()
        a, b = capture.samples[0].meta["evidence"][0]
        assert features.retrieval is not None
        np.testing.assert_allclose(features.retrieval[0], probes.attention[..., a:b].sum(-1).mean(-1), rtol=1e-6)
        # Importance over all heads from the definition: mean over prompts and fed tokens of the absolute summed gain.
        probes_of = [sample.probes() for sample in capture.samples]
        literal = np.mean([np.abs(p.gain.sum(-1) + p.gain_own).mean(-1) for p in probes_of], axis=0)
        np.testing.assert_allclose([h["importance"] for h in heads["heads"]], literal.flatten(), rtol=1e-6)
    assert [(h["layer"], h["head"]) for h in heads["heads"]] == [(layer, q) for layer in range(2) for q in range(4)]
    assert [(h["layer"], h["head"]) for h in heads["kv_heads"]] == [(layer, h) for layer in range(2) for h in range(2)]
    for kv in heads["kv_heads"]:
        members = [h for h in heads["heads"] if h["layer"] == kv["layer"] and h["head"] // 2 == kv["head"]]
        for name in ("sink", "local", "far", "entropy", "importance", "retrieval"):
            assert kv[name] == pytest.approx(np.mean([h[name] for h in members]), abs=1e-12)
    local = [edge < 32 for edge in heads["distance_edges"]]
    for head in heads["heads"]:
        assert sum(head["distance_profile"]) == pytest.approx(1, abs=1e-4)
        near = sum(x for x, inside in zip(head["distance_profile"], local, strict=True) if inside)
        assert near == pytest.approx(head["local"], abs=1e-4)
    first = heads["heads"][0]
    assert first["sink"] + first["local"] + first["far"] == pytest.approx(1, abs=1e-4)
    other = models.describe(random_model("llama", seed=3), "other")
    with pytest.raises(DataError, match="not of other"):
        read_heads(tmp_path / "heads.json", other)
