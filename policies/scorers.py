"""Scorers: statistics of one layer -> score per KV head and position, ``[H, T]``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

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


def pool_past(scores: Tensor, window: int, kernel: int, how: Pool) -> Tensor:
    """Pool the positions before the window; its own columns are cut off first, as in SnapKV's official code."""
    import torch

    n_past = max(0, scores.shape[-1] - window)
    return torch.cat([pool_positions(scores[:, :n_past], kernel, how), scores[:, n_past:]], dim=-1) if n_past else scores


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
        scores = reduce_group(view.statistic(self.needs()[0]), view.n_kv_heads, self.group)
        return pool_past(scores, self.window, self.kernel, self.pool)


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


@dataclass(frozen=True, slots=True)
class MeanVariance(Scorer):
    """Mean plus `gamma` times variance of the last `window` queries' attention, pooled (CAKE's indicator).

    As in the official code the variance divides by n - 1 and pooling comes before the mean over the group.
    """

    window: int
    gamma: float = 200.0
    kernel: int = 5
    pool: Pool = "avg"
    group: Group = "mean"

    def needs(self) -> tuple[str, ...]:
        return (f"window_mean/{self.window}", f"window_var/{self.window}")

    def score(self, view: LayerView) -> Tensor:
        mean, variance = (view.statistic(name) for name in self.needs())
        n_queries = min(self.window, view.seq_len)
        sample = variance * (n_queries / (n_queries - 1)) if n_queries > 1 else variance
        pooled = pool_past(mean + self.gamma * sample, self.window, self.kernel, self.pool)
        return reduce_group(pooled, view.n_kv_heads, self.group)


@dataclass(frozen=True, slots=True)
class AverageAttention(Scorer):
    """Accumulated attention divided by the number of queries that can see the position."""

    # That number is the distance from the end of a whole prompt, not of what is left of it.
    decodes: ClassVar[bool] = False

    group: Group = "mean"

    def needs(self) -> tuple[str, ...]:
        return ("accumulated",)

    def score(self, view: LayerView) -> Tensor:
        import torch

        total = view.statistic("accumulated")
        seen_by = torch.arange(view.seq_len, 0, -1, dtype=total.dtype, device=total.device)
        return reduce_group(total / seen_by, view.n_kv_heads, self.group)


@dataclass(frozen=True, slots=True)
class LastQuery(Scorer):
    """Attention of the last query, mean over all query heads of the layer: one set for all its KV heads (TOVA)."""

    def needs(self) -> tuple[str, ...]:
        return ("last",)

    def score(self, view: LayerView) -> Tensor:
        return view.statistic("last").mean(dim=0, keepdim=True).expand(view.n_kv_heads, -1)


@dataclass(frozen=True, slots=True)
class Negative(Scorer):
    """A statistic per KV head and position, the smallest first: key norms, similarity of keys to their mean."""

    statistic: str

    def needs(self) -> tuple[str, ...]:
        return (self.statistic,)

    def score(self, view: LayerView) -> Tensor:
        return -view.statistic(self.statistic)


@dataclass(frozen=True, slots=True)
class Expected(Scorer):
    """Attention expected from the queries of the next `future` positions, times the norm of the value."""

    future: int
    sink: int = 4
    covariance: bool = True
    value_norm: bool = True
    epsilon: float = 0.0

    def needs(self) -> tuple[str, ...]:
        spread = (f"expected_spread/{self.sink}+{self.future}",) if self.covariance else ()
        return (f"expected_logit/{self.sink}+{self.future}", *spread, *(("value_norm",) if self.value_norm else ()))

    def score(self, view: LayerView) -> Tensor:
        import torch

        logits = view.statistic(f"expected_logit/{self.sink}+{self.future}")
        if self.covariance:
            logits = logits + view.statistic(f"expected_spread/{self.sink}+{self.future}")
        n_sink = min(self.sink, view.seq_len)
        if n_sink == view.seq_len:
            return torch.ones(view.n_kv_heads, view.seq_len, device=logits.device)
        expected = reduce_group(logits[:, n_sink:].softmax(dim=-1), view.n_kv_heads, "mean")
        if self.value_norm:
            expected = (expected + self.epsilon) * view.statistic("value_norm")[:, n_sink:]
        sinks = expected.new_full((view.n_kv_heads, n_sink), float(expected.amax()) + 1)
        return torch.cat([sinks, expected], dim=-1)


@dataclass(frozen=True, slots=True)
class Worst(Scorer):
    """Largest attention of the last `window` queries over the group, never below the mean over positions.

    Defensive aggregation (DefensiveKV, ICLR 2026, arXiv 2510.13334): what one query of one head needs is not averaged away.
    """

    window: int
    kernel: int = 5
    pool: Pool = "avg"

    def needs(self) -> tuple[str, ...]:
        return (f"window_max/{self.window}",)

    def score(self, view: LayerView) -> Tensor:
        worst = reduce_group(view.statistic(self.needs()[0]), view.n_kv_heads, "max")
        n_past = max(0, view.seq_len - self.window)
        if n_past:
            worst = worst.clamp(min=worst[:, :n_past].mean(dim=-1, keepdim=True))
        return pool_past(worst, self.window, self.kernel, self.pool)


@dataclass(frozen=True, slots=True)
class LargestValue(Scorer):
    """Pooled window attention times the largest L1 norm of the head's values (LAVa, arXiv 2509.09754, official code)."""

    window: int
    kernel: int = 7
    pool: Pool = "max"
    group: Group = "max"

    def needs(self) -> tuple[str, ...]:
        return (f"window_mean/{self.window}", "value_norm1")

    def score(self, view: LayerView) -> Tensor:
        pooled = pool_past(view.statistic(self.needs()[0]), self.window, self.kernel, self.pool)
        n_past = max(1, view.seq_len - self.window)
        largest = view.statistic("value_norm1")[:, :n_past].amax(dim=-1, keepdim=True)
        return reduce_group(pooled, view.n_kv_heads, self.group) * largest


@dataclass(frozen=True, slots=True)
class ByOutput(Scorer):
    """A base score, and that score weighted by the norm of the value after the output projection: ``[2, H, T]``.

    For `kvtool.policies.selectors.TwoStage` (CriticalKV, arXiv 2502.03805).
    """

    base: Scorer
    epsilon: float = 1e-4

    def needs(self) -> tuple[str, ...]:
        return (*self.base.needs(), "output_norm")

    def score(self, view: LayerView) -> Tensor:
        import torch

        base = self.base.score(view)
        return torch.stack([base, (base + self.epsilon) * view.statistic("output_norm")])


@dataclass(frozen=True, slots=True)
class Future(Scorer):
    """Attention that the evaluation probes will pay: what a perfect forecast would keep."""

    group: Group = "mean"

    def needs(self) -> tuple[str, ...]:
        return ("future",)

    def score(self, view: LayerView) -> Tensor:
        return reduce_group(view.statistic("future"), view.n_kv_heads, self.group)
