"""What the capture tests share: tiny models, samples, and a literal reference that holds whole T x T matrices in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from kvtool.attention import AttentionCall, attention_handler
from kvtool.data.tasks import Encoded, Sample
from kvtool.models import LoadedModel, describe

ARCHITECTURES = ("llama", "mistral", "qwen2", "opt", "gpt_neox")
VOCAB = 67
WINDOW = 24


def build_model(kind: str, seed: int = 0, max_positions: int = 1024) -> Any:
    """Build a random model in float32, with weights large enough that attention is far from uniform."""
    import transformers as tf

    shape = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": max_positions}
    grouped = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    single = {"num_attention_heads": 4}
    configs: dict[str, Callable[[], Any]] = {
        "llama": lambda: tf.LlamaConfig(**shape, **grouped),
        "mistral": lambda: tf.MistralConfig(**shape, **grouped, sliding_window=WINDOW),
        "qwen2": lambda: tf.Qwen2Config(**shape, **grouped),
        "opt": lambda: tf.OPTConfig(**shape, **single, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0),
        "gpt_neox": lambda: tf.GPTNeoXConfig(**shape, **single, intermediate_size=48),
    }
    torch.manual_seed(seed)
    model = tf.AutoModelForCausalLM.from_config(configs[kind](), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.9 if "embed" in name else 0.35)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def build_tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    vocab = {f"w{i}": i for i in range(VOCAB)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocab, unk_token="w0")))


def build_loaded(kind: str = "llama", **options: Any) -> LoadedModel:
    model = build_model(kind, **options)
    return LoadedModel(model, build_tokenizer(), describe(model, f"random-{kind}"))


def make_samples(n: int, n_context: int = 50, n_question: int = 5, n_answer: int = 4, seed: int = 1) -> list[Encoded]:
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for index in range(n):
        ids = torch.randint(1, VOCAB, (n_context + index + n_question + n_answer,), generator=generator).tolist()
        stop = n_context + index
        sample = Sample(f"toy-{index}", "c", "q", ("a",) if n_answer else (), "exact", 6, {"index": index})
        samples.append(Encoded(sample, ids[:stop], ids[stop : stop + n_question], ids[stop + n_question :]))
    return samples


@dataclass
class FullPass:
    """One forward of the whole sequence with whole matrices, float64.

    `attention[layer]` is ``[Q, N, N]``, `queries` ``[Q, N, D]``, `keys` and `values` ``[H, N, D]``; `factors[layer]` multiplies
    the attention entry by entry, so the gradient of any number with respect to it is that number's gain.
    """

    logits: Tensor
    attention: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]
    factors: list[Tensor]
    queries: list[Tensor]
    scaling: float = 0.0


def exact_norms(model: Any) -> Any:
    """Replace RMS norms, which transformers computes in float32 whatever the model's precision, by float64 ones."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).sqrt()

    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            module.forward = MethodType(forward, module)
    return model


def full_pass(
    model: Any, ids: Sequence[int], window: int | None, change: Callable[[int, Tensor], Tensor] | None = None
) -> FullPass:
    """Run a float64 copy of `model` with attention written out literally; `change` may replace the attention of a layer."""
    model = exact_norms(copy.deepcopy(model).double())
    found = FullPass(torch.empty(0), [], [], [], [], [])

    def handler(call: AttentionCall) -> Tensor:
        n = call.queries.shape[2]
        keys = call.keys[0].repeat_interleave(call.queries.shape[1] // call.keys.shape[1], dim=0)
        values = call.values[0].repeat_interleave(keys.shape[0] // call.values.shape[1], dim=0)
        visible = torch.zeros(n, n, dtype=torch.bool)
        for i in range(n):
            visible[i, max(0, i - window + 1) if window else 0 : i + 1] = True
        logits = torch.einsum("qid,qjd->qij", call.queries[0], keys) * call.scaling
        exp = torch.where(visible, (logits - logits.amax(-1, keepdim=True)).exp(), 0.0)
        attention = exp / exp.sum(-1, keepdim=True)
        factor = torch.ones_like(attention, requires_grad=True)
        found.attention.append(attention.detach())
        found.keys.append(call.keys[0].detach())
        found.values.append(call.values[0].detach())
        found.factors.append(factor)
        found.queries.append(call.queries[0].detach())
        found.scaling = call.scaling
        used = attention * factor if change is None else change(call.layer, attention)
        return (used @ values)[None]

    with attention_handler(model, handler):
        found.logits = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    return found


def rotations(model: Any, n: int) -> Tensor:
    """Return the rotation matrix of every position, float64 ``[n, D, D]``, from what the model's own modules do to unit vectors."""
    import sys

    rotary = next((m for m in model.modules() if hasattr(m, "inv_freq")), None)
    attention = next(m for m in model.modules() if hasattr(m, "layer_idx"))
    dim = getattr(attention, "head_dim", None) or getattr(attention, "head_size", None)
    unit = torch.eye(dim)[None, None].expand(1, 1, dim, dim)
    if rotary is None:
        return torch.eye(dim, dtype=torch.float64).expand(n, -1, -1)
    apply = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    found = []
    for position in range(n):
        cos, sin = rotary(unit, torch.full((1, dim), position))
        found.append(apply(unit, unit, cos, sin)[0][0, 0].T.double())
    return torch.stack(found)


def margin(logits: Tensor, target: int) -> Tensor:
    """Gold logit minus log-sum-exp of all others, written out."""
    others = torch.cat([logits[:target], logits[target + 1 :]])
    return logits[target] - others.exp().sum().log()


def objective(found: FullPass, ids: Sequence[int], first: int) -> Tensor:
    """Return the margins of the tokens ``ids[first:]``, each predicted by the token before it."""
    return torch.stack([margin(found.logits[position - 1], ids[position]) for position in range(first, len(ids))])
