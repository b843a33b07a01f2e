"""Perplexity as a picture: against the context held, and against the position in the text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtool.pictures import save_canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from kvtool.analysis.perplexity import BinRow, Perplexity, PerplexityRow

#: Okabe-Ito, with markers that differ.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8c6d31")
MARKERS = "osD^vPX*<>"
FULL = "full"
#: Lines in the right panel; more would not be told apart.
MOST_LINES = 9


def draw_perplexity(result: Perplexity) -> list[Path]:
    """Write ``perplexity.png``, ``.svg`` and ``.pdf`` into the run's folder; their data are the CSV files beside them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    looks = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "font.size": 9}
    with matplotlib.rc_context(looks):
        canvas, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
        able = [row for row in result.rows if row.status == "ok"]
        _against_context(left, able)
        _against_position(right, able, result.bins)
        config = result.config
        title = f"{', '.join(config['text'])}: {config['n_segments']} segments of {config['length']} tokens, {config['model']}"
        canvas.suptitle(title, fontsize=10)
        files = save_canvas(canvas, result.folder, "perplexity")
        plt.close(canvas)
    return files


def _families(rows: Sequence[PerplexityRow]) -> list[str]:
    return list(dict.fromkeys(family(row.method) for row in rows if row.policy != FULL))


def family(method: str) -> str:
    """Return the name of a method without its options: points of one colour."""
    return method.partition(":")[0]


def _style(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)], "markersize": 5, "linewidth": 1.2}


def _against_context(axes: Axes, rows: Sequence[PerplexityRow]) -> None:
    """Perplexity against entries held: one colour per method, one line per set of its options."""
    from matplotlib.ticker import NullFormatter

    full = next((row for row in rows if row.policy == FULL and row.perplexity), None)
    if full is not None and full.perplexity is not None:
        axes.axhline(full.perplexity.mean, color="#444444", linestyle="--", linewidth=1, label="full cache")
    families, said = _families(rows), set()
    for method in dict.fromkeys(row.method for row in rows if row.policy != FULL):
        points = sorted((r for r in rows if r.method == method and r.policy != FULL), key=lambda row: row.entries or 0.0)
        name = family(method)
        x = [row.entries or 0.0 for row in points]
        means = [row.perplexity.mean if row.perplexity else 0.0 for row in points]
        lows = [max(0.0, m - r.perplexity.low) if r.perplexity else 0.0 for m, r in zip(means, points, strict=True)]
        highs = [max(0.0, r.perplexity.high - m) if r.perplexity else 0.0 for m, r in zip(means, points, strict=True)]
        spread = None if any(v != v for v in (*lows, *highs)) else [lows, highs]
        label = None if name in said else name
        said.add(name)
        axes.errorbar(x, means, yerr=spread, capsize=2, elinewidth=0.7, label=label, **_style(families.index(name)))
    axes.set_xscale("log", base=2)
    values = [row.perplexity.mean for row in rows if row.perplexity]
    if values and max(values) > 4 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("context held: mean KV entries per head, sink and window included")
    axes.set_ylabel("perplexity (bars: 95 %)")
    axes.set_title("Perplexity against context", fontsize=10)
    axes.legend(frameon=False, fontsize=8)


def _of_each(rows: Sequence[PerplexityRow]) -> list[PerplexityRow]:
    """Return at most `MOST_LINES` rows, the first ones of each method, in their order."""
    names = [family(row.method) for row in rows]
    rank = [names[:i].count(name) for i, name in enumerate(names)]
    chosen = sorted(range(len(rows)), key=lambda i: (rank[i], i))[:MOST_LINES]
    return [rows[i] for i in sorted(chosen)]


def _against_position(axes: Axes, rows: Sequence[PerplexityRow], bins: Sequence[BinRow]) -> None:
    """Perplexity over the full cache's against the number of tokens read before."""
    from matplotlib.ticker import NullFormatter

    families = _families(rows)
    shown = [row for row in rows if row.policy != FULL and not row.drops_nothing]
    left_out = max(0, len(shown) - MOST_LINES)
    shades: dict[str, int] = {}
    for row in _of_each(shown):
        mine = [b for b in bins if b.policy == row.policy]
        x = [(b.start * (b.stop - 1)) ** 0.5 for b in mine]
        style = _style(families.index(family(row.method)))
        style["linestyle"] = ("-", "--", ":", "-.")[shades.setdefault(family(row.method), 0) % 4]
        style["marker"] = MARKERS[shades[family(row.method)] % len(MARKERS)]
        shades[family(row.method)] += 1
        axes.plot(x, [b.ratio.mean for b in mine], label=row.policy, **style)
    axes.axhline(1.0, color="#444444", linestyle="--", linewidth=1, label="full cache")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("tokens read before")
    axes.set_ylabel("perplexity / full cache's, same tokens")
    more = f" ({MOST_LINES} of {len(shown)} policies)" if left_out else ""
    axes.set_title(f"Where it is lost{more}", fontsize=10)
    axes.legend(frameon=False, fontsize=7)
