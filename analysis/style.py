"""How figures look: colours and markers that differ for everybody, and one way to save them: PNG, SVG, PDF, and their data as CSV."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtool.analysis.plain import csv_text
from kvtool.files import write_atomic, write_text
from kvtool.pictures import FORMATS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

#: Okabe-Ito
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8c6d31")
MARKERS = "osD^vPX*<>"
#: The full cache, and lines that are no policy.
GREY = "#555555"
#: Maps of values that rise, and of differences around 0; even in lightness, and read alike with any colour vision.
RISING, AROUND_ZERO = "cividis", "PuOr"
STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "font.size": 10,
    # Widths of letters are those of every format, whatever its resolution: hinted ones grow wider than they were laid out.
    "text.hinting": "none",
    "figure.constrained_layout.w_pad": 0.08,
}
ENDINGS = tuple(FORMATS)
#: Figures that differ by less are the same; groups of lines that are the same which a caption names.
SAME, MOST_ALIKE = 1e-9, 4
CONTROL = "random"


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure.

    Attributes
    ----------
    name, title, caption : str
        File name without ending; heading; how to read it.
    svg : str
        For inlining: no XML header, ids made unique by the name.
    data : str
        CSV.
    files : dict of str to bytes
        Ending -> content.
    """

    name: str
    title: str
    caption: str
    svg: str
    data: str
    files: dict[str, bytes] = field(repr=False)

    @property
    def width(self) -> int:
        """Natural width in CSS pixels; 0 if the picture does not say."""
        return self._size()[0]

    @property
    def height(self) -> int:
        """Natural height in CSS pixels; 0 if the picture does not say."""
        return self._size()[1]

    @property
    def endings(self) -> list[str]:
        """Endings of the files that `save` writes."""
        return [*self.files, *(["csv"] if self.data else [])]

    def _size(self) -> tuple[int, int]:
        found = re.search(r'viewBox="[\d.-]+ [\d.-]+ ([\d.]+) ([\d.]+)', self.svg)
        return (round(float(found[1]) * 96 / 72), round(float(found[2]) * 96 / 72)) if found else (0, 0)

    def save(self, folder: Path) -> None:
        """Write PNG, SVG, PDF and CSV atomically, as far as there are such."""
        for ending, content in self.files.items():
            write_atomic(folder / f"{self.name}.{ending}", lambda file, content=content: file.write(content))  # type: ignore[misc]
        if self.data:
            write_text(folder / f"{self.name}.csv", self.data)


def make_figure(
    name: str,
    title: str,
    caption: str,
    data: tuple[Sequence[str], Sequence[Sequence[Any]]],
    draw: Callable[[Canvas], None],
    size: tuple[float, float] = (7.2, 4.2),
    quick: bool = False,
    **style: Any,
) -> Figure:
    """Draw a figure once and render it in every format.

    Parameters
    ----------
    name, title, caption : str
    data : tuple of header and lines
        What is drawn, for the CSV beside it.
    draw : callable
        Fills the empty canvas.
    size : tuple of float
        Inches.
    quick : bool
        Fixed margins instead of a fitted layout, which takes seconds for dozens of panels.
    **style
        Over `STYLE`; underscores stand for dots.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with matplotlib.rc_context(
        {**STYLE, "svg.hashsalt": name, **{key.replace("_", "."): value for key, value in style.items()}}
    ):
        canvas = plt.figure(figsize=size, layout="none" if quick else "constrained")
        draw(canvas)
        if quick:
            sides = {"left": 0.55 / size[0], "right": 1 - 0.1 / size[0], "bottom": 1.05 / size[1], "top": 1 - 0.3 / size[1]}
            canvas.subplots_adjust(**sides, wspace=0.15, hspace=0.6)
        else:
            # Laid out once: every format would do it again.
            canvas.canvas.draw()
            canvas.set_layout_engine("none")
        files = {ending: render(canvas, ending) for ending in ENDINGS}
        plt.close(canvas)
    return Figure(name, title, caption, inline(files["svg"].decode(), name, title), csv_text(*data), files)


def render(canvas: Canvas, ending: str, dpi: int = 150) -> bytes:
    """Return a canvas as a file; without date, so that the same data gives the same file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_pdf import FigureCanvasPdf
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.BytesIO()
    metadata = FORMATS[ending]
    # Not savefig, which draws everything twice.
    if ending == "png":
        canvas.dpi = dpi
        FigureCanvasAgg(canvas).print_png(buffer, metadata=metadata)
    elif ending == "svg":
        FigureCanvasSVG(canvas).print_svg(buffer, metadata=metadata)
    else:
        FigureCanvasPdf(canvas).print_pdf(buffer, metadata=metadata)
    return buffer.getvalue()


def inline(svg: str, name: str, title: str) -> str:
    """Cut the XML header and metadata, make ids unique within the page, drop what is not needed, and let the page set the size."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.S)
    used = {each: f"{name}-{i}" for i, each in enumerate(dict.fromkeys(re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', svg)))}
    seen = set[str]()

    def unique(found: re.Match[str]) -> str:
        # Nothing refers to most ids; pictures of equal content share one, and what is referred to is the first.
        if found[1] not in used or found[1] in seen:
            return ""
        seen.add(found[1])
        return f' id="{used[found[1]]}"'

    svg = re.sub(r'\s+id="([^"]+)"', unique, svg)
    svg = re.sub(r'(xlink:href="#|url\(#)([^")]+)', lambda found: found[1] + used[found[2]], svg)
    svg = re.sub(r"(\d\d\.\d)\d+", r"\1", svg)
    svg = re.sub(r"(\d+\.\d\d)\d+", r"\1", svg)
    svg = re.sub(r' transform="rotate\(-?0 [^)]*\)"', "", svg)
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    svg = _one_path(_one_font(svg))
    for _ in range(3):  # groups of one thing each, from the inside
        svg = re.sub(r"<g>\s*(<(?:use|path|image|text)\b[^<]*(?:/>|</text>))\s*</g>", r"\1", svg)
        svg = re.sub(r"<g>\s*</g>\s*|<defs>\s*</defs>\s*", "", svg)
    svg = re.sub(r'<svg([^>]*?) width="[^"]*"', r"<svg\1", svg, count=1)
    label = title.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return re.sub(r'<svg([^>]*?) height="[^"]*"', rf'<svg\1 role="img" aria-label="{label}"', svg, count=1)


def _one_path(svg: str) -> str:
    """Join lines that follow each other and look alike, such as error bars, into one path each."""

    def join(found: re.Match[str]) -> str:
        lines = re.findall(r'd="([^"]*)"', found[0])
        return f'<path d="{" ".join(line.strip() for line in lines)}"{found[1]}'

    # Filled or half-transparent ones would look otherwise where they cross.
    line = r'<path d="[^"]*"'
    alike = rf'{line}((?: clip-path="[^"]*")? style="fill: none; stroke: #\w+; stroke-width: [\d.]+"/>)(?:\n{line}\1)+'
    return re.sub(alike, join, svg)


def _one_font(svg: str) -> str:
    """Name the fonts once for the whole picture instead of with every text; they are a third of the file."""
    fonts = re.findall(r"font-family: ([^;\"]*)", svg)
    if not fonts or len(set(fonts)) > 1:
        return svg
    svg = re.sub(r"; font-family: [^;\"]*|font-family: [^;\"]*; ?", "", svg)
    return svg.replace("<svg", f'<svg font-family="{fonts[0]}"', 1)


def line_style(name: str, names: Sequence[str]) -> dict[str, Any]:
    """Return colour, marker and line of one of several names; the random control is dotted."""
    index = list(names).index(name)
    line = ":" if name.split(":")[0].split(" ")[0] == CONTROL else "-" if index < len(COLOURS) else "--"
    # Later ones are smaller, so that those below them can still be seen.
    size = max(3.5, 7.0 - 0.5 * index)
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": line,
        "markersize": size,
    }


def apart(x: Sequence[float], index: int, n: int, span: float = 4.0) -> list[float]:
    """Return places moved sideways on a logarithmic axis, so that the `index`-th of `n` lines that coincide can still be seen.

    Ticks stay where the values are.

    Parameters
    ----------
    x : sequence of float
    index, n : int
    span : float
        Largest over smallest value of the axis: all lines together take 5 % of it.
    """
    share = 0.0 if n < 2 else 2 * index / (n - 1) - 1
    factor = max(span, 4.0) ** (0.025 * share)
    return [value * factor for value in x]


def span_of(x: Iterable[float]) -> float:
    """Return largest over smallest of the values above 0."""
    known = [value for value in x if value > 0]
    return max(known) / min(known) if known else 1.0


def coinciding(lines: Mapping[str, Mapping[Any, float]]) -> list[list[str]]:
    """Return groups of names whose lines are the same wherever both have points, at two places at least.

    Parameters
    ----------
    lines : dict of str to dict
        Name -> place on the axis -> value.
    """

    def same(first: Mapping[Any, float], second: Mapping[Any, float]) -> bool:
        common = first.keys() & second.keys()
        return len(common) > 1 and all(abs(first[place] - second[place]) < SAME for place in common)

    groups: list[list[str]] = []
    for name, line in lines.items():
        mine = next((group for group in groups if all(same(line, lines[other]) for other in group)), None)
        if mine is None:
            groups.append([name])
        else:
            mine.append(name)
    return [group for group in groups if len(group) > 1]


def alike_words(found: Mapping[str, Sequence[Sequence[str]]]) -> str:
    """Return a sentence on the lines that coincide, for a caption; empty where there are none.

    Parameters
    ----------
    found : dict of str to groups of names
        Panel -> what `coinciding` says of it.
    """
    by_group: dict[tuple[str, ...], list[str]] = {}
    for panel, groups in found.items():
        for group in groups:
            by_group.setdefault(tuple(group), []).append(panel)
    if not by_group:
        return ""
    often = sorted(by_group.items(), key=lambda item: (-len(item[1]), -len(item[0])))
    said = [_equal(group) + _where(panels, len(found)) for group, panels in often[:MOST_ALIKE]]
    more = f"; {len(often) - MOST_ALIKE} more group{'s' * (len(often) > MOST_ALIKE + 1)}" if len(often) > MOST_ALIKE else ""
    return f" The same at every point: {'; '.join(said)}{more}."


def _equal(names: Sequence[str]) -> str:
    """Return names joined by equality signs; of many the first and the last."""
    return " = ".join(names) if len(names) < 5 else f"{names[0]} = … = {names[-1]} ({len(names)} of them)"


def _where(panels: Sequence[str], n: int) -> str:
    if len(panels) == n:
        return "" if n == 1 else " (everywhere)"
    return f" ({'; '.join(panels)})" if len(panels) < 3 else f" (in {len(panels)} of {n} panels)"


def log_axis(axes: Axes, values: Sequence[float], most: int = 9) -> None:
    """A logarithmic x axis with a plain label at each of `values`, as far as `most` of them fit side by side."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

    known = sorted({value for value in values if value > 0})
    if not known:
        return
    ticks: list[float] = []
    gap = max(1.1, (known[-1] / known[0]) ** (1 / most))
    for value in known:
        if not ticks or value > gap * ticks[-1]:
            ticks.append(value)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}" if value < 1000 else f"{value:.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def bars(means: Sequence[float], lows: Sequence[float | None], highs: Sequence[float | None]) -> Any:
    """Return error bars for matplotlib; figures without an interval have none."""
    down = [0.0 if low is None or low != low else max(0.0, mean - low) for mean, low in zip(means, lows, strict=True)]
    up = [0.0 if high is None or high != high else max(0.0, high - mean) for mean, high in zip(means, highs, strict=True)]
    return [down, up]


def _fitting(canvas: Canvas, labels: Sequence[str]) -> int:
    """Columns of a legend of 8 points that fit side by side; long names would stand out at both sides."""
    return max(1, int(canvas.get_figwidth() / (0.55 + 0.065 * max(map(len, labels)))))


def figure_legend(canvas: Canvas, axes: Sequence[Axes], columns: int = 4) -> None:
    """One legend below all panels, of every label that occurs in any of them."""
    handles: dict[str, Any] = {}
    for each in axes:
        for handle, label in zip(*each.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        canvas.legend(
            list(handles.values()),
            list(handles),
            loc="outside lower center" if canvas.get_layout_engine() else "lower center",
            ncols=min(columns, len(handles), _fitting(canvas, list(handles))),
            frameon=False,
            fontsize=8,
        )
