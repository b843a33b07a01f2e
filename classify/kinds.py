"""Head kinds from mean features, and how far one prompt alone would say the same.

In this order: a head that looks at the evidence when the answer is due, or at what followed an earlier copy, is ``gathering``
whatever it does besides: such heads rest on the first tokens until they are needed. A head that adds nearly nothing to its layer's
output is ``inactive``, one whose attention rests on the first tokens ``sink``. Otherwise its remaining attention decides: local
attention and far attention that follows places is positional, far attention that follows content is not. Mostly the one:
``positional``; mostly the other: ``gathering``; between: ``mixed``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtool.classify.features import HeadTable, nanmean

Float = NDArray[np.float64]
Int = NDArray[np.int64]

KINDS = ("sink", "positional", "mixed", "gathering", "inactive")
#: attention on the first tokens from which a head counts as resting there
SINK_FROM = 0.8
#: positional share of the remaining attention: positional from, gathering up to, mixed between
POSITIONAL_FROM, GATHERING_TO = 0.7, 0.3
#: attention of the answer's tokens to the evidence, or of repeated tokens to what came next, from which a head gathers
RETRIEVAL_FROM = 0.2
#: output norm below this share of the layer's mean: inactive
INACTIVE_BELOW = 0.125
#: features that decide
DECIDING = ("sink", "local", "far", "retrieval", "activity", "content", "induction")


@dataclass(frozen=True, slots=True)
class Means:
    """Mean features of heads, arrays of one shape; None where the capture lacks a feature, NaN where it is undefined."""

    sink: Float
    local: Float
    far: Float
    retrieval: Float | None = None
    activity: Float | None = None
    content: Float | None = None
    induction: Float | None = None

    @property
    def positional_share(self) -> Float:
        """Share of the attention behind the sink that is local, or far and follows places; 0.5 where there is none.

        Far attention follows places by (1 - s) / 2, s the content-versus-slot score cut to -1 ... 1; without a score it counts as
        following content.
        """
        score = np.ones_like(self.far) if self.content is None else np.nan_to_num(np.clip(self.content, -1, 1), nan=1.0)
        rest = self.local + self.far
        placed = self.local + self.far * (1 - score) / 2
        return np.divide(placed, rest, out=np.full_like(rest, 0.5), where=rest > 0)


def weighted_means(table: HeadTable, weights: Float) -> Means:
    """Return means over prompts under weights ``(..., S)``, features of shape ``(..., L, Q)``.

    Prompts without a feature (only some are run permuted) do not count; where none with a weight has it, the mean of all that do stands
    in.
    """

    def mean(values: Float | None) -> Float | None:
        if values is None:
            return None
        defined = np.isfinite(values)
        if defined.all():
            return np.asarray(np.tensordot(weights, values, axes=1))
        total = np.tensordot(weights, np.where(defined, values, 0.0), axes=1)
        weight = np.tensordot(weights, defined.astype(np.float64), axes=1)
        return np.asarray(
            np.divide(total, weight, out=np.broadcast_to(nanmean(values, 0), total.shape).copy(), where=weight > 0)
        )

    found: dict[str, Any] = {name: mean(getattr(table, name)) for name in DECIDING}
    return Means(**found)


def kind_of(means: Means) -> Int:
    """Return the kind of heads, an index into `KINDS`, from mean features of any shape."""
    share = means.positional_share
    kinds = np.full(share.shape, KINDS.index("mixed"), dtype=np.int64)
    kinds[share >= POSITIONAL_FROM] = KINDS.index("positional")
    kinds[share <= GATHERING_TO] = KINDS.index("gathering")
    kinds[means.sink >= SINK_FROM] = KINDS.index("sink")
    if means.activity is not None:
        kinds[means.activity < INACTIVE_BELOW] = KINDS.index("inactive")
    for score in (means.retrieval, means.induction):
        if score is not None:
            kinds[score >= RETRIEVAL_FROM] = KINDS.index("gathering")
    return kinds


def kinds_of_all(table: HeadTable) -> Int:
    """Return the kinds from the means over all prompts, ``(L, Q)``."""
    return kind_of(weighted_means(table, np.full(table.n_prompts, 1 / table.n_prompts)))


def kinds_per_prompt(table: HeadTable) -> Int:
    """Return the kinds that every prompt alone gives, ``(S, L, Q)``; the mean of the others stands in for what it lacks."""

    def filled(values: Float | None) -> Float | None:
        return None if values is None else np.where(np.isfinite(values), values, nanmean(values, 0))

    found: dict[str, Any] = {name: filled(getattr(table, name)) for name in DECIDING}
    return kind_of(Means(**found))
