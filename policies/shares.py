"""Share a whole number of entries out: exact sums, floors and ceilings held, rounding by largest remainder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvtool.errors import ConfigError


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
    parts = np.zeros(n)
    left, open_ = float(total - low * n), np.ones(n, dtype=bool)
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
    return _round(parts, total - low * n, high - low, low)


def _round(parts: np.ndarray, total: int, room: int, low: int) -> list[int]:
    """Round to whole numbers that sum to `total`, none above `room`."""
    # Sums of floats miss whole numbers by a hair: such parts count as whole.
    whole = np.minimum(np.floor(parts + 1e-9).astype(np.int64), room)
    missing = total - int(whole.sum())
    order = np.argsort(-np.round(parts - whole, 9), kind="stable")
    for step in (1, -1):
        while missing * step > 0:
            for i in order if step > 0 else order[::-1]:
                if missing * step > 0 and 0 <= whole[i] + step <= room:
                    whole[i] += step
                    missing -= step
    return [low + int(x) for x in whole]
