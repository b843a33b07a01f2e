"""The tables of a study's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from kvtool.analysis.answer import cost
from kvtool.analysis.cliffs import asked, percent
from kvtool.analysis.points import FIGURES, Place
from kvtool.analysis.statistics import Interval
from kvtool.analysis.study import Choice, StudyData
from kvtool.analysis.tabular import Cell, Table, number, plain_table, spread, words
from kvtool.naming import short_name


def where(place: Place) -> tuple[Cell, ...]:
    """Return the cells that name a workload."""
    return words(place.model), words(place.task), number(place.length, 0), words(place.compress_at)


WHERE = ("model", "task", "length", "compressed at")


def answer_table(choices: Sequence[Choice]) -> Table:
    """Return one row per workload with the choice."""
    rows = []
    for choice in choices:
        point, place = choice.point, choice.place
        rows.append(
            (
                *where(place),
                words(point.label if point else f"full cache ({choice.why})", point.policy if point else ""),
                number(point.retention if point else 1.0, 1, 100.0),
                number(point.saved if point else 0.0, 1, 100.0),
                spread(choice.change, 2, sign=True),
                words(cost(choice.change, len(place.samples)) if point and choice.change else None),
                words(", ".join(choice.tied)),
                number(len(place.samples), 0),
            )
        )
    header = (*WHERE, "run", "kept %", "KV saved %", "score − full (95 %)", "cost", "not told apart", "prompts")
    return Table("answers", "What to run, by workload", "", header, tuple(rows))


def score_table(places: Sequence[Place]) -> Table:
    """Return methods at retentions as a grid of scores: one row per method and workload."""
    budgets = sorted({asked(p) for place in places for p in place.points if p.budget and p.budget.endswith("%")})
    rows = []
    for place in places:
        figure = place.figure() or "score"
        whole = spread(place.mean(place.full, figure)) if place.full else Cell("–", None)
        for label in dict.fromkeys(p.label for p in place.points if p.budget and p.budget.endswith("%")):
            mine = {asked(p): p for p in place.points if p.label == label}
            cells = []
            for budget in budgets:
                point = mine.get(budget)
                mean = place.mean(point, figure) if point else None
                cells.append(
                    spread(mean) if mean else Cell("–" if point is None or point.status == "ok" else point.status, None)
                )
            rows.append((words(label), *where(place), *cells, whole))
    how = "Scores with 95 % intervals over prompts; the last column is the full cache on the same prompts."
    return Table("scores", "Scores", how, ("method", *WHERE, *map(percent, budgets), "full"), tuple(rows))


def point_table(places: Sequence[Place]) -> Table:
    """Return every point: one row per method, retention and workload."""
    rows = []
    for place in places:
        figure = place.figure() or "score"
        for point in place.points:
            mean, change, loss = place.mean(point, figure), place.change(point, figure), place.loss(point, figure)
            efficiency = mean.mean / point.retention if mean and point.retention else None
            note = [point.status] if point.status != "ok" else []
            note += ["degenerate"] if point.degenerate else []
            rows.append(
                (
                    words(point.label, point.policy),
                    *where(place),
                    number(point.retention, 2, 100.0),
                    number(point.saved, 1, 100.0),
                    spread(mean),
                    spread(change, 2, sign=True),
                    number(loss.mean if loss else None, 1, 100.0),
                    number(efficiency, 1),
                    number(point.tpot_s, 2, 1000.0),
                    words(", ".join(note)),
                )
            )
    header = (
        "method",
        *WHERE,
        "kept %",
        "KV saved %",
        "score",
        "score − full",
        "loss %",
        "score % / kept %",
        "ms/token",
        "note",
    )
    figures = ", ".join(dict.fromkeys(FIGURES[place.figure() or "score"][1] for place in places))
    how = f"Score: {figures}. Times are of the machine that ran them; they compare rows of one workload, nothing else."
    return Table("points", "Every point", how, header, tuple(rows), wanted=10)


def node_table(data: StudyData) -> Table:
    """Return what was run."""
    rows = tuple(
        (words(n["title"], n["name"]), words(n["kind"]), words(n["state"]), number(n["seconds"], 1), words(n["note"]))
        for n in data.nodes
    )
    return Table("nodes", "What was run", "", ("node", "stage", "state", "seconds", "note"), rows)


#: Metric of a flat row -> its heading; in the order in which they are wanted, those of the second line hidden at first in a page.
WANTED = {
    "perplexity": "perplexity (95 %)",
    "perplexity_ratio": "over full's (95 %)",
    "effective_context": "effective context",
    "kv_mb": "KV MB",
    "peak_mb": "peak MB",
    "ttft_s": "TTFT s",
    "tpot_ms": "ms/token",
    "tokens_per_s": "tokens/s",
    "speedup": "speed-up",
}
FURTHER = {
    "next_token_accuracy": "next-token accuracy",
    "kept": "kept %",
    "attention_ms": "attention ms",
    "compress_s": "compress s",
    "total_s": "total s",
}
#: Metrics whose interval over pieces of a text stands beside them.
WITH_INTERVAL = ("perplexity", "perplexity_ratio", "next_token_accuracy")


def series_table(data: StudyData, stages: Sequence[str], name: str, title: str) -> Table | None:
    """Return flat result rows of some stages with every metric that any has, the most wanted first; None without rows."""
    rows = [row for row in data.rows if row["stage"] in stages]
    metrics = [key.removesuffix("_low") for key in (rows[0] if rows else {}) if key.endswith("_low")]
    used = [key for key in metrics if any(row.get(key) is not None for row in rows)]
    if not used:
        return None
    facts = [
        key for key in ("series", "model", "task", "length", "batch", "budget") if len({str(row[key]) for row in rows}) > 1
    ]
    first = [key for key in WANTED if key in used]
    last = [key for key in used if key not in WANTED]
    lines = tuple(
        (
            words(" = ".join(filter(None, (row["label"], row["also"]))), str(row["policy"])),
            *(number(row[key], 0) if isinstance(row[key], int) else words(row[key]) for key in facts),
            *(_metric(row, key) for key in first),
            words(row["note"]),
            *(_metric(row, key) for key in last),
        )
        for row in rows
    )
    header = [*(WANTED[key] for key in first), "note", *(FURTHER.get(key, key.replace("_", " ")) for key in last)]
    how = (
        "Medians on the machine that ran them; ms/token: time per token after the first, TTFT: time to the first."
        if "tpot_ms" in used
        else ""
    )
    return Table(name, title, how, ("policy", *facts, *header), lines, wanted=2 + len(facts) + len(first) if last else 0)


def _metric(row: Mapping[str, Any], key: str) -> Cell:
    value, low, high = (row.get(f"{key}{end}") for end in ("", "_low", "_high"))
    if key in WITH_INTERVAL and value is not None and low is not None and high is not None:
        return spread(Interval(value, low, high), _digits(value))
    return number(value, _digits(value))


def _digits(value: float | None) -> int:
    size = abs(value or 0.0)
    return 0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 1 else 3


#: How the titles of a study's own tables begin -> name, and how to read it.
OWN = {
    "What the study found, here": ("findings", ""),
    "The study's own numbers beside ours": ("reference", ""),
    "Critical retentions, refined": ("refined", "Run for real between grid values where a curve falls, on the same prompts."),
    "Metrics of every policy": (
        "metrics",
        "Efficiency: score % / kept %, read beside the score; head specialization: Gini coefficient of the entries that heads keep (0: all "
        "alike); the last columns against the full cache on the same prompts.",
    ),
    "Head importance before and after compression": (
        "hiv",
        "Of KV heads: variance over the full cache's (1: unchanged), rank correlation with it, share of the top heads that stay the top.",
    ),
    "Why policies fall short": (
        "gap_parts",
        "Predicted harm (lost margin) above the oracle's, taken apart: protection wants smaller sink and window, selection a better "
        "score, price another shape of the budgets, allocation other budgets of the same shape.",
    ),
}


def own_tables(data: StudyData) -> list[Table]:
    """Return the study's findings, own numbers and further tables of its stages, as the summary has them; others are made anew."""
    names = {short_name(point.policy): point.label for place in data.places for point in place.points}
    found: list[Table] = []
    for title, header, lines in data.tables:
        known = next((value for start, value in OWN.items() if title.startswith(start)), None)
        if known is not None and known[0] not in {table.name for table in found}:
            found.append(_named(plain_table(known[0], title, known[1], header, lines), names))
    return found


def _named(table: Table, names: Mapping[str, str]) -> Table:
    """Call policies what the study calls them; their text is under the pointer."""
    if "policy" not in table.header:
        return table
    place = table.header.index("policy")
    rows = tuple(
        tuple(words(names.get(cell.text, cell.text), cell.text) if i == place else cell for i, cell in enumerate(row))
        for row in table.rows
    )
    return replace(table, rows=rows)
