"""Probe pass: teacher-forced forward and backward of a few tokens on top of the prompt's cached keys and values.

Gradients flow through these tokens only; the prompt's keys and values are constants. The objective is the sum of the
answer tokens' margins (gold logit minus log-sum-exp of the others): a confident model has almost no loss gradient, but its
margin still falls when attention to the right entries is cut.

Shapes: L layers, Q query heads, H KV heads, G = Q / H, T prompt positions, P probe tokens, M margins, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvtool.attention import AttentionCall, attention_handler, seen_cache
from kvtool.scoring import score_tokens

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class ProbeTokens:
    """Tokens that are fed after compression, and what they predict.

    Attributes
    ----------
    fed : tuple of int
        The P tokens, at positions T, T + 1, ...
    rows : tuple of int
        Which fed token predicts each of the M answer tokens.
    targets : tuple of int
        Those M answer tokens.
    """

    fed: tuple[int, ...]
    rows: tuple[int, ...]
    targets: tuple[int, ...]


def probe_tokens(question: Sequence[int], answer: Sequence[int]) -> ProbeTokens:
    """Return the tokens to feed: `question` (empty if it was compressed with the prompt), then the answer but its last token.

    Without a question the first answer token is predicted by the prompt itself, before compression: it has no margin here.
    """
    fed = tuple(question) + tuple(answer[:-1])
    first = 0 if question else 1
    rows = tuple(len(question) + k - 1 for k in range(first, len(answer)))
    return ProbeTokens(fed, rows, tuple(answer[first:]))


@dataclass(slots=True)
class ProbeRecord:
    """Attention and gain of the probe tokens, one list entry per layer, float32 on the CPU.

    Attributes
    ----------
    attention, gain : list of Tensor ``[Q, P, T]``
        a_ij, and b_ij = a_ij (g_i . v_j) with g_i the gradient of the objective with respect to the head's output.
    attention_own, gain_own : list of Tensor ``[Q, P]``
        Sums of both over the probe tokens' own entries, which are never evicted.
    margins, nll : Tensor ``[M]``
        Gold logit minus log-sum-exp of all others; negative log-likelihood.
    """

    attention: list[Tensor] = field(default_factory=list)
    gain: list[Tensor] = field(default_factory=list)
    attention_own: list[Tensor] = field(default_factory=list)
    gain_own: list[Tensor] = field(default_factory=list)
    margins: Tensor = field(init=False)
    nll: Tensor = field(init=False)


@dataclass(slots=True)
class _Trace:
    """What the forward leaves of one layer for the gains."""

    weights: Tensor
    values: Tensor
    outputs: Tensor


def run_probes(model: Any, keys: Sequence[Tensor], values: Sequence[Tensor], tokens: ProbeTokens) -> ProbeRecord:
    """Run the probe tokens forward and backward.

    Parameters
    ----------
    model : transformers causal language model
    keys, values : sequence of Tensor ``[H, T, D]``
        Of the prompt, one per layer, post-RoPE.
    tokens : ProbeTokens
        At least one fed token.
    """
    import torch

    seq_len = int(keys[0].shape[1])
    traces: list[_Trace] = []

    def handler(call: AttentionCall) -> Tensor:
        trace = _attend(call, keys[call.layer], values[call.layer])
        traces.append(trace)
        return trace.outputs[None].to(call.queries.dtype)

    device = keys[0].device
    ids = torch.tensor([tokens.fed], device=device)
    with torch.enable_grad(), attention_handler(model, handler):
        cache = seen_cache(seq_len, len(keys))
        rows = torch.tensor(tokens.rows, device=device)
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=rows).logits[0]
        targets = torch.tensor(tokens.targets, device=device)
        scores = score_tokens(logits, targets)
        gradients = torch.autograd.grad(scores.margin.sum(), [trace.outputs for trace in traces])
    record = ProbeRecord()
    record.margins, record.nll = scores.margin.detach().float().cpu(), scores.nll.detach().float().cpu()
    for trace, gradient in zip(traces, gradients, strict=True):
        _add_layer(record, trace, gradient, seq_len)
    return record


def _attend(call: AttentionCall, prompt_keys: Tensor, prompt_values: Tensor) -> _Trace:
    """Attention of the probe rows over prompt and own entries, written out so that weights and outputs can be kept."""
    import torch

    precise = torch.promote_types(call.queries.dtype, torch.float32)
    n_kv, seq_len, _ = prompt_keys.shape
    n_heads, n_probe = call.queries.shape[1], call.queries.shape[2]
    keys = torch.cat([prompt_keys, call.keys[0]], dim=1).to(precise)
    values = torch.cat([prompt_values, call.values[0]], dim=1).to(precise)
    queries = (call.queries[0].to(precise) * call.scaling).reshape(n_kv, -1, keys.shape[-1])
    logits = (queries @ keys.transpose(1, 2)).view(n_heads, n_probe, seq_len + n_probe)
    columns = torch.arange(seq_len + n_probe, device=keys.device)
    rows = torch.arange(seq_len, seq_len + n_probe, device=keys.device)[:, None]
    hidden = columns > rows
    if call.window is not None:
        hidden |= columns <= rows - call.window
    weights = torch.softmax(logits.masked_fill(hidden, float("-inf")), dim=-1)
    outputs = (weights.view(n_kv, -1, seq_len + n_probe) @ values).view(n_heads, n_probe, -1)
    if not outputs.requires_grad:  # a model whose parameters are frozen: the graph begins at the first layer's output
        outputs.requires_grad_()
    return _Trace(weights.detach(), values.detach(), outputs)


def _add_layer(record: ProbeRecord, trace: _Trace, gradient: Tensor, seq_len: int) -> None:
    n_kv, n_keys, _ = trace.values.shape
    n_heads, n_probe, _ = gradient.shape
    along = gradient.reshape(n_kv, -1, trace.values.shape[-1]) @ trace.values.transpose(1, 2)
    gain = trace.weights * along.view(n_heads, n_probe, n_keys)
    record.attention.append(trace.weights[:, :, :seq_len].float().cpu())
    record.gain.append(gain[:, :, :seq_len].float().cpu())
    record.attention_own.append(trace.weights[:, :, seq_len:].sum(-1).float().cpu())
    record.gain_own.append(gain[:, :, seq_len:].sum(-1).float().cpu())
