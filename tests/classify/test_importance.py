"""Importances from a capture against loops, and the heads file that carries one of them to the policies."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvtool import models
from kvtool.capture.reader import open_capture
from kvtool.capture.records import Probes
from kvtool.capture.runner import CaptureConfig, run_capture
from kvtool.classify.importance import (
    CAPTURED,
    answered_right,
    captured_record,
    check_measures,
    far_attention,
    gain_importance,
    measure_captured,
    reasoning_importance,
    write_heads,
)
from kvtool.data.tasks import load_task
from kvtool.errors import ConfigError, DataError
from kvtool.files import read_records
from kvtool.models import LoadedModel
from kvtool.policies import expand_policies, kept_counts
from kvtool.policies.headfile import check_heads, read_head_file


def random_probes(margins: tuple[float, ...] = (1.0, 2.0), rows: tuple[int, ...] = (1, 2)) -> Probes:
    """2 layers, 4 query heads, 3 fed tokens, 12 positions."""
    rng = np.random.default_rng(0)
    attention, gain = rng.random((2, 4, 3, 12)), rng.normal(size=(2, 4, 3, 12))
    own = rng.random((2, 2, 4, 3))
    m = np.asarray(margins)
    arrays = (attention, gain, own[0], own[1], m, m)
    return Probes(*(a.astype(np.float32) for a in arrays), np.asarray(rows, dtype=np.int32))


def toy_sample(probes: Probes, evidence: list[list[int]], compressible: tuple[bool, bool] = (True, True)) -> Any:
    capture = SimpleNamespace(model=SimpleNamespace(n_kv_heads=2))
    spans = [(a, min(b, 12)) for a, b in evidence if a < 12]
    return SimpleNamespace(id="s", probes=lambda: probes, compressible=compressible, evidence_spans=spans, capture=capture)


def test_far_attention_and_gain_by_loops() -> None:
    probes = random_probes()
    far, gain = far_attention(probes.attention, 2, 3), gain_importance(probes.gain, probes.gain_own)
    for layer in range(2):
        for head in range(4):
            masses, gains = [], []
            for token in range(3):
                row = probes.attention[layer, head, token]
                masses.append(sum(float(row[j]) for j in range(12) if j >= 2 and j < 9))
                gains.append(abs(sum(map(float, probes.gain[layer, head, token])) + float(probes.gain_own[layer, head, token])))
            assert far[layer, head] == pytest.approx(sum(masses) / 3, rel=1e-6)
            assert gain[layer, head] == pytest.approx(sum(gains) / 3, rel=1e-5)
    # No window: up to the last position.
    assert far_attention(probes.attention, 0, 0) == pytest.approx(probes.attention.sum(-1).mean(-1), rel=1e-5)


def test_reasoning_by_loops() -> None:
    probes, spans = random_probes(), [(3, 6), (8, 10)]
    found = reasoning_importance(probes, spans)
    for layer in range(2):
        for head in range(4):
            by_span = []
            for a, b in spans:
                score = 0.0
                for token in (1, 2):  # the fed tokens that predict answer tokens; the first is the question's
                    row = probes.attention[layer, head, token]
                    best = sorted(range(12), key=lambda j: -row[j])[: b - a]
                    score += sum(float(row[j]) for j in best if a <= j < b) / (b - a)
                by_span.append(score)
            assert found[layer, head] == pytest.approx(sum(by_span) / 2, rel=1e-6)
    assert found.max() > 0


def test_wrong_answers_and_unknown_evidence_do_not_count() -> None:
    right, wrong = random_probes((1.0, 2.0)), random_probes((1.0, -0.1))
    assert answered_right(right)
    assert not answered_right(wrong)
    assert captured_record(toy_sample(right, [[3, 5]]), 1, 2)["missing"] == {}
    record = captured_record(toy_sample(wrong, [[3, 5]]), 1, 2)
    assert record["missing"] == {"reasoning": "answered wrong"}
    assert "reasoning" not in record["measures"]
    # Evidence behind what is compressed is none.
    assert captured_record(toy_sample(right, [[12, 13]]), 1, 2)["missing"] == {"reasoning": "names no evidence"}


def test_records_hold_the_layers_that_can_be_compressed() -> None:
    probes = random_probes()
    record = captured_record(toy_sample(probes, [], (False, True)), 1, 2)
    assert record["layers"] == [1]
    rows = np.asarray(record["measures"]["gain"]["heads"])
    np.testing.assert_allclose(rows, gain_importance(probes.gain, probes.gain_own)[1:])
    np.testing.assert_allclose(record["measures"]["gain"]["kv_heads"], rows.reshape(1, 2, 2).mean(-1))


def test_measures_are_checked_by_name() -> None:
    check_measures(["gain", "ablation"], ablated=True)
    with pytest.raises(ConfigError, match="Did you mean 'ablation'"):
        check_measures(["ablaton"], ablated=True)
    with pytest.raises(ConfigError, match="add --ablate"):
        check_measures(["ablation_margin"], ablated=False)


@pytest.fixture(scope="module")
def toy(
    tmp_path_factory: pytest.TempPathFactory, random_model: Callable[..., Any], byte_tokenizer: Any
) -> tuple[Path, LoadedModel]:
    path, model = tmp_path_factory.mktemp("importance") / "c.h5", random_model("llama")
    loaded = LoadedModel(model, byte_tokenizer, models.describe(model, "llama"))
    run_capture(
        CaptureConfig(task="niah", model="llama", n=4, length=220), loaded, load_task("niah", byte_tokenizer, 4, 220), path
    )
    return path, loaded


def test_captured_measures(toy: tuple[Path, LoadedModel], tmp_path: Path) -> None:
    facts = measure_captured(toy[0], tmp_path / "out", 4, 16)
    assert facts["cut"] == {"sink": 4, "window": 16}
    assert facts["data"]["prompts"] == 4
    records = read_records(tmp_path / "out" / CAPTURED)
    with open_capture(toy[0]) as capture:
        assert [r["sample"] for r in records] == [s.id for s in capture.samples]
        attention = capture.samples[2].probes().attention
        kept = np.zeros(attention.shape[-1], dtype=bool)
        kept[:4] = kept[-16:] = True
        found = records[2]["measures"]["attention"]["heads"]
        np.testing.assert_allclose(found, attention[..., ~kept].sum(-1).mean(-1), rtol=1e-5)
    # A random model answers nothing right, and says so.
    assert all(r["missing"] == {"reasoning": "answered wrong"} for r in records)
    with pytest.raises(ConfigError, match="another configuration"):
        measure_captured(toy[0], tmp_path / "out", 4, 17)
    with pytest.raises(ConfigError, match=r"nothing to cut of prompt .* with 220 tokens"):
        measure_captured(toy[0], tmp_path / "other", 20, 200)
    assert not (tmp_path / "other").exists()


def comparison(path: Path, loaded: LoadedModel, fingerprint: str = "") -> Path:
    """An importance.json with one measure, rising with layer and head; the first query head is worse than nothing."""
    rows = {
        level: [
            {"level": level, "layer": layer, "head": head, "measure": "gain", "mean": float(10 * layer + head - (n == 4))}
            for layer in range(2)
            for head in range(n)
        ]
        for level, n in (("heads", 4), ("kv_heads", 2))
    }
    model = {"model_id": "llama", "fingerprint": fingerprint or loaded.info.fingerprint}
    value = {"model": model, "cut": {"sink": 4, "window": 32}, "measures": {"gain": {"prompts": 4}}, "importance": rows}
    path.write_text(json.dumps(value))
    return path


def test_heads_file_carries_the_importance_to_the_policies(toy: tuple[Path, LoadedModel], tmp_path: Path) -> None:
    path, loaded = toy
    assert write_heads(path, comparison(tmp_path / "i.json", loaded), "gain", tmp_path / "h.json") == 1
    table = read_head_file(str(tmp_path / "h.json"))
    np.testing.assert_array_equal(table.query_scores("importance"), [[0, 0, 1, 2], [9, 10, 11, 12]])
    np.testing.assert_array_equal(table.head_scores("importance", 2), [[0, 1], [10, 11]])
    value = json.loads((tmp_path / "h.json").read_text())
    assert value["importance_measure"] == {"measure": "gain", "sink": 4, "window": 32, "prompts": 4, "negative": 1}
    policies = expand_policies((f"headkv:window=8,kernel=3,beta=1,heads={tmp_path / 'h.json'}",), ["20%"])
    check_heads(policies, loaded.info)
    with open_capture(path) as capture:
        views = capture.samples[0].views()
        counts = np.asarray(kept_counts(policies[0], views, [policies[0].method.parts().scorer.score(v) for v in views]))
    free = counts - 8
    assert free[0, 0] == 0
    np.testing.assert_allclose(free / free.sum(), np.asarray([[0, 1], [10, 11]]) / 22, atol=0.01)


def test_a_comparison_that_does_not_fit_is_refused(toy: tuple[Path, LoadedModel], tmp_path: Path) -> None:
    path, loaded = toy
    with pytest.raises(DataError, match="has no importance 'reasoning' but gain"):
        write_heads(path, comparison(tmp_path / "i.json", loaded), "reasoning", tmp_path / "h.json")
    own = loaded.info.fingerprint
    with pytest.raises(
        DataError, match=rf"i\.json is of .* \(other\), the capture of .* \({own}\); run kvtool analyze importance"
    ):
        write_heads(path, comparison(tmp_path / "i.json", loaded, "other"), "gain", tmp_path / "h.json")
    value = json.loads(comparison(tmp_path / "i.json", loaded).read_text())
    for row in value["importance"]["kv_heads"]:
        row["mean"] = -1.0
    (tmp_path / "i.json").write_text(json.dumps(value))
    with pytest.raises(DataError, match="no head has a positive gain"):
        write_heads(path, tmp_path / "i.json", "gain", tmp_path / "h.json")
    (tmp_path / "i.json").write_text("{}")
    with pytest.raises(DataError, match="no comparison"):
        write_heads(path, tmp_path / "i.json", "gain", tmp_path / "h.json")
    assert not (tmp_path / "h.json").exists()
