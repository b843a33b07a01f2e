"""Fidelity on data whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from kvtool.analysis.cells import Cell
from kvtool.analysis.fidelity import measure_agreement, order_p_value, perfect_tau
from kvtool.analysis.statistics import tau_b
from kvtool.errors import DataError

N, S = 6, 40


def cells(harm_noise: float, recall_noise: float, n_cells: int = 4, constant: bool = False) -> list[Cell]:
    """Configurations whose true quality is 0 ... N-1; predictors see it with noise of the given size."""
    rng = np.random.default_rng(0)
    quality = np.arange(N, dtype=float)[:, None]
    found = []
    for index in range(n_cells):
        real = np.ones((N, S)) if constant else quality + rng.normal(0, 0.5, (N, S))
        predicted = {
            "harm": quality + rng.normal(0, harm_noise, (N, 1)) + rng.normal(0, 0.5, (N, S)),
            "recall": quality + rng.normal(0, recall_noise, (N, 1)) + rng.normal(0, 0.5, (N, S)),
        }
        found.append(Cell(1024, f"{index}%", tuple("abcdef"), predicted, {"score": real}, True))
    return found


def test_a_perfect_predictor_and_a_blind_one() -> None:
    result = measure_agreement(cells(0.0, 50.0), "score", draws=300, seed=0)
    assert result.tau["harm"].mean == pytest.approx(1)
    assert result.tau["harm"].low > 0.95
    assert abs(result.tau["recall"].mean) < 0.6
    assert result.advantage["harm"].low > 0
    assert result.regret["harm"]["top1"].mean == pytest.approx(0)
    assert result.tied_best_recall["harm"]["top1"].mean == 1
    assert result.ceiling.mean == pytest.approx(1, abs=0.02)


def test_a_reversed_predictor() -> None:
    turned = [Cell(c.length, c.budget, c.policies, {k: -v for k, v in c.predicted.items()}, c.real, True) for c in cells(0, 0)]
    result = measure_agreement(turned, "score", draws=100, seed=0)
    assert result.tau["harm"].mean == pytest.approx(-1)
    # Running only the predicted best loses everything there is: the best is worth N - 1 more than the worst.
    assert result.regret["harm"]["top1"].mean == pytest.approx(N - 1, abs=0.3)


def test_equal_predictors_have_no_advantage() -> None:
    same = [
        Cell(c.length, c.budget, c.policies, dict.fromkeys(("harm", "recall"), c.predicted["harm"]), c.real, True)
        for c in cells(2, 2)
    ]
    advantage = measure_agreement(same, "score", draws=300, seed=0).advantage["harm"]
    assert (advantage.mean, advantage.low, advantage.high) == (0, 0, 0)


def test_tied_cells_are_left_out_and_counted() -> None:
    result = measure_agreement([*cells(0, 0), *cells(0, 0, constant=True)], "score", draws=50, seed=0)
    assert (result.n_cells, result.n_tied) == (4, 4)
    with pytest.raises(DataError, match="equally well"):
        measure_agreement(cells(0, 0, constant=True), "score", draws=50, seed=0)


def test_a_predictor_without_an_order_gets_zero() -> None:
    blind = [
        Cell(c.length, c.budget, c.policies, {"harm": np.ones((N, S)), "recall": c.predicted["recall"]}, c.real, True)
        for c in cells(0, 0)
    ]
    result = measure_agreement(blind, "score", draws=50, seed=0)
    assert result.tau["harm"].mean == 0


def constant_cell(real: np.ndarray, pair: int = 0) -> Cell:
    blind = dict.fromkeys(("harm", "recall"), np.ones_like(real))
    return Cell(1024, "5%", tuple("abcdef")[: len(real)], blind, {"score": real}, True, pair)


@pytest.mark.parametrize("order", [1, -1])
def test_ties_of_a_predictor_are_broken_at_random_not_by_the_order_in_the_file(order: int) -> None:
    real = np.repeat(np.arange(6.0)[::order, None], 20, axis=1)
    result = measure_agreement([constant_cell(real)], "score", draws=200, seed=0)
    # One of six at random: 5 - mean(0 ... 5) is lost. Three of six: the expected best of them is 3/4 of the way from -1 to 6.
    assert result.regret["harm"]["top1"].mean == pytest.approx(2.5, abs=0.4)
    assert result.regret["harm"]["top3"].mean == pytest.approx(5 - (3 / 4 * 7 - 1), abs=0.3)
    assert result.tied_best_recall["harm"]["top3"].mean == pytest.approx(1 / 2, abs=0.15)


def test_a_draw_without_any_order_is_left_out() -> None:
    real = np.zeros((3, 6))
    real[0, 0] = 1.0  # a third of all draws miss the only sample that tells the configurations apart
    predicted = dict.fromkeys(("harm", "recall"), real)
    cell = Cell(1024, "5%", tuple("abc"), predicted, {"score": real}, True)
    result = measure_agreement([cell], "score", draws=200, seed=0, order_level=1)
    tau = result.tau["harm"]
    assert (tau.mean, tau.low, tau.high) == pytest.approx((1, 1, 1))


def test_every_pair_of_folders_is_resampled_on_its_own() -> None:
    """Two independent pairs of one length give a mean with a narrower interval than one of them alone."""
    rng = np.random.default_rng(3)
    quality = np.arange(N)[:, None] * 0.2
    both = []
    for pair in range(2):
        real, seen = (quality + rng.normal(0, 1, (N, S)) for _ in range(2))
        both.append(Cell(1024, "5%", tuple("abcdef"), {"harm": seen, "recall": seen}, {"score": real}, False, pair))
    together, one = (measure_agreement(c, "score", draws=1000, seed=0).tau["harm"] for c in (both, both[:1]))
    shared = [both[0], both[0]]
    same = measure_agreement(shared, "score", draws=1000, seed=0).tau["harm"]
    assert same.high - same.low == pytest.approx(one.high - one.low, rel=0.15)
    assert together.high - together.low < 0.9 * (same.high - same.low)


def test_interval_of_the_difference_includes_0_when_both_predictors_are_equally_good() -> None:
    """Over 40 repetitions of an experiment whose true difference is 0 the interval misses it rarely."""
    missed = 0
    for repetition in range(40):
        rng = np.random.default_rng(repetition)
        quality = np.arange(N)[:, None] * 0.3
        found = []
        for index in range(4):
            noisy = {name: quality + rng.normal(0, 1, (N, S)) for name in ("harm", "recall")}
            real = {"score": quality + rng.normal(0, 1, (N, S))}
            found.append(Cell(1024, f"{index}%", tuple("abcdef"), noisy, real, True))
        advantage = measure_agreement(found, "score", draws=200, seed=0).advantage["harm"]
        missed += not advantage.low <= 0 <= advantage.high
    assert missed <= 6


def test_ceiling_is_low_where_reality_is_noise_and_its_interval_holds_it() -> None:
    rng = np.random.default_rng(5)
    noise = [constant_cell(rng.normal(0, 1, (N, S))) for _ in range(6)]
    result = measure_agreement(noise, "score", draws=200, seed=0, order_level=1).ceiling
    assert abs(result.mean) < 0.35
    assert result.low <= result.mean <= result.high


def test_samples_without_the_figure_do_not_take_it_from_the_others() -> None:
    cell = cells(0.0, 50.0, n_cells=1)[0]
    some = tuple(range(5, S))
    part = Cell(1024, "5%", cell.policies, cell.predicted, {"score": cell.real["score"][:, 5:]}, True, 0, {"score": some}, S)
    assert measure_agreement([part], "score", draws=100, seed=0).tau["harm"].low > 0.95


def test_noise_has_no_order_and_is_counted() -> None:
    rng = np.random.default_rng(6)
    noise = [constant_cell(rng.normal(0, 1, (N, S))) for _ in range(40)]
    result = measure_agreement([*cells(0, 0), *noise], "score", draws=50, seed=0)
    # Friedman's test lets one cell of noise in a hundred through.
    assert (result.n_tied, result.n_noise + result.n_cells) == (0, 44)
    assert result.n_noise >= 37
    with pytest.raises(DataError, match="by chance"):
        measure_agreement(noise[:1], "score", draws=50, seed=0, order_level=1e-9)


def test_order_p_value_is_uniform_without_an_order_and_ignores_samples_without_differences() -> None:
    rng = np.random.default_rng(7)
    values = [order_p_value(rng.normal(0, 1, (5, 30))) for _ in range(400)]
    assert np.mean(np.asarray(values) < 0.1) == pytest.approx(0.1, abs=0.05)
    real = rng.normal(0, 1, (5, 30)) + np.arange(5)[:, None]
    assert order_p_value(np.column_stack([real, np.ones((5, 50))])) == order_p_value(real)
    assert order_p_value(np.ones((5, 30))) == 1


def test_perfect_tau_is_what_a_perfect_predictor_reaches() -> None:
    """Simulated: the truth is known, so the tau between truth and all samples can be compared with the extrapolated one."""
    rng = np.random.default_rng(8)
    reached, halves = [], []
    for _ in range(60):
        truth = rng.normal(0, 0.25, 40)
        real = truth[:, None] + rng.normal(0, 1, (40, 60))
        reached.append(tau_b(truth[:, None], real.mean(1)[:, None])[0])
        halves.append(tau_b(real[:, ::2].mean(1)[:, None], real[:, 1::2].mean(1)[:, None])[0])
    assert np.mean(halves) < np.mean(reached) - 0.1
    assert perfect_tau(float(np.mean(halves))) == pytest.approx(np.mean(reached), abs=0.03)
    assert (perfect_tau(1.0), perfect_tau(-0.3)) == (pytest.approx(1.0), 0.0)


def test_pairs_that_reality_tells_apart() -> None:
    """Three configurations, two of them equal but for noise: two pairs count, the third does not."""
    rng = np.random.default_rng(9)
    real = np.stack([np.full(50, 0.5), np.full(50, 0.5), np.full(50, 3.0)]) + rng.normal(0, 0.2, (3, 50))
    predicted = {"harm": np.repeat([[2.0], [1.0], [1.5]], 50, axis=1), "recall": np.repeat([[0.0], [0.0], [0.0]], 50, axis=1)}
    result = measure_agreement([Cell(1024, "5%", tuple("abc"), predicted, {"score": real}, True)], "score", draws=100, seed=0)
    assert result.n_resolved == 2
    assert result.resolved["harm"].mean == 0.5
    assert result.resolved["recall"].mean == 0.5
    assert result.as_good["harm"]["top1"] == 0
    assert result.as_good["harm"]["top3"] == 1
