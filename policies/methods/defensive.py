"""DefensiveKV: the worst case over queries and heads decides, not the average."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvtool.policies.allocators import Joint, Uniform
from kvtool.policies.base import Method, Parts
from kvtool.policies.scorers import ByOutput, Pool, Worst
from kvtool.policies.selectors import TwoStage
from kvtool.policies.text import check_kernel, check_range


@dataclass(frozen=True, slots=True)
class Defensive(Method):
    """Rank by the largest attention that any of the last queries of any head of the group pays, two stages as CriticalKV.

    After DefensiveKV (Taming the Fragility of KV Cache Eviction, ICLR 2026, arXiv 2510.13334): maximum instead of mean over
    window and group, raised to at least its mean over positions. Heads of a layer compete as in AdaKV unless
    ``adaptive=false``. No official outputs were at hand to compare with.
    """

    window: int = 32
    kernel: int = 5
    pool: Pool = "avg"
    sink: int = 0
    first: float = 0.5
    epsilon: float = 1e-4
    adaptive: bool = True
    floor: float = 0.2

    name: ClassVar[str] = "defensive"
    source: ClassVar[str] = "DefensiveKV, ICLR 2026, arXiv 2510.13334 (its aggregation)"
    summary: ClassVar[str] = "keeps what any one of the last queries needs: the worst case, not the mean"
    formula: ClassVar[str] = "s_j = pool_j(max(max over window and group A[i, j], its mean over j)); then as critical"

    def __post_init__(self) -> None:
        check_range(self.name, "window", self.window, 1)
        check_range(self.name, "sink", self.sink, 0)
        check_range(self.name, "first", self.first, 0, 1)
        check_range(self.name, "floor", self.floor, 0, 1)
        check_range(self.name, "epsilon", self.epsilon, 0)
        check_kernel(self.name, self.kernel)

    def parts(self) -> Parts:
        allocator = Joint(self.floor, "kvpress") if self.adaptive else Uniform()
        scorer = ByOutput(Worst(self.window, self.kernel, self.pool), self.epsilon)
        return Parts(scorer, allocator, TwoStage(self.sink, self.window, self.first))
