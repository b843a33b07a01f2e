"""The head-importance-variance test as files: hiv.json, .md, hiv.csv, heads.csv, patterns.csv, and what the command prints."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvtool.analysis.hiv import PARTS, Hiv, PatternRow, SpecializationRow, measure_hiv
from kvtool.analysis.importance import Changed, read_measures
from kvtool.analysis.importance_report import NAMES, change_table, hiv_csv
from kvtool.analysis.look_figures import hiv_figure
from kvtool.analysis.plain import columns, csv_text, ends, finite
from kvtool.analysis.statistics import Interval
from kvtool.files import write_json, write_text
from kvtool.textgrid import grid, markdown_grid, save_tables

SCHEMA = "kvtool.hiv/1"
TITLE = "Head-importance variance (HIV)"
Table = tuple[list[str], list[list[str]]]


@dataclass(frozen=True, slots=True)
class HivSummary:
    """What the test found.

    Attributes
    ----------
    folder : Path
    found : Hiv
    notes : tuple of str
    """

    folder: Path
    found: Hiv
    notes: tuple[str, ...]

    def text(self) -> str:
        """Return what the command prints: KV heads only, the files have query heads too."""
        parts = []
        for name, changed in self.found.changed.items():
            parts += [f"{name}: importance before and after", grid(*change_table(changed, ("kv_heads",)))]
            parts += ["\n".join(row.message for row in changed if row.message)]
        parts += ["Head Specialization Score", grid(*heads_table(self.found.heads))]
        if self.found.patterns:
            rows = [row for row in self.found.patterns if row.level == "kv_heads"]
            parts += ["Do two kinds of prompts favour the same KV heads?", grid(*patterns_table(rows))]
        return "\n\n".join([*(part for part in parts if part), "\n".join([*self.notes, str(self.folder / "hiv.md")])])

    def markdown(self) -> str:
        """Return all tables as Markdown."""
        parts = [f"# {TITLE}", "\n".join(f"- {note}" for note in self.notes)]
        for heading, table in self.tables():
            parts += [f"## {heading}", markdown_grid(*table)]
            parts += ["\n".join(f"- {row.message}" for row in self.found.changed.get(heading, ()) if row.message)]
        return "\n\n".join(part for part in parts if part) + "\n"

    def tables(self) -> list[tuple[str, Table]]:
        """Return heading and table of each part: the kinds of prompts, how heads specialize, the kinds against each other."""
        found = [(name, change_table(changed, tuple(NAMES))) for name, changed in self.found.changed.items()]
        found.append(("Head Specialization Score", heads_table(self.found.heads)))
        if self.found.patterns:
            found.append(("Kinds of prompts against each other", patterns_table(self.found.patterns)))
        return found


def write_hiv(folder: Path, sources: dict[str, Path], cut: tuple[int, int], draws: int = 1000, seed: int = 0) -> HivSummary:
    """Measure and write everything.

    Parameters
    ----------
    folder : Path
    sources : dict of str to Path
        Kind of prompts -> records of its prompts under policies.
    cut : (int, int)
        First and last entries of a prompt that do not count as attention.
    draws, seed : int

    Raises
    ------
    ConfigError, DataError
        See `kvtool.analysis.hiv.measure_hiv`.
    """
    records = {name: read_measures(path) for name, path in sources.items()}
    found = measure_hiv(records, draws, seed)
    notes = _notes(records, cut, draws, seed)
    summary = HivSummary(folder, found, tuple(notes))
    save_tables(folder, "hiv", TITLE, summary.tables(), changed_csv(found.changed), notes, summary.markdown())
    write_text(folder / "heads.csv", heads_csv(found.heads))
    if found.patterns:
        write_text(folder / "patterns.csv", patterns_csv(found.patterns))
    value = {
        "schema": SCHEMA,
        "prompts": {name: len(rows) for name, rows in records.items()},
        "cut": {"sink": cut[0], "window": cut[1]},
        "bootstrap": {"draws": draws, "seed": seed},
        "changed": {name: [asdict(row) for row in rows] for name, rows in found.changed.items()},
        "heads": [asdict(row) for row in found.heads],
        "patterns": [asdict(row) for row in found.patterns],
        "notes": notes,
    }
    write_json(folder / "hiv.json", finite(value))
    if (drawn := hiv_figure(found.changed, found.heads)) is not None:
        drawn.save(folder)
    return summary


def _notes(records: dict[str, list[dict[str, Any]]], cut: tuple[int, int], draws: int, seed: int) -> list[str]:
    notes = [f"{name}: {len(rows)} prompts" for name, rows in records.items()]
    notes.append(
        f"attention: of the fed tokens to what is kept behind the first {cut[0]} and before the last {cut[1]} entries of the prompt; gain: "
        "abs(gradient of the answer's margin x output); both from a forward of the answer over the compressed prompt"
    )
    notes.append(
        "over full: variance of the mean importance over heads, divided by the full cache's; Spearman and top shared: ranks against it"
    )
    notes.append(
        "Gini: 0 all heads alike, near 1 one head has all; entries of KV heads, attention mass of query heads; means over prompts"
    )
    notes.append(f"intervals: 95 %, {draws} draws of prompts, seed {seed}")
    if (fewest := min(len(rows) for rows in records.values())) < 10:
        notes.append(f"{fewest} prompts are few: means of heads, and with them ranks, still move")
    return notes


def heads_table(rows: Sequence[SpecializationRow]) -> Table:
    """Return one line per kind of prompts and policy."""
    header = ["policy", "prompts", "kept", "Gini of entries (95 %)", "Gini of attention (95 %)", "concentration of attention"]
    lines = []
    for row in rows:
        cells = [row.policy, row.pattern, f"{100 * row.retention:.2f}%"]
        cells += [_text(row.kept.get("gini")), _text(row.mass.get("gini")), _text(row.mass.get("concentration"))]
        lines.append(cells)
    return header, lines


def patterns_table(rows: Sequence[PatternRow]) -> Table:
    """Return one line per pair of kinds, policy and measure."""
    header = ["policy", "prompts", "heads", "measure", "Spearman (95 %)", "Kendall (95 %)", "top shared (95 %)"]
    lines = [
        [
            row.policy,
            f"{row.a} - {row.b}",
            NAMES[row.level],
            row.measure,
            _text(row.spearman),
            _text(row.kendall),
            _text(row.overlap),
        ]
        for row in rows
    ]
    return header, lines


def _text(value: Interval | None) -> str:
    return "-" if value is None or np.isnan(value.mean) else value.text()


def changed_csv(changed: dict[str, list[Changed]]) -> str:
    """Return the changes of importance as CSV, the kind of prompts in front."""
    tables = {name: list(csv.reader(io.StringIO(hiv_csv(rows)))) for name, rows in changed.items()}
    header = ["prompts", *next(iter(tables.values()))[0]]
    return csv_text(header, [[name, *line] for name, table in tables.items() for line in table[1:]])


def heads_csv(rows: Sequence[SpecializationRow]) -> str:
    """Return the specialization scores as CSV."""
    lines: list[list[Any]] = []
    for row in rows:
        found = [ends(scores.get(part)) for scores in (row.kept, row.mass) for part in PARTS]
        lines.append([row.pattern, row.policy, row.retention, *(cell for cells in found for cell in cells)])
    return csv_text(
        ["prompts", "policy", "retention", *columns([f"{of}_{p}" for of in ("kept", "mass") for p in PARTS])], lines
    )


def patterns_csv(rows: Sequence[PatternRow]) -> str:
    """Return the comparison of kinds of prompts as CSV."""
    lines = [[r.a, r.b, r.policy, r.measure, r.level, *ends(r.spearman), *ends(r.kendall), *ends(r.overlap)] for r in rows]
    return csv_text(["a", "b", "policy", "measure", "level", *columns(["spearman", "kendall", "overlap"])], lines)
