"""A study's own numbers, and ours beside them: which of its findings hold here, which do not, and which cannot be told.

The reference is a CSV file with the columns ``label, metric, text, value, note``; lines that begin with ``#`` say where the
numbers come from. ``label`` is a policy of the study, ``metric`` a key of `kvtool.studies.results.METRICS` and in its unit,
``text`` what was read or asked.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvtool.errors import DataError, near_matches
from kvtool.studies.judge import Judged, judge, verdict
from kvtool.studies.noise import TIMES
from kvtool.studies.paired import Value
from kvtool.studies.results import METRICS, ResultRow
from kvtool.studies.schema import Direction, Study

#: Columns of the file.
COLUMNS = ("label", "metric", "text", "value", "note")
#: Metric -> the one that a study without it measured the same by.
INSTEAD = {"accuracy": "score", "score": "accuracy"}


@dataclass(frozen=True, slots=True)
class Reference:
    """One number of the study.

    Attributes
    ----------
    label, metric, text : str
    value : float or None
        None: the study has no number, and `note` says why.
    note : str
    """

    label: str
    metric: str
    text: str
    value: float | None
    note: str


@dataclass(frozen=True, slots=True)
class Theirs:
    """The study's own two numbers of a finding.

    Attributes
    ----------
    better, worse : Reference
        Of the policies that the direction names, or of those that it says they stand for.
    """

    better: Reference
    worse: Reference

    @property
    def gap(self) -> float:
        """How much better the better one is there."""
        sign = 1.0 if METRICS[self.better.metric].more is not False else -1.0
        return sign * ((self.better.value or 0.0) - (self.worse.value or 0.0))


@dataclass(frozen=True, slots=True)
class Finding:
    """A finding of the study, and what was measured here.

    Attributes
    ----------
    direction : Direction
    theirs : Theirs or None
        None where the study has no such numbers.
    pairs : tuple of Judged
        Pairs of rows of the same cell and budget.
    verdict : str
        See `kvtool.studies.judge.verdict`.
    difference : Value or None
        The better way above 0; of several pairs the mean, with interval only of a single one. A share of 1 for metrics of
        `kvtool.studies.judge.RELATIVE`. None without figures per prompt.
    """

    direction: Direction
    theirs: Theirs | None
    pairs: tuple[Judged, ...]
    verdict: str
    difference: Value | None = None

    @property
    def floors(self) -> str:
        """The A/A floors that differences of times had to exceed, in words; empty where none is known."""
        known = sorted(pair.floor for pair in self.pairs if pair.floor is not None)
        ends = dict.fromkeys(f"{100 * floor:.1f}" for floor in (known[:1] + known[-1:]))
        return f"{' to '.join(ends)} %" if known else ""

    def count(self, *sizes: int) -> int:
        """Return how many pairs are of these sizes, see `kvtool.studies.judge.Judged`."""
        return sum(pair.size in sizes for pair in self.pairs)


def read_reference(path: str | Path) -> tuple[list[Reference], list[str]]:
    """Read a reference file.

    Returns
    -------
    list of Reference, list of str
        The numbers, and the lines that say where they come from.

    Raises
    ------
    DataError
        Missing file or column, an unknown metric, or a value that is no number; with the line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"reference {path} cannot be read: {error}") from error
    sources = [line.lstrip("# ").rstrip() for line in lines if line.startswith("#")]
    rows = [(number, next(csv.reader([line]))) for number, line in enumerate(lines, 1) if line and not line.startswith("#")]
    if not rows or tuple(rows[0][1]) != COLUMNS:
        raise DataError(f"reference {path} needs a line {','.join(COLUMNS)} above its numbers")
    found = []
    for number, cells in rows[1:]:
        where = f"reference {path}, line {number}"
        if len(cells) != len(COLUMNS):
            raise DataError(f"{where}: {len(cells)} cells, {len(COLUMNS)} are needed")
        row = dict(zip(COLUMNS, cells, strict=True))
        if row["metric"] not in METRICS:
            raise DataError(f"{where}: unknown metric {row['metric']!r}.{near_matches(row['metric'], METRICS)}")
        try:
            value = float(row["value"]) if row["value"] else None
        except ValueError as error:
            raise DataError(f"{where}: {row['value']!r} is no number") from error
        found.append(Reference(row["label"], row["metric"], row["text"], value, row["note"]))
    return found, sources


def findings(study: Study, rows: Sequence[ResultRow], reference: Sequence[Reference]) -> list[Finding]:
    """Judge the study's directions by what was measured."""
    # Retentions that were added where one curve falls are no part of the comparison.
    added = {stage.name for stage in study.stages if stage.kind == "cliffs"}
    return [_finding(direction, [row for row in rows if row.stage not in added], reference) for direction in study.directions]


def _finding(direction: Direction, rows: Sequence[ResultRow], reference: Sequence[Reference]) -> Finding:
    metric, pairs = direction.metric, []
    floors = [row.noise[metric] for row in rows if metric in row.noise] if metric in TIMES else []
    for better in _of(rows, direction.better, direction):
        for worse in _of(rows, direction.worse, direction):
            if _place(better) == _place(worse) and _budgets_match(better, worse):
                # A stage that measured nothing twice is judged by the noisiest one that did.
                own = [row.noise[metric] for row in (better, worse) if metric in row.noise]
                pairs.append(judge(metric, better, worse, max(own or floors, default=None)))
    return Finding(direction, theirs(direction, reference), tuple(pairs), verdict(metric, pairs), _mean_difference(pairs))


def _mean_difference(pairs: Sequence[Judged]) -> Value | None:
    found = [pair.difference for pair in pairs if pair.difference is not None]
    if len(found) < 2:
        return found[0] if found else None
    return Value(sum(value.mean for value in found) / len(found))


def _of(rows: Sequence[ResultRow], label: str, direction: Direction) -> list[ResultRow]:
    return [
        row
        for row in rows
        if label in (row.choice.label, *row.others)
        and direction.metric in row.values
        and direction.retention in (None, row.budget)
    ]


def _place(row: ResultRow) -> tuple[object, ...]:
    return row.stage, row.series, row.model, row.task, row.length, row.batch, row.compress_at


def _budgets_match(first: ResultRow, second: ResultRow) -> bool:
    """Retentions must be the same; what brings its own number of entries may stand against anything."""
    shares = [row.budget for row in (first, second) if row.budget is not None and row.budget.endswith("%")]
    return len(set(shares)) <= 1


def theirs(direction: Direction, reference: Sequence[Reference]) -> Theirs | None:
    """Return the study's two numbers of a direction: in its metric, else in the one that the study has in its place; of one text."""
    labels = direction.study or (direction.better, direction.worse)
    for metric in (direction.metric, INSTEAD.get(direction.metric, "")):
        mine = [r for r in reference if r.metric == metric and r.value is not None]
        for better in (r for r in mine if r.label == labels[0]):
            for worse in (r for r in mine if r.label == labels[1] and r.text == better.text):
                return Theirs(better, worse)
    return None
