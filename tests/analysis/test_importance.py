"""Rank correlations against scipy one row at a time, means and changes by hand, and the command as a user runs it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from kvtool.analysis import importance as module
from kvtool.analysis.importance import Level, averages, changes, collect, compare, kendall, overlap, spearman, with_point
from kvtool.cli import cli
from kvtool.errors import DataError
from kvtool.policies.headfile import read_head_file

rows = st.lists(st.lists(st.integers(-4, 4), min_size=12, max_size=12), min_size=2, max_size=2)


@settings(max_examples=60, deadline=None)
@given(rows)
def test_rank_correlations_are_scipys(pair: list[list[int]]) -> None:
    x, y = (np.asarray([row], dtype=float) for row in pair)
    for ours, theirs in ((spearman, stats.spearmanr), (kendall, stats.kendalltau)):
        found = float(ours(x, y)[0])
        if len(set(pair[0])) == 1 or len(set(pair[1])) == 1:
            assert np.isnan(found)
        else:
            assert found == pytest.approx(float(theirs(pair[0], pair[1]).statistic), abs=1e-9)
            # Neither unit nor any rising transform matters.
            assert float(ours(1e-7 * x, np.exp(y))[0]) == pytest.approx(found, abs=1e-9)


def test_many_heads_take_the_other_way_to_the_same_tau(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 30, (3, 120)).astype(float)
    y = x + rng.normal(size=x.shape) * 8
    x[2, 0] = np.nan
    few = kendall(x, y)
    monkeypatch.setattr(module, "_MANY", 10)
    np.testing.assert_allclose(kendall(x, y), few, atol=1e-12)
    assert np.isnan(few[2])
    assert 0.2 < few[0] < 0.9


def test_overlap_by_hand() -> None:
    x, y = np.asarray([[5.0, 4, 3, 2, 1]]), np.asarray([[1.0, 5, 4, 2, 3]])
    assert overlap(x, y, 1)[0] == 0
    assert overlap(x, y, 2)[0] == 0.5
    assert overlap(x, y, 3)[0] == pytest.approx(2 / 3)
    # Ties: the earlier head.
    assert overlap(np.asarray([[0.0, 0, 0]]), np.asarray([[1.0, 0, 0]]), 1)[0] == 1
    assert np.isnan(overlap(np.asarray([[np.nan, 1]]), np.asarray([[1.0, 0]]), 1)[0])


def test_averages_leave_prompts_without_the_measure_out() -> None:
    values = np.asarray([[1.0, 10], [np.nan, np.nan], [3.0, 30]])
    drawn = np.asarray([[1 / 3, 1 / 3, 1 / 3], [0, 1, 0], [0.25, 0.5, 0.25], [0.5, 0.5, 0]])
    found = averages(values, drawn)
    np.testing.assert_allclose(found[[0, 2, 3]], [[2, 20], [2, 20], [1, 10]])
    assert np.isnan(found[1]).all()


def test_compare_knows_same_opposite_and_noise() -> None:
    rng = np.random.default_rng(1)
    truth = np.arange(24.0)
    values = {
        "attention": truth + rng.normal(size=(12, 24)),
        "gain": 100 * truth + rng.normal(size=(12, 24)),
        "ablation": -truth + rng.normal(size=(12, 24)),
        "reasoning": rng.normal(size=(12, 24)),
    }
    level = Level((0, 1), 12, values)
    assert level.n_top == 2
    pairs = {(p.a, p.b): p for p in compare(level, 200, 0)}
    assert len(pairs) == 6 + 4
    assert pairs["attention", "gain"].spearman.mean > 0.98
    assert pairs["attention", "ablation"].kendall.high < -0.8
    assert pairs["gain", "ablation"].overlap.mean == 0
    # Nothing but noise does not even agree with itself on other prompts; the interval says that little is known.
    assert pairs["attention", "attention"].spearman.mean > 0.97
    assert abs(pairs["reasoning", "reasoning"].spearman.mean) < 0.4
    wide, narrow = pairs["attention", "reasoning"].spearman, pairs["attention", "gain"].spearman
    assert wide.high - wide.low > 5 * (narrow.high - narrow.low)
    for pair in pairs.values():
        for interval in (pair.spearman, pair.kendall, pair.overlap):
            assert interval.low <= interval.mean <= interval.high


def record(sample: str, layers: list[int], **measures: Any) -> dict[str, Any]:
    return {"sample": sample, "layers": layers, "measures": {k: {"heads": v, "kv_heads": v} for k, v in measures.items()}}


def test_collect_joins_sources_and_shared_layers() -> None:
    captured = [record("a", [0, 1, 2], gain=[[1], [2], [3]]), record("b", [1, 2], gain=[[5], [6]], reasoning=[[7], [8]])]
    ablated = [record("b", [1, 2], ablation=[[0.5], [0.6]]), record("a", [0, 1, 2], ablation=[[0.1], [0.2], [0.3]])]
    level = collect([captured, ablated])["heads"]
    assert level.layers == (1, 2)
    assert list(level.values) == ["reasoning", "gain", "ablation"]
    np.testing.assert_array_equal(level.values["gain"], [[2, 3], [5, 6]])
    np.testing.assert_array_equal(level.values["ablation"], [[0.2, 0.3], [0.5, 0.6]])
    np.testing.assert_array_equal(level.values["reasoning"], [[np.nan, np.nan], [7, 8]])
    assert level.places == [(1, 0), (2, 0)]
    with pytest.raises(DataError, match="1 prompts are not measured"):
        collect([captured, ablated[:1]])
    with pytest.raises(DataError, match="no layer"):
        collect([[record("a", [0], gain=[[1]]), record("b", [1], gain=[[1]])]])


def test_changes_by_hand() -> None:
    """Two prompts, one layer of four heads: the policy halves all gains and swaps the two largest."""
    before, after = np.asarray([[4.0, 8, 2, 1], [6, 10, 2, 1]]), np.asarray([[4.0, 2, 1, 0.5], [5, 3, 1, 0.5]])
    refined = {"nll": 0.5, "margin": 1.0, "accuracy": 0.75}

    def policies(full: Any, cut: Any) -> list[dict[str, Any]]:
        facts = {"retention": 0.5, "message": None, "refined": refined}
        tables = [{"gain": {"heads": [list(row)], "kv_heads": [list(row)]}} for row in (full, cut)]
        able = [{"policy": name, "measures": table, **facts} for name, table in zip(("full", "p"), tables, strict=True)]
        return [*able, {"policy": "q", "retention": 0.1, "message": "too small"}]

    records = [{"sample": str(i), "layers": [0], "policies": policies(before[i], after[i])} for i in range(2)]
    found = {(row.policy, row.level): row for row in changes(records, 100, 0)}
    row = found["p", "kv_heads"]
    b, a = before.mean(0), after.mean(0)
    variance = [sum((x - sum(v) / 4) ** 2 for x in v) / 4 for v in (b.tolist(), a.tolist())]
    assert row.variance is not None
    assert row.ratio is not None
    assert row.spread is not None
    assert row.spearman is not None
    assert row.overlap is not None
    assert row.variance.mean == pytest.approx(variance[1])
    assert row.ratio.mean == pytest.approx(variance[1] / variance[0])
    assert row.spread.mean == pytest.approx(variance[1] ** 0.5 / (sum(a) / 4))
    # Ranks 3 4 2 1 against 4 3 2 1: 1 - 6 * 2 / (4 * 15).
    assert row.spearman.mean == pytest.approx(0.8)
    assert row.overlap.mean == 1
    assert row.figures == refined
    whole = found["full", "heads"]
    assert whole.ratio is not None
    assert (whole.ratio.low, whole.ratio.high) == (1, 1)
    assert found["q", "-"].message == "too small"
    assert found["q", "-"].variance is None


def test_the_point_comes_first() -> None:
    drawn = with_point(5, 7, 0)
    assert drawn.shape == (8, 5)
    np.testing.assert_allclose(drawn.sum(1), 1)
    np.testing.assert_array_equal(drawn[0], 0.2)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli, list(arguments), catch_exceptions=False)


def test_the_command(tmp_path: Path) -> None:
    """The embedded model finds needles with one KV head: three measures must name the same, and the file must carry it."""
    capture, out = str(tmp_path / "c.h5"), tmp_path / "imp"
    assert run("capture", "-n", "3", "--length", "200", "--statistics", "accumulated", "-o", capture).exit_code == 0
    heads = str(tmp_path / "h.json")
    options = ("--ablate", "-p", "streaming:sink=4", "-r", "20%", "--draws", "50", "-o", str(out), "--write", "ablation", heads)
    done = run("analyze", "importance", capture, *options)
    assert done.exit_code == 0, done.output
    value = json.loads((out / "importance.json").read_text())
    assert list(value["measures"]) == list(module.MEASURES)
    # Attention and gain may differ: they do not say what is lost without the head.
    sure = ("reasoning", "ablation", "ablation_margin")
    best = {(r["layer"], r["head"]) for r in value["importance"]["kv_heads"] if r["rank"] == 1 and r["measure"] in sure}
    assert len(best) == 1
    with (out / "importance.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == 5 * 4 * (4 + 8)
    for row, other in zip(table, value["importance"]["kv_heads"] + value["importance"]["heads"], strict=True):
        assert (row["measure"], float(row["mean"])) == (other["measure"], other["mean"])
    # Only sink and window are left: the retrieval head has nothing more to lose.
    changed = {(row["policy"].split(":")[0], row["measure"]): row for row in value["compressed"] if row["level"] == "kv_heads"}
    assert changed["streaming", "ablation"]["ratio"]["mean"] < 0.05
    scores = read_head_file(heads).head_scores("importance", 4)
    assert {np.unravel_index(scores.argmax(), scores.shape)} == best
    assert scores.min() == 0
    for name in ("importance.md", "importance.png", "importance.svg", "importance.pdf", "hiv.csv"):
        assert (out / name).stat().st_size > 500
    assert run("analyze", "importance", capture, "-p", "snapk", "-o", str(out)).exit_code == 2
