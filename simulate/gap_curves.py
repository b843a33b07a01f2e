"""What the gaps are computed from: harm of every head at every number of entries, per prompt and way to rank, and what policies keep.

Shapes: L layers, H KV heads, T prompt positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvtool.errors import ConfigError
from kvtool.policies import Policy, kept_counts
from kvtool.policies.base import Memo, Scorer, Selector
from kvtool.policies.scorers import Future
from kvtool.simulate.curves import ProbeTable
from kvtool.simulate.evaluate import KnownView, layer_table

if TYPE_CHECKING:
    from torch import Tensor

    from kvtool.capture.reader import CapturedSample

Float = NDArray[np.float64]
Int = NDArray[np.int64]
#: How entries are ranked and which are always kept.
Ranking = tuple[Scorer, Selector]
#: Future attention, nothing protected.
ORACLE: Ranking = (Future(), Selector())


def ranking_of(policy: Policy) -> Ranking:
    """Return how a policy ranks and protects."""
    parts = policy.method.parts()
    return parts.scorer, parts.selector


def protected_oracle(ranking: Ranking) -> Ranking:
    """Return the ranking by future attention with the same protected entries."""
    return Future(), Selector(ranking[1].sink, ranking[1].window)


@dataclass(slots=True)
class PromptCurves:
    """One prompt.

    Attributes
    ----------
    seq_len : int
    harm : dict of Ranking to ndarray of shape (T + 1, L, H)
        Of a head that keeps the first n entries of its order; below the protected entries it is not what a policy would keep.
    counts : list of ndarray of shape (L, H), or str
        What each policy keeps, or why it cannot.
    kinds : list of ndarray of shape (L, H), or None
        Kinds of the heads, of policies whose budgets go by kinds.
    """

    seq_len: int
    harm: dict[Ranking, Float] = field(default_factory=dict)
    counts: list[Int | str] = field(default_factory=list)
    kinds: list[Int | None] = field(default_factory=list)


def prompt_curves(sample: CapturedSample, policies: Sequence[Policy]) -> PromptCurves:
    """Read one prompt: scores, orders and probes once for all policies that share them.

    Parameters
    ----------
    sample : CapturedSample
        With probes and at least one layer that can be compressed.
    policies : sequence of Policy
        Without compensation and moments.
    """
    known: dict[tuple[int, str], Tensor] = {}
    views = [KnownView(view, known) for view in sample.views()]
    found = PromptCurves(sample.seq_len, counts=[""] * len(policies), kinds=[None] * len(policies))
    members: dict[Ranking, list[int]] = {ORACLE: []}
    for index, policy in enumerate(policies):
        ranking = ranking_of(policy)
        members.setdefault(ranking, []).append(index)
        members.setdefault(protected_oracle(ranking), [])
    orders: dict[Ranking, list[Int]] = {}
    facts: dict[Any, Any] = {}
    for ranking, indices in members.items():
        scorer, selector = ranking
        scores = [scorer.score(view) for view in views]
        orders[ranking] = [selector.order(score).numpy() for score in scores]
        memo = Memo(facts)
        for index in indices:
            allocator = policies[index].method.parts().allocator
            kinds = allocator.head_kinds(views)
            found.kinds[index] = None if kinds is None else np.asarray(kinds, dtype=np.int64)
            try:
                found.counts[index] = np.asarray(kept_counts(policies[index], views, scores, memo), dtype=np.int64)
            except ConfigError as error:
                found.counts[index] = str(error)
    layers: dict[Ranking, list[Float]] = {ranking: [] for ranking in orders}
    for row, view in enumerate(views):
        table = layer_table(sample, view)
        for ranking, order in orders.items():
            layers[ranking].append(layer_curves(table, order[row]))
    found.harm = {ranking: np.stack(each, axis=1) for ranking, each in layers.items()}
    return found


def layer_curves(table: ProbeTable, order: Int) -> Float:
    """Return the harm of each head of one layer at every number of kept entries, (T + 1, H).

    As `kvtool.simulate.curves.head_harm`, which serves few budgets of many heads at once.

    Parameters
    ----------
    table : ProbeTable
        Of one layer.
    order : ndarray of shape (H, T)
    """
    n_heads, seq_len = order.shape
    found = np.empty((seq_len + 1, n_heads))
    for head in range(n_heads):
        own = np.concatenate([table.own_attention[0, head], table.own_gain[0, head]])
        sums = np.empty((seq_len + 1, len(own)))
        sums[0] = own
        np.cumsum(table.rows[0, head].take(order[head], axis=0), axis=0, dtype=np.float64, out=sums[1:])
        sums[1:] += own
        mass, gain = sums[:, : len(own) // 2], sums[:, len(own) // 2 :]
        # Nothing kept and no own token: the head gives nothing.
        change = np.divide(gain, mass, out=np.zeros_like(mass), where=mass > 0)
        change -= table.full_gain[0, head]
        found[:, head] = -np.minimum(change, 0.0, out=change).sum(axis=1)
    return found
