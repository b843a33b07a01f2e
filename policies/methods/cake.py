"""CAKE: layers share the cache by how dispersed and how changing their attention is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvtool.policies.allocators import Cake, CakeRule
from kvtool.policies.base import Method, Parts, Selector
from kvtool.policies.scorers import Group, MeanVariance, Pool
from kvtool.policies.text import check_kernel, check_range


@dataclass(frozen=True, slots=True)
class CAKE(Method):
    """Rank by mean plus gamma times variance of the last queries' attention; layers get entries by their preference.

    CAKE, ICLR 2025, arXiv 2503.12491. A layer's preference is the entropy of its window attention to the power 1/tau1 times
    its variance over the queries to the power 1/tau2. ``rule=exact`` shares the total out exactly, in one shot;
    ``rule=official`` is the repository's rounding, with ``cascade=true`` the cut after every layer. Both can keep fewer
    entries than asked for.
    """

    window: int = 32
    gamma: float = 200.0
    tau1: float = 1.0
    tau2: float = 1.0
    kernel: int = 5
    pool: Pool = "avg"
    sink: int = 0
    group: Group = "mean"
    rule: CakeRule = "exact"
    cascade: bool = False

    name: ClassVar[str] = "cake"
    source: ClassVar[str] = "CAKE, ICLR 2025, arXiv 2503.12491"
    summary: ClassVar[str] = "keeps entries with high or fluctuating attention; layers share by dispersion and shift"
    formula: ClassVar[str] = (
        "score_j = group-mean of pool_j(mean_i A[i, j] + gamma var_i A[i, j]); budget_l ~ H_l^(1/tau1) V_l^(1/tau2)"
    )

    def __post_init__(self) -> None:
        check_range(self.name, "window", self.window, 1)
        check_range(self.name, "gamma", self.gamma, 0)
        check_range(self.name, "sink", self.sink, 0)
        check_kernel(self.name, self.kernel)
        for key in ("tau1", "tau2"):
            check_range(self.name, key, getattr(self, key), 1e-3)

    @property
    def exact(self) -> bool:
        return self.rule == "exact" and not self.cascade

    def parts(self) -> Parts:
        scorer = MeanVariance(self.window, self.gamma, self.kernel, self.pool, self.group)
        allocator = Cake(self.window, self.tau1, self.tau2, self.rule, self.cascade)
        return Parts(scorer, allocator, Selector(self.sink, self.window))
