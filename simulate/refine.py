"""The middle tier: the answer's exact loss under compression, by masked teacher-forced forwards, without generation.

The prompt is prefilled once per sample. Then many configurations go through in one batch: they share the prompt's keys and
values and differ in which entries their masks show, so a configuration costs a few tokens.

Shapes: C configurations of one batch, L layers, Q query heads, H KV heads, G = Q / H, T prompt positions, P fed tokens,
M scored answer tokens, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvtool.attention import AttentionCall, attention_handler, dense_attention, seen_cache
from kvtool.policies import Policy, kept_positions
from kvtool.scoring import score_tokens

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kvtool.capture.reader import CapturedSample
    from kvtool.models import LoadedModel

#: Elements of one layer's logits [C, Q, P, T]: 256 MB in float32.
BATCH_ELEMENTS = 1 << 26


@dataclass(frozen=True, slots=True)
class Refined:
    """One configuration on one sample; means over the M answer tokens that compression can change.

    Attributes
    ----------
    nll, margin : float
        Negative log-likelihood; gold logit minus log-sum-exp of the others.
    accuracy : float
        Share of gold tokens that are the argmax.
    exact : float
        1 if all are.
    kl : float
        Kullback-Leibler divergence from the full cache's next-token distribution, in nats.
    """

    nll: float
    margin: float
    accuracy: float
    exact: float
    kl: float


def refine_sample(loaded: LoadedModel, sample: CapturedSample, policies: Sequence[Policy]) -> list[Refined]:
    """Run the sample's answer under each policy's kept set.

    Parameters
    ----------
    loaded : LoadedModel
        The model that was captured.
    sample : CapturedSample
    policies : sequence of Policy

    Returns
    -------
    list of Refined
        In the order of `policies`.
    """
    import torch

    prompt, rest = sample.prompt_ids[: sample.seq_len], sample.prompt_ids[sample.seq_len :]
    answer = sample.answer_ids
    fed, gold = [*rest, *answer[:-1]], answer if rest else answer[1:]
    if not gold:
        return [Refined(0.0, 0.0, 1.0, 1.0, 0.0) for _ in policies]
    keys, values = _prefill(loaded, prompt)
    results: list[Refined] = []
    full: Tensor | None = None
    n_batch = max(2, BATCH_ELEMENTS // (loaded.info.n_heads * len(fed) * len(prompt)))
    for batch in _batches(policies, n_batch - 1):
        # The full cache goes first in every batch of masks, as the reference of the divergence.
        masks = _masks(sample, [Policy.parse("full"), *batch], loaded)
        logits = _forward(loaded, fed, keys, values, masks)[:, -len(gold) :].float()
        full = logits[0].log_softmax(-1) if full is None else full
        results += _score(logits[1:], full, torch.tensor(gold, device=logits.device))
    return results


def _batches(policies: Sequence[Policy], size: int) -> Iterator[Sequence[Policy]]:
    for start in range(0, len(policies), size):
        yield policies[start : start + size]


def _prefill(loaded: LoadedModel, prompt: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Run the prompt once; return post-RoPE keys and values ``[H, T, D]`` per layer."""
    import torch

    keys: list[Tensor] = []
    values: list[Tensor] = []

    def handler(call: AttentionCall) -> Tensor:
        keys.append(call.keys[0].contiguous())
        values.append(call.values[0].contiguous())
        return dense_attention(call)

    with torch.no_grad(), attention_handler(loaded.model, handler):
        loaded.model.base_model(input_ids=torch.tensor([list(prompt)], device=loaded.device), use_cache=False)
    return keys, values


def _masks(sample: CapturedSample, policies: Sequence[Policy], loaded: LoadedModel) -> list[Tensor]:
    """Return per layer which entries each configuration keeps, bool ``[C, H, T]``; untouched layers keep all."""
    import torch

    views, info = sample.views(), loaded.info
    masks = [torch.ones(len(policies), info.n_kv_heads, sample.seq_len, dtype=torch.bool) for _ in range(info.n_layers)]
    for c, policy in enumerate(policies):
        for view, heads in zip(views, kept_positions(policy, views) if views else [], strict=True):
            masks[view.layer][c] = False
            for h, positions in enumerate(heads):
                masks[view.layer][c, h, positions] = True
    return [mask.to(loaded.device) for mask in masks]


def _forward(loaded: LoadedModel, fed: Sequence[int], keys: list[Tensor], values: list[Tensor], masks: list[Tensor]) -> Tensor:
    """Feed the tokens once per configuration; return logits ``[C, P, V]``."""
    import torch

    def handler(call: AttentionCall) -> Tensor:
        return _attend(call, keys[call.layer], values[call.layer], masks[call.layer])

    ids = torch.tensor([list(fed)], device=loaded.device).expand(len(masks[0]), -1)
    with torch.no_grad(), attention_handler(loaded.model, handler):
        cache: Any = seen_cache(int(keys[0].shape[1]), len(keys))
        return loaded.model(input_ids=ids, past_key_values=cache, use_cache=True).logits  # type: ignore[no-any-return]


def _attend(call: AttentionCall, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Attention of the fed tokens over the shared prompt, masked per configuration, and over their own entries."""
    import torch

    n_config, n_heads, n_fed, dim = call.queries.shape
    n_kv, seq_len, _ = keys.shape
    group = n_heads // n_kv
    queries = (call.queries.float() * call.scaling).view(n_config, n_kv, group, n_fed, dim)
    # All configurations are rows of one product with the shared keys, which are never copied.
    rows = queries.permute(1, 0, 2, 3, 4).reshape(n_kv, -1, dim)
    past = torch.bmm(rows, keys.float().transpose(1, 2)).view(n_kv, n_config, group, n_fed, seq_len)
    own = torch.einsum("chgpd,chnd->hcgpn", queries, call.keys.float())
    past = past.masked_fill(~mask.transpose(0, 1)[:, :, None, None, :], float("-inf"))
    hidden, outside = _hidden(call.window, n_fed, seq_len, keys.device)
    if outside is not None:
        past = past.masked_fill(outside, float("-inf"))
    weights = torch.cat([past, own.masked_fill(hidden, float("-inf"))], dim=-1).softmax(-1)
    from_past = torch.bmm(weights[..., :seq_len].reshape(n_kv, -1, seq_len), values.float())
    from_own = torch.einsum("hcgpn,chnd->hcgpd", weights[..., seq_len:], call.values.float())
    output = from_past.view(n_kv, n_config, group, n_fed, dim) + from_own
    return output.permute(1, 0, 2, 3, 4).reshape(n_config, n_heads, n_fed, dim).to(call.queries.dtype)


def _hidden(window: int | None, n_fed: int, seq_len: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return which own entries a fed token cannot see ``[P, P]``, and prompt entries outside a sliding window ``[P, T]``."""
    import torch

    rows = torch.arange(seq_len, seq_len + n_fed, device=device)[:, None]
    own, past = torch.arange(seq_len, seq_len + n_fed, device=device), torch.arange(seq_len, device=device)
    if window is None:
        return own > rows, None
    return (own > rows) | (own <= rows - window), past <= rows - window


def _score(logits: Tensor, full: Tensor, gold: Tensor) -> list[Refined]:
    """Score ``[C, M, V]`` logits against gold tokens ``[M]`` and the full cache's log-probabilities ``[M, V]``."""
    scores = score_tokens(logits, gold)
    kl = (full.exp() * (full - logits.log_softmax(-1))).sum(-1)
    hits = scores.hit.float()
    columns = (scores.nll.mean(-1), scores.margin.mean(-1), hits.mean(-1), hits.min(-1).values, kl.mean(-1))
    return [Refined(*values) for values in zip(*(c.tolist() for c in columns), strict=True)]
