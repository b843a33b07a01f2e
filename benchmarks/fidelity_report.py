"""What the runs of ``fidelity.py`` say: tau, regret and recall of every predictor, calibrations judged on tasks they have not seen.

    python benchmarks/fidelity_report.py WORK_FOLDER [MODEL ...]

A calibration is fitted on the other tasks of the same model (both query modes), never on the task that it is judged on. Writes
``results/fidelity.md`` and ``results/fidelity.json``; cells that are not finished are left out and named.
"""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from fidelity import MODES, TASKS

from kvtool.analysis.calibrate import run_calibrate
from kvtool.analysis.cells import build_cells
from kvtool.analysis.fidelity import measure_agreement
from kvtool.analysis.fidelity_report import agreement_table, cell_table, headline
from kvtool.analysis.load import load_reality, load_simulation
from kvtool.calibration import Calibration, read_calibration
from kvtool.errors import DataError
from kvtool.textgrid import markdown_grid

RESULT = Path(__file__).parent / "results" / "fidelity"
TRUTHS = ("answer_accuracy", "answer_nll")
DRAWS = 1000
LABELS = {
    "same": "capture of the prompts that are judged",
    "other": "capture of 32 other prompts",
    "refined": "the same 32 other prompts, every configuration refined by masked forwards",
}


def finished(work: Path, label: str) -> dict[str, list[tuple[Path, Path]]]:
    """Return task -> pairs of folders that are there."""
    found: dict[str, list[tuple[Path, Path]]] = {}
    for task in TASKS:
        for mode in MODES:
            folder = work / f"{task}-{mode}"
            if (folder / f"sim-{label}" / "ranking.jsonl").exists():
                found.setdefault(task, []).append((folder / f"sim-{label}", folder / "run"))
    return found


def calibrations(work: Path, pairs: dict[str, list[tuple[Path, Path]]]) -> dict[str, Calibration | None]:
    """Return task -> calibration fitted on all other tasks; None where there is no other."""
    fitted: dict[str, Calibration | None] = {}
    for task in pairs:
        others = [pair for other, each in pairs.items() if other != task for pair in each]
        path = work / f"calibration-without-{task}.json"
        fitted[task] = read_calibration(run_calibrate(others, path).path) if others else None
    return fitted


def cells_of(pairs: dict[str, list[tuple[Path, Path]]], fitted: dict[str, Calibration | None]) -> list[Any]:
    """Return all cells, each with the prediction of a calibration that has not seen its task."""
    found: list[Any] = []
    number = 0
    for task, each in pairs.items():
        for simulated, run in each:
            found += build_cells(load_simulation(simulated), load_reality(run), number, fitted[task])[0]
            number += 1
    return found


def coverage(cells: list[Any], pairs: dict[str, list[tuple[Path, Path]]], fitted: dict[str, Calibration | None]) -> str:
    """Return how many of the held-out intervals hold the real mean."""
    by_task = {load_reality(run).config["task"]: fitted[task] for task, each in pairs.items() for _, run in each}
    inside = n = 0
    for cell in cells:
        calibration = by_task[cell.task]
        if calibration is not None:
            gap = np.abs(cell.predicted["calibrated"].mean(1) - cell.real["answer_accuracy"].mean(1))
            inside, n = inside + int((gap <= calibration.half_width).sum()), n + len(gap)
    return f"{inside} of {n} intervals of a calibration from other tasks hold the real mean" if n else "no calibration"


def report(work: Path) -> tuple[str, dict[str, Any]]:
    """Return Markdown and figures of one model."""
    parts, value = [f"# {work.name}"], dict[str, Any]()
    for label, words in LABELS.items():
        pairs = finished(work, label)
        if not pairs:
            continue
        fitted = calibrations(work, finished(work, "same"))
        cells = cells_of(pairs, fitted)
        parts.append(
            f"## {words}\n\n{sum(map(len, pairs.values()))} runs: {', '.join(pairs)}; {coverage(cells, pairs, fitted)}"
        )
        for truth in TRUTHS:
            try:
                agreement = measure_agreement(cells, truth, DRAWS, 0)
            except DataError as error:
                parts.append(f"{truth}: {error}")
                continue
            value[f"{label}, {truth}"] = asdict(agreement)
            parts += [f"### {headline(agreement)}", markdown_grid(*agreement_table(agreement, wide=True))]
            parts.append(f"<details><summary>every budget</summary>\n\n{markdown_grid(*cell_table(agreement))}\n\n</details>")
    parts += [exactness(work)]
    return "\n\n".join(parts), value


def exactness(work: Path) -> str:
    """Return how far masked forwards are from the real cache on the judged prompts."""
    found = [json.loads(path.read_text()) for path in sorted(work.glob("*/exact.json"))]
    worst = {name: max(cell["worst"][name] for cell in found) for name in ("nll", "margin", "accuracy")} if found else {}
    words = ", ".join(f"{name} {value:.1e}" for name, value in worst.items()) or "not measured"
    return f"## masked forwards against the real cache\n\n{sum(c['units'] for c in found)} units: largest difference {words}"


def main() -> None:
    work = Path(sys.argv[1])
    folders = [work / name for name in sys.argv[2:]] or sorted(p.parent for p in work.glob("*/heads.json"))
    made = {folder.name: report(folder) for folder in folders}
    versions = {"python": platform.python_version(), **{name: version(name) for name in ("torch", "transformers", "numpy")}}
    command = "python benchmarks/fidelity.py WORK [MODEL ...] && python benchmarks/fidelity_report.py WORK"
    value = {"command": command, "versions": versions, "models": {name: figures for name, (_, figures) in made.items()}}
    text = json.dumps(value, indent=1).replace("NaN", "null")
    RESULT.with_suffix(".json").write_text(text + "\n")
    page = f"`{command}`: {', '.join(f'{k} {v}' for k, v in versions.items())}.\n\n" + "\n\n".join(
        text for text, _ in made.values()
    )
    RESULT.with_suffix(".md").write_text(page + "\n")
    print(page)


if __name__ == "__main__":
    main()
