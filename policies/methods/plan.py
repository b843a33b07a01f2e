"""Plan: budgets of every head from a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvtool.policies.base import Method, Parts, Selector
from kvtool.policies.budgetfile import read_budgets, scorer_parts
from kvtool.policies.fixed_allocator import FixedBudgets, own_entries
from kvtool.policies.headfile import check_path
from kvtool.policies.scorers import Position


@dataclass(frozen=True, slots=True)
class Planned(Method):
    """Rank by the plan's scorer; every head keeps what the file says, whatever the prompt.

    kvtool's own form, ``docs/plans.md``: made from any policy's budgets on a capture, from harm curves, or from LU-KV's arrays,
    DuoAttention's patterns and HeadKV's scores. At another length heads keep their share of the unprotected entries; between two of
    the file's budgets they keep what lies between.
    """

    file: str = ""

    name: ClassVar[str] = "plan"
    source: ClassVar[str] = "kvtool (fixed budgets), LU-KV, arXiv 2602.08585"
    summary: ClassVar[str] = "keeps per head what a file of budgets says"
    formula: ClassVar[str] = "budget_lh from the file; score as the file's method"
    implies_budget: ClassVar[bool] = True
    own_share: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_path(self.name, self.file)

    def implied_entries(self, seq_len: int) -> float:
        # Without its file the method cannot run (`FixedBudgets.check_files`), but it can be listed.
        return own_entries(read_budgets(self.file), seq_len) if self.file else float(seq_len)

    def parts(self) -> Parts:
        allocator = FixedBudgets(self.file)
        if not self.file:
            return Parts(Position(), allocator, Selector())
        parts = scorer_parts(read_budgets(self.file).scorer)
        return Parts(parts.scorer, allocator, parts.selector)
