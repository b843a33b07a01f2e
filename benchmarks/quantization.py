"""What quantized entries cost: error of the attention output under the choices there are, bytes, and the time of a decode step.

    python benchmarks/quantization.py

Errors: keys, values and queries of the embedded model on needle prompts, every layer and KV head, outputs of the last 8 queries
over the whole prompt; norm of the difference over norm of the output, all together. The alternatives that kvtool does not offer
(one scale around zero, keys per entry, values per channel) are computed here, in float64, beside the store's own codes. Bytes: of
8192 entries, against bfloat16. Times: process time of one attention call of one layer, 8 KV heads of 4 queries, one thread;
lower quartile of 40.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvtool.attention import AttentionCall, attention_handler, dense_attention
from kvtool.data.tasks import load_task
from kvtool.infer.kernels import ragged_attention
from kvtool.infer.quantized import QuantizedStore
from kvtool.infer.quantized_codes import quantize_keys, quantize_values
from kvtool.infer.ragged import RaggedStore, Row
from kvtool.models import LoadedModel, load_model
from kvtool.policies.quant import Quant

RESULT = Path(__file__).parent / "results" / "quantization"
PROMPTS, LENGTH, QUERIES = 8, 512, 8
GROUPS, BITS, RESIDUALS = (32, 64, 128), ("int8", "int4"), (0, 32, 128)

#: float64 ``[H, T, D]`` -> what stands for it
Through = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of one prompt, float64: queries ``[Q, n, D]``, keys and values ``[H, T, D]``."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    scaling: float

    def attend(self, keys: Tensor, values: Tensor) -> Tensor:
        """Return the outputs of the last queries over all entries; what the queries may not see yet is 8 entries at most."""
        folded = self.queries.reshape(keys.shape[0], -1, keys.shape[2])
        return torch.softmax(folded @ keys.transpose(1, 2) * self.scaling, -1) @ values


def layers_of(loaded: LoadedModel) -> list[Layer]:
    """Run the prompts and return what every layer saw."""
    found: list[Layer] = []

    def handler(call: AttentionCall) -> Tensor:
        queries, keys, values = (t[0].double() for t in (call.queries[:, :, -QUERIES:], call.keys, call.values))
        found.append(Layer(queries, keys, values, call.scaling))
        return dense_attention(call)

    for sample in load_task("niah", loaded.tokenizer, PROMPTS, LENGTH, 0):
        with attention_handler(loaded.model, handler):
            loaded.model(torch.tensor([sample.prompt_ids]), use_cache=False)
    return found


def error(layers: list[Layer], keys: Through, values: Through, residual: int = 0) -> float:
    """Return the relative error of the outputs where all but the last `residual` entries go through codes."""
    wrong = whole = 0.0
    for layer in layers:
        cut = layer.keys.shape[1] - residual
        coded = (torch.cat([f(t[:, :cut]), t[:, cut:]], 1) for f, t in ((keys, layer.keys), (values, layer.values)))
        exact = layer.attend(layer.keys, layer.values)
        wrong += float((layer.attend(*coded) - exact).square().sum())
        whole += float(exact.square().sum())
    return (wrong / whole) ** 0.5


def keys_of(quant: Quant) -> Through:
    """kvtool's keys: per channel, groups of entries, the last one as long as it comes."""

    def through(x: Tensor) -> Tensor:
        whole = x.shape[1] // quant.quant_group * quant.quant_group
        parts = [x[:, :whole].reshape(x.shape[0], -1, quant.quant_group, x.shape[2]), x[:, None, whole:]]
        return torch.cat([quantize_keys(p, quant.bits).dense(x.dtype) for p in parts if p.numel()], 1)

    return through


def values_of(quant: Quant) -> Through:
    """kvtool's values: per entry, groups of channels."""
    return lambda x: quantize_values(x[:, None], quant.bits, quant.channel_groups(x.shape[2])).dense(x.dtype)


def around_zero(bits: int, dim: int) -> Callable[[Tensor], Tensor]:
    """One float16 scale and no centre: codes -2^(b-1) ... 2^(b-1) - 1."""

    def through(x: Tensor) -> Tensor:
        top = 2 ** (bits - 1) - 1
        scale = (x.abs().amax(dim, keepdim=True) / top).half().to(x.dtype)
        return (x / scale.where(scale > 0, torch.ones_like(scale))).round().clamp(-top - 1, top) * scale

    return through


def in_groups(coded: Callable[[Tensor], Tensor], group: int) -> Through:
    """Apply something per group of consecutive entries, ``[H, M, g, D]``, the last one as long as it comes."""
    return lambda x: torch.cat([coded(part[:, None])[:, 0] for part in x.split(group, dim=1)], 1)


def error_rows(layers: list[Layer]) -> list[dict[str, Any]]:
    """Return the errors of kvtool's choice and of the others, per bits and group."""
    rows = []
    for bits in BITS:
        for group in GROUPS:
            quant = Quant(bits, group)  # type: ignore[arg-type]
            keys, values, width = keys_of(quant), values_of(quant), layers[0].keys.shape[2]
            zero_keys, zero_values = in_groups(around_zero(quant.bits, 2), group), around_zero(quant.bits, 2)
            row: dict[str, Any] = {"quant": bits, "group": group}
            row |= {f"residual {n}": error(layers, keys, values, n) for n in RESIDUALS}
            row |= {"around zero": error(layers, zero_keys, zero_values)}
            row |= {"keys per entry": error(layers, values, values), "values per channel": error(layers, keys, keys)}
            row |= {f"bytes D={d}": quant.row_bytes(8192, d, d, 2) / (8192 * 4 * d) for d in (width, 64, 128)}
            rows.append(row)
    return rows


def seconds(run: Callable[[], object], repeats: int = 40) -> float:
    """Return the process time of a call, lower quartile."""
    times = []
    for _ in range(repeats + 3):
        started = time.process_time()
        run()
        times.append(time.process_time() - started)
    return sorted(times[3:])[repeats // 4]


def time_rows() -> list[dict[str, Any]]:
    """Return the times and bytes of stores of one layer."""
    rows = []
    for n, width in ((128, 64), (1024, 64), (8192, 64), (8192, 128)):
        entries = [Row(torch.randn(n, width), torch.randn(n, width)) for _ in range(8)]
        queries = torch.randn(1, 32, 1, width)
        row: dict[str, Any] = {"entries": n, "D": width}
        for name in ("float32", *BITS):
            store = RaggedStore(entries, 1)
            held = store if name == "float32" else QuantizedStore(store, Quant(name))  # type: ignore[arg-type]
            held.append(torch.randn(1, 8, 1, width), torch.randn(1, 8, 1, width))
            row[f"{name} ms"] = 1000 * seconds(lambda held=held, queries=queries: ragged_attention(queries, held, 0.125))
            row[f"{name} MB"] = held.count_bytes().allocated / 1e6
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return rows as Markdown."""
    cells = [[f"{v:.4f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    return [" | ".join(line).join(("| ", " |")) for line in [list(rows[0]), ["---"] * len(rows[0]), *cells]]


def main() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    loaded = load_model("tiny", device="cpu")
    value = {
        "command": "python benchmarks/quantization.py",
        "model": loaded.info.fingerprint,
        "prompts": f"{PROMPTS} of niah, {LENGTH} tokens",
        "versions": {"python": platform.python_version(), "torch": version("torch")},
        "errors": error_rows(layers_of(loaded)),
        "times": time_rows(),
    }
    RESULT.with_suffix(".json").write_text(json.dumps(value, indent=1) + "\n")
    title = f"`{value['command']}`: embedded model, {value['prompts']}; torch {value['versions']['torch']}, one CPU thread"
    lines = [title, "", "Relative error of the attention output, and bytes against bfloat16:", "", *table(value["errors"])]
    lines += ["", "One attention call of one layer, 8 KV heads:", "", *table(value["times"])]
    RESULT.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
