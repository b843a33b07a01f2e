"""Allocators: total budget -> budget per (layer, KV head)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from kvtool.policies.base import Allocator, LayerView, Request, Selector
from kvtool.policies.preference import layer_preferences, preference_needs
from kvtool.policies.shares import share

if TYPE_CHECKING:
    from torch import Tensor

    from kvtool.policies.shapes import BudgetShape

PyramidRule = Literal["exact", "factory", "adakv", "kvpress"]
JointRule = Literal["exact", "official", "kvpress"]
CakeRule = Literal["exact", "official"]


@dataclass(frozen=True, slots=True)
class Uniform(Allocator):
    """The same number of entries for every head of every layer."""

    layer_local: ClassVar[bool] = True

    def budget_shape(self) -> BudgetShape:
        return "uniform"

    def allocate(self, views: Sequence[LayerView], scores: Sequence[Tensor], request: Request) -> list[list[int]]:
        return [[request.budget] * view.n_kv_heads for view in views]


def even(total: int, n: int) -> list[int]:
    """Share `total` among `n` as evenly as whole numbers allow, the first ones getting one more."""
    return [total // n + (i < total % n) for i in range(n)]


@dataclass(frozen=True, slots=True)
class Pyramid(Allocator):
    """Budgets that fall linearly with depth (PyramidKV, arXiv 2406.02069); every head of a layer gets the same.

    The rules of the official codes are kept side by side; all but ``exact`` miss the budget at times.

    Attributes
    ----------
    window : int
        Entries of the observation window, part of every budget.
    beta : float
        The last layer gets 1 / beta of the mean.
    rule : str
        ``"exact"``: linear, clipped at the prompt's length, exact in total. ``"factory"``: KVCache-Factory. ``"adakv"``: the
        AdaKV and HeadKV repositories. ``"kvpress"``: NVIDIA kvpress.
    """

    window: int
    beta: float = 20.0
    rule: PyramidRule = "exact"

    def budget_shape(self) -> BudgetShape:
        return "layer"

    def allocate(self, views: Sequence[LayerView], scores: Sequence[Tensor], request: Request) -> list[list[int]]:
        n_heads, seq_len = views[0].n_kv_heads, views[0].seq_len
        if self.rule == "exact":
            # Depth counts compressible layers only, so that the mean over them is the budget.
            slopes = _line(len(views), self.beta)
            per_layer = share(request.budget * len(views), slopes, request.minimum, seq_len)
            return [[n] * n_heads for n in per_layer]
        n_layers = views[0].n_layers
        per_layer = pyramid_budgets(request.budget, seq_len, n_layers, self.window, self.beta, self.rule)
        return [[per_layer[view.layer]] * n_heads for view in views]


def _line(n_layers: int, beta: float) -> list[float]:
    """Return weights from 2 - 1 / beta down to 1 / beta, mean 1."""
    low, high = 1 / beta, 2 - 1 / beta
    return [high - (high - low) * i / (n_layers - 1) for i in range(n_layers)] if n_layers > 1 else [1.0]


def pyramid_budgets(capacity: float, seq_len: int, n_layers: int, window: int, beta: float, rule: str) -> list[int]:
    """Return the entries per layer, window included, as the official codes compute them.

    Parameters
    ----------
    capacity : float
        Window included; a whole number but for ``kvpress``, which takes the unrounded share of the prompt.
    rule : str
        ``"factory"``, ``"adakv"`` or ``"kvpress"``.
    """
    past = seq_len - window
    if rule == "kvpress":
        return _pyramid_kvpress(capacity, seq_len, n_layers, window, beta)
    whole = int(capacity)
    mean = whole - window
    if rule == "factory" and seq_len < whole:
        return [seq_len] * n_layers
    low = int(mean // beta)
    high = 2 * mean - low
    if high >= past:
        high, low = past, 2 * mean - past
    step = (high - low) // (n_layers - 1) if n_layers > 1 else 0
    if rule == "factory" and seq_len < 2 * mean:
        return [whole] * n_layers
    return [min(seq_len, high - layer * step + window) for layer in range(n_layers)]


def _pyramid_kvpress(mean: float, seq_len: int, n_layers: int, window: int, beta: float) -> list[int]:
    low = mean / beta
    high = 2 * mean - low
    if high >= seq_len - window:
        high = float(seq_len - window)
        low = 2 * mean - high
    if not seq_len >= high >= low >= window or n_layers == 1:
        return [round(mean)] * n_layers
    step = (high - low) / (n_layers - 1)
    return [round(high - layer * step) for layer in range(n_layers)]


@dataclass(frozen=True, slots=True)
class Joint(Allocator):
    """Budgets of a layer's heads from one top-k over all of them (AdaKV, arXiv 2407.11550).

    Attributes
    ----------
    floor : float
        Share of the budget that every head is sure of.
    rule : str
        ``"exact"``: floor, and the rest in proportion to what each head wins; exact in total. ``"official"``: the AdaKV
        repository's rounding, which can miss the total by a few entries. ``"kvpress"``: every head first secures the share
        `floor`, then the best entries of all heads fill the layer's budget.
    normalize : bool
        Weigh each head's scores by the share of its mass that its own budget would hold.
    """

    layer_local: ClassVar[bool] = True

    floor: float = 0.2
    rule: JointRule = "exact"
    normalize: bool = False

    def budget_shape(self) -> BudgetShape:
        return "within"

    def allocate(self, views: Sequence[LayerView], scores: Sequence[Tensor], request: Request) -> list[list[int]]:
        return [self.layer(score, request.budget * view.n_kv_heads, request) for view, score in zip(views, scores, strict=True)]

    def layer(self, scores: Tensor, total: int, request: Request) -> list[int]:
        """Return the budgets of one layer's heads, which share `total` entries."""
        import torch

        # The order of plain scores serves all budgets and floors; a weighed one depends on the budget.
        known: dict[Any, Any] = {} if self.normalize else request.memo.scores.setdefault(("joint", id(scores)), {})
        scores = scores[0] if scores.dim() == 3 else scores
        n_heads, seq_len = scores.shape
        sink, window = min(request.selector.sink, seq_len), min(request.selector.window, seq_len)
        free = scores[:, sink : max(sink, seq_len - window)].float()
        n_free = free.shape[1]
        protected = seq_len - n_free
        n_won = max(0, total - n_heads * protected)
        if n_won >= n_heads * n_free:
            return [seq_len] * n_heads
        mean = n_won // n_heads
        if self.rule == "kvpress":
            return self._secured(free, mean, protected)
        if self.normalize and mean:
            held = free.topk(mean, dim=-1).values.sum(dim=-1, keepdim=True)
            free = free * held / free.sum(dim=-1, keepdim=True).clamp_min(1e-30)
        if n_won not in known:
            known[n_won] = torch.bincount(self._owners(free, known)[:n_won], minlength=n_heads).double().tolist()
        won = known[n_won]
        if self.rule == "official":
            # Half to even, as torch.round; int() of the floor's product as in the repository.
            mixed = torch.tensor(won, dtype=torch.float64) * (1 - self.floor) + int(mean * self.floor)
            return [min(seq_len, protected + int(x)) for x in torch.round(mixed.float()).tolist()]
        wanted = [protected + n * (1 - self.floor) + n_won / n_heads * self.floor for n in won]
        return share(total, [max(0.0, n - request.minimum) for n in wanted], request.minimum, seq_len)

    @staticmethod
    def _owners(free: Tensor, known: dict[Any, Any]) -> Tensor:
        """Return the head of each free entry of a layer, best entry first; of ``free`` ``[H, n]``, int64 ``[H n]``."""
        import torch

        if "owners" not in known:
            # A stable sort: equal scores go to the earlier head and position.
            known["owners"] = torch.argsort(free.flatten(), descending=True, stable=True) // free.shape[1]
        owners: Tensor = known["owners"]
        return owners

    def _secured(self, free: Tensor, mean: int, protected: int) -> list[int]:
        """kvpress: `mean` entries per head beside the protected ones."""
        import torch

        n_heads, n_free = free.shape
        # Protected entries score highest, so they are the first that a head secures.
        secured = max(0, int((mean + protected) * self.floor) - protected)
        order = torch.argsort(free, dim=-1, descending=True, stable=True)
        pool = free.scatter(1, order[:, :secured], float("inf"))
        best = torch.argsort(pool.flatten(), descending=True, stable=True)[: n_heads * mean]
        return [protected + int(x) for x in torch.bincount(best // n_free, minlength=n_heads).tolist()]


@dataclass(frozen=True, slots=True)
class Cake(Allocator):
    """Budgets of layers in proportion to their preference (CAKE, arXiv 2503.12491); heads of a layer share alike.

    Attributes
    ----------
    window : int
    tau1, tau2 : float
        Temperatures of dispersion and shift.
    rule : str
        ``"exact"``: shares of the total by water-filling at the prompt's length, exact. ``"official"``: the repository's
        rounding, which loses entries when the prompt is short.
    cascade : bool
        With the official rule: cut after every layer with what is known by then. What a layer has lost cannot come back.
    """

    window: int
    tau1: float = 1.0
    tau2: float = 1.0
    rule: CakeRule = "exact"
    cascade: bool = False

    def budget_shape(self) -> BudgetShape:
        return "layer"

    def needs(self) -> tuple[str, ...]:
        return preference_needs(self.window)

    def allocate(self, views: Sequence[LayerView], scores: Sequence[Tensor], request: Request) -> list[list[int]]:
        n_heads, seq_len = views[0].n_kv_heads, views[0].seq_len
        preferences = layer_preferences(views, self.window, self.tau1, self.tau2, request.memo.views)
        if self.rule == "exact" and not self.cascade:
            per_layer = share(request.budget * len(views), preferences, request.minimum, seq_len)
        else:
            per_layer = cake_budgets(
                preferences, request.budget, seq_len, self.window, n_layers=len(views), rule=self.rule, cascade=self.cascade
            )
            per_layer = [max(n, min(request.minimum, seq_len)) for n in per_layer]
        return [[n] * n_heads for n in per_layer]

    def stage_budgets(self, views: Sequence[LayerView], request: Request, n_layers: int) -> list[list[int]]:
        """Return what the first ``len(views)`` of `n_layers` layers may hold, by what is known of them: a stage of the cascade.

        A layer's kept entries after the last stage are the best by the smallest of its budgets, as `allocate` gives them.
        """
        preferences = layer_preferences(views, self.window, self.tau1, self.tau2, request.memo.views)
        per_layer = stage_entries(preferences, request.budget, views[0].seq_len, self.window, n_layers, self.rule)
        least = min(request.minimum, views[0].seq_len)
        return [[max(n, least)] * views[0].n_kv_heads for n in per_layer]


def cake_stage(preferences: Sequence[float], total: int, cap: int) -> list[int]:
    """Return past budgets of the layers known so far, as CAKE's official code rounds them (``adjust_budgets``).

    Parameters
    ----------
    preferences : sequence of float
    total : int
        Past entries of all layers.
    cap : int
        Past entries of the prompt.
    """
    n, mass = len(preferences), sum(preferences)
    budgets = [int(p / mass * total) for p in preferences]
    excess = sum(max(0, b - cap) for b in budgets)
    budgets = [min(b, cap) for b in budgets]
    open_ = [i for i in range(n) if budgets[i] < cap]
    if excess and open_:
        for i, extra in zip(open_, even(excess, len(open_)), strict=True):
            budgets[i] += extra
    missing = total - sum(budgets)
    if missing:
        open_ = [i for i in range(n) if (budgets[i] < cap if missing > 0 else budgets[i] > 1)]
        for i, extra in zip(open_, even(abs(missing), len(open_)) if open_ else [], strict=False):
            budgets[i] += extra if missing > 0 else -extra
    return budgets


def cake_budgets(
    preferences: Sequence[float], capacity: int, seq_len: int, window: int, *, n_layers: int, rule: str, cascade: bool
) -> list[int]:
    """Return the entries per layer, window included, one shot or as they are left by the cascade.

    Parameters
    ----------
    preferences : sequence of float
        One per layer.
    capacity : int
        Mean entries per layer, window included.
    rule : str
        How a stage's shares are rounded: ``"exact"`` or ``"official"``.
    cascade : bool
        The smallest budget of all stages stands, as what was cut is gone.
    """
    left = stage_entries(preferences, capacity, seq_len, window, n_layers, rule)
    if cascade:
        for known in range(1, n_layers):
            for layer, entries in enumerate(stage_entries(preferences[:known], capacity, seq_len, window, n_layers, rule)):
                left[layer] = min(left[layer], entries)
    return left


def stage_entries(
    preferences: Sequence[float], capacity: int, seq_len: int, window: int, n_layers: int, rule: str
) -> list[int]:
    """Return the entries of the layers known so far, window included; parameters as `cake_budgets`."""
    known, cap = len(preferences), max(0, seq_len - window)
    total = max(0, capacity - window) * n_layers
    if rule == "official":
        if seq_len <= capacity + window:
            return [seq_len] * known
        past = [min(b, cap) for b in cake_stage(preferences, total, cap)]
    else:
        past = share(min(total, cap * known), preferences, 0, cap)
    return [min(seq_len, budget + window) for budget in past]


@dataclass(frozen=True, slots=True)
class Lava(Allocator):
    """Layer budgets by the entropy of a layer's scores, head budgets by a top-k over the layer (LAVa, arXiv 2509.09754).

    The entropy of all past scores of a layer, normalised to a distribution over heads and positions, is divided by its
    maximum, the logarithm of their number; layers share the total in proportion to it. As in the official code, but exact in
    total.
    """

    floor: float = 0.0

    def allocate(self, views: Sequence[LayerView], scores: Sequence[Tensor], request: Request) -> list[list[int]]:
        n_heads, seq_len = views[0].n_kv_heads, views[0].seq_len
        weights = request.memo.scores.setdefault("spread", [])
        if not weights:
            weights += [spread_of_scores(score, request.selector) for score in scores]
        per_layer = share(request.budget * n_heads * len(views), weights, request.minimum * n_heads, seq_len * n_heads)
        joint = Joint(self.floor)
        return [joint.layer(score, total, request) for score, total in zip(scores, per_layer, strict=True)]


def spread_of_scores(scores: Tensor, selector: Selector) -> float:
    """Return the entropy of one layer's past scores over its maximum, in 0 ... 1."""
    seq_len = scores.shape[1]
    past = scores[:, min(selector.sink, seq_len) : max(0, seq_len - selector.window)].double().flatten()
    if past.numel() < 2:
        return 1.0
    shares = past / (past.sum() + 1e-16)
    return float(-(shares * (shares + 1e-16).log()).sum() / math.log(past.numel()))
