"""How far the offline ranking can be trusted: tables, notes and files of the fidelity command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvtool.analysis.cells import TRUTHS, Cell, LeftOut, build_cells
from kvtool.analysis.controls import check_decoding
from kvtool.analysis.fidelity import ORDER_LEVEL, Agreement, measure_agreement
from kvtool.analysis.load import load_reality, load_simulation
from kvtool.analysis.plain import columns, ends
from kvtool.calibration import Calibration, read_calibration
from kvtool.errors import DataError
from kvtool.files import write_json
from kvtool.textgrid import csv_text, grid, markdown_grid, save_tables

#: real figures whose agreement the command prints; the files hold all
SHOWN = ("answer_accuracy", "score", "answer_nll")
#: what a calibration predicts
CALIBRATED = "answer_accuracy"


@dataclass(frozen=True, slots=True)
class Coverage:
    """How often a calibration's intervals hold the real mean of a configuration.

    Attributes
    ----------
    level : float
        What they aim at.
    inside, n : int
        Configurations.
    half_width : float
    seen : int
        Judged cells that the calibration was fitted on: they are no test.
    """

    level: float
    inside: int
    n: int
    half_width: float
    seen: int

    def text(self) -> str:
        """Return one line."""
        line = f"calibrated: {self.inside / self.n:.1%} of {self.n} intervals of {self.level:.0%} (± {self.half_width:.3f}) "
        line += "hold the real mean"
        return line + (f"; {self.seen} budgets are of runs that it was fitted on, which is no test" if self.seen else "")


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
    coverage : Coverage or None
        With a calibration.
    order_level : float
        Level of the test that a budget has an order at all.
    """

    n_cells: int
    left_out: LeftOut
    paired: bool
    agreements: tuple[Agreement, ...]
    coverage: Coverage | None = None
    order_level: float = ORDER_LEVEL

    def text(self) -> str:
        """Return what the command prints."""
        shown = [a for a in self.agreements if a.truth in SHOWN] or list(self.agreements)
        parts = [f"{headline(a)}\n{grid(*agreement_table(a))}" for a in shown]
        return "\n\n".join([*parts, "\n".join(self.notes())])

    def markdown(self) -> str:
        """Return the agreement, then the tau of every budget, as Markdown."""
        parts = ["# Fidelity", "\n".join(f"- {note}" for note in self.notes())]
        for a in self.agreements:
            parts += [f"## {a.truth}", headline(a), markdown_grid(*agreement_table(a, wide=True))]
        for a in self.agreements:
            parts += [f"## By budget: {a.truth}", markdown_grid(*cell_table(a))]
        return "\n\n".join(parts) + "\n"

    def notes(self) -> list[str]:
        """Return how to read the tables."""
        prompts = "the same prompts" if self.paired else "other prompts than the capture's"
        notes = [
            f"{self.n_cells} budgets on {prompts}; configurations left out: {self.left_out.text()}",
            "tau: Kendall's tau-b within a budget, mean over budgets; intervals: 95 %, over resampled prompts",
            "of perfect: tau over what a perfect predictor would reach on as many prompts; - recall: tau minus attention recall's",
            "right: of the pairs that reality tells apart; regret 3: best minus best of the predicted top 3; as good 3: budgets whose "
            "predicted top 3 holds one that is not distinguishable from the best",
        ]
        return notes + ([self.coverage.text()] if self.coverage else [])


Table = tuple[list[str], list[list[str]]]
#: Tops that tables and data have.
TOPS = ("top1", "top3", "top16")


def headline(agreement: Agreement) -> str:
    """Return which budgets count and how far reality agrees with itself."""
    a = agreement
    left = [
        f"{a.n_tied} tied" if a.n_tied else "",
        f"{a.n_noise} without order by Friedman's test" if a.n_noise else "",
    ]
    without = ", ".join(text for text in left if text)
    return (
        f"{a.truth}: {a.n_cells} budgets{f' (left out: {without})' if without else ''}; halves of the prompts agree with tau "
        f"{a.ceiling.text()}, a perfect predictor would reach {a.perfect:.2f}; {a.n_resolved} pairs can be told apart"
    )


def agreement_table(agreement: Agreement, wide: bool = False) -> Table:
    """Return header and rows, one row per predictor; `wide` adds the tops 1 and 16 and all intervals."""
    a, tops = agreement, TOPS if wide else ("top3",)
    header = ["predictor", "tau (95 %)", "of perfect", "- recall (95 %)", "right"]
    for top in tops:
        header += [f"regret {top[3:]}", f"as good {top[3:]}", f"tied best in {top[3:]}"]
    rows = []
    for name, tau in a.tau.items():
        label = name if a.n_cells_of[name] == a.n_cells else f"{name} ({a.n_cells_of[name]} of {a.n_cells})"
        row = [label, tau.text(), f"{tau.mean / a.perfect:.2f}" if a.perfect else "-"]
        row += [a.advantage[name].text(sign=True) if name in a.advantage else "-"]
        row += [a.resolved[name].text(3) if wide else f"{a.resolved[name].mean:.3f}"]
        for top in tops:
            regret, recall = a.regret[name][top], a.tied_best_recall[name][top]
            row += [regret.text(3) if wide else f"{regret.mean:.3f}", f"{a.as_good[name][top]:.2f}"]
            row += [recall.text() if wide else f"{recall.mean:.2f}"]
        rows.append(row)
    return header, rows


def cell_table(agreement: Agreement) -> Table:
    """Return header and rows: one row per task, mode, prompt length and budget."""
    names = [name for name in agreement.tau if name != "retention"]
    header = ["task", "compressed at", "length", "budget", "configurations", *(f"tau {name}" for name in names), "halves"]
    rows = [
        [
            c.task or "-",
            c.compress_at or "-",
            "-" if c.length is None else str(c.length),
            c.budget,
            str(c.n_policies),
            *(c.tau[name].text() if name in c.tau else "-" for name in names),
            f"{c.ceiling:.2f}",
        ]
        for c in agreement.cells
    ]
    return header, rows


def measure_all(cells: list[Cell], draws: int, seed: int, order_level: float = ORDER_LEVEL) -> tuple[Agreement, ...]:
    """Measure every real figure that has an order."""
    agreements = []
    for truth in TRUTHS:
        try:
            agreements.append(measure_agreement(cells, truth, draws, seed, order_level))
        except DataError:
            continue
    return tuple(agreements)


def run_fidelity(
    pairs: Sequence[tuple[Path, Path]],
    draws: int = 2000,
    seed: int = 0,
    out: Path | None = None,
    calibration: Path | None = None,
    order_level: float = ORDER_LEVEL,
) -> FidelitySummary:
    """Measure how well the ranking of simulate folders agrees with infer folders.

    Parameters
    ----------
    pairs : sequence of (simulate folder, infer folder)
        E.g. one per prompt length; their budgets count alike.
    draws, seed : int
    out : Path, optional
        Folder for fidelity.json and fidelity.md.
    calibration : Path, optional
        Adds the calibrated prediction to the predictors.
    order_level : float
        See `kvtool.analysis.fidelity.measure_agreement`.

    Raises
    ------
    DataError
        Fewer than three configurations at every budget, or no order in reality.
    ConfigError
        Folders that do not belong together, or runs that decode differently.
    """
    fitted = None if calibration is None else read_calibration(calibration)
    cells: list[Cell] = []
    left_out = LeftOut()
    seen = 0
    loaded = [(load_simulation(simulate_dir), load_reality(infer_dir)) for simulate_dir, infer_dir in pairs]
    check_decoding([reality for _, reality in loaded])
    for pair, (simulation, reality) in enumerate(loaded):
        found, missing = build_cells(simulation, reality, pair, fitted)
        cells, left_out = cells + found, left_out + missing
        seen += len(found) * (fitted is not None and was_fitted_on(fitted, reality.config))
    agreements = measure_all(cells, draws, seed, order_level)
    if not agreements:
        raise DataError(
            "no budget has three configurations that were both simulated and run and that differ in reality by more than chance "
            f"(configurations left out: {left_out.text()}); run more prompts, or count chance as an order with --order-level 1"
        )
    coverage = None if fitted is None else _coverage(cells, fitted, seen)
    paired = all(cell.paired for cell in cells)
    summary = FidelitySummary(len(cells), left_out, paired, agreements, coverage, order_level)
    if out is not None:
        write_json(out / "fidelity.json", _plain(summary, cells, draws, seed))
        tables = [*((a.truth, agreement_table(a, wide=True)) for a in summary.agreements)]
        tables += [(f"By budget: {a.truth}", cell_table(a)) for a in summary.agreements]
        save_tables(out, "fidelity", "Fidelity", tables, _data(summary), summary.notes(), summary.markdown())
    return summary


def was_fitted_on(calibration: Calibration, config: dict[str, Any]) -> bool:
    """Say whether a run is one of those that the calibration was fitted on: the same model, task, length, mode and prompts."""
    keys = {"model": "fingerprint", "task": "task", "length": "length", "compress_at": "compress_at", "prompt_seed": "seed"}
    return any(all(source.get(k) == config.get(c) for k, c in keys.items()) for source in calibration.sources)


def _coverage(cells: Sequence[Cell], calibration: Calibration, seen: int) -> Coverage | None:
    inside = n = 0
    for cell in cells:
        if CALIBRATED in cell.real:
            gap = np.abs(cell.predicted["calibrated"].mean(1) - cell.real[CALIBRATED].mean(1))
            inside, n = inside + int((gap <= calibration.half_width).sum()), n + len(gap)
    return Coverage(calibration.level, inside, n, calibration.half_width, seen) if n else None


def _plain(summary: FidelitySummary, cells: Sequence[Cell], draws: int, seed: int) -> dict[str, Any]:
    listed = [
        {
            "task": cell.task,
            "compress_at": cell.compress_at,
            "length": cell.length,
            "budget": cell.budget,
            "policies": list(cell.policies),
            **{f"predicted_{name}": values.mean(1).tolist() for name, values in cell.predicted.items()},
            **{f"real_{name}": values.mean(1).tolist() for name, values in cell.real.items()},
        }
        for cell in cells
    ]
    note = "predicted_* and real_* carry a sign that makes larger better"
    whole = {"schema": "kvtool.fidelity/2", "draws": draws, "seed": seed, **asdict(summary), "note": note, "cells": listed}
    return _without_nan(whole)  # type: ignore[no-any-return]


def _data(summary: FidelitySummary) -> str:
    """Return the agreement as CSV, unrounded: a line per real figure and predictor."""
    spreads = ["tau", "advantage", "right", *(f"regret_{top}" for top in TOPS), *(f"tied_best_recall_{top}" for top in TOPS)]
    header = ["truth", "predictor", "cells", "ceiling", "perfect", *columns(spreads), *(f"as_good_{top}" for top in TOPS)]
    lines: list[list[Any]] = []
    for a in summary.agreements:
        for name, tau in a.tau.items():
            found = [tau, a.advantage.get(name), a.resolved.get(name), *(a.regret[name].get(top) for top in TOPS)]
            found += [a.tied_best_recall[name].get(top) for top in TOPS]
            cells = [cell for interval in found for cell in ends(interval)]
            good = [a.as_good[name].get(top) for top in TOPS]
            lines.append([a.truth, name, a.n_cells_of[name], a.ceiling.mean, a.perfect, *cells, *good])
    return csv_text(header, lines)


def _without_nan(value: Any) -> Any:
    """JSON knows no NaN: what is undefined becomes null."""
    if isinstance(value, dict):
        return {key: _without_nan(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and value != value else value
