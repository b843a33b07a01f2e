from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvtool import models
from kvtool.capture.reader import open_capture
from kvtool.capture.runner import CaptureConfig, run_capture
from kvtool.classify.features import HeadTable, head_table
from kvtool.classify.kinds import KINDS, classify_heads
from kvtool.classify.runner import read_heads, run_classify
from kvtool.data.tasks import load_task
from kvtool.errors import DataError
from kvtool.models import LoadedModel


def table(sink: Any, local: Any, retrieval: Any = None) -> HeadTable:
    """S prompts x 1 layer x heads."""
    s, near = (np.asarray(x, dtype=float)[:, None, :] for x in (sink, local))
    found = None if retrieval is None else np.asarray(retrieval, dtype=float)[:, None, :]
    return HeadTable(s, near, 1 - s - near, np.zeros_like(s), np.zeros_like(s), found)


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
    first = heads["heads"][0]
    assert first["sink"] + first["local"] + first["far"] == pytest.approx(1, abs=1e-4)
    other = models.describe(random_model("llama", seed=3), "other")
    with pytest.raises(DataError, match="not of other"):
        read_heads(tmp_path / "heads.json", other)
