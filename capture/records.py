"""Plain records of a capture file, as arrays.

Shapes: L layers, Q query heads, T prompt positions, P probe tokens, M margins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Probes:
    """Evaluation probes of one sample.

    Attributes
    ----------
    attention, gain : float32 array ``[L, Q, P, T]``
        a_ij and b_ij of the probe tokens to the prompt's entries.
    attention_own, gain_own : float32 array ``[L, Q, P]``
        Sums of both over the probe tokens' own entries.
    margins, nll : float32 array ``[M]``
        Of the answer tokens, with the full cache.
    rows : int32 array ``[M]``
        Which probe token predicts each of them.
    """

    attention: FloatArray
    gain: FloatArray
    attention_own: FloatArray
    gain_own: FloatArray
    margins: FloatArray
    nll: FloatArray
    rows: IntArray


@dataclass(frozen=True, slots=True)
class Features:
    """Head features of one sample, from evenly spaced query rows.

    Attributes
    ----------
    sink_mass, entropy : float32 array ``[L, Q]``
        Attention to the first `sink` positions; entropy divided by the logarithm of the visible keys.
    distance_profile : float32 array ``[L, Q, bins]``
        Attention by distance; bin k holds the distances ``edges[k] ... edges[k + 1] - 1``, the last one is open.
    edges : int array ``[bins]``
    n_rows, sink : int
    """

    sink_mass: FloatArray
    entropy: FloatArray
    distance_profile: FloatArray
    edges: NDArray[np.int64]
    n_rows: int
    sink: int
