"""One point per curve for a total: against exhaustive search, for any curves."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtool.errors import ConfigError
from kvtool.policies.choice import best_choice

curve = st.lists(st.integers(-30, 30), min_size=1, max_size=6)


def brute_force(units: list[tuple[np.ndarray, np.ndarray]], total: int) -> float:
    best = np.inf
    for choice in product(*(range(len(entries)) for entries, _ in units)):
        if sum(int(entries[i]) for i, (entries, _) in zip(choice, units, strict=True)) == total:
            best = min(best, sum(float(values[i]) for i, (_, values) in zip(choice, units, strict=True)))
    return float(best)


@settings(max_examples=100, deadline=None)
@given(st.lists(curve, min_size=1, max_size=5), st.floats(0, 1), st.integers(0, 3))
def test_any_curves_are_shared_out_optimally(drawn: list[list[int]], share: float, low: int) -> None:
    units = [(np.arange(low, low + len(c)), np.asarray(c, dtype=float)) for c in drawn]
    total = sum(int(e[0]) for e, _ in units) + round(share * sum(len(c) - 1 for c in drawn))
    found = best_choice(units, total)
    assert found.entries.sum() == total
    assert found.value == pytest.approx(sum(float(v[n - low]) for (_, v), n in zip(units, found.entries, strict=True)))
    assert found.value == pytest.approx(brute_force(units, total))
    assert found.proved
    assert found.bound == pytest.approx(found.value)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(curve, st.integers(1, 4)), min_size=1, max_size=4), st.floats(0, 1))
def test_units_of_different_steps(drawn: list[tuple[list[int], int]], share: float) -> None:
    units = [(np.arange(len(c)) * step, np.asarray(c, dtype=float)) for c, step in drawn]
    total = round(share * sum(int(e[-1]) for e, _ in units))
    expected = brute_force(units, total)
    if np.isfinite(expected):
        found = best_choice(units, total)
        assert (found.value, int(found.entries.sum())) == (pytest.approx(expected), total)
    else:
        with pytest.raises(ConfigError, match="cannot be shared exactly"):
            best_choice(units, total)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.floats(0, 9), min_size=4, max_size=6), min_size=3, max_size=4), st.floats(0, 1))
def test_without_work_the_bound_still_holds(drawn: list[list[float]], share: float) -> None:
    units = [(np.arange(len(c)), np.asarray(c)) for c in drawn]
    total = round(share * sum(len(c) - 1 for c in drawn))
    found, expected = best_choice(units, total, work=0), brute_force(units, total)
    assert found.entries.sum() == total
    assert found.bound - 1e-9 <= expected <= found.value + 1e-9
    if found.proved:
        assert found.value == pytest.approx(expected)


def test_long_curves_with_flat_parts_and_steps() -> None:
    """Real curves fall in steps and end in zeros: an answer of a few tokens is found or lost."""
    rng = np.random.default_rng(0)
    units = []
    for _ in range(12):
        falls = np.zeros(600)
        falls[rng.integers(1, 400, 8)] = rng.exponential(size=8)
        units.append((np.arange(600), falls.sum() - np.cumsum(falls)))
    for total in (0, 50, 300, 900, 2500, 12 * 599):
        found = best_choice(units, total)
        assert found.proved
        # Against plain dynamic programming over all totals.
        best = np.zeros(1)
        for entries, values in units:
            joined = np.full(len(best) + len(entries) - 1, np.inf)
            for i, value in enumerate(values):
                joined[i : i + len(best)] = np.minimum(joined[i : i + len(best)], best + value)
            best = joined[: total + 1]
        assert found.value == pytest.approx(float(best[total]), abs=1e-9)


def test_totals_outside_are_refused() -> None:
    units = [(np.array([1, 2]), np.zeros(2)), (np.array([0, 3]), np.zeros(2))]
    for total in (0, 6):
        with pytest.raises(ConfigError, match="the curves cover 1 to 5"):
            best_choice(units, total)
