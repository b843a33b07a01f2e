"""KeyDiff: keys that differ from the others stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvtool.policies.allocators import Uniform
from kvtool.policies.base import Method, Parts, Selector
from kvtool.policies.scorers import Negative
from kvtool.policies.text import check_range


@dataclass(frozen=True, slots=True)
class KeyDiff(Method):
    """Keep the entries whose keys are least similar to the mean of the head's normalised keys.

    KeyDiff, arXiv 2504.15364; as in NVIDIA kvpress, in one shot. No query is looked at. The paper's block-wise form is
    ``chunk=128``.
    """

    window: int = 0
    sink: int = 0

    name: ClassVar[str] = "keydiff"
    source: ClassVar[str] = "KeyDiff, arXiv 2504.15364"
    summary: ClassVar[str] = "keeps entries whose keys differ from the mean key"
    formula: ClassVar[str] = "score_j = -cos(k_j, mean_i k_i / |k_i|)"

    def __post_init__(self) -> None:
        for key in ("window", "sink"):
            check_range(self.name, key, getattr(self, key), 0)

    def parts(self) -> Parts:
        return Parts(Negative("key_similarity"), Uniform(), Selector(self.sink, self.window))
