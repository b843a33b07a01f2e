"""LAVa: layers and heads share the cache by one score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvtool.policies.allocators import Lava
from kvtool.policies.base import Method, Parts, Selector
from kvtool.policies.scorers import Group, LargestValue, Pool
from kvtool.policies.text import check_kernel, check_range


@dataclass(frozen=True, slots=True)
class LAVa(Method):
    """Rank by window attention times the head's largest value norm; layers share by entropy, heads by joint top-k.

    LAVa, EMNLP Findings 2025, arXiv 2509.09754, after the official code; kvtool's totals are exact, the code truncates.
    No official outputs were at hand to compare with.
    """

    window: int = 32
    floor: float = 0.0
    kernel: int = 7
    pool: Pool = "max"
    sink: int = 0
    group: Group = "max"

    name: ClassVar[str] = "lava"
    source: ClassVar[str] = "LAVa, EMNLP Findings 2025, arXiv 2509.09754"
    summary: ClassVar[str] = "one score for all heads; layers share by its entropy, heads by what they win"
    formula: ClassVar[str] = (
        "score_j = group-max of pool_j(mean_i A[i, j]) max_k |v_k|_1; budget_l ~ entropy of the layer's scores"
    )

    def __post_init__(self) -> None:
        check_range(self.name, "window", self.window, 1)
        check_range(self.name, "floor", self.floor, 0, 1)
        check_range(self.name, "sink", self.sink, 0)
        check_kernel(self.name, self.kernel)

    def parts(self) -> Parts:
        scorer = LargestValue(self.window, self.kernel, self.pool, self.group)
        return Parts(scorer, Lava(self.floor), Selector(self.sink, self.window))
