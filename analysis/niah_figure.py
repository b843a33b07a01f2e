"""Heat maps of needle tests in the field's form: prompt length to the right, depth downwards, colour for the score."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvtool.analysis.niah import FULL, Cell, NeedleMap
from kvtool.pictures import save_canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Told apart by people of all kinds of colour vision, and in grey.
MAP = "viridis"
#: A panel with more cells than this shows no numbers.
MOST_NUMBERS = 130
#: Methods side by side, the full cache counted.
MOST_COLUMNS = 6
#: Marks of cells without a score.
MARKS = {"impossible": "×", "oom": "oom", "failed": "?", "missing": ""}


def draw_needles(found: NeedleMap, folder: Path) -> list[Path]:
    """Write ``niah.png``, ``.svg`` and ``.pdf``: one column of panels per method, one panel per budget; the full cache in front.

    Many methods stand below one another instead.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = _layout(found)
    n_columns = max(len(row) for row in rows)
    width = max(2.8, 0.46 * len(found.lengths) + 1.5)
    height = max(1.9, 0.2 * len(found.depths) + 1.0)
    with matplotlib.rc_context({"font.size": 9}):
        canvas, panels = plt.subplots(
            len(rows),
            n_columns,
            figsize=(width * n_columns + 0.9, height * len(rows) + 0.7),
            layout="constrained",
            squeeze=False,
        )
        image = None
        for row, axes_row in zip(rows, panels, strict=True):
            for column, axes in enumerate(axes_row):
                if column >= len(row) or row[column] is None:
                    axes.set_axis_off()
                    continue
                image = _panel(axes, found, row[column])
                axes.set_ylabel("depth of the needle (%)" if column == 0 else "")
        for column in range(n_columns):
            last = max(i for i, row in enumerate(rows) if column < len(row) and row[column] is not None)
            panels[last, column].set_xlabel("prompt length (tokens)")
        bar = canvas.colorbar(image, ax=panels, shrink=min(1.0, 2.2 / len(rows)), pad=0.02)
        bar.set_label(f"mean score ({found.metric})")
        canvas.suptitle(f"{found.task}: {found.model}, compressed at {found.compress_at}", fontsize=10)
        files = save_canvas(canvas, folder, "niah")
        plt.close(canvas)
    return files


def _layout(found: NeedleMap) -> list[list[str | None]]:
    """Return which policy stands where, in rows; None for an empty place."""
    method_of = {cell.policy: cell.method for cell in found.cells}
    groups: dict[str, list[str | None]] = {}
    for policy in found.policies:
        groups.setdefault(FULL if policy == FULL else method_of[policy], []).append(policy)
    if len(groups) > MOST_COLUMNS:
        return list(groups.values())
    deepest = max(map(len, groups.values()))
    return [[group[i] if i < len(group) else None for group in groups.values()] for i in range(deepest)]


def _panel(axes: Axes, found: NeedleMap, policy: str | None) -> Any:
    """Draw one policy's map; returns the image for the colour bar."""
    lengths, depths = found.lengths, found.depths
    cells = {(c.length, c.depth): c for c in found.cells if c.policy == policy}
    scores = np.full((len(depths), len(lengths)), np.nan)
    for (length, depth), cell in cells.items():
        if cell.score is not None:
            scores[depths.index(depth), lengths.index(length)] = cell.score
    axes.set_facecolor("#d9d9d9")
    image = axes.imshow(scores, cmap=MAP, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_xticks(range(len(lengths)), [str(n) for n in lengths], rotation=45 if len(lengths) > 6 else 0)
    step = max(1, -(-len(depths) // 11))
    axes.set_yticks(range(0, len(depths), step), [f"{d:g}" if d == int(d) else f"{d:.1f}" for d in depths[::step]])
    axes.tick_params(length=2)
    for edge in axes.spines.values():
        edge.set_visible(False)
    axes.set_xticks(np.arange(len(lengths) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(depths) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="minor", length=0)
    if scores.size <= MOST_NUMBERS:
        _write_cells(axes, lengths, depths, cells)
    mean = [c.score for c in cells.values()]
    known = [score for score in mean if score is not None]
    title = "full cache" if policy == FULL else str(policy)
    axes.set_title(f"{title}\nmean {np.mean(known):.2f}" if len(known) == len(mean) and known else title, fontsize=9)
    return image


def _write_cells(axes: Axes, lengths: list[int], depths: list[float], cells: dict[tuple[int, float], Cell]) -> None:
    """Write each score into its cell, with a dot where the policy had nothing to choose."""
    for y, depth in enumerate(depths):
        for x, length in enumerate(lengths):
            cell = cells.get((length, depth))
            if cell is None or cell.score is None:
                axes.text(x, y, MARKS.get(cell.status if cell else "missing", ""), ha="center", va="center", fontsize=6)
                continue
            text = f"{cell.score:.2f}".removeprefix("0") if 0 < cell.score < 1 else f"{cell.score:.0f}"
            text += "·" if cell.status == "degenerate" else ""
            axes.text(x, y, text, ha="center", va="center", fontsize=6, color="black" if cell.score > 0.6 else "white")
