"""Sharing entries out: sums, limits, proportions and rounding, on any weights."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtool.errors import ConfigError
from kvtool.policies import shares
from kvtool.policies.shares import share


@st.composite
def requests(draw: st.DrawFn) -> tuple[int, list[float], int, int]:
    n = draw(st.integers(1, 12))
    low = draw(st.integers(0, 20))
    high = low + draw(st.integers(0, 60))
    weights = draw(st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e6)), min_size=n, max_size=n))
    return draw(st.integers(low * n, high * n)), weights, low, high


@settings(max_examples=300, deadline=None)
@given(requests())
def test_exact_within_limits_and_in_order(request: tuple[int, list[float], int, int]) -> None:
    total, weights, low, high = request
    found = share(total, weights, low, high)
    assert sum(found) == total
    assert all(low <= x <= high for x in found)
    order = np.argsort(weights, kind="stable")
    for small, large in pairwise(order):
        # A larger weight never gets less, but for the one entry that rounding gives.
        assert found[small] <= found[large] + 1


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=10), st.integers(0, 500))
def test_largest_remainder_where_no_limit_binds(weights: list[int], total: int) -> None:
    found = share(total, weights, 0, 10**9)
    quotas = [Fraction(total * w, sum(weights)) for w in weights]
    whole = [q.numerator // q.denominator for q in quotas]
    rest = sorted(range(len(weights)), key=lambda i: (whole[i] - quotas[i], i))[: total - sum(whole)]
    want = [w + (i in rest) for i, w in enumerate(whole)]
    # Equal remainders may be told apart by the last bit of a float: then the sorted shares still agree.
    assert sorted(found) == sorted(want)
    assert max(abs(f - w) for f, w in zip(found, want, strict=True)) <= 1


def test_a_worked_example() -> None:
    # 2 each first; 20 - 6 = 14 left as 7 : 2 : 1; the first may take 5 only, the rest goes on as 2 : 1.
    assert share(20, [7.0, 2.0, 1.0], 2, 7) == [7, 7, 6]
    # 8 left: 5.6, 1.6, 0.8; the last has the largest remainder, then the first of two equal ones.
    assert share(14, [7.0, 2.0, 1.0], 2, 20) == [8, 3, 3]
    assert share(7, [0.0, 0.0, 0.0], 1, 5) == [3, 2, 2]
    assert share(9, [1.0, 0.0, 0.0], 1, 5) == [5, 2, 2]


@pytest.mark.parametrize(("total", "weights"), [(3, [1.0, 1.0]), (99, [1.0, 1.0]), (8, [1.0, -1.0]), (8, [1.0, float("nan")])])
def test_what_cannot_be_shared_is_refused(total: int, weights: list[float]) -> None:
    with pytest.raises(ConfigError):
        share(total, weights, 2, 10)


@given(
    weights=st.lists(st.one_of(st.floats(0, 1e6), st.integers(0, 4).map(float)), min_size=1, max_size=40),
    low=st.integers(0, 9),
    room=st.integers(0, 60),
    part=st.floats(0, 1),
)
@settings(max_examples=200, deadline=None)
def test_few_are_shared_as_many_are(weights: list[float], low: int, room: int, part: float) -> None:
    total = low * len(weights) + round(part * room * len(weights))
    with pytest.MonkeyPatch.context() as patch:
        quick = share(total, weights, low, low + room)
        patch.setattr(shares, "FEW", 0)
        assert share(total, weights, low, low + room) == quick
