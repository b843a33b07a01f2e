"""What a model thinks of gold tokens: margin and loss, the same in capture, simulate and infer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Scores of M gold tokens, each of shape ``[..., M]``.

    Attributes
    ----------
    margin : Tensor
        Gold logit minus log-sum-exp of all others.
    nll : Tensor
        Negative log-likelihood.
    hit : Tensor of bool
        The gold token is the argmax.
    """

    margin: Tensor
    nll: Tensor
    hit: Tensor


def score_tokens(logits: Tensor, gold: Tensor) -> TokenScores:
    """Score gold tokens, at least in float32.

    Parameters
    ----------
    logits : Tensor ``[..., M, V]``
    gold : Tensor ``[M]`` of int64
    """
    import torch

    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    index = gold.expand(logits.shape[:-1])[..., None]
    own = logits.gather(-1, index)[..., 0]
    others = logits.scatter(-1, index, float("-inf")).logsumexp(-1)
    return TokenScores(own - others, logits.logsumexp(-1) - own, logits.argmax(-1) == gold)
