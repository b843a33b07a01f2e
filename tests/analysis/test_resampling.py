"""Intervals and tests with documents, against scipy, brute force and simulation."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from kvtool.analysis.resampling import (
    Documents,
    change_interval,
    effective_n,
    holm,
    mean_interval,
    median_ratio,
    paired_p,
)


def alone(n: int) -> Documents:
    return Documents(np.arange(n))


def test_documents_are_numbered_by_name() -> None:
    documents = Documents.named(["b", "a", "b", "c"])
    assert documents.of.tolist() == [0, 1, 0, 2]
    assert (documents.n, documents.single) == (3, False)
    assert documents.sums(np.asarray([1.0, 2, 3, 4])).tolist() == [4, 2, 4]
    assert Documents.named(["x", "y"]).single


def test_bca_is_scipys_on_plain_samples() -> None:
    values = np.random.default_rng(0).gamma(1.0, size=25)
    expected = stats.bootstrap((values,), np.mean, method="BCa", n_resamples=60000, random_state=np.random.default_rng(1))
    found = mean_interval(values, alone(25), draws=60000, seed=0, method="bca")
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(expected.confidence_interval.low, abs=0.02)
    assert found.high == pytest.approx(expected.confidence_interval.high, abs=0.02)
    plain = mean_interval(values, alone(25), method="percentile")
    assert plain.low != found.low


@pytest.mark.parametrize(("hits", "n"), [(0, 8), (8, 8), (3, 10), (97, 100)])
def test_wilson_is_scipys(hits: int, n: int) -> None:
    expected = stats.binomtest(hits, n).proportion_ci(method="wilson")
    found = mean_interval(np.asarray([1.0] * hits + [0.0] * (n - hits)), alone(n))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_copies_of_a_document_are_worth_one_sample() -> None:
    once = np.asarray([1.0, 0, 0, 1, 1, 0, 1, 0, 0, 0])
    copies, documents = np.repeat(once, 5), Documents(np.repeat(np.arange(10), 5))
    # (n - 1) / n apart: variances of 10 and of 50 samples are unbiased in different ways.
    assert effective_n(copies, documents) == pytest.approx(10, rel=0.12)
    assert effective_n(once, alone(10)) == 10
    assert effective_n(np.ones(50), documents) == 10
    wide, narrow = (mean_interval(copies, d) for d in (documents, alone(50)))
    assert wide.high - wide.low > 1.7 * (narrow.high - narrow.low)
    graded = np.repeat(np.random.default_rng(0).random(10), 5)
    wide, narrow = (mean_interval(graded, d) for d in (documents, alone(50)))
    assert wide.high - wide.low > 1.7 * (narrow.high - narrow.low)


def test_clustered_intervals_cover_and_plain_ones_do_not() -> None:
    rng, hits = np.random.default_rng(3), {"clustered": 0, "plain": 0}
    documents, n_runs = Documents(np.repeat(np.arange(20), 5)), 150
    for seed in range(n_runs):
        values = np.repeat(rng.normal(size=20), 5) + 0.3 * rng.normal(size=100)
        for name, d in (("clustered", documents), ("plain", alone(100))):
            found = mean_interval(values, d, draws=400, seed=seed, method="percentile")
            hits[name] += found.low <= 0 <= found.high
    assert hits["clustered"] / n_runs >= 0.86
    assert hits["plain"] / n_runs <= 0.75


def test_one_document_has_no_interval() -> None:
    found = mean_interval(np.asarray([0.2, 0.4]), Documents(np.zeros(2, dtype=np.int64)))
    assert found.mean == pytest.approx(0.3)
    assert np.isnan(found.low)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 0.0, 0.3, 0.5, 1.0, -2.0]), min_size=2, max_size=8),
    st.lists(st.integers(0, 2), min_size=8, max_size=8),
)
def test_intervals_hold_their_mean_whatever_the_values(values: list[float], labels: list[int]) -> None:
    """Few values, many of them equal: where the bias correction breaks down."""
    documents = Documents.named([str(x) for x in labels[: len(values)]])
    found = mean_interval(np.asarray(values), documents, binary=False, draws=60)
    assert found.mean == pytest.approx(np.mean(values))
    assert documents.n < 2 or found.low <= found.mean <= found.high


def test_equal_values_do_not_warn() -> None:
    found = mean_interval(np.full(6, 0.3), alone(6))
    assert (found.low, found.high) == (pytest.approx(0.3), pytest.approx(0.3))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=9), st.lists(st.integers(0, 3), min_size=9, max_size=9))
def test_paired_p_is_the_share_of_sign_patterns_that_are_as_extreme(values: list[int], labels: list[int]) -> None:
    differences, documents = np.asarray(values, dtype=float), Documents.named([str(x) for x in labels[: len(values)]])
    sums = documents.sums(differences)
    totals = np.asarray([np.dot(signs, sums) for signs in product((-1, 1), repeat=len(sums))])
    observed = sums.sum()
    upper, lower = (totals >= observed - 1e-9).mean(), (totals <= observed + 1e-9).mean()
    assert paired_p(differences, documents) == pytest.approx(min(1.0, 2 * min(upper, lower)), abs=1e-12)


def test_paired_p_of_binary_scores_is_mcnemars() -> None:
    before = np.asarray([1.0] * 30 + [0.0] * 70)
    after = before.copy()
    after[:12], after[40:43] = 0.0, 1.0
    assert paired_p(after - before, alone(100)) == pytest.approx(stats.binomtest(3, 15, 0.5).pvalue)


def test_paired_p_holds_its_level() -> None:
    rng = np.random.default_rng(0)
    found = [paired_p(rng.normal(size=14), alone(14), draws=199, seed=i) for i in range(200)]
    assert np.mean(np.asarray(found) < 0.05) <= 0.09


@given(st.lists(st.floats(0, 1), min_size=1, max_size=7))
def test_holm_is_the_closed_bonferroni_test(p_values: list[float]) -> None:
    """Closed testing: a hypothesis falls with the largest Bonferroni p-value of all sets that hold it."""
    n = len(p_values)
    expected = []
    for i in range(n):
        sets = [s for s in product((0, 1), repeat=n) if s[i]]
        expected.append(max(min(1.0, sum(s) * min(p for p, there in zip(p_values, s, strict=True) if there)) for s in sets))
    assert holm(p_values) == pytest.approx(expected)


def test_differences_of_proportions_keep_their_width_when_all_are_equal() -> None:
    found = change_interval(np.zeros(8), np.ones(8), alone(8))
    assert found.mean == -1.0
    assert found.low == -1.0
    assert -0.75 < found.high < -0.4
    none = change_interval(np.ones(12), np.ones(12))
    assert (none.mean, none.low, none.high) == pytest.approx((0, -1.959964 * np.sqrt(2) / 14, 1.959964 * np.sqrt(2) / 14))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 30))
def test_differences_of_proportions_are_walds_with_two_more_samples(won: int, lost: int, same: int) -> None:
    """By hand: one more sample won, one more lost, then the plain interval of the mean of n + 2 differences."""
    difference = [1.0] * won + [-1.0] * lost + [0.0] * same
    if not difference:
        return
    found = change_interval(np.asarray([float(d > 0) for d in difference]), np.asarray([float(d < 0) for d in difference]))
    more = np.asarray([*difference, 1.0, -1.0])
    half = stats.norm.ppf(0.975) * more.std() / np.sqrt(len(more))
    assert found.mean == pytest.approx(np.mean(difference))
    assert (found.low, found.high) == pytest.approx(
        (max(-1, min(more.mean() - half, found.mean)), min(1, max(more.mean() + half, found.mean))), abs=1e-12
    )


def test_graded_differences_that_are_all_equal_claim_no_certainty() -> None:
    full = np.full(20, 0.8)
    found, counted = change_interval(full, full), change_interval(np.ones(20), np.ones(20))
    assert (found.low, found.high) == (counted.low, counted.high)
    assert change_interval(full, full, share=False).low == 0.0  # losses are not bounded: no such width can be named
    shifted = change_interval(full + 5.1, full + 5)
    assert (shifted.low, shifted.high) == pytest.approx((0.1, 0.1))


def binary(rng: np.random.Generator, n: int, right: float, lost: float, won: float) -> tuple[np.ndarray, np.ndarray, float]:
    full, drawn = rng.random(n) < right, rng.random(n)
    return np.where(full, drawn >= lost, drawn < won).astype(float), full.astype(float), won * (1 - right) - lost * right


@pytest.mark.parametrize("n", [12, 24])
@pytest.mark.parametrize(("right", "lost", "won"), [(1.0, 0.03, 0.0), (1.0, 0.3, 0.0), (0.85, 0.1, 0.1), (0.5, 0.3, 0.1)])
def test_differences_of_few_proportions_cover(n: int, right: float, lost: float, won: float) -> None:
    """Where the bootstrap covers 29 to 90 % at n = 12, and Newcombe's interval 85 % in the last case."""
    rng, hits = np.random.default_rng(4), 0
    for _ in range(600):
        values, full, truth = binary(rng, n, right, lost, won)
        found = change_interval(values, full)
        hits += found.low <= truth <= found.high
    assert hits / 600 >= 0.93


@pytest.mark.parametrize("share", [0.05, 0.3, 0.8])
def test_graded_differences_of_few_prompts_cover(share: float) -> None:
    """Answers of five tokens, some prompts lose most of theirs: the plain percentile bootstrap covers 46, 86 and 92 %."""
    rng, hits, runs = np.random.default_rng(5), 0, 300
    for _ in range(runs):
        lost = (rng.random((12, 5)) < 0.6) & (rng.random(12) < share)[:, None]
        found = change_interval((~lost).mean(1), np.ones(12))
        hits += found.low <= -0.6 * share <= found.high
    assert hits / runs >= 0.91


def test_documents_widen_differences_of_proportions() -> None:
    once, full = np.asarray([1.0, 0, 1, 1, 0, 1, 1, 1, 0, 1]), np.ones(10)
    copies, documents = np.repeat(once, 4), Documents(np.repeat(np.arange(10), 4))
    wide, narrow = (change_interval(copies, np.ones(40), d) for d in (documents, None))
    apart = change_interval(once, full)
    assert wide.high - wide.low == pytest.approx(apart.high - apart.low, rel=0.1)
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)


def test_median_ratio() -> None:
    rng = np.random.default_rng(0)
    base = rng.random(40) + 0.5
    found = median_ratio(base * 1.5, base, alone(40))
    assert (found.mean, found.low, found.high) == pytest.approx((1.5, 1.5, 1.5))
    found = median_ratio(base * np.exp(0.2 * rng.normal(size=40)), base, Documents(np.arange(40) // 4))
    assert found.low < found.mean < found.high
