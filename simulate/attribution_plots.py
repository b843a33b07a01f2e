"""The attribution as pictures: causes per budget and block, and what each head gains or loses."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvtool.files import write_text
from kvtool.pictures import save_canvas
from kvtool.simulate.attribution import CAUSES
from kvtool.simulate.attribution_rows import MEASURES, REAL, REMEDIES, Row
from kvtool.simulate.plots import COLOURS

LABELS = {"slots": "lost slots", "count": "no count term", "variance": "no variance term", "value": "plain mean of values"}
#: Heads of one panel whose figures are written out.
WRITTEN = 48


def plot_causes(rows: Sequence[Row], path: Path, title: str) -> None:
    """Stack the four causes of the plain mean's cost per budget and block, beside the cost of what else can be run; PNG, SVG and PDF."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    able = [row for row in rows if row.message is None]
    if not able:
        return
    figure, axis = plt.subplots(figsize=(max(6.0, 1.5 + 0.8 * len(able)), 4.8), layout="constrained")
    x = np.arange(len(able))
    above, below = np.zeros(len(able)), np.zeros(len(able))
    for i, cause in enumerate(CAUSES):
        part = np.array([row.causes[cause].mean for row in able])
        base = np.where(part >= 0, above, below)
        axis.bar(x, part, 0.62, bottom=base, color=COLOURS[i], label=LABELS[cause])
        above, below = above + np.maximum(part, 0), below + np.minimum(part, 0)
    for name, marker, label in (
        ("evict", "_", "evict, all entries real"),
        ("fewer", "x", "evict, slots left empty"),
        ("mean", "D", "plain mean: sum of the parts"),
        ("count", "^", "mean with ln n"),
        ("weighted", "o", "weighted mean, entropy"),
    ):
        style: dict[str, Any] = {"s": 420, "linewidths": 2} if marker == "_" else {"s": 28, "linewidths": 1.2}
        face = {"D": "white"}.get(marker, "none" if marker in "^o" else "black")
        kinds = {"color": "black"} if marker in "_x" else {"facecolors": face, "edgecolors": "black"}
        axis.scatter(x, [row.cost[name] for row in able], marker=marker, label=label, zorder=3, **kinds, **style)
    several = len({row.policy.split(":")[0] for row in able}) > 1
    axis.set_xticks(
        x, [_tick(row, several) for row in able], rotation=60 if len(able) > 8 else 0, ha="right" if len(able) > 8 else "center"
    )
    axis.set_ylabel(f"predicted {MEASURES[able[0].measure]} of the plain mean")
    axis.set_title(title, fontsize=10)
    axis.grid(axis="y", alpha=0.25)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False, markerscale=0.6)
    _save(figure, path)
    plt.close(figure)


def _tick(row: Row, several: bool) -> str:
    from kvtool.policies import Policy

    policy = Policy.parse(row.policy)
    name = f"{policy.method.name}\n" if several else ""
    return f"{name}{policy.budget or 'own'}\nblock {row.block}"


def plot_heads(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw per head what the plain mean and the mean with ln n cost against evicting alone, one pair of panels per budget and block."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import SymLogNorm

    able = [row for row in rows if row.message is None]
    if not able:
        return
    shown = ("mean", *REMEDIES)
    grids = {(i, name): _grid(row, name) for i, row in enumerate(able) for name in shown}
    most = max(float(np.abs(grid).max()) for grid in grids.values()) or 1.0
    norm = SymLogNorm(linthresh=most / 50, vmin=-most, vmax=most)
    n_layers, n_heads = grids[0, "mean"].shape
    size = (len(shown) * max(2.6, 0.3 * n_heads) + 1.5, len(able) * max(1.6, 0.22 * n_layers) + 1)
    figure, axes = plt.subplots(len(able), len(shown), figsize=size, squeeze=False, layout="constrained")
    layers = list(dict.fromkeys(head["layer"] for head in able[0].heads))
    for (i, name), grid in grids.items():
        axis = axes[i, shown.index(name)]
        # Purple helps, orange hurts; the difference survives colour-blindness and grey.
        image = axis.imshow(grid, cmap="PuOr_r", norm=norm, aspect="auto")
        kind = {"mean": "plain mean", "count": "mean + ln n", "weighted": "weighted"}[name]
        axis.set_title(f"{kind}, {_tick(able[i], False)}".replace("\n", ", "), fontsize=8)
        axis.set_xticks(range(n_heads) if n_heads <= 16 else range(0, n_heads, 8))
        step = 1 if n_layers <= 16 else 4
        axis.set_yticks(range(0, n_layers, step), layers[::step])
        axis.tick_params(labelsize=7)
        axis.set_ylabel("layer" if name == shown[0] else "", fontsize=8)
        axis.set_xlabel("KV head" if i == len(able) - 1 else "", fontsize=8)
        if grid.size <= WRITTEN:
            for (row, column), value in np.ndenumerate(grid):
                dark = abs(float(norm(value)) - 0.5) > 0.35
                axis.text(
                    column,
                    row,
                    f"{value:+.2f}" if abs(value) >= 0.005 else "0",
                    ha="center",
                    va="center",
                    fontsize=6,
                    color="white" if dark else "black",
                )
    figure.colorbar(image, ax=axes, label=f"{MEASURES[able[0].measure]} above evicting alone (below 0: it helps)", shrink=0.7)
    figure.suptitle(title, fontsize=10)
    _save(figure, path)
    plt.close(figure)


def _grid(row: Row, name: str) -> np.ndarray:
    """Return the loss of one compensation per layer and head."""
    layers = list(dict.fromkeys(head["layer"] for head in row.heads))
    grid = np.zeros((len(layers), len(row.heads) // len(layers)))
    for head in row.heads:
        grid[layers.index(head["layer"]), head["head"]] = head["loss"][name].mean
    return grid


def _save(figure: Any, path: Path) -> None:
    save_canvas(figure, path.parent, path.stem, 130)


def write_causes(rows: Sequence[Row], path: Path) -> None:
    """Write the figures of `plot_causes`: a line per policy, budget and block, as CSV."""
    able = [row for row in rows if row.message is None]
    if not able:
        return
    costs = list(able[0].cost)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    ends = [f"{cause}{end}" for cause in CAUSES for end in ("", "_low", "_high")]
    writer.writerow(["policy", "block", "measure", *ends, *(f"cost_{name}" for name in costs)])
    for row in able:
        figures = [
            value for cause in CAUSES for value in (row.causes[cause].mean, row.causes[cause].low, row.causes[cause].high)
        ]
        writer.writerow([row.policy, row.block, row.measure, *figures, *(row.cost[name] for name in costs)])
    write_text(path, buffer.getvalue())


def write_heads(rows: Sequence[Row], path: Path) -> None:
    """Write a line per budget, block and head as CSV, atomically."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    ends = [f"{name}_loss{end}" for name in ("mean", *REMEDIES) for end in ("", "_low", "_high")]
    names = [*(f"cost_{name}" for name in REAL), *(f"cause_{cause}" for cause in CAUSES), *ends]
    rest = ["gap_after_ln_n", "held_plain", "held_counted", "block_variance", "helps", "hurts"]
    writer.writerow(["policy", "block", "layer", "head", *names, *rest])
    for row in rows:
        for head in row.heads:
            losses = [getattr(head["loss"][name], end) for name in ("mean", *REMEDIES) for end in ("mean", "low", "high")]
            figures = [
                *head["cost"].values(),
                *head["causes"].values(),
                *losses,
                head["gap"],
                head["held_plain"],
                head["held_counted"],
            ]
            variance = "" if head["variance"] is None else f"{head['variance']:.6g}"
            numbers = [f"{value:.6g}" for value in figures]
            place = [row.policy, row.block, head["layer"], head["head"]]
            writer.writerow([*place, *numbers, variance, "+".join(head["helps"]), "+".join(head["hurts"])])
    write_text(path, buffer.getvalue())
