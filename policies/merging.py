"""Merging evicted entries into survivors, as the official codes do it.

Shapes: H KV heads, T prompt positions, N kept entries of a head, E evicted ones, D head dimension.

Every evicted entry goes to the kept one whose key (post-RoPE) has the largest cosine with its own; equal ones: the first.
All rules have the form ``k' = (own k + sum w_j k_j) / divisor``, values alike:

======== ============================ ==================== ===================== =========================================
rule     own                          w_j                  divisor               source
======== ============================ ==================== ===================== =========================================
pivot    1 + count / 2                1 / 2                1 + count             LOOK-M, arXiv 2406.18139 (KVCache-Factory)
weighted 1                            (1 + cos_j) / 2      1 + sum w             KVMerger, arXiv 2407.08454 (same code)
values   1, keys stay                 max(cos_j, 0) times  1 + sum w             kvpress, MergingPress
                                      |v_j|/(|v_j|+|v|)
d2o      1                            cos_j                1 + count             D2O, arXiv 2406.13035
======== ============================ ==================== ===================== =========================================

None of the official codes gives the merged entry the softmax mass of what it stands for; `merged_bias` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvtool.policies.representatives import Bias, evicted_positions

if TYPE_CHECKING:
    from torch import Tensor

Rule = Literal["pivot", "weighted", "values", "d2o", "cam"]

#: Elements of one block of similarities: 16 MB.
SIMILARITY_ELEMENTS = 1 << 22

#: Positions that a value is spread over by CaM (``merge_budget`` of the official code).
CAM_SPREAD = 32


@dataclass(frozen=True, slots=True)
class Nearest:
    """Where the evicted entries of one head go.

    Attributes
    ----------
    evicted : Tensor ``[E]``
        Ascending positions.
    target : Tensor ``[E]``
        Index into the kept entries, int64.
    similarity : Tensor ``[E]``
        Cosine of the two keys.
    """

    evicted: Tensor
    target: Tensor
    similarity: Tensor


@dataclass(frozen=True, slots=True)
class Merged:
    """Kept entries of one head after merging.

    Attributes
    ----------
    keys, values : Tensor ``[N, D]``
    own : Tensor ``[N]``
        Share of the kept entry itself in the merged one, before division.
    weights : Tensor ``[E]``
        Share of each evicted entry; 0 for those that are dropped.
    counts : Tensor ``[N]``
        Evicted entries that were merged into each.
    target : Tensor ``[E]``
    """

    keys: Tensor
    values: Tensor
    own: Tensor
    weights: Tensor
    counts: Tensor
    target: Tensor


def nearest_kept(keys: Tensor, kept: Tensor) -> Nearest:
    """Find the most similar kept key of every evicted one; E x N similarities are held in blocks only.

    Parameters
    ----------
    keys : Tensor ``[T, D]``
    kept : Tensor ``[N]``
        At least one position.
    """
    import torch

    evicted = evicted_positions(kept, keys.shape[0])
    unit = torch.nn.functional.normalize(keys.to(torch.promote_types(keys.dtype, torch.float32)), dim=-1)
    survivors = unit[kept].T
    step = max(1, SIMILARITY_ELEMENTS // max(1, len(kept)))
    best = [(unit[evicted[i : i + step]] @ survivors).max(dim=1) for i in range(0, len(evicted), step)]
    if not best:
        return Nearest(evicted, evicted, unit.new_empty(0))
    return Nearest(evicted, torch.cat([b.indices for b in best]), torch.cat([b.values for b in best]))


def merge_nearest(
    keys: Tensor,
    values: Tensor,
    kept: Tensor,
    nearest: Nearest,
    rule: Rule,
    *,
    taken: Tensor | None = None,
) -> Merged:
    """Merge the evicted entries of one head into their nearest kept ones.

    Parameters
    ----------
    keys, values : Tensor ``[T, D]``
    kept : Tensor ``[N]``
        Order is free; the result has the same.
    nearest : Nearest
        From `nearest_kept` for these keys.
    rule : str
        See the table at the head of this module; not ``"cam"``.
    taken : Tensor ``[E]`` of bool, optional
        Which evicted entries are merged; the others are dropped.
    """
    import torch

    similarity = nearest.similarity.double()
    old_values = values[kept].double()
    gone_values = values[nearest.evicted].double()
    if rule == "pivot":
        weights = torch.full_like(similarity, 0.5)
    elif rule == "weighted":
        weights = (1 + similarity) / 2
    elif rule == "values":
        norm, target_norm = gone_values.norm(dim=-1), old_values.norm(dim=-1)[nearest.target]
        # The smallest normal number only keeps 0 / 0 away, where both values are zero.
        weights = similarity.clamp(min=0) * norm / (norm + target_norm).clamp(min=torch.finfo(torch.float64).tiny)
    else:
        weights = similarity
    taken = torch.ones_like(similarity, dtype=torch.bool) if taken is None else taken
    weights = weights.where(taken, torch.zeros_like(weights))

    def gather(shares: Tensor) -> Tensor:
        # In float64, so that the order of a GPU's additions is rounded away.
        return shares.new_zeros(len(kept), *shares.shape[1:]).index_add_(0, nearest.target, shares)

    counts = gather(taken.double())
    own = 1 + counts / 2 if rule == "pivot" else torch.ones_like(counts)
    divisor = 1 + (counts if rule in ("pivot", "d2o") else gather(weights))

    def combine(old: Tensor, gone: Tensor) -> Tensor:
        return (own[:, None] * old + gather(weights[:, None] * gone)) / divisor[:, None]

    merged_keys = keys[kept] if rule == "values" else combine(keys[kept].double(), keys[nearest.evicted].double())
    merged_values = combine(old_values, gone_values)
    return Merged(merged_keys.to(keys.dtype), merged_values.to(values.dtype), own, weights, counts, nearest.target)


def merged_bias(merged: Merged, bias: Bias) -> Tensor | None:
    """Return a logit bias that gives merged entries the softmax mass of what they stand for, ``[N]``; None for nothing.

    Parameters
    ----------
    bias : str
        ``"count"``: log of the entries in each, itself counted. ``"entropy"``: of the weights of the average, which never
        gives too much mass. ``"none"``: as in all official codes.
    """
    import torch

    if bias == "none":
        return None
    if bias == "count":
        return (1 + merged.counts).log()
    weights = merged.weights.clamp(min=0)
    total = merged.own.index_add(0, merged.target, weights)
    shares = weights / total[merged.target]
    own = merged.own / total
    return -torch.xlogy(own, own).index_add(0, merged.target, torch.xlogy(shares, shares))


def most_similar(nearest: Nearest, threshold: float, fraction: float) -> Tensor:
    """Return which evicted entries are merged, bool ``[E]``: similarity of at least `threshold`, then the top `fraction`.

    kvpress's two options. As there, the fraction is of all evicted entries and its limit is the linear quantile of their
    similarities, so one more than the rounded number can be taken.
    """
    import math

    import torch

    n_evicted = len(nearest.evicted)
    # A hair off: 1 - 0.9 is not 0.1.
    n_most = n_evicted - math.ceil((1 - fraction) * max(0, n_evicted - 1) - 1e-9)
    order = torch.argsort(nearest.similarity, descending=True, stable=True)
    taken = torch.zeros_like(nearest.similarity, dtype=torch.bool)
    taken[order[:n_most]] = True
    return taken & (nearest.similarity >= threshold)


def d2o_taken(nearest: Sequence[Nearest], threshold: float | None = None) -> tuple[list[Tensor], float]:
    """Return which evicted entries D2O merges, and the threshold.

    As in the official code the threshold is the mean similarity of all evicted entries of all heads (at its first call), and
    the i-th evicted entries of all heads, different positions though they are, are merged or dropped together, by the mean
    of their similarities. Where heads evict different numbers (the official code has no such case) each entry decides alone.

    Parameters
    ----------
    nearest : sequence of H Nearest
    threshold : float, optional
        One that is carried on, see `d2o_threshold`.
    """
    import torch

    found = torch.cat([n.similarity for n in nearest])
    limit = float(found.mean()) if threshold is None and len(found) else float(threshold or 0.0)
    if len({len(n.evicted) for n in nearest}) == 1:
        together = torch.stack([n.similarity for n in nearest]).mean(dim=0) >= limit
        return [together for _ in nearest], limit
    return [n.similarity >= limit for n in nearest], limit


def d2o_threshold(previous: float | None, current: float, alpha: float = 0.5, beta: float = 0.5) -> float:
    """Return D2O's threshold after a step: the first mean similarity, later ``alpha current + beta previous``."""
    return current if previous is None else alpha * current + beta * previous


def cam_step(values: Tensor, recent: int, merged: Tensor, spread: int = CAM_SPREAD) -> Tensor:
    """Return the values after one decode step of CaM (ICML 2024): the next entry to leave the recent window is spread.

    Parameters
    ----------
    values : Tensor ``[H, T, D]``
    recent : int
        Entries of the recent window; the entry at ``T - recent + 1`` leaves next.
    merged : Tensor ``[H]`` of bool
        The draw of each head, with the probability of `cam_probability`.
    spread : int
        The next entries, each of which gets that part of the value.
    """
    leaving = values.shape[1] - recent + 1
    out = values.clone()
    out[:, leaving + 1 : leaving + 1 + spread] += (merged.to(values)[:, None] * values[:, leaving] / spread)[:, None]
    return out


def cam_probability(attention: Tensor, position: int) -> Tensor:
    """Return how likely CaM keeps the value at `position`: its attention over the mean of all later ones, at most 1.

    Parameters
    ----------
    attention : Tensor ``[..., T]``
        Where no later one got any, a value with some attention is always kept; the last value never is.
    """
    import torch

    ratio = attention[..., position] / attention[..., position + 1 :].mean(dim=-1)
    return torch.nan_to_num(ratio, nan=0.0, posinf=1.0).clamp(0, 1)


def cam_spread(values: Tensor, kept: Tensor, attention: Tensor, draws: Tensor, spread: int = CAM_SPREAD) -> tuple[Tensor, int]:
    """Return the kept values of one head, ``[N, D]``, with CaM's rule applied once to all evicted entries, and how many were.

    Each evicted value is drawn with `cam_probability` and divided among the next `spread` kept entries, fewer at the end.
    The official code does this for one entry at each decode step (`cam_step`).

    Parameters
    ----------
    values : Tensor ``[T, D]``
    kept : Tensor ``[N]``
        Ascending.
    attention : Tensor ``[T]``
        Observed attention to each position.
    draws : Tensor ``[T]``
        Uniform in [0, 1).
    """
    import torch

    n_kept, attention = len(kept), attention.double()
    # Mean over all later positions, for every position at once.
    after = torch.cat([attention.flip(0).cumsum(0).flip(0)[1:], attention.new_zeros(1)])
    n_after = torch.arange(len(attention) - 1, -1, -1, device=attention.device)
    ratio = torch.nan_to_num(attention / (after / n_after), nan=0.0, posinf=1.0)
    evicted = evicted_positions(kept, len(attention))
    chosen = evicted[draws.to(ratio)[evicted] < ratio[evicted].clamp(0, 1)]
    first = torch.searchsorted(kept, chosen)
    steps = values.new_zeros(n_kept + 1, values.shape[1], dtype=torch.float64)
    shares = values[chosen].double() / spread
    steps.index_add_(0, first, shares)
    steps.index_add_(0, (first + spread).clamp(max=n_kept), -shares)
    return (values[kept].double() + steps.cumsum(0)[:n_kept]).to(values.dtype), int((first < n_kept).sum())
