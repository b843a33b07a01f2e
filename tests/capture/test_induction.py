"""Scores on repeated tokens: literal sums over whole matrices, and heads built to copy."""

from __future__ import annotations

import capture_toy as toy
import numpy as np
import pytest
import torch

from kvtool.capture.induction import _copies, ordinary_tokens, repeat_scores
from kvtool.capture.reader import open_capture
from kvtool.capture.runner import CaptureConfig, run_capture
from kvtool.models import LoadedModel, final_norm

N = 20


@torch.no_grad()
def _literal(loaded, segment, kind):
    """Induction, echo and copy of every head from one float64 forward, position by position; no first token here."""
    found = toy.full_pass(loaded.model, segment * 2, toy.WINDOW if kind == "mistral" else None)
    attention_modules = [m for m in loaded.model.modules() if hasattr(m, "layer_idx")]
    projections = [
        next(getattr(m, n) for n in ("o_proj", "out_proj", "dense") if hasattr(m, n))
        for m in attention_modules
        if any(hasattr(m, n) for n in ("o_proj", "out_proj", "dense"))
    ]
    norm, unembed = final_norm(loaded.model), loaded.model.get_output_embeddings().weight
    scores = {name: np.zeros((2, 4)) for name in ("induction", "echo", "copy")}
    rows = range(N, 2 * N - 1)
    for layer in range(2):
        values = found.values[layer].repeat_interleave(4 // len(found.values[layer]), 0)
        for head in range(4):
            attention = found.attention[layer][head]
            for row in rows:
                scores["induction"][layer, head] += float(attention[row, row - N + 1]) / len(rows)
                scores["echo"][layer, head] += float(attention[row, row - N]) / len(rows)
                top = int(attention[row].argmax())
                added = projections[layer].weight[:, head * 8 : head * 8 + 8] @ (attention[row] @ values[head]).float()
                logits = unembed @ (norm(added[None]) - norm(torch.zeros_like(added[None])))[0]
                best = max(segment, key=lambda token: float(logits[token]))
                scores["copy"][layer, head] += (top >= 4 and best == (segment * 2)[top]) / len(rows)
    return scores


@pytest.mark.parametrize("kind", toy.ARCHITECTURES)
def test_scores_equal_whole_matrices(kind):
    loaded = toy.build_loaded(kind)
    found = repeat_scores(loaded, seed=5, n_tokens=N, n_sequences=1)
    assert not found.skipped
    segment = np.random.default_rng(5).choice(ordinary_tokens(loaded), N, replace=False).tolist()
    for name, expected in _literal(loaded, segment, kind).items():
        np.testing.assert_allclose(found.scores[name], expected, rtol=1e-3, atol=2e-6, err_msg=name)


def test_a_head_that_writes_what_it_reads_copies():
    """Values are the tokens' own embeddings, one head hands them on, the other hands on their opposites."""
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(N, 16, generator=generator)
    tops = torch.arange(N, 2 * N - 1) - N + 1
    attention = torch.zeros(2, N - 1, 2 * N).scatter_(2, tops.expand(2, -1)[..., None], 1.0)
    # Positions below the sink's width do not count.
    counted = (tops >= 4).float().mean()
    outputs = torch.stack([embedding[tops % N], -embedding[tops % N]])
    weight = torch.cat([torch.eye(16), torch.eye(16)], dim=1)
    score = _copies(attention, outputs, weight, torch.nn.LayerNorm(16, elementwise_affine=False), embedding, 0)
    assert score[0].item() == pytest.approx(float(counted), abs=0.11)
    assert score[1].item() < 0.1


def test_what_cannot_be_computed_is_said_and_stored(tmp_path, capsys):
    loaded = toy.build_loaded("llama", max_positions=100)
    run_capture(CaptureConfig("toy", "llama", 1, windows=(8,)), loaded, toy.make_samples(1), tmp_path / "c.h5")
    assert "no induction scores: 128 tokens are needed, the model has a context of 100" in capsys.readouterr().err
    with open_capture(tmp_path / "c.h5") as capture:
        scores = capture.repeats()
    assert scores.induction is None
    assert "context of 100" in scores.skipped["copy"]
    few = repeat_scores(toy.build_loaded("llama"), n_tokens=200)
    assert few.skipped["echo"] == "the tokenizer has 67 ordinary tokens, 200 are needed"


def test_no_final_norm_no_copy_score():
    loaded = toy.build_loaded("llama")
    loaded.model.model.extra = torch.nn.LayerNorm(32)  # a second module of its shape: which one is last cannot be told
    found = repeat_scores(LoadedModel(loaded.model, loaded.tokenizer, loaded.info), n_tokens=N)
    assert set(found.scores) == {"induction", "echo"}
    assert "final norm" in found.skipped["copy"]


def test_special_tokens_are_not_ordinary():
    loaded = toy.build_loaded("llama")
    loaded.tokenizer.add_special_tokens({"bos_token": "w3", "additional_special_tokens": ["brand new"]})
    found = ordinary_tokens(loaded)
    assert 3 not in found
    assert len(found) == 66
    assert found.max() < 67
