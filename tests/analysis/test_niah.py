"""Heat maps of needle tests, from records as infer writes them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from kvtool.analysis.niah import read_needles, write_needles
from kvtool.errors import DataError
from kvtool.files import open_run


def record(policy: str, length: int, depth: float, index: int, score: float | None, status: str = "ok") -> dict[str, Any]:
    method, _, budget = policy.partition(":budget=")
    return {
        "unit": f"{policy} {length} {depth} {index}",
        "sample": f"niah-{length}-{depth}-{index}",
        "policy": policy,
        "method": method,
        "budget": budget or None,
        "planned_entries": length if not budget else int(length * float(budget.rstrip("%")) / 100),
        "status": status,
        "degenerate": False,
        "metric": "exact",
        "score": score,
        "scores": None if score is None else {"exact": score, "niah.values_found": min(1.0, score + 0.5)},
        "answer_accuracy": None if score is None else 0.25,
        "meta": {"task": "niah:single", "length": length, "depth": 0.123, "depth_asked": depth},
    }


def write_run(folder: Path, records: list[dict[str, Any]], **config: Any) -> Path:
    open_run(folder, {"model": "tiny", "compress_at": "prompt", "fingerprint": "f", "generate": True, **config}, {})
    (folder / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


POLICIES = ("snapkv:budget=5%", "full", "snapkv:budget=2%", "h2o:budget=2%")


def grid() -> list[dict[str, Any]]:
    found = []
    for policy in POLICIES:
        for length in (256, 1024):
            for depth in (0.0, 50.0, 100.0):
                for index in range(4):
                    right = policy == "full" or (depth == 100.0 and index < 3)
                    bad = policy == "h2o:budget=2%" and length == 256
                    found.append(
                        record(policy, length, depth, index, None if bad else float(right), "impossible" if bad else "ok")
                    )
    return found


def test_cells_table_and_files(tmp_path: Path) -> None:
    found = read_needles([write_run(tmp_path / "run", grid())])
    assert found.policies == ("full", "snapkv:budget=2%", "snapkv:budget=5%", "h2o:budget=2%")
    assert (found.lengths, found.depths, found.metric) == ([256, 1024], [0.0, 50.0, 100.0], "exact")
    cell = next(c for c in found.cells if (c.policy, c.length, c.depth) == ("snapkv:budget=2%", 1024, 100.0))
    assert (cell.n, cell.score) == (4, 0.75)
    assert cell.low is not None
    assert 0 < cell.low < 0.75
    header, rows = found.table()
    assert header == ["policy", "score", "256 tokens", "1024 tokens", "worst depth", "samples"]
    assert rows[1] == ["snapkv:budget=2%", "0.250", "0.25", "0.25", "0 %: 0.00", "24"]
    assert rows[3] == ["h2o:budget=2%", "-", "-", "0.25", "-", "12"]
    assert "impossible cells: 3" in found.text()
    files = write_needles(found, tmp_path / "maps")
    assert {f.name for f in files} == {f"niah.{ending}" for ending in ("csv", "md", "tex", "png", "svg", "pdf")}
    with (tmp_path / "maps" / "niah.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 24
    assert {line["status"] for line in lines} == {"ok", "impossible"}
    svg = (tmp_path / "maps" / "niah.svg").read_text()
    for text in ("full cache", "prompt length (tokens)", "the needle (%)", "snapkv:budget=2%"):
        assert text in svg
    before = (tmp_path / "maps" / "niah.png").read_bytes()
    write_needles(found, tmp_path / "maps")
    assert (tmp_path / "maps" / "niah.png").read_bytes() == before


def test_other_metrics_and_runs_without_text(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", grid())
    other = read_needles([run], "niah.values_found")
    assert next(c for c in other.cells if c.policy == "snapkv:budget=2%").score == 0.5
    with pytest.raises(DataError, match=r"hold no f1; there are exact, niah.values_found, answer_accuracy"):
        read_needles([run], "f1")
    silent = [{**r, "score": None, "scores": None, "answer_accuracy": 0.5} for r in grid() if r["status"] == "ok"]
    assert read_needles([write_run(tmp_path / "silent", silent)]).metric == "answer_accuracy"


def test_several_runs_become_one_map_if_they_belong_together(tmp_path: Path) -> None:
    short, long = ([r for r in grid() if r["meta"]["length"] == n] for n in (256, 1024))
    both = read_needles([write_run(tmp_path / "a", short), write_run(tmp_path / "b", long)])
    assert both.cells == read_needles([write_run(tmp_path / "c", grid())]).cells
    with pytest.raises(DataError, match="compress_at: prompt and context"):
        read_needles([tmp_path / "a", write_run(tmp_path / "d", long, compress_at="context")])
    with pytest.raises(DataError, match="no records of a needle task"):
        read_needles([write_run(tmp_path / "e", [{**grid()[0], "meta": {}}])])


def test_depths_that_were_drawn_are_put_into_classes(tmp_path: Path) -> None:
    loose = [{**r, "meta": {**r["meta"], "depth": d}} for r, d in zip(grid(), (0.0, 0.099, 0.1, 1.0), strict=False)]
    for r in loose:
        del r["meta"]["depth_asked"]
    assert read_needles([write_run(tmp_path / "run", loose)]).depths == [10.0, 30.0, 50.0, 70.0, 90.0]
    # Three prompts in every tenth: ten classes, the same boundaries as by hand.
    first = loose[0]

    def more(depth: float, n: int) -> list[dict[str, Any]]:
        return [
            {**first, "unit": f"u {depth} {i}", "sample": f"s {depth} {i}", "meta": {**first["meta"], "depth": depth}}
            for i in range(n)
        ]

    tenths = [r for d, n in ((0.0, 2), (0.099, 2), (0.1, 3), (1.0, 3)) for r in more(d, n)]
    tenths += [r for place in range(2, 9) for r in more((place + 0.5) / 10, 3)]
    found = read_needles([write_run(tmp_path / "many", tenths)])
    assert {cell.depth: cell.n for cell in found.cells} == {5.0: 4, **{10.0 * k + 5: 3 for k in range(1, 10)}}
    # One tenth of two prompts, or of none, among many of others: fifths, whatever the mean over tenths is.
    for n in (2, 0):
        few = [r for r in tenths if r["meta"]["depth"] != 0.75] + more(0.75, n) + more(0.35, 40)[3:]
        found = read_needles([write_run(tmp_path / f"few{n}", few)])
        assert found.depths == [10.0, 30.0, 50.0, 70.0, 90.0]
        assert {cell.depth: cell.n for cell in found.cells}[70.0] == 3 + n


def test_a_single_length_is_one_map_of_policies_over_depths(tmp_path: Path) -> None:
    records = [r for r in grid() if r["meta"]["length"] == 1024]
    found = read_needles([write_run(tmp_path / "run", records)])
    files = write_needles(found, tmp_path / "maps", {"snapkv:budget=2%": "SnapKV at 2%"})
    svg = next(f for f in files if f.suffix == ".svg").read_text()
    for text in ("full cache", "depth of the needle (%)", "SnapKV at 2%", "h2o:budget=2%"):
        assert svg.count(text) == 1
    assert "prompt length" not in svg
    assert svg.count(">.75<") == 3  # three of four prompts are right at the end, for every policy but the full cache
    lines = list(csv.DictReader((tmp_path / "maps" / "niah.csv").read_text().splitlines()))
    assert {(line["policy"], line["name"]) for line in lines} >= {("snapkv:budget=2%", "SnapKV at 2%"), ("full", "full cache")}
    assert "4 prompts a cell" in (tmp_path / "maps" / "niah.md").read_text()
