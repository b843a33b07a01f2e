"""Errors of confirmed runs, carried over: against a literal loop, and in the cases where nothing may be carried over."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtool.residuals import PRIOR, SCALE, Residuals, Setting, carried_over

HERE = Setting("model", "prompt", True, 512)
shares = st.floats(0.001, 1.0)
errors = st.floats(-1.0, 1.0)
runs = st.lists(st.lists(st.tuples(st.sampled_from("abc"), shares, errors), min_size=1, max_size=6), min_size=1, max_size=3)


def made(rows: list[tuple[str, float, float]], setting: Setting = HERE) -> Residuals:
    return Residuals(setting, *(tuple(column) for column in zip(*rows, strict=True)))  # type: ignore[arg-type]


def literal(rows: list[tuple[str, float, float]], method: str, share: float) -> float:
    """Level of all policies near the share, and the policy's own error beyond the level where it was made."""

    def near(a: float, b: float) -> float:
        return math.exp(-abs(math.log(a) - math.log(b)) / SCALE)

    def level(at: float) -> float:
        return sum(near(at, s) * e for _, s, e in rows) / (sum(near(at, s) for _, s, _ in rows) + PRIOR)

    mine = [(s, e - level(s)) for m, s, e in rows if m == method]
    own = sum(near(share, s) * e for s, e in mine) / (sum(near(share, s) for s, _ in mine) + PRIOR)
    return level(share) + own


@settings(max_examples=50, deadline=None)
@given(known=runs, wanted=st.lists(st.tuples(st.sampled_from("abcd"), shares), min_size=1, max_size=5))
def test_a_literal_loop_gives_the_same(known: list[list[tuple[str, float, float]]], wanted: list[tuple[str, float]]) -> None:
    found = carried_over([made(rows) for rows in known], HERE, [m for m, _ in wanted], [s for _, s in wanted])
    flat = [row for rows in known for row in rows]
    assert found == pytest.approx([literal(flat, m, s) for m, s in wanted], abs=1e-12)


def test_a_policy_that_was_confirmed_often_keeps_its_error_and_a_stranger_gets_the_level() -> None:
    rows = [("a", 0.05, 0.3), ("b", 0.05, -0.1)]
    known = [made(rows)] * 100
    assert carried_over(known, HERE, ["a", "b", "stranger"], [0.05] * 3) == pytest.approx([0.3, -0.1, 0.1], abs=0.002)
    # Far from where it was confirmed, nothing is known of it.
    assert np.abs(carried_over(known[:1], HERE, ["a"], [1.0])).max() < 0.001


@pytest.mark.parametrize(
    "other",
    [Setting("model", "context", True, 512), Setting("other", "prompt", True, 512), Setting("model", "prompt", False, 512)],
)
def test_other_settings_get_nothing(other: Setting) -> None:
    assert carried_over([made([("a", 0.05, 0.3)])], other, ["a"], [0.05]).tolist() == [0.0]
    assert carried_over([], HERE, [], []).shape == (0,)


def test_between_lengths_only_the_level_is_carried_over() -> None:
    known = [made([("a", 0.05, 0.3), ("b", 0.05, -0.1)])] * 100
    longer = replace(HERE, length=1024)
    assert carried_over(known, longer, ["a", "b"], [0.05] * 2) == pytest.approx([0.1, 0.1], abs=0.001)
    # Runs of the length itself take the place of those of other lengths.
    both = [*known, *[made([("a", 0.05, -0.2)], longer)] * 100]
    assert carried_over(both, longer, ["a", "b"], [0.05] * 2) == pytest.approx([-0.2, -0.2], abs=0.002)


@pytest.mark.parametrize(
    "change", [{"errors": [1.0]}, {"errors": [float("nan"), 0.0]}, {"shares": [0.0, 0.1]}, {"setting": {"model": "m"}}]
)
def test_damaged_errors_are_refused(change: dict[str, Any]) -> None:
    value = asdict(made([("a", 0.05, 0.3), ("b", 0.1, 0.0)]))
    assert Residuals.of(value) == made([("a", 0.05, 0.3), ("b", 0.1, 0.0)])
    with pytest.raises((KeyError, ValueError)):
        Residuals.of({**value, **change})
