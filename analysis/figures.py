"""Figures of a report: colour-blind safe, with markers that differ, each with its data as CSV."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from kvtool.analysis.plain import columns, ends
from kvtool.analysis.style import COLOURS, MARKERS, STYLE, Figure, line_style, log_axis, make_figure
from kvtool.analysis.tables import FULL, TableRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["STYLE", "Figure", "make_figures", "pareto_rows"]


def make_figures(rows: Sequence[TableRow]) -> list[Figure]:
    """Draw all figures that the rows allow."""
    able = [row for row in rows if row.status == "ok"]
    figures = []
    if any(row.budget for row in able):
        figures.append(_figure("score_retention", "Answer accuracy against what is kept", _ACCURACY, able, _draw_accuracy))
        figures.append(_figure("pareto", "Score against KV bytes", _PARETO, able, _draw_pareto))
    if any(row.risk is not None and row.budget for row in able):
        figures.append(_figure("simulated_real", "Predicted risk against reality", _SCATTER, able, _draw_scatter))
    return figures


_ACCURACY = (
    "Share of answer tokens that are right when the gold answer is fed through the compressed cache; bars are 95 % intervals over "
    "prompts. The dashed line is the full cache, the dotted one the random control."
)
_PARETO = (
    "Task score against bytes that hold kept entries after the prompt, measured from the tensors. Rings mark the Pareto front."
)
_SCATTER = (
    "Each point is one configuration: predicted risk from the capture (to the right is worse) against real answer accuracy. One colour "
    "per budget; a good prediction falls from top left to bottom right within each colour."
)


def _figure(
    name: str, title: str, caption: str, rows: Sequence[TableRow], draw: Callable[[Axes, Sequence[TableRow]], None]
) -> Figure:
    return make_figure(name, title, caption, _data(rows), lambda canvas: draw(canvas.add_subplot(), rows))


def _methods(rows: Sequence[TableRow]) -> list[str]:
    return sorted({row.name or row.method for row in rows if row.budget})


def _log_percent_axis(axes: Axes, rows: Sequence[TableRow]) -> None:
    log_axis(axes, [100 * row.retention for row in rows if row.retention is not None and row.budget])
    axes.set_xlabel("KV entries kept (% of the prompt, log scale)")


def _draw_accuracy(axes: Axes, rows: Sequence[TableRow]) -> None:
    methods = _methods(rows)
    for method in methods:
        points = sorted((r for r in rows if (r.name or r.method) == method and r.accuracy), key=lambda r: r.retention or 0.0)
        x = [100 * (r.retention or 0.0) for r in points]
        means = [r.accuracy.mean for r in points if r.accuracy]
        spread = [
            [r.accuracy.mean - r.accuracy.low for r in points if r.accuracy],
            [r.accuracy.high - r.accuracy.mean for r in points if r.accuracy],
        ]
        axes.errorbar(x, means, yerr=spread, label=method, capsize=2, elinewidth=0.8, **line_style(method, methods))
    full = next((r.accuracy.mean for r in rows if r.policy == FULL and r.accuracy), None)
    if full is not None:
        axes.axhline(full, color="#555555", linestyle="--", linewidth=1, label="full cache")
    _log_percent_axis(axes, rows)
    axes.set_ylim(-0.02, 1.05)
    axes.set_ylabel("answer accuracy")
    _legend(axes)


def _draw_pareto(axes: Axes, rows: Sequence[TableRow]) -> None:
    methods = _methods(rows)
    for method in methods:
        points = [r for r in rows if (r.name or r.method) == method and r.score and r.kv_bytes]
        style = {**line_style(method, methods), "linestyle": ""}
        axes.plot([(r.kv_bytes or 0.0) / 1e6 for r in points], [r.score.mean for r in points if r.score], label=method, **style)
    full = next((r for r in rows if r.policy == FULL and r.score and r.kv_bytes), None)
    if full and full.score and full.kv_bytes:
        axes.plot(
            [full.kv_bytes / 1e6],
            [full.score.mean],
            marker="*",
            markersize=12,
            color="#555555",
            linestyle="",
            label="full cache",
        )
    front = pareto_rows(rows)
    xs, ys = [(r.kv_bytes or 0.0) / 1e6 for r in front], [r.score.mean for r in front if r.score]
    axes.plot(
        xs,
        ys,
        marker="o",
        markersize=12,
        markerfacecolor="none",
        color="#777777",
        linewidth=0.8,
        zorder=1,
        label="Pareto front",
    )
    log_axis(axes, [(r.kv_bytes or 0.0) / 1e6 for r in rows if r.kv_bytes])
    axes.set_ylim(-0.02, 1.05)
    axes.set_xlabel("KV cache after the prompt (MB, log scale)")
    axes.set_ylabel("task score")
    _legend(axes)


def pareto_rows(rows: Sequence[TableRow]) -> list[TableRow]:
    """Return the rows that no other beats in bytes and score, by rising bytes."""
    able = [r for r in rows if r.score is not None and r.kv_bytes is not None and not r.degenerate]
    front: list[TableRow] = []
    for row in sorted(able, key=lambda r: (r.kv_bytes or 0.0, -(r.score.mean if r.score else 0.0))):
        if not front or (row.score and front[-1].score and row.score.mean > front[-1].score.mean + 1e-12):
            front.append(row)
    return front


def _draw_scatter(axes: Axes, rows: Sequence[TableRow]) -> None:
    budgets = sorted({(r.retention or 0.0, r.budget) for r in rows if r.budget and r.risk is not None})
    for index, budget in enumerate(dict.fromkeys(b for _, b in budgets)):
        points = [r for r in rows if r.budget == budget and r.risk is not None and r.accuracy]
        axes.plot(
            [r.risk for r in points if r.risk is not None],
            [r.accuracy.mean for r in points if r.accuracy],
            linestyle="",
            marker=MARKERS[index % len(MARKERS)],
            color=COLOURS[index % len(COLOURS)],
            label=f"kept {budget}",
        )
    axes.set_ylim(-0.02, 1.05)
    axes.set_xlabel("predicted risk")
    axes.set_ylabel("real answer accuracy")
    _legend(axes)


def _legend(axes: Axes) -> None:
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)


def _data(rows: Sequence[TableRow]) -> tuple[list[str], list[list[Any]]]:
    header = ["policy", "budget", "retention", "kv_bytes", "risk", "harm", *columns(["accuracy"]), "score"]
    lines = [
        [r.policy, r.budget, r.retention, r.kv_bytes, r.risk, r.harm, *ends(r.accuracy), r.score.mean if r.score else None]
        for r in rows
    ]
    return header, lines
