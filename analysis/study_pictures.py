"""Figures and pages that the stages of a study have made themselves, as they lie in their folders."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from kvtool.analysis.look_figures import REDRAWN, redraw
from kvtool.analysis.points import Point
from kvtool.analysis.study import StudyData
from kvtool.analysis.study_counts import behind, prompts_of, study_words
from kvtool.analysis.style import ENDINGS, Figure, inline

#: Kind of stage -> name of its picture -> what it is called and how to read it; other pictures are left to the stage's folder.
PICTURES: dict[str, dict[str, tuple[str, str]]] = {
    "classify": {
        "heads_reliability": (
            "Can the heads' labels be trusted?",
            "Reliability diagram: confidence of a label against the share of held-out halves of the prompts that give the head the same "
            "one. On the diagonal it is as promised, below it promises too much; the lower panel counts pairs.",
        )
    },
    "gaps": {
        "gaps": (
            "Gap decomposition",
            "Predicted harm of each policy in parts: grey cannot be helped (the oracle's own), selection wants a better score, price "
            "another shape of the budgets, allocation other budgets of the same shape, protection smaller sink and window.",
        )
    },
    "importance": {"importance": ("Importance of heads", "Layer x head by each measure; compare the brightest cells.")},
    "hiv": {
        "hiv_curves": ("Head importance before and after compression", "The HIV test: what compression moves between heads.")
    },
    "compensation": {
        "causes": ("Why representatives lose", "Causes of the loss, stacked; marks: what else the same bytes could hold."),
        "heads": ("Where representatives lose", "Layer x head against evicting alone: purple gains, orange loses."),
    },
    "stress": {"endless": ("Endless decoding", "Flat bytes and a loss that does not rise mean that the cache still works.")},
    "search": {"search": ("What the search saw", "Every setting that was tried, and the choice on other prompts.")},
    "compare": {
        "changes": (
            "Against the baseline",
            "Differences on the same prompts, with 95 % intervals; right of the line is better.",
        )
    },
    "consistency": {"agreement": ("The full cache's answers", "How often and how far answers are those of the full cache.")},
    "needles": {
        "niah": (
            "Needles",
            "Where in the prompt the needle was, and whether it was found. With a single length or many policies: a line per policy, "
            "depth of the needle to the right, one map per length; else a map per policy, length to the right, depth downwards. Colour "
            "and number: mean score; × could not run, a dot: nothing was free to be chosen.",
        )
    },
}
#: Of one kind, as many cells are drawn in the report; the pictures of the others are linked to.
MOST_CELLS = 8
#: Kind of stage -> its page for readers.
PAGES = {"analyze": "report.html", "consistency": "review.html"}


def pictures(data: StudyData, *kinds: str) -> list[Figure]:
    """Return the pictures of some kinds of stages, with the files that lie beside them; those that name policies by the study's names."""
    names = study_names(data)
    return [figure for kind in kinds for figure in _of_kind(data, kind, names)]


def study_names(data: StudyData) -> dict[str, tuple[str, str]]:
    """Return policy text -> name in the study, and the name of its line: the group of those with their own number of entries."""
    return {point.policy: (point.label, line_name(point)) for place in data.places for point in place.points}


def line_name(point: Point) -> str:
    """Return what the line of a point is called: its method, and for one with its own number of entries its group."""
    return point.label if point.share or not point.group else point.group


def _of_kind(data: StudyData, kind: str, names: dict[str, tuple[str, str]]) -> Iterator[Figure]:
    for number, (title, folder) in enumerate(data.folders.get(kind, [])[:MOST_CELLS]):
        for stem, (heading, caption) in PICTURES[kind].items():
            path = folder / f"{stem}.svg"
            if not path.exists():
                continue
            name, heading = f"{kind}_{number}_{stem}", f"{heading} {title}" if heading.endswith("?") else f"{heading}: {title}"
            table = path.with_suffix(".csv")
            rows = table.read_text(encoding="utf-8") if table.exists() else ""
            drawn = redraw(stem, rows, names) if stem in REDRAWN and rows else None
            if drawn is not None:
                svg, n = inline(drawn.files["svg"].decode(), name, heading), prompts_of(data, title)
                said = drawn.caption.replace("intervals over prompts", f"intervals over {n} prompts") if n else drawn.caption
                yield replace(drawn, name=name, title=heading, caption=said, svg=svg)
                continue
            text = study_words(path.read_text(encoding="utf-8"), stem, title, data, rows)
            svg = inline(text, name, heading)
            files = {end: found.read_bytes() for end in ENDINGS if (found := path.with_suffix(f".{end}")).exists()}
            said = _cells(rows) if kind == "needles" else behind(stem, folder, rows)
            yield Figure(name, heading, caption + said, svg, rows, files | {"svg": text.encode()})


def _cells(rows: str) -> str:
    """Say how many prompts stand behind a cell of a needle test."""
    counts = sorted({int(line["n"]) for line in csv.DictReader(io.StringIO(rows)) if line["n"] != "0"})
    if not counts:
        return ""
    return f" {counts[0]} prompts a cell." if counts[0] == counts[-1] else f" {counts[0]} to {counts[-1]} prompts a cell."


def links(data: StudyData, out: Path, kind: str) -> list[tuple[str, str]]:
    """Return title and address, relative to the report, of the pages of single cells."""
    return _addresses(((title, folder / PAGES[kind]) for title, folder in data.folders.get(kind, [])), out)


def left_out(data: StudyData, out: Path, *kinds: str) -> list[tuple[str, str]]:
    """Return title and address of the pictures of cells that the report does not draw, as it draws `MOST_CELLS` of a kind."""
    cells = [(kind, *cell) for kind in kinds for cell in data.folders.get(kind, [])[MOST_CELLS:]]
    files = (
        (f"{heading}: {title}", folder / f"{stem}.svg")
        for kind, title, folder in cells
        for stem, (heading, _) in PICTURES[kind].items()
    )
    return _addresses(files, out)


def _addresses(found: Iterable[tuple[str, Path]], out: Path) -> list[tuple[str, str]]:
    return [(title, Path(os.path.relpath(path.resolve(), out.resolve())).as_posix()) for title, path in found if path.exists()]
