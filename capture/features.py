"""Head features from evenly spaced query rows: what kind of head this is, not what to keep.

Shapes: Q query heads, H KV heads, T prompt positions, R sampled query rows, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtool.policies.statistics import BLOCK_ELEMENTS, AttentionInputs

if TYPE_CHECKING:
    from torch import Tensor

#: First positions that count as attention sink.
SINK = 4

#: Lower edges of the distance bins (query position - key position); the last bin is open. Fixed, so that profiles of prompts of
#: different lengths compare bin by bin.
DISTANCE_EDGES: tuple[int, ...] = (0, *(2**k for k in range(18)))


@dataclass(frozen=True, slots=True)
class HeadFeatures:
    """Features of the heads of one layer, each a mean over the sampled query rows.

    Attributes
    ----------
    sink_mass : Tensor ``[Q]``
        Attention to the first `SINK` positions.
    entropy : Tensor ``[Q]``
        Entropy of a row divided by the logarithm of its visible keys: 0 (one key) to 1 (uniform). Rows that see one key
        only are left out.
    distance_profile : Tensor ``[Q, len(DISTANCE_EDGES)]``
        Attention by distance; sums to 1.
    """

    sink_mass: Tensor
    entropy: Tensor
    distance_profile: Tensor


def feature_rows(seq_len: int, n_rows: int) -> list[int]:
    """Return up to `n_rows` evenly spaced query positions; the last position is always among them."""
    n = min(n_rows, seq_len)
    return [(k + 1) * seq_len // n - 1 for k in range(n)]


def compute_features(inputs: AttentionInputs, n_rows: int = 256) -> HeadFeatures:
    """Compute the head features of one layer of one prompt.

    Parameters
    ----------
    inputs : AttentionInputs
        Post-RoPE tensors of the whole prompt.
    n_rows : int
        Query rows to sample.
    """
    import torch

    rows = torch.tensor(feature_rows(inputs.seq_len, n_rows), device=inputs.keys.device)
    sink = torch.zeros(inputs.n_heads, dtype=torch.float64, device=rows.device)
    entropy, profile = torch.zeros_like(sink), sink.new_zeros(inputs.n_heads, len(DISTANCE_EDGES))
    edges = torch.tensor(DISTANCE_EDGES, device=rows.device)
    size = max(1, min(64, BLOCK_ELEMENTS // (inputs.n_heads * inputs.seq_len)))
    for block in rows.split(size):
        attention = _rows_at(inputs, block)
        visible = block + 1 if inputs.window is None else (block + 1).clamp(max=inputs.window)
        # A row that sees one key has entropy 0 and log 1 = 0: its quotient is set to 0 and it does not count below.
        log_visible = visible.double().log().clamp(min=1e-300)
        entropy += (torch.special.entr(attention).sum(-1).double() / log_visible).sum(-1)
        below = torch.nn.functional.pad(attention.cumsum(-1, dtype=torch.float64), (1, 0))
        sink += below[:, :, min(SINK, below.shape[-1] - 1)].sum(-1)
        profile += _by_distance(below, block, edges)
    counted = max(1, int((rows > 0).sum())) if inputs.window != 1 else 1
    return HeadFeatures((sink / len(rows)).float(), (entropy / counted).float(), (profile / len(rows)).float())


def _by_distance(below: Tensor, rows: Tensor, edges: Tensor) -> Tensor:
    """Sum attention by distance bin over the rows, ``[Q, bins]``; `below` ``[Q, R, K + 1]`` holds sums of the first keys."""
    import torch

    # Distances e ... e' - 1 of row i are the keys i - e' + 1 ... i - e.
    ends = (rows[:, None] + 1 - edges).clamp(min=0)
    sums = below.gather(-1, ends.expand(below.shape[0], -1, -1))
    return (sums - torch.nn.functional.pad(sums[..., 1:], (0, 1))).sum(1)


def _rows_at(inputs: AttentionInputs, rows: Tensor) -> Tensor:
    """Return the attention of the queries at `rows` (ascending), float32 ``[Q, R, K]``, K = last row + 1."""
    import torch

    stop = int(rows[-1]) + 1
    keys = inputs.keys[:, :stop].float()
    queries = inputs.queries[:, rows].float() * inputs.scaling
    folded = queries.reshape(keys.shape[0], -1, keys.shape[2])
    logits = torch.bmm(folded, keys.transpose(1, 2)).view(inputs.n_heads, len(rows), stop)
    columns = torch.arange(stop, device=rows.device)
    hidden = columns > rows[:, None]
    if inputs.window is not None:
        hidden |= columns <= rows[:, None] - inputs.window
    return torch.softmax(logits.masked_fill_(hidden, float("-inf")), dim=-1)
