"""Load a model and describe it. Together with ``attention.py`` the only place that touches transformers' internals."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtool.attention import ATTENTION, register
from kvtool.device_maps import check_device_map, check_places
from kvtool.errors import CapacityError, ConfigError, DataError, UnsupportedModelError, is_out_of_memory, near_matches
from kvtool.shapes import is_shape, parse_shape

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kvtool.policies.statistics import Rope

EMBEDDED = "tiny"
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Facts about a model that every stage needs.

    Attributes
    ----------
    model_id : str
        ``"tiny"``, a folder name or a hub id.
    architecture : str
    fingerprint : str
        Hash of the configuration and of samples of every weight: two models that differ have different ones.
    n_layers, n_heads, n_kv_heads, head_dim : int
    max_positions : int
        Native context length in tokens.
    windows : tuple of (int or None)
        Sliding-window width per layer, None for full attention.
    weights, tokenizer : str
        What they are where they are not the model's own: random weights of a shape, another model's tokenizer.
    """

    model_id: str
    architecture: str
    fingerprint: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    max_positions: int
    windows: tuple[int | None, ...]
    weights: str = ""
    tokenizer: str = ""

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.n_heads // self.n_kv_heads

    def compressible(self, seq_len: int) -> tuple[bool, ...]:
        """Return per layer whether a policy applies; sliding windows shorter than the prompt are left alone."""
        return tuple(window is None or window >= seq_len for window in self.windows)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready for kvtool, its tokenizer and its facts."""

    model: Any
    tokenizer: Any
    info: ModelInfo

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device  # type: ignore[no-any-return]


def load_model(name: str, device: str = "auto", dtype: str = "auto", device_map: str | None = None) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    Parameters
    ----------
    name : str
        ``"tiny"`` (the embedded model), a local folder in transformers' format, a hub id, or ``"shape:NAME"`` (an architecture with
        random weights, see `kvtool.shapes`).
    device : str
        ``"auto"`` (CUDA if there is one), or any torch device.
    dtype : str
        ``"auto"`` (as stored; bfloat16 for a shape), ``"float32"``, ``"bfloat16"`` or ``"float16"``.
    device_map : str, optional
        Spread the layers over several devices, see `kvtool.device_maps`; `device` is not used then.

    Raises
    ------
    ConfigError
        Unknown shape, device, dtype or device map.
    DataError
        Nothing loadable under that name.
    CapacityError
        A shape's weights do not fit into memory.
    UnsupportedModelError
        The model's attention cannot be served.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    if is_shape(name):
        return _load_shape(name, device, dtype, device_map)
    path = str(embedded_folder()) if name == EMBEDDED else name
    if not Path(path).is_dir() and (path.startswith((".", "/", "~")) or path.count("/") != 1):
        raise DataError(f"model {name!r} not found: give 'tiny', an existing folder with config.json, or a hub id owner/name")
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise DataError(f"model folder {name} has no config.json; give a folder in transformers' format")
    register()
    where = _device(device)
    _check_dtype(dtype)
    spread = {} if device_map is None else {"device_map": check_device_map(device_map)}
    try:
        tokenizer = load_tokenizer(path)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype if dtype == "auto" else getattr(torch, dtype), attn_implementation=ATTENTION, **spread
        )
        model = (model if spread else model.to(where)).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        line = " ".join(str(error).split())[:300]
        raise DataError(f"model {name!r} cannot be loaded: {line}") from error
    check_places(getattr(model, "hf_device_map", {}))
    return LoadedModel(model, tokenizer, describe(model, name))


#: width up to which a forward on a CPU is no faster with several threads
SMALL_WIDTH = 512
_threads: list[int] = []


def set_threads(loaded: LoadedModel) -> None:
    """Let a program use one thread for a small model on a CPU, else as many as torch had chosen; what the user asked for stays.

    The embedded model (width 256) is as fast with one thread on two idle cores, and six times faster beside other work, as threads
    that wait for each other keep the cores busy (docs/decisions.md). For programs, not for libraries: it holds for the process.

    Parameters
    ----------
    loaded : LoadedModel
    """
    import torch

    if any(os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")):
        return
    if not _threads:
        _threads.append(torch.get_num_threads())
    width = loaded.info.n_heads * loaded.info.head_dim
    small = width <= SMALL_WIDTH and loaded.model.device.type == "cpu"
    torch.set_num_threads(1 if small else _threads[0])


def _check_dtype(name: str) -> None:
    if name not in DTYPES:
        raise ConfigError(f"unknown dtype {name!r}.{near_matches(name, DTYPES)} Known: {', '.join(DTYPES)}")


def _load_shape(name: str, device: str, dtype: str, device_map: str | None) -> LoadedModel:
    """Build an architecture with random weights; texts are cut into tokens by the embedded model's tokenizer."""
    import torch

    from kvtool.shape_models import build_shape, shape_fingerprint

    register()
    shape, where = parse_shape(name), _device(device)
    _check_dtype(dtype)
    kind = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    try:
        model = build_shape(shape, where, kind, None if device_map is None else check_device_map(device_map))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        needed = shape.n_parameters * kind.itemsize / 1e9
        raise CapacityError(f"{name}: its weights need {needed:.1f} GB, {where} has no room for them") from error
    info = describe(model, shape.text, shape_fingerprint(shape, kind))
    info = replace(info, weights=f"random, seed {shape.seed}", tokenizer=f"of the embedded model {EMBEDDED!r}")
    return LoadedModel(model, load_tokenizer(str(embedded_folder())), info)


def _device(name: str) -> str:
    """Resolve a device name; one that this machine or this torch lacks is refused, nothing falls back."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        line = " ".join(str(error).split())[:160]
        raise ConfigError(f"device {name!r} cannot be used here: {line}; use auto, cpu, or a device that torch sees") from error
    return name


def load_tokenizer(path: str) -> Any:
    """Load a tokenizer from a folder or hub id."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def embedded_folder() -> Path:
    """Return the folder of the embedded model."""
    return Path(__file__).parent / "data" / "tiny"


def describe(model: Any, model_id: str, known_fingerprint: str | None = None) -> ModelInfo:
    """Read the facts of a loaded transformers model; its fingerprint is computed unless it is known.

    Raises
    ------
    UnsupportedModelError
        No attention hook, or layers that are neither full nor sliding-window attention.
    """
    config = model.config.get_text_config()
    if not getattr(model, "_supports_sdpa", False) or not getattr(model, "_supports_attention_backend", True):
        raise UnsupportedModelError(f"{type(model).__name__} does not run its attention through transformers' attention hook")
    n_heads = int(config.num_attention_heads)
    return ModelInfo(
        model_id=model_id,
        architecture=type(model).__name__,
        fingerprint=known_fingerprint or fingerprint(model),
        n_layers=int(config.num_hidden_layers),
        n_heads=n_heads,
        n_kv_heads=int(getattr(config, "num_key_value_heads", None) or n_heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // n_heads),
        max_positions=int(config.max_position_embeddings),
        windows=_windows(config),
    )


def _windows(config: Any) -> tuple[int | None, ...]:
    n_layers, width = int(config.num_hidden_layers), getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return (width,) * n_layers
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown:
        raise UnsupportedModelError(
            f"layers of kind {', '.join(unknown)} have no KV cache of full attention; kvtool cannot serve them"
        )
    return tuple(width if kind == "sliding_attention" else None for kind in kinds)


def fingerprint(model: Any) -> str:
    """Return 16 hex digits that identify configuration and weights (64 values of every parameter)."""
    import torch

    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version", "dtype")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        step = max(1, flat.numel() // 64)
        digest.update(name.encode() + flat[::step][:64].to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:16]


def tokenizer_hash(tokenizer: Any) -> str:
    """Return 16 hex digits that identify a tokenizer's vocabulary and rules."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def rotary(model: Any) -> Rope | None:
    """Return how a model rotates queries and keys, or None where that cannot be told.

    A model without rotation (OPT, GPT-2) has an empty one. Not told: several rotary embeddings in one model, an interleaved
    convention, and frequencies that change with the length (dynamic NTK, LongRoPE).
    """
    import sys

    import torch

    from kvtool.policies.statistics import Rope

    found = [m for m in model.modules() if any(name.endswith("inv_freq") for name, _ in m.named_buffers(recurse=False))]
    if not found:
        return Rope(torch.empty(0))
    buffers = {name for name, _ in found[0].named_buffers(recurse=False) if name.endswith("inv_freq")}
    if len(found) > 1 or "inv_freq" not in buffers or buffers - {"inv_freq", "original_inv_freq"}:
        return None
    if getattr(found[0], "rope_type", "default") in ("dynamic", "longrope"):
        return None
    # The convention is the model's own helper; it is asked, not assumed.
    helper = getattr(sys.modules[type(found[0]).__module__], "rotate_half", None)
    if helper is None or helper(torch.arange(4.0)).tolist() != [-2.0, -3.0, 0.0, 1.0]:
        return None
    return Rope(found[0].inv_freq.detach().float().clone())


def output_weight(module: Any) -> Tensor | None:
    """Return the output projection of an attention module, ``[hidden, Q * D]``, or None where it is not found."""
    for name in ("o_proj", "out_proj", "dense", "c_proj"):
        weight = getattr(getattr(module, name, None), "weight", None)
        if weight is not None and weight.dim() == 2:
            # GPT-2's Conv1D holds the transpose of a linear layer's weight.
            return (weight.T if name == "c_proj" else weight).detach()  # type: ignore[no-any-return]
    return None


def final_norm(model: Any) -> Any | None:
    """Return the module that normalises the last hidden state before the logits, or None where it cannot be told.

    It is the one module outside of the layers with a single weight vector of the hidden size.
    """
    hidden = int(model.config.get_text_config().hidden_size)
    found = []
    for name, module in model.base_model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None and tuple(weight.shape) == (hidden,) and not any(part.isdigit() for part in name.split(".")):
            found.append(module)
    return found[0] if len(found) == 1 else None


def unknown_statistics(model: Any) -> tuple[str, ...]:
    """Return the kinds of selection statistics that cannot be computed for a model, as it hides what they need."""
    from kvtool.policies.statistics import NEEDS_OUTPUT_WEIGHT, NEEDS_ROPE

    attention = [module for module in model.modules() if hasattr(module, "layer_idx")]
    hidden = () if any(output_weight(module) is not None for module in attention) else NEEDS_OUTPUT_WEIGHT
    return hidden + (NEEDS_ROPE if rotary(model) is None else ())


def check_length(info: ModelInfo, n_tokens: int, what: str) -> None:
    """Refuse a sequence that the model's native context cannot hold.

    Raises
    ------
    ConfigError
        Too long.
    """
    if n_tokens > info.max_positions:
        raise ConfigError(
            f"{what} needs {n_tokens} tokens, but {info.model_id} has a context of {info.max_positions}; "
            "use shorter prompts or a model with a longer context"
        )
