"""The gate's threshold against trying all of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtool.policies.compensation import Compensation
from kvtool.simulate.gate import FOLDS, Gate, choose_threshold, fit_gate, gated_loss


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 10**6))
def test_no_threshold_does_better(n_samples: int, n_heads: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Few different values, so that ties are the normal case.
    variance = rng.choice([0.5, 1.25, 1.5, 3.0, 3.001], size=(n_samples, n_heads))
    loss = rng.normal(size=(n_samples, n_heads))
    chosen = choose_threshold(variance, loss)
    tried = [float(np.where(variance <= t, loss, 0.0).sum()) for t in (0.0, 0.5, 1.25, 1.5, 3.0, 3.001)]
    assert gated_loss(chosen, variance, loss).sum() == pytest.approx(min(tried), abs=1e-12)
    if chosen and not math.isinf(chosen):
        option = fit_gate(variance, loss).option()
        assert option is not None
        # What is written is what was fitted, and a policy takes it.
        assert float(option.removeprefix("gate=")) == chosen
        assert Compensation(compensate="mean", gate=float(option.removeprefix("gate="))).gate == chosen


def test_all_none_and_some() -> None:
    variance = np.array([[0.1, 1.0, 9.0], [0.2, 1.1, 8.0]])
    helps, hurts = -np.ones((2, 3)), np.ones((2, 3))
    assert fit_gate(variance, helps).option() == ""
    assert fit_gate(variance, helps).open == 1
    assert fit_gate(variance, hurts).option() is None
    assert fit_gate(variance, hurts).open == 0
    some = fit_gate(variance, np.array([[-1.0, -1.0, 5.0], [-1.0, -1.0, 5.0]]))
    assert 1.1 <= some.threshold < 8
    assert some.fitted == -2
    assert some.open == pytest.approx(2 / 3)


def test_prompts_are_judged_by_thresholds_of_others() -> None:
    # The only prompt in which compensation helps cannot vouch for itself.
    variance, loss = np.ones((4, 1)), np.array([[-9.0], [1.0], [1.0], [1.0]])
    gate = fit_gate(variance, loss)
    assert isinstance(gate, Gate)
    assert gate.fitted == pytest.approx(-1.5)
    assert gate.held_out is not None
    assert gate.held_out.tolist() == [0.0, 1.0, 1.0, 1.0]
    assert fit_gate(variance[:1], loss[:1]).held_out is None
    many = np.random.default_rng(0).normal(size=(3 * FOLDS, 2))
    held_out = fit_gate(np.abs(many), many).held_out
    assert held_out is not None
    assert held_out.shape == (3 * FOLDS,)
