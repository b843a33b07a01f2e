"""Per-head windows by the kind of the head and how sure it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvtool.policies.base import Method, Parts, Selector
from kvtool.policies.head_allocators import KindWindows
from kvtool.policies.headfile import check_path
from kvtool.policies.scorers import Position
from kvtool.policies.text import check_range


@dataclass(frozen=True, slots=True)
class HeadWindows(Method):
    """Every head keeps the first `sink` entries and a window of the last ones, as wide as its kind asks for.

    The users' study of head-aware windows: groups G (by confidence), I (inverse), J (small gathering) and K (one window for
    all). Kinds and confidence come from a heads.json of kvtool classify. Heads that are less sure than `confidence`, and kinds
    other than the three, get `base`. Without a budget the windows are entries; with one they are weights. The windows roll
    while decoding with ``decode=evict``.
    """

    heads: str = ""
    positional: int = 16
    mixed: int = 64
    gathering: int = 256
    base: int = 64
    confidence: float = 0.7
    sink: int = 4

    name: ClassVar[str] = "head_windows"
    source: ClassVar[str] = "the users' study of head-aware windows (Pythia-2.8b)"
    summary: ClassVar[str] = "windows by head kind where the kind is sure, the same sink for all"
    formula: ClassVar[str] = "head keeps sink + window(kind) if confidence(kind) >= confidence, else sink + base"
    implies_budget: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_path(self.name, self.heads)
        for key in ("positional", "mixed", "gathering", "base"):
            check_range(self.name, key, getattr(self, key), 1)
        check_range(self.name, "confidence", self.confidence, 0, 1)
        check_range(self.name, "sink", self.sink, 0)

    def _allocator(self) -> KindWindows:
        windows = (("positional", self.positional), ("mixed", self.mixed), ("gathering", self.gathering))
        return KindWindows(self.heads, windows, self.base, self.confidence, self.sink)

    def implied_entries(self, seq_len: int) -> float:
        allocator = self._allocator()
        windows = np.asarray([self.base]) if allocator.uniform else allocator.table()
        return float(np.minimum(windows + self.sink, seq_len).mean())

    def parts(self) -> Parts:
        return Parts(Position(), self._allocator(), Selector(self.sink, 0))
