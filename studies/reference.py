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
from kvtool.studies.results import METRICS, ResultRow, Value
from kvtool.studies.schema import Direction, Study

#: Pairs of a finding whose figures are said one by one.
MOST_SAID = 4
COLUMNS = ("label", "metric", "text", "value", "note")


#: Metric -> the same as a change from the full cache on the same samples or tokens.
PAIRED = {"score": "score_change", "accuracy": "accuracy_change", "perplexity": "perplexity_ratio"}


#: Shares of the larger one by which what two rows keep may differ before a finding says so.
UNEQUAL = 0.1

#: Metrics that another process on the machine changes.
TIMES = frozenset({"ttft_s", "tpot_ms", "tokens_per_s", "attention_ms", "compress_s", "total_s", "speedup"})

#: Differences that are rounding.
TINY = 1e-9


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
class Finding:
    """A finding of the study, and what was measured here.

    Attributes
    ----------
    direction : Direction
    theirs : tuple of float or None
        Better and worse, of the reference; None where it has no such numbers.
    ours : tuple of (ResultRow, ResultRow)
        Pairs of rows of the same cell and budget.
    verdict : str
        ``"agrees"``, ``"differs"``, each also with ``" (no intervals)"``; ``"not clear"`` (within intervals, or split over cells);
        ``"not measured"``.
    count : tuple of int
        Pairs that agree clearly, agree, differ clearly, all, and of these those that are equal: at the floor or the ceiling nothing shows.
    difference : Value or None
        The better way above 0, on the same prompts; of several pairs the mean, without interval; None without figures per prompt.
    """

    direction: Direction
    theirs: tuple[float, float] | None
    ours: tuple[tuple[ResultRow, ResultRow], ...]
    verdict: str
    count: tuple[int, int, int, int, int]
    difference: Value | None = None


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
    pairs = tuple(
        (better, worse)
        for better in _of(rows, direction.better, direction)
        for worse in _of(rows, direction.worse, direction)
        if _place(better) == _place(worse) and _budgets_match(better, worse)
    )
    judged = [_judge(direction.metric, better, worse) for better, worse in pairs]
    count = (judged.count(2), sum(j > 0 for j in judged), judged.count(-2), len(judged), judged.count(0))
    verdict = _verdict(count, pairs, direction.metric)
    return Finding(direction, _theirs(direction, reference), pairs, verdict, count, _mean_difference(direction.metric, pairs))


def _mean_difference(metric: str, pairs: Sequence[tuple[ResultRow, ResultRow]]) -> Value | None:
    found = [value for pair in pairs if (value := _difference(metric, *pair)) is not None]
    if len(found) < 2:
        return found[0] if found else None
    return Value(sum(value.mean for value in found) / len(found))


def _verdict(count: tuple[int, int, int, int, int], pairs: Sequence[tuple[ResultRow, ResultRow]], metric: str) -> str:
    """Say what the pairs that differ come to: clear ones decide; where no figure has an interval, all must point the same way."""
    clear, right, wrong, n, equal = count
    if not n:
        return "not measured"
    if not any(row.values[metric].low is not None for pair in pairs for row in pair):
        return "agrees (no intervals)" if right == n else "differs (no intervals)" if not right else "not clear"
    if clear and not wrong and right > (n - equal) / 2:
        return "agrees"
    return "differs" if wrong and not clear and right < (n - equal) / 2 else "not clear"


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


def _judge(metric: str, better: ResultRow, worse: ResultRow) -> int:
    """Return 2 if `better` is better by more than the intervals, 1 if it is better, -1 and -2 for the contrary, 0 for equal.

    Scores and accuracies are compared prompt by prompt, with a bootstrap interval of the difference; perplexities by their ratios to
    the full cache on the same tokens.
    """
    own = _difference(metric, better, worse)
    if own is not None and own.low is not None and own.high is not None:
        # An interval that ends at 0 but for rounding does not exclude it.
        size = 2 if own.low > TINY or own.high < -TINY else 1
        return 0 if abs(own.mean) <= TINY else size if own.mean > 0 else -size
    paired = PAIRED.get(metric, metric)
    sign = 1.0 if METRICS[metric].more is not False else -1.0
    a, b = (row.values.get(paired, row.values[metric]) for row in (better, worse))
    difference = sign * (a.mean - b.mean)
    if difference == 0:
        return 0
    size = 2 if abs(difference) > _half(a) + _half(b) and (_half(a) or _half(b)) else 1
    return size if difference > 0 else -size


def _difference(metric: str, better: ResultRow, worse: ResultRow) -> Value | None:
    """Return how much better `better` is on the prompts that both have; None without figures per prompt."""
    import numpy as np

    from kvtool.analysis.statistics import paired_interval

    a, b = (row.samples.get(metric, {}) for row in (better, worse))
    if not (shared := [sample for sample in a if sample in b]):
        return None
    first, second = (np.asarray([values[sample] for sample in shared], dtype=np.float64) for values in (a, b))
    sign = 1.0 if METRICS[metric].more is not False else -1.0
    found = paired_interval(sign * first, sign * second)
    return Value(found.mean, found.low, found.high)


def sentence(item: Finding) -> str:
    """Return a finding in words, with the figures that were measured here; of times, with what they are worth."""
    said = _sentence(item)
    return (
        f"{said} Only differences above the A/A floor of times show anything."
        if item.direction.metric in TIMES and item.count[3]
        else said
    )


def _sentence(item: Finding) -> str:
    direction, (_, right, _, n, equal) = item.direction, item.count
    if not n:
        return f"Not measured here: {direction.say}."
    opening = {"agrees": "Holds here", "differs": "Does not hold here"}.get(item.verdict.split(" ")[0], "Not clear here")
    name, digits = METRICS[direction.metric].title, METRICS[direction.metric].digits
    if 1 < n <= MOST_SAID:
        both = [[f"{row.values[direction.metric].mean:.{digits}f}" for row in pair] for pair in item.ours]
        figures = "; ".join(f"{better} with {direction.better}, {worse} with {direction.worse}" for better, worse in both)
        return f"{opening}: {direction.say} ({name} {figures})."
    if n > 1:
        same = f", equal in {equal}" if equal else ""
        by = "" if item.difference is None else f"; {item.difference.mean:+.2f} on average"
        return f"{opening}: {direction.say} ({name}; {direction.better} is better in {right} of {n} pairs of rows{same}{by})."
    better, worse = (row.values[direction.metric].mean for row in item.ours[0])
    text = f"{opening}: {direction.say} ({name} {better:.{digits}f} with {direction.better}, {worse:.{digits}f} with {direction.worse}"
    text += _unequal(*item.ours[0])
    if item.difference is not None and item.difference.low is not None and item.difference.high is not None:
        low, high = item.difference.low, item.difference.high
        text += f"; better by {item.difference.mean:+.{digits}f}, {low:+.{digits}f} to {high:+.{digits}f} on the same prompts"
    return text + ("; one measurement each, without intervals)." if item.verdict.endswith("(no intervals)") else ").")


def _unequal(first: ResultRow, second: ResultRow) -> str:
    """Say how much each of two rows keeps, where that is not about the same."""
    for metric, unit in (("effective_context", " entries"), ("kept", " %")):
        if metric in first.values and metric in second.values:
            a, b = (row.values[metric].mean * METRICS[metric].factor for row in (first, second))
            return f"; unequal memory: {a:.0f} against {b:.0f}{unit} kept" if abs(a - b) > UNEQUAL * max(a, b) else ""
    return ""


def _half(value: Value) -> float:
    return 0.0 if value.low is None or value.high is None else (value.high - value.low) / 2


def _theirs(direction: Direction, reference: Sequence[Reference]) -> tuple[float, float] | None:
    found = {}
    for label in (direction.better, direction.worse):
        found[label] = next(
            (r.value for r in reference if r.label == label and r.metric == direction.metric and r.value is not None), None
        )
    better, worse = found[direction.better], found[direction.worse]
    return None if better is None or worse is None else (better, worse)
