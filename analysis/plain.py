"""Results as JSON and CSV: what is not finite is empty, figures stay unrounded."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from kvtool.analysis.statistics import Interval

#: columns of an interval, after the name of its figure
ENDS = ("", "_low", "_high")
#: Settings of a policy that are paths.
_PATHS = re.compile(r"(?<=[:,])(heads|plan|file)=([^,]*),?")


def finite(value: Any) -> Any:
    """Replace figures that are not finite by None, at any depth: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def csv_text(header: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """Return a table as CSV; None and NaN are empty cells."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerows([header, *(["" if cell is None or cell != cell else cell for cell in line] for line in lines)])
    return buffer.getvalue()


def ends(value: Interval | None) -> list[float | None]:
    """Return mean, lower and upper end as cells."""
    return [None, None, None] if value is None else [value.mean, value.low, value.high]


def columns(names: Sequence[str]) -> list[str]:
    """Return the column names of several intervals."""
    return [f"{name}{end}" for name in names for end in ENDS]


def short_names(texts: Sequence[str]) -> dict[str, str]:
    """Return policies as people read them: without the paths of their heads files and plans.

    Where two of them would then read the same, each keeps the shortest end of its path that tells them apart.

    Parameters
    ----------
    texts : sequence of str
        Text forms, with or without budget.
    """
    distinct = list(dict.fromkeys(texts))
    names = {text: _PATHS.sub("", text).rstrip(":,") for text in distinct}
    for depth in range(1, 32):
        counts = Counter(names.values())
        twice = [text for text in distinct if counts[names[text]] > 1]
        if not twice:
            break
        for text in twice:
            names[text] = _PATHS.sub(partial(_end_of_path, depth), text).rstrip(":,")
    return names


def _end_of_path(depth: int, found: re.Match[str]) -> str:
    comma = "," if found[0].endswith(",") else ""
    return f"{found[1]}={'/'.join(found[2].split('/')[-depth:])}{comma}"
