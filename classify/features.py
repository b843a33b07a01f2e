"""Head features per prompt, from a capture.

Shapes: S prompts, L layers, Q query heads, H KV heads.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvtool.errors import DataError

if TYPE_CHECKING:
    from kvtool.capture.reader import CapturedSample

Float = NDArray[np.float64]

#: a key at most this far behind the query is local, in tokens
LOCAL = 32


@dataclass(frozen=True, slots=True)
class HeadTable:
    """Features of all heads on all prompts, each of shape (S, L, Q), the profile (S, L, Q, bins).

    Attributes
    ----------
    sink : ndarray
        Attention to the first 4 positions.
    local : ndarray
        Attention to the last `LOCAL` positions.
    far : ndarray
        The rest.
    entropy : ndarray
        Entropy over the logarithm of the visible keys, 0 ... 1.
    profile : ndarray
        Attention by distance; the bins' lower edges stand in the capture and in ``heads.json``.
    importance : ndarray
        Mean over probe tokens of abs(sum over entries of the gain): how much the answer's margin hangs on the head.
    retrieval : ndarray or None
        Attention of the probe tokens to the evidence; None if no prompt names its evidence.
    """

    sink: Float
    local: Float
    far: Float
    entropy: Float
    profile: Float
    importance: Float
    retrieval: Float | None

    def grouped(self, n_kv_heads: int) -> HeadTable:
        """Return the features of the KV heads, ``(S, L, H)``: means over the query heads that share one."""

        def mean(values: Float | None) -> Float | None:
            if values is None:
                return None
            groups = values.reshape(*values.shape[:2], n_kv_heads, -1, *values.shape[3:])
            return np.asarray(groups.mean(3), dtype=np.float64)

        return HeadTable(**{f.name: mean(getattr(self, f.name)) for f in fields(self)})  # type: ignore[arg-type]


def distance_edges(samples: list[CapturedSample]) -> list[int]:
    """Return the lower edges of the distance bins, in tokens.

    Raises
    ------
    DataError
        The prompts do not share them: their profiles cannot be averaged.
    """
    edges = {tuple(sample.features().edges.tolist()) for sample in samples}
    if len(edges) != 1:
        raise DataError(f"the capture's prompts have {len(edges)} different sets of distance bins; capture them with one set")
    return list(edges.pop())


def head_table(samples: list[CapturedSample]) -> HeadTable:
    """Read the features of all prompts; their distance bins must be the same, see `distance_edges`."""
    sink, local, entropy, profile, importance, retrieval = [], [], [], [], [], []
    for sample in samples:
        features, probes = sample.features(), sample.probes()
        profile.append(features.distance_profile)
        near = np.asarray(features.edges) < LOCAL
        sink.append(features.sink_mass)
        local.append(features.distance_profile[..., near].sum(-1))
        entropy.append(features.entropy)
        gains = np.abs(probes.gain.sum(-1) + probes.gain_own)
        importance.append(gains.mean(-1) if gains.shape[-1] else np.zeros(gains.shape[:-1]))
        spans = [span for span in sample.meta.get("evidence", []) if span[1] <= sample.seq_len]
        if spans and probes.attention.shape[2]:
            positions = np.concatenate([np.arange(a, b) for a, b in spans])
            retrieval.append(probes.attention[..., positions].sum(-1).mean(-1))
    sink_all, local_all = np.asarray(sink, dtype=np.float64), np.asarray(local, dtype=np.float64)
    return HeadTable(
        sink=sink_all,
        local=local_all,
        # On prompts shorter than sink + LOCAL both can count one key: far is then 0, not negative.
        far=np.clip(1 - sink_all - local_all, 0, 1),
        entropy=np.asarray(entropy, dtype=np.float64),
        profile=np.asarray(profile, dtype=np.float64),
        importance=np.asarray(importance, dtype=np.float64),
        retrieval=np.asarray(retrieval, dtype=np.float64) if len(retrieval) == len(samples) else None,
    )
