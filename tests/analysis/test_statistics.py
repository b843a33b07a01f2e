from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.stats import kendalltau

from kvtool.analysis import statistics
from kvtool.analysis.statistics import expanded_level, mean_interval, nan_mean, tau_b, wilson_interval
from kvtool.bootstrap import bootstrap_weights

small = st.integers(0, 4).map(float)


@given(st.lists(st.tuples(small, small), min_size=2, max_size=9))
def test_tau_b_against_scipy(pairs: list[tuple[float, float]]) -> None:
    x, y = (np.asarray(v, dtype=float) for v in zip(*pairs, strict=True))
    ours = tau_b(x[:, None], y[:, None])[0]
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        assert np.isnan(ours)
    else:
        assert ours == pytest.approx(kendalltau(x, y).statistic, abs=1e-12)


def literal_tau_b(x: list[float], y: list[float]) -> float:
    """Concordant minus discordant pairs over the root of untied pairs, pair by pair."""
    concordant = discordant = untied_x = untied_y = 0
    for i in range(len(x)):
        for j in range(i):
            dx, dy = x[i] - x[j], y[i] - y[j]
            untied_x += dx != 0
            untied_y += dy != 0
            concordant += dx * dy > 0
            discordant += dx * dy < 0
    return float((concordant - discordant) / (untied_x * untied_y) ** 0.5)


def test_tau_b_in_blocks_against_a_literal_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_BLOCK", 100)  # 28 pairs: 3 columns at a time
    rng = np.random.default_rng(2)
    x, y = (rng.integers(0, 5, (8, 20)).astype(float) for _ in range(2))
    want = [literal_tau_b(list(a), list(b)) for a, b in zip(x.T, y.T, strict=True)]
    np.testing.assert_allclose(tau_b(x, y), want, atol=1e-12)


def test_nan_mean_leaves_out_what_is_unknown() -> None:
    got = nan_mean(np.asarray([[1.0, np.nan, np.nan], [3.0, 5.0, np.nan]]))
    np.testing.assert_array_equal(got, [2.0, 5.0, np.nan])


def test_tau_b_takes_rounding_noise_for_a_tie() -> None:
    x = np.asarray([[1.0], [1.0 + 1e-13], [2.0]])
    y = np.asarray([[2.0], [1.0], [3.0]])
    assert tau_b(x, y)[0] == pytest.approx(kendalltau([1, 1, 2], [2, 1, 3]).statistic)


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (3, 10), (10, 10), (57, 100)])
def test_wilson_against_scipy(hits: int, n: int) -> None:
    from scipy.stats import binomtest

    want = binomtest(hits, n).proportion_ci(0.95, method="wilson")
    got = wilson_interval(hits, n)
    assert (got.low, got.high) == pytest.approx((want.low, want.high), abs=1e-12)


def test_bootstrap_interval_of_a_mean_is_close_to_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(3, 2, size=200)
    got = mean_interval(values)
    half = 1.96 * values.std() / np.sqrt(200)
    assert got.mean == pytest.approx(values.mean())
    assert (got.low, got.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.06)


@pytest.mark.parametrize("n", range(2, 40))
def test_rounding_does_not_push_a_mean_out_of_its_interval(n: int) -> None:
    """Every prompt 4 of 5 tokens right: a figure with error bars of -1e-17 is refused by matplotlib."""
    got = mean_interval(np.full(n, 0.8), binary=False)
    assert got.low <= got.mean <= got.high
    assert (got.low, got.high) == pytest.approx((0.8, 0.8))


def test_zeros_and_ones_get_wilson() -> None:
    assert mean_interval(np.ones(8)).low == pytest.approx(wilson_interval(8, 8).low)


@pytest.mark.parametrize("n", [3, 12, 100])
def test_expanded_percentiles_of_a_normal_bootstrap_are_students(n: int) -> None:
    """The bootstrap of normal values has the standard deviation of n; Student's interval divides by n - 1 and has a wider quantile."""
    half = -stats.norm.ppf(expanded_level(n)) * np.sqrt((n - 1) / n)
    assert half == pytest.approx(stats.t.ppf(0.975, n - 1))
    assert expanded_level(n) < 0.025


def test_weights_sum_to_one() -> None:
    np.testing.assert_allclose(bootstrap_weights(7, 50, np.random.default_rng(0)).sum(1), 1)
