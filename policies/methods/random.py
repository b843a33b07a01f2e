"""Random: the control that every scorer has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvtool.policies.allocators import Uniform
from kvtool.policies.base import Method, Parts, Selector
from kvtool.policies.scorers import Random as RandomScorer
from kvtool.policies.text import check_range


@dataclass(frozen=True, slots=True)
class Random(Method):
    """Keep random entries per head, with the same protected sink and window as the methods it is compared with."""

    window: int = 32
    sink: int = 4
    seed: int = 0

    name: ClassVar[str] = "random"
    source: ClassVar[str] = "control"
    summary: ClassVar[str] = "keeps random entries, the first (sink) and the last ones: the control"
    formula: ClassVar[str] = "score_j ~ U(0, 1), seeded by (seed, sample, layer)"

    def __post_init__(self) -> None:
        for key in ("window", "sink", "seed"):
            check_range(self.name, key, getattr(self, key), 0)

    def parts(self) -> Parts:
        return Parts(RandomScorer(self.seed), Uniform(), Selector(self.sink, self.window))
