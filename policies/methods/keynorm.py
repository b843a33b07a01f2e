"""Key norm: small keys stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvtool.policies.allocators import Uniform
from kvtool.policies.base import Method, Parts, Selector
from kvtool.policies.scorers import Negative
from kvtool.policies.text import check_range


@dataclass(frozen=True, slots=True)
class KeyNorm(Method):
    """Keep the entries with the smallest Euclidean norm of the key.

    A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression, EMNLP 2024, arXiv 2406.11430; in all layers, as
    in NVIDIA kvpress.
    """

    window: int = 0
    sink: int = 0

    name: ClassVar[str] = "keynorm"
    source: ClassVar[str] = "L2 norm (Knorm), EMNLP 2024, arXiv 2406.11430"
    summary: ClassVar[str] = "keeps entries with the smallest key norm"
    formula: ClassVar[str] = "score_j = -|k_j|_2"

    def __post_init__(self) -> None:
        for key in ("window", "sink"):
            check_range(self.name, key, getattr(self, key), 0)

    def parts(self) -> Parts:
        return Parts(Negative("key_norm"), Uniform(), Selector(self.sink, self.window))
