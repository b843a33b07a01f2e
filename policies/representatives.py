"""Block representatives: one entry that stands for a block of evicted ones.

Shapes: T prompt positions, E evicted ones, M blocks, D head dimension.

With logits s_j of a block and weights a_j that sum to 1, the mean key ``sum a_j k_j`` has the logit ``sum a_j s_j``, and
``ln sum_j e^(s_j) >= sum_j a_j s_j + entropy(a)`` with equality for ``a = softmax(s)``: the right bias of a representative is
the entropy of its weights, which for equal weights is ``ln n``. Without it, n entries weigh as much as one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Bias = Literal["none", "count", "entropy"]


@dataclass(frozen=True, slots=True)
class Representatives:
    """Entries that stand for blocks, in the order of the blocks.

    Attributes
    ----------
    keys, values : Tensor ``[M, D]``
        In the dtype of the input, from sums in float32 or wider.
    bias : Tensor ``[M]`` or None
        To be added to the logits.
    positions : Tensor ``[M]``
        Last position of each block, int64.
    n_equal : int
        Blocks that got equal weights, since none of their entries had any.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor | None
    positions: Tensor
    n_equal: int = 0


def evicted_positions(kept: Tensor, seq_len: int) -> Tensor:
    """Return the ascending positions of ``0 ... seq_len - 1`` that are not in `kept`, int64 ``[E]``."""
    import torch

    gone = torch.ones(seq_len, dtype=torch.bool, device=kept.device)
    gone[kept] = False
    return gone.nonzero()[:, 0]


def block_weights(n_evicted: int, block: int, observed: Tensor | None, like: Tensor) -> tuple[Tensor, int]:
    """Return the weights within blocks of consecutive evicted entries.

    Parameters
    ----------
    n_evicted : int
        E, at least 1.
    block : int
        Entries per block; the last block may be short.
    observed : Tensor ``[E]`` or None
        Attention that each entry got, not negative; None: equal weights.
    like : Tensor
        Gives device and dtype.

    Returns
    -------
    Tensor ``[M, block]``
        Rows sum to 1; what is beyond the last entry is 0. A block none of whose entries got any attention has equal weights.
    int
        How many such blocks there are.
    """
    import torch

    n_blocks = -(-n_evicted // block)
    flat = like.new_zeros(n_blocks * block)
    flat[:n_evicted] = 1.0
    equal = flat.view(n_blocks, block)
    equal = equal / equal.sum(dim=1, keepdim=True)
    if observed is None:
        return equal, 0
    flat = torch.zeros_like(flat)
    flat[:n_evicted] = observed.to(flat)
    shaped = flat.view(n_blocks, block)
    # Divided by the largest first: sums of tiny attention must not underflow.
    peak = shaped.amax(dim=1, keepdim=True)
    empty = peak == 0
    scaled = shaped / torch.where(empty, torch.ones_like(peak), peak)
    mass = scaled.sum(dim=1, keepdim=True)
    weights = torch.where(empty, equal, scaled / torch.where(empty, torch.ones_like(mass), mass))
    return weights, int(empty.sum())


def block_bias(weights: Tensor, n_evicted: int, bias: Bias) -> Tensor | None:
    """Return what is added to the logit of each block's representative, ``[M]``; None for nothing.

    Parameters
    ----------
    weights : Tensor ``[M, block]``
        From `block_weights`.
    n_evicted : int
        E.
    bias : str
        ``"count"``: log of the entries in the block; ``"entropy"``: of the weights; ``"none"``.
    """
    import torch

    if bias == "none":
        return None
    if bias == "entropy":
        return -torch.xlogy(weights, weights).sum(dim=1)
    n_blocks, block = weights.shape
    sizes = weights.new_full((n_blocks,), float(block))
    sizes[-1] = n_evicted - (n_blocks - 1) * block
    return sizes.log()


def represent(
    keys: Tensor, values: Tensor, evicted: Tensor, block: int | None, observed: Tensor | None, bias: Bias
) -> Representatives:
    """Make the representatives of one head.

    Parameters
    ----------
    keys, values : Tensor ``[T, D]``
        Post-RoPE.
    evicted : Tensor ``[E]``
        Ascending positions, at least one.
    block : int or None
        Evicted entries per representative; None: one for all.
    observed : Tensor ``[T]`` or None
        Attention that each position got; None: plain means.
    bias : str
        See `block_bias`.
    """
    import torch

    n_evicted = int(evicted.shape[0])
    width = min(block or n_evicted, n_evicted)
    precise = torch.promote_types(keys.dtype, torch.float32)
    like = keys.new_empty(0, dtype=precise)
    weights, n_equal = block_weights(n_evicted, width, None if observed is None else observed[evicted], like)
    n_blocks = weights.shape[0]

    def average(entries: Tensor) -> Tensor:
        padded = entries.new_zeros(n_blocks * width, entries.shape[1], dtype=precise)
        padded[:n_evicted] = entries[evicted].to(precise)
        return torch.bmm(weights[:, None], padded.view(n_blocks, width, -1))[:, 0].to(entries.dtype)

    last = torch.arange(1, n_blocks + 1, device=evicted.device) * width - 1
    positions = evicted[last.clamp(max=n_evicted - 1)]
    return Representatives(average(keys), average(values), block_bias(weights, n_evicted, bias), positions, n_equal)
