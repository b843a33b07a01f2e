"""Figures of comparisons, of consistency and of the head-importance-variance test; each can be drawn again from its own data."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvtool.analysis.compare import CompareRow
from kvtool.analysis.consistency import ConsistencyRow
from kvtool.analysis.hiv import SpecializationRow
from kvtool.analysis.importance import Changed
from kvtool.analysis.plain import columns, csv_text, ends
from kvtool.analysis.style import (
    COLOURS,
    GREY,
    MARKERS,
    Figure,
    alike_words,
    apart,
    bars,
    coinciding,
    figure_legend,
    line_style,
    log_axis,
    make_figure,
    span_of,
)
from kvtool.naming import figure_names, method_of, shared_settings, wrapped

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
LEVEL = 0.05
#: One line of a figure's data, by column.
Line = Mapping[str, str]
Names = Mapping[str, tuple[str, str]]
_CONSISTENCY = {
    "exact": "answers equal in every token",
    "f1": "token F1 with the full cache's answer",
    "lost": "turned from right to wrong",
}
_AGREEMENT = (
    "Answers of each policy beside those of {baseline} on the same prompts, against what is kept; bars are 95 % intervals over "
    "prompts."
)
_HIV = (
    "Importance of KV heads under each policy against that with the full cache: the variance over heads (1: unchanged), the "
    "correlation of the ranks (1: same order); and how unevenly heads keep entries (0: all alike). Bars are 95 % intervals over prompts."
)


def compare_figure(rows: Sequence[CompareRow], figures: Sequence[str], baseline: str) -> Figure | None:
    """Differences from the baseline, one row per policy, the smallest cache on top; None where nothing was compared."""
    able = [row for row in rows if any(row.figures[f].change is not None for f in figures if f in row.figures)]
    header = ["policy", "retention", *columns(figures), *(f"{name}_p_holm" for name in figures), "baseline"]
    lines = [
        [
            row.policy,
            row.retention,
            *(cell for name in figures for cell in ends(row.figures[name].change if name in row.figures else None)),
            *(row.figures[name].p_holm if name in row.figures else None for name in figures),
            baseline,
        ]
        for row in able
    ]
    return redraw("changes", csv_text(header, lines))


def consistency_figure(rows: Sequence[ConsistencyRow], reference: str) -> Figure | None:
    """Agreement with the full cache's answers against what is kept; None without answers."""
    lines = [
        [words, row.policy, row.retention, *ends(value), reference]
        for name, words in _CONSISTENCY.items()
        for row in rows
        if row.retention is not None and row.policy != reference and (value := getattr(row, name)) is not None
    ]
    return redraw("agreement", csv_text(["what", "policy", "retention", *columns(["value"]), "baseline"], lines))


def hiv_figure(changed: Mapping[str, Sequence[Changed]], heads: Sequence[SpecializationRow]) -> Figure | None:
    """What compression does to the importance of KV heads, and how unevenly heads keep; None without figures."""
    lines: list[list[Any]] = []
    for pattern, rows in changed.items():
        of = f" ({pattern})" if len(changed) > 1 else ""
        mine = [row for row in rows if row.level == "kv_heads" and row.measure == _measure(rows)]
        lines += [[f"variance over full's{of}", r.policy, r.retention, *ends(r.ratio)] for r in mine if r.ratio]
        lines += [[f"rank correlation with full{of}", r.policy, r.retention, *ends(r.spearman)] for r in mine if r.spearman]
        kept = [(r, r.kept["gini"]) for r in heads if r.pattern == pattern and "gini" in r.kept]
        lines += [[f"Gini of entries kept{of}", r.policy, r.retention, *ends(value)] for r, value in kept]
    return redraw("hiv_curves", csv_text(["what", "policy", "retention", *columns(["value"])], lines))


def _measure(rows: Sequence[Changed]) -> str:
    """The measure that is drawn: the gain, else the first."""
    names = [row.measure for row in rows]
    return "gain" if "gain" in names else names[0] if names else ""


def redraw(stem: str, data: str, names: Names | None = None) -> Figure | None:
    """Draw a figure from its own data; None where there is nothing in it.

    Parameters
    ----------
    stem : str
        Of `REDRAWN`: name of its files.
    data : str
        CSV as it lies beside the figure.
    names : dict of str to (str, str), optional
        Policy text -> what a study calls it, and the name of the line that it is on.
    """
    lines = list(csv.DictReader(io.StringIO(data)))
    return REDRAWN[stem](lines, data, names or {}) if lines else None


def _changes(lines: Sequence[Line], data: str, names: Names) -> Figure:
    """The forest plot of a comparison."""
    figures = [key.removesuffix("_p_holm") for key in lines[0] if key.endswith("_p_holm")]
    baseline = _baseline(lines)
    able = sorted(lines, key=lambda line: (_number(line["retention"]) or 0.0, line["policy"]))
    shown = able[:MOST_ROWS]
    label_of = {text: label for text, (label, _) in names.items()}
    labels = figure_names([line["policy"] for line in shown], label_of)
    ticks = [wrapped(f"{labels[line['policy']]} ({100 * (_number(line['retention']) or 0):.3g} %)", 44) for line in shown]
    methods = list(dict.fromkeys(_line_of(line["policy"], names) for line in shown))

    def draw(canvas: Canvas) -> None:
        panels = canvas.subplots(1, len(figures), squeeze=False, sharey=True)[0]
        for axes, name in zip(panels, figures, strict=True):
            for place, line in enumerate(shown):
                _one_change(axes, place, line, name, methods.index(_line_of(line["policy"], names)))
            axes.axvline(0.0, color=GREY, linestyle="--", linewidth=1)
            axes.set_xlabel(f"{WORDS.get(name, name)},\nminus {baseline}")
        panels[0].set_yticks(range(len(shown)), ticks, fontsize=7)
        panels[0].invert_yaxis()

    left = f" {len(shown)} of {len(able)} policies, the smallest caches." if len(shown) < len(able) else ""
    caption = (
        f"Differences from {baseline} on the same prompts, with 95 % intervals over prompts; right of the line is better (of losses: "
        f"left). Filled: differs by a paired test (p < {LEVEL:g} after Holm's correction). In brackets: entries kept."
        f"{_shared(shown, label_of)}{left}"
    )
    deep = sum(max(1.0, 0.8 * (tick.count("\n") + 1)) for tick in ticks)
    wide = 0.6 + 0.058 * max(len(part) for tick in ticks for part in tick.split("\n"))
    size = (wide + 2.9 * len(figures), 1.0 + 0.17 * max(6.0, deep))
    return _figure("changes", f"Differences from {baseline}", caption, data, draw, size)


def _one_change(axes: Axes, place: int, line: Line, name: str, index: int) -> None:
    mean, p = _number(line[name]), _number(line[f"{name}_p_holm"])
    if mean is None:
        return
    axes.errorbar(
        [mean],
        [place],
        xerr=bars([mean], [_number(line[f"{name}_low"])], [_number(line[f"{name}_high"])]),
        color=COLOURS[index % len(COLOURS)],
        marker=MARKERS[index % len(MARKERS)],
        markerfacecolor=None if p is not None and p < LEVEL else "white",
        markersize=5,
        elinewidth=0.9,
    )


def _agreement(lines: Sequence[Line], data: str, names: Names) -> Figure:
    baseline = _baseline(lines)
    return _panels(
        "agreement", f"Consistency with {baseline}", _AGREEMENT.format(baseline=f"the {baseline} cache"), lines, data, names
    )


def _hiv_curves(lines: Sequence[Line], data: str, names: Names) -> Figure:
    return _panels("hiv_curves", "Head importance before and after compression", _HIV, lines, data, names)


def _panels(name: str, title: str, caption: str, lines: Sequence[Line], data: str, names: Names) -> Figure:
    """Draw values against the kept share, a panel per value and a line per method."""
    whats = list(dict.fromkeys(line["what"] for line in lines))
    methods = list(dict.fromkeys(_line_of(line["policy"], names) for line in lines if line["policy"] != "full"))
    shown = methods[:MOST_LINES]
    labels = figure_names(shown, {key: key for _, key in names.values()})
    left = f" {len(shown)} of {len(methods)} methods; the data has all." if len(shown) < len(methods) else ""
    columns_ = min(3, len(whats))
    rows_ = -(-len(whats) // columns_)
    panels = {what: [line for line in lines if line["what"] == what] for what in whats}

    def draw(canvas: Canvas) -> None:
        grid = canvas.subplots(rows_, columns_, squeeze=False).ravel()
        for axes, what in zip(grid, whats, strict=False):
            _panel(axes, panels[what], shown, labels, names)
            axes.set_title(wrapped(what, 38), fontsize=8)
        for axes in grid[len(whats) :]:
            axes.set_axis_off()
        figure_legend(canvas, list(grid), 3)

    curves = {what: _curves(panels[what], shown, labels, names) for what in whats}
    alike = alike_words({what: coinciding(found) for what, found in curves.items()})
    texts = [{"policy": method} for method in shown]
    shared = _shared(texts, {key: key for _, key in names.values()})
    longest = max((len(labels[method]) for method in shown), default=1)
    per_line = max(1, min(3, int(3.5 * columns_ / (0.55 + 0.065 * longest))))
    size = (3.5 * columns_, 2.7 * rows_ + 0.22 * -(-(len(shown) + 1) // per_line) + 0.3)
    said = f"{caption} Lines are moved apart a little sideways.{alike}{shared}{left}"
    return _figure(name, title, said, data, draw, size)


def _curves(
    lines: Sequence[Line], methods: Sequence[str], labels: Mapping[str, str], names: Names
) -> dict[str, dict[Any, float]]:
    found: dict[str, dict[Any, float]] = {}
    for line in lines:
        method, value = _line_of(line["policy"], names), _number(line["value"])
        alone = line["policy"] not in names or names[line["policy"]][0] == method  # a group has several points at one place
        if method in methods and value is not None and alone:
            found.setdefault(labels[method], {})[line["retention"]] = value
    return found


def _panel(axes: Axes, lines: Sequence[Line], methods: Sequence[str], labels: Mapping[str, str], names: Names) -> None:
    able = [line for line in lines if _number(line["value"]) is not None]
    key: Callable[[Line], float] = lambda line: _number(line["retention"]) or 0.0  # noqa: E731
    span = span_of(key(line) for line in able if line["policy"] != "full")
    for index, method in enumerate(methods):
        mine = sorted((line for line in able if _line_of(line["policy"], names) == method), key=key)
        if mine:
            means = [_number(line["value"]) or 0.0 for line in mine]
            spread = bars(means, [_number(line["value_low"]) for line in mine], [_number(line["value_high"]) for line in mine])
            style: dict[str, Any] = line_style(method, methods)
            if any(names[line["policy"]][0] != method for line in mine if line["policy"] in names):  # a group: no curve
                style["linestyle"] = ""
            x = apart([100 * key(line) for line in mine], index, len(methods), span)
            axes.errorbar(x, means, yerr=spread, label=labels[method], elinewidth=0.7, **style)
    for line in able:
        if line["policy"] == "full":
            axes.axhline(_number(line["value"]) or 0.0, color=GREY, linestyle="--", linewidth=1, label="full cache")
    shares = sorted({100 * key(line) for line in able if line["policy"] != "full"})
    if shares and shares[0] > 0 and shares[-1] > 1.05 * shares[0]:
        log_axis(axes, shares, 6)
    elif shares:  # one retention: nothing to spread
        axes.set_xlim(0.0, max(1.0, 2 * shares[-1]))
    axes.set_xlabel("entries kept (%, log scale)" if axes.get_xscale() == "log" else "entries kept (%)", fontsize=7)


def _figure(
    name: str, title: str, caption: str, data: str, draw: Callable[[Canvas], None], size: tuple[float, float]
) -> Figure:
    rows = list(csv.reader(io.StringIO(data)))
    return make_figure(name, title, caption, (rows[0], rows[1:]), draw, size, font_size=8)


def _shared(lines: Sequence[Line], named: Mapping[str, str]) -> str:
    found = shared_settings([line["policy"] for line in lines], named)
    return f" All of them: {', '.join(found)}." if found else ""


def _line_of(policy: str, names: Names) -> str:
    """Name of the line that a policy is on: of the study, else its text without paths and budget."""
    return names[policy][1] if policy in names else method_of(policy)


def _baseline(lines: Sequence[Line]) -> str:
    return method_of(lines[0].get("baseline") or "full")


def _number(text: str | None) -> float | None:
    return float(text) if text else None


#: Name of a figure's files -> what draws it from its data.
REDRAWN: dict[str, Callable[[Sequence[Line], str, Names], Figure]] = {
    "changes": _changes,
    "agreement": _agreement,
    "hiv_curves": _hiv_curves,
}
