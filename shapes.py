"""Architectures by name, without weights: ``shape:llama-2-7b``. Times and bytes depend on the shape of a model, not on its values.

The numbers are those of the published ``config.json`` of each model (named in `Shape.source`), under the names that transformers
gives them. This module is arithmetic alone; `kvtool.shape_models` builds the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from kvtool.errors import ConfigError, near_matches

PREFIX = "shape:"

#: What may follow the name: ``shape:opt-13b,context=8192,layers=4,seed=1``.
OPTIONS = ("context", "layers", "seed")


@dataclass(frozen=True, slots=True)
class Shape:
    """An architecture.

    Attributes
    ----------
    name : str
    family : str
        transformers' model type.
    config : mapping
        Arguments of that type's configuration.
    source : str
        Where the numbers come from.
    remark : str
        What a user has to know beyond that.
    seed : int
        Of the random weights.
    """

    name: str
    family: str
    config: Mapping[str, Any]
    source: str
    remark: str = ""
    seed: int = 0

    @property
    def n_layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    @property
    def n_heads(self) -> int:
        return int(self.config["num_attention_heads"])

    @property
    def n_kv_heads(self) -> int:
        return int(self.config.get("num_key_value_heads", self.n_heads))

    @property
    def head_dim(self) -> int:
        return int(self.config.get("head_dim", self.config["hidden_size"] // self.n_heads))

    @property
    def context(self) -> int:
        """Native context length in tokens."""
        return int(self.config["max_position_embeddings"])

    @property
    def text(self) -> str:
        """The name with everything that was changed; `parse_shape` reads it back."""
        base = SHAPES[self.name]
        changed = {"context": (self.context, base.context), "layers": (self.n_layers, base.n_layers), "seed": (self.seed, 0)}
        return PREFIX + ",".join([self.name, *(f"{key}={now}" for key, (now, was) in changed.items() if now != was)])

    @property
    def n_parameters(self) -> int:
        """Parameters, counted from the architecture; tied ones once."""
        return self.n_layers * _layer_parameters(self) + _outer_parameters(self)

    @property
    def n_lookup(self) -> int:
        """Parameters of tables of which a decode step reads one row per sequence: untied input embeddings, learned positions."""
        c = self.config
        tied = c.get("tie_word_embeddings", self.family == "opt")
        return (0 if tied else c["vocab_size"] * c["hidden_size"]) + _position_parameters(self)

    def kv_bytes_per_token(self, itemsize: int = 2) -> int:
        """Bytes of keys and values of one token in all layers, with `itemsize` bytes a number."""
        return 2 * self.n_layers * self.n_kv_heads * self.head_dim * itemsize


def _position_parameters(shape: Shape) -> int:
    # OPT's table has two rows more than positions.
    return (shape.context + 2) * int(shape.config["hidden_size"]) if shape.family == "opt" else 0


def _outer_parameters(shape: Shape) -> int:
    c = shape.config
    hidden, tied = c["hidden_size"], c.get("tie_word_embeddings", shape.family == "opt")
    final_norm = hidden if shape.family in ("llama", "mistral", "qwen2", "qwen3") else 2 * hidden
    return int(c["vocab_size"] * hidden * (1 if tied else 2) + final_norm + _position_parameters(shape))


def _layer_parameters(shape: Shape) -> int:
    c, width = shape.config, shape.head_dim
    hidden, q_width, kv_width = c["hidden_size"], shape.n_heads * width, shape.n_kv_heads * width
    attention = 2 * hidden * q_width + 2 * hidden * kv_width
    if shape.family == "opt":
        return int(attention + 4 * hidden + 2 * hidden * c["ffn_dim"] + c["ffn_dim"] + hidden + 4 * hidden)
    mlp = c["intermediate_size"] * hidden
    if shape.family == "gpt_neox":
        return int(attention + 4 * hidden + 2 * mlp + c["intermediate_size"] + hidden + 4 * hidden)
    bias = q_width + 2 * kv_width if shape.family == "qwen2" else 0
    head_norms = 2 * width if shape.family == "qwen3" else 0
    return int(attention + bias + head_norms + 3 * mlp + 2 * hidden)


def _gated(
    hidden: int, inner: int, layers: int, heads: tuple[int, int], vocab: int, context: int, **more: Any
) -> Mapping[str, Any]:
    """Arguments of the Llama family: gated MLP, RMS norms, rotary positions."""
    return MappingProxyType(
        {
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads[0],
            "num_key_value_heads": heads[1],
            "vocab_size": vocab,
            "max_position_embeddings": context,
            **more,
        }
    )


def _rope(theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_theta": theta, "rope_type": "default", **more}


#: Llama 3's rotation: frequencies stretched by a factor, low ones fully, high ones not at all.
def _llama3_rope(factor: float) -> dict[str, Any]:
    limits = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return _rope(500000.0, **limits) | {"rope_type": "llama3", "factor": factor}


_TABLE = (
    Shape(
        "llama-2-7b",
        "llama",
        _gated(4096, 11008, 32, (32, 32), 32000, 4096, rms_norm_eps=1e-5, rope_parameters=_rope(10000.0)),
        "meta-llama/Llama-2-7b-hf",
    ),
    Shape(
        "mistral-7b",
        "mistral",
        _gated(4096, 14336, 32, (32, 8), 32000, 32768, rms_norm_eps=1e-5, rope_parameters=_rope(1e6), sliding_window=None),
        "mistralai/Mistral-7B-Instruct-v0.2",
        "version 0.2: full attention, no sliding window",
    ),
    Shape(
        "opt-13b",
        "opt",
        MappingProxyType(
            {
                "hidden_size": 5120,
                "ffn_dim": 20480,
                "num_hidden_layers": 40,
                "num_attention_heads": 40,
                "word_embed_proj_dim": 5120,
                "vocab_size": 50272,
                "max_position_embeddings": 2048,
            }
        ),
        "facebook/opt-13b",
        "learned positions: longer prompts need context=N, which makes the table longer",
    ),
    Shape(
        "qwen2.5-14b",
        "qwen2",
        _gated(5120, 13824, 48, (40, 8), 152064, 131072, rms_norm_eps=1e-5, rope_parameters=_rope(1e6)),
        "Qwen/Qwen2.5-14B",
    ),
    Shape(
        "qwen-14b",
        "qwen2",
        # Its config says 27392: the width of both halves of the gated MLP together.
        _gated(5120, 13696, 40, (40, 40), 152064, 8192, rms_norm_eps=1e-6, rope_parameters=_rope(10000.0)),
        "Qwen/Qwen-14B",
        "first series, one KV head per query head; built as Qwen2, which has the same tensors (q, k and v in one matrix there)",
    ),
    Shape(
        "pythia-2.8b",
        "gpt_neox",
        MappingProxyType(
            {
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "vocab_size": 50304,
                "max_position_embeddings": 2048,
                "use_parallel_residual": True,
                "rope_parameters": _rope(10000.0, partial_rotary_factor=0.25),
            }
        ),
        "EleutherAI/pythia-2.8b",
    ),
    Shape(
        "llama-3.1-8b",
        "llama",
        _gated(4096, 14336, 32, (32, 8), 128256, 131072, rms_norm_eps=1e-5, rope_parameters=_llama3_rope(8.0)),
        "meta-llama/Llama-3.1-8B",
    ),
    Shape(
        "llama-3.2-1b",
        "llama",
        _gated(
            2048,
            8192,
            16,
            (32, 8),
            128256,
            131072,
            rms_norm_eps=1e-5,
            rope_parameters=_llama3_rope(32.0),
            tie_word_embeddings=True,
        ),
        "meta-llama/Llama-3.2-1B",
    ),
    Shape(
        "qwen3-0.6b",
        "qwen3",
        _gated(
            1024,
            3072,
            28,
            (16, 8),
            151936,
            40960,
            head_dim=128,
            rms_norm_eps=1e-6,
            rope_parameters=_rope(1e6),
            tie_word_embeddings=True,
        ),
        "Qwen/Qwen3-0.6B",
        "small, head dimension 128",
    ),
    Shape(
        "qwen2.5-0.5b",
        "qwen2",
        _gated(896, 4864, 24, (14, 2), 151936, 32768, rms_norm_eps=1e-6, rope_parameters=_rope(1e6), tie_word_embeddings=True),
        "Qwen/Qwen2.5-0.5B",
    ),
    Shape(
        "llama-0.3b",
        "llama",
        _gated(1024, 2816, 24, (16, 8), 32000, 32768, rms_norm_eps=1e-5, rope_parameters=_rope(500000.0)),
        "kvtool",
        "no published model: the proportions of Llama at a size that CPUs can measure",
    ),
    Shape(
        "llama-3m",
        "llama",
        _gated(256, 704, 4, (4, 2), 512, 32768, rms_norm_eps=1e-5, rope_parameters=_rope(500000.0)),
        "kvtool",
        "no published model: for trying commands out; fits into a processor's cache",
    ),
)

SHAPES: Mapping[str, Shape] = MappingProxyType({shape.name: shape for shape in _TABLE})


def is_shape(name: str) -> bool:
    """Return True if a model's name asks for a shape."""
    return name.startswith(PREFIX)


def parse_shape(text: str) -> Shape:
    """Read ``shape:NAME[,context=N][,layers=N][,seed=N]``.

    Raises
    ------
    ConfigError
        Unknown name or option, with near matches; a value that is no whole number in range.
    """
    name, *options = text.removeprefix(PREFIX).split(",")
    if name not in SHAPES:
        raise ConfigError(f"unknown shape {name!r}.{near_matches(name, SHAPES)} Known: {', '.join(SHAPES)}")
    shape, changes = SHAPES[name], {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or key not in OPTIONS:
            raise ConfigError(
                f"{text}: unknown option {option!r}.{near_matches(key, OPTIONS)} Known: context=N, layers=N, seed=N"
            )
        if not value.isdigit() or (key != "seed" and int(value) < 1):
            raise ConfigError(f"{text}: {key}={value} must be a whole number, at least {0 if key == 'seed' else 1}")
        changes[key] = int(value)
    seed = changes.pop("seed", 0)
    names = {"context": "max_position_embeddings", "layers": "num_hidden_layers"}
    config = {**shape.config, **{names[key]: value for key, value in changes.items()}}
    return replace(shape, config=MappingProxyType(config), seed=seed)


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a shape takes, by arithmetic: weights and KV cache, without activations.

    Attributes
    ----------
    weight_bytes, read_bytes : int
        Of all parameters; of those that a decode step reads.
    kv_bytes_per_token : int
    kv_bytes : int
        Of all sequences with all their tokens.
    kept_bytes : int
        Of the entries that a budget keeps.
    fits, kept_fits : bool or None
        Weights and full cache, weights and kept entries, in the memory given; None without one.
    longest, kept_longest : int or None
        Longest prompt that fits at this batch; 0: not even the weights do.
    """

    weight_bytes: int
    read_bytes: int
    kv_bytes_per_token: int
    kv_bytes: int
    kept_bytes: int
    fits: bool | None
    kept_fits: bool | None
    longest: int | None
    kept_longest: int | None

    @property
    def possible_speedup(self) -> float:
        """What reading the kept entries instead of all allows a decode step at best."""
        return (self.read_bytes + self.kv_bytes) / (self.read_bytes + self.kept_bytes)


def footprint(
    shape: Shape, length: int, batch: int, *, kept: float = 1.0, memory: int | None = None, itemsize: int = 2
) -> Footprint:
    """Work out what a shape takes.

    Parameters
    ----------
    length, batch : int
        Tokens per sequence; sequences.
    kept : float
        Share of the entries that stay.
    memory : int, optional
        Bytes there are.
    itemsize : int
        Bytes a number.
    """
    weights, token = shape.n_parameters * itemsize, shape.kv_bytes_per_token(itemsize)
    full = token * length * batch
    left = None if memory is None else memory - weights
    return Footprint(
        weight_bytes=weights,
        read_bytes=(shape.n_parameters - shape.n_lookup) * itemsize,
        kv_bytes_per_token=token,
        kv_bytes=full,
        kept_bytes=round(full * kept),
        fits=None if left is None else full <= left,
        kept_fits=None if left is None else round(full * kept) <= left,
        longest=None if left is None else max(0, left // (token * batch)),
        kept_longest=None if left is None else max(0, int(left / (token * batch * kept))),
    )
