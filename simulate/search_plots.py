"""The search as a picture: how it went, and how its choices do on prompts that it never saw."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvtool.files import write_text
from kvtool.pictures import save_canvas
from kvtool.simulate.plots import COLOURS, MARKERS
from kvtool.textgrid import csv_text

if TYPE_CHECKING:
    from kvtool.simulate.search import SearchSummary


def plot_search(
    summary: SearchSummary, objectives: Sequence[str], records: Sequence[dict[str, Any]], path: Path, title: str
) -> None:
    """Draw the trials and the verdicts, and write PNG, SVG and PDF atomically, with all that is drawn as CSV."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.3), layout="constrained")
    if objectives == (summary.by, "retention"):
        _plane(left, records, summary.by)
    else:
        _history(left, objectives, records, summary.by)
    _verdicts(right, summary)
    figure.suptitle(title, fontsize=11)
    save_canvas(figure, path.parent, path.stem, 120)
    plt.close(figure)
    write_text(path.with_suffix(".csv"), search_csv(summary, objectives, records))


def search_csv(summary: SearchSummary, objectives: Sequence[str], records: Sequence[dict[str, Any]]) -> str:
    """Return both panels as CSV: a line per trial and objective, then one per choice."""
    header = ["panel", "trial", "what", "budget", "policy", "value", "best_so_far", "default", "difference", "low", "high"]
    lines: list[list[Any]] = []
    for index, name in enumerate(objectives):
        values = [None if r["values"][index] is None else float(r["values"][index]) for r in records]
        best = np.fmin.accumulate(np.asarray(values, dtype=np.float64))
        for number, (value, least) in enumerate(zip(values, best.tolist(), strict=True)):
            lines.append(["trials", number, name, None, None, value, least, None, None, None, None])
    for v in summary.verdicts:
        lines.append(["judged", None, "prompts of the search", v.budget, v.policy, v.searched, *[None] * 5])
        figures = [v.held_out, None, v.default_held_out, v.difference, v.low, v.high]
        lines.append(["judged", None, "held out", v.budget, v.policy, *figures])
    return csv_text(header, lines)


def _history(axes: Any, objectives: Sequence[str], records: Sequence[dict[str, Any]], by: str) -> None:
    """Loss of each trial, and the best one so far, per objective."""
    for index, name in enumerate(objectives):
        values = np.asarray([r["values"][index] for r in records], dtype=np.float64)
        colour = COLOURS[index % len(COLOURS)]
        axes.plot(values, MARKERS[index % len(MARKERS)], color=colour, markersize=3, alpha=0.4, linestyle="none")
        axes.plot(np.fmin.accumulate(values), color=colour, label=f"{name}: best so far")
    axes.set(xlabel="trial", ylabel=f"predicted {by}, prompts of the search", title="trials")
    axes.legend(fontsize=8)


def _plane(axes: Any, records: Sequence[dict[str, Any]], by: str) -> None:
    """All trials as loss against retention."""
    values = np.asarray([r["values"] for r in records], dtype=np.float64).reshape(-1, 2)
    axes.plot(100 * values[:, 1], values[:, 0], "o", color=COLOURS[0], markersize=3, alpha=0.5)
    axes.set(xlabel="kept, %", ylabel=f"predicted {by}, prompts of the search", title="trials")


def _verdicts(axes: Any, summary: SearchSummary) -> None:
    """Held-out loss of choices and defaults; the interval of their paired difference at the choice."""
    x = np.arange(len(summary.verdicts))
    chosen = [float("nan") if v.held_out is None else v.held_out for v in summary.verdicts]
    default = [float("nan") if v.default_held_out is None else v.default_held_out for v in summary.verdicts]
    seen = [v.searched for v in summary.verdicts]
    spread = [[0.0 if v.high is None else v.high - (v.difference or 0) for v in summary.verdicts]]
    spread.append([0.0 if v.low is None else (v.difference or 0) - v.low for v in summary.verdicts])
    axes.errorbar(
        x,
        chosen,
        yerr=spread[::-1],
        fmt="o",
        color=COLOURS[0],
        capsize=3,
        label="chosen, held out (bar: of the difference, 95 %)",
    )
    axes.plot(x, seen, "x", color=COLOURS[0], label="chosen, prompts of the search")
    axes.plot(x, default, "s", color=COLOURS[1], label="defaults, held out")
    axes.set_xticks(x, [v.budget for v in summary.verdicts])
    axes.set(xlabel="budget", ylabel=f"predicted {summary.by}", title="judged on held-out prompts")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
