"""TOVA: what the last token attends to stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvtool.policies.allocators import Uniform
from kvtool.policies.base import Method, Parts, Selector
from kvtool.policies.scorers import LastQuery
from kvtool.policies.text import check_range


@dataclass(frozen=True, slots=True)
class TOVA(Method):
    """Keep the entries with the largest attention of the last query, one set for all heads of a layer.

    Transformers are Multi-State RNNs, EMNLP 2024, arXiv 2401.06104. Nothing is protected: the newest entry can go too.
    The published method evicts at every step: add ``decode=evict``.
    """

    window: int = 0
    sink: int = 0

    name: ClassVar[str] = "tova"
    source: ClassVar[str] = "TOVA, EMNLP 2024, arXiv 2401.06104"
    summary: ClassVar[str] = "keeps what the last token attends to, one set for all heads of a layer"
    formula: ClassVar[str] = "score_j = mean over all query heads of A[last, j]"

    def __post_init__(self) -> None:
        for key in ("window", "sink"):
            check_range(self.name, key, getattr(self, key), 0)

    def parts(self) -> Parts:
        return Parts(LastQuery(), Uniform(), Selector(self.sink, self.window))
