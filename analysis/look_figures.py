"""Figures of comparisons, of consistency and of the head-importance-variance test."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvtool.analysis.compare import CompareRow
from kvtool.analysis.consistency import ConsistencyRow
from kvtool.analysis.hiv import SpecializationRow
from kvtool.analysis.importance import Changed
from kvtool.analysis.plain import columns, ends
from kvtool.analysis.statistics import Interval
from kvtool.analysis.style import COLOURS, GREY, MARKERS, Figure, bars, figure_legend, line_style, log_axis, make_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

#: Rows of a forest plot that can still be read, and lines of a panel.
MOST_ROWS, MOST_LINES = 48, 10
WORDS = {
    "score": "task score",
    "answer_accuracy": "answer accuracy",
    "answer_exact": "answers right in every token",
    "answer_nll": "loss of the answer",
    "answer_margin": "margin of the answer",
}
#: Policy, kept share, value; of one line each.
Dot = tuple[str, float, Interval]


def short(policy: str) -> str:
    """Return a policy's text without the paths of its files."""
    return re.sub(r"(?<=[:,])(heads|plan|file)=[^,]*,?", "", policy).rstrip(":,")


def method_of(policy: str) -> str:
    """Return a policy's text without paths and budget: what one line of a figure is of."""
    return re.sub(r"(?<=[:,])budget=[^,]*,?", "", short(policy)).rstrip(":,")


def compare_figure(rows: Sequence[CompareRow], figures: Sequence[str], baseline: str) -> Figure | None:
    """Differences from the baseline, one row per policy, the smallest cache on top; None where nothing was compared."""
    able = [row for row in rows if any(row.figures[f].change is not None for f in figures if f in row.figures)]
    able = sorted(able, key=lambda row: (row.retention or 0.0, row.method))
    if not able:
        return None
    shown = able[:MOST_ROWS]
    methods = list(dict.fromkeys(method_of(row.policy) for row in shown))

    def draw(canvas: Canvas) -> None:
        engine: Any = canvas.get_layout_engine()
        if engine is not None:
            engine.set(w_pad=0.15)  # labels are a little wider in the files than where they are laid out
        panels = canvas.subplots(1, len(figures), squeeze=False, sharey=True)[0]
        for axes, name in zip(panels, figures, strict=True):
            for place, row in enumerate(shown):
                found = row.figures.get(name)
                if found is None or found.change is None:
                    continue
                index = methods.index(method_of(row.policy))
                spread = bars([found.change.mean], [found.change.low], [found.change.high])
                clear = found.p_holm is not None and found.p_holm < 0.05
                axes.errorbar(
                    [found.change.mean],
                    [place],
                    xerr=spread,
                    color=COLOURS[index % len(COLOURS)],
                    marker=MARKERS[index % len(MARKERS)],
                    markerfacecolor=None if clear else "white",
                    markersize=5,
                    elinewidth=0.9,
                )
            axes.axvline(0.0, color=GREY, linestyle="--", linewidth=1)
            axes.set_xlabel(f"{WORDS.get(name, name)}, minus {short(baseline)}")
        panels[0].set_yticks(
            range(len(shown)), [f"{short(row.policy)}  ({100 * (row.retention or 0):.3g} %)" for row in shown], fontsize=7
        )
        panels[0].invert_yaxis()

    left = f" {len(shown)} of {len(able)} policies, the smallest caches." if len(shown) < len(able) else ""
    caption = (
        f"Differences from {short(baseline)} on the same prompts, with 95 % intervals; filled: differs by a paired test (p < 0.05 "
        f"after Holm's correction). In brackets: entries kept.{left}"
    )
    header = ["policy", "retention", *columns(figures), *(f"{name}_p_holm" for name in figures)]
    lines = [
        [
            row.policy,
            row.retention,
            *(cell for name in figures for cell in ends(row.figures[name].change if name in row.figures else None)),
            *(row.figures[name].p_holm if name in row.figures else None for name in figures),
        ]
        for row in able
    ]
    size = (3.4 + 3.2 * len(figures), 0.9 + 0.17 * max(6, len(shown)))
    return make_figure("changes", f"Differences from {short(baseline)}", caption, (header, lines), draw, size, font_size=8)


def consistency_figure(rows: Sequence[ConsistencyRow], reference: str) -> Figure | None:
    """Agreement with the full cache's answers against what is kept; None without answers."""
    parts = {
        "exact": "answers equal in every token",
        "f1": "token F1 with the full cache's answer",
        "lost": "turned from right to wrong",
    }
    dots = {
        name: [
            (row.policy, row.retention, value)
            for row in rows
            if row.retention is not None and row.policy != reference and (value := getattr(row, name)) is not None
        ]
        for name in parts
    }
    caption = f"Answers of each policy beside those of {short(reference)} on the same prompts, against what is kept; bars: 95 % intervals."
    return _panels(
        "agreement", f"Consistency with {short(reference)}", caption, {parts[name]: found for name, found in dots.items()}
    )


def hiv_figure(changed: Mapping[str, Sequence[Changed]], heads: Sequence[SpecializationRow]) -> Figure | None:
    """What compression does to the importance of KV heads, and how unevenly heads keep; None without figures."""
    panels: dict[str, list[Dot]] = {}
    for pattern, rows in changed.items():
        of = f" ({pattern})" if len(changed) > 1 else ""
        mine = [row for row in rows if row.level == "kv_heads" and row.measure == _measure(rows)]
        panels[f"variance over full's{of}"] = [(r.policy, r.retention, r.ratio) for r in mine if r.ratio]
        panels[f"rank correlation with full{of}"] = [(r.policy, r.retention, r.spearman) for r in mine if r.spearman]
        panels[f"Gini of entries kept{of}"] = [
            (r.policy, r.retention, r.kept["gini"]) for r in heads if r.pattern == pattern and "gini" in r.kept
        ]
    caption = (
        "Importance of KV heads under each policy against that with the full cache: the variance over heads (1: unchanged), the "
        "correlation of the ranks (1: same order); and how unevenly heads keep entries (0: all alike). Bars are 95 % intervals."
    )
    return _panels("hiv_curves", "Head importance before and after compression", caption, panels)


def _measure(rows: Sequence[Changed]) -> str:
    """The measure that is drawn: the gain, else the first."""
    names = [row.measure for row in rows]
    return "gain" if "gain" in names else names[0] if names else ""


def _panels(name: str, title: str, caption: str, panels: Mapping[str, Sequence[Dot]]) -> Figure | None:
    """Draw values against the kept share, a panel per value and a line per method."""
    able = {words: dots for words, dots in panels.items() if dots}
    if not able:
        return None
    methods = list(dict.fromkeys(method_of(policy) for dots in able.values() for policy, _, _ in dots))
    shown = methods[:MOST_LINES]
    left = f" {len(shown)} of {len(methods)} methods; the data has all." if len(shown) < len(methods) else ""
    columns_ = min(3, len(able))
    lines_ = -(-len(able) // columns_)

    def draw(canvas: Canvas) -> None:
        grid = canvas.subplots(lines_, columns_, squeeze=False).ravel()
        for axes, (words, dots) in zip(grid, able.items(), strict=False):
            _panel(axes, words, dots, shown)
        for axes in grid[len(able) :]:
            axes.set_axis_off()
        figure_legend(canvas, list(grid), 3)

    header = ["what", "policy", "retention", *columns(["value"])]
    data = [[words, policy, kept, *ends(value)] for words, dots in able.items() for policy, kept, value in dots]
    size = (3.5 * columns_, 2.7 * lines_ + 0.25 * -(-len(shown) // 3) + 0.3)
    return make_figure(name, title, caption + left, (header, data), draw, size, font_size=8)


def _panel(axes: Axes, words: str, dots: Sequence[Dot], methods: Sequence[str]) -> None:
    key: Callable[[Dot], float] = lambda dot: dot[1]  # noqa: E731
    for method in methods:
        mine = sorted((dot for dot in dots if method_of(dot[0]) == method), key=key)
        if mine:
            means = [value.mean for _, _, value in mine]
            spread = bars(means, [v.low for _, _, v in mine], [v.high for _, _, v in mine])
            style: dict[str, Any] = line_style(method, methods)
            axes.errorbar([100 * kept for _, kept, _ in mine], means, yerr=spread, label=method, elinewidth=0.7, **style)
    shares = sorted({100 * kept for _, kept, _ in dots})
    if shares[0] > 0 and shares[-1] > 1.05 * shares[0]:
        log_axis(axes, shares, 6)
    else:  # one retention: nothing to spread
        axes.set_xlim(0.0, max(1.0, 2 * shares[-1]))
    axes.set_title(words, fontsize=8)
    axes.set_xlabel("kept (%)")
