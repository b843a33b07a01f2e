"""Builds a model from a shape: random weights, made directly in their dtype and on their device.

The architecture is laid out without memory (torch's meta device), then each parameter is made where it belongs. Weights are cut from
one block of normal numbers that is drawn on the CPU, whatever the device: the same seed gives the same values everywhere, and
14 billion of them are written at the speed of memory instead of being drawn. Names decide where in the block a parameter starts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvtool.attention import ATTENTION, register
from kvtool.files import config_hash

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kvtool.shapes import Shape

#: Standard deviation of weights: of order 1 / sqrt(hidden size), so that no activation grows out of half precision.
STD = 0.02

#: Numbers in the block: a prime, so that rows of a matrix do not fall on each other when it is cut from the block again and again.
BLOCK = 4_194_301


def build_shape(shape: Shape, device: str, dtype: torch.dtype, device_map: str | None = None) -> Any:
    """Return a model in evaluation mode, with kvtool's attention.

    Parameters
    ----------
    shape : Shape
    device : str
        Of all parameters, unless there is a map.
    dtype : torch.dtype
        Of all parameters; rotary frequencies stay in float32, as transformers has them.
    device_map : str, optional
        Spread the layers over several devices, see `kvtool.device_maps`.
    """
    model = empty_model(shape, dtype)
    places: Mapping[str, Any] = {"": device}
    if device_map is not None:
        from kvtool.device_maps import places_for

        places = places_for(model, device_map)
    materialise(model, places, shape.seed)
    if device_map is not None:
        from kvtool.device_maps import dispatch

        dispatch(model, places)
    # Random weights end no text on purpose: every run generates as many tokens as it was asked for.
    model.generation_config.eos_token_id = None
    return model.eval().requires_grad_(False)


def empty_model(shape: Shape, dtype: torch.dtype) -> Any:
    """Return the architecture without memory, on torch's meta device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    register()
    ids = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": None}
    config = AutoConfig.for_model(shape.family, **shape.config, **ids)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION)


def materialise(model: Any, places: Mapping[str, Any], seed: int) -> None:
    """Give every parameter and buffer of a meta model its memory and its values, in place; shared parameters stay shared.

    Parameters
    ----------
    places : mapping
        Module name -> device; ``""`` for all others. The longest name that a parameter's name starts with counts.
    """
    import torch

    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(seed)) * STD
    blocks: dict[tuple[str, torch.dtype], Tensor] = {}
    made: dict[int, torch.nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            full = f"{prefix}.{name}" if prefix else name
            if id(parameter) not in made:
                new = torch.empty_like(parameter, device=place_of(full, places))
                key = (str(new.device), new.dtype)
                if key not in blocks:
                    blocks[key] = block.to(new.device, new.dtype)
                _fill(new, full, blocks[key])
                made[id(parameter)] = torch.nn.Parameter(new, requires_grad=False)
            module._parameters[name] = made[id(parameter)]
        if any(True for _ in module.buffers(recurse=False)):
            _rebuild_buffers(module, place_of(prefix, places))


def place_of(name: str, places: Mapping[str, Any]) -> Any:
    """Return the device of a parameter or module: that of the longest name in `places` that it lies in."""
    fitting = [place for place in places if not place or name == place or name.startswith(place + ".")]
    return places[max(fitting, key=len)]


def _fill(parameter: Tensor, name: str, block: Tensor) -> None:
    """Norms do nothing, biases add nothing, matrices are cut from the block."""
    if parameter.dim() == 1:
        parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        return
    flat, size = parameter.view(-1), block.numel()
    start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % size
    done = min(size - start, flat.numel())
    flat[:done] = block[start : start + done]
    while done < flat.numel():
        part = min(size, flat.numel() - done)
        flat[done : done + part] = block[:part]
        done += part


def _rebuild_buffers(module: Any, device: Any) -> None:
    """Buffers of the known families are rotary frequencies, which a module computes from its configuration."""
    import torch

    with torch.device(device):
        fresh = type(module)(module.config)
    for name, buffer in fresh.named_buffers(recurse=False):
        module._buffers[name] = buffer


def shape_fingerprint(shape: Shape, dtype: torch.dtype) -> str:
    """Return 16 hex digits that identify configuration, seed and dtype, and thereby the weights."""
    facts = {"family": shape.family, "config": dict(shape.config), "seed": shape.seed, "std": STD, "block": BLOCK}
    return config_hash({**facts, "dtype": str(dtype)})
