"""Importances as heatmaps, layers x heads, one per measure; the data is importance.csv."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvtool.analysis.importance import Level
from kvtool.analysis.style import STYLE
from kvtool.pictures import save_canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

#: even in lightness, and read alike with any colour vision
COLOURS = "cividis"
#: cells up to which each shows its number
NUMBERED = 64
#: share of the largest importance below which a cell shows a dot
SMALL = 0.005
TITLES = {
    "attention": "attention (share)",
    "reasoning": "retrieval-reasoning",
    "gain": "gain |g · o|",
    "ablation": "ablation: loss (nats)",
    "ablation_margin": "ablation: margin (nats)",
}


def plot_importance(levels: dict[str, Level], folder: Path, title: str) -> None:
    """Draw every measure of KV heads (top) and query heads (bottom) and write importance.png, .svg and .pdf atomically."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measures = list(levels["heads"].values)
    names = list(levels)
    tall = min(6.0, max(2.2, 0.28 * len(levels["heads"].layers)))
    style = {**STYLE, "axes.grid": False, "font.size": 8}
    with matplotlib.rc_context(style):
        size = (3.0 * len(measures), (tall + 0.6) * len(names))
        canvas, grid = plt.subplots(len(names), len(measures), figsize=size, layout="constrained", squeeze=False)
        for line, name in zip(grid, names, strict=True):
            for axes, measure in zip(line, measures, strict=True):
                level = levels[name]
                table = np.nanmean(level.values[measure], axis=0).reshape(len(level.layers), level.n_heads)
                image = _heatmap(axes, table, level, TITLES[measure])
                axes.set_xlabel("KV head" if name == "kv_heads" else "query head")
                axes.set_ylabel("layer")
                canvas.colorbar(image, ax=axes, shrink=0.85)
        few = f" (·: below {SMALL:.1%} of the largest)" if len(levels["kv_heads"].places) <= NUMBERED else ""
        canvas.suptitle(f"Importance of heads: {title}{few}", fontsize=10)
        save_canvas(canvas, folder, "importance", 130)
        plt.close(canvas)


def _heatmap(axes: Axes, table: NDArray[np.float64], level: Level, title: str) -> AxesImage:
    low, high = min(0.0, float(table.min())), max(float(table.max()), 1e-12)
    image = axes.imshow(table, cmap=COLOURS, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    axes.set_title(title, fontsize=9)
    rows, columns = table.shape
    step = max(1, -(-rows // 16))
    axes.set_yticks(range(0, rows, step), [str(layer) for layer in level.layers[::step]])
    wide = max(1, -(-columns // 8))
    axes.set_xticks(range(0, columns, wide), [str(head) for head in range(0, columns, wide)])
    if table.size <= NUMBERED:
        for (row, column), value in np.ndenumerate(table):
            bright = (value - low) / (high - low) > 0.55
            axes.text(
                column, row, _number(value, high), ha="center", va="center", fontsize=6, color="black" if bright else "white"
            )
    return image


def _number(value: float, high: float) -> str:
    """Return two digits without a leading zero, as cells are narrow."""
    return "·" if abs(value) < SMALL * high else f"{value:.2g}".replace("0.", ".", 1)
