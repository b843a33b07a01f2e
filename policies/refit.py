"""Ridge refit of kept values: the observed queries get the output they had with everything kept.

Shapes: G query heads of one KV head, W observed queries, T prompt positions, N kept entries, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Refit:
    """Kept values of one head after the refit.

    Attributes
    ----------
    values : Tensor ``[N, D]``
        In the dtype of the input.
    error_before, error_after : float
        Sum of squared output differences on the observed queries, float64; the second is never larger.
    undone : bool
        The original values stand: nothing was evicted, or rounding to the dtype had made the refit worse.
    """

    values: Tensor
    error_before: float
    error_after: float
    undone: bool


def observed_attention(queries: Tensor, keys: Tensor, positions: Tensor, seq_len: int, scaling: float) -> Tensor:
    """Return the attention of the last W queries over the keys at `positions`, float64 ``[G W, N]``, causal.

    A query that sees none of them has a row of zeros.

    Parameters
    ----------
    queries : Tensor ``[G, W, D]``
        Post-RoPE, of the positions ``seq_len - W ... seq_len - 1``.
    keys : Tensor ``[N, D]``
    positions : Tensor ``[N]``
        Of the keys.
    seq_len : int
        T.
    scaling : float
        Factor of the logits.
    """
    import torch

    width = queries.shape[1]
    rows = torch.arange(seq_len - width, seq_len, device=keys.device)
    logits = queries.double() @ keys.double().T * scaling
    logits = logits.masked_fill(positions[None, :] > rows[:, None], float("-inf"))
    return torch.softmax(logits, dim=-1).nan_to_num(0.0).flatten(0, 1)


def refit_values(queries: Tensor, keys: Tensor, values: Tensor, kept: Tensor, scaling: float, ridge: float) -> Refit:
    """Refit the values of one head, its keys as they are.

    Minimises ``|A V' - O|^2 + lambda |V' - V|^2``: A is the observed queries' attention over the kept entries alone, O their
    output with all entries, V the original kept values, and ``lambda = ridge`` times the mean diagonal of ``A A^T``. Because
    V' = V is allowed, the first term cannot grow. Solved in float64 in the space of the G W queries, never N x N.

    Parameters
    ----------
    queries : Tensor ``[G, W, D]``
        Post-RoPE queries of the last W positions.
    keys, values : Tensor ``[T, D]``
    kept : Tensor ``[N]``
        Ascending positions.
    scaling : float
        Factor of the logits.
    ridge : float
        Relative strength, above 0.
    """
    import torch

    seq_len = keys.shape[0]
    old = values[kept]
    if len(kept) == seq_len:
        return Refit(old, 0.0, 0.0, True)
    everywhere = torch.arange(seq_len, device=keys.device)
    target = observed_attention(queries, keys, everywhere, seq_len, scaling) @ values.double()
    attention = observed_attention(queries, keys[kept], kept, seq_len, scaling)
    missing = target - attention @ old.double()
    gram = attention @ attention.T
    strength = ridge * float(gram.diagonal().mean())
    before = float(missing.square().sum())
    if strength == 0.0:  # no observed query sees any kept entry
        return Refit(old, before, before, True)
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    # Cholesky: gram + strength is positive definite by construction.
    factor = torch.linalg.cholesky(gram + strength * identity)
    found = (old.double() + attention.T @ torch.cholesky_solve(missing, factor)).to(values.dtype)
    after = float((target - attention @ found.double()).square().sum())
    if not after <= before:
        return Refit(old, before, before, True)
    return Refit(found, before, after, False)
