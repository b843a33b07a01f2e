"""Full cache: the baseline of every comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvtool.policies.allocators import Uniform
from kvtool.policies.base import Method, Parts, Selector
from kvtool.policies.scorers import Position


@dataclass(frozen=True, slots=True)
class Full(Method):
    """Keep every entry."""

    name: ClassVar[str] = "full"
    source: ClassVar[str] = "baseline"
    summary: ClassVar[str] = "keeps every entry"
    formula: ClassVar[str] = "kept = {0, ..., T-1}"
    keeps_all: ClassVar[bool] = True

    def parts(self) -> Parts:
        return Parts(Position(), Uniform(), Selector())
