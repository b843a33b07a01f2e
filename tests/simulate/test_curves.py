"""Curves against loops over the definition, in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kvtool.capture.reader import open_capture
from kvtool.models import LoadedModel
from kvtool.policies import expand_policies, kept_positions
from kvtool.simulate.curves import curves, probe_table
from kvtool.simulate.evaluate import evaluate_sample

L, H, G, P, T = 2, 2, 2, 3, 40
Q = H * G


@pytest.fixture
def probes() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    rows = rng.dirichlet(np.full(T + P, 0.3), size=(L, Q, P))
    gain = rows * rng.normal(size=rows.shape)
    return {
        "attention": rows[..., :T].astype(np.float32),
        "gain": gain[..., :T].astype(np.float32),
        "attention_own": rows[..., T:].sum(-1).astype(np.float32),
        "gain_own": gain[..., T:].sum(-1).astype(np.float32),
    }


def literal(probes: dict[str, np.ndarray], kept: list[list[list[int]]]) -> tuple[float, float, float, float]:
    """Harm, signed change, largest layer harm and recall, one number at a time."""
    harms, change, recalls = [], 0.0, []
    for layer in range(L):
        harm = 0.0
        for q in range(Q):
            positions = kept[layer][q // G]
            for i in range(P):
                a, b = probes["attention"][layer, q, i], probes["gain"][layer, q, i]
                own_a, own_b = float(probes["attention_own"][layer, q, i]), float(probes["gain_own"][layer, q, i])
                some_a, some_b = sum(float(a[j]) for j in positions), sum(float(b[j]) for j in positions)
                all_a, all_b = sum(float(x) for x in a), sum(float(x) for x in b)
                d = (some_b + own_b) / (some_a + own_a) - (all_b + own_b)
                change += d
                harm -= min(0.0, d)
                recalls.append(some_a / all_a)
        harms.append(harm)
    return sum(harms), change, max(harms), float(np.mean(recalls))


def test_equal_the_literal_definition_with_budgets_per_head(probes: dict[str, np.ndarray]) -> None:
    rng = np.random.default_rng(1)
    order = np.stack([[rng.permutation(T) for _ in range(H)] for _ in range(L)])
    counts = np.concatenate([rng.integers(0, T + 1, size=(20, L, H)), np.zeros((1, L, H), int), np.full((1, L, H), T)])
    table = probe_table(probes["attention"], probes["gain"], probes["attention_own"], probes["gain_own"], H)
    got = curves(table, order, counts)
    for n, count in enumerate(counts):
        kept = [[order[layer, h, : count[layer, h]].tolist() for h in range(H)] for layer in range(L)]
        want = literal(probes, kept)
        have = (got.harm[n], got.margin_change[n], got.layer_harm[n], got.recall[n])
        np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-6)


def test_full_budget_costs_nothing(probes: dict[str, np.ndarray]) -> None:
    # Real probes sum to one over all entries, own ones included, so keeping all changes nothing.
    order = np.tile(np.arange(T), (L, H, 1))
    table = probe_table(probes["attention"], probes["gain"], probes["attention_own"], probes["gain_own"], H)
    got = curves(table, order, np.full((1, L, H), T))
    assert got.harm[0] < 1e-5
    assert got.recall[0] == pytest.approx(1)


def test_predictions_of_a_capture_equal_the_literal_definition(llama_capture: tuple[Path, LoadedModel]) -> None:
    policies = expand_policies((), ["20%", "45%"])
    with open_capture(llama_capture[0]) as capture:
        sample = capture.samples[0]
        p = sample.probes()
        named = {"attention": p.attention, "gain": p.gain, "attention_own": p.attention_own, "gain_own": p.gain_own}
        views = sample.views()
        for policy, prediction in zip(policies, evaluate_sample(sample, policies), strict=True):
            kept = [[x.tolist() for x in layer] for layer in kept_positions(policy, views)]
            total = _literal_of_any_shape(named, kept, capture.model.group_size)
            assert prediction.harm == pytest.approx(total, rel=1e-4, abs=1e-5), str(policy)
            assert prediction.entries == pytest.approx(np.mean([len(h) for layer in kept for h in layer]))


def _literal_of_any_shape(probes: dict[str, np.ndarray], kept: list[list[list[int]]], group: int) -> float:
    harm = 0.0
    for layer, heads in enumerate(kept):
        for q in range(probes["attention"].shape[1]):
            index = heads[q // group]
            for i in range(probes["attention"].shape[2]):
                a, b = (probes[k][layer, q, i].astype(np.float64) for k in ("attention", "gain"))
                own_a, own_b = (float(probes[k][layer, q, i]) for k in ("attention_own", "gain_own"))
                harm -= min(0.0, (b[index].sum() + own_b) / (a[index].sum() + own_a) - (b.sum() + own_b))
    return harm
