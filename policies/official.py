"""What some official codes do while decoding, where kvtool differs on purpose; for comparison with published numbers.

Every function here is tested against outputs of the code it names. The deviations, and why kvtool does not share them, stand
in each docstring and in ``docs/policies.md``.

Shapes: Q query heads, H KV heads, G = Q / H, T tokens, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class MaskSimulation:
    """Result of `h2o_mask_simulation`.

    Attributes
    ----------
    visible : Tensor ``[1 + steps, Q, T + 1]`` of bool
        What the next token may attend to after the prompt and after each step; column m is the next token itself when m
        tokens have been seen.
    outputs : Tensor ``[1 + steps, Q, D]``
        Attention output of the newest token.
    """

    visible: Tensor
    outputs: Tensor


def h2o_mask_simulation(
    queries: Tensor, keys: Tensor, values: Tensor, prompt_length: int, heavy_ratio: float, recent_ratio: float
) -> MaskSimulation:
    """Decode as FMInference/H2O's mask simulation (``utils_hh``) does, which gave the paper's accuracy tables.

    It frees no memory: entries are hidden by a mask. Where it differs from H2O with real eviction (the same repository's
    ``utils_real_drop``, and kvtool's ``h2o:...,decode=evict``):

    - Budgets are fixed by the prompt, ``int(ratio * prompt_length)`` each.
    - The recent part counts the next token, so it shows one old entry less; the entry between it and the heavy part is
      hidden for a step although its score lives on. That is an off-by-one, and no method: the entry comes back.
    - With a recent part of 0 the slice ``[-0:]`` selects everything, and scores of dropped entries are never cleared.

    Parameters
    ----------
    queries, keys, values : Tensor ``[Q, T, D]``
        Of prompt and decoded tokens; one KV head per query head, as in that code.
    prompt_length : int
        Tokens of the prompt; the others come one by one.
    heavy_ratio, recent_ratio : float
        Budgets as shares of the prompt.
    """
    import torch

    n_heads, n_tokens, width = queries.shape
    heavy, recent = int(heavy_ratio * prompt_length), int(recent_ratio * prompt_length)
    scores, mask = torch.zeros(n_heads, 0), torch.ones(n_heads, prompt_length, dtype=torch.bool)
    shown, outputs = [], []
    for seen in range(prompt_length, n_tokens + 1):
        first = 0 if seen == prompt_length else seen - 1
        logits = queries[:, first:seen] @ keys[:, :seen].transpose(1, 2) * width**-0.5
        hidden = torch.arange(seen) > torch.arange(first, seen)[:, None]
        weights = logits.masked_fill(hidden | ~mask[:, None], torch.finfo(logits.dtype).min).softmax(dim=-1)
        total = weights.sum(dim=1)
        total[:, : scores.shape[1]] += scores
        mask = torch.ones(n_heads, seen + 1, dtype=torch.bool)
        if seen > heavy + recent:
            mask[:, : seen + 1 - recent] = False
            best = total[:, : seen - recent].topk(heavy, dim=-1).indices
            mask.scatter_(1, best, True)
        alive = mask[:, :seen].clone()
        alive[:, seen - recent if recent else 0 :] = True
        scores = total * alive
        wide = torch.zeros(n_heads, n_tokens + 1, dtype=torch.bool)
        wide[:, : seen + 1] = mask
        shown.append(wide)
        outputs.append(weights[:, -1:] @ values[:, :seen])
    return MaskSimulation(torch.stack(shown), torch.stack(outputs)[:, :, 0])


def cake_decode_order(stored: Tensor, query: Tensor, keys: Tensor, window: int, kernel: int = 5) -> Tensor:
    """Return what antgroup/cakekv keeps after a decode step, in its stored order, ``[H, n - 1]``.

    It scores by the newest query alone and pools the scores over the *stored* order: after the prompt that is the falling
    order of scores, with the window at the end. Neighbours in that order are not neighbours in the text, so the pooling mixes
    unrelated entries. kvtool's ``cake:...,decode=evict`` stores by position, ranks by the last `window` queries, and pools
    over what is left in the order of the text.

    Parameters
    ----------
    stored : Tensor ``[H, n]``
        Positions in stored order; the newest token, just appended, is the last one.
    query : Tensor ``[Q, D]``
        Post-RoPE query of that token.
    keys : Tensor ``[H, T, D]``
        Post-RoPE keys by position.
    window : int
        Last entries of the stored order that are always kept.
    kernel : int
        Width of the average pooling.
    """
    import torch

    n_kv, n_stored = stored.shape
    width = query.shape[-1]
    held = torch.stack([keys[h, stored[h]] for h in range(n_kv)])
    logits = query.view(n_kv, -1, width) @ held.transpose(1, 2) * width**-0.5
    past = logits.softmax(dim=-1)[:, :, : n_stored - window]
    pooled = torch.nn.functional.avg_pool1d(past, kernel, stride=1, padding=kernel // 2)
    best = pooled.mean(dim=1).topk(n_stored - window - 1, dim=-1).indices
    return torch.cat([stored.gather(1, best), stored[:, n_stored - window :]], dim=1)


def evict_for_space(kept: Sequence[int], n_new: int, sink: int, recent: int) -> list[int]:
    """Return what mit-han-lab/streaming-llm keeps *before* `n_new` tokens are appended (``evict_for_space``).

    The cut makes room for the tokens to come, so a prompt longer than the cache is held whole until the next token. kvtool
    cuts after every forward: its capacity holds at every step, and after each decoded token both hold the same entries.

    Parameters
    ----------
    kept : sequence of int
        Entries in the cache.
    n_new : int
        Tokens that are going to be appended.
    sink, recent : int
        First and last entries to keep.
    """
    if len(kept) + n_new <= sink + recent:
        return list(kept)
    return [*kept[:sink], *kept[len(kept) - recent + n_new :]]
