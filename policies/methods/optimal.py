"""Optimal budgets: entries go to the heads where they save the most predicted harm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvtool.errors import ConfigError
from kvtool.policies.base import Method, Parts, Selector
from kvtool.policies.headfile import check_path
from kvtool.policies.plan_allocator import PlanBudgets
from kvtool.policies.planfile import read_plan
from kvtool.policies.scorers import Position
from kvtool.policies.shapes import BudgetShape


@dataclass(frozen=True, slots=True)
class Optimal(Method):
    """Rank by the plan's scorer; budgets of all heads follow from their harm curves by convex hull and water-filling.

    kvtool's own. A plan is measured once per model and kind of workload (`kvtool plan export`, from a capture) and serves any
    total and length. `shape` holds the budgets to a simpler form: the same for all heads (``uniform``), for those of a layer
    (``layer``), of an index (``head``) or of a kind (``kinds``, of ``heads=FILE``), the same for all layers (``within``), or HACE's, a
    factor per layer times one per head above a floor (``rank1``).
    """

    plan: str = ""
    shape: BudgetShape = "free"
    heads: str = ""

    name: ClassVar[str] = "optimal"
    source: ClassVar[str] = "kvtool (harm curves, convex hull, water-filling)"
    summary: ClassVar[str] = "heads share so that the predicted harm of a capture is smallest"
    formula: ClassVar[str] = "budgets minimise the sum over heads of harm_lh(budget_lh); score as the plan's method"

    def __post_init__(self) -> None:
        check_path(self.name, self.plan)
        check_path(self.name, self.heads)
        if self.heads and self.shape != "kinds":
            raise ConfigError(f"policy {self.name!r}: heads= is read with shape=kinds only, found shape={self.shape}")

    @property
    def wants_heads(self) -> bool:
        """True if the kinds of heads decide and no file is named yet."""
        return self.shape == "kinds" and not self.heads

    def parts(self) -> Parts:
        allocator = PlanBudgets(self.plan, self.shape, self.heads)
        if not self.plan:
            # Without its plan the method cannot run (`PlanBudgets.check_files`), but it can be listed.
            return Parts(Position(), allocator, Selector())
        from kvtool.policies.text import parse_policy

        scorer = read_plan(self.plan).scorer
        parts = parse_policy(f"{scorer}{',' if ':' in scorer else ':'}budget=100%").method.parts()
        return Parts(parts.scorer, allocator, parts.selector)
