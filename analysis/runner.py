"""The analyze stage: folders in; tables, figures, fidelity and report.html out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kvtool.analysis.answer import make_answer, warnings
from kvtool.analysis.cells import build_cells
from kvtool.analysis.cliffs import Cliff, find_cliffs
from kvtool.analysis.cliffs_report import cliff_figures, cliff_table
from kvtool.analysis.controls import check_decoding
from kvtool.analysis.fidelity import Agreement
from kvtool.analysis.fidelity_report import measure_all
from kvtool.analysis.load import Reality, Simulation, check_belongs, load_reality, load_simulation
from kvtool.analysis.points import make_place
from kvtool.analysis.tables import build_table, csv_table, table_lines, text_table
from kvtool.files import write_text
from kvtool.textgrid import save_tables


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
    check_decoding([reality])
    if simulation:
        check_belongs(simulation, reality)
    rows = build_table(simulation, reality)
    answer, notes = make_answer(rows, reality), warnings(rows, reality)
    figures = make_figures(rows)
    agreements = _agreements_or_none(simulation, reality, draws, seed)
    cliffs = _cliffs(simulation, reality)
    fall = next(iter(cliff_figures(cliffs)), None)
    for figure in (*figures, *([fall] if fall else [])):
        figure.save(out / "figures")
    if cliffs:
        cliff_table(cliffs).save(out)
    title = "Prediction beside reality" if simulation else "What was run"
    save_tables(out, "table", title, [("", table_lines(rows))], csv_table(rows))
    page = render_report(rows, answer, notes, figures, agreements, simulation, reality, cliffs, fall)
    write_text(out / "report.html", page)
    return AnalyzeSummary(out / "report.html", text_table(rows), answer.text(), tuple(notes))


def _cliffs(simulation: Simulation | None, reality: Reality) -> list[Cliff]:
    """Where the methods that were run at two shares of the prompt begin to lose, with the reason where it was predicted."""
    config = reality.config
    place = make_place(reality.records, str(config.get("model") or ""), task=config.get("task"), length=config.get("length"))
    predicted = {} if simulation is None else {row["policy"]: row for row in simulation.rows}
    return [] if place is None else find_cliffs(place, predicted)


def _agreements_or_none(simulation: Simulation | None, reality: Reality, draws: int, seed: int) -> tuple[Agreement, ...]:
    """Fidelity for the report; with too few or only tied configurations there is none, which the report says."""
    if simulation is None:
        return ()
    cells, _ = build_cells(simulation, reality)
    return measure_all(cells, draws, seed)
