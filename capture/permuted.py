"""Does a head follow content or places? Each prompt once more with its blocks permuted, and the attention of its end compared.

The first positions (sink), the last `TAIL` tokens (whose queries are compared) and the `LOCAL` tokens before these stay where
they are. The stretch between is cut into blocks of `BLOCK` tokens that change places, none keeps its own. A head that looks for
content pays the same attention to the same tokens at their new places; one that looks at distances, to whatever stands there now.

Shapes: L layers, Q query heads, H KV heads, T prompt positions, N positions of the permuted stretch, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvtool.attention import AttentionCall, attention_handler, dense_attention
from kvtool.capture.features import LOCAL, SINK, rows_at

if TYPE_CHECKING:
    from torch import Tensor

    from kvtool.capture.prompt_pass import PromptRecord

#: Tokens of a block, and last tokens whose queries are compared.
BLOCK, TAIL = 64, 64


@dataclass(frozen=True, slots=True)
class Permutation:
    """Where the tokens of a prompt go.

    Attributes
    ----------
    source : tuple of int
        Position in the first run of the token that stands at each position of the second, T of them.
    start, stop : int
        The permuted stretch.
    """

    source: tuple[int, ...]
    start: int
    stop: int


def permutation(seq_len: int, seed: int, block: int = BLOCK, tail: int = TAIL) -> Permutation | None:
    """Return a permutation of the blocks in which none keeps its place, or None if the prompt holds fewer than two.

    Parameters
    ----------
    seq_len : int
        T.
    seed : int
        One cycle through all blocks, drawn evenly (Sattolo's algorithm).
    block, tail : int
        Tokens.
    """
    stop = seq_len - tail - LOCAL
    n_blocks = (stop - SINK) // block
    if n_blocks < 2:
        return None
    rng, order = np.random.default_rng(seed), np.arange(n_blocks)
    for last in range(n_blocks - 1, 0, -1):
        other = int(rng.integers(0, last))
        order[[last, other]] = order[[other, last]]
    start = stop - n_blocks * block
    moved = start + (order[:, None] * block + np.arange(block)).flatten()
    return Permutation((*range(start), *moved.tolist(), *range(stop, seq_len)), start, stop)


@dataclass(frozen=True, slots=True)
class Following:
    """What the attention of the prompt's end follows, one float32 tensor ``[L, Q]`` each, correlations in [-1, 1].

    Attributes
    ----------
    content : Tensor
        Between the attention to a token in the first run and to the same token, wherever it stands, in the second.
    slot : Tensor
        Between the attention to a position in both runs. NaN in both where there is nothing to correlate: no attention to the
        stretch, or a sliding window that does not reach over it.
    """

    content: Tensor
    slot: Tensor


class _LastLayerSeen(Exception):
    """Ends the second run."""


def run_permuted(model: Any, token_ids: Sequence[int], record: PromptRecord, plan: Permutation) -> Following:
    """Run the permuted prompt and compare it with the first run.

    Parameters
    ----------
    model : transformers causal language model
    token_ids : sequence of int
        The T tokens of the first run.
    record : PromptRecord
        What the first run left.
    plan : Permutation
    """
    import torch

    found: list[tuple[Tensor, Tensor]] = []

    def handler(call: AttentionCall) -> Tensor:
        tail, keys = record.tail_queries[call.layer], record.keys[call.layer]
        if call.window is not None and call.window < keys.shape[1]:
            nan = torch.full((tail.shape[0],), float("nan"))
            found.append((nan, nan))
        else:
            found.append(_compare(tail, keys, call, plan))
        if len(found) == len(record.keys):
            raise _LastLayerSeen
        return dense_attention(call)

    ids = torch.tensor([[token_ids[k] for k in plan.source]], device=record.keys[0].device)
    # What the last layer makes of its attention is not needed.
    with suppress(_LastLayerSeen), torch.no_grad(), attention_handler(model, handler):
        model.base_model(input_ids=ids, use_cache=False)
    return Following(torch.stack([content for content, _ in found]), torch.stack([slot for _, slot in found]))


def _compare(tail: Tensor, keys: Tensor, call: AttentionCall, plan: Permutation) -> tuple[Tensor, Tensor]:
    """Correlate the attention of the tail ``[Q, R, D]`` to the stretch in both runs, row means taken off; two ``[Q]``."""
    import torch

    n_tail, seq_len = tail.shape[1], keys.shape[1]
    source = torch.tensor(plan.source[plan.start : plan.stop], device=keys.device) - plan.start
    sums = torch.zeros(4, tail.shape[0], dtype=torch.float64, device=keys.device)
    # A few rows at a time: two blocks of Q x rows x T are held.
    for rows in torch.arange(n_tail, device=keys.device).split(8):
        at = rows + seq_len - n_tail
        first = rows_at(tail[:, rows], keys, call.scaling, None, at)
        second = rows_at(call.queries[0][:, at], call.keys[0], call.scaling, None, at)
        a, b = (_centred(x[:, :, plan.start : plan.stop]) for x in (first, second))
        # b[k] is paid to the token that stood at source[k].
        sums += torch.stack([(a * a).sum((1, 2)), (b * b).sum((1, 2)), (a[:, :, source] * b).sum((1, 2)), (a * b).sum((1, 2))])
    scale = (sums[0] * sums[1]).sqrt()
    # Attention to the stretch that is nothing but the rounding of a softmax says nothing.
    scale = scale.masked_fill(scale < 1e-18, float("nan"))
    content, slot = ((s / scale).float().cpu() for s in sums[2:])
    return content, slot


def _centred(x: Tensor) -> Tensor:
    precise = x.double()
    return precise - precise.mean(-1, keepdim=True)
