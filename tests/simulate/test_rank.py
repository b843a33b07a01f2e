"""Ranks, flags, intervals and the shortlist from predictions written by hand."""

from __future__ import annotations

import numpy as np
import pytest

from kvtool.models import ModelInfo
from kvtool.policies import Policy
from kvtool.simulate.evaluate import Prediction
from kvtool.simulate.rank import Row, rank_rows, resample_weights

INFO = ModelInfo("toy", "Toy", "0", n_layers=3, n_heads=4, n_kv_heads=2, head_dim=8, max_positions=512, windows=(None,) * 3)


def rank(harms: dict[str, list[float | None]], n_compressible: int = 3) -> list[Row]:
    """Rank configurations with the given harm per sample at 100 tokens; None is impossible."""
    policies = [Policy.parse(text) for text in harms]
    n_samples = len(next(iter(harms.values())))
    predictions = []
    for s in range(n_samples):
        sample = []
        for policy, values in zip(policies, harms.values(), strict=True):
            entries, harm = policy.asked(100), values[s]
            message = "too small" if harm is None else None
            sample.append(Prediction(entries, entries / 100, harm, harm, harm, 0.5, harm is None, message))
        predictions.append(sample)
    return rank_rows(policies, predictions, INFO, [n_compressible] * n_samples, resample_weights(n_samples, 1000, 0))


def test_equal_harms_share_a_rank_and_the_next_one_is_skipped() -> None:
    rows = rank({f"random:budget=20%,seed={s}": [h] for s, h in enumerate([2.0, 1.0, 2.0, 3.0, 1.0], 1)})
    assert {row.policy[-1]: row.rank for row in rows} == {"1": 3, "2": 1, "3": 3, "4": 5, "5": 1}
    # At equal retention and equal harm none beats the other: both are on the front.
    assert [row.pareto for row in rows] == [True, True, False, False, False]


def test_ranks_are_within_a_budget() -> None:
    rows = rank({"h2o:budget=50%": [1.0], "h2o:budget=80%": [0.5], "snapkv:budget=80%": [2.0], "full": [0.0]})
    assert {row.policy: row.rank for row in rows} == {
        "h2o:budget=50%": 1,
        "h2o:budget=80%": 1,
        "snapkv:budget=80%": 2,
        "full": 1,
    }
    assert [row.retention for row in rows] == [0.5, 0.8, 0.8, 1.0]


def test_policies_with_their_own_number_of_entries_are_ranked_among_equals() -> None:
    rows = rank({"K_uniform16_aware": [3.0], "K_uniform16_aware:sink=4,interval=4": [2.0], "K_uniform64_aware": [1.0]})
    assert [(row.entries, row.rank, row.budget) for row in rows] == [(20, 1, None), (20, 2, None), (68, 1, None)]


def test_impossible_on_one_sample_is_impossible_flagged_and_last() -> None:
    rows = rank({"snapkv:budget=20%": [1.0, None], "window:budget=20%": [5.0, 5.0]})
    assert [(row.status, row.rank) for row in rows] == [("ok", 1), ("impossible", None)]
    assert rows[1].degenerate
    assert rows[1].message == "too small"
    assert rows[1].harm is None
    assert not rows[1].pareto


def test_figures_by_hand() -> None:
    (row,) = rank({"window:budget=20%": [1.0, 2.0, 3.0, 6.0]}, n_compressible=2)
    assert row.harm == 3
    assert row.kv_bytes_fp16 == 20 * 2 * 2 * 2 * 8 * 2  # entries x layers x KV heads x (key, value) x numbers x bytes
    draws = np.random.default_rng(1).choice([1.0, 2.0, 3.0, 6.0], size=(100_000, 4)).mean(1)
    assert (row.harm_low, row.harm_high) == pytest.approx(np.quantile(draws, [0.025, 0.975]).tolist(), abs=0.26)
