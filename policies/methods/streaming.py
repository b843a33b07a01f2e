"""StreamingLLM: attention sinks and the most recent entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvtool.policies.allocators import Uniform
from kvtool.policies.base import Method, Parts, Selector
from kvtool.policies.scorers import Position
from kvtool.policies.text import check_range


@dataclass(frozen=True, slots=True)
class Streaming(Method):
    """Keep the first `sink` entries and fill the budget with the last ones.

    Efficient Streaming Language Models with Attention Sinks, ICLR 2024, arXiv 2309.17453. Applied once, after the prompt,
    with the original rotations (the paper re-numbers positions inside the cache at every step).
    """

    sink: int = 4

    name: ClassVar[str] = "streaming"
    source: ClassVar[str] = "StreamingLLM, ICLR 2024, arXiv 2309.17453"
    summary: ClassVar[str] = "keeps the first (sink) and the last entries"
    formula: ClassVar[str] = "kept = {0, ..., sink-1} + the last budget - sink positions"

    def __post_init__(self) -> None:
        check_range(self.name, "sink", self.sink, 0)

    def parts(self) -> Parts:
        return Parts(Position(), Uniform(), Selector(sink=self.sink))
