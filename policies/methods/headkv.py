"""HeadKV: important heads keep more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from kvtool.policies.base import Method, Parts, Selector
from kvtool.policies.head_allocators import HeadImportance, HeadRule, HeadScores
from kvtool.policies.headfile import check_path
from kvtool.policies.scorers import Group, Pool, WindowAttention
from kvtool.policies.text import check_kernel, check_range


@dataclass(frozen=True, slots=True)
class HeadKV(Method):
    """Rank as SnapKV does; heads get entries by an importance that is measured once per model.

    HeadKV (Not All Heads Matter), ICLR 2025, arXiv 2410.19258. `heads` is a heads.json of kvtool classify or the JSON file of
    HeadKV. The larger `beta`, the less is shared out by importance. ``rule=exact`` hands on what heads capped by the prompt
    cannot use; ``official`` loses it as the published code does, ``factory`` is KVCache-Factory's variant.
    """

    heads: str = ""
    score: Literal["importance", "retrieval"] = "importance"
    beta: float = 1.5
    temperature: float = 1.0
    window: int = 8
    kernel: int = 7
    pool: Pool = "max"
    sink: int = 0
    group: Group = "mean"
    rule: HeadRule = "exact"

    name: ClassVar[str] = "headkv"
    source: ClassVar[str] = "HeadKV, ICLR 2025, arXiv 2410.19258"
    summary: ClassVar[str] = "SnapKV's scores; heads share by an importance measured once per model"
    formula: ClassVar[str] = "score as snapkv; budget_lh = b - b/beta + (b/beta) L H S_lh^temperature / sum S^temperature"

    def __post_init__(self) -> None:
        check_path(self.name, self.heads)
        check_range(self.name, "beta", self.beta, 1)
        check_range(self.name, "temperature", self.temperature, 0)
        check_range(self.name, "window", self.window, 1)
        check_range(self.name, "sink", self.sink, 0)
        check_kernel(self.name, self.kernel)

    @property
    def exact(self) -> bool:
        return self.rule == "exact"

    def parts(self) -> Parts:
        scorer = WindowAttention(self.window, self.kernel, self.pool, self.group)
        source = HeadScores(self.heads, self.score)
        allocator = HeadImportance(source, self.window, self.beta, self.temperature, self.rule)
        return Parts(scorer, allocator, Selector(self.sink, self.window))
