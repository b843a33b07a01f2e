"""Figures and pages that the stages of a study have made themselves, as they lie in their folders."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from kvtool.analysis.study import StudyData
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
    "search": {"search": ("What the search saw", "Harm of every setting that was tried, and the choice on other prompts.")},
    "compare": {
        "changes": (
            "Against the baseline",
            "Differences on the same prompts, with 95 % intervals; right of the line is better.",
        )
    },
    "consistency": {"agreement": ("The full cache's answers", "How often and how far answers are those of the full cache.")},
    "needles": {"niah": ("Needles", "Length to the right, depth of the needle downwards; colour and number: mean score.")},
}
#: Kind of stage -> its page for readers.
PAGES = {"analyze": "report.html", "consistency": "review.html"}


def pictures(data: StudyData, *kinds: str) -> list[Figure]:
    """Return the pictures of some kinds of stages, with the files that lie beside them."""
    return [figure for kind in kinds for figure in _of_kind(data, kind)]


def _of_kind(data: StudyData, kind: str) -> Iterator[Figure]:
    for number, (title, folder) in enumerate(data.folders.get(kind, [])):
        for stem, (heading, caption) in PICTURES[kind].items():
            path = folder / f"{stem}.svg"
            if path.exists():
                name, heading = f"{kind}_{number}_{stem}", f"{heading}: {title}"
                svg = inline(path.read_text(encoding="utf-8"), name, heading)
                files = {end: found.read_bytes() for end in ENDINGS if (found := path.with_suffix(f".{end}")).exists()}
                table = path.with_suffix(".csv")
                rows = table.read_text(encoding="utf-8") if table.exists() else ""
                yield Figure(name, heading, caption, svg, rows, files)


def links(data: StudyData, out: Path, kind: str) -> list[tuple[str, str]]:
    """Return title and address, relative to the report, of the pages of single cells."""
    found = [(title, folder / PAGES[kind]) for title, folder in data.folders.get(kind, [])]
    return [(title, Path(os.path.relpath(path.resolve(), out.resolve())).as_posix()) for title, path in found if path.exists()]
