"""Oracle: the future attention itself, which only a capture knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvtool.policies.allocators import Uniform
from kvtool.policies.base import Method, Parts, Selector
from kvtool.policies.scorers import Future
from kvtool.policies.text import check_range


@dataclass(frozen=True, slots=True)
class Oracle(Method):
    """Keep the entries that the question and the answer will attend to most: what a perfect forecast of attention would keep.

    Not a policy that can be run, but a yardstick: it ranks by the very probes that the others are judged on. Attention is
    not the loss, so it is no strict upper bound of the score.
    """

    window: int = 0
    sink: int = 0

    name: ClassVar[str] = "oracle"
    source: ClassVar[str] = "kvtool (a yardstick, no method)"
    summary: ClassVar[str] = "keeps what the future will attend to; simulate only"
    formula: ClassVar[str] = "score_j = group-mean of sum over probe tokens i of A[i, j]"
    simulate_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for key in ("window", "sink"):
            check_range(self.name, key, getattr(self, key), 0)

    def parts(self) -> Parts:
        return Parts(Future(), Uniform(), Selector(self.sink, self.window))
