"""Content against slot: literal correlations of whole matrices, and heads that are made to follow one or the other."""

from __future__ import annotations

import capture_toy as toy
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtool.attention import AttentionCall
from kvtool.capture.features import LOCAL, SINK
from kvtool.capture.permuted import TAIL, Permutation, _compare, permutation, run_permuted
from kvtool.capture.prompt_pass import run_prompt
from kvtool.capture.reader import open_capture
from kvtool.capture.runner import CaptureConfig, run_capture
from kvtool.classify.features import head_table, missing_features
from kvtool.classify.kinds import kinds_per_prompt, weighted_means


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**63 - 1), st.integers(1, 70))
def test_every_block_moves_and_nothing_else(seq_len, seed, block):
    plan = permutation(seq_len, seed, block)
    if plan is None:
        assert (seq_len - TAIL - LOCAL - SINK) // block < 2
        return
    assert sorted(plan.source) == list(range(seq_len))
    assert plan.stop == seq_len - TAIL - LOCAL
    assert plan.start >= SINK
    assert plan.start - SINK < block
    outside = [*range(plan.start), *range(plan.stop, seq_len)]
    assert [plan.source[k] for k in outside] == outside
    moved = np.asarray(plan.source[plan.start : plan.stop]).reshape(-1, block)
    assert (np.diff(moved, axis=1) == 1).all()
    assert (moved[:, 0] != np.arange(plan.start, plan.stop, block)).all()
    assert permutation(seq_len, seed, block) == plan


def _literal(first, second, plan):
    """Correlation over (row, token) pairs, row means taken off, from whole float64 matrices of one head."""
    place = {token: slot for slot, token in enumerate(plan.source)}
    content, slot = [], []
    for row in range(len(plan.source) - TAIL, len(plan.source)):
        here = np.asarray([float(first[row, t]) for t in range(plan.start, plan.stop)])
        moved = np.asarray([float(second[row, place[t]]) for t in range(plan.start, plan.stop)])
        stays = np.asarray([float(second[row, t]) for t in range(plan.start, plan.stop)])
        content.append((here - here.mean(), moved - moved.mean()))
        slot.append((here - here.mean(), stays - stays.mean()))

    def correlation(pairs):
        a, b = (np.concatenate([p[k] for p in pairs]) for k in (0, 1))
        return (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())

    return correlation(content), correlation(slot)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt_neox"])
def test_correlations_equal_whole_matrices(kind):
    model = toy.build_model(kind)
    (sample,) = toy.make_samples(1, n_context=180)
    plan = permutation(180, 7, block=16)
    assert plan is not None
    found = run_permuted(model, sample.context_ids, run_prompt(model, sample.context_ids, ["last"], 4), plan)
    first = toy.full_pass(model, sample.context_ids, None)
    second = toy.full_pass(model, [sample.context_ids[k] for k in plan.source], None)
    assert found.content.shape == (2, 4)
    for layer in range(2):
        for head in range(4):
            content, slot = _literal(first.attention[layer][head], second.attention[layer][head], plan)
            np.testing.assert_allclose(found.content[layer, head], content, rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(found.slot[layer, head], slot, rtol=1e-3, atol=1e-4)


def test_heads_that_follow_content_or_places():
    """Keys that carry their token's name, and keys that carry their place: the scores are 1 and 0, and 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    plan = permutation(300, 3, block=32)
    assert isinstance(plan, Permutation)
    names = torch.randn(1, 300, 64, generator=generator) * 3
    queries = torch.randn(1, TAIL, 64, generator=generator)
    for moves, expected in ((True, (1, 0)), (False, (0, 1))):
        second = names[:, list(plan.source)] if moves else names
        whole = torch.zeros(1, 300, 64)
        whole[:, -TAIL:] = queries
        call = AttentionCall(0, whole[None], second[None], second[None], None, 0.125, None)
        content, slot = _compare(queries, names, call, plan)
        assert content.item() == pytest.approx(expected[0], abs=0.1)
        assert slot.item() == pytest.approx(expected[1], abs=0.1)


def test_sliding_windows_and_short_prompts_have_no_score(tmp_path, capsys):
    loaded, (sample,) = toy.build_loaded("mistral"), toy.make_samples(1, n_context=300)
    run_capture(CaptureConfig("toy", "mistral", 1, windows=(8,)), loaded, [sample], tmp_path / "w.h5")
    with open_capture(tmp_path / "w.h5") as capture:
        features = capture.samples[0].features()
        assert features.content_follow is not None
        assert np.isnan(features.content_follow).all()
        assert np.isnan(features.slot_follow).all()
    summary = run_capture(CaptureConfig("toy", "m", 1, windows=(8,)), loaded, toy.make_samples(1), tmp_path / "s.h5")
    assert summary.n_unpermuted == 1
    assert "too short to permute" in capsys.readouterr().err


def test_without_the_second_pass(tmp_path):
    loaded, (sample,) = toy.build_loaded("llama"), toy.make_samples(1, n_context=300)
    for permute in (1, 0):
        out = tmp_path / f"{permute}.h5"
        summary = run_capture(CaptureConfig("toy", "llama", 1, windows=(8,), permute=permute), loaded, [sample], out)
        assert summary.n_unpermuted == 0
        with open_capture(out) as capture:
            assert (capture.samples[0].features().content_follow is not None) == bool(permute)


def test_only_the_first_prompts_are_run_permuted_and_their_mean_stands_for_the_others(tmp_path):
    loaded, samples = toy.build_loaded("llama"), toy.make_samples(3, n_context=300)
    summary = run_capture(CaptureConfig("toy", "llama", 3, windows=(8,), permute=2), loaded, samples, tmp_path / "c.h5")
    assert summary.n_unpermuted == 0
    with open_capture(tmp_path / "c.h5") as capture:
        table = head_table(list(capture.samples))
        assert missing_features(capture).get("content") is None
    assert table.content is not None
    assert [bool(np.isfinite(rows).all()) for rows in table.content] == [True, True, False]
    only_third = weighted_means(table, np.array([0.0, 0.0, 1.0])).content
    assert only_third == pytest.approx(table.content[:2].mean(0))
    half = weighted_means(table, np.array([0.5, 0.0, 0.5])).content
    assert half == pytest.approx(table.content[0])
    assert kinds_per_prompt(table).shape == table.content.shape
