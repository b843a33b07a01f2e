"""Heat maps of needle tests in the field's form: prompt length to the right, depth downwards, colour for the score.

With a single length the maps would be columns of one cell each, and many maps cannot be compared: then there is one map per length, side
by side, with a line per policy and depth to the right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kvtool.analysis.niah import FULL, Cell, NeedleMap
from kvtool.analysis.style import Figure, make_figure
from kvtool.naming import figure_names, shared_settings, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

#: Told apart by people of all kinds of colour vision, and in grey.
MAP = "viridis"
#: A panel with more cells than this shows no numbers; lines of the map of a single length show them always.
MOST_NUMBERS = 130
#: Methods side by side, the full cache counted; policies that are drawn at all.
MOST_COLUMNS, MOST_POLICIES = 6, 64
#: Policies from which on there is one map per length, and its columns from which on cells have no numbers.
MANY_POLICIES, MANY_COLUMNS = 16, 32
#: Marks of cells without a score.
MARKS = {"impossible": "×", "oom": "oom", "failed": "?", "missing": ""}
_HOW = "{metric}, mean over {n} a cell; the depth of the needle is 0 % at the start of the prompt. {marks}"
_MARKS = {
    "impossible": "×: could not run",
    "oom": "oom: out of memory",
    "failed": "?: given up",
    "degenerate": "·: nothing free to be chosen",
}


def needle_figure(found: NeedleMap, named: Mapping[str, str] | None = None, name: str = "niah") -> Figure:
    """Draw needle tests: one panel per policy over lengths and depths, or, of a single length, one map of policies over depths.

    Parameters
    ----------
    found : NeedleMap
    named : dict of str to str, optional
        Policy text -> what a study calls it, with its budget where it has one.
    name : str
        Of the files.
    """
    policies = list(found.policies[:MOST_POLICIES])
    names = figure_names(policies, {**(named or {}), FULL: "full cache"})
    counts = sorted({cell.n for cell in found.cells if cell.n})
    prompts = "no prompts" if not counts else f"{counts[0]} prompt{'s' * (counts[-1] > 1)}" if counts[0] == counts[-1] else ""
    odd = [words for status, words in _MARKS.items() if any(cell.status == status for cell in found.cells)]
    caption = _HOW.format(
        metric=f"Score ({found.metric})" if found.metric != "answer_accuracy" else "Answer accuracy",
        n=prompts or f"{counts[0]} to {counts[-1]} prompts",
        marks="; ".join([*odd, "grey: not run, or no prompt has its needle there"]) + ".",
    )
    if shared := shared_settings(policies, named):
        caption += f" All of them: {', '.join(shared)}."
    if len(policies) < len(found.policies):
        caption += f" {len(policies)} of {len(found.policies)} policies; the data has all."
    title = f"Needles by depth: {found.model}, {found.task}, compressed at the {found.compress_at}"
    header = ["policy", "name", "budget", "length", "depth", "n", "score", "low", "high", "status"]
    data = [
        [c.policy, names.get(c.policy, ""), c.budget, c.length, c.depth, c.n, c.score, c.low, c.high, c.status]
        for c in found.cells
    ]
    strips = len(found.lengths) == 1 or len(policies) > MANY_POLICIES
    draw, size = (_strips if strips else _maps)(found, policies, names)
    return make_figure(name, title, caption, (header, data), draw, size, font_size=8, axes_grid=False)


def _strips(found: NeedleMap, policies: Sequence[str], names: Mapping[str, str]) -> tuple[Any, tuple[float, float]]:
    """One map per length: a line per policy, depth to the right."""
    ticks = [wrapped(names[policy], 44) for policy in policies]
    lengths, depths = found.lengths, found.depths
    cells = {(c.policy, c.length, c.depth): c for c in found.cells}
    numbers = len(lengths) * len(depths) <= MANY_COLUMNS
    every = 1 if numbers else max(1, len(depths) // 4)

    def draw(canvas: Canvas) -> None:
        panels = canvas.subplots(1, len(lengths), squeeze=False, sharey=True)[0]
        for axes, length in zip(panels, lengths, strict=True):
            image = _image(axes, [[cells.get((policy, length, depth)) for depth in depths] for policy in policies], numbers)
            axes.set_xticks(range(0, len(depths), every), [f"{d:.4g}" for d in depths[::every]], fontsize=7)
            axes.set_xlabel("depth of the needle (%)", fontsize=7)
            axes.set_title(f"{length} tokens", fontsize=8)
        panels[0].set_yticks(range(len(policies)), ticks, fontsize=7)
        _bar(canvas, image, panels, found)

    deep = sum(1 + 0.75 * tick.count("\n") for tick in ticks)
    wide = 0.5 + 0.058 * max(len(part) for tick in ticks for part in tick.split("\n"))
    return draw, (wide + len(lengths) * max(1.5, (0.34 if numbers else 0.14) * len(depths)) + 0.9, 0.9 + 0.18 * max(4.0, deep))


def _maps(found: NeedleMap, policies: Sequence[str], names: Mapping[str, str]) -> tuple[Any, tuple[float, float]]:
    """Small maps side by side, one per policy: a column per method and a line per budget; of many methods the other way round."""
    rows = _layout(found, policies)
    n_columns = max(len(row) for row in rows)
    width = max(1.6, 0.34 * len(found.lengths) + 0.5)
    height = max(1.25, 0.15 * len(found.depths) + 0.6)
    numbers = len(found.lengths) * len(found.depths) <= MOST_NUMBERS

    def draw(canvas: Canvas) -> None:
        panels = canvas.subplots(len(rows), n_columns, squeeze=False, sharex=True, sharey=True)
        image = None
        for line, (row, axes_row) in enumerate(zip(rows, panels, strict=True)):
            for column, axes in enumerate(axes_row):
                policy = row[column] if column < len(row) else None
                if policy is None:
                    axes.set_axis_off()
                    continue
                image = _panel(axes, found, policy, names[policy], numbers)
                below = rows[line + 1] if line + 1 < len(rows) else []
                if column >= len(below) or below[column] is None:
                    axes.tick_params(labelbottom=True)
                    axes.set_xlabel("prompt length (tokens)", fontsize=7)
            axes_row[0].set_ylabel("depth of\nthe needle (%)", fontsize=7)
        _bar(canvas, image, panels, found)

    return draw, (width * n_columns + 1.3, height * len(rows) + 0.4)


def _layout(found: NeedleMap, policies: Sequence[str]) -> list[list[str | None]]:
    """Return which policy stands where, in rows; None for an empty place."""
    method_of = {cell.policy: cell.method for cell in found.cells}
    groups: dict[str, list[str | None]] = {}
    for policy in policies:
        groups.setdefault(FULL if policy == FULL else method_of[policy], []).append(policy)
    deepest = max(map(len, groups.values()))
    if deepest == 1:  # one budget each: line by line
        flat: list[str | None] = list(policies)
        return [flat[i : i + MOST_COLUMNS] for i in range(0, len(flat), MOST_COLUMNS)]
    if len(groups) > MOST_COLUMNS:
        return list(groups.values())
    return [[group[i] if i < len(group) else None for group in groups.values()] for i in range(deepest)]


def _panel(axes: Axes, found: NeedleMap, policy: str, name: str, numbers: bool) -> Any:
    """Draw one policy's map; returns the image for the colour bar."""
    lengths, depths = found.lengths, found.depths
    cells = {(c.length, c.depth): c for c in found.cells if c.policy == policy}
    image = _image(axes, [[cells.get((length, depth)) for length in lengths] for depth in depths], numbers)
    axes.set_xticks(range(len(lengths)), [str(n) for n in lengths], rotation=45 if len(lengths) > 4 else 0)
    step = max(1, -(-len(depths) // 6))
    axes.set_yticks(range(0, len(depths), step), [f"{d:g}" if d == int(d) else f"{d:.1f}" for d in depths[::step]])
    axes.tick_params(length=2, labelsize=7)
    known = [c.score for c in cells.values() if c.score is not None]
    title = wrapped(name, 26)
    axes.set_title(f"{title}\nmean {np.mean(known):.2f}" if known and len(known) == len(cells) else title, fontsize=7)
    return image


def _image(axes: Axes, cells: Sequence[Sequence[Cell | None]], numbers: bool) -> Any:
    """Draw cells as a map, with a number in each where there is room."""
    scores = np.asarray([[np.nan if c is None or c.score is None else c.score for c in row] for row in cells], dtype=np.float64)
    axes.set_facecolor("#d9d9d9")
    image = axes.imshow(scores, cmap=MAP, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    for edge in axes.spines.values():
        edge.set_visible(False)
    axes.set_xticks(np.arange(scores.shape[1] + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(scores.shape[0] + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="minor", length=0)
    axes.tick_params(length=2)
    if numbers:
        for (y, x), score in np.ndenumerate(scores):
            _number(axes, x, y, cells[y][x], float(score))
    return image


def _number(axes: Axes, x: int, y: int, cell: Cell | None, score: float) -> None:
    """Write a score into its cell, with a dot where the policy had nothing to choose; or why there is none."""
    if score != score:
        axes.text(x, y, MARKS.get(cell.status if cell else "missing", ""), ha="center", va="center", fontsize=6)
        return
    text = f"{score:.2f}".removeprefix("0") if 0 < score < 1 else f"{score:.0f}"
    text += "·" if cell is not None and cell.status == "degenerate" else ""
    axes.text(x, y, text, ha="center", va="center", fontsize=6, color="black" if score > 0.6 else "white")


def _bar(canvas: Canvas, image: Any, axes: Any, found: NeedleMap) -> None:
    tall = canvas.get_figheight()
    bar = canvas.colorbar(image, ax=axes, shrink=min(1.0, 2.4 / tall), pad=0.02, aspect=14)
    bar.set_label(f"mean score ({found.metric})", fontsize=7)
