"""PyramidKV: SnapKV's choice, with budgets that fall with depth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvtool.policies.allocators import Pyramid, PyramidRule
from kvtool.policies.base import Method, Parts, Selector
from kvtool.policies.scorers import Group, Pool, WindowAttention
from kvtool.policies.text import check_kernel, check_range


@dataclass(frozen=True, slots=True)
class PyramidKV(Method):
    """Rank as SnapKV does; lower layers get more entries, upper layers fewer, on a straight line.

    PyramidKV, COLM 2025, arXiv 2406.02069. ``rule=exact`` keeps the paper's line (from 2 - 1/beta down to 1/beta of the
    mean) and the exact total; the other rules reproduce what the official codes do: ``factory`` (KVCache-Factory: uniform
    for prompts shorter than twice the budget, total too large by the rounding), ``adakv`` (AdaKV and HeadKV repositories),
    ``kvpress`` (uniform whenever the smallest layer would fall below the window).
    """

    window: int = 32
    beta: float = 20.0
    kernel: int = 7
    pool: Pool = "max"
    sink: int = 0
    group: Group = "mean"
    rule: PyramidRule = "exact"

    name: ClassVar[str] = "pyramidkv"
    source: ClassVar[str] = "PyramidKV, COLM 2025, arXiv 2406.02069"
    summary: ClassVar[str] = "SnapKV with budgets that fall linearly with depth"
    formula: ClassVar[str] = "score as snapkv; budget_l on a line from (2 - 1/beta) b to b / beta"

    def __post_init__(self) -> None:
        check_range(self.name, "window", self.window, 1)
        check_range(self.name, "beta", self.beta, 1)
        check_range(self.name, "sink", self.sink, 0)
        check_kernel(self.name, self.kernel)

    @property
    def exact(self) -> bool:
        return self.rule == "exact"

    def parts(self) -> Parts:
        scorer = WindowAttention(self.window, self.kernel, self.pool, self.group)
        return Parts(scorer, Pyramid(self.window, self.beta, self.rule), Selector(self.sink, self.window))
