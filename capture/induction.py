"""Copy and induction scores of a model's heads, on random tokens that are repeated: once per capture, whatever the prompts.

Shapes: L layers, Q query heads, R compared rows, K keys, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from kvtool.attention import AttentionCall, attention_handler, dense_attention
from kvtool.capture.features import SINK, rows_at
from kvtool.data.tasks import first_ids
from kvtool.models import LoadedModel, final_norm, output_weight

if TYPE_CHECKING:
    from torch import Tensor

#: Distinct tokens that are repeated, and how many such sequences are run.
N_TOKENS, N_SEQUENCES = 64, 4


@dataclass(frozen=True, slots=True)
class Repeats:
    """What heads do on repeated random tokens.

    Attributes
    ----------
    scores : dict of str to ndarray of shape (L, Q)
        ``induction``: attention to the token after the earlier copy of the current one. ``echo``: to that copy itself. ``copy``: share
        of positions at which, of the sequence's tokens, the head raises the logit of the one that it attends to most.
    skipped : dict of str to str
        Scores that could not be computed, and why.
    """

    scores: dict[str, np.ndarray] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def repeat_scores(loaded: LoadedModel, seed: int = 0, n_tokens: int = N_TOKENS, n_sequences: int = N_SEQUENCES) -> Repeats:
    """Run sequences of `n_tokens` distinct random tokens, each followed by itself, and score the heads.

    Parameters
    ----------
    loaded : LoadedModel
    seed : int
        Of the tokens.
    n_tokens, n_sequences : int
    """
    import torch

    tokens = ordinary_tokens(loaded)
    first = first_ids(loaded.tokenizer)
    needed = len(first) + 2 * n_tokens
    reason = ""
    if len(tokens) < n_tokens:
        reason = f"the tokenizer has {len(tokens)} ordinary tokens, {n_tokens} are needed"
    elif needed > loaded.info.max_positions:
        reason = f"{needed} tokens are needed, the model has a context of {loaded.info.max_positions}"
    if reason:
        return Repeats(skipped=dict.fromkeys(("induction", "echo", "copy"), reason))
    rng, logits_of = np.random.default_rng(seed), final_norm(loaded.model)
    sums: dict[str, Tensor] = {}
    for _ in range(n_sequences):
        segment = rng.choice(tokens, n_tokens, replace=False).tolist()
        for name, value in _one(loaded.model, first, segment, logits_of).items():
            sums[name] = sums.get(name, torch.zeros_like(value)) + value / n_sequences
    scores = {name: value.float().numpy() for name, value in sums.items()}
    skipped = (
        {} if "copy" in scores else {"copy": "the model does not show its output projection, final norm or output embedding"}
    )
    return Repeats(scores, skipped)


def ordinary_tokens(loaded: LoadedModel) -> np.ndarray:
    """Return the ids that stand for text: no special or added ones, none beyond the embedding."""
    tokenizer = loaded.tokenizer
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    n_embedded = int(loaded.model.get_input_embeddings().weight.shape[0])
    return np.asarray(sorted(i for i in set(tokenizer.get_vocab().values()) - special if i < n_embedded))


def _one(model: Any, first: Sequence[int], segment: Sequence[int], norm: Any) -> dict[str, Tensor]:
    """Score one sequence, each ``[L, Q]``; no ``copy`` without the final norm, output embedding and every output projection."""
    import torch

    n, device = len(segment), next(model.parameters()).device
    embedding = model.get_output_embeddings()
    unembed = None if norm is None or embedding is None else embedding.weight[torch.tensor(segment, device=device)].detach()
    found: dict[str, list[Tensor]] = {"induction": [], "echo": [], "copy": []}
    # The second copy but its last token, whose successor in the first copy is the second copy itself.
    rows = torch.arange(len(first) + n, len(first) + 2 * n - 1, device=device)

    def handler(call: AttentionCall) -> Tensor:
        outputs = dense_attention(call)
        attention = rows_at(call.queries[0][:, rows], call.keys[0], call.scaling, call.window, rows)
        for name, offset in (("induction", n - 1), ("echo", n)):
            at = (rows - offset).expand(attention.shape[0], -1)[..., None]
            found[name].append(attention.gather(-1, at).mean((1, 2)).cpu())
        weight = output_weight(call.module)
        if unembed is not None and weight is not None and unembed.shape[1] == weight.shape[0]:
            found["copy"].append(_copies(attention, outputs[0][:, rows], weight, norm, unembed, len(first)).cpu())
        return outputs

    ids = torch.tensor([[*first, *segment, *segment]], device=device)
    with torch.no_grad(), attention_handler(model, handler):
        model.base_model(input_ids=ids, use_cache=False)
    n_layers = len(found["induction"])
    return {name: torch.stack(values).double() for name, values in found.items() if len(values) == n_layers}


def _copies(attention: Tensor, outputs: Tensor, weight: Tensor, norm: Any, unembed: Tensor, n_first: int) -> Tensor:
    """Return the share of rows at which a head raises most the logit of the token it attends to most, ``[Q]``.

    Attention that rests on the first positions copies nothing. The norm before the logits scales a row by a positive factor, which
    does not change the order; its shift, if it has one, is taken off.
    """
    import torch

    n_heads, _, dim = outputs.shape
    top = attention.argmax(-1)
    parts, shares = weight.view(-1, n_heads, dim), []
    for q in range(n_heads):
        added = outputs[q].to(weight.dtype) @ parts[:, q].T
        logits = (norm(added) - norm(torch.zeros_like(added[:1]))) @ unembed.T
        same = logits.argmax(-1) == (top[q] - n_first) % unembed.shape[0]
        shares.append((same & (top[q] >= max(SINK, n_first))).float().mean())
    return torch.stack(shares)
