"""Prompt pass: one forward without gradients that leaves statistics, features, keys and values of every layer.

The output of a layer is SDPA's; the statistics are reduced block by block beside it. No T x T tensor is made.

Shapes: Q query heads, H KV heads, T prompt positions, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvtool.attention import AttentionCall, attention_handler, dense_attention
from kvtool.capture.features import HeadFeatures, compute_features
from kvtool.capture.permuted import TAIL
from kvtool.models import output_weight, rotary
from kvtool.policies.statistics import AttentionInputs, Rope, compute_statistics

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True)
class PromptRecord:
    """What one prompt pass leaves; one list entry per layer.

    Attributes
    ----------
    keys, values : list of Tensor ``[H, T, D]``
        On the model's device, for the probe pass.
    selection : list of dict of str to Tensor
        Selection statistics, float32 ``[Q, T]`` or ``[H, T]``, on the CPU.
    features : list of HeadFeatures
        On the CPU.
    tail_queries : list of Tensor ``[Q, min(TAIL, T), D]``
        Of the last positions, post-RoPE, on the model's device, for the permuted pass.
    """

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    selection: list[dict[str, Tensor]] = field(default_factory=list)
    features: list[HeadFeatures] = field(default_factory=list)
    tail_queries: list[Tensor] = field(default_factory=list)


def run_prompt(model: Any, token_ids: Sequence[int], statistics: Sequence[str], feature_rows: int) -> PromptRecord:
    """Run one prompt through the model and collect what a capture needs.

    Parameters
    ----------
    model : transformers causal language model
    token_ids : sequence of int
        The T tokens that are to be compressed.
    statistics : sequence of str
        Names in `kvtool.policies.statistics.KINDS`.
    feature_rows : int
        Query rows for the head features.
    """
    import torch

    record = PromptRecord()

    rope = rotary(model)

    def handler(call: AttentionCall) -> Tensor:
        outputs = dense_attention(call)
        _collect(record, call, outputs[0], rope, statistics, feature_rows)
        return outputs

    ids = torch.tensor([list(token_ids)], device=next(model.parameters()).device)
    # The base model: the prompt's logits are not needed, so none are computed.
    with torch.no_grad(), attention_handler(model, handler):
        model.base_model(input_ids=ids, use_cache=False)
    return record


def _collect(
    record: PromptRecord, call: AttentionCall, outputs: Tensor, rope: Rope | None, statistics: Sequence[str], feature_rows: int
) -> None:
    # Contiguous: a view into a fused projection would keep queries and all of that projection alive.
    keys, values = call.keys[0].contiguous(), call.values[0].contiguous()
    inputs = AttentionInputs(call.queries[0], keys, values, call.scaling, call.window, rope, output_weight(call.module))
    selection = compute_statistics(inputs, statistics)
    record.features.append(compute_features(inputs, outputs, feature_rows).cpu())
    record.tail_queries.append(call.queries[0][:, -TAIL:].clone())
    record.keys.append(keys)
    record.values.append(values)
    record.selection.append({name: value.cpu() for name, value in selection.items()})


def greedy_answer(model: Any, token_ids: Sequence[int], n_tokens: int) -> list[int]:
    """Return the model's own greedy answer with the full cache, up to and including an end token.

    Parameters
    ----------
    model : transformers causal language model
    token_ids : sequence of int
        The whole prompt.
    n_tokens : int
        Tokens at most.
    """
    import torch

    end = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = set(end) if isinstance(end, list | tuple) else {end}
    ids = torch.tensor([list(token_ids)], device=next(model.parameters()).device)
    answer: list[int] = []
    cache = None
    with torch.no_grad():
        while len(answer) < n_tokens and not (answer and answer[-1] in ends):
            out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, ids = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
            answer.append(int(ids))
    return answer
