"""The gaps as a picture: one panel per budget, one bar per policy, from the oracle's harm to the policy's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvtool.naming import figure_names, wrapped
from kvtool.pictures import save_canvas
from kvtool.simulate.gap_rows import GapRow
from kvtool.simulate.gap_words import WORDS, budgets_of
from kvtool.simulate.gaps import PARTS, Part

#: Okabe-Ito, safe for colour-blind readers; hatches differ too, for print.
STYLE: dict[Part, tuple[str, str]] = {
    "protection": ("#F0E442", ".."),
    "selection": ("#0072B2", ""),
    "price": ("#E69F00", "//"),
    "allocation": ("#009E73", "xx"),
}
#: Bars and panels that still can be read.
MOST_BARS, MOST_PANELS = 16, 8


def plot_gaps(rows: Sequence[GapRow], path: Path, title: str) -> None:
    """Draw stacked bars, negative parts to the left of zero, and write PNG, SVG and PDF atomically."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(budgets_of(rows).items())
    left_out = len(panels) - MOST_PANELS
    panels = panels[:MOST_PANELS]
    n_columns = min(2, max(1, len(panels)))
    n_rows = max(1, -(-len(panels) // n_columns))
    most = min(MOST_BARS, max((len(members) for _, members in panels), default=1))
    size = (6.2 * n_columns + 1.0, n_rows * (0.28 * most + 0.9) + 1.0)
    figure, axes = plt.subplots(n_rows, n_columns, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (budget, members) in zip(axes.flat, panels, strict=False):
        draw_budget(axis, members)
        kept = 100 * float(np.mean([row.retention for row in members]))
        axis.set_title(budget if "own" in budget else f"{budget}: {kept:.3g} % of the prompt kept", fontsize=10)
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    note = f" ({left_out} more budgets in gaps.csv)" if left_out > 0 else ""
    figure.suptitle(f"Predicted harm above the oracle, by cause: {title}{note}", fontsize=11)
    save_canvas(figure, path.parent, path.stem, 130)
    plt.close(figure)


def draw_budget(axis: Any, rows: Sequence[GapRow]) -> None:
    """Draw one panel: least harm on top."""
    shown = sorted(rows, key=lambda row: row.harm.mean if row.harm else 0.0)[:MOST_BARS][::-1]
    places, names = np.arange(len(shown)), figure_names([row.method for row in shown])
    right = np.asarray([row.oracle.mean if row.oracle else 0.0 for row in shown])
    left = np.zeros(len(shown))
    axis.barh(places, right, color="#BBBBBB", edgecolor="white", label="oracle, best free budgets")
    for name, (colour, hatch) in STYLE.items():
        values = np.asarray([row.parts[name].mean for row in shown])
        up, down = np.maximum(values, 0.0), np.minimum(values, 0.0)
        style = {"color": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0.5}
        axis.barh(places, up, left=right, label=f"{name}: {WORDS[name]}", **style)
        axis.barh(places, down, left=left, **style)
        right, left = right + up, left + down
    if (left < 0).any():
        axis.axvline(0.0, color="black", linewidth=0.8)
    for place, row in zip(places, shown, strict=True):
        if row.harm is not None:
            ends = [[max(row.harm.mean - row.harm.low, 0.0)], [max(row.harm.high - row.harm.mean, 0.0)]]
            axis.errorbar(row.harm.mean, place, xerr=ends, color="black", elinewidth=0.8, capsize=2, fmt="none")
    axis.set_yticks(places, [wrapped(names[row.method], 30) for row in shown], fontsize=8)
    axis.set_xlabel("predicted harm (lost margin), 95 %", fontsize=9)
    axis.grid(axis="x", alpha=0.25)
    axis.set_axisbelow(True)


assert set(STYLE) == set(PARTS)
