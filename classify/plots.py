"""The reliability diagram: confidence against what became of it, and its figures as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path

from kvtool.classify.confidence import BINS, Reliability
from kvtool.files import write_text
from kvtool.pictures import save_canvas

#: Okabe-Ito, safe for colour-blind readers; markers differ too
STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "D"), ("#CC79A7", "^"))
COLUMNS = ("heads", "low", "high", "confidence", "agreement", "n")


def plot_reliability(judged: Mapping[str, Reliability], path: Path) -> None:
    """Draw agreement against confidence per bin, and below how many pairs a bin holds; write PNG, SVG and PDF atomically."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (upper, lower) = plt.subplots(2, 1, figsize=(5.6, 6.2), sharex=True, height_ratios=(3, 1), layout="constrained")
    upper.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle="--", label="as promised")
    width = 0.8 / BINS / max(1, len(judged))
    for index, (name, r) in enumerate(judged.items()):
        colour, marker = STYLES[index % len(STYLES)]
        x, y, n = ([float(b[key]) for b in r.curve] for key in ("confidence", "agreement", "n"))
        upper.plot(x, y, color=colour, marker=marker, markersize=6, label=f"{name}: calibration error {r.ece:.3f}")
        middles = [(float(b["low"]) + float(b["high"])) / 2 + (index - (len(judged) - 1) / 2) * width for b in r.curve]
        lower.bar(middles, n, width, color=colour)
    upper.set(ylabel="share of held-out halves with the same label", xlim=(0, 1.02), ylim=(0, 1.04))
    lower.set(xlabel="confidence (share of bootstrap draws)", ylabel="pairs", yscale="log")
    figure.legend(loc="outside upper center", frameon=False, fontsize=9)
    for axis in (upper, lower):
        axis.grid(alpha=0.25)
    save_canvas(figure, path.parent, path.stem, 120)
    plt.close(figure)


def write_reliability(judged: Mapping[str, Reliability], path: Path) -> None:
    """Write the diagram's figures: one row per bin that holds any pair."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for name, r in judged.items():
        writer.writerows({"heads": name, **row} for row in r.curve)
    write_text(path, text.getvalue())
