"""H2O: heavy hitters by accumulated attention, and recent entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvtool.policies.allocators import Uniform
from kvtool.policies.base import Method, Parts, Selector
from kvtool.policies.scorers import Accumulated, Group
from kvtool.policies.text import check_range


@dataclass(frozen=True, slots=True)
class H2O(Method):
    """Keep the last `window` entries and those with the largest attention accumulated over all prompt queries.

    H2O: Heavy-Hitter Oracle for Efficient Generative Inference of LLMs, NeurIPS 2023, arXiv 2306.14048. One cut
    after the prompt; with ``decode=evict`` the published form, whose scores go on accumulating.
    """

    window: int = 32
    sink: int = 0
    group: Group = "mean"

    name: ClassVar[str] = "h2o"
    source: ClassVar[str] = "H2O, NeurIPS 2023, arXiv 2306.14048"
    summary: ClassVar[str] = "keeps entries with the largest accumulated attention, and the last ones"
    formula: ClassVar[str] = "score_j = group-mean of sum_i A[i, j], all prompt queries i"

    def __post_init__(self) -> None:
        check_range(self.name, "window", self.window, 0)
        check_range(self.name, "sink", self.sink, 0)

    def parts(self) -> Parts:
        return Parts(Accumulated(self.group), Uniform(), Selector(self.sink, self.window))
