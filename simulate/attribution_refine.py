"""The counterfactuals of `kvtool.simulate.attribution` for real: masked forwards of the answer in which every flaw is made or mended.

A capture predicts each head on its own and to first order; here all heads and layers act together. A representative's logit, and what
its value is made of, follow from the logits of the entries it stands for, so each state is a set of weights on the prompt's own
entries, made anew from the queries of that very forward.

Shapes: S states, H KV heads, G query heads per KV head, P fed tokens, T prompt positions, K kept entries (padded to the most of any head),
M blocks, B entries of a block, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvtool.attention import AttentionCall, Handler, attention_handler, seen_cache
from kvtool.errors import ConfigError
from kvtool.policies import Policy, kept_counts, kept_positions
from kvtool.policies.representatives import block_weights, evicted_positions
from kvtool.simulate.attribution import COUNT, EVICT, FEWER, SLOTS, VALUE, VARIANCE
from kvtool.simulate.attribution_sample import WEIGHTED, compensated
from kvtool.simulate.refine import Refined, prefill, score_configurations

if TYPE_CHECKING:
    from torch import Tensor

    from kvtool.capture.reader import CapturedSample, CapturedView
    from kvtool.models import LoadedModel
    from kvtool.policies.leftovers import LayerTensors

#: Number of the full cache among the states.
FULL = -1


@dataclass(frozen=True, slots=True)
class _Mean:
    """Representatives of one kind.

    Attributes
    ----------
    keys, values : Tensor ``[H, M, D]``
    bias : Tensor ``[H, 1, 1, M]``
        -inf for padding.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True)
class _Layer:
    """Kept entries of one layer and the blocks of the others, float32, padded to the most and the largest of any head.

    Attributes
    ----------
    kept_keys, kept_values : Tensor ``[H, K, D]``
    kept_hidden : Tensor ``[H, 1, 1, K]`` of bool
        Padding.
    keys, values : Tensor ``[H, M B, D]``
    hidden : Tensor ``[H, 1, 1, M, B]`` of bool
        Padding.
    plain, weighted : _Mean
        With no bias, and with the entropy of the weights.
    log_sizes : Tensor ``[H, 1, 1, M]``
    """

    kept_keys: Tensor
    kept_values: Tensor
    kept_hidden: Tensor
    keys: Tensor
    values: Tensor
    hidden: Tensor
    plain: _Mean
    weighted: _Mean
    log_sizes: Tensor


def _layer(view: CapturedView, tensors: LayerTensors, kept: Sequence[Tensor], policy: Policy) -> _Layer:
    """Cut the evicted entries of every head into blocks; `policy` has the block size and says how entries are weighed."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    attention = policy.compensation.weights(view)
    assert attention is not None
    device, like = tensors.keys.device, torch.empty(0)
    evicted = [evicted_positions(positions, view.seq_len) for positions in kept]
    widths = [max(1, min(policy.compensation.block_size or len(gone), len(gone))) for gone in evicted]
    n_blocks, width = max(-(-len(gone) // w) for gone, w in zip(evicted, widths, strict=True)), max(widths)
    n_blocks = max(1, n_blocks)
    shape = (len(kept), n_blocks, width)
    index, shares = torch.full(shape, -1, dtype=torch.int64), torch.zeros(shape)
    for h, (gone, w) in enumerate(zip(evicted, widths, strict=True)):
        if len(gone):
            found, _ = block_weights(len(gone), w, attention[h, gone], like)
            shares[h, : len(found), :w] = found
            index[h, : len(found), :w] = torch.nn.functional.pad(gone, (0, len(found) * w - len(gone)), value=-1).view(-1, w)
    real = index >= 0
    flat = index.clamp(min=0).flatten(1).to(device)
    keys, values = (torch.stack([t[h, flat[h]] for h in range(len(flat))]).float() for t in (tensors.keys, tensors.values))
    sizes = real.sum(-1)
    equal = real / sizes.clamp(min=1)[..., None]
    entropy = -torch.xlogy(shares, shares).sum(-1)
    empty = torch.zeros(sizes.shape).masked_fill(sizes == 0, float("-inf"))

    def mean(weights: Tensor, bias: Tensor) -> _Mean:
        of = [torch.einsum("hmb,hmbd->hmd", weights.to(device), t.view(*shape, -1)) for t in (keys, values)]
        return _Mean(of[0], of[1], (empty + bias)[:, None, None].to(device))

    places = pad_sequence([positions.cpu() for positions in kept], batch_first=True, padding_value=-1)
    where = places.clamp(min=0).to(device)
    kept_keys, kept_values = (
        torch.stack([t[h, where[h]] for h in range(len(where))]).float() for t in (tensors.keys, tensors.values)
    )
    return _Layer(
        kept_keys,
        kept_values,
        (places < 0)[:, None, None].to(device),
        keys,
        values,
        ~real[:, None, None].to(device),
        mean(equal, torch.zeros(())),
        mean(shares, entropy),
        sizes.clamp(min=1).log()[:, None, None].to(device),
    )


def refine_states(
    loaded: LoadedModel, sample: CapturedSample, cells: Sequence[tuple[Policy, str]], states: Sequence[int]
) -> tuple[Refined, list[list[Refined]]]:
    """Run the sample's answer in counterfactual states of budgets and block sizes.

    Parameters
    ----------
    loaded : LoadedModel
        The model that was captured.
    sample : CapturedSample
    cells : sequence of N (Policy, str)
        Policies without compensation, and block sizes.
    states : sequence of S int
        Sets of flaws, or `EVICT`, `FEWER`, `WEIGHTED`.

    Returns
    -------
    Refined
        With the full cache.
    list of N lists of S Refined

    Raises
    ------
    ConfigError
        A sliding window hides prompt entries from the fed tokens, or the answer has no token that compression can change.
    """
    import torch

    prompt, rest = sample.prompt_ids[: sample.seq_len], sample.prompt_ids[sample.seq_len :]
    answer = sample.answer_ids
    fed, gold = [*rest, *answer[:-1]], answer if rest else answer[1:]
    if not gold:
        raise ConfigError(
            f"sample {sample.id}: its answer of one token cannot change under compression; nothing can be refined"
        )
    layers = prefill(loaded, prompt)
    rows, found, full = (FULL, *states), [], None
    ids = torch.tensor([fed], device=loaded.device).expand(len(rows), -1)
    for policy, block in cells:
        cut = _cut(sample, policy, block, layers)
        handler = _handler(sample, layers, cut, rows)
        with torch.no_grad(), attention_handler(loaded.model, handler):
            cache: Any = seen_cache(len(prompt), len(layers))
            logits = loaded.model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -len(gold) :].float()
        scored = score_configurations(logits, logits[0].log_softmax(-1), torch.tensor(gold, device=logits.device))
        full = scored[0]
        found.append(scored[1:])
    assert full is not None
    return full, found


def _handler(
    sample: CapturedSample, layers: Sequence[LayerTensors], cut: dict[int, tuple[_Layer, _Layer]], rows: Sequence[int]
) -> Handler:
    def handler(call: AttentionCall) -> Tensor:
        if call.layer in cut and call.window is not None and sample.seq_len + call.queries.shape[2] > call.window:
            raise ConfigError(
                f"sample {sample.id}: layer {call.layer} has a sliding window; its counterfactuals cannot be refined"
            )
        return _attend(call, layers[call.layer], cut.get(call.layer), rows)

    return handler


def _cut(
    sample: CapturedSample, policy: Policy, block: str, layers: Sequence[LayerTensors]
) -> dict[int, tuple[_Layer, _Layer]]:
    """Return the blocks of every compressible layer: those of the whole budget, and those beside the slots."""
    views = sample.views()
    weighing = compensated(policy, block, "weighted", "entropy")
    parts = policy.method.parts()
    scores = [parts.scorer.score(view) for view in views]
    fewer = kept_positions(compensated(policy, block), views)
    counts = kept_counts(compensated(policy, block), views, scores)
    found = {}
    for view, score, heads, kept in zip(views, scores, counts, fewer, strict=True):
        budgets = [n + weighing.compensation.slots(n, sample.seq_len) for n in heads]
        every = parts.selector.keep(score, budgets)
        tensors = layers[view.layer]
        found[view.layer] = (_layer(view, tensors, every, weighing), _layer(view, tensors, kept, weighing))
    return found


def _attend(call: AttentionCall, layer: LayerTensors, cut: tuple[_Layer, _Layer] | None, rows: Sequence[int]) -> Tensor:
    """Attention of the fed tokens, one row of the batch per state."""
    import torch

    n_rows, n_heads, n_fed, dim = call.queries.shape
    n_kv, seq_len, _ = layer.keys.shape
    queries = (call.queries.float() * call.scaling).view(n_rows, n_kv, n_heads // n_kv, n_fed, dim)
    later = torch.ones(n_fed, n_fed, dtype=torch.bool, device=queries.device).triu(1)
    if call.window is not None:
        later = later | torch.ones_like(later).tril(-call.window)
    outputs = []
    for r, state in enumerate(rows):
        own = (queries[r] @ call.keys[r].float()[:, None].transpose(2, 3)).masked_fill(later, float("-inf"))
        if cut is None or state == FULL:
            logits = queries[r] @ layer.keys.float()[:, None].transpose(2, 3)
            if call.window is not None:
                last = torch.arange(seq_len, seq_len + n_fed, device=logits.device)[:, None] - call.window
                logits = logits.masked_fill(torch.arange(seq_len, device=logits.device) <= last, float("-inf"))
            weights = torch.cat([logits, own], dim=-1).softmax(-1)
            output = weights[..., :seq_len] @ layer.values.float()[:, None]
        else:
            slots = state in (FEWER, WEIGHTED) or (state < EVICT and bool(state & SLOTS))
            output, weights = _state_output(queries[r], own, cut[slots], state)
        outputs.append(output + weights[..., -n_fed:] @ call.values[r].float()[:, None])
    return torch.stack(outputs).reshape(n_rows, n_heads, n_fed, -1).to(call.queries.dtype)


def _state_output(queries: Tensor, own: Tensor, layer: _Layer, state: int) -> tuple[Tensor, Tensor]:
    """Return what the prompt gives to the output ``[H, G, P, D]``, and the weights, those of the fed tokens last."""
    import torch

    kept = (queries @ layer.kept_keys[:, None].transpose(2, 3)).masked_fill(layer.kept_hidden, float("-inf"))
    n_kept = kept.shape[-1]
    if state in (EVICT, FEWER):
        weights = torch.cat([kept, own], dim=-1).softmax(-1)
        return weights[..., :n_kept] @ layer.kept_values[:, None], weights
    means = layer.weighted if state == WEIGHTED else layer.plain
    logit = queries @ means.keys[:, None].transpose(2, 3) + means.bias
    inside: Tensor | None = None
    if state != WEIGHTED:
        if not state & VARIANCE or not state & VALUE:
            inside = (queries @ layer.keys[:, None].transpose(2, 3)).view(*queries.shape[:3], *layer.hidden.shape[3:])
            inside = inside.masked_fill(layer.hidden, float("-inf"))
        if not state & VARIANCE:
            assert inside is not None
            logit = inside.logsumexp(-1) - layer.log_sizes
        if not state & COUNT:
            logit = logit + layer.log_sizes
    weights = torch.cat([kept, logit, own], dim=-1).softmax(-1)
    given = weights[..., n_kept : n_kept + logit.shape[-1]]
    output = weights[..., :n_kept] @ layer.kept_values[:, None]
    if inside is None or state & VALUE:
        return output + given @ means.values[:, None], weights
    # A block of padding alone has no mass, whatever its entries are said to share.
    shares = inside.softmax(-1).nan_to_num(0.0)
    return output + (given[..., None] * shares).flatten(-2) @ layer.values[:, None], weights
