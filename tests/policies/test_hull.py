"""Optimal budgets against exhaustive search over every allocation."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtool.errors import ConfigError
from kvtool.policies.hull import Hull, lower_hull, rank_one, water_fill


def brute_force(curves: list[np.ndarray], total: int) -> float:
    """Smallest sum of harms over all whole-number budgets that sum to `total`; curve k starts at budget 0."""
    best = np.inf
    for choice in product(*(range(len(c)) for c in curves)):
        if sum(choice) == total:
            best = min(best, sum(c[n] for c, n in zip(curves, choice, strict=True)))
    return float(best)


curve = st.lists(st.integers(0, 40), min_size=2, max_size=6)


@settings(max_examples=150, deadline=None)
@given(st.lists(curve, min_size=1, max_size=4), st.floats(0, 1))
def test_convex_curves_are_shared_out_optimally(drawn: list[list[int]], share: float) -> None:
    # Falling convex curves: sorted decreasing steps.
    curves = [np.concatenate([[0.0], -np.cumsum(sorted(c, reverse=True))]) + 100 for c in drawn]
    total = round(share * sum(len(c) - 1 for c in curves))
    hulls = [lower_hull(np.arange(len(c)), c) for c in curves]
    budgets = water_fill(hulls, total)
    assert budgets.sum() == total
    found = sum(float(c[n]) for c, n in zip(curves, budgets, strict=True))
    assert found == pytest.approx(brute_force(curves, total))


@settings(max_examples=150, deadline=None)
@given(st.lists(curve, min_size=1, max_size=3), st.floats(0, 1))
def test_any_curves_come_within_one_segment(drawn: list[list[int]], share: float) -> None:
    """Curves that are not convex: the hull's value bounds the optimum from below, one segment's error from above."""
    curves = [np.asarray(c, dtype=float) for c in drawn]
    total = round(share * sum(len(c) - 1 for c in curves))
    hulls = [lower_hull(np.arange(len(c)), c) for c in curves]
    budgets = water_fill(hulls, total)
    relaxed = sum(hull.at(n) for hull, n in zip(hulls, budgets, strict=True))
    best = brute_force(curves, total)
    assert relaxed <= best + 1e-9
    found = sum(float(c[n]) for c, n in zip(curves, budgets, strict=True))
    # All units but the last one rest on a vertex, where hull and curve agree.
    off = [k for k, (hull, n) in enumerate(zip(hulls, budgets, strict=True)) if n not in hull.entries]
    assert len(off) <= 1
    assert found <= relaxed + sum(float(curves[k][budgets[k]]) - hulls[k].at(budgets[k]) for k in off) + 1e-9


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-50, 50), min_size=2, max_size=30))
def test_hull_is_convex_below_and_touches(harm: list[float]) -> None:
    values, entries = np.asarray(harm), np.cumsum(np.arange(1, len(harm) + 1))
    hull = lower_hull(entries, values)
    assert (np.diff(np.diff(hull.harm) / np.diff(hull.entries)) >= -1e-9).all() or len(hull.entries) < 3
    assert all(hull.at(e) <= v + 1e-9 for e, v in zip(entries, values, strict=True))
    assert (hull.entries[0], hull.entries[-1]) == (entries[0], entries[-1])
    assert all(values[entries.tolist().index(e)] == h for e, h in zip(hull.entries, hull.harm, strict=True))


def test_layers_cost_all_their_heads() -> None:
    steep, flat = Hull(np.array([0, 4]), np.array([8.0, 0.0])), Hull(np.array([0, 4]), np.array([4.0, 0.0]))
    assert water_fill([flat, steep], 10, cost=np.array([2, 2])).tolist() == [1, 4]
    with pytest.raises(ConfigError, match="cannot be shared"):
        water_fill([flat, steep], 9, cost=np.array([2, 2]))
    with pytest.raises(ConfigError, match="the curves cover 0 to 8"):
        water_fill([flat, steep], 9)


def test_rank_one_keeps_total_and_margins() -> None:
    budgets = np.array([[10.0, 2.0, 6.0], [4.0, 2.0, 2.0]])
    product_ = rank_one(budgets, 2.0)
    assert product_.sum() == pytest.approx(budgets.sum())
    np.testing.assert_allclose(product_.sum(0), budgets.sum(0))
    np.testing.assert_allclose(product_.sum(1), budgets.sum(1))
    assert np.linalg.matrix_rank(product_ - 2.0) == 1
    np.testing.assert_allclose(rank_one(product_, 2.0), product_)
