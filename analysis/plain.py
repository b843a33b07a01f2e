"""Results as JSON and CSV: what is not finite is empty, figures stay unrounded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kvtool.analysis.statistics import Interval
from kvtool.naming import short_names
from kvtool.textgrid import csv_text

__all__ = ["ENDS", "columns", "csv_text", "ends", "finite", "short_names"]

#: columns of an interval, after the name of its figure
ENDS = ("", "_low", "_high")


def finite(value: Any) -> Any:
    """Replace figures that are not finite by None, at any depth: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def ends(value: Interval | None) -> list[float | None]:
    """Return mean, lower and upper end as cells."""
    return [None, None, None] if value is None else [value.mean, value.low, value.high]


def columns(names: Sequence[str]) -> list[str]:
    """Return the column names of several intervals."""
    return [f"{name}{end}" for name in names for end in ENDS]
