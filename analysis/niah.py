"""Needle tests over prompt length and depth: a cell's score per policy, as table and heat maps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kvtool.analysis.statistics import mean_interval
from kvtool.data.metrics import full_name
from kvtool.errors import DataError
from kvtool.executors.records import read_units
from kvtool.files import read_run
from kvtool.naming import short_paths
from kvtool.textgrid import figure, grid, save_tables

FULL = "full"
#: Depths of records that were not made on a grid are put into so many classes, or into half as many where one of them would hold fewer
#: than `FEW` prompts of a length.
DEPTH_CLASSES, FEW = 10, 3
#: What to colour by where nothing was generated.
ACCURACY = "answer_accuracy"


@dataclass(frozen=True, slots=True)
class Cell:
    """One policy at one length and depth.

    Attributes
    ----------
    policy, method : str
    budget : str
        Empty for the full cache.
    length : int
        Prompt tokens.
    depth : float
        Of the needle, in percent.
    n : int
        Samples with a score.
    score, low, high : float or None
        Mean in 0 ... 1 with its 95 % interval; None without a score.
    status : str
        ``"ok"``, ``"degenerate"`` (no entry is free to be chosen), or why there is no score: ``"impossible"``, ``"oom"``, ``"failed"``.
    """

    policy: str
    method: str
    budget: str
    length: int
    depth: float
    n: int
    score: float | None
    low: float | None
    high: float | None
    status: str


@dataclass(frozen=True, slots=True)
class NeedleMap:
    """Cells of one or more runs.

    Attributes
    ----------
    cells : tuple of Cell
    task, model, metric : str
    compress_at : str
    policies : tuple of str
        The full cache first, then by method and rising budget.
    classes : int
        Of depth, where prompts were not made on a grid; 0: on a grid.
    """

    cells: tuple[Cell, ...]
    task: str
    model: str
    metric: str
    compress_at: str
    policies: tuple[str, ...]
    classes: int = 0

    @property
    def lengths(self) -> list[int]:
        """Ascending."""
        return sorted({cell.length for cell in self.cells})

    @property
    def depths(self) -> list[float]:
        """Ascending; classes that no prompt fell into are among them."""
        return sorted({cell.depth for cell in self.cells} | {_middle(i, self.classes) for i in range(self.classes)})

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return header and rows: mean score per policy and length, over depths."""
        header = ["policy", "score", *(f"{length} tokens" for length in self.lengths), "worst depth", "samples"]
        rows = []
        for policy in self.policies:
            mine = [cell for cell in self.cells if cell.policy == policy]
            by_depth = {d: _mean([c for c in mine if c.depth == d]) for d in self.depths}
            known = {d: s for d, s in by_depth.items() if s is not None}
            worst = min(known, key=lambda d: (known[d], d)) if known else None
            rows.append(
                [
                    policy,
                    figure(_mean(mine), 3),
                    *(figure(_mean([c for c in mine if c.length == length]), 2) for length in self.lengths),
                    "-" if worst is None else f"{worst:g} %: {known[worst]:.2f}",
                    str(sum(c.n for c in mine)),
                ]
            )
        return header, rows

    def text(self) -> str:
        """Return the table that the command prints."""
        odd = [f"{status} cells: {n}" for status in ("impossible", "oom", "failed", "degenerate") if (n := self._count(status))]
        what = f"{self.task}, {self.model}, compressed at {self.compress_at}; mean {self.metric} over cells"
        return "\n".join([grid(*self.table()), "", what, *odd])

    def _count(self, status: str) -> int:
        return sum(cell.status == status for cell in self.cells)


def _mean(cells: Sequence[Cell]) -> float | None:
    """Mean of the cells' scores, each cell counted once; None where one of them has none."""
    scores = [cell.score for cell in cells]
    if not scores or any(score is None for score in scores):
        return None
    return float(np.mean([score for score in scores if score is not None]))


def read_needles(folders: Sequence[Path], metric: str | None = None) -> NeedleMap:
    """Read infer folders of needle tasks; several folders (one per length, say) become one map.

    Parameters
    ----------
    folders : sequence of Path
    metric : str, optional
        Full or short name of a metric that the records hold, or ``answer_accuracy``; default: the task's own score, and where
        nothing was generated the accuracy of the fed answer.

    Raises
    ------
    DataError
        No records of needles, or runs that do not belong together.
    """
    records, facts = [], []
    for folder in folders:
        config = read_run(folder)["config"]
        found = [r for r in read_units(folder) if "length" in r.get("meta", {}) and _depth(r) is not None]
        if not found:
            raise DataError(f"{folder} holds no records of a needle task; run e.g. kvtool infer -t niah:depths=11")
        facts.append(
            {k: str(config.get(k)) for k in ("fingerprint", "compress_at", "generate", "temperature", "max_new_tokens")}
        )
        records += found
    for fact, folder in zip(facts, folders, strict=True):
        if differing := [key for key in fact if fact[key] != facts[0][key]]:
            shown = "; ".join(f"{key}: {facts[0][key]} and {fact[key]}" for key in differing)
            raise DataError(f"{folders[0]} and {folder} do not belong together ({shown}); draw them one by one")
    name = _metric(records, metric)
    classes = _classes(records)
    cells = _cells(records, name, classes)
    config = read_run(folders[0])["config"]
    tasks = dict.fromkeys(str(r["meta"]["task"]) for r in records)
    return NeedleMap(
        cells,
        ", ".join(tasks),
        str(config["model"]),
        name,
        str(config["compress_at"]),
        _order(records),
        _used(records, classes),
    )


def _classes(records: Sequence[dict[str, Any]]) -> int:
    """Return the number of classes of depth: fewer where only a few prompts of a length would stand in one of them."""
    prompts = {(r["meta"]["length"], r["sample"]): _depth(r) for r in records}
    counts = Counter((length, depth) for (length, _), depth in prompts.items())
    lengths = {length for length, _ in prompts}
    middles = [_middle(i, DEPTH_CLASSES) for i in range(DEPTH_CLASSES)]
    few = any(counts[length, middle] < FEW for length in lengths for middle in middles)
    return DEPTH_CLASSES // 2 if few else DEPTH_CLASSES


def _used(records: Sequence[dict[str, Any]], classes: int) -> int:
    """Return the number of classes where every depth is in one, else 0."""
    return 0 if any("depth_asked" in r["meta"] for r in records) else classes


def _middle(place: int, classes: int) -> float:
    """Return the middle of a class of depth in percent."""
    return (place + 0.5) * 100 / classes


def _depth(record: dict[str, Any], classes: int = DEPTH_CLASSES) -> float | None:
    """Return the depth that was asked for in percent, or the middle of the class of the real one."""
    meta = record["meta"]
    if "depth_asked" in meta:
        return float(meta["depth_asked"])
    if meta.get("depth") is None:
        return None
    return _middle(min(classes - 1, int(float(meta["depth"]) * classes)), classes)


def _metric(records: Sequence[dict[str, Any]], metric: str | None) -> str:
    done = [r for r in records if r["status"] == "ok"]
    if metric is None:
        own = {str(r["metric"]) for r in done if r.get("score") is not None}
        if len(own) > 1:
            raise DataError(f"the records have scores of several metrics ({', '.join(sorted(own))}); choose one with --metric")
        return own.pop() if own else ACCURACY
    if metric == ACCURACY:
        return metric
    name = full_name(metric)
    if not any(_value(r, name) is not None for r in done):
        known = sorted({n for r in done for n in (r.get("scores") or {r["metric"]: None})})
        raise DataError(f"the records hold no {name}; there are {', '.join([*known, ACCURACY])}")
    return name


def _value(record: dict[str, Any], metric: str) -> float | None:
    """Return a record's figure; None where it has none."""
    if metric == ACCURACY:
        value = record.get(ACCURACY)
    elif metric == record["metric"]:
        value = record.get("score")
    else:
        value = (record.get("scores") or {}).get(metric)
    return None if value is None else float(value)


def _order(records: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """Policies in the order of the figure: the full cache, then methods as they were asked for, by rising entries."""
    methods = list(dict.fromkeys(r["method"] for r in records if r["policy"] != FULL))
    sizes: dict[str, float] = {}
    for r in records:
        sizes[r["policy"]] = max(sizes.get(r["policy"], 0.0), float(r["planned_entries"]))
    method_of = {r["policy"]: r["method"] for r in records}
    names = sorted((p for p in sizes if p != FULL), key=lambda p: (methods.index(method_of[p]), sizes[p], p))
    return tuple([FULL] * (FULL in sizes) + names)


def _cells(records: Sequence[dict[str, Any]], metric: str, classes: int) -> tuple[Cell, ...]:
    groups: dict[tuple[str, int, float], list[dict[str, Any]]] = {}
    for r in records:
        groups.setdefault((r["policy"], int(r["meta"]["length"]), _depth(r, classes) or 0.0), []).append(r)
    cells = []
    for (policy, length, depth), mine in groups.items():
        bad = next((r["status"] for r in mine if r["status"] != "ok"), None)
        values = [v for r in mine if (v := _value(r, metric)) is not None]
        interval = mean_interval(np.asarray(values)) if values and bad is None else None
        status = bad or ("degenerate" if any(r["degenerate"] for r in mine) else "ok")
        mean, low, high = (None, None, None) if interval is None else (interval.mean, interval.low, interval.high)
        first = mine[0]
        budget = str(first["budget"] or "")
        cells.append(Cell(policy, first["method"], budget, length, depth, len(values), mean, low, high, status))
    return tuple(sorted(cells, key=lambda c: (c.policy, c.length, c.depth)))


def write_needles(found: NeedleMap, out: Path, named: Mapping[str, str] | None = None) -> list[Path]:
    """Write ``niah.md``, ``.tex`` and ``.csv``, and the figure as PNG, SVG and PDF; returns the files.

    Parameters
    ----------
    found : NeedleMap
    out : Path
    named : dict of str to str, optional
        Policy text -> how the figure calls it.
    """
    from kvtool.analysis.niah_figure import needle_figure

    drawn = needle_figure(found, named)
    drawn = replace(drawn, data=short_paths(drawn.data))
    title, note = drawn.title, found.text().splitlines()[-1]
    header, rows = found.table()
    lines = [[short_paths(cell) for cell in row] for row in rows]
    files = save_tables(out, "niah", title, [("", (header, lines))], drawn.data, [drawn.caption, note])
    drawn.save(out)
    return [*files, *(out / f"niah.{ending}" for ending in drawn.files)]
