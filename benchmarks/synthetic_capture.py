"""A capture with the shape of a large model and made-up attention, written through kvtool's own store.

    python benchmarks/synthetic_capture.py OUT.h5 [--layers 32 --heads 32 --kv-heads 8 --length 4096 --prompts 8 --probes 8]

For timing and memory only: the numbers say nothing about any model. Every head attends to a sink, to what is near and to a few far
positions, in shares of its own, so that sorts, ties and budgets are as uneven as those of a real model. One layer of one prompt is
held at a time.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtool.capture.store import StoredArray, StoredSample, assemble, remove_parts, to_half, to_json, write_part

Float = NDArray[np.float32]
WINDOWS = (8, 32)


def attention(rng: np.random.Generator, n_queries: int, length: int, style: NDArray[np.float64]) -> Float:
    """Return made-up attention of one head's queries, (queries, length), rows sum to 1; `style` is sink, local and far weight."""
    distance = np.arange(length, 0, -1, dtype=np.float64)
    logits = rng.normal(0, 1.0, (n_queries, length)) - np.log(distance) * style[1]
    far = rng.choice(length, 12, replace=False)
    logits[:, far] += 6 * style[2]
    logits[:, :4] += 8 * style[0]
    logits -= logits.max(axis=1, keepdims=True)
    weights = np.exp(logits)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def layer_arrays(rng: np.random.Generator, shape: argparse.Namespace) -> dict[str, Float]:
    """Return the statistics and probes of one layer."""
    n_heads, n_kv, length, n_probe = shape.heads, shape.kv_heads, shape.length, shape.probes
    arrays: dict[str, list[Float]] = {}
    far = rng.random((n_heads, 3))
    for head in range(n_heads):
        rows = attention(rng, max(WINDOWS) + n_probe, length, far[head])
        past, probes = rows[: max(WINDOWS)], rows[max(WINDOWS) :]
        found = {"accumulated": past.mean(axis=0) * np.linspace(length, 1, length, dtype=np.float32), "last": past[-1]}
        for window in WINDOWS:
            last = past[-window:]
            seen = last[:, : length - window]
            found |= {
                f"window_mean_{window}": last.mean(axis=0),
                f"window_var_{window}": last.var(axis=0),
                f"window_max_{window}": last.max(axis=0),
                f"window_entropy_{window}": -(seen * np.log(seen + 1e-10)).sum(axis=1).mean(keepdims=True),
            }
        own = rng.uniform(0.01, 0.2, n_probe).astype(np.float32)
        found["probe_attention"] = probes * (1 - own[:, None])
        found["probe_gain"] = found["probe_attention"] * rng.normal(0, 1, (n_probe, length)).astype(np.float32)
        found["own_attention"], found["own_gain"] = own, own * rng.normal(0, 1, n_probe).astype(np.float32)
        for key, value in found.items():
            arrays.setdefault(key, []).append(value.astype(np.float32))
    arrays |= {
        key: [rng.gamma(4, 1, length).astype(np.float32) for _ in range(n_kv)]
        for key in ("key_norm", "value_norm", "value_norm1")
    }
    arrays["key_similarity"] = [rng.uniform(-1, 1, length).astype(np.float32) for _ in range(n_kv)]
    return {key: np.stack(values) for key, values in arrays.items()}


def write_sample(path: Path, index: int, shape: argparse.Namespace) -> None:
    """Write one made-up prompt."""
    layers = [layer_arrays(np.random.default_rng([shape.seed, index, layer]), shape) for layer in range(shape.layers)]
    probe_keys = ("probe_attention", "probe_gain", "own_attention", "own_gain")
    stored = {
        f"selection/{key}": StoredArray(np.stack([layer[key] for layer in layers]), True)
        for key in layers[0]
        if key not in probe_keys
    }
    for name in ("attention", "gain"):
        stored[f"probes/{name}"] = to_half([layer.pop(f"probe_{name}") for layer in layers], name)
        stored[f"probes/{name}_own"] = StoredArray(np.stack([layer[f"own_{name}"] for layer in layers]), True)
    rng = np.random.default_rng([shape.seed, index])
    zeros = np.zeros(shape.probes, dtype=np.float32)
    stored |= {
        "probes/margins": StoredArray(zeros),
        "probes/nll": StoredArray(zeros),
        "probes/rows": StoredArray(np.arange(shape.probes, dtype=np.int32)),
        "prompt_ids": StoredArray(rng.integers(3, 300, shape.length).astype(np.int32)),
        "answer_ids": StoredArray(rng.integers(3, 300, shape.probes + 1).astype(np.int32)),
    }
    attrs: dict[str, Any] = {
        "id": f"synthetic-{index}",
        "seq_len": shape.length,
        "n_prompt": shape.length,
        "n_probe": shape.probes,
        "seed": index,
        "meta": "{}",
        "answers": "[]",
        "metric": "none",
        "max_new_tokens": 0,
        "compress_at": "prompt",
        "compressible": np.ones(shape.layers, dtype=np.bool_),
        "answer_source": "synthetic",
        "answer_truncated": False,
    }
    write_part(path, StoredSample(attrs, stored))


def write_capture(out: Path, shape: argparse.Namespace) -> None:
    """Write all prompts and put them together."""
    parts = [out.with_name(out.name + ".parts") / f"{index:05d}.h5" for index in range(shape.prompts)]
    for index, part in enumerate(parts):
        write_sample(part, index, shape)
        print(f"{index + 1}/{shape.prompts}", flush=True)
    name = f"synthetic-{shape.layers}x{shape.heads}x{shape.kv_heads}"
    model = {
        "model_id": name,
        "architecture": "synthetic",
        "fingerprint": name,
        "n_layers": shape.layers,
        "n_heads": shape.heads,
        "n_kv_heads": shape.kv_heads,
        "head_dim": 128,
        "max_positions": 32768,
        "windows": [None] * shape.layers,
    }
    config = {"task": "synthetic", "model": name, "n": shape.prompts, "length": shape.length, "seed": shape.seed}
    texts = {
        "model": to_json(model),
        "config": to_json(config),
        "versions": json.dumps({}),
        "tokenizer_hash": "none",
        "created": "none",
    }
    assemble(parts, out, texts)
    remove_parts(parts[0].parent)


def parse_shape(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Write a synthetic capture.")
    parser.add_argument("out", type=Path)
    for name, default in (
        ("layers", 32),
        ("heads", 32),
        ("kv-heads", 8),
        ("length", 4096),
        ("prompts", 8),
        ("probes", 8),
        ("seed", 0),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    shape = parse_shape()
    write_capture(shape.out, shape)
