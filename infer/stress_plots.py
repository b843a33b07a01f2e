"""Figures of a stress test: memory, time per token and throughput against length, batch, or tokens decoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtool.naming import figure_names, wrapped
from kvtool.pictures import save_canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from kvtool.infer.stress_table import PointRow

#: Okabe-Ito, and markers that differ without colour.
STYLES = (
    ("#000000", "o"),
    ("#0072B2", "s"),
    ("#D55E00", "D"),
    ("#009E73", "^"),
    ("#CC79A7", "v"),
    ("#E69F00", "P"),
    ("#56B4E9", "X"),
)
LOOKS: dict[str, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "font.size": 9,
}

Pick = Callable[["PointRow"], float | None]


def _scaled(name: str, factor: float) -> Pick:
    def pick(row: PointRow) -> float | None:
        value = getattr(row, name)
        return None if value is None else float(value) * factor

    return pick


#: Title, figure of a row.
PANELS: tuple[tuple[str, Pick], ...] = (
    ("KV cache after the prompt (MB)", _scaled("kv_bytes_prompt_end", 1e-6)),
    ("prefill peak above the model (MB)", _scaled("prefill_peak_bytes", 1e-6)),
    ("decode peak above the model (MB)", _scaled("decode_peak_bytes", 1e-6)),
    ("time to first token (s)", lambda row: row.ttft_s[1] if row.ttft_s else None),
    ("time per output token (ms)", lambda row: 1000 * row.tpot_s[1] if row.tpot_s else None),
    ("tokens per second", _scaled("tokens_per_s", 1.0)),
)


def draw_series(folder: Path, series: str, rows: Sequence[PointRow]) -> None:
    """Draw six panels over lengths or batches and write them as ``SERIES.png``, ``.svg`` and ``.pdf``.

    A point without memory is a cross at the top of its panel.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with matplotlib.rc_context(LOOKS):
        canvas, grid = plt.subplots(2, 3, figsize=(12, 6.6), layout="constrained")
        names = list(dict.fromkeys(_name(row) for row in rows))
        for axes, (title, pick) in zip(grid.flat, PANELS, strict=True):
            for index, name in enumerate(names):
                _line(axes, [row for row in rows if _name(row) == name], series, pick, _style(index), name)
            sizes = sorted({getattr(row, series) for row in rows})
            axes.set_xscale("log", base=2)
            axes.set_xticks(sizes, [str(size) for size in sizes], minor=False)
            axes.minorticks_off()
            axes.set_title(title, fontsize=10)
            axes.set_xlabel("prompt length (tokens)" if series == "length" else "sequences in the batch")
            values = [value for row in rows if (value := pick(row))]
            if "(MB)" not in title:
                axes.set_ylim(0, 1.1 * max(values, default=1.0))
            elif values:
                axes.set_yscale("log", base=2)
                axes.set_ylim(min(values) / 1.5, 1.5 * max(values))
                axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        canvas.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), frameon=False, fontsize=8)
        save_canvas(canvas, folder, series)
        plt.close(canvas)


def _line(axes: Axes, rows: Sequence[PointRow], series: str, pick: Pick, style: dict[str, Any], name: str) -> None:
    found = [(getattr(row, series), value, row) for row in rows if (value := pick(row)) is not None]
    axes.plot([x for x, _, _ in found], [y for _, y, _ in found], label=name, **style)
    if found and pick is PANELS[4][1]:
        spread = [(x, row.tpot_s) for x, _, row in found if row.tpot_s is not None]
        lows, highs = ([1000 * t[i] for _, t in spread] for i in (0, 2))
        axes.fill_between([x for x, _ in spread], lows, highs, color=style["color"], alpha=0.15, linewidth=0)
    gone = [getattr(row, series) for row in rows if row.status in ("oom", "would not fit")]
    axes.plot(
        gone,
        [0.97] * len(gone),
        transform=axes.get_xaxis_transform(),
        linestyle="",
        marker="x",
        color=style["color"],
        markersize=8,
    )


def draw_endless(folder: Path, windows: Sequence[dict[str, Any]]) -> None:
    """Draw memory, time per token and loss over the tokens decoded; writes ``endless.png``, ``.svg`` and ``.pdf``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [("KV cache (MB)", "kv_bytes_high", 1e-6), ("time per output token (ms)", "tpot_s", 1000.0)]
    panels += [("loss of the text (nats per token)", "nll", 1.0)] if any(w["nll"] is not None for w in windows) else []
    with matplotlib.rc_context(LOOKS):
        canvas, grid = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.8), layout="constrained", squeeze=False)
        names = list(dict.fromkeys((w["policy"], w["source"]) for w in windows))
        shown = figure_names([policy for policy, _ in names])
        for axes, (title, key, factor) in zip(grid.flat, panels, strict=True):
            for index, name in enumerate(names):
                mine = [w for w in windows if (w["policy"], w["source"]) == name and w[key] is not None]
                label = f"{wrapped(shown[name[0]], 60)} ({'its own tokens' if name[1] == 'own' else 'a text'})"
                axes.plot(
                    [w["stop"] for w in mine],
                    [w[key] * factor for w in mine],
                    label=label,
                    **_style(index, 8.0 - index),
                )
            axes.set_title(title, fontsize=10)
            axes.set_xlabel("tokens decoded")
            axes.set_ylim(0, 1.1 * max(w[key] * factor for w in windows if w[key] is not None))
        handles, labels = grid[0, 0].get_legend_handles_labels()
        canvas.legend(handles, labels, loc="outside lower center", ncols=1, frameon=False, fontsize=8)
        save_canvas(canvas, folder, "endless")
        plt.close(canvas)


def _name(row: PointRow) -> str:
    return "full cache, measured again" if row.again else "full cache" if row.policy == "full" else row.policy


def _style(index: int, size: float = 5.0) -> dict[str, Any]:
    colour, marker = STYLES[index % len(STYLES)]
    return {"color": colour, "marker": marker, "markersize": max(3.0, size), "linewidth": 1.4}
