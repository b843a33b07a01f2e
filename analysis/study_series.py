"""Figures of a study's other stages: perplexity against context, windows by head kind, compensation blocks, time and memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from kvtool.analysis.study import StudyData
from kvtool.analysis.study_counts import segments_of
from kvtool.analysis.study_same import same_read
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
from kvtool.naming import wrapped

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
    several = len({place[0] for place in places}) > 1
    for number, place in enumerate(places):
        rows = [row for row in read if (row["stage"], row["model"], row["task"], row["length"]) == place]
        title = f"{place[1]}, {place[2]}, {place[3]} tokens" + (f", stage {place[0]}" if several else "")
        for make in (_context, _sinks, _thresholds, _inverse, _best):
            figure = make([{**row, "segments": segments_of(data, place)} for row in rows], title, number)
            if figure is not None:
                yield figure


def _data(rows: Sequence[Row]) -> tuple[list[str], list[list[Any]]]:
    header = ["model", "task", "length", "group", "label", "policy", "effective_context"]
    header += ["perplexity", "perplexity_low", "perplexity_high"]
    header += ["perplexity_ratio", "perplexity_ratio_low", "perplexity_ratio_high", "next_token_accuracy"]
    return header, [[row.get(key) for key in header] for row in rows]


def _points(axes: Axes, rows: Sequence[Row], x: Sequence[float], key: str, label: str, style: dict[str, Any]) -> None:
    means = [float(row[key]) for row in rows]
    spread = bars(means, [row[f"{key}_low"] for row in rows], [row[f"{key}_high"] for row in rows])
    axes.errorbar(x, means, yerr=spread, label=label, elinewidth=0.7, linewidth=1.1, **style)


def _tokens(rows: Sequence[Row]) -> str:
    """What stands behind a perplexity."""
    counts = [int(row["n"]) for row in rows if row.get("n")]
    pieces = next((f"{row['segments']} " for row in rows if row.get("segments")), "")
    return (
        f"Bars are 95 % intervals over {pieces}pieces of the text, {max(counts)} tokens."
        if counts
        else "Bars are 95 % intervals."
    )


def _same(rows: Sequence[Row]) -> str:
    """Name the rows of one text whose figures are the same."""
    return alike_words({"": same_read(rows)})


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
    span = span_of(row["effective_context"] for row in able)

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        for group in groups:
            mine = sorted((r for r in able if (r["group"] or r["label"]) == group), key=lambda r: r["effective_context"])
            x = apart([r["effective_context"] for r in mine], groups.index(group), len(groups), span)
            _points(axes, mine, x, "perplexity", group, line_style(group, groups))
        _full_line(axes, rows)
        log_axis(axes, [r["effective_context"] for r in able])
        _plain_log(axes, able)
        axes.set_xlabel("effective context: mean entries per KV head, sinks included (log scale)")
        axes.set_ylabel("perplexity")
        figure_legend(canvas, [axes])

    caption = (
        f"Perplexity against the entries that are held, one definition for all groups. {_tokens(able)} Lower left is better. "
        f"Groups are moved apart a little sideways.{_same(able)}"
    )
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
        axes.set_xlabel("window (entries, log scale)")
        axes.set_ylabel("perplexity")
        figure_legend(canvas, [axes])

    caption = (
        "The same windows with and without the first entries of the text (sinks). The gap is what the sinks are worth. "
        + _tokens([r for r, _ in found])
    )
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
            # Thresholds lie on a plain axis: the lines of two windows are moved apart by less than their distance.
            x = [threshold + 0.006 * (index - (len(bases) - 1) / 2) for threshold, _ in mine]
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
        f"StreamingLLM with that window. {_tokens([r for r, _ in found])}{_flat(found)}"
    )
    return make_figure(
        f"confidence_{number}", f"Confidence threshold: {title}", caption, _data([r for r, _ in found]), draw, (6.8, 5.0)
    )


def _flat(found: Sequence[tuple[Row, re.Match[str]]]) -> str:
    """Say where every threshold gives the same: the confidences of all heads lie on one side of them."""
    lines: dict[str, set[tuple[Any, ...]]] = {}
    for row, match in found:
        lines.setdefault(match[2], set()).add((row["perplexity"], row["perplexity_low"], row["effective_context"]))
    flat = [base for base, values in lines.items() if len(values) == 1]
    if not flat:
        return _same([row for row, _ in found])
    return (
        f" All thresholds of base {' and of base '.join(flat)} are the same policy here: no head whose window a kind would change has a "
        "confidence between the smallest and the largest of them, so that the curve says nothing of confidence."
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
            x = apart([row["effective_context"]], index + 1, len(found) + 1)
            _points(axes, [row], x, "perplexity", match[0], own)
        _full_line(axes, rows)
        log_axis(axes, [r["effective_context"] for r in (*plain, *(r for r, _ in found))])
        axes.set_xlabel("effective context: mean entries per KV head, sinks included (log scale)")
        axes.set_ylabel("perplexity")
        figure_legend(canvas, [axes], 3)

    drawn = [{**row, "label": match[0]} for row, match in found]  # one of several names of a policy
    caption = (
        "Wide windows for positional heads (I) or few for gathering ones (J), against StreamingLLM. Below its line "
        f"is better at equal memory. {_tokens(plain)}{_same([*plain, *drawn])}"
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
    ticks = [wrapped(f"{row['label']} ({row['effective_context']:.0f})", 36) for row in best]

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        groups = list(dict.fromkeys(row["group"] for row in rows))
        for place, row in enumerate(best):
            index = groups.index(row["group"])
            spread = bars([row["perplexity"]], [row["perplexity_low"]], [row["perplexity_high"]])
            style: dict[str, Any] = {
                "color": COLOURS[index % len(COLOURS)],
                "marker": MARKERS[index % len(MARKERS)],
                "linestyle": "",
            }
            axes.errorbar([row["perplexity"]], [place], xerr=spread, label=row["group"] or None, elinewidth=0.9, **style)
        axes.set_yticks(range(len(best)), ticks, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel("perplexity")
        figure_legend(canvas, [axes], 3)

    caption = (
        f"The {len(best)} best of {len(able)} configurations that evict, by perplexity; in brackets the entries per KV head. "
        f"Compare at equal context. {_tokens(best)}{_same(best)}"
    )
    return make_figure(
        f"best_{number}", f"Best configurations: {title}", caption, _data(best), draw, (7.2, 1.3 + 0.28 * len(best))
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
                x = apart([x for x, _ in mine], groups.index(group), len(groups), 64.0)
                _points(axes, [r for _, r in mine], x, "accuracy", group, style)
            for row, own in parsed:
                if name(row, own) == group and "compensate" not in own:
                    axes.axhline(row["accuracy"], color=style["color"], linestyle=":", linewidth=1, label=f"{group}: without")
        log_axis(axes, [size(own, row) for row, own in parsed if "compensate" in own])
        axes.set_xlabel("evicted entries per representative (log scale; right-most: one for all)")
        axes.set_ylabel("answer accuracy")
        figure_legend(canvas, [axes], 2)

    header = ["label", "policy", "budget", "block", "accuracy", "low", "high"]
    lines = [
        [r["label"], r["policy"], r["budget"], own.get("block"), r["accuracy"], r["accuracy_low"], r["accuracy_high"]]
        for r, own in parsed
    ]
    caption = (
        "Blocks of evicted entries, each merged into one representative; dotted: the same capacity and "
        f"window without. Bars are 95 % intervals over {max((r['n'] for r, _ in parsed), default=0)} prompts."
    )
    return make_figure(f"blocks_{number}", f"Compensation blocks: {title}", caption, (header, lines), draw, (7.2, 4.8))


def _stress(data: StudyData) -> Iterator[Figure]:
    measured = [row for row in data.rows if row["series"] in ("length", "batch")]
    kinds = {node["stage"]: node["kind"] for node in data.nodes}
    places = list(dict.fromkeys((row["stage"], row["model"], row["series"]) for row in measured))
    for number, place in enumerate(places):
        rows = [row for row in measured if (row["stage"], row["model"], row["series"]) == place]
        stage, model, series = place
        what = "Without a KV cache" if kinds.get(stage) == "no_cache" else "Memory and speed"
        again = any(other != stage and kinds.get(other) == kinds.get(stage) for other, _, _ in places)
        if len({row[series] for row in rows}) > 1:
            by = {"length": "length of the prompt", "batch": "batch size"}[series]
            yield _stress_figure(rows, series, number, f"{what}: {model}, by {by}" + (f", stage {stage}" if again else ""))


def _stress_figure(rows: Sequence[Row], axis: str, number: int, title: str) -> Figure:
    labels, span = list(dict.fromkeys(row["label"] for row in rows)), span_of(float(row[axis]) for row in rows)
    # What is nothing everywhere, as the bytes of no cache, is no panel.
    panels = {key: words for key, words in STRESS_PANELS.items() if any(row.get(key) for row in rows)}
    other = "batch" if axis == "length" else "length"
    fixed = sorted({int(row[other]) for row in rows if row.get(other) is not None})

    def panel(axes: Axes, key: str, words: str) -> None:
        for label in labels:
            mine = sorted((r for r in rows if r["label"] == label and r.get(key) is not None), key=lambda r: r[axis])
            x = apart([float(r[axis]) for r in mine], labels.index(label), len(labels), span)
            axes.plot(x, [r[key] for r in mine], label=label, **line_style(label, labels))
            gone = [r[axis] for r in rows if r["label"] == label and "oom" in str(r["note"] or "")]
            axes.plot(
                gone, [axes.get_ylim()[1]] * len(gone), marker="x", linestyle="", color=line_style(label, labels)["color"]
            )
        log_axis(axes, [float(r[axis]) for r in rows])
        axes.set_ylim(bottom=0)
        axes.set_ylabel(words, fontsize=8)
        axes.set_xlabel("prompt tokens (log scale)" if axis == "length" else "batch size (log scale)", fontsize=7)

    def draw(canvas: Canvas) -> None:
        columns = min(3, len(panels))
        grid = canvas.subplots(-(-len(panels) // columns), columns, squeeze=False).ravel()
        for axes, (key, words) in zip(grid, panels.items(), strict=False):
            panel(axes, key, words)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        figure_legend(canvas, list(grid), 3)

    header = ["label", "policy", axis, *panels, "note"]
    curves = {
        words: coinciding(
            {label: {r[axis]: r[key] for r in rows if r["label"] == label and r.get(key) is not None} for label in labels}
        )
        for key, words in panels.items()
    }
    at = (
        f" at {'a batch' if other == 'batch' else 'prompts'} of {fixed[0]}{' tokens' * (other == 'length')}"
        if len(fixed) == 1
        else ""
    )
    runs = sorted({int(row["n"]) for row in rows if row.get("n")})
    n = f" of {runs[0]} run{'s' * (runs[-1] > 1)}" if len(runs) == 1 else f" of {runs[0]} to {runs[-1]} runs" if runs else ""
    caption = (
        f"Medians{n} on the machine that ran them{at}; crosses: out of memory. Flat is the aim of a compressed cache. Lines are moved "
        f"apart a little sideways.{alike_words(curves)}"
    )
    lines = [[row.get(key) for key in header] for row in rows]
    draws: Callable[[Canvas], None] = draw
    return make_figure(f"stress_{number}", title, caption, (header, lines), draws, (9.0, 5.6), font_size=8)
