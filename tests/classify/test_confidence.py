"""Confidence, calibration, conformal sets and stability, against simulated heads whose truth is known."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from kvtool.classify.confidence import (
    Pairs,
    bootstrap_confidence,
    calibrate,
    calibration_error,
    cross_calibrate,
    reliability,
    split_pairs,
)
from kvtool.classify.conformal import conformal_sets, set_coverage, split_sets
from kvtool.classify.features import HeadTable
from kvtool.classify.kinds import KINDS, kinds_of_all
from kvtool.classify.plots import plot_reliability, write_reliability
from kvtool.classify.stability import against, clusters, halves, rand_index


def table(sink: np.ndarray, local: np.ndarray, **more: np.ndarray) -> HeadTable:
    """One layer from arrays of shape (prompts, heads)."""
    s, near, rest = sink[:, None], local[:, None], np.clip(1 - sink - local, 0, 1)[:, None]
    profile = np.stack([near, 1 - near], axis=-1)
    return HeadTable(s, near, rest, 0 * s, profile, 0 * s, None, **{name: x[:, None] for name, x in more.items()})


def around_the_threshold(rng: np.random.Generator, n_prompts: int, n_heads: int, spread: float = 0.1) -> HeadTable:
    """Heads whose mean sink mass lies anywhere near the limit of ``sink``, with noise from prompt to prompt."""
    mean = rng.uniform(0.7, 0.9, n_heads)
    sink = np.clip(mean + spread * rng.standard_normal((n_prompts, n_heads)), 0, 1)
    return table(sink, 1 - sink)


@pytest.mark.parametrize("n", [8, 16])
def test_confidence_is_how_often_another_set_of_prompts_agrees(n: int) -> None:
    """Fresh prompts of the same heads, not halves of one pool: the promise itself. Drawing whole sets promises too much."""
    rng, half, whole, agrees = np.random.default_rng(0), [], [], []
    for _ in range(12):
        both = around_the_threshold(rng, 2 * n, 100)
        first, second = both.take(np.arange(n)), both.take(np.arange(n, 2 * n))
        half.append(bootstrap_confidence(first, rng, 300))
        whole.append(bootstrap_confidence(first, rng, 300, n))
        agrees.append(kinds_of_all(first) == kinds_of_all(second))
    error = calibration_error(np.asarray(half), np.asarray(agrees))
    assert error < 0.04
    assert calibration_error(np.asarray(whole), np.asarray(agrees)) > error
    assert 0.75 < np.mean(agrees) < 0.95


def test_no_confidence_without_prompts() -> None:
    rng = np.random.default_rng(0)
    few = around_the_threshold(rng, 3, 5)
    assert bootstrap_confidence(few, rng, 10) is None
    assert split_pairs(few, rng, 10, 10) is None
    assert split_sets(few, rng) is None
    assert set_coverage(few, rng, 10) is None
    assert halves(few, rng, 5) is not None
    assert halves(few.take(np.arange(1)), rng, 5) is None


def test_calibration_error_by_hand() -> None:
    confidence = np.asarray([0.95, 0.95, 0.95, 0.95, 0.61, 0.69, 1.0])
    agrees = np.asarray([True, True, True, False, True, False, True])
    # Bin 0.9 ... 1.0: confidence 4.8 of 5, 4 agree. Bin 0.6 ... 0.7: 1.30 of 2, 1 agrees.
    assert calibration_error(confidence, agrees) == pytest.approx((0.8 + 0.3) / 7)
    from sklearn.calibration import calibration_curve

    rng = np.random.default_rng(1)
    p = rng.random(5000)
    hit = rng.random(5000) < p**2
    truth, mean = calibration_curve(hit, p, n_bins=10)
    count = np.histogram(p, np.linspace(0, 1, 11))[0]
    assert calibration_error(p, hit) == pytest.approx((count * np.abs(truth - mean)).sum() / 5000)


def test_too_sure_is_seen_and_mended_on_other_heads() -> None:
    rng = np.random.default_rng(0)
    claimed = rng.uniform(0.5, 1, (40, 60))
    agrees = rng.random(claimed.shape) < claimed - 0.3
    pairs = Pairs(claimed, agrees)
    judged, crossed = reliability(pairs, 8, rng)
    assert judged.ece == pytest.approx(0.3, abs=0.03)
    assert judged.calibrated
    assert judged.ece_calibrated < 0.05
    assert judged.ece_interval[0] <= judged.ece <= judged.ece_interval[1]
    assert judged.accuracy == pytest.approx(agrees.mean())
    assert sum(row["n"] for row in judged.curve) == claimed.size
    assert crossed.shape == claimed.shape
    assert calibrate(pairs, np.asarray([0.9]))[0] == pytest.approx(0.6, abs=0.08)


def test_cross_fitting_never_sees_the_head_itself() -> None:
    """One head that always fails among heads that never do: with its own outcomes it would be calibrated to 0."""
    agrees = np.ones((20, 10), dtype=bool)
    agrees[:, 3] = False
    crossed = cross_calibrate(Pairs(np.full((20, 10), 0.9), agrees), np.random.default_rng(0))
    assert (crossed[:, 3] == 1).all()
    assert (crossed[:, [0, 1, 2, 4]] <= 1).all()


def test_good_confidence_is_left_alone() -> None:
    rng = np.random.default_rng(0)
    claimed = rng.uniform(0.5, 1, (40, 60))
    judged, _ = reliability(Pairs(claimed, rng.random(claimed.shape) < claimed), 8, rng)
    assert judged.ece < 0.04
    assert not judged.calibrated
    assert judged.ece_contested is not None
    sure, _ = reliability(Pairs(np.ones((5, 5)), np.ones((5, 5), dtype=bool)), 8, rng)
    assert (sure.ece, sure.ece_contested, sure.calibrated) == (0, None, False)


@pytest.mark.parametrize("alpha", [0.1, 0.3])
def test_sets_cover_new_prompts(alpha: float) -> None:
    """Over many draws of prompts the sets hold what a new prompt shows in at least 1 - alpha of the pairs, in each group."""
    rng, held = np.random.default_rng(0), {True: [], False: []}
    for _ in range(80):
        chance = rng.dirichlet([0.3] * len(KINDS), 30)
        kinds = np.stack([[rng.choice(len(KINDS), p=c) for c in chance] for _ in range(31)])[:, None]
        sets = conformal_sets(kinds[:15], kinds[15:30], alpha)
        several = (kinds[:15] != kinds[:1]).any(0)[0]
        for head in np.flatnonzero(sets.known[0]):
            held[bool(several[head])].append(bool(sets.members[0, head, kinds[30, 0, head]]))
    for group in held.values():
        assert len(group) > 60
        assert np.mean(group) >= 1 - alpha - 0.05


def test_what_sets_say() -> None:
    positional, mixed, gathering = (KINDS.index(k) for k in ("positional", "mixed", "gathering"))
    deciding = np.full((10, 1, 12), positional)
    deciding[:5, 0, :3] = gathering  # three heads swing
    deciding[:, 0, 3] = mixed
    calibrating = deciding.copy()
    sets = conformal_sets(deciding, calibrating)
    assert sets.names(0, 0) == ["positional", "gathering"]
    assert sets.names(0, 3) == ["mixed"]
    assert sets.names(0, 11) == ["positional"]
    # A head that shows five kinds where the others of its group show two evenly: none is frequent enough.
    scattered = deciding.copy()
    scattered[:, 0, 2] = np.arange(10) % 5
    steady = calibrating.copy()
    steady[:, 0, 2] = 0
    steady = np.concatenate([steady[:, :, :2]] * 10 + [steady], axis=2)
    wide = np.concatenate([scattered[:, :, :2]] * 10 + [scattered], axis=2)
    assert conformal_sets(wide, steady).names(0, 22) == []
    # Two calibration pairs are too few for 90 %.
    assert conformal_sets(deciding[:, :, :1], calibrating[:2, :, :1]).names(0, 0) is None


def test_stability() -> None:
    rng = np.random.default_rng(0)
    steady = table(np.tile([0.95, 0.5, 0.5, 0.9], (8, 1)), np.tile([0.03, 0.45, 0.1, 0.05], (8, 1)))
    found = halves(steady, rng, 20)
    assert found is not None
    assert (found.ari, found.same, found.n_half) == (1, 1, 4)
    assert (found.sure, found.ari_sure) == (1, 1)
    assert rand_index(np.asarray([0, 0, 1, 1]), np.asarray([1, 1, 0, 0])) == 1
    here, there = np.asarray([[0, 1], [1, 3]]), np.asarray([[0, 1], [2, 3]])
    configs = ({"task": "niah", "seed": 0, "length": 9}, {"task": "text", "seed": 0, "length": 9})
    found_there = against("b.h5", here, there, configs, ([(1, 2), (3, 4)], [(3, 4)]))
    assert found_there.changed == ({"layer": 1, "head": 0, "here": "positional", "there": "mixed"},)
    assert (found_there.differs, found_there.n_shared, found_there.same) == ({"task": ("niah", "text")}, 1, 0.75)


def test_heads_on_a_limit_are_left_to_the_unsure() -> None:
    """Literally, from the same random numbers: labels that flip are those that one of the sets is unsure of."""
    both = around_the_threshold(np.random.default_rng(1), 16, 60, spread=0.05)
    found = halves(both, np.random.default_rng(2), 10, 8, draws=100)
    assert found is not None
    assert found.ari_sure is not None
    rng, known, same = np.random.default_rng(2), [], []
    for _ in range(10):
        order = rng.permutation(16)
        sets = both.take(order[:8]), both.take(order[8:])
        shares = [bootstrap_confidence(each, rng, 100) for each in sets]
        sure = [head for head in range(60) if all(share is not None and share[0, head] >= 0.8 for share in shares)]
        known.append(len(sure) / 60)
        same.append(rand_index(*(kinds_of_all(each)[0, sure] for each in sets)))
    assert found.sure == pytest.approx(np.mean(known))
    assert found.ari_sure == pytest.approx(np.mean(same))
    assert found.ari_sure > found.ari + 0.1
    assert 0.3 < np.mean(known) < 0.9
    # Three prompts a set are too few for a confidence.
    few = halves(both, rng, 5, 3)
    assert few is not None
    assert (few.sure, few.ari_sure) == (None, None)


def test_clusters_are_found_where_they_are() -> None:
    rng = np.random.default_rng(0)
    centres = rng.integers(0, 2, 60)
    sink = np.clip(np.where(centres, 0.95, 0.2) + 0.01 * rng.standard_normal((8, 60)), 0, 1)
    apart = table(sink, np.clip(1 - sink, 0, 1) * 0.5)
    found = clusters(apart, kinds_of_all(apart), 0)
    assert found is not None
    assert found.n_clusters == 2
    assert found.ari == 1
    even = table(np.tile(1 / (1 + np.exp(-rng.standard_normal(60))), (8, 1)), np.full((8, 60), 0.0))
    one = clusters(even, kinds_of_all(even), 0)
    assert one is not None
    assert one.n_clusters == 1
    assert clusters(table(np.full((8, 4), 0.5), np.full((8, 4), 0.5)), np.zeros((1, 4), dtype=int), 0) is None


def test_diagram_and_its_figures(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    claimed = rng.uniform(0.3, 1, (20, 30))
    judged, _ = reliability(Pairs(claimed, rng.random(claimed.shape) < claimed), 8, rng)
    plot_reliability({"query heads": judged}, tmp_path / "r.png")
    write_reliability({"query heads": judged}, tmp_path / "r.csv")
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((tmp_path / "r.csv").read_text().splitlines()))
    assert [float(r["agreement"]) for r in rows] == [row["agreement"] for row in judged.curve]
    assert sum(int(r["n"]) for r in rows) == claimed.size
