"""The analyze stage: folders in; tables, figures, fidelity and report.html out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvtool.analysis.answer import make_answer, warnings
from kvtool.analysis.fidelity import PREDICTORS, TRUTHS, Agreement, Cell, build_cells, measure_agreement
from kvtool.analysis.load import Simulation, check_belongs, load_reality, load_simulation
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
    n_left_out : int
        Configurations that are degenerate, impossible, or were not run.
    paired : bool
        Prediction and reality on the same prompts.
    agreements : tuple of Agreement
        One per real figure.
    """

    n_cells: int
    n_left_out: int
    paired: bool
    agreements: tuple[Agreement, ...]

    def text(self) -> str:
        """Return what the command prints."""
        prompts = "the same prompts" if self.paired else "other prompts than the capture's"
        note = f"{self.n_cells} budgets on {prompts}; {self.n_left_out} configurations left out (degenerate, impossible or not run)"
        legend = (
            "intervals: 95 %, over resampled prompts; ceiling: tau between halves of the prompts; two figures: harm, recall"
        )
        return "\n".join([agreement_grid(self.agreements), "", note, legend])


def agreement_grid(agreements: Sequence[Agreement]) -> str:
    """Return the agreement with each real figure as an aligned table."""
    header = [
        "real figure",
        "budgets",
        "tau harm (95 %)",
        "tau recall (95 %)",
        "harm - recall (95 %)",
        "ceiling",
        "regret top 3",
        "tied best in top 3",
    ]
    rows = [
        [
            a.truth,
            f"{a.n_cells}" + (f" (+{a.n_tied} tied)" if a.n_tied else ""),
            a.tau["harm"].text(),
            a.tau["recall"].text(),
            a.advantage.text(sign=True),
            f"{a.ceiling:.2f}",
            f"{a.regret['harm']['top3'].mean:.3f} / {a.regret['recall']['top3'].mean:.3f}",
            f"{a.tied_best_recall['harm']['top3']:.2f} / {a.tied_best_recall['recall']['top3']:.2f}",
        ]
        for a in agreements
    ]  # fmt: skip
    return grid(header, rows)


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
    agreements = _agreements_or_none(simulation, infer_dir, draws, seed)
    for figure in figures:
        figure.save(out / "figures")
    write_text(out / "table.md", markdown_table(rows))
    write_text(out / "table.csv", csv_table(rows))
    write_text(out / "report.html", render_report(rows, answer, notes, figures, agreements, simulation, reality))
    return AnalyzeSummary(out / "report.html", text_table(rows), answer.text(), tuple(notes))


def _agreements_or_none(simulation: Simulation | None, infer_dir: Path, draws: int, seed: int) -> tuple[Agreement, ...]:
    """Fidelity for the report; with too few or only tied configurations there is none, which the report says."""
    if simulation is None:
        return ()
    cells, _ = build_cells(simulation, load_reality(infer_dir))
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
    left_out = 0
    for simulate_dir, infer_dir in pairs:
        found, n = build_cells(load_simulation(simulate_dir), load_reality(infer_dir))
        cells, left_out = cells + found, left_out + n
    agreements = _measure(cells, draws, seed)
    if not agreements:
        raise DataError("no budget has three configurations that were both simulated and run and that differ in reality")
    summary = FidelitySummary(len(cells), left_out, all(cell.paired for cell in cells), agreements)
    if out is not None:
        write_json(out / "fidelity.json", _plain(summary, cells))
        write_text(out / "fidelity.md", f"```\n{summary.text()}\n```\n")
    return summary


def _plain(summary: FidelitySummary, cells: Sequence[Cell]) -> dict[str, Any]:
    listed = [
        {
            "length": cell.length,
            "budget": cell.budget,
            "policies": list(cell.policies),
            **{f"predicted_{name}": cell.predicted[name].mean(1).tolist() for name in PREDICTORS},
            **{f"real_{name}": cell.real[name].mean(1).tolist() for name in TRUTHS},
        }
        for cell in cells
    ]
    return {"schema": "kvtool.fidelity/1", **asdict(summary), "cells": listed}
