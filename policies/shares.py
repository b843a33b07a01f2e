"""Share a whole number of entries out: exact sums, floors and ceilings held, rounding by largest remainder."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from kvtool.errors import ConfigError

#: Shares up to which plain Python is faster than numpy.
FEW = 32


def share(total: int, weights: Sequence[float], low: int, high: int) -> list[int]:
    """Share `total` in proportion to `weights`, every share in ``low ... high``.

    Each share is ``low`` plus its part of what is left, ``total - low n``. What would exceed `high` is handed on to the others
    in proportion to their weights (water-filling); fractions are rounded by largest remainder, ties to the earlier one.

    Parameters
    ----------
    total : int
        In ``low n ... high n``.
    weights : sequence of float
        Not negative; all zero means equal ones.
    low, high : int

    Returns
    -------
    list of int
        Sums to `total`.

    Raises
    ------
    ConfigError
        A weight is negative or not finite, or `total` does not fit between the limits.
    """
    wanted = np.asarray(weights, dtype=np.float64)
    n = len(wanted)
    if not np.isfinite(wanted).all() or (wanted < 0).any():
        raise ConfigError("weights of a budget must be finite and not negative")
    if not low * n <= total <= high * n:
        raise ConfigError(f"{total} entries cannot be shared among {n} heads with {low} to {high} each")
    room = float(high - low)
    left, mass = float(total - low * n), wanted.sum()
    # Most often nothing is full: one division, without the bookkeeping of what is handed on.
    if n <= FEW:
        few = [left * w / mass for w in wanted.tolist()] if mass > 0 else [left / n] * n
        if max(few) < room:
            return _round_few(few, total - low * n, high - low, low)
    parts = left * wanted / mass if mass > 0 else np.full(n, left / n)
    if (parts >= room).any():
        parts = _handed_on(wanted, left, room)
    return _round(parts, total - low * n, high - low, low)


def _handed_on(wanted: np.ndarray, left: float, room: float) -> np.ndarray:
    """Fill up to `room`, and hand on what exceeds it."""
    n = len(wanted)
    parts, open_ = np.zeros(n), np.ones(n, dtype=bool)
    while left > 0 and open_.any():
        # Weightless ones get entries only when all others are full.
        base = np.where(open_, wanted, 0.0)
        base = base if base.sum() > 0 else open_.astype(float)
        offer = parts + left * base / base.sum()
        full = open_ & (offer >= room)
        if not full.any():
            parts = offer
            break
        left -= float((room - parts[full]).sum())
        parts[full] = room
        open_ &= ~full
    return parts


def _round_few(parts: list[float], total: int, room: int, low: int) -> list[int]:
    """Do what `_round` does, without numpy's overhead: a search shares out the budgets of a few heads a million times."""
    whole = [min(math.floor(part + 1e-9), room) for part in parts]
    missing = total - sum(whole)
    # As numpy rounds to nine decimals.
    rest = [-round((part - n) * 1e9) for part, n in zip(parts, whole, strict=True)]
    order = sorted(range(len(whole)), key=rest.__getitem__)
    while missing:
        step = 1 if missing > 0 else -1
        for i in order if step > 0 else reversed(order):
            if missing and 0 <= whole[i] + step <= room:
                whole[i] += step
                missing -= step
    return [low + n for n in whole]


def _round(parts: np.ndarray, total: int, room: int, low: int) -> list[int]:
    """Round to whole numbers that sum to `total`, none above `room`."""
    # Sums of floats miss whole numbers by a hair: such parts count as whole.
    whole = np.minimum(np.floor(parts + 1e-9).astype(np.int64), room)
    missing = total - int(whole.sum())
    order = np.argsort(-np.round(parts - whole, 9), kind="stable")
    while missing > 0:
        taking = order[whole[order] < room][:missing]
        whole[taking] += 1
        missing -= len(taking)
    while missing < 0:
        giving = order[::-1][whole[order[::-1]] > 0][:-missing]
        whole[giving] -= 1
        missing += len(giving)
    return (whole + low).tolist()  # type: ignore[no-any-return]
