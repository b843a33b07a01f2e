"""The masked batch against a whole-model forward in float64 with an additive mask per head, one configuration at a time."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvtool.attention import AttentionCall, attention_handler
from kvtool.capture.reader import open_capture
from kvtool.models import LoadedModel
from kvtool.policies import expand_policies, kept_positions
from kvtool.simulate.refine import refine_sample

MIXED = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}


def reference(
    loaded: LoadedModel, sample: Any, kept: list[list[torch.Tensor]], layers: list[int]
) -> tuple[torch.Tensor, list[int]]:
    """Logits ``[M, V]`` and gold tokens of the answer by one float64 forward over all tokens that hides evicted entries."""
    model = copy.deepcopy(loaded.model).double()
    seq_len, prompt, answer = sample.seq_len, sample.prompt_ids, sample.answer_ids
    ids = torch.tensor([prompt + answer[:-1]])
    total = ids.shape[1]

    def handler(call: AttentionCall) -> torch.Tensor:
        group = call.queries.shape[1] // call.keys.shape[1]
        keys, values = (x[0].repeat_interleave(group, 0) for x in (call.keys, call.values))
        i, j = torch.arange(total)[:, None], torch.arange(total)
        visible = (j <= i).expand(call.queries.shape[1], -1, -1).clone()
        if call.window is not None:
            visible &= j > i - call.window
        if call.layer in layers:
            for h, positions in enumerate(kept[layers.index(call.layer)]):
                gone = torch.ones(seq_len, dtype=torch.bool)
                gone[positions] = False
                visible[h * group : (h + 1) * group, seq_len:, :seq_len] &= ~gone
        logits = (call.queries[0] @ keys.transpose(1, 2)) * call.scaling
        return (logits.masked_fill(~visible, float("-inf")).softmax(-1) @ values)[None]

    with torch.no_grad(), attention_handler(model, handler):
        logits = model(ids).logits[0]
    rows = range(max(seq_len, len(prompt) - 1), total)
    return logits[list(rows)], answer[len(answer) - len(rows) :]


def literal_scores(logits: torch.Tensor, full: torch.Tensor, gold: list[int]) -> dict[str, float]:
    """The figures one token at a time, from probabilities."""
    nll, margin, hits, kl = [], [], [], []
    for row, whole, g in zip(logits, full, gold, strict=True):
        p, q = whole.softmax(-1), row.softmax(-1)
        nll.append(-math.log(float(q[g])))
        margin.append(float(row[g] - torch.cat([row[:g], row[g + 1 :]]).logsumexp(-1)))
        hits.append(float(int(row.argmax()) == g))
        kl.append(sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p, q, strict=True)))
    return {name: float(np.mean(x)) for name, x in (("nll", nll), ("margin", margin), ("accuracy", hits), ("kl", kl))} | {
        "exact": float(all(hits))
    }


@pytest.mark.parametrize(
    ("architecture", "compress_at", "changes"),
    [
        ("llama", "prompt", {}),
        ("llama", "context", {}),
        ("mistral", "prompt", {}),
        # Wide enough for the prompt, not for the question on top: compressed, and entries leave the window while feeding.
        ("mistral", "context", {"sliding_window": 200}),
        ("qwen2", "prompt", {}),
        # The first layer full, the second one sliding: only one layer is compressed.
        ("qwen2", "context", MIXED),
        ("opt", "prompt", {}),
        ("gpt_neox", "context", {}),
    ],
)
def test_equals_a_masked_float64_forward(
    architecture: str, compress_at: str, changes: dict[str, Any], tmp_path: Path, make_capture: Callable[..., LoadedModel]
) -> None:
    loaded = make_capture(tmp_path / "c.h5", architecture, n=1, compress_at=compress_at, **changes)
    policies = expand_policies(("snapkv", "h2o", "random", "full"), ["30%"])
    with open_capture(tmp_path / "c.h5") as capture:
        sample = capture.samples[0]
        refined = refine_sample(loaded, sample, policies)
        views = sample.views()
        assert len(views) == {"mistral": 2 * bool(changes), "qwen2": 2 - bool(changes)}.get(architecture, 2)
        full, _ = reference(loaded, sample, [], [])
        for policy, got in zip(policies, refined, strict=True):
            kept = kept_positions(policy, views) if views else []
            logits, gold = reference(loaded, sample, kept, [v.layer for v in views])
            for name, value in literal_scores(logits, full, gold).items():
                assert getattr(got, name) == pytest.approx(value, rel=1e-4, abs=1e-4), (str(policy), name)
    assert refined[-1].kl == pytest.approx(0, abs=1e-6)
    # Where something was dropped the divergence is far above the tolerance: the comparison has something to find.
    assert (refined[0].kl > 1e-2) == bool(views)


def test_batches_do_not_matter(llama_capture: tuple[Path, LoadedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    policies = expand_policies(("snapkv", "h2o", "random"), ["20%", "50%"])
    with open_capture(llama_capture[0]) as capture:
        whole = refine_sample(llama_capture[1], capture.samples[1], policies)
        monkeypatch.setattr("kvtool.simulate.refine.BATCH_ELEMENTS", 1)
        single = refine_sample(llama_capture[1], capture.samples[1], policies)
    for a, b in zip(whole, single, strict=True):
        assert a.nll == pytest.approx(b.nll, abs=1e-5)
        assert a.kl == pytest.approx(b.kl, abs=1e-5)
