"""A prompt as it runs: its keys and values, and the statistics that policies ask for, computed layer by layer.

Shapes: B sequences, Q query heads, H KV heads, T prompt positions (padding counted), D head dimension.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvtool.errors import ConfigError
from kvtool.infer.ragged import ROOM, RaggedStore
from kvtool.models import output_weight
from kvtool.policies.base import Policy
from kvtool.policies.select import kept_positions
from kvtool.policies.statistics import AttentionInputs, Rope, compute_statistics

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kvtool.attention import AttentionCall

#: ``[layer][row][KV head]`` ascending positions within the row, padding not counted.
Kept = list[list[list["Tensor"]]]


@dataclass(frozen=True, slots=True)
class LiveView:
    """Layer view of one row; implements `kvtool.policies.base.LayerView`.

    Attributes
    ----------
    statistics : dict of str to Tensor
        What was computed while the layer ran; the queries are gone.
    """

    layer: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    seq_len: int
    seed: int
    statistics: dict[str, Tensor]

    def statistic(self, name: str) -> Tensor:
        """Return a statistic that the policy declared in ``needs``."""
        if name not in self.statistics:
            raise ConfigError(f"the policy asked for the statistic {name!r} without declaring it in needs()")
        return self.statistics[name]


@dataclass(slots=True)
class PromptLayer:
    """One layer of a prompt.

    Attributes
    ----------
    layer, n_heads : int
    keys, values : Tensor ``[B, H, T, D]``
    window : int or None
    lengths : tuple of int
        Real tokens per row.
    statistics : list of dict
        Per row, name -> float32 ``[Q or H, length]``.
    seconds : dict of str to float
        Time that each statistic took, all rows.
    """

    layer: int
    n_heads: int
    keys: Tensor
    values: Tensor
    window: int | None
    lengths: tuple[int, ...]
    statistics: list[dict[str, Tensor]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def pads(self) -> tuple[int, ...]:
        """Padding tokens at the start of each row."""
        return tuple(int(self.keys.shape[2]) - n for n in self.lengths)

    def compressible(self, row: int) -> bool:
        """True if a policy applies: a sliding window shorter than the prompt is left alone."""
        return self.window is None or self.window >= self.lengths[row]

    def view(self, row: int, n_layers: int, seed: int) -> LiveView:
        """Return the layer view of one row."""
        n_kv_heads = int(self.keys.shape[1])
        return LiveView(self.layer, n_layers, self.n_heads, n_kv_heads, self.lengths[row], seed, self.statistics[row])


def observe(call: AttentionCall, names: Iterable[str], rope: Rope | None = None) -> PromptLayer:
    """Take what compression needs from the prompt's attention call of one layer.

    Parameters
    ----------
    call : AttentionCall
        Keys and values of the whole prompt.
    names : iterable of str
        Statistics to compute.
    rope : Rope or None
        How the model rotates, for statistics that look ahead.

    Raises
    ------
    ConfigError
        Padding that is not on the left.
    """
    lengths = real_lengths(call.padding, call.keys)
    layer = PromptLayer(call.layer, int(call.queries.shape[1]), call.keys, call.values, call.window, lengths)
    for row, pad in enumerate(layer.pads):
        found: dict[str, Tensor] = {}
        if layer.compressible(row):
            # Contiguous keys and values, as in capture: the same layout gives the same bits.
            keys, values = (t[row, :, pad:].detach().contiguous() for t in (call.keys, call.values))
            queries, weight = call.queries[row, :, pad:].detach(), output_weight(call.module)
            inputs = AttentionInputs(queries, keys, values, call.scaling, call.window, rope, weight)
            for name in names:
                started = clock(call.keys.device)
                found[name] = compute_statistics(inputs, [name])[name]
                layer.seconds[name] = layer.seconds.get(name, 0.0) + clock(call.keys.device) - started
        layer.statistics.append(found)
    layer.keys, layer.values = _own(call.keys), _own(call.values)
    return layer


def real_lengths(padding: Tensor | None, keys: Tensor) -> tuple[int, ...]:
    """Return the real tokens of each row of a prompt.

    Raises
    ------
    ConfigError
        Padding on the right or inside, or a row of padding only.
    """
    n_rows, n_keys = int(keys.shape[0]), int(keys.shape[2])
    if padding is None:
        return (n_keys,) * n_rows
    real = padding.bool()
    lengths = tuple(int(n) for n in real.sum(dim=1).tolist())
    for row, n in enumerate(lengths):
        if n == 0 or not bool(real[row, n_keys - n :].all()):
            raise ConfigError(f"row {row} of the batch is not padded on the left only; set tokenizer.padding_side = 'left'")
    return lengths


def choose(policy: Policy, layers: Sequence[PromptLayer], n_layers: int, seeds: Sequence[int]) -> Kept:
    """Return the kept set of every (layer, row, KV head).

    Parameters
    ----------
    policy : Policy
    layers : sequence of PromptLayer
        All layers, or any subset for a layer-local allocator.
    n_layers : int
        Layers of the model.
    seeds : sequence of int
        One per row.

    Raises
    ------
    ConfigError
        The budget is smaller than the protected entries.
    """
    n_rows = len(layers[0].lengths)
    kept: Kept = [[[] for _ in range(n_rows)] for _ in layers]
    for row in range(n_rows):
        chosen = [i for i, layer in enumerate(layers) if layer.compressible(row)]
        views = [layers[i].view(row, n_layers, seeds[row]) for i in chosen]
        for i, per_head in zip(chosen, kept_positions(policy, views) if views else [], strict=True):
            kept[i][row] = per_head
        for i in set(range(len(layers))) - set(chosen):
            kept[i][row] = _visible(layers[i], row)
    return kept


def build_store(layer: PromptLayer, kept: Sequence[Sequence[Tensor]], room: int = ROOM) -> RaggedStore:
    """Copy the kept entries of one layer into a ragged store."""
    return RaggedStore.from_prompt(layer.keys, layer.values, kept, layer.pads, room=room, window=layer.window)


def _visible(layer: PromptLayer, row: int) -> list[Tensor]:
    """Positions of a sliding-window layer that the next token can still see."""
    import torch

    assert layer.window is not None
    n = layer.lengths[row]
    return [torch.arange(max(0, n - layer.window + 1), n, device=layer.keys.device)] * int(layer.keys.shape[1])


def _own(tensor: Tensor) -> Tensor:
    """Detach, and copy a view that would keep a larger tensor alive (GPT-NeoX: q, k and v are one)."""
    tensor = tensor.detach()
    own_bytes = tensor.numel() * tensor.element_size()
    return tensor if tensor.untyped_storage().nbytes() <= own_bytes else tensor.clone()


def clock(device: torch.device) -> float:
    """Seconds now, after all queued work of the device."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    return time.perf_counter()
