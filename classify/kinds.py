"""Head kinds from features, with a confidence that is measured and never a default.

A head whose attention rests on the first tokens is ``sink``. Otherwise the share of its remaining attention that is
local decides: ``positional`` (mostly local), ``gathering`` (mostly far) or ``mixed`` (truly in between). A head that looks
at the evidence when the answer is due is ``gathering`` whatever it does before: retrieval heads rest on the first tokens
until they are needed. The confidence is the share of bootstrap draws over prompts that give the same kind; ``unsure`` says
that the evidence is thin, which is not the same as mixed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvtool.classify.features import HeadTable

Float = NDArray[np.float64]

KINDS = ("sink", "positional", "mixed", "gathering")
#: attention on the first tokens above which a head counts as resting there
SINK_FROM = 0.8
#: local share of the remaining attention: positional above, gathering below, mixed between
POSITIONAL_FROM, GATHERING_TO = 0.7, 0.3
#: attention of the answer's tokens to the evidence from which a head gathers
RETRIEVAL_FROM = 0.2
#: below this share of equal bootstrap draws a head is unsure
SURE_FROM = 0.8
#: prompts needed for a confidence at all
MIN_PROMPTS = 4


@dataclass(frozen=True, slots=True)
class Kinds:
    """Kinds of all heads.

    Attributes
    ----------
    kind : ndarray of shape (L, Q)
        Index into `KINDS`.
    confidence : ndarray of shape (L, Q) or None
        Share of bootstrap draws with the same kind; None with fewer than `MIN_PROMPTS` prompts.
    """

    kind: NDArray[np.int64]
    confidence: Float | None

    @property
    def unsure(self) -> NDArray[np.bool_] | None:
        """Heads whose evidence is thin; None where there is no confidence."""
        return None if self.confidence is None else self.confidence < SURE_FROM


def kind_of(sink: Float, local: Float, far: Float, retrieval: Float | None) -> NDArray[np.int64]:
    """Return the kind of heads from mean features of any shape; without evidence in the data `retrieval` is None."""
    rest = local + far
    share = np.divide(local, rest, out=np.full_like(local, 0.5), where=rest > 0)
    kinds = np.full(sink.shape, KINDS.index("mixed"), dtype=np.int64)
    kinds[share >= POSITIONAL_FROM] = KINDS.index("positional")
    kinds[share <= GATHERING_TO] = KINDS.index("gathering")
    kinds[sink >= SINK_FROM] = KINDS.index("sink")
    if retrieval is not None:
        kinds[retrieval >= RETRIEVAL_FROM] = KINDS.index("gathering")
    return kinds


def classify_heads(table: HeadTable, rng: np.random.Generator, draws: int = 500) -> Kinds:
    """Classify heads.

    Parameters
    ----------
    table : HeadTable
        Features per prompt.
    rng : numpy.random.Generator
    draws : int
        Bootstrap draws over prompts.
    """
    n_prompts = len(table.sink)
    features = (table.sink, table.local, table.far, table.retrieval)

    def kind_under(weights: Float) -> NDArray[np.int64]:
        return kind_of(*(None if f is None else np.tensordot(weights, f, axes=1) for f in features))  # type: ignore[arg-type]

    kind = kind_under(np.full(n_prompts, 1 / n_prompts))
    if n_prompts < MIN_PROMPTS:
        return Kinds(kind, None)
    weights = rng.multinomial(n_prompts, np.full(n_prompts, 1 / n_prompts), size=draws) / n_prompts
    return Kinds(kind, (kind_under(weights) == kind).mean(0))
