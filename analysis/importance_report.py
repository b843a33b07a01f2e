"""The importance comparison as files: importance.json, .csv, .md, a figure, and what the command prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtool.analysis.importance import (
    LEVELS,
    Changed,
    Level,
    Pair,
    averages,
    changes,
    collect,
    compare,
    read_measures,
    why_missing,
    with_point,
)
from kvtool.analysis.statistics import Interval, percentile_interval
from kvtool.files import write_json, write_text
from kvtool.textgrid import csv_text, grid, markdown_grid, save_tables

SCHEMA = "kvtool.importance/1"
NAMES = {"kv_heads": "KV heads", "heads": "query heads"}
#: heads that the command prints
SHOWN = 10
MEANING = {
    "attention": "attention of the fed tokens to the prompt outside the two ends that a cut head keeps",
    "reasoning": "HeadKV's retrieval-reasoning score, on prompts that name their evidence and were answered right",
    "gain": "abs(gradient of the answer's margin x output)",
    "ablation": "rise of the answer's loss (nats per token) when the head's cache is cut to the two ends",
    "ablation_margin": "fall of the answer's margin (nats per token) when the head's cache is cut to the two ends",
}


@dataclass(frozen=True, slots=True)
class HeadRow:
    """One measure of one head: mean over prompts with its interval; rank 1 is the most important."""

    level: str
    layer: int
    head: int
    measure: str
    mean: float
    low: float
    high: float
    rank: int


@dataclass(frozen=True, slots=True)
class ImportanceSummary:
    """What a comparison of importances found.

    Attributes
    ----------
    folder : Path
    n_prompts : int
    rows : tuple of HeadRow
    pairs : dict of str to tuple of Pair
        By level.
    changed : tuple of Changed
        Under policies.
    notes : tuple of str
    """

    folder: Path
    n_prompts: int
    rows: tuple[HeadRow, ...]
    pairs: dict[str, tuple[Pair, ...]]
    changed: tuple[Changed, ...]
    n_top: dict[str, int]
    notes: tuple[str, ...]

    def text(self) -> str:
        """Return what the command prints: the top KV heads, agreement, and the change under policies."""
        parts = [
            grid(*head_table(self.rows, "kv_heads", SHOWN)),
            grid(*pair_table(self.pairs["kv_heads"], self.n_top["kv_heads"])),
        ]
        parts += [grid(*change_table(self.changed, ("kv_heads",)))] if self.changed else []
        parts += ["\n".join(messages)] if (messages := [row.message for row in self.changed if row.message]) else []
        files = [str(self.folder / name) for name in ("importance.json", "importance.csv", "importance.md", "importance.png")]
        return "\n\n".join([*parts, "\n".join([*self.notes, *files])])

    def markdown(self) -> str:
        """Return both levels as Markdown."""
        parts = ["# Importance of heads", "\n".join(f"- {note}" for note in self.notes)]
        for heading, table in self.tables():
            parts += [f"## {heading}", markdown_grid(*table)]
        parts += ["\n".join(f"- {row.message}" for row in self.changed if row.message)]
        parts = [part for part in parts if part]
        return "\n\n".join(parts) + "\n"

    def tables(self) -> list[tuple[str, Table]]:
        """Return heading and table of each part."""
        found = []
        for level in LEVELS:
            found.append((f"Agreement over {NAMES[level]}", pair_table(self.pairs[level], self.n_top[level])))
            found.append((f"Most important {NAMES[level]}", head_table(self.rows, level, 2 * SHOWN)))
        return [*found, *([("Under compression (HIV)", change_table(self.changed, LEVELS))] if self.changed else [])]


Table = tuple[list[str], list[list[str]]]


def write_importance(
    folder: Path, sources: Sequence[Path], compressed: Path | None, facts: dict[str, Any], draws: int = 1000, seed: int = 0
) -> ImportanceSummary:
    """Compare the importances of a folder and write everything.

    Parameters
    ----------
    folder : Path
    sources : sequence of Path
        Records of the captured measures, then of the ablation, if there is one.
    compressed : Path, optional
        Records under policies.
    facts : dict
        ``model``, ``data`` and ``cut``, for the file.
    draws, seed : int
        Of the bootstrap over prompts.

    Raises
    ------
    DataError
        Missing or damaged records.
    """
    from kvtool.analysis.importance_figure import plot_importance

    records = [read_measures(path) for path in sources]
    levels = collect(records)
    drawn = with_point(len(records[0]), draws, seed)
    rows = [row for name, level in levels.items() for row in head_rows(name, level, drawn)]
    changed = changes(read_measures(compressed), draws, seed) if compressed else []
    pairs = {name: tuple(compare(level, draws, seed)) for name, level in levels.items()}
    summary = ImportanceSummary(
        folder,
        len(records[0]),
        tuple(rows),
        pairs,
        tuple(changed),
        {name: level.n_top for name, level in levels.items()},
        tuple(_notes(levels["heads"], records[0], facts)),
    )
    if changed:
        write_text(folder / "hiv.csv", hiv_csv(changed))
    title = "Importance of heads"
    save_tables(folder, "importance", title, summary.tables(), csv_of(rows), summary.notes, summary.markdown())
    plot_importance(levels, folder, f"{facts['model']['model_id']}, {facts['data']['task']}, {len(records[0])} prompts")
    # Last: other tools start from it, so it stands for a finished comparison.
    write_json(folder / "importance.json", _json(summary, levels, facts, draws, seed))
    return summary


def _json(summary: ImportanceSummary, levels: dict[str, Level], facts: dict[str, Any], draws: int, seed: int) -> dict[str, Any]:
    values = levels["heads"].values
    return {
        "schema": SCHEMA,
        **facts,
        "prompts": summary.n_prompts,
        "layers": list(levels["heads"].layers),
        "bootstrap": {"draws": draws, "seed": seed},
        "measures": {name: {"meaning": MEANING[name], "prompts": _counted(values[name])} for name in values},
        "importance": {name: [asdict(row) for row in summary.rows if row.level == name] for name in levels},
        "agreement": {
            name: {"top": summary.n_top[name], "pairs": [_clean(asdict(p)) for p in pairs]}
            for name, pairs in summary.pairs.items()
        },
        "compressed": [_clean(asdict(row)) for row in summary.changed],
        "notes": list(summary.notes),
    }


def _clean(value: Any) -> Any:
    """Replace what is not finite: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _clean(item) for key, item in value.items()}
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _counted(values: NDArray[np.float64]) -> int:
    return int((~np.isnan(values[:, 0])).sum())


def head_rows(name: str, level: Level, drawn: NDArray[np.float64]) -> list[HeadRow]:
    """Return mean, interval and rank of every head and measure; equal means share the better rank."""
    rows = []
    for measure, values in level.values.items():
        means = averages(values, drawn)
        point = means[0]
        for index, (layer, head) in enumerate(level.places):
            bounds = percentile_interval(float(point[index]), means[1:, index])
            rank = int((point > point[index]).sum()) + 1
            rows.append(HeadRow(name, layer, head, measure, bounds.mean, bounds.low, bounds.high, rank))
    return rows


def head_table(rows: Sequence[HeadRow], level: str, most: int) -> Table:
    """Return the heads that are best by any measure, best mean rank first."""
    by_head: dict[tuple[int, int], dict[str, HeadRow]] = {}
    for row in rows:
        if row.level == level:
            by_head.setdefault((row.layer, row.head), {})[row.measure] = row
    measures = list(next(iter(by_head.values())))
    order = sorted(by_head, key=lambda place: (sum(row.rank for row in by_head[place].values()), place))[:most]
    lines = [
        [f"{layer}.{head}", *(f"{by_head[layer, head][m].mean:.4f} (#{by_head[layer, head][m].rank})" for m in measures)]
        for layer, head in order
    ]
    return [f"{NAMES[level][:-1]} (layer.head)", *measures], lines


def pair_table(pairs: Sequence[Pair], k: int) -> Table:
    """Return one row per pair of measures; a measure with itself is on two halves of the prompts."""
    lines = []
    for pair in pairs:
        name = f"{pair.a}, halves of the prompts" if pair.a == pair.b else f"{pair.a} - {pair.b}"
        lines.append([name, *(_text(interval) for interval in (pair.spearman, pair.kendall, pair.overlap))])
    return ["measures", "Spearman (95 %)", "Kendall (95 %)", f"top {k} shared (95 %)"], lines


def change_table(changed: Sequence[Changed], levels: Sequence[str]) -> Table:
    """Return one row per policy, measure and level."""
    header = [
        "policy",
        "kept",
        "heads",
        "measure",
        "variance",
        "over full (95 %)",
        "sd / mean (95 %)",
        "Spearman with full (95 %)",
    ]
    header += ["top shared (95 %)", "answer accuracy"]
    lines = []
    for row in changed:
        if row.message:
            lines.append([row.policy, f"{100 * row.retention:.2f}%", "impossible", *["-"] * 7])
        elif row.level in levels and row.variance:
            cells = [row.policy, f"{100 * row.retention:.2f}%", NAMES[row.level], row.measure, f"{row.variance.mean:.3g}"]
            cells += [_text(interval) for interval in (row.ratio, row.spread, row.spearman, row.overlap)]
            lines.append([*cells, f"{row.figures['accuracy']:.2f}"])
    return header, lines


def _text(interval: Interval | None) -> str:
    return "-" if interval is None or np.isnan(interval.mean) else interval.text()


def _notes(level: Level, captured: Sequence[dict[str, Any]], facts: dict[str, Any]) -> list[str]:
    cut = facts["cut"]
    notes = [f"{name}: {MEANING[name]}" for name in level.values]
    notes.append(
        f"the two ends: the first {cut['sink']} and the last {cut['window']} entries of the prompt, which every policy keeps"
    )
    notes += why_missing(captured)
    if len(level.layers) < facts["model"]["n_layers"]:
        left = facts["model"]["n_layers"] - len(level.layers)
        notes.append(f"{left} layers are left out: their sliding window is shorter than a prompt, so no policy touches them")
    notes.append(f"{len(captured)} prompts; intervals: 95 %, over resampled prompts")
    return notes


def csv_of(rows: Sequence[HeadRow]) -> str:
    """Return the heads as CSV: the data of the figure, too."""
    return csv_text(list(HeadRow.__dataclass_fields__), [list(asdict(row).values()) for row in rows])


def hiv_csv(changed: Sequence[Changed]) -> str:
    """Return the changes under policies as CSV."""
    figures = ("nll", "margin", "accuracy")
    intervals = ("variance", "ratio", "spread", "spearman", "kendall", "overlap")
    header = ["policy", "measure", "level", "retention", "message", *figures]
    header += [f"{name}{end}" for name in intervals for end in ("", "_low", "_high")]
    lines = []
    for row in changed:
        cells: list[Any] = [row.policy, row.measure, row.level, row.retention, row.message or ""]
        cells += [row.figures.get(name, "") for name in figures]
        for name in intervals:
            interval: Interval | None = getattr(row, name)
            cells += ["", "", ""] if interval is None else [interval.mean, interval.low, interval.high]
        lines.append(cells)
    return csv_text(header, lines)
