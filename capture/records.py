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
    n_rows, sink, local : int
        Sampled rows; first positions that are sink; distances below `local` are local.
    masses : float32 array ``[L, Q, 3]`` or None
        Attention to sink, far and local keys, over the rows that see all three.
    far_entropy, offset_variance, head_output : float32 array ``[L, Q]`` or None
        Entropy of the far part; share of variance that the distance explains; norm of the head's output.
    projected : bool
        `head_output` is taken after the output projection.
    content_follow, slot_follow : float32 array ``[L, Q]`` or None
        Correlations of the prompt's attention with that to the same prompt with its blocks permuted.

    None: the file does not hold it (an older one, or a prompt beyond the first that were run permuted). NaN: it is undefined
    for that head and prompt.
    """

    sink_mass: FloatArray
    entropy: FloatArray
    distance_profile: FloatArray
    edges: NDArray[np.int64]
    n_rows: int
    sink: int
    local: int = 32
    masses: FloatArray | None = None
    far_entropy: FloatArray | None = None
    offset_variance: FloatArray | None = None
    head_output: FloatArray | None = None
    projected: bool = False
    content_follow: FloatArray | None = None
    slot_follow: FloatArray | None = None


@dataclass(frozen=True, slots=True)
class RepeatScores:
    """What the model's heads do on repeated random tokens, whatever the prompts.

    Attributes
    ----------
    induction, echo, copy : float32 array ``[L, Q]`` or None
        Attention to the token after the earlier copy of the current one; to that copy itself; share of positions at which the
        head raises most the logit of the token it attends to most.
    skipped : dict of str to str
        Scores that are None, and why.
    """

    induction: FloatArray | None
    echo: FloatArray | None
    copy: FloatArray | None
    skipped: dict[str, str]
