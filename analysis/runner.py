"""The analyze stage: folders in; tables, figures, fidelity and report.html out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvtool.analysis.answer import make_answer, warnings
from kvtool.analysis.cells import TRUTHS, Cell, LeftOut, build_cells
from kvtool.analysis.fidelity import Agreement, measure_agreement
from kvtool.analysis.load import Reality, Simulation, check_belongs, load_reality, load_simulation
from kvtool.analysis.statistics import Interval
from kvtool.analysis.tables import build_table, csv_table, markdown_table, text_table
from kvtool.errors import DataError
from kvtool.files import write_json, write_text
from kvtool.textgrid import grid


@dataclass(frozen=True, slots=True)
class AnalyzeSummary:
    """What an analysis left.

    Attributes
    ----------
    report : Path
    table, answer : str
        Plain text.
    warnings : tuple of str
    """

    report: Path
    table: str
    answer: str
    warnings: tuple[str, ...]

    def text(self) -> str:
        """Return what the command prints."""
        notes = [f"warning: {line}" for line in self.warnings]
        return "\n".join([self.table, "", self.answer, *notes, "", f"report: {self.report.resolve()}"])


@dataclass(frozen=True, slots=True)
class FidelitySummary:
    """How well the offline ranking agrees with reality.

    Attributes
    ----------
    n_cells : int
        Budgets with at least three configurations, all lengths.
    left_out : LeftOut
        Configurations that do not count, by reason.
    paired : bool
        Prediction and reality on the same prompts.
    agreements : tuple of Agreement
        One per real figure.
    """

    n_cells: int
    left_out: LeftOut
    paired: bool
    agreements: tuple[Agreement, ...]

    def text(self) -> str:
        """Return what the command prints."""
        return "\n".join([grid(*agreement_table(self.agreements)), "", *self.notes()])

    def markdown(self) -> str:
        """Return the agreement, then the tau of every budget, as Markdown."""
        parts = [
            "# Fidelity",
            _markdown(*agreement_table(self.agreements, wide=True)),
            "\n".join(f"- {note}" for note in self.notes()),
        ]
        for agreement in self.agreements:
            parts += [f"## By budget: {agreement.truth}", _markdown(*cell_table(agreement))]
        return "\n\n".join(parts) + "\n"

    def notes(self) -> list[str]:
        """Return how to read the tables."""
        prompts = "the same prompts" if self.paired else "other prompts than the capture's"
        return [
            f"{self.n_cells} budgets on {prompts}; configurations left out: {self.left_out.text()}",
            "tau: Kendall's tau-b within a budget, mean over budgets; intervals: 95 %, over resampled prompts",
            "ceiling: tau between two random halves of the real prompts; regret and tied best: harm / recall",
        ]


Table = tuple[list[str], list[list[str]]]


def agreement_table(agreements: Sequence[Agreement], wide: bool = False) -> Table:
    """Return header and rows, one row per real figure; `wide` adds the intervals of the ceiling and the regret of the top 1."""
    refined = any("refined_nll" in a.tau for a in agreements)
    tops = ("top1", "top3") if wide else ("top3",)
    header = ["real figure", "budgets", "tau harm (95 %)", "tau recall (95 %)", "harm - recall (95 %)", "tau retention"]
    header += ["tau refined nll (95 %)"] if refined else []
    header += ["ceiling", *(f"regret {k[:3]} {k[3:]}" for k in tops), "tied best in top 3"]
    rows = []
    for a in agreements:
        row = [a.truth, f"{a.n_cells}" + (f" (+{a.n_tied} tied)" if a.n_tied else "")]
        row += [a.tau["harm"].text(), a.tau["recall"].text(), a.advantage.text(sign=True), f"{a.tau['retention'].mean:.2f}"]
        if refined:
            row.append(f"{a.tau['refined_nll'].text()} of {a.n_cells_of['refined_nll']}" if "refined_nll" in a.tau else "-")
        row.append(a.ceiling.text() if wide else f"{a.ceiling.mean:.2f}")
        row += [_two(a.regret["harm"][k], a.regret["recall"][k], 3, wide) for k in tops]
        rows.append([*row, _two(a.tied_best_recall["harm"]["top3"], a.tied_best_recall["recall"]["top3"], 2, wide)])
    return header, rows


def _two(harm: Interval, recall: Interval, digits: int, wide: bool) -> str:
    return " / ".join(v.text(digits) if wide else f"{v.mean:.{digits}f}" for v in (harm, recall))


def cell_table(agreement: Agreement) -> Table:
    """Return header and rows: one row per prompt length and budget."""
    header = ["length", "budget", "configurations", "tau harm (95 %)", "tau recall (95 %)", "ceiling"]
    rows = [
        [
            "-" if c.length is None else str(c.length),
            c.budget,
            str(c.n_policies),
            *(c.tau[name].text() for name in ("harm", "recall")),
            f"{c.ceiling:.2f}",
        ]
        for c in agreement.cells
    ]
    return header, rows


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def run_analyze(simulate_dir: Path | None, infer_dir: Path, out: Path, draws: int = 1000, seed: int = 0) -> AnalyzeSummary:
    """Write tables, figures and report.html.

    Parameters
    ----------
    simulate_dir : Path or None
        None: reality only.
    infer_dir, out : Path
    draws, seed : int
        Of the bootstrap of the fidelity section.

    Raises
    ------
    DataError
        Missing, unfinished or damaged folders.
    ConfigError
        Folders that do not belong together.
    """
    from kvtool.analysis.figures import make_figures
    from kvtool.analysis.report import render_report

    simulation = load_simulation(simulate_dir) if simulate_dir else None
    reality = load_reality(infer_dir)
    if simulation:
        check_belongs(simulation, reality)
    rows = build_table(simulation, reality)
    answer, notes = make_answer(rows, reality), warnings(rows, reality)
    figures = make_figures(rows)
    agreements = _agreements_or_none(simulation, reality, draws, seed)
    for figure in figures:
        figure.save(out / "figures")
    write_text(out / "table.md", markdown_table(rows))
    write_text(out / "table.csv", csv_table(rows))
    write_text(out / "report.html", render_report(rows, answer, notes, figures, agreements, simulation, reality))
    return AnalyzeSummary(out / "report.html", text_table(rows), answer.text(), tuple(notes))


def _agreements_or_none(simulation: Simulation | None, reality: Reality, draws: int, seed: int) -> tuple[Agreement, ...]:
    """Fidelity for the report; with too few or only tied configurations there is none, which the report says."""
    if simulation is None:
        return ()
    cells, _ = build_cells(simulation, reality)
    return _measure(cells, draws, seed)


def _measure(cells: list[Cell], draws: int, seed: int) -> tuple[Agreement, ...]:
    agreements = []
    for truth in TRUTHS:
        try:
            agreements.append(measure_agreement(cells, truth, draws, seed))
        except DataError:
            continue
    return tuple(agreements)


def run_fidelity(
    pairs: Sequence[tuple[Path, Path]], draws: int = 2000, seed: int = 0, out: Path | None = None
) -> FidelitySummary:
    """Measure how well the ranking of simulate folders agrees with infer folders.

    Parameters
    ----------
    pairs : sequence of (simulate folder, infer folder)
        E.g. one per prompt length; their budgets count alike.
    draws, seed : int
    out : Path, optional
        Folder for fidelity.json and fidelity.md.

    Raises
    ------
    DataError
        Fewer than three configurations at every budget, or no order in reality.
    """
    cells: list[Cell] = []
    left_out = LeftOut()
    for pair, (simulate_dir, infer_dir) in enumerate(pairs):
        found, missing = build_cells(load_simulation(simulate_dir), load_reality(infer_dir), pair)
        cells, left_out = cells + found, left_out + missing
    agreements = _measure(cells, draws, seed)
    if not agreements:
        raise DataError(
            "no budget has three configurations that were both simulated and run and that differ in reality "
            f"(configurations left out: {left_out.text()})"
        )
    summary = FidelitySummary(len(cells), left_out, all(cell.paired for cell in cells), agreements)
    if out is not None:
        write_json(out / "fidelity.json", _plain(summary, cells, draws, seed))
        write_text(out / "fidelity.md", summary.markdown())
    return summary


def _plain(summary: FidelitySummary, cells: Sequence[Cell], draws: int, seed: int) -> dict[str, Any]:
    listed = [
        {
            "length": cell.length,
            "budget": cell.budget,
            "policies": list(cell.policies),
            **{f"predicted_{name}": values.mean(1).tolist() for name, values in cell.predicted.items()},
            **{f"real_{name}": values.mean(1).tolist() for name, values in cell.real.items()},
        }
        for cell in cells
    ]
    note = "predicted_* and real_* carry a sign that makes larger better"
    whole = {"schema": "kvtool.fidelity/1", "draws": draws, "seed": seed, **asdict(summary), "note": note, "cells": listed}
    return _without_nan(whole)  # type: ignore[no-any-return]


def _without_nan(value: Any) -> Any:
    """JSON knows no NaN: what is undefined becomes null."""
    if isinstance(value, dict):
        return {key: _without_nan(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and value != value else value
