"""Budgets from a plan's harm curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvtool.errors import ConfigError, DataError
from kvtool.policies.base import Allocator, LayerView, Request
from kvtool.policies.headfile import read_head_file, rows_of
from kvtool.policies.planfile import HOW, read_plan
from kvtool.policies.shapes import BudgetShape

if TYPE_CHECKING:
    from torch import Tensor

Int = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PlanBudgets(Allocator):
    """Budgets that minimise the plan's harm for the total asked for.

    Attributes
    ----------
    path : str
        Of a plan, see `kvtool.policies.planfile`.
    shape : str
        See `kvtool.policies.planfile.Plan.budgets`.
    heads : str
        ``heads.json`` with kinds, for the shape ``"kinds"``.
    """

    path: str
    shape: BudgetShape = "free"
    heads: str = ""

    def budget_shape(self) -> BudgetShape:
        return self.shape

    def check_files(self) -> None:
        if not self.path:
            raise ConfigError(f"it needs the harm curves of a model's heads: add plan=FILE ({HOW})")
        read_plan(self.path)
        if self.shape == "kinds":
            self.kinds()

    def kinds(self) -> Int:
        """Return the number of each head's kind, (model layers, H).

        Raises
        ------
        ConfigError
            No file is named.
        DataError
            The file has no kinds.
        """
        if not self.heads:
            raise ConfigError("shape=kinds needs the kinds of the model's heads: add heads=FILE (kvtool classify makes one)")
        found = read_head_file(self.heads).kinds
        if found is None:
            raise DataError(f"heads file {self.heads} holds no kinds of heads; make one with kvtool classify")
        numbers = {kind: number for number, kind in enumerate(sorted({kind for row in found for kind in row}))}
        return np.asarray([[numbers[kind] for kind in row] for row in found], dtype=np.int64)

    def head_kinds(self, views: Sequence[LayerView]) -> list[list[int]] | None:
        if self.shape != "kinds":
            return None
        table = self.kinds()
        if table.shape[1] != views[0].n_kv_heads:
            raise DataError(
                f"heads file {self.heads} is of {table.shape[1]} KV heads, the model has {views[0].n_kv_heads}; classify a capture of "
                "this model"
            )
        return [rows_of(table.astype(np.float64), view, self.heads).astype(np.int64).tolist() for view in views]

    def allocate(self, views: Sequence[LayerView], scores: Sequence[Tensor], request: Request) -> list[list[int]]:
        self.check_files()
        plan = read_plan(self.path)
        layers = tuple(view.layer for view in views)
        if layers != plan.layers or views[0].n_kv_heads != plan.harm.shape[2]:
            raise DataError(
                f"plan {self.path} is of layers {list(plan.layers)} with {plan.harm.shape[2]} KV heads, here are layers {list(layers)} "
                f"with {views[0].n_kv_heads}; {HOW} from a capture of this model"
            )
        groups = self.head_kinds(views)
        kinds = None if groups is None else tuple(tuple(row) for row in groups)
        return plan.budgets(request.budget, views[0].seq_len, request.minimum, self.shape, kinds).tolist()  # type: ignore[no-any-return]
