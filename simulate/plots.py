"""The ranking as a picture: predicted harm and attention recall against retention."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvtool.files import write_text
from kvtool.naming import figure_names, wrapped
from kvtool.pictures import save_canvas
from kvtool.simulate.rank import Row
from kvtool.textgrid import csv_text

#: Okabe-Ito, safe for colour-blind readers; markers differ too
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX*<>"
#: methods in the legend; more would not be told apart
MOST = 12


def plot_ranking(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw risk (with intervals) and recall against retention, one line per method; PNG, SVG, PDF and the data as CSV."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter

    able = [row for row in rows if row.status == "ok" and row.budget is not None]
    methods = _best_methods(able)
    names = {method: wrapped(name, 40) for method, name in figure_names(methods).items()}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.3 + 0.2 * (len(methods) // 4 + 1)), layout="constrained")
    for index, method in enumerate(methods):
        points = sorted((row for row in able if row.method == method), key=lambda row: row.retention)
        style: dict[str, Any] = {
            "color": COLOURS[index % len(COLOURS)],
            "marker": MARKERS[index % len(MARKERS)],
            "linestyle": "--" if method.startswith("random") else ":" if points[0].yardstick else "-",
            "markersize": 5,
        }
        x = [100 * row.retention for row in points]
        risk = [row.risk or 0.0 for row in points]
        spread = [[h - (r.risk_low or 0.0) for h, r in zip(risk, points, strict=True)],
                  [(r.risk_high or 0.0) - h for h, r in zip(risk, points, strict=True)]]  # fmt: skip
        left.errorbar(x, risk, yerr=spread, label=names[method], elinewidth=0.8, capsize=2, **style)
        right.plot(x, [row.recall for row in points], label=names[method], **style)
    front = sorted((row for row in able if row.pareto), key=lambda row: row.retention)
    marks = {"s": 110, "facecolors": "none", "edgecolors": "#666666", "linewidths": 1.2, "label": "Pareto front", "zorder": 4}
    left.scatter([100 * r.retention for r in front], [r.risk or 0.0 for r in front], **marks)
    left.set_ylabel("predicted risk, 95 %")
    right.set_ylabel("attention recall (mass kept)")
    for axis in (left, right):
        axis.set_xscale("log")
        ticks = _apart(sorted({100 * row.retention for row in able}))
        axis.set_xticks(ticks)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.tick_params(axis="x", rotation=45 if len(ticks) > 6 else 0)
        axis.set_xlabel("KV entries kept (% of the prompt)")
        axis.grid(alpha=0.25)
    handles, labels = left.get_legend_handles_labels()
    longest = max((len(part) for label in labels for part in label.split("\n")), default=1)
    columns = max(1, min(4, int(11 / (0.55 + 0.065 * longest))))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=11)
    save_canvas(figure, path.parent, path.stem, 130)
    plt.close(figure)
    header = ["policy", "method", "budget", "status", "retention", "risk", "risk_low", "risk_high", "recall", "pareto"]
    write_text(path.with_suffix(".csv"), csv_text(header, [[getattr(row, name) for name in header] for row in rows]))


def _apart(values: list[float]) -> list[float]:
    """Those of the ascending values whose labels do not overlap on a logarithmic axis."""
    kept: list[float] = []
    for value in values:
        if not kept or value / kept[-1] >= (values[-1] / values[0]) ** 0.06:
            kept.append(value)
    return kept


def _best_methods(rows: Sequence[Row]) -> list[str]:
    """The `MOST` methods of smallest mean risk, those on the Pareto front and the control included, in order of name."""
    risks: dict[str, list[float]] = {}
    for row in rows:
        risks.setdefault(row.method, []).append(row.risk or 0.0)
    front = {row.method for row in rows if row.pareto}
    best = sorted(risks, key=lambda m: (m not in front, sum(risks[m]) / len(risks[m])))[:MOST]
    control = [m for m in risks if m == "random" and m not in best]
    return sorted(best[: MOST - len(control)] + control)
