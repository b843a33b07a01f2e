"""Errors of confirmed runs, carried over: against a literal loop, and in the cases where nothing may be carried over."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtool.residuals import EVIDENCE, PRIOR, SCALE, Residuals, Setting, carried_over, identified

HERE = Setting("model", "prompt", EVIDENCE, 512.0)
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
    found, own = carried_over([made(rows) for rows in known], HERE, [m for m, _ in wanted], [s for _, s in wanted])
    flat = [row for rows in known for row in rows]
    assert found == pytest.approx([literal(flat, m, s) for m, s in wanted], abs=1e-12)
    assert own.tolist() == [m in {name for name, _, _ in flat} for m, _ in wanted]


def test_a_policy_that_was_confirmed_often_keeps_its_error_and_a_stranger_gets_the_level() -> None:
    rows = [("a", 0.05, 0.3), ("b", 0.05, -0.1)]
    known = [made(rows)] * 100
    assert carried_over(known, HERE, ["a", "b", "stranger"], [0.05] * 3)[0] == pytest.approx([0.3, -0.1, 0.1], abs=0.002)
    # Far from where it was confirmed, nothing is known of it.
    assert np.abs(carried_over(known[:1], HERE, ["a"], [1.0])[0]).max() < 0.001


@pytest.mark.parametrize(
    "change", [{"compress_at": "context"}, {"model": "other"}, {"kind": "text"}, {"kind": "file:qa.jsonl"}], ids=str
)
def test_other_settings_get_nothing(change: dict[str, str]) -> None:
    added, own = carried_over([made([("a", 0.05, 0.3)])], replace(HERE, **change), ["a"], [0.05])  # type: ignore[arg-type]
    assert (added.tolist(), own.tolist()) == ([0.0], [False])
    assert carried_over([], HERE, [], [])[0].shape == (0,)


def test_lengths_that_are_nearly_the_same_are_the_same() -> None:
    known = [made([("a", 0.05, 0.3), ("b", 0.05, -0.3)])]
    near, far = (carried_over(known, replace(HERE, length=length), ["a"], [0.05]) for length in (600.0, 700.0))
    assert near[0] > 0.1
    assert (near[1].tolist(), far[1].tolist()) == ([True], [False])


def test_files_are_known_by_their_content() -> None:
    method = "headkv:window=8,heads=/here/heads.json,kernel=11"
    assert identified([method, "snapkv"], {"/here/heads.json": "ab12"}) == ["headkv:window=8,heads=ab12,kernel=11", "snapkv"]
    assert identified(["optimal:plan=p.json"], {"p.json": "cd"}) == identified(["optimal:plan=q.json"], {"q.json": "cd"})


def test_between_lengths_only_the_level_is_carried_over() -> None:
    known = [made([("a", 0.05, 0.3), ("b", 0.05, -0.1)])] * 100
    longer = replace(HERE, length=1024.0)
    assert carried_over(known, longer, ["a", "b"], [0.05] * 2)[0] == pytest.approx([0.1, 0.1], abs=0.001)
    # Runs of the length itself take the place of those of other lengths.
    both = [*known, *[made([("a", 0.05, -0.2)], longer)] * 100]
    assert carried_over(both, longer, ["a", "b"], [0.05] * 2)[0] == pytest.approx([-0.2, -0.2], abs=0.002)


@pytest.mark.parametrize(
    "change",
    [
        {"errors": [1.0]},
        {"errors": [float("nan"), 0.0]},
        {"shares": [0.0, 0.1]},
        {"setting": {"model": "m"}},
        {"setting": {**asdict(HERE), "length": 0.0}},
    ],
)
def test_damaged_errors_are_refused(change: dict[str, Any]) -> None:
    value = asdict(made([("a", 0.05, 0.3), ("b", 0.1, 0.0)]))
    assert Residuals.of(value) == made([("a", 0.05, 0.3), ("b", 0.1, 0.0)])
    with pytest.raises((KeyError, ValueError)):
        Residuals.of({**value, **change})
