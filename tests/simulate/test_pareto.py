from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvtool.simulate.pareto import pareto_front

values = st.sampled_from([0.0, 1.0, 2.0, 3.0, 4.0, float("nan")])


@given(st.lists(st.tuples(values, values), max_size=12))
def test_against_brute_force(points: list[tuple[float, float]]) -> None:
    cost, harm = np.asarray([p[0] for p in points], dtype=float), np.asarray([p[1] for p in points], dtype=float)
    expected = []
    for c, h in points:
        beaten = any((oc <= c and oh <= h) and (oc < c or oh < h) for oc, oh in points)
        expected.append(not beaten and c == c and h == h)
    assert pareto_front(cost, harm).tolist() == expected
