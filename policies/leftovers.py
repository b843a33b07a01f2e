"""What a layer holds after compression: kept entries and what stands for the evicted ones. For infer and simulate alike.

Shapes: Q query heads, H KV heads, G = Q / H, W observed queries, T prompt positions, N kept entries, M representatives,
D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtool.policies.compensation import OBSERVED, Compensation
from kvtool.policies.merging import (
    CAM_SPREAD,
    Merged,
    Nearest,
    cam_spread,
    d2o_taken,
    merge_nearest,
    merged_bias,
    nearest_kept,
)
from kvtool.policies.refit import refit_values
from kvtool.policies.representatives import evicted_positions, represent

if TYPE_CHECKING:
    from torch import Tensor

    from kvtool.policies.base import LayerView


@dataclass(frozen=True, slots=True)
class LayerTensors:
    """Tensors of one layer of one prompt.

    Attributes
    ----------
    keys, values : Tensor ``[H, T, D]``
        Post-RoPE.
    queries : Tensor ``[Q, W, D]``
        Post-RoPE, of the last W = min(32, T) positions.
    scaling : float
        Factor of the logits.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    scaling: float

    @classmethod
    def of_prompt(cls, queries: Tensor, keys: Tensor, values: Tensor, scaling: float) -> LayerTensors:
        """Take the whole prompt's queries ``[Q, T, D]``; only a copy of the last ones is held."""
        return cls(keys, values, queries[:, -OBSERVED:].detach().clone(), scaling)


@dataclass(frozen=True, slots=True)
class HeadEntries:
    """Entries of one KV head: M representatives first, then the N kept ones, ascending.

    Attributes
    ----------
    keys, values : Tensor ``[M + N, D]``
    positions : Tensor ``[M + N]``
        int64; a representative has the last position of its block.
    bias : Tensor ``[M + N]`` or None
        float32, added to the logits; None where all are 0.
    n_representatives : int
        M.
    changed : bool
        Keys or values of kept entries are not the prompt's own.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    bias: Tensor | None = None
    n_representatives: int = 0
    changed: bool = False


@dataclass(slots=True)
class Leftovers:
    """What a compensation did, summed over heads and layers; for records.

    Attributes
    ----------
    representatives : int
        Entries that stand for blocks.
    gated_heads : int
        Heads that the gate gave real entries instead.
    equal_weight_blocks : int
        Blocks with equal weights because none of their entries had any observed attention.
    merged : int
        Evicted entries merged into survivors.
    refits_undone : int
        Heads that keep their original values, since the refit would not have been better.
    """

    representatives: int = 0
    gated_heads: int = 0
    equal_weight_blocks: int = 0
    merged: int = 0
    refits_undone: int = 0

    def add(self, other: Leftovers) -> None:
        """Add the figures of another layer."""
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


def compensate_layer(
    compensation: Compensation, view: LayerView, tensors: LayerTensors, kept: Sequence[Tensor]
) -> tuple[list[HeadEntries], Leftovers]:
    """Return what each KV head of one layer holds.

    Parameters
    ----------
    compensation : Compensation
    view : LayerView
        The statistics that the kept sets were chosen by.
    tensors : LayerTensors
    kept : sequence of H Tensor
        Ascending positions, as `kvtool.policies.select.kept_positions` returns them.
    """
    report = Leftovers()
    kind = compensation.compensate
    device = tensors.keys.device
    where = [positions.to(device) for positions in kept]
    if kind in ("mean", "weighted"):
        return _represented(compensation, view, tensors, where, report), report
    if kind == "merge":
        return _merged(compensation, view, tensors, where, report), report
    if kind == "refit":
        return [_refitted(compensation, tensors, h, positions, report) for h, positions in enumerate(where)], report
    if kind == "slots":
        report.gated_heads = sum(compensation.gated(view))
    return [_plain(tensors, h, positions) for h, positions in enumerate(where)], report


def _plain(tensors: LayerTensors, head: int, kept: Tensor) -> HeadEntries:
    return HeadEntries(tensors.keys[head].index_select(0, kept), tensors.values[head].index_select(0, kept), kept)


def _represented(
    compensation: Compensation, view: LayerView, tensors: LayerTensors, kept: Sequence[Tensor], report: Leftovers
) -> list[HeadEntries]:
    import torch

    gated, observed = compensation.gated(view), compensation.weights(view)
    heads = []
    for h, positions in enumerate(kept):
        plain = _plain(tensors, h, positions)
        evicted = evicted_positions(positions, view.seq_len)
        report.gated_heads += gated[h]
        if gated[h] or not len(evicted):
            heads.append(plain)
            continue
        weights = None if observed is None else observed[h].to(positions.device)
        keys, values = tensors.keys[h], tensors.values[h]
        found = represent(keys, values, evicted, compensation.block_size, weights, compensation.chosen_bias)
        bias = None
        if found.bias is not None:
            bias = torch.cat([found.bias.float(), found.bias.new_zeros(len(positions), dtype=torch.float32)])
        report.representatives += len(found.keys)
        report.equal_weight_blocks += found.n_equal
        heads.append(
            HeadEntries(
                torch.cat([found.keys, plain.keys]),
                torch.cat([found.values, plain.values]),
                torch.cat([found.positions, positions]),
                bias,
                len(found.keys),
            )
        )
    return heads


def _merged(
    compensation: Compensation, view: LayerView, tensors: LayerTensors, kept: Sequence[Tensor], report: Leftovers
) -> list[HeadEntries]:
    if compensation.rule == "cam":
        return [_spread(compensation, view, tensors, h, positions, report) for h, positions in enumerate(kept)]
    nearest: list[Nearest] = [nearest_kept(tensors.keys[h], positions) for h, positions in enumerate(kept)]
    taken: Sequence[Tensor | None] = d2o_taken(nearest)[0] if compensation.rule == "d2o" else [None] * len(kept)
    heads = []
    for h, positions in enumerate(kept):
        merged: Merged = merge_nearest(
            tensors.keys[h], tensors.values[h], positions, nearest[h], compensation.rule, taken=taken[h]
        )
        bias = merged_bias(merged, compensation.chosen_bias)
        report.merged += int(merged.counts.sum())
        bias = None if bias is None or not bool(bias.any()) else bias.float()
        heads.append(HeadEntries(merged.keys, merged.values, positions, bias, changed=True))
    return heads


def _spread(
    compensation: Compensation, view: LayerView, tensors: LayerTensors, head: int, kept: Tensor, report: Leftovers
) -> HeadEntries:
    """CaM once for the whole prompt; its draws come from the sample's seed, equal on every device."""
    import numpy as np
    import torch

    observed = compensation.weights(view)
    assert observed is not None
    draws = torch.from_numpy(np.random.default_rng([view.seed, view.layer, head]).random(view.seq_len))
    values, n_merged = cam_spread(tensors.values[head], kept, observed[head].to(kept.device), draws.to(kept.device), CAM_SPREAD)
    report.merged += n_merged
    return HeadEntries(tensors.keys[head].index_select(0, kept), values, kept, changed=True)


def _refitted(compensation: Compensation, tensors: LayerTensors, head: int, kept: Tensor, report: Leftovers) -> HeadEntries:
    group = tensors.queries.shape[0] // tensors.keys.shape[0]
    queries = tensors.queries[head * group : (head + 1) * group]
    found = refit_values(queries, tensors.keys[head], tensors.values[head], kept, tensors.scaling, compensation.ridge)
    # A head that evicts nothing has nothing to refit: that is no fallback.
    report.refits_undone += found.undone and len(kept) < tensors.keys.shape[1]
    keys = tensors.keys[head].index_select(0, kept)
    return HeadEntries(keys, found.values, kept, changed=not found.undone)
