"""Window only: the most recent entries, nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvtool.policies.allocators import Uniform
from kvtool.policies.base import Method, Parts, Selector
from kvtool.policies.scorers import Position


@dataclass(frozen=True, slots=True)
class Window(Method):
    """Keep the last `budget` entries (StreamingLLM's baseline "window attention", arXiv 2309.17453, section 2)."""

    name: ClassVar[str] = "window"
    source: ClassVar[str] = "baseline; arXiv 2309.17453, section 2"
    summary: ClassVar[str] = "keeps the last entries"
    formula: ClassVar[str] = "score_j = j"

    def parts(self) -> Parts:
        return Parts(Position(), Uniform(), Selector())
