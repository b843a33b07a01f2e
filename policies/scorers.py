"""Scorers: statistics of one layer -> score per KV head and position, ``[H, T]``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvtool.policies.base import LayerView, Scorer

if TYPE_CHECKING:
    from torch import Tensor

Group = Literal["mean", "max", "sum"]
Pool = Literal["max", "avg", "none"]


def reduce_group(scores: Tensor, n_kv_heads: int, how: Group) -> Tensor:
    """Merge the query heads of each KV head, ``[Q, T] -> [H, T]``; selection is always per KV head."""
    grouped = scores.view(n_kv_heads, -1, scores.shape[-1])
    if how == "max":
        return grouped.amax(dim=1)
    return grouped.sum(dim=1) if how == "sum" else grouped.mean(dim=1)


def pool_positions(scores: Tensor, kernel: int, how: Pool) -> Tensor:
    """Pool along positions with an odd kernel, stride 1, same length.

    ``avg`` pads with zeros and always divides by the kernel; ``max`` pads with -inf (SnapKV's official code).
    """
    import torch.nn.functional as F

    if how == "none" or kernel == 1:
        return scores
    pool = F.max_pool1d if how == "max" else F.avg_pool1d
    return pool(scores[None], kernel, stride=1, padding=kernel // 2)[0]


@dataclass(frozen=True, slots=True)
class Position(Scorer):
    """Later positions score higher; nothing of the model is looked at."""

    def needs(self) -> tuple[str, ...]:
        return ()

    def score(self, view: LayerView) -> Tensor:
        import torch

        return torch.arange(view.seq_len, dtype=torch.float32).expand(view.n_kv_heads, -1)


@dataclass(frozen=True, slots=True)
class Accumulated(Scorer):
    """Attention accumulated over all prompt queries."""

    group: Group = "mean"

    def needs(self) -> tuple[str, ...]:
        return ("accumulated",)

    def score(self, view: LayerView) -> Tensor:
        return reduce_group(view.statistic("accumulated"), view.n_kv_heads, self.group)


@dataclass(frozen=True, slots=True)
class WindowAttention(Scorer):
    """Mean attention of the last `window` prompt queries, pooled along the positions before the window."""

    window: int
    kernel: int = 7
    pool: Pool = "max"
    group: Group = "mean"

    def needs(self) -> tuple[str, ...]:
        return (f"window_mean/{self.window}",)

    def score(self, view: LayerView) -> Tensor:
        import torch

        scores = reduce_group(view.statistic(self.needs()[0]), view.n_kv_heads, self.group)
        n_past = max(0, view.seq_len - self.window)
        # The window's own columns take no part in the pooling: they are cut off first, as in the official code.
        past = pool_positions(scores[:, :n_past], self.kernel, self.pool) if n_past else scores[:, :0]
        return torch.cat([past, scores[:, n_past:]], dim=-1)


@dataclass(frozen=True, slots=True)
class Random(Scorer):
    """Uniform random scores from a seed, the sample's seed and the layer; equal on every device."""

    seed: int = 0

    def needs(self) -> tuple[str, ...]:
        return ()

    def score(self, view: LayerView) -> Tensor:
        import numpy as np
        import torch

        rng = np.random.default_rng([self.seed, view.seed, view.layer])
        return torch.from_numpy(rng.random((view.n_kv_heads, view.seq_len), dtype=np.float32))
