"""DuoAttention: retrieval heads keep everything, streaming heads a sink and what is recent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from kvtool.policies.base import Method, Parts, Selector
from kvtool.policies.head_allocators import FullHeads, HeadScores, full_heads
from kvtool.policies.headfile import check_path, read_head_file
from kvtool.policies.scorers import Position
from kvtool.policies.text import check_range


@dataclass(frozen=True, slots=True)
class Duo(Method):
    """Some heads keep everything; the others keep the first `sink` and the last `recent` entries.

    DuoAttention, ICLR 2025, arXiv 2410.10819. `heads` is its pattern folder (gates per KV head) or a heads.json, whose
    retrieval scores then stand for the gates. Without a budget the share `sparsity` of the heads streams, as in the official
    code; with one, as many heads as fit keep everything, and the next one gets the rest as a longer window.
    """

    heads: str = ""
    score: Literal["retrieval", "importance"] = "retrieval"
    sparsity: float = 0.5
    sink: int = 64
    recent: int = 256

    name: ClassVar[str] = "duo"
    source: ClassVar[str] = "DuoAttention, ICLR 2025, arXiv 2410.10819"
    summary: ClassVar[str] = "retrieval heads keep everything, the others sink and recent entries"
    formula: ClassVar[str] = "head keeps all if its gate >= quantile(gates, sparsity); else sink + recent"
    small: ClassVar[str] = "sink=4,recent=16"
    implies_budget: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_path(self.name, self.heads)
        check_range(self.name, "sparsity", self.sparsity, 0, 1)
        check_range(self.name, "sink", self.sink, 0)
        check_range(self.name, "recent", self.recent, 1)

    def _source(self) -> HeadScores:
        return HeadScores(self.heads, self.score)

    def implied_entries(self, seq_len: int) -> float:
        streaming = min(self.sink + self.recent, seq_len)
        if not self.heads:
            return seq_len - self.sparsity * (seq_len - streaming)
        table = read_head_file(self.heads)
        gates = table.kv_scores.get(self.score, next(iter(table.kv_scores.values()), None))
        share = 1 - self.sparsity if gates is None else float(full_heads(gates, self.sparsity).mean())
        return streaming + share * (seq_len - streaming)

    def parts(self) -> Parts:
        allocator = FullHeads(self._source(), self.sparsity, self.sink + self.recent)
        return Parts(Position(), allocator, Selector(self.sink, self.recent))
