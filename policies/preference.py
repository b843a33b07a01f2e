"""CAKE's preference of a layer: how dispersed its attention is, and how much it changes over the last queries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvtool.policies.base import LayerView


def preference_needs(window: int) -> tuple[str, ...]:
    """Return the statistics that `layer_preference` asks for."""
    return (f"window_entropy/{window}", f"window_var/{window}")


def layer_preference(
    view: LayerView, window: int, tau1: float = 1.0, tau2: float = 1.0, memo: dict[Any, Any] | None = None
) -> float:
    """Return ``H^(1/tau1) V^(1/tau2)`` of one layer (CAKE, ICLR 2025, arXiv 2503.12491, official code).

    H is the entropy of the last `window` queries' attention to the positions before the window, summed over heads and
    queries; V is the variance of that attention over the queries, summed over heads and positions (with n - 1).

    Parameters
    ----------
    view : LayerView
    window : int
    tau1, tau2 : float
        Temperatures of dispersion and shift.
    memo : dict, optional
        H and V of views that were asked before, see `kvtool.policies.base.Memo.views`.
    """
    key = ("preference", view.layer, window)
    found = None if memo is None else memo.get(key)
    if found is None:
        found = _dispersion_and_shift(view, window)
        if memo is not None:
            memo[key] = found
    dispersion, shift = found
    return float(max(dispersion, 0.0) ** (1 / tau1) * max(shift, 0.0) ** (1 / tau2))


def _dispersion_and_shift(view: LayerView, window: int) -> tuple[float, float]:
    n_queries = min(window, view.seq_len)
    n_past = max(0, view.seq_len - window)
    dispersion = float(view.statistic(f"window_entropy/{window}").double().sum()) * n_queries
    correction = n_queries / (n_queries - 1) if n_queries > 1 else 0.0
    shift = float(view.statistic(f"window_var/{window}")[:, :n_past].double().sum()) * correction
    return dispersion, shift


def layer_preferences(
    views: Sequence[LayerView], window: int, tau1: float = 1.0, tau2: float = 1.0, memo: dict[Any, Any] | None = None
) -> list[float]:
    """Return the preference of each layer; all equal where no layer prefers anything."""
    found = [layer_preference(view, window, tau1, tau2, memo) for view in views]
    return found if any(found) else [1.0] * len(found)
