"""AdaKV: SnapKV's scores, heads of a layer compete for its entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvtool.policies.allocators import Joint, JointRule
from kvtool.policies.base import Method, Parts, Selector
from kvtool.policies.scorers import Group, Pool, WindowAttention
from kvtool.policies.text import check_kernel, check_range


@dataclass(frozen=True, slots=True)
class AdaKV(Method):
    """Rank as SnapKV does; a head's budget is what it wins in one top-k over all heads of the layer, with a floor.

    Ada-KV, NeurIPS 2025, arXiv 2407.11550. `floor` is the share that every head is sure of. ``rule=exact`` keeps the total;
    ``official`` is the AdaKV repository's rounding, ``kvpress`` the different rule of NVIDIA kvpress.
    """

    window: int = 32
    floor: float = 0.2
    kernel: int = 7
    pool: Pool = "max"
    sink: int = 0
    group: Group = "mean"
    normalize: bool = False
    rule: JointRule = "exact"

    name: ClassVar[str] = "adakv"
    source: ClassVar[str] = "Ada-KV, NeurIPS 2025, arXiv 2407.11550"
    summary: ClassVar[str] = "SnapKV's scores; heads of a layer compete for its entries, above a floor"
    formula: ClassVar[str] = "score as snapkv; budget_h = (1 - floor) won_h + floor b, won_h of the layer's joint top-(H b)"

    def __post_init__(self) -> None:
        check_range(self.name, "window", self.window, 1)
        check_range(self.name, "floor", self.floor, 0, 1)
        check_range(self.name, "sink", self.sink, 0)
        check_kernel(self.name, self.kernel)

    @property
    def exact(self) -> bool:
        return self.rule != "official"

    def parts(self) -> Parts:
        scorer = WindowAttention(self.window, self.kernel, self.pool, self.group)
        return Parts(scorer, Joint(self.floor, self.rule, self.normalize), Selector(self.sink, self.window))
