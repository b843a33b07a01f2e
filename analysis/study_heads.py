"""Heads of a study's models as heatmaps, layers x heads: entries kept, the same minus a uniform share, importance."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvtool.analysis.cliffs import asked
from kvtool.analysis.points import Place, Point, common_budgets
from kvtool.analysis.study import StudyData
from kvtool.analysis.style import AROUND_ZERO, RISING, Figure, make_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

Float = NDArray[np.float64]
#: Methods that are drawn, at most, and panels side by side.
MOST, COLUMNS = 8, 4
#: Entries per head that lie this close to their mean are a uniform share.
UNIFORM = 1.0


def head_figures(data: StudyData) -> list[Figure]:
    """Draw, per model: kept entries and their difference from a uniform share at one retention, budgets per layer, and importance."""
    found = []
    for number, model in enumerate(dict.fromkeys(place.model for place in data.places)):
        place = next((p for p in data.places if p.model == model and _shared(p)), None)
        if place is not None:
            points = _shared(place)
            found += [_kept(number, place, points), _difference(number, place, points), _layers(number, place, points)]
    for number, (title, folder) in enumerate(data.folders.get("classify", [])):
        figure = _importance(number, title, folder / "heads.json")
        found += [figure] if figure else []
    return found


def _shared(place: Place) -> list[Point]:
    """One point per method at the middle of the retentions that most methods share unevenly at; none if no method does.

    Methods that share evenly stand beside the others, as far as there is room.
    """
    able = [p for p in place.points if p.heads is not None and p.share and not p.degenerate and not p.control]
    uneven = [p for p in able if _uneven(p)]
    common = common_budgets(uneven)
    budgets = sorted({asked(p) for p in uneven if p.budget in common})
    if not budgets:
        return []
    mine = [p for p in able if asked(p) == budgets[len(budgets) // 2]]
    drawn = {p.label for p in sorted(mine, key=lambda p: not _uneven(p))[:MOST]}
    return [p for p in mine if p.label in drawn]


def _uneven(point: Point) -> bool:
    return point.heads is not None and float(np.ptp(point.heads)) > UNIFORM


def _maps(canvas: Canvas, tables: Sequence[tuple[str, Float]], cmap: str, limits: tuple[float, float], label: str) -> None:
    from matplotlib.colors import Normalize

    columns = min(COLUMNS, len(tables))
    grid = canvas.subplots(-(-len(tables) // columns), columns, squeeze=False)
    image = None
    for axes, (title, table) in zip(grid.ravel(), tables, strict=False):
        image = axes.imshow(table, cmap=cmap, norm=Normalize(*limits), aspect="auto", interpolation="nearest")
        axes.set_title(title, fontsize=8)
        _ticks(axes, table)
    for axes in grid.ravel()[len(tables) :]:
        axes.set_axis_off()
    for line in grid:
        line[0].set_ylabel("layer")
    assert image is not None
    canvas.colorbar(image, ax=grid, shrink=0.8, label=label)


def _ticks(axes: Axes, table: Float) -> None:
    for axis, size in ((axes.yaxis, table.shape[0]), (axes.xaxis, table.shape[1])):
        axis.set_ticks(range(0, size, max(1, -(-size // 8))))
    axes.set_xlabel("KV head", fontsize=7)
    axes.tick_params(labelsize=7, length=2)
    axes.grid(False)


def _kept(number: int, place: Place, points: Sequence[Point]) -> Figure:
    tables = [(p.label, p.heads) for p in points if p.heads is not None]
    high = max(float(table.max()) for _, table in tables)
    caption = (
        f"Entries that each KV head keeps of {place.length} tokens at {points[0].budget}, the mean over {len(place.samples)} prompts; "
        f"{place.title}. Bright heads keep most."
    )
    return make_figure(
        f"heads_kept_{number}",
        f"Entries kept per head: {place.model} at {points[0].budget}",
        caption,
        _data(tables),
        lambda canvas: _maps(canvas, tables, RISING, (0.0, high), "entries kept"),
        _size(tables),
        font_size=8,
        axes_grid=False,
    )


def _difference(number: int, place: Place, points: Sequence[Point]) -> Figure:
    """What each method moves between heads, against as many entries shared evenly."""
    tables = [(p.label, p.heads - p.heads.mean()) for p in points if p.heads is not None]
    most = max(float(np.abs(table).max()) for _, table in tables)
    even = [p.label for p in points if not _uneven(p)]
    blank = f" Blank, as they share evenly: {', '.join(even)}." if even else ""
    caption = f"Entries above (purple) or below (orange) an even share of the same total, at {points[0].budget}; {place.title}.{blank}"
    return make_figure(
        f"heads_difference_{number}",
        f"Method minus uniform, per head: {place.model} at {points[0].budget}",
        caption,
        _data(tables),
        lambda canvas: _maps(canvas, tables, AROUND_ZERO, (-most, most), "entries − uniform"),
        _size(tables),
        font_size=8,
        axes_grid=False,
    )


def _layers(number: int, place: Place, points: Sequence[Point]) -> Figure:
    from kvtool.analysis.style import alike_words, coinciding, figure_legend, line_style

    labels = list(dict.fromkeys(p.label for p in place.points if p.budget))
    n_layers = 0 if points[0].heads is None else len(points[0].heads)

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        for point in points:
            if point.heads is not None:
                # Layers lie on a plain axis: lines that coincide are moved apart by less than their distance.
                moved = 0.012 * n_layers * (2 * labels.index(point.label) / max(1, len(labels) - 1) - 1)
                x = [layer + moved for layer in range(len(point.heads))]
                axes.plot(x, point.heads.mean(axis=1), label=point.label, **line_style(point.label, labels))
        axes.set_xticks(range(0, n_layers, max(1, n_layers // 16)))
        axes.set_xlabel("layer")
        axes.set_ylabel("mean entries per head")
        figure_legend(canvas, [axes])

    tables = [(p.label, p.heads.mean(axis=1, keepdims=True)) for p in points if p.heads is not None]
    curves = {name: dict(enumerate(float(mean) for mean in table.ravel())) for name, table in tables}
    caption = (
        f"How each method shares its budget among layers at {points[0].budget}, the mean over heads and {len(place.samples)} prompts; "
        f"{place.title}.{alike_words({'': coinciding(curves)})}"
    )
    title = f"Budgets per layer: {place.model} at {points[0].budget}"
    return make_figure(f"layers_{number}", title, caption, _data(tables), draw, (6.4, 3.4), font_size=9)


def _importance(number: int, title: str, path: Path) -> Figure | None:
    """Importance of KV heads as the classification has it; None where it has none."""
    if not path.exists():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    values = np.full((record["n_layers"], record["n_kv_heads"]), np.nan)
    for head in record["kv_heads"]:
        if head.get("importance") is not None:
            values[head["layer"], head["head"]] = head["importance"]
    if np.isnan(values).all():
        return None
    measure = (record.get("importance_measure") or {}).get("measure", "importance")
    tables = [(measure, values)]
    caption = f"Importance of KV heads by {measure}, from captured prompts ({title}); policies that share by heads read it."
    return make_figure(
        f"heads_importance_{number}",
        f"Importance of heads: {title}",
        caption,
        _data(tables),
        lambda canvas: _maps(canvas, tables, RISING, (0.0, float(np.nanmax(values)) or 1.0), measure),
        (4.2, min(7.0, 1.6 + 0.12 * values.shape[0] + 0.5)),
        font_size=8,
        axes_grid=False,
    )


def _size(tables: Sequence[tuple[str, Float]]) -> tuple[float, float]:
    lines, columns = -(-len(tables) // COLUMNS), min(COLUMNS, len(tables))
    return 1.2 + 1.9 * columns, 0.4 + lines * min(4.5, 1.4 + 0.07 * tables[0][1].shape[0])


def _data(tables: Sequence[tuple[str, Float]]) -> tuple[list[str], list[list[Any]]]:
    lines = [[name, row, column, float(value)] for name, table in tables for (row, column), value in np.ndenumerate(table)]
    return ["what", "layer", "head", "value"], lines
