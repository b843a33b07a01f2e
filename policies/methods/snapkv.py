"""SnapKV: the last prompt tokens choose which entries stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvtool.policies.allocators import Uniform
from kvtool.policies.base import Method, Parts, Selector
from kvtool.policies.scorers import Group, Pool, WindowAttention
from kvtool.policies.text import check_kernel, check_range


@dataclass(frozen=True, slots=True)
class SnapKV(Method):
    """Keep the last `window` entries and those that the window's queries attend to, pooled along positions.

    SnapKV: LLM Knows What You are Looking for Before Generation, NeurIPS 2024, arXiv 2404.14469. Per KV head: the query
    heads of a group are merged (`group`) before pooling. Defaults are those of the published LongBench runs.
    """

    window: int = 32
    kernel: int = 7
    pool: Pool = "max"
    sink: int = 0
    group: Group = "mean"

    name: ClassVar[str] = "snapkv"
    source: ClassVar[str] = "SnapKV, NeurIPS 2024, arXiv 2404.14469"
    summary: ClassVar[str] = "keeps entries that the last window of queries attends to, pooled, and that window"
    formula: ClassVar[str] = "score_j = pool_j(group-mean of mean_i A[i, j]), i in the last window queries, j before the window"

    def __post_init__(self) -> None:
        check_range(self.name, "window", self.window, 1)
        check_range(self.name, "sink", self.sink, 0)
        check_kernel(self.name, self.kernel)

    def parts(self) -> Parts:
        scorer = WindowAttention(self.window, self.kernel, self.pool, self.group)
        return Parts(scorer, Uniform(), Selector(self.sink, self.window))
