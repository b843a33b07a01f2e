"""Figures of a study's other stages: perplexity against context, windows by head kind, compensation blocks, time and memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from kvtool.analysis.study import StudyData
from kvtool.analysis.style import COLOURS, GREY, MARKERS, Figure, bars, figure_legend, line_style, log_axis, make_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

Row = dict[str, Any]
#: Names of the study of windows by head kind.
_PLAIN = re.compile(r"^[A-Z]_(window|streaming)_(\d+)$")
_THRESHOLD = re.compile(r"^G_conf([\d.]+)_base(\d+)$")
_KINDS = re.compile(r"^([IJ])_pos(\d+)_mix(\d+)_g(\d+)$")
_WITH_SINKS = {"window": "window only", "streaming": "sinks and window"}
#: Bars of the best configurations.
MOST_BARS = 14
#: Metric of a stress row -> axis label.
STRESS_PANELS = {
    "kv_mb": "KV cache (MB)",
    "peak_mb": "peak above the model (MB)",
    "ttft_s": "time to first token (s)",
    "tpot_ms": "time per token (ms)",
    "tokens_per_s": "tokens per second",
}


def series_figures(data: StudyData) -> list[Figure]:
    """Draw all figures that the rows of perplexity, stress and compensation allow."""
    return [*_perplexity(data), *_blocks(data), *_stress(data)]


def _perplexity(data: StudyData) -> Iterator[Figure]:
    read = [row for row in data.rows if row.get("perplexity") is not None and row["series"] == ""]
    places = list(dict.fromkeys((row["stage"], row["model"], row["task"], row["length"]) for row in read))
    for number, place in enumerate(places):
        rows = [row for row in read if (row["stage"], row["model"], row["task"], row["length"]) == place]
        title = f"{place[1]}, {place[2]}, {place[3]} tokens"
        for make in (_context, _sinks, _thresholds, _inverse, _best):
            figure = make(rows, title, number)
            if figure is not None:
                yield figure


def _data(rows: Sequence[Row]) -> tuple[list[str], list[list[Any]]]:
    header = [
        "model",
        "task",
        "length",
        "group",
        "label",
        "policy",
        "effective_context",
        "perplexity",
        "perplexity_low",
        "perplexity_high",
    ]
    header += ["perplexity_ratio", "perplexity_ratio_low", "perplexity_ratio_high", "next_token_accuracy"]
    return header, [[row.get(key) for key in header] for row in rows]


def _points(axes: Axes, rows: Sequence[Row], x: Sequence[float], key: str, label: str, style: dict[str, Any]) -> None:
    means = [float(row[key]) for row in rows]
    spread = bars(means, [row[f"{key}_low"] for row in rows], [row[f"{key}_high"] for row in rows])
    axes.errorbar(x, means, yerr=spread, label=label, elinewidth=0.7, linewidth=1.1, **style)


def _full_line(axes: Axes, rows: Sequence[Row]) -> None:
    full = next((row for row in rows if row["policy"] == "full"), None)
    if full is not None:
        axes.axhline(full["perplexity"], color=GREY, linestyle="--", linewidth=1, label="full cache")


def _plain_log(axes: Axes, rows: Sequence[Row]) -> None:
    """A logarithmic axis for perplexities that span more than a factor of three."""
    values = [row["perplexity"] for row in rows]
    if max(values) > 3 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")


def _context(rows: Sequence[Row], title: str, number: int) -> Figure | None:
    able = [row for row in rows if row.get("effective_context") and row["policy"] != "full"]
    if len(able) < 2:
        return None
    groups = list(dict.fromkeys(row["group"] or row["label"] for row in able))

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        for group in groups:
            mine = sorted((r for r in able if (r["group"] or r["label"]) == group), key=lambda r: r["effective_context"])
            _points(axes, mine, [r["effective_context"] for r in mine], "perplexity", group, line_style(group, groups))
        _full_line(axes, rows)
        log_axis(axes, [r["effective_context"] for r in able])
        _plain_log(axes, able)
        axes.set_xlabel("effective context: mean entries per KV head, sinks included (log scale)")
        axes.set_ylabel("perplexity")
        figure_legend(canvas, [axes])

    caption = "Perplexity against the entries that are held, one definition for all groups; bars are 95 % intervals. Lower left is better."
    return make_figure(f"perplexity_context_{number}", f"Perplexity against context: {title}", caption, _data(rows), draw)


def _pairs(rows: Sequence[Row], form: re.Pattern[str]) -> list[tuple[Row, re.Match[str]]]:
    """Rows whose label, or one of the others that mean the same policy, has a form."""
    found = []
    for row in rows:
        for name in (row["label"], *str(row["also"] or "").split(" ")):
            match = form.match(name)
            if match:
                found.append((row, match))
    return found


def _sinks(rows: Sequence[Row], title: str, number: int) -> Figure | None:
    found = _pairs(rows, _PLAIN)
    kinds = list(dict.fromkeys(match[1] for _, match in found))
    if len(kinds) < 2:
        return None

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        for kind in kinds:
            mine = sorted(((int(m[2]), r) for r, m in found if m[1] == kind), key=lambda pair: pair[0])
            style = line_style(kind, kinds)
            _points(axes, [r for _, r in mine], [w for w, _ in mine], "perplexity", _WITH_SINKS[kind], style)
        _full_line(axes, rows)
        log_axis(axes, [float(m[2]) for _, m in found])
        _plain_log(axes, [r for r, _ in found])
        axes.set_xlabel("window (entries)")
        axes.set_ylabel("perplexity")
        figure_legend(canvas, [axes])

    caption = "The same windows with and without the first entries of the text (sinks). The gap is what the sinks are worth."
    return make_figure(f"sinks_{number}", f"What sinks are worth: {title}", caption, _data([r for r, _ in found]), draw)


def _thresholds(rows: Sequence[Row], title: str, number: int) -> Figure | None:
    found = _pairs(rows, _THRESHOLD)
    bases = sorted({int(match[2]) for _, match in found})
    if len(found) < 3:
        return None

    def draw(canvas: Canvas) -> None:
        above, below = canvas.subplots(2, 1, sharex=True)
        for index, base in enumerate(bases):
            mine = sorted(((float(m[1]), r) for r, m in found if int(m[2]) == base), key=lambda pair: pair[0])
            style = line_style(str(base), [str(b) for b in bases])
            x = [threshold for threshold, _ in mine]
            _points(above, [r for _, r in mine], x, "perplexity", f"base window {base}", style)
            below.plot(x, [r["effective_context"] for _, r in mine], **style)
            plain = next((r for r, m in _pairs(rows, _PLAIN) if m[1] == "streaming" and int(m[2]) == base), None)
            if plain:
                above.axhline(
                    plain["perplexity"], color=COLOURS[index], linestyle=":", linewidth=1, label=f"StreamingLLM {base}"
                )
        above.set_ylabel("perplexity")
        below.set_ylabel("effective context")
        below.set_xlabel("confidence from which a head's kind decides its window")
        figure_legend(canvas, [above])

    caption = (
        "Windows by head kind for heads of at least this confidence, the base window for the others; dotted: "
        "StreamingLLM with that window."
    )
    return make_figure(
        f"confidence_{number}", f"Confidence threshold: {title}", caption, _data([r for r, _ in found]), draw, (6.8, 5.0)
    )


def _inverse(rows: Sequence[Row], title: str, number: int) -> Figure | None:
    found = _pairs(rows, _KINDS)
    plain = sorted((r for r, m in _pairs(rows, _PLAIN) if m[1] == "streaming"), key=lambda r: r["effective_context"] or 0.0)
    if len(found) < 2 or not plain:
        return None

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        style = {"color": COLOURS[0], "marker": MARKERS[0], "linestyle": "-", "markersize": 4.5}
        _points(axes, plain, [r["effective_context"] for r in plain], "perplexity", "StreamingLLM", style)
        for index, (row, match) in enumerate(found):
            own = {"color": COLOURS[1 + index % 6], "marker": MARKERS[1 + index % 9], "linestyle": "", "markersize": 6}
            _points(axes, [row], [row["effective_context"]], "perplexity", match[0], own)
        _full_line(axes, rows)
        log_axis(axes, [r["effective_context"] for r in (*plain, *(r for r, _ in found))])
        axes.set_xlabel("effective context (entries per head, sinks included)")
        axes.set_ylabel("perplexity")
        figure_legend(canvas, [axes], 3)

    caption = (
        "Wide windows for positional heads (I) or few for gathering ones (J), against StreamingLLM. Below its line "
        "is better at equal memory."
    )
    return make_figure(
        f"inverse_{number}", f"Inverse experiment: {title}", caption, _data([*plain, *(r for r, _ in found)]), draw, (7.2, 4.8)
    )


def _best(rows: Sequence[Row], title: str, number: int) -> Figure | None:
    able = [
        row
        for row in rows
        if row["policy"] != "full" and row.get("effective_context") and "never evicts" not in str(row["note"] or "")
    ]
    if len(able) < 4:
        return None
    best = sorted(able, key=lambda row: row["perplexity"])[:MOST_BARS]

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        names = [f"{row['label']}  ({row['effective_context']:.0f})" for row in best]
        means = [float(row["perplexity"]) for row in best]
        spread = bars(means, [row["perplexity_low"] for row in best], [row["perplexity_high"] for row in best])
        groups = list(dict.fromkeys(row["group"] for row in best))
        colours = [COLOURS[groups.index(row["group"]) % len(COLOURS)] for row in best]
        axes.barh(range(len(best)), means, xerr=spread, color=colours, error_kw={"elinewidth": 0.8})
        axes.set_yticks(range(len(best)), names, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel("perplexity (in brackets: effective context)")
        axes.grid(axis="y", visible=False)

    caption = (
        f"The {len(best)} best of {len(able)} configurations that evict, by perplexity, with 95 % intervals; colour: group. "
        "Compare at equal context."
    )
    return make_figure(
        f"best_{number}", f"Best configurations: {title}", caption, _data(best), draw, (7.2, 0.6 + 0.28 * len(best))
    )


def _settings(policy: str) -> dict[str, str]:
    """Settings of a policy's text form; window and block size as they are, defaults included."""
    from kvtool.policies import Policy

    own = dict(item.partition("=")[::2] for item in policy.partition(":")[2].split(","))
    parsed = Policy.parse(policy)
    own["window"] = str(getattr(parsed.method, "window", own.get("window", "")))
    if parsed.compensation.active:
        own["block"] = str(parsed.compensation.block)
    return own


def _blocks(data: StudyData) -> Iterator[Figure]:
    """Score against block size, one line per capacity and window; level lines are the same without compensation."""
    able = [
        row for row in data.rows if row.get("accuracy") is not None and row["policy"].startswith("snapkv") and row["budget"]
    ]
    places = list(dict.fromkeys((row["model"], row["task"], row["length"], row["compress_at"]) for row in able))
    for number, place in enumerate(places):
        rows = [r for r in able if (r["model"], r["task"], r["length"], r["compress_at"]) == place]
        parsed = [(row, _settings(row["policy"])) for row in rows]
        blocks = [(row, own) for row, own in parsed if "compensate" in own]
        if len({own.get("block") for _, own in blocks}) > 1:
            yield _block_figure(parsed, number, f"{place[0]}, {place[1]}, {place[2]} tokens")


def _block_figure(parsed: Sequence[tuple[Row, dict[str, str]]], number: int, title: str) -> Figure:
    def name(row: Row, own: dict[str, str]) -> str:
        bias = f", bias {own['bias']}" if own.get("bias", "none") != "none" else ""
        return f"capacity {row['budget']}, window {own.get('window', 'default')}{bias}"

    def size(own: dict[str, str], row: Row) -> float:
        return float(own["block"]) if own.get("block", "").isdigit() else float(row["length"] or 0)

    # A level without a curve beside it says nothing of blocks.
    groups = list(dict.fromkeys(name(row, own) for row, own in parsed if "compensate" in own))

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        for group in groups:
            style = line_style(group, groups)
            mine = sorted(
                ((size(own, r), r) for r, own in parsed if name(r, own) == group and "compensate" in own), key=lambda p: p[0]
            )
            if mine:
                _points(axes, [r for _, r in mine], [x for x, _ in mine], "accuracy", group, style)
            for row, own in parsed:
                if name(row, own) == group and "compensate" not in own:
                    axes.axhline(row["accuracy"], color=style["color"], linestyle=":", linewidth=1, label=f"{group}: without")
        log_axis(axes, [size(own, row) for row, own in parsed if "compensate" in own])
        axes.set_xlabel("evicted entries per representative (right-most: one for all)")
        axes.set_ylabel("answer accuracy")
        figure_legend(canvas, [axes], 2)

    header = ["label", "policy", "budget", "block", "accuracy", "low", "high"]
    lines = [
        [r["label"], r["policy"], r["budget"], own.get("block"), r["accuracy"], r["accuracy_low"], r["accuracy_high"]]
        for r, own in parsed
    ]
    caption = (
        "Blocks of evicted entries, each merged into one representative; dotted: the same capacity and "
        "window without. Bars are 95 % intervals."
    )
    return make_figure(f"blocks_{number}", f"Compensation blocks: {title}", caption, (header, lines), draw, (7.2, 4.8))


def _stress(data: StudyData) -> Iterator[Figure]:
    measured = [row for row in data.rows if row["series"] in ("length", "batch")]
    places = list(dict.fromkeys((row["stage"], row["model"], row["series"]) for row in measured))
    for number, place in enumerate(places):
        rows = [row for row in measured if (row["stage"], row["model"], row["series"]) == place]
        if len({row[place[2]] for row in rows}) > 1:
            yield _stress_figure(rows, place[2], number, f"{place[1]}, by {place[2]}")


def _stress_figure(rows: Sequence[Row], axis: str, number: int, title: str) -> Figure:
    labels = list(dict.fromkeys(row["label"] for row in rows))
    panels = {key: words for key, words in STRESS_PANELS.items() if any(row.get(key) is not None for row in rows)}

    def panel(axes: Axes, key: str, words: str) -> None:
        for label in labels:
            mine = sorted((r for r in rows if r["label"] == label and r.get(key) is not None), key=lambda r: r[axis])
            axes.plot([r[axis] for r in mine], [r[key] for r in mine], label=label, **line_style(label, labels))
            gone = [r[axis] for r in rows if r["label"] == label and "oom" in str(r["note"] or "")]
            axes.plot(
                gone, [axes.get_ylim()[1]] * len(gone), marker="x", linestyle="", color=line_style(label, labels)["color"]
            )
        log_axis(axes, [float(r[axis]) for r in rows])
        axes.set_ylim(bottom=0)
        axes.set_title(words, fontsize=8)
        axes.set_xlabel("prompt tokens" if axis == "length" else "batch")

    def draw(canvas: Canvas) -> None:
        columns = min(3, len(panels))
        grid = canvas.subplots(-(-len(panels) // columns), columns, squeeze=False).ravel()
        for axes, (key, words) in zip(grid, panels.items(), strict=False):
            panel(axes, key, words)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        figure_legend(canvas, list(grid), 3)

    header = ["label", "policy", axis, *panels, "note"]
    caption = "Medians on the machine that ran it; crosses: out of memory. Flat is the aim of a compressed cache."
    lines = [[row.get(key) for key in header] for row in rows]
    draws: Callable[[Canvas], None] = draw
    return make_figure(
        f"stress_{number}", f"Memory and speed: {title}", caption, (header, lines), draws, (9.0, 5.6), font_size=8
    )
