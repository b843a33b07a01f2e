"""Tables of a study: its state, its results, and its own numbers beside ours; for the terminal, as Markdown and as CSV."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtool.files import write_json, write_text
from kvtool.studies.estimate import Estimate
from kvtool.studies.extras import CLIFFS, Extra
from kvtool.studies.graph import Node
from kvtool.studies.paired import Value
from kvtool.studies.reference import INSTEAD, Finding, Reference, findings, read_reference
from kvtool.studies.results import METRICS, ResultRow, to_records
from kvtool.studies.sayings import amount, sentence, shown_number
from kvtool.studies.schema import Study
from kvtool.textgrid import grid, markdown_grid

if TYPE_CHECKING:
    from kvtool.studies.runner import NodeRow, StudySummary

Lay = Callable[[Sequence[str], Sequence[Sequence[str]]], str]

SUMMARY, RESULTS, STATUS = "summary.md", "results.csv", "status.json"
#: Metrics of the long tables, in order; a column that is empty everywhere is left out.
LONG = (
    *(
        "kept",
        "score",
        "score_change",
        "accuracy",
        "accuracy_change",
        "perplexity",
        "perplexity_ratio",
        "next_token_accuracy",
        "effective_context",
    ),
    *("kv_mb", "peak_mb", "ttft_s", "tpot_ms", "tokens_per_s", "attention_ms", "total_s", "speedup"),
)
#: Those whose interval is shown.
WITH_INTERVAL = (
    "score",
    "accuracy",
    "score_change",
    "accuracy_change",
    "perplexity",
    "perplexity_ratio",
    "next_token_accuracy",
)
PERCENT = "%"
TITLES = {"cliffs": "Retentions that were added where curves fall", "no_cache": "No KV cache: every token costs a whole prompt"}
MISSING = "not measured"


def status_text(summary: StudySummary) -> str:
    """Return what is done and what is not: a count, and one line for each node that is not simply done."""
    counts = ", ".join(f"{count} {state}" for state, count in summary.counts().items())
    lines = [f"{summary.study} ({summary.scale}): {len(summary.rows)} nodes: {counts}; in {summary.out}"]
    lines += [
        f"  {row.state}: {row.title}" + (f": {row.note}" if row.note else "") for row in summary.rows if row.state != "done"
    ]
    return "\n".join(lines)


def status_table(rows: Sequence[NodeRow]) -> str:
    """Return one line per node."""
    header = ["node", "state", "seconds", "note"]
    lines = [[r.title, r.state, "-" if r.seconds is None else f"{r.seconds:.1f}", _short(r.note)] for r in rows]
    return _left(header, lines)


def plan_table(nodes: Sequence[Node], estimates: Sequence[Estimate], states: Sequence[str]) -> str:
    """Return one line per node with what it will take."""
    header = ["node", "state", "units", "time", "memory"]
    return grid(
        header,
        [
            [node.title, state, str(e.units), "-" if state == "done" else _duration(e.seconds), _size(e.bytes_)]
            for node, e, state in zip(nodes, estimates, states, strict=True)
        ],
    )


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _size(n_bytes: int | None) -> str:
    return "?" if n_bytes is None else "-" if n_bytes == 0 else f"{n_bytes / 1e9:.2f} GB"


def duration(seconds: float | None) -> str:
    """Return a time as tables show it."""
    return _duration(seconds)


def size(n_bytes: int | None) -> str:
    """Return a number of bytes as tables show it."""
    return _size(n_bytes)


def _short(text: str, width: int = 110) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def _left(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a table whose last column is a sentence: it is not aligned."""
    table = grid([*header[:-1], ""], [[*row[:-1], ""] for row in rows]).splitlines()
    return "\n".join(
        line.ljust(len(table[1])) + "  " + end if end else line
        for line, end in zip(table, [header[-1], "", *(r[-1] for r in rows)], strict=True)
    )


def results_text(study: Study, rows: Sequence[ResultRow], extra: Sequence[Extra] = ()) -> str:
    """Return the result tables for the terminal: of the study's own numbers, those that something here stands beside."""
    brief = [each for each in extra if each[0] == CLIFFS]
    parts = [*sections(study, rows, grid, brief=True), *((title, grid(header, lines)) for title, header, lines in brief)]
    said = sentences(study, rows)
    left = [title for title, _, _ in extra if title != CLIFFS]
    said += [f"more in {SUMMARY}: {'; '.join(left)}"] if left else []
    return "\n\n".join([*(f"{title}\n{text}" for title, text in parts), *(["\n".join(said)] if said else [])])


def sentences(study: Study, rows: Sequence[ResultRow]) -> list[str]:
    """Return what becomes of the study's findings here, each in words with its figures."""
    reference, _ = read_reference(study.reference) if study.reference else ([], [])
    return [sentence(item) for item in findings(study, rows, reference)]


def sections(study: Study, rows: Sequence[ResultRow], lay: Lay, brief: bool = False) -> list[tuple[str, str]]:
    """Return title and table of each part, as far as there is something in it."""
    found: list[tuple[str, str]] = []
    apart = {stage.name for stage in study.stages if stage.kind in ("perplexity", "cliffs", "no_cache")}
    infer = [row for row in rows if not row.series and row.stage not in apart]
    for stage, model, mode in dict.fromkeys((row.stage, row.model, row.compress_at) for row in infer):
        part = [row for row in infer if (row.stage, row.model, row.compress_at) == (stage, model, mode)]
        found += _pivots(f"{stage}, {model}, compressed at the {mode}", part, lay)
    hidden = {stage.name for stage in study.stages if stage.kind == "cliffs"} if brief else set()
    known = {id(row) for row in infer}
    for stage in dict.fromkeys(row.stage for row in rows if id(row) not in known and row.stage not in hidden):
        part = [row for row in rows if row.stage == stage]
        for series in dict.fromkeys(row.series for row in part):
            title = TITLES.get(stage, stage) + (f", {series}" if series else "")
            found.append((title, long_table([row for row in part if row.series == series], lay)))
    return found + _beside(study, rows, lay, brief)


def _pivots(title: str, rows: Sequence[ResultRow], lay: Lay) -> list[tuple[str, str]]:
    """Policies at retentions as a grid of scores; those with their own number of entries as a list."""
    shares = [row for row in rows if row.budget is not None and row.budget.endswith(PERCENT)]
    known = {id(row) for row in shares}
    metric = "score" if any("score" in row.values for row in rows) else "accuracy"
    found = []
    columns = sorted({row.budget for row in shares if row.budget}, key=lambda text: float(text.rstrip(PERCENT)))
    if len(columns) > 1:
        places: dict[tuple[Any, ...], dict[str | None, ResultRow]] = {}
        for row in rows:
            places.setdefault((row.task, row.length, row.choice), {})[row.budget] = row
        wanted = {(row.task, row.length, row.choice) for row in rows if id(row) in known or row.policy == "full"}
        order = sorted((place for place in places if place in wanted), key=lambda place: (str(place[0]), place[1] or 0))
        lines = []
        for task, length, choice in order:
            mine = places[task, length, choice]
            whole = mine.get(None)
            cells = [_cell(mine.get(column, whole), metric) for column in columns]
            lines.append([choice.label, str(task), _number(length), *cells])
        header = ["policy", "task", "length", *columns]
        found.append((f"{METRICS[metric].title}, {title} (95 % intervals over prompts)", lay(header, lines)))
        rows = [row for row in rows if id(row) not in known]
        if all(row.policy == "full" for row in rows):
            return found
    return [*found, (title, long_table(rows, lay))]


def long_table(rows: Sequence[ResultRow], lay: Lay) -> str:
    """Return one line per row, with every metric that any of them has."""
    metrics = [key for key in LONG if any(key in row.values for row in rows)]
    facts = [key for key in ("task", "length", "batch", "budget") if any(getattr(row, key) is not None for row in rows)]
    header = ["policy", *facts, *(METRICS[key].title for key in metrics), "note"]
    lines = []
    for row in rows:
        label = " = ".join([row.choice.label, *row.others])
        cells = ["-" if getattr(row, key) is None else str(getattr(row, key)) for key in facts]
        lines.append([label, *cells, *(_cell(row, key) for key in metrics), row.note])
    return lay(header, lines)


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)


def _cell(row: ResultRow | None, key: str) -> str:
    value = None if row is None else row.values.get(key)
    if value is None:
        return "impossible" if row is not None and "impossible" in row.note else "-"
    return shown(value, key)


def shown(value: Value, key: str) -> str:
    """Return a figure as tables show it."""
    digits = METRICS[key].digits
    text = f"{value.mean:.{digits}f}"
    if key in WITH_INTERVAL and value.low is not None and value.high is not None:
        between = " to " if value.low < 0 else "-"
        return f"{value.mean:.{digits}f} ({value.low:.{digits}f}{between}{value.high:.{digits}f})"
    return text


def _beside(study: Study, rows: Sequence[ResultRow], lay: Lay, brief: bool) -> list[tuple[str, str]]:
    """The study's own numbers beside ours, and what becomes of its findings."""
    reference, _ = read_reference(study.reference) if study.reference else ([], [])
    found = []
    if reference and rows:
        lines = reference_lines(study, reference, rows)
        if lines and not brief:
            found.append((BESIDE, lay(REFERENCE, lines)))
        elif lines:
            found.append((BESIDE, lay(REFERENCE, [line for line in lines if line[4] != "-"])))
    judged = findings(study, rows, reference)
    if judged:
        found.append(("What the study found, here", lay(FINDINGS, [_finding_cells(item) for item in judged])))
    return found


#: Pairs of a finding whose figures a table shows one by one.
MOST_SHOWN = 2
BESIDE = "The study's own numbers beside ours"
REFERENCE = ("policy of the study", "metric", "of", "study", "here", "measured on", "note")
FINDINGS = ("finding of the study", "metric", "study", "here", "better by", "verdict")


def reference_lines(study: Study, reference: Sequence[Reference], rows: Sequence[ResultRow]) -> list[list[str]]:
    """Return the study's numbers that something here stands beside, and in one line how many there are besides.

    A row stands beside a number of its own label, else of the label that a direction says it stands for at this scale.
    """
    stand_in: dict[str, str] = {}
    for direction in study.directions:
        for theirs, ours in zip(direction.study or (), (direction.better, direction.worse), strict=False):
            stand_in.setdefault(theirs, ours)
    known = [(item, lines) for item in reference if (lines := _reference_lines(item, rows, stand_in))]
    n_left = len(reference) - len(known)
    found = [line for _, lines in known for line in lines]
    if n_left:
        why = "no counterpart at this scale (other model, other capacities); --scale full measures them"
        note = why if study.scale == "small" else "nothing here has their label and metric"
        found.append([f"{n_left} further numbers" if n_left > 1 else "1 further number", "-", "-", "-", "-", MISSING, note])
    return found


def _reference_lines(item: Reference, rows: Sequence[ResultRow], stand_in: Mapping[str, str]) -> list[list[str]]:
    """One line per row of ours beside a number; none where there is no such row."""
    start = [item.label, METRICS[item.metric].title, item.text or "-", shown_number(item)]
    for label in (item.label, stand_in.get(item.label)):
        named = [row for row in rows if label in (row.choice.label, *row.others) and row.stage != "cliffs"]
        for metric in (item.metric, INSTEAD.get(item.metric, "")) if label != item.label else (item.metric,):
            mine = [row for row in named if metric in row.values]
            same = [row for row in mine if item.text and item.text.lower() in str(row.task).lower()] or mine
            if same:
                said = [f"theirs: {item.note}"] if item.note else []
                said += ["ours is above the model's weights"] if metric == "peak_mb" else []
                said += (
                    [f"here {label}" + (f", {METRICS[metric].title}" if metric != item.metric else "")]
                    if label != item.label
                    else []
                )
                note = "; ".join(said)
                return [[*start, shown(row.values[metric], metric), _where(row), note] for row in same]
    return []


def _where(row: ResultRow) -> str:
    parts = (
        row.model,
        row.task,
        row.length,
        None if row.batch in (None, 1) else f"batch {row.batch}",
        row.budget and row.budget.endswith(PERCENT) and row.budget,
    )
    return " ".join(str(part) for part in parts if part)


def _finding_cells(item: Finding) -> list[str]:
    direction, n = item.direction, len(item.pairs)
    theirs = "no number"
    if item.theirs is not None:
        a, b = item.theirs.better, item.theirs.worse
        theirs = f"{shown_number(a)} / {shown_number(b)}" + (
            f" ({METRICS[a.metric].title})" if a.metric != direction.metric else ""
        )
    ours = "-"
    if item.verdict == "same policy":
        ours = "the same policy when counted alike"
    elif n:
        both = [[shown(row.values[direction.metric], direction.metric) for row in (p.better, p.worse)] for p in item.pairs]
        equal, against = item.count(0), item.count(-2)
        counts = f"clear in {item.count(2)}, holds in {item.count(1, 2)} of {n}" + (f", equal in {equal}" if equal else "")
        counts += f", clearly not in {against}" if against else ""
        ours = "; ".join(" / ".join(each) for each in both) if n <= MOST_SHOWN else counts
        ours += f" ({counts})" if 1 < n <= MOST_SHOWN else ""
    by = "-" if item.difference is None else amount(item.difference, direction.metric)
    by += f"; A/A {item.floors}" if item.floors else ""
    return [direction.say, METRICS[direction.metric].title, theirs, ours, by, item.verdict]


def write_results(
    study: Study, rows: Sequence[ResultRow], nodes: Sequence[NodeRow], out: Path, extra: Sequence[Extra] = ()
) -> None:
    """Write ``summary.md``, ``results.csv`` and ``status.json``."""
    write_json(out / STATUS, [dataclasses.asdict(node) for node in nodes])
    parts = [f"# {study.name}, scale {study.scale}", study.about] if study.about else [f"# {study.name}, scale {study.scale}"]
    if said := sentences(study, rows):
        parts.append("## What the study found, in words\n\n" + "\n".join(f"- {line}" for line in said))
    parts += [f"## {title}\n\n{text}" for title, text in sections(study, rows, markdown_grid)]
    parts += [f"## {title}\n\n{markdown_grid(header, lines)}" for title, header, lines in extra]
    if study.reference:
        parts.append("Where the study's numbers come from: " + " ".join(read_reference(study.reference)[1]))
    left = [node for node in nodes if node.state != "done"]
    if left:
        parts.append("## Not done\n\n" + markdown_grid(["node", "state", "note"], [[n.title, n.state, n.note] for n in left]))
    write_text(out / SUMMARY, "\n\n".join(parts) + "\n")
    flat = to_records(rows)
    if flat:
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, fieldnames=list(flat[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
        write_text(out / RESULTS, buffer.getvalue())
