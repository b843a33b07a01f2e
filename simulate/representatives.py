"""Representatives of evicted blocks in the first-order prediction, from captured attention and gain alone.

Shapes: L layers, H KV heads, G query heads per KV head, P probe tokens, T positions, N configurations, M blocks.

The logit of an averaged key is the average logit, and logits are ``ln a_ij`` up to a constant per probe token. So relative to
the full softmax a representative with weights w_j weighs ``exp(bias + sum_j w_j ln a_ij)``, and one unit of it gains
``sum_j w_j (g_i . v_j)`` with ``g_i . v_j = b_ij / a_ij``. Both are exact but for the storage of a and b.

Captured attention is float16 with a scale per layer. What was too small for that is zero in the file; it is taken as the
smallest number that the file can hold (an upper bound, so such blocks weigh at most too much), with a gain of 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvtool.policies.representatives import Bias, block_bias, block_weights
from kvtool.simulate.curves import Float, Int, ProbeTable

if TYPE_CHECKING:
    from kvtool.policies import Policy
    from kvtool.policies.base import LayerView

#: Exponent of the smallest number above zero in float16, and of the bin that the largest one of a layer is scaled to.
SMALLEST, LARGEST = -24, 15


@dataclass(frozen=True, slots=True)
class Stand:
    """What one configuration puts in the place of evicted entries.

    Attributes
    ----------
    block : int or None
    bias : str
        See `kvtool.policies.representatives.block_bias`.
    observed : ndarray of shape (L, H, T) or None
        Weights before normalisation; None: equal ones.
    gated : ndarray of shape (L, H), bool
        Heads without representatives.
    seq_len : int
        T.
    """

    block: int | None
    bias: Bias
    observed: Float | None
    gated: NDArray[np.bool_]
    seq_len: int

    def layer(self, row: int) -> Stand:
        """Return the same of one layer only."""
        observed = None if self.observed is None else self.observed[row : row + 1]
        return Stand(self.block, self.bias, observed, self.gated[row : row + 1], self.seq_len)


def stand_of(policy: Policy, views: Sequence[LayerView]) -> Stand | None:
    """Return what a policy puts in the place of evicted entries; None for policies without representatives."""
    compensation = policy.compensation
    if compensation.compensate not in ("mean", "weighted"):
        return None
    weights = [w for view in views if (w := compensation.weights(view)) is not None]
    observed = np.stack([w.double().numpy() for w in weights]) if weights else None
    gated = np.asarray([compensation.gated(view) for view in views], dtype=np.bool_)
    return Stand(compensation.block_size, compensation.chosen_bias, observed, gated, views[0].seq_len)


def attention_floor(attention: NDArray[np.float32]) -> float:
    """Return the smallest attention above zero that the file can hold for a layer with these values."""
    peak = float(attention.max(initial=0.0))
    return float(2.0 ** (np.ceil(np.log2(peak)) - LARGEST + SMALLEST)) if peak > 0 else 1.0


def floored_share(table: ProbeTable) -> float:
    """Return the share of captured attention values that are zero; 0 where there are none (an answer of one token)."""
    columns = table.rows.shape[-1] // 2
    return float((table.rows[..., :columns] == 0).mean()) if columns else 0.0


def representative_sums(table: ProbeTable, order: Int, counts: Int, stands: Mapping[int, Stand]) -> Float:
    """Sum weight and gain of the representatives of each head.

    Parameters
    ----------
    table : ProbeTable
    order : ndarray of shape (L, H, T)
        Positions in the order in which they are kept.
    counts : ndarray of shape (N, L, H)
        Entries kept.
    stands : mapping of int to Stand
        Configuration -> what it has; others have none.

    Returns
    -------
    ndarray of shape (N, L, H, 2 G P)
        To be added to `kvtool.simulate.curves.kept_sums`.
    """
    n_layers, n_heads, seq_len, n_columns = table.rows.shape
    sums = np.zeros((len(counts), n_layers, n_heads, n_columns))
    columns = n_columns // 2
    for layer in range(n_layers):
        floor = attention_floor(table.rows[layer, ..., :columns])
        for head in range(n_heads):
            attention = table.rows[layer, head, :, :columns].astype(np.float64)
            gain = table.rows[layer, head, :, columns:].astype(np.float64)
            along = np.divide(gain, attention, out=np.zeros_like(gain), where=attention > 0)
            both = np.concatenate([np.log(np.maximum(attention, floor)), along], axis=1)
            for n, stand in stands.items():
                kept = int(counts[n, layer, head])
                if kept < seq_len and not stand.gated[layer, head]:
                    evicted = np.sort(order[layer, head, kept:])
                    observed = None if stand.observed is None else stand.observed[layer, head, evicted]
                    sums[n, layer, head] = _head_sums(both[evicted], stand, observed)
    return sums


def _head_sums(rows: Float, stand: Stand, observed: Float | None) -> Float:
    """Return weight and gain of all blocks, ``[2 G P]``, from log attention and gain per attention ``[E, 2 G P]``."""
    import torch

    n_evicted, n_columns = rows.shape
    width = min(stand.block or n_evicted, n_evicted)
    like = torch.empty(0, dtype=torch.float64)
    weights, _ = block_weights(n_evicted, width, None if observed is None else torch.from_numpy(observed), like)
    bias = block_bias(weights, n_evicted, stand.bias)
    padded = np.zeros((len(weights) * width, n_columns))
    padded[:n_evicted] = rows
    means = np.einsum("mb,mbc->mc", weights.numpy(), padded.reshape(len(weights), width, n_columns))
    mass = np.exp(means[:, : n_columns // 2] + (0.0 if bias is None else bias.numpy()[:, None]))
    return np.concatenate([mass.sum(axis=0), (mass * means[:, n_columns // 2 :]).sum(axis=0)])
