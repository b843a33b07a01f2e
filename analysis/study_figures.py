"""Figures over the cells of a study: score against retention, against memory with the Pareto front, prediction against reality."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kvtool.analysis.points import FIGURES, Place, Point
from kvtool.analysis.statistics import Interval, tau_b
from kvtool.analysis.study import Rows, StudyData
from kvtool.analysis.study_pictures import line_name
from kvtool.analysis.style import (
    COLOURS,
    GREY,
    MARKERS,
    Figure,
    alike_words,
    apart,
    bars,
    coinciding,
    figure_legend,
    line_style,
    log_axis,
    make_figure,
    span_of,
)
from kvtool.naming import wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

Row = tuple[Place, Point, Interval]
#: More panels are laid out with fixed margins, and memory is shown at the longest prompts only.
MOST_PANELS = 12
_CURVES = (
    "{figure} against the share of entries kept; bars are 95 % intervals over {prompts}. Dashed: the full cache on the same prompts; "
    "dotted: the random control, where one was run. Points that stand alone bring their own number of entries. Methods are moved apart "
    "a little sideways, so that equal ones can be seen.{alike}"
)
_MEMORY = (
    "{figure}, the mean over {prompts}, against bytes that hold entries after the prompt (room to grow not counted). The grey line joins "
    "the Pareto front: no other point is smaller and scores more. The star is the full cache. Methods are moved apart a little sideways; "
    "intervals stand in the figure above.{alike}"
)
_SCATTER = (
    "Each point is one configuration of one workload: predicted risk from the capture (to the right is worse) against the answer accuracy "
    "that came true, its mean over {prompts}. One colour per retention; a good prediction falls from top left to bottom right within "
    "each. {tau}"
)


def study_figures(data: StudyData) -> list[Figure]:
    """Draw one grid of curves and one of memory per model and mode, and the scatter of predictions."""
    found = []
    groups = list(dict.fromkeys((place.model, place.compress_at, place.stage) for place in data.places))
    several = len({stage for _, _, stage in groups}) > 1
    for number, key in enumerate(groups):
        places = [place for place in data.places if (place.model, place.compress_at, place.stage) == key]
        rows = [(place, point, mean) for place in places for point, mean in _measured(place)]
        if any(_compressed(point) for _, point, _ in rows):
            title = f"{key[0]}, compressed at the {key[1]}" + (f", stage {key[2]}" if key[2] and several else "")
            found.append(_grid(f"score_retention_{number}", f"Score against retention: {title}", _CURVES, rows, _curve_panel))
            last = max(place.length for place in places)
            large = len(places) > MOST_PANELS
            longest = [row for row in rows if row[0].length == last] if large else rows
            said = f" Shown: {last} tokens, where memory matters most; the other lengths are in the tables." if large else ""
            found.append(
                _grid(f"score_memory_{number}", f"Score against memory: {title}", _MEMORY + said, longest, _memory_panel)
            )
    scatter = _scatter(data)
    return [*found, *([scatter] if scatter else [])]


def _measured(place: Place) -> list[tuple[Point, Interval]]:
    figure = place.figure() or "score"
    return [(point, mean) for point in place.points if (mean := place.mean(point, figure)) is not None]


def _grid(name: str, title: str, caption: str, rows: Sequence[Row], draw_panel: Callable[..., None]) -> Figure:
    """Tasks below one another, lengths side by side."""
    tasks, lengths = (list(dict.fromkeys(getattr(place, key) for place, _, _ in rows)) for key in ("task", "length"))
    labels, quick = _labels(rows), len(tasks) * len(lengths) > MOST_PANELS

    def draw(canvas: Canvas) -> None:
        grid = canvas.subplots(len(tasks), len(lengths), squeeze=False, sharey=True)
        for line, task in zip(grid, tasks, strict=True):
            for axes, length in zip(line, lengths, strict=True):
                mine = [row for row in rows if (row[0].task, row[0].length) == (task, length)]
                if not mine:
                    axes.set_axis_off()
                    continue
                draw_panel(axes, mine, labels)
                axes.set_title(_heading(task, length), fontsize=8, y=1.0 if quick else None)
                axes.tick_params(labelsize=7)
            line[0].set_ylabel(FIGURES[rows[0][0].figure() or "score"][1])
        if quick and draw_panel is _curve_panel:  # the retentions are the same down a column: one set of labels
            for axes in grid[:-1].ravel():
                axes.tick_params(labelbottom=False)
                axes.set_xlabel("")
        if quick:  # fixed places: matplotlib would measure all labels of all panels anew for every format
            for axes in grid.ravel():
                axes.xaxis.set_label_coords(0.5, -0.24)
                axes.yaxis.set_label_coords(-0.17, 0.5)
        figure_legend(canvas, list(grid.ravel()))

    wide = len(lengths) > 1
    size = (max(6.4, (2.6 if wide else 6.4) * len(lengths)), (2.1 if wide or len(tasks) > 1 else 3.4) * len(tasks) + 1.0)
    figures = " or ".join(dict.fromkeys(FIGURES[place.figure() or "score"][1] for place, _, _ in rows))
    return make_figure(
        name,
        title,
        caption.format(figure=figures.capitalize(), prompts=_prompts(rows), alike=_alike(rows, labels)),
        _data(rows),
        draw,
        size,
        quick,
        font_size=8,
    )


def _heading(task: str, length: int) -> str:
    one = f"{task}, {length} tokens"
    return one if len(one) < 30 else f"{wrapped(task, 32)}\n{length} tokens"


def _prompts(rows: Sequence[Row]) -> str:
    """How many prompts stand behind a point."""
    counts = sorted({len(place.samples) for place, _, _ in rows})
    return f"{counts[0]} prompts" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} prompts"


def _alike(rows: Sequence[Row], labels: Sequence[str]) -> str:
    """Name the methods whose points are the same at every retention of a panel."""
    panels: dict[str, dict[str, dict[Hashable, float]]] = {}
    for place, point, mean in rows:
        if _compressed(point) and line_name(point) == point.label:
            panel = panels.setdefault(f"{place.task}, {place.length} tokens", {label: {} for label in labels})
            panel[point.label][point.budget] = mean.mean
    return alike_words({panel: coinciding(lines) for panel, lines in panels.items()})


def _labels(rows: Sequence[Row]) -> list[str]:
    """Names of methods, in the order of the study; those with their own number of entries go by their group."""
    return list(dict.fromkeys(line_name(point) for _, point, _ in rows if _compressed(point)))


def _compressed(point: Point) -> bool:
    """True for all but the full cache; a policy with its own number of entries has no budget either."""
    return point.policy != "full"


def _curve_panel(axes: Axes, rows: Sequence[Row], labels: Sequence[str]) -> None:
    span = span_of(p.retention or 0.0 for _, p, _ in rows if _compressed(p))
    for label in labels:
        mine = sorted(
            (row for row in rows if _compressed(row[1]) and line_name(row[1]) == label), key=lambda row: row[1].retention or 0.0
        )
        _errorbars(axes, mine, [100 * (row[1].retention or 0.0) for row in mine], label, labels, span)
    _full_line(axes, rows)
    log_axis(axes, [100 * p.retention for _, p, _ in rows if _compressed(p) and p.retention], 6)
    axes.set_ylim(-0.03, 1.05)
    axes.set_xlabel("entries kept (%, log scale)", fontsize=7)


def _errorbars(axes: Axes, rows: Sequence[Row], x: Sequence[float], label: str, labels: Sequence[str], span: float) -> None:
    if not rows:
        return
    means = [mean.mean for _, _, mean in rows]
    spread = bars(means, [mean.low for _, _, mean in rows], [mean.high for _, _, mean in rows])
    style = line_style(label, labels)
    x = apart(x, labels.index(label), len(labels), span)
    if not any(point.budget and point.budget.endswith("%") for _, point, _ in rows):
        style["linestyle"] = ""
    axes.errorbar(x, means, yerr=spread, label=label, elinewidth=0.7, linewidth=1.1, **style)


def _full_line(axes: Axes, rows: Sequence[Row]) -> None:
    full = next((mean.mean for _, point, mean in rows if not _compressed(point)), None)
    if full is not None:
        axes.axhline(full, color=GREY, linestyle="--", linewidth=1, label="full cache")


def _memory_panel(axes: Axes, rows: Sequence[Row], labels: Sequence[str]) -> None:
    span = span_of(p.kv_bytes or 0.0 for _, p, _ in rows)
    for label in labels:
        mine = [row for row in rows if _compressed(row[1]) and line_name(row[1]) == label and row[1].kv_bytes]
        style = {**line_style(label, labels), "linestyle": ""}
        x = apart([(p.kv_bytes or 0.0) / 1e6 for _, p, _ in mine], labels.index(label), len(labels), span)
        axes.plot(x, [m.mean for _, _, m in mine], label=label, **style)
    full = [((p.kv_bytes or 0.0) / 1e6, m.mean) for _, p, m in rows if not _compressed(p) and p.kv_bytes]
    if full:
        axes.plot(*full[0], marker="*", markersize=10, color=GREY, linestyle="", label="full cache")
    best = front(rows)
    axes.plot([x / 1e6 for x, _ in best], [y for _, y in best], color="#777777", linewidth=0.9, zorder=1, label="Pareto front")
    log_axis(axes, [p.kv_bytes / 1e6 for _, p, _ in rows if p.kv_bytes], 5)
    axes.set_ylim(-0.03, 1.05)
    axes.set_xlabel("KV cache (MB, log scale)", fontsize=7)


def front(rows: Sequence[Row]) -> list[tuple[float, float]]:
    """Return (bytes, score) of the points that no other beats in both, by rising bytes."""
    known = [(p.kv_bytes, m.mean) for _, p, m in rows if p.kv_bytes and not p.degenerate]
    found: list[tuple[float, float]] = []
    for size, score in sorted(known, key=lambda pair: (pair[0], -pair[1])):
        if not found or score > found[-1][1] + 1e-12:
            found.append((size, score))
    return found


def _data(rows: Sequence[Row]) -> tuple[list[str], list[list[Any]]]:
    header = ["model", "task", "length", "method", "policy", "budget", "retention", "kv_bytes", "mean", "low", "high"]
    lines = [
        [place.model, place.task, place.length, p.label, p.policy, p.budget, p.retention, p.kv_bytes, m.mean, m.low, m.high]
        for place, p, m in rows
    ]
    return header, lines


def _scatter(data: StudyData) -> Figure | None:
    rows = [
        (place, point, mean, risk)
        for place, predicted in zip(data.places, data.predicted, strict=True)
        for point, mean in _measured_finely(place)
        if point.budget and not point.degenerate and (risk := _risk(predicted, point)) is not None
    ]
    if len(rows) < 3:
        return None
    budgets = sorted({point.budget or "" for _, point, _, _ in rows}, key=lambda text: float(text.rstrip("%")))
    taus = _taus(rows)
    said = f"Kendall's tau-b within a retention of a workload: mean {np.mean(taus):.2f} over {len(taus)}." if taus else ""

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        for index, budget in enumerate(budgets):
            mine = [(risk, mean.mean) for _, point, mean, risk in rows if point.budget == budget]
            style: dict[str, Any] = {
                "marker": MARKERS[index % len(MARKERS)],
                "color": COLOURS[index % len(COLOURS)],
                "linestyle": "",
                "alpha": 0.75,
            }
            axes.plot(
                *zip(*mine, strict=True), label=f"{budget} kept" if budget.endswith("%") else f"{budget} entries", **style
            )
        axes.set_ylim(-0.03, 1.05)
        axes.set_xlabel("predicted risk")
        axes.set_ylabel("real answer accuracy")
        figure_legend(canvas, [axes], 6)

    header = ["model", "task", "length", "policy", "budget", "risk", "accuracy", "low", "high"]
    lines = [
        [place.model, place.task, place.length, p.policy, p.budget, risk, m.mean, m.low, m.high] for place, p, m, risk in rows
    ]
    caption = _SCATTER.format(tau=said, prompts=_prompts([row[:3] for row in rows]))
    return make_figure("simulated_real", "Predicted risk against reality", caption, (header, lines), draw)


def _measured_finely(place: Place) -> list[tuple[Point, Interval]]:
    figure = "accuracy" if any("accuracy" in point.values for point in place.points) else "score"
    return [(point, mean) for point in place.points if (mean := place.mean(point, figure)) is not None]


def _risk(predicted: Rows, point: Point) -> float | None:
    row = predicted.get(point.policy)
    return None if row is None or row.get("risk") is None else float(row["risk"])


def _taus(rows: Sequence[tuple[Place, Point, Interval, float]]) -> list[float]:
    """Agreement of the two orders, for each retention of each workload that has three configurations and an order."""
    groups: dict[tuple[int, str | None], list[tuple[float, float]]] = {}
    for place, point, mean, risk in rows:
        groups.setdefault((id(place), point.budget), []).append((-risk, mean.mean))
    pairs = [np.asarray(group, dtype=np.float64) for group in groups.values() if len(group) > 2]
    taus = [float(tau_b(pair[:, :1], pair[:, 1:])[0]) for pair in pairs]
    return [tau for tau in taus if tau == tau]
