"""Curves against loops over the definition, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from kvtool.capture.reader import open_capture
from kvtool.models import LoadedModel
from kvtool.policies import Policy, expand_policies, kept_positions
from kvtool.policies.base import Allocator, LayerView, Parts, Request
from kvtool.policies.budget import Budget
from kvtool.policies.methods.snapkv import SnapKV
from kvtool.simulate.curves import curves, evidence_lost, probe_table
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
        # Stored values are rounded: the mass is not quite 1.
        "attention_own": (rows[..., T:].sum(-1) + 0.003).astype(np.float32),
        "gain_own": gain[..., T:].sum(-1).astype(np.float32),
    }


def literal(probes: dict[str, np.ndarray], kept: list[list[list[int]]]) -> tuple[float, ...]:
    """Harm, signed change, largest layer harm, recall, largest head harm and missing mass, one number at a time."""
    harms, change, recalls = [], 0.0, []
    by_head, missing, importance = dict.fromkeys(np.ndindex(L, H), 0.0), 0.0, 0.0
    for layer in range(L):
        harm = 0.0
        for q in range(Q):
            positions = kept[layer][q // G]
            for i in range(P):
                a, b = probes["attention"][layer, q, i], probes["gain"][layer, q, i]
                own_a, own_b = float(probes["attention_own"][layer, q, i]), float(probes["gain_own"][layer, q, i])
                some_a, some_b = sum(float(a[j]) for j in positions), sum(float(b[j]) for j in positions)
                all_a, all_b = sum(float(x) for x in a), sum(float(x) for x in b)
                d = (some_b + own_b) / (some_a + own_a) - (all_b + own_b) / (all_a + own_a)
                change += d
                harm -= min(0.0, d)
                by_head[layer, q // G] -= min(0.0, d)
                weight = abs((all_b + own_b) / (all_a + own_a))
                missing += weight * (all_a - some_a) / (all_a + own_a)
                importance += weight
                recalls.append(some_a / all_a)
        harms.append(harm)
    return sum(harms), change, max(harms), float(np.mean(recalls)), max(by_head.values()), missing / importance


def test_equal_the_literal_definition_with_budgets_per_head(probes: dict[str, np.ndarray]) -> None:
    rng = np.random.default_rng(1)
    order = np.stack([[rng.permutation(T) for _ in range(H)] for _ in range(L)])
    counts = np.concatenate([rng.integers(0, T + 1, size=(20, L, H)), np.zeros((1, L, H), int), np.full((1, L, H), T)])
    table = probe_table(probes["attention"], probes["gain"], probes["attention_own"], probes["gain_own"], H)
    got = curves(table, order, counts)
    for n, count in enumerate(counts):
        kept = [[order[layer, h, : count[layer, h]].tolist() for h in range(H)] for layer in range(L)]
        want = literal(probes, kept)
        have = (got.harm[n], got.margin_change[n], got.layer_harm[n], got.recall[n], got.head_harm[n], got.missing[n])
        np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-6)


def test_lost_evidence_counts_each_position_by_attention_and_importance(probes: dict[str, np.ndarray]) -> None:
    rng = np.random.default_rng(2)
    order = np.stack([[rng.permutation(T) for _ in range(H)] for _ in range(L)])
    counts, evidence = rng.integers(0, T + 1, size=(8, L, H)), np.asarray([3, 4, 5, 21])
    table = probe_table(probes["attention"], probes["gain"], probes["attention_own"], probes["gain_own"], H)
    lost, whole = evidence_lost(table, evidence, order, counts)
    for n, count in enumerate(counts):
        want = there = 0.0
        for layer, q, i in np.ndindex(L, Q, P):
            a, b = (probes[name][layer, q, i].astype(float) for name in ("attention", "gain"))
            own_a, own_b = float(probes["attention_own"][layer, q, i]), float(probes["gain_own"][layer, q, i])
            weight = abs((b.sum() + own_b) / (a.sum() + own_a))
            kept = set(order[layer, q // G, : count[layer, q // G]].tolist())
            there += weight * sum(a[j] for j in evidence)
            want += weight * sum(a[j] for j in evidence if j not in kept)
        assert lost[n] == pytest.approx(want, rel=1e-5)
        assert whole == pytest.approx(there, rel=1e-5)


def test_full_budget_costs_nothing(probes: dict[str, np.ndarray]) -> None:
    order = np.tile(np.arange(T), (L, H, 1))
    table = probe_table(probes["attention"], probes["gain"], probes["attention_own"], probes["gain_own"], H)
    got = curves(table, order, np.full((1, L, H), T))
    assert max(got.harm[0], got.head_harm[0], got.missing[0]) < 1e-12
    assert got.recall[0] == pytest.approx(1, abs=1e-12)


def test_full_budget_costs_nothing_on_a_capture(llama_capture: tuple[Path, LoadedModel]) -> None:
    policies = expand_policies((), ["100%"])
    with open_capture(llama_capture[0]) as capture:
        for sample in capture.samples:
            for policy, prediction in zip(policies, evaluate_sample(sample, policies), strict=True):
                assert prediction.harm is not None
                assert prediction.harm < 1e-9, str(policy)
                assert prediction.recall == pytest.approx(1, abs=1e-9)


@dataclass(frozen=True, slots=True)
class Slanted(Allocator):
    """Later layers and heads get more; the mean stays."""

    def allocate(self, views: Sequence[LayerView], scores: Sequence[torch.Tensor], request: Request) -> list[list[int]]:
        n_heads = len(views) * views[0].n_kv_heads
        flat = [request.budget + 2 * k - (n_heads - 1) for k in range(n_heads)]
        return [flat[i * views[0].n_kv_heads :][: views[0].n_kv_heads] for i in range(len(views))]


@dataclass(frozen=True, slots=True)
class SlantedSnapKV(SnapKV):
    name: ClassVar[str] = "slanted"

    def parts(self) -> Parts:
        # The class is named: a slotted dataclass is a new class, which a bare super() does not know.
        return replace(SnapKV.parts(self), allocator=Slanted())


def test_budgets_may_differ_per_head_in_a_whole_evaluation(llama_capture: tuple[Path, LoadedModel]) -> None:
    # The same order serves the uniform and the slanted budgets; both must get their own figures.
    budget = Budget.parse("90")
    policies = [Policy(SlantedSnapKV(), budget), Policy(SnapKV(), budget)]
    with open_capture(llama_capture[0]) as capture:
        sample = capture.samples[0]
        p, views = sample.probes(), sample.views()
        named = {"attention": p.attention, "gain": p.gain, "attention_own": p.attention_own, "gain_own": p.gain_own}
        slanted, uniform = evaluate_sample(sample, policies)
        kept = [[x.tolist() for x in layer] for layer in kept_positions(policies[0], views)]
    assert [len(head) for layer in kept for head in layer] == [87, 89, 91, 93]
    assert slanted.entries == uniform.entries == 90
    assert slanted.harm == pytest.approx(_literal_of_any_shape(named, kept, capture.model.group_size), rel=1e-6)
    assert slanted.harm != pytest.approx(uniform.harm, rel=1e-6)


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
            assert prediction.harm == pytest.approx(total, rel=1e-6, abs=1e-9), str(policy)
            assert prediction.entries == pytest.approx(np.mean([len(h) for layer in kept for h in layer]))


def _literal_of_any_shape(probes: dict[str, np.ndarray], kept: list[list[list[int]]], group: int) -> float:
    harm = 0.0
    for layer, heads in enumerate(kept):
        for q in range(probes["attention"].shape[1]):
            index = heads[q // group]
            for i in range(probes["attention"].shape[2]):
                a, b = (probes[k][layer, q, i].astype(np.float64) for k in ("attention", "gain"))
                own_a, own_b = (float(probes[k][layer, q, i]) for k in ("attention_own", "gain_own"))
                whole = (b.sum() + own_b) / (a.sum() + own_a)
                harm -= min(0.0, (b[index].sum() + own_b) / (a[index].sum() + own_a) - whole)
    return harm
