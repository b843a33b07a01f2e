"""Allocators that share the budget by what is known about heads: importance, kinds, retrieval patterns.

Shapes: L layers, Q query heads, H KV heads, T prompt positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from kvtool.errors import ConfigError, DataError
from kvtool.policies.base import Allocator, LayerView, Request
from kvtool.policies.headfile import read_head_file, rows_of
from kvtool.policies.preference import layer_preferences, preference_needs
from kvtool.policies.shares import share

if TYPE_CHECKING:
    from torch import Tensor

    from kvtool.policies.shapes import BudgetShape

HeadRule = Literal["exact", "official", "factory"]
Float = NDArray[np.float64]

NO_FILE = "a file of the model's heads is needed: add heads=FILE or --heads FILE (kvtool classify makes one)"


@dataclass(frozen=True, slots=True)
class HeadScores:
    """Where the importance of heads comes from: a file, or (``path=""``) the view's own ``head_scores``."""

    path: str = ""
    name: str = "importance"

    def needs(self) -> tuple[str, ...]:
        """Return the statistics asked for."""
        return () if self.path else ("head_scores",)

    def check(self, *, query: bool = False) -> None:
        """Refuse a file that is missing or holds no such scores, or (`query`) none of query heads.

        Raises
        ------
        ConfigError
            No file is named.
        DataError
        """
        if not self.path:
            raise ConfigError(NO_FILE)
        table = read_head_file(self.path)
        if query or self.name not in table.kv_scores:
            table.query_scores(self.name)

    def layers(self, views: Sequence[LayerView], memo: dict[Any, Any], *, query: bool = False) -> Float:
        """Return one score per view and KV head, (views, H), or per query head, (views, Q); not negative.

        Asked for once per prompt, see `kvtool.policies.base.Memo.views`.
        """
        key = (self, query)
        if key not in memo:
            memo[key] = self._layers(views, query=query)
        found: Float = memo[key]
        return found

    def _layers(self, views: Sequence[LayerView], *, query: bool) -> Float:
        rows = []
        for view in views:
            if self.path:
                file = read_head_file(self.path)
                table = file.query_scores(self.name) if query else file.head_scores(self.name, view.n_kv_heads)
                row = rows_of(table, view, self.path)
            else:
                row = view.statistic("head_scores")[:, 0].double().cpu().numpy()
                row = row if query else row.reshape(view.n_kv_heads, -1).mean(axis=1)
            rows.append(row)
        found = np.asarray(rows)
        if (found < 0).any() or not np.isfinite(found).all():
            raise DataError(f"head scores of {self.path or 'the caller'} must be finite and not negative")
        return found


@dataclass(frozen=True, slots=True)
class HeadImportance(Allocator):
    """Budgets in proportion to head importance, above a floor (HeadKV, arXiv 2410.19258).

    Attributes
    ----------
    source : HeadScores
    window : int
    beta : float
        The share 1 / beta of the past budget is pooled and shared out by importance, the rest is every head's own.
    temperature : float
        Power of the normalised importance.
    rule : str
        ``"exact"``: what capped heads cannot use is handed on, exact in total. ``"official"``: HeadKV's rounding; capped heads'
        surplus is lost. ``"factory"``: KVCache-Factory's variant, which adds the window on top.
    """

    source: HeadScores
    window: int
    beta: float = 1.5
    temperature: float = 1.0
    rule: HeadRule = "exact"

    def needs(self) -> tuple[str, ...]:
        return self.source.needs()

    def check_files(self) -> None:
        self.source.check(query=self.rule != "exact")

    def allocate(self, views: Sequence[LayerView], scores: Sequence[Tensor], request: Request) -> list[list[int]]:
        if self.rule != "exact":
            return self._official(views, request)
        importance = self.source.layers(views, request.memo.views)
        found = importance_budgets(importance, self.beta, self.temperature, request.budget, request.minimum, views[0].seq_len)
        return found.tolist()  # type: ignore[no-any-return]

    def _official(self, views: Sequence[LayerView], request: Request) -> list[list[int]]:
        importance = self.source.layers(views, request.memo.views, query=True)
        seq_len, n_kv = views[0].seq_len, views[0].n_kv_heads
        capacity = request.budget if self.rule == "factory" else request.budget - self.window
        free = max(0, seq_len - self.window)
        if self.rule == "official" and free < capacity:
            return [[seq_len] * n_kv for _ in importance]
        table = head_capacities(importance, capacity, self.beta, 1.0 if self.rule == "factory" else self.temperature)
        # KVCache-Factory's way to KV heads: the mean of the group's rounded capacities, rounded again.
        grouped = np.round(table.reshape(len(table), n_kv, -1).mean(axis=2)).astype(np.int64)
        return [[min(n, free) + min(self.window, seq_len) for n in row] for row in grouped.tolist()]


def importance_budgets(
    importance: Float, beta: float, temperature: float, budget: int, minimum: int, seq_len: int
) -> NDArray[np.int64]:
    """Share the past entries ``budget - minimum`` by importance above a floor, exact in total, (L, H); see `HeadImportance`."""
    past = budget - minimum
    pool = past / beta
    targets = normalised(importance, temperature) * pool * importance.size + (past - pool)
    flat = share(budget * importance.size, targets.flatten().tolist(), minimum, seq_len)
    return np.asarray(flat, dtype=np.int64).reshape(importance.shape)


def normalised(importance: Float, temperature: float = 1.0) -> Float:
    """Return importance as shares that sum to 1, to the power `temperature`; equal shares where all are 0."""
    total = importance.sum()
    if total <= 0:
        return np.full(importance.shape, 1 / importance.size)
    powered = (importance / total) ** temperature
    result: Float = powered / powered.sum()
    return result


def head_capacities(importance: Float, past: int, beta: float, temperature: float = 1.0) -> NDArray[np.int64]:
    """Return the past entries of every head as HeadKV's official code computes them, (L, heads).

    Parameters
    ----------
    importance : ndarray of shape (L, heads)
    past : int
        Mean entries besides the window.
    """
    # Python's float floor division, as in the code: 120 // 1.005 is 119; rounded half to even.
    pool = past // beta
    table = normalised(importance, temperature) * pool * importance.size + (past - pool)
    found: NDArray[np.int64] = np.round(table).astype(np.int64)
    return found


@dataclass(frozen=True, slots=True)
class LayerTimesHead(Allocator):
    """HACE: ``floor + pool x normalised(P_l^a S_lh^b)``, CAKE's layer preference times HeadKV's head importance.

    Attributes
    ----------
    source : HeadScores or None
        None where b is 0.
    window : int
        Observation window of the preference.
    layer_power, head_power : float
        a and b.
    floor : float
        Share of the free entries that is every head's own; free are those above the protected ones.
    tau1, tau2 : float
        Temperatures of the preference.
    """

    source: HeadScores | None
    window: int
    layer_power: float = 1.0
    head_power: float = 1.0
    floor: float = 0.2
    tau1: float = 1.0
    tau2: float = 1.0

    def budget_shape(self) -> BudgetShape:
        # The importance is a number per layer *and* head, so the product has no shape of its own but for the ablation without it.
        if self.source and self.head_power:
            return "free"
        return "layer" if self.layer_power else "uniform"

    def needs(self) -> tuple[str, ...]:
        layers = preference_needs(self.window) if self.layer_power else ()
        return (*layers, *(self.source.needs() if self.source and self.head_power else ()))

    def check_files(self) -> None:
        if self.source and self.head_power:
            self.source.check()

    def allocate(self, views: Sequence[LayerView], scores: Sequence[Tensor], request: Request) -> list[list[int]]:
        shape = (len(views), views[0].n_kv_heads)
        weights = np.ones(shape)
        if self.layer_power:
            preference = np.asarray(layer_preferences(views, self.window, self.tau1, self.tau2, request.memo.views))
            # Scaled first: powers of large preferences stay finite.
            weights *= (preference / preference.max())[:, None] ** self.layer_power
        if self.source and self.head_power:
            importance = self.source.layers(views, request.memo.views)
            weights *= (importance / (importance.max() or 1.0)) ** self.head_power
        free = (request.budget - request.minimum) * weights.size
        own = int(self.floor * free / weights.size)
        flat = share(request.budget * weights.size, weights.flatten().tolist(), request.minimum + own, views[0].seq_len)
        return np.asarray(flat).reshape(shape).tolist()


@dataclass(frozen=True, slots=True)
class FullHeads(Allocator):
    """Retrieval heads keep everything, the others sink and recent entries (DuoAttention, arXiv 2410.10819).

    Attributes
    ----------
    source : HeadScores
        The gate: the larger, the more a head needs everything.
    sparsity : float
        Share of heads that stream, where no budget decides it.
    streaming : int
        Entries of a streaming head: sink + recent.

    With a budget, as many heads as it allows keep everything; the next one gets what is left.
    """

    source: HeadScores
    sparsity: float
    streaming: int

    def needs(self) -> tuple[str, ...]:
        return self.source.needs()

    def check_files(self) -> None:
        self.source.check()

    def allocate(self, views: Sequence[LayerView], scores: Sequence[Tensor], request: Request) -> list[list[int]]:
        gates, seq_len = self.source.layers(views, request.memo.views), views[0].seq_len
        streaming = max(min(self.streaming, seq_len), min(request.minimum, seq_len))
        if request.implied:
            return np.where(full_heads(gates, self.sparsity), seq_len, streaming).tolist()  # type: ignore[no-any-return]
        return filled_heads(gates, request.budget, streaming, seq_len).tolist()  # type: ignore[no-any-return]


def filled_heads(gates: Float, budget: int, streaming: int, seq_len: int) -> NDArray[np.int64]:
    """Fill heads up by falling gate until the mean is `budget`, (L, H); the others keep `streaming` entries."""
    budgets = np.full(gates.size, min(streaming, budget))
    left = budget * gates.size - int(budgets.sum())
    for head in np.argsort(-gates.flatten(), kind="stable"):
        extra = min(left, seq_len - int(budgets[head]))
        budgets[head] += extra
        left -= extra
    return budgets.reshape(gates.shape)


def full_heads(gates: Float, sparsity: float) -> NDArray[np.bool_]:
    """Return which heads keep everything: gates at or above their `sparsity` quantile.

    Equal gates are told apart by layer and head, the earlier one first; the official code adds random noise instead.
    """
    if sparsity >= 1:
        return np.zeros(gates.shape, dtype=bool)
    n = gates.size
    # The quantile of linear interpolation: at or above it are the heads from its rank on.
    first = int(np.ceil(sparsity * (n - 1) - 1e-9))
    order = np.argsort(-gates.flatten(), kind="stable")[: n - first]
    found = np.zeros(n, dtype=bool)
    found[order] = True
    return found.reshape(gates.shape)


@dataclass(frozen=True, slots=True)
class KindWindows(Allocator):
    """A window per head by its kind, where the kind is sure enough; else the base window.

    Attributes
    ----------
    path : str
        ``heads.json``.
    windows : tuple of (str, int)
        Window per kind; other kinds get `base`.
    base : int
    confidence : float
        Heads below this confidence get `base`; 0 trusts every kind.
    sink : int

    With a budget, the windows are weights of the total instead of entries.
    """

    path: str
    windows: tuple[tuple[str, int], ...]
    base: int
    confidence: float
    sink: int

    def needs(self) -> tuple[str, ...]:
        return ()

    def budget_shape(self) -> BudgetShape:
        return "uniform" if self.uniform else "kinds"

    def head_kinds(self, views: Sequence[LayerView]) -> list[list[int]] | None:
        # Heads whose windows are equal are one kind, whatever they are called.
        return None if self.uniform else self._of(views).astype(np.int64).tolist()

    @property
    def uniform(self) -> bool:
        """True if all heads get the same window, whatever their kind: then no file is needed."""
        return {window for _, window in self.windows} <= {self.base}

    def check_files(self) -> None:
        if not self.uniform:
            self.table()

    def table(self) -> NDArray[np.int64]:
        """Return the window of every KV head, (L, H).

        Raises
        ------
        DataError
            The file has no kinds, or no confidence where one is asked for.
        """
        if not self.path:
            raise ConfigError(NO_FILE)
        heads = read_head_file(self.path)
        if heads.kinds is None:
            raise DataError(f"heads file {self.path} holds no kinds of heads; make one with kvtool classify")
        if self.confidence > 0 and heads.confidence is None:
            raise DataError(
                f"heads file {self.path} has no confidence (too few prompts), but confidence={self.confidence:g} is asked for; "
                "classify a capture of more prompts, or set confidence=0"
            )
        sure = np.ones((len(heads.kinds), len(heads.kinds[0])), dtype=bool)
        if self.confidence > 0 and heads.confidence is not None:
            sure = heads.confidence >= self.confidence
        by_kind = dict(self.windows)
        return np.asarray(
            [
                [by_kind.get(kind, self.base) if sure[layer, head] else self.base for head, kind in enumerate(row)]
                for layer, row in enumerate(heads.kinds)
            ],
            dtype=np.int64,
        )

    def allocate(self, views: Sequence[LayerView], scores: Sequence[Tensor], request: Request) -> list[list[int]]:
        seq_len, windows = views[0].seq_len, self._of(views)
        if request.implied:
            wanted = np.minimum(windows.astype(np.int64) + self.sink, seq_len)
            return np.maximum(wanted, min(request.minimum, seq_len)).tolist()  # type: ignore[no-any-return]
        flat = share(request.budget * windows.size, windows.flatten().tolist(), request.minimum, seq_len)
        return np.asarray(flat).reshape(windows.shape).tolist()  # type: ignore[no-any-return]

    def _of(self, views: Sequence[LayerView]) -> Float:
        """Return the windows of the views' heads, (views, H)."""
        if self.uniform:
            return np.full((len(views), views[0].n_kv_heads), float(self.base))
        table = self.table().astype(np.float64)
        if table.shape[1] != views[0].n_kv_heads:
            raise DataError(
                f"heads file {self.path} is of {table.shape[1]} KV heads, the model has {views[0].n_kv_heads}; "
                "classify a capture of this model"
            )
        return np.asarray([rows_of(table, view, self.path) for view in views])
