"""Observed attention: H2O's sum, corrected for how many queries could see a position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvtool.policies.allocators import Uniform
from kvtool.policies.base import Method, Parts, Selector
from kvtool.policies.scorers import AverageAttention, Group
from kvtool.policies.text import check_range


@dataclass(frozen=True, slots=True)
class Observed(Method):
    """Keep the entries with the largest mean attention over the queries that can see them.

    NVIDIA kvpress, ``ObservedAttentionPress``: H2O's accumulated attention favours early positions, which more queries see;
    the mean does not, but overrates the last positions, which few queries see.
    """

    window: int = 0
    sink: int = 0
    group: Group = "mean"

    name: ClassVar[str] = "observed"
    source: ClassVar[str] = "ObservedAttentionPress of NVIDIA kvpress, after H2O, arXiv 2306.14048"
    summary: ClassVar[str] = "keeps entries with the largest mean attention over the queries that see them"
    formula: ClassVar[str] = "score_j = group-mean of sum_i A[i, j] / (T - j)"

    def __post_init__(self) -> None:
        for key in ("window", "sink"):
            check_range(self.name, key, getattr(self, key), 0)

    def parts(self) -> Parts:
        return Parts(AverageAttention(self.group), Uniform(), Selector(self.sink, self.window))
