"""Budgets from a file of fixed budgets.

Shapes: N levels, L layers, H KV heads, T prompt positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvtool.errors import ConfigError, DataError
from kvtool.policies.base import Allocator, LayerView, Request
from kvtool.policies.budgetfile import HOW, BudgetPlan, Gates, Importance, Levels, read_budgets
from kvtool.policies.head_allocators import filled_heads, full_heads, importance_budgets
from kvtool.policies.shares import share

if TYPE_CHECKING:
    from torch import Tensor

Float = NDArray[np.float64]
Int = NDArray[np.int64]


def free_shares(table: Levels, protected: int, seq_len: int) -> Float:
    """Return the share of the unprotected entries that each head keeps at each level, (N, L, H).

    Entries of another length keep their share of what is not protected; dropped shares are of the whole prompt, and what they leave
    below the protected entries counts as nothing.
    """
    length = table.length or seq_len
    least = min(protected, length)
    if least == length:
        return np.ones(table.values.shape)
    values = table.values.astype(np.float64)
    kept = values if table.unit == "entries" else (1.0 - values) * length
    shares: Float = np.maximum(kept - least, 0.0) / (length - least)
    return shares


def level_budgets(plan: BudgetPlan, table: Levels, rows: Sequence[int], budget: int, minimum: int, seq_len: int) -> Int:
    """Return budgets with the mean `budget`: linear between the two levels beside it, and beyond them towards nothing or all.

    At a level of entries, and at its length, these are the stored numbers.
    """
    shares = free_shares(table, plan.protected, seq_len)[:, rows]
    shape = shares.shape[1:]
    if minimum >= seq_len:
        return np.full(shape, seq_len)
    known = np.concatenate([np.zeros((1, *shape)), shares, np.ones((1, *shape))])
    means = known.mean(axis=(1, 2))
    wanted = (budget - minimum) / (seq_len - minimum)
    # The lowest level that keeps as much: at a level itself, that one. Levels of equal means (all heads at the minimum) are one.
    above = min(int(np.searchsorted(means, wanted - 1e-12)), len(means) - 1)
    below = max(above - 1, 0)
    gap = means[above] - means[below]
    part = (wanted - means[below]) / gap if gap > 0 else 1.0
    mixed = known[below] + min(max(part, 0.0), 1.0) * (known[above] - known[below])
    flat = share(budget * mixed.size, (mixed * (seq_len - minimum)).flatten().tolist(), minimum, seq_len)
    return np.asarray(flat, dtype=np.int64).reshape(shape)


def own_entries(plan: BudgetPlan, seq_len: int) -> float:
    """Return the mean entries per KV head that the plan itself asks for.

    Raises
    ------
    ConfigError
        It holds many levels, or none.
    """
    table, least = plan.table, min(plan.protected, seq_len)
    if isinstance(table, Gates):
        return least + float(full_heads(table.values, table.sparsity).mean()) * (seq_len - least)
    if isinstance(table, Levels) and len(table.budgets) == 1:
        return least + float(free_shares(table, plan.protected, seq_len).mean()) * (seq_len - least)
    what = (
        f"{len(table.budgets)} budgets ({table.budgets[0]} to {table.budgets[-1]})"
        if isinstance(table, Levels)
        else "importance"
    )
    raise ConfigError(f"plan {plan.path} holds {what}; add budget=, e.g. budget=5%")


def plan_budgets(plan: BudgetPlan, rows: Sequence[int], budget: int, minimum: int, seq_len: int, *, own: bool = False) -> Int:
    """Return the budgets of the plan's rows, (rows, H).

    Parameters
    ----------
    plan : BudgetPlan
    rows : sequence of int
        Of the plan's table.
    budget : int
        Mean entries per KV head.
    minimum : int
        Entries that no head may fall below.
    seq_len : int
    own : bool
        The plan's own number of entries, which need not be whole on average; `budget` is not looked at.
    """
    table = plan.table
    if isinstance(table, Gates):
        gates, streaming = np.clip(table.values, 0.0, 1.0)[rows], max(min(plan.protected, seq_len), min(minimum, seq_len))
        if own:
            # The quantile is over all of the file's heads, as published, not over those of these layers.
            return np.where(full_heads(np.clip(table.values, 0.0, 1.0), table.sparsity)[rows], seq_len, streaming).astype(
                np.int64
            )
        return filled_heads(gates, budget, streaming, seq_len)
    if isinstance(table, Importance):
        scores = table.scores()
        importance = scores.reshape(len(scores), table.n_kv_heads, -1).mean(axis=2)[rows]
        return importance_budgets(importance, table.beta, table.temperature, budget, minimum, seq_len)
    if not own:
        return level_budgets(plan, table, rows, budget, minimum, seq_len)
    shares = free_shares(table, plan.protected, seq_len)[0, rows]
    least = min(minimum, seq_len)
    wanted = least + shares * (seq_len - least)
    total = round(float(wanted.sum()))
    return np.asarray(share(total, (wanted - least).flatten().tolist(), least, seq_len), dtype=np.int64).reshape(shares.shape)


@dataclass(frozen=True, slots=True)
class FixedBudgets(Allocator):
    """The budgets of a plan; the prompt plays no part.

    Attributes
    ----------
    path : str
        See `kvtool.policies.budgetfile`.
    """

    path: str

    def check_files(self) -> None:
        if not self.path:
            raise ConfigError(f"it needs the budgets of a model's heads: add file=FILE ({HOW})")
        read_budgets(self.path)

    def allocate(self, views: Sequence[LayerView], scores: Sequence[Tensor], request: Request) -> list[list[int]]:
        self.check_files()
        plan = read_budgets(self.path)
        rows = plan.rows([view.layer for view in views])
        if views[0].n_kv_heads != plan.table.shape[1]:
            raise DataError(
                f"plan {self.path} is of {plan.table.shape[1]} KV heads, the model has {views[0].n_kv_heads}; make it from a capture "
                "of this model"
            )
        return plan_budgets(plan, rows, request.budget, request.minimum, views[0].seq_len, own=request.implied).tolist()  # type: ignore[no-any-return]
