"""Budgets from a plan's harm curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvtool.errors import ConfigError, DataError
from kvtool.policies.base import Allocator, LayerView, Request
from kvtool.policies.planfile import HOW, read_plan

if TYPE_CHECKING:
    from torch import Tensor

PlanShape = Literal["free", "layer", "rank1"]


@dataclass(frozen=True, slots=True)
class PlanBudgets(Allocator):
    """Budgets that minimise the plan's harm for the total asked for.

    Attributes
    ----------
    path : str
        Of a plan, see `kvtool.policies.planfile`.
    shape : str
        See `kvtool.policies.planfile.Plan.budgets`.
    """

    path: str
    shape: PlanShape = "free"

    def check_files(self) -> None:
        if not self.path:
            raise ConfigError(f"it needs the harm curves of a model's heads: add plan=FILE ({HOW})")
        read_plan(self.path)

    def allocate(self, views: Sequence[LayerView], scores: Sequence[Tensor], request: Request) -> list[list[int]]:
        self.check_files()
        plan = read_plan(self.path)
        layers = tuple(view.layer for view in views)
        if layers != plan.layers or views[0].n_kv_heads != plan.harm.shape[2]:
            raise DataError(
                f"plan {self.path} is of layers {list(plan.layers)} with {plan.harm.shape[2]} KV heads, here are layers {list(layers)} "
                f"with {views[0].n_kv_heads}; {HOW} from a capture of this model"
            )
        return plan.budgets(request.budget, views[0].seq_len, request.minimum, self.shape).tolist()  # type: ignore[no-any-return]
