"""Fidelity on data whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from kvtool.analysis.fidelity import Cell, measure_agreement
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
    assert result.advantage.low > 0
    assert result.regret["harm"]["top1"].mean == pytest.approx(0)
    assert result.tied_best_recall["harm"]["top1"] == 1
    assert result.ceiling == pytest.approx(1, abs=0.02)


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
    advantage = measure_agreement(same, "score", draws=300, seed=0).advantage
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
