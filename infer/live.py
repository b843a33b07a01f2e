"""A prompt as it runs: its keys and values, and the statistics that policies ask for, computed layer by layer.

Shapes: B sequences, Q query heads, H KV heads, T prompt positions (padding counted), D head dimension.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

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

#: Statistics of single entries: no product of matrices, whose bits depend on how the keys lie.
NORMS = frozenset({"key_norm", "value_norm", "value_norm1"})

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
    queries : Tensor ``[B, Q, w, D]`` or None
        The last queries, for policies that go on evicting by them and compensations that refit to them.
    scaling : float
        Factor of the logits.
    held : list of list of Tensor or None
        ``[B][H]`` positions that keys and values still hold, after `narrow`; None: all.
    """

    layer: int
    n_heads: int
    keys: Tensor
    values: Tensor
    window: int | None
    lengths: tuple[int, ...]
    statistics: list[dict[str, Tensor]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    queries: Tensor | None = None
    scaling: float = 1.0
    held: list[list[Tensor]] | None = None
    _total: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._total = int(self.keys.shape[2])

    @property
    def pads(self) -> tuple[int, ...]:
        """Padding tokens at the start of each row."""
        return tuple(self._total - n for n in self.lengths)

    def where(self, kept: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """Return where the kept positions ``[B][H]`` lie in keys and values."""
        import torch

        if self.held is None:
            return [
                [positions.to(self.keys.device) + pad for positions in row] for pad, row in zip(self.pads, kept, strict=True)
            ]
        pairs = [zip(held, row, strict=True) for held, row in zip(self.held, kept, strict=True)]
        return [[torch.searchsorted(mine, positions.to(mine.device)) for mine, positions in heads] for heads in pairs]

    def narrow(self, kept: list[list[Tensor]]) -> None:
        """Let go of all entries but the positions `kept` ``[B][H]``, a part of what is held."""
        import torch

        where, width = self.where(kept), max(len(positions) for row in kept for positions in row)
        # Rows are filled up with their last entry; nothing ever asks for it.
        index = torch.stack([torch.stack([torch.cat([at, at[-1:].expand(width - len(at))]) for at in row]) for row in where])
        self.keys, self.values = (
            tensor.gather(2, index[..., None].expand(-1, -1, -1, tensor.shape[-1])) for tensor in (self.keys, self.values)
        )
        self.held = [[positions.to(self.keys.device) for positions in row] for row in kept]

    def compressible(self, row: int) -> bool:
        """True if a policy applies: a sliding window shorter than the prompt is left alone."""
        return self.window is None or self.window >= self.lengths[row]

    def view(self, row: int, n_layers: int, seed: int) -> LiveView:
        """Return the layer view of one row."""
        n_kv_heads = int(self.keys.shape[1])
        return LiveView(self.layer, n_layers, self.n_heads, n_kv_heads, self.lengths[row], seed, self.statistics[row])


def observe(call: AttentionCall, names: Iterable[str], rope: Rope | None = None, n_recent: int = 0) -> PromptLayer:
    """Take what compression needs from the prompt's attention call of one layer.

    Parameters
    ----------
    call : AttentionCall
        Keys and values of the whole prompt.
    names : iterable of str
        Statistics to compute.
    rope : Rope or None
        How the model rotates, for statistics that look ahead.
    n_recent : int
        Last queries to hold.

    Raises
    ------
    ConfigError
        Padding that is not on the left.
    """
    lengths, names = real_lengths(call.padding, call.keys), list(names)
    layer = PromptLayer(call.layer, int(call.queries.shape[1]), call.keys, call.values, call.window, lengths)
    for row, pad in enumerate(layer.pads):
        found: dict[str, Tensor] = {}
        if names and layer.compressible(row):
            # Contiguous keys, as in capture: the same layout gives the same bits. The few statistics of values see to that themselves.
            queries, keys, values = (t[row, :, pad:].detach() for t in (call.queries, call.keys, call.values))
            keys = keys if NORMS.issuperset(names) else keys.contiguous()
            weight = output_weight(call.module)
            inputs = AttentionInputs(queries, keys, values, call.scaling, call.window, rope, weight)
            for name in names:
                started = clock(call.keys.device)
                found[name] = compute_statistics(inputs, [name])[name]
                layer.seconds[name] = layer.seconds.get(name, 0.0) + clock(call.keys.device) - started
        layer.statistics.append(found)
    layer.keys, layer.values, layer.scaling = _own(call.keys), _own(call.values), call.scaling
    layer.queries = call.queries[:, :, -n_recent:].detach().clone() if n_recent else None
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


def build_store(layer: PromptLayer, kept: Sequence[Sequence[Tensor]], room: int = ROOM, **options: Any) -> RaggedStore:
    """Copy the kept entries of one layer into a ragged store; for the options see `RaggedStore.from_prompt`."""
    where = layer.where(kept)
    return RaggedStore.from_prompt(layer.keys, layer.values, kept, where, room=room, window=layer.window, **options)


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
