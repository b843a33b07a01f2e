"""The comparison of runs as files: compare.json, .csv, .md, pairs.csv and scores.csv, and what the command prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvtool.analysis.compare import (
    FIGURES,
    LEVEL,
    CompareRow,
    Draws,
    Joined,
    NoiseRow,
    PairRow,
    choose_figures,
    compare_rows,
    noise_rows,
    pair_rows,
)
from kvtool.analysis.consistency import document, find_policy
from kvtool.analysis.controls import load_comparable, settings
from kvtool.analysis.load import Reality
from kvtool.analysis.look_figures import compare_figure
from kvtool.analysis.plain import columns, csv_text, ends, finite
from kvtool.analysis.resampling import HOW, METHODS
from kvtool.analysis.statistics import DRAWS as MOST_DRAWS
from kvtool.analysis.statistics import Interval
from kvtool.errors import ConfigError
from kvtool.files import write_json, write_text
from kvtool.textgrid import grid, markdown_grid, save_tables

SCHEMA = "kvtool.compare/1"
WORDS = {"answer_accuracy": "accuracy", "answer_exact": "exact", "answer_nll": "nll", "answer_margin": "margin"}
#: Kinds of bootstrap that can be asked for, in words.
KINDS = {"bca": "bias-corrected and accelerated percentiles (BCa)", "percentile": "plain percentiles"}
Table = tuple[list[str], list[list[str]]]


@dataclass(frozen=True, slots=True)
class CompareSummary:
    """What a comparison found.

    Attributes
    ----------
    folder : Path
    baseline : str
    figures : tuple of str
    n_samples, n_documents : int
    rows : tuple of CompareRow
    pairs : tuple of PairRow
    noise : tuple of NoiseRow
    notes : tuple of str
    """

    folder: Path
    baseline: str
    figures: tuple[str, ...]
    n_samples: int
    n_documents: int
    rows: tuple[CompareRow, ...]
    pairs: tuple[PairRow, ...]
    noise: tuple[NoiseRow, ...]
    notes: tuple[str, ...]

    def text(self) -> str:
        """Return what the command prints: every policy against the baseline, pairs that differ, noise."""
        parts = [grid(*versus_table(self.rows, figure, self.baseline)) for figure in self.figures]
        clear = [row for row in self.pairs if row.p_holm < LEVEL]
        if self.pairs:
            parts.append(f"{len(clear)} of {len(self.pairs)} pairs within a budget differ (Holm, p < {LEVEL:g})")
        parts += [grid(*pair_table(clear[:20]))] if clear else []
        parts += [grid(*noise_table(self.noise, self.figures))] if self.noise else []
        return "\n\n".join([*parts, "\n".join([*self.notes, f"{self.folder / 'compare.md'}"])])

    def tables(self) -> list[tuple[str, Table]]:
        """Return heading and table of each figure, of the pairs that differ, and of what was run again."""
        found = [(figure, versus_table(self.rows, figure, self.baseline)) for figure in self.figures]
        if clear := sorted((row for row in self.pairs if row.p_holm < LEVEL), key=lambda row: row.p_holm):
            found.append(("Pairs within a budget that differ", pair_table(clear)))
        return [*found, *([("A/A: the same configuration again", noise_table(self.noise, self.figures))] if self.noise else [])]

    def markdown(self) -> str:
        """Return all tables as Markdown."""
        parts = [f"# Comparison with {self.baseline}", "\n".join(f"- {note}" for note in self.notes)]
        for figure in self.figures:
            parts += [f"## {figure}", markdown_grid(*versus_table(self.rows, figure, self.baseline))]
        if self.pairs:
            clear = sorted((row for row in self.pairs if row.p_holm < LEVEL), key=lambda row: row.p_holm)
            parts.append(
                f"## Pairs within a budget\n\n{len(clear)} of {len(self.pairs)} differ (Holm, p < {LEVEL:g}); pairs.csv has all."
            )
            parts += [markdown_grid(*pair_table(clear))] if clear else []
        if self.noise:
            parts += ["## A/A: the same configuration again", markdown_grid(*noise_table(self.noise, self.figures))]
        return "\n\n".join(parts) + "\n"


def run_compare(
    folders: Sequence[Path], out: Path, baseline: str = "full", figures: Sequence[str] = (), how: Draws | None = None
) -> CompareSummary:
    """Put the policies of one or several runs side by side and write everything.

    Parameters
    ----------
    folders : sequence of Path
        Folders of infer runs with the same settings and samples; their repeats (``again-1``, ...) come along.
    out : Path
    baseline : str
        The policy that the others are compared with.
    figures : sequence of str
        Of `kvtool.analysis.compare.FIGURES`; empty: task score and answer accuracy.
    how : Draws, optional

    Raises
    ------
    ConfigError
        The runs differ in more than their policies; unknown baseline, figure or interval.
    DataError
        Missing or damaged runs; nothing measured.
    """
    how = how or Draws()
    if how.method not in METHODS:
        raise ConfigError(f"interval {how.method!r}; choose {', '.join(METHODS[:-1])} or {METHODS[-1]}")
    realities, notes = load_comparable(folders)
    joined = Joined.of(realities)
    start = find_policy(_holder(realities, baseline), baseline)
    chosen = choose_figures(joined, figures)
    rows = compare_rows(joined, start, chosen, how)
    summary = CompareSummary(
        out,
        start,
        tuple(chosen),
        len(joined.samples),
        joined.documents.n,
        tuple(rows),
        tuple(pair_rows(joined, start, chosen, how)),
        tuple(noise_rows(joined, chosen, how)),
        (*_notes(joined, rows, start, chosen, how), *notes),
    )
    title = f"Comparison with {start}"
    save_tables(out, "compare", title, summary.tables(), csv_of(rows, chosen), summary.notes, summary.markdown())
    write_text(out / "pairs.csv", pairs_csv(summary.pairs))
    write_text(out / "scores.csv", scores_csv(joined))
    write_json(out / "compare.json", _json(summary, realities, how))
    if (drawn := compare_figure(rows, chosen, start)) is not None:
        drawn.save(out)
    return summary


def _holder(realities: Sequence[Reality], name: str) -> Reality:
    """Return the first run that has the baseline."""
    having = [r for r in realities if any(name in (policy, policy.split(":")[0]) for policy in r.policies)]
    return (having or realities)[0]


def _notes(joined: Joined, rows: Sequence[CompareRow], baseline: str, figures: Sequence[str], how: Draws) -> list[str]:
    n, n_documents = len(joined.samples), joined.documents.n
    what = HOW if how.method == METHODS[0] else HOW.replace("expanded percentiles", KINDS[how.method])
    draws = min(how.n, MOST_DRAWS) if how.method == METHODS[0] else how.n
    notes = [f"{n} samples of {n_documents} documents; {what}, {draws} draws of whole documents, seed {how.seed}"]
    if len({document(record) for record in next(iter(joined.records.values()))}) == 1 < n:
        notes[0] = f"{n} samples of one document, taken for independent; {what}, {draws} draws, seed {how.seed}"
    notes.append(
        "p: paired, signs of documents flipped (McNemar's exact test for 0/1 figures); Holm: corrected for all policies of a figure"
    )
    for figure in figures:
        if (m := len(joined.measured(figure))) < n:
            notes.append(f"{figure}: {m} of {n} samples have it")
        if joined.values(baseline, figure, joined.measured(figure)) is None:
            notes.append(f"{baseline} has no {figure} on every sample: there is nothing to compare with")
    if n_documents < 20:
        notes.append(f"{n_documents} documents are few: intervals and tests are rough, and small differences cannot show")
    if any(row.efficiency for row in rows):
        notes.append(
            "CER: score / retention; it rewards the smallest budgets whatever they lose: read it beside the score, within a budget"
        )
    if not joined.repeats:
        notes.append("no run was repeated, so the noise of times is unknown: kvtool infer --repeat 2")
    return notes + [row.message for row in rows if row.message]


def versus_table(rows: Sequence[CompareRow], figure: str, baseline: str) -> Table:
    """Return one line per policy for one figure."""
    name = WORDS.get(figure, figure)
    header = ["policy", "kept", f"{name} (95 %)", f"- {baseline.split(':')[0]} (95 %)", "p", "p Holm"]
    scored = figure == "score"
    header += ["CER"] if scored else []
    header += ["Gini kept", "TPOT ratio", "note"]
    lines = []
    for row in rows:
        versus = row.figures.get(figure)
        cells = [row.policy, "-" if row.retention is None else f"{100 * row.retention:.1f}%"]
        cells += (
            ["-"] * 4
            if versus is None
            else [versus.mean.text(), _text(versus.change, sign=True), _p(versus.p), _p(versus.p_holm)]
        )
        cells += [_text(row.efficiency, 1)] if scored else []
        cells += ["-" if np.isnan(row.heads.gini) else f"{row.heads.gini:.2f}", _text(row.speed.get("tpot_s"))]
        lines.append([*cells, _remark(row, versus.p_holm if versus else None)])
    return header, lines


def _remark(row: CompareRow, p: float | None) -> str:
    notes = [row.status] if row.status != "ok" else []
    notes += ["degenerate"] if row.degenerate else []
    return ", ".join(notes + (["differs"] if p is not None and p < LEVEL else []))


def pair_table(rows: Sequence[PairRow]) -> Table:
    """Return one line per pair."""
    lines = [
        [f"{row.a} - {row.b}", row.figure, row.budget, _text(row.change, sign=True), _p(row.p), _p(row.p_holm)] for row in rows
    ]
    return ["pair", "figure", "budget", "difference (95 %)", "p", "p Holm"], lines


def noise_table(rows: Sequence[NoiseRow], figures: Sequence[str]) -> Table:
    """Return one line per policy that was run again."""
    header = [
        "A/A: again / first",
        "n",
        "records equal",
        *(f"{WORDS.get(f, f)} change" for f in figures),
        "TPOT ratio",
        "TTFT ratio",
    ]
    lines = []
    for row in rows:
        cells = [row.policy, str(row.n), f"{100 * row.identical:.0f}%"]
        cells += [_text(row.changes.get(figure), sign=True) for figure in figures]
        lines.append([*cells, _text(row.speed.get("tpot_s")), _text(row.speed.get("ttft_s"))])
    return header, lines


def _text(value: Interval | None, digits: int = 2, sign: bool = False) -> str:
    return "-" if value is None or np.isnan(value.mean) else value.text(digits, sign)


def _p(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value >= 1e-4 else "<1e-4"


def _json(summary: CompareSummary, realities: Sequence[Reality], how: Draws) -> dict[str, Any]:
    value = {
        "schema": SCHEMA,
        "baseline": summary.baseline,
        "settings": settings(realities[0]),
        "runs": [
            {"folder": str(r.folder), "subset": r.provenance.get("subset"), "prompts": r.config.get("prompts")}
            for r in realities
        ],
        "draws": asdict(how),
        "n_samples": summary.n_samples,
        "n_documents": summary.n_documents,
        "rows": [asdict(row) for row in summary.rows],
        "pairs": [asdict(row) for row in summary.pairs],
        "noise": [asdict(row) for row in summary.noise],
        "notes": list(summary.notes),
    }
    return finite(value)  # type: ignore[no-any-return]


def csv_of(rows: Sequence[CompareRow], figures: Sequence[str]) -> str:
    """Return the rows as CSV, unrounded."""
    header = ["policy", "method", "budget", "status", "degenerate", "retention"]
    for figure in figures:
        header += [f"{figure}{end}" for end in ("", "_low", "_high", "_change", "_change_low", "_change_high", "_p", "_p_holm")]
    header += ["efficiency", "gini_kept", "concentration_kept", "spread_kept", "variance_kept"]
    header += columns(["tpot_ratio", "ttft_ratio"])
    lines = []
    for row in rows:
        cells: list[Any] = [row.policy, row.method, row.budget, row.status, row.degenerate, row.retention]
        for figure in figures:
            versus = row.figures.get(figure)
            cells += [None] * 8 if versus is None else [*ends(versus.mean), *ends(versus.change), versus.p, versus.p_holm]
        heads = row.heads
        cells += [
            row.efficiency.mean if row.efficiency else None,
            heads.gini,
            heads.concentration,
            heads.spread,
            heads.variance,
        ]
        cells += [*ends(row.speed.get("tpot_s")), *ends(row.speed.get("ttft_s"))]
        lines.append(cells)
    return csv_text(header, lines)


def pairs_csv(rows: Sequence[PairRow]) -> str:
    """Return all pairs as CSV, unrounded."""
    header = ["figure", "budget", "a", "b", "difference", "low", "high", "p", "p_holm"]
    return csv_text(header, [[r.figure, r.budget, r.a, r.b, *ends(r.change), r.p, r.p_holm] for r in rows])


def scores_csv(joined: Joined) -> str:
    """Return every figure of every sample and policy, unrounded."""
    header = ["sample", "document", "policy", "budget", "status", "retention", *FIGURES]
    lines = []
    for policy, records in joined.records.items():
        for record, number in zip(records, joined.documents.of, strict=True):
            facts = [record["sample"], record.get("document") or int(number), policy, record["budget"], record["status"]]
            lines.append([*facts, record["retention"], *(record.get(figure) for figure in FIGURES)])
    return csv_text(header, lines)
