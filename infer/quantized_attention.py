"""Attention of new tokens over a quantized store: codes become numbers chunk by chunk, parts are merged by log-sum-exp.

The numbers of one chunk are the only dense copy there ever is; a chunk has at most `WORKSPACE` of them per key or value,
whatever the length of the cache. All sums are float32 (float64 for float64 models), whatever the model's own precision.

Shapes: B sequences, Q query heads, H KV heads, G = Q / H, N new tokens, n of them at a time, S = B * H rows, R rows of a block,
D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvtool.infer.kernels import Partial, bucket_mask

if TYPE_CHECKING:
    from torch import Tensor

    from kvtool.infer.quantized import Block, QuantizedStore

#: Dequantized numbers of one chunk. CPU: 2 MiB of float32 stay in the cache of a core (measured: two to four times as fast as all at
#: once). GPU: enough work per launch.
WORKSPACE = {"cpu": 1 << 19, "cuda": 1 << 24}

#: New tokens are taken so many at a time that their logits are at most so many times as large as the chunk.
LOGITS_PER_NUMBER = 4


def quantized_attention(queries: Tensor, store: QuantizedStore, scaling: float) -> Tensor:
    """Attention of the newest N entries of every row over all entries of the row.

    Parameters
    ----------
    queries : Tensor ``[B, Q, N, D]``
    store : QuantizedStore
        Holds the keys and values of these N tokens already, as the last ones of its tail.
    scaling : float
        Factor of the logits.

    Returns
    -------
    Tensor ``[B, Q, N, D]``
    """
    import torch

    n_seqs, n_heads, n_new, width = queries.shape
    group = n_heads // store.n_kv_heads
    wide = torch.float64 if queries.dtype == torch.float64 else torch.float32
    rows = queries.reshape(n_seqs * store.n_kv_heads, group, n_new, width)
    step = max(1, LOGITS_PER_NUMBER * width // group)
    outputs = []
    for start in range(0, n_new, step):
        part = rows[:, :, start : start + step].to(wide) * scaling
        n_now = part.shape[2]
        found = _tail(part, store, start, n_new)
        flat = part.reshape(part.shape[0], group * n_now, width)
        for block in store.all_blocks:
            mine = flat if block.rows is None else flat.index_select(0, block.rows)
            found.add(_block(mine, block), block.rows)
        outputs.append(found.output().view(*part.shape[:3], -1))
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    return out.reshape(n_seqs, n_heads, n_new, -1).to(queries.dtype)


def _tail(queries: Tensor, store: QuantizedStore, start: int, n_new: int) -> Partial:
    """Attend from the new tokens ``start:`` ``[S, G, n, D]`` to the dense tail, in whose last entries they stand themselves."""
    tail = store.tail
    bucket = tail.buckets[0]
    n_rows, group, n_now, width = queries.shape
    mask = bucket_mask(tail, bucket, n_new)
    keys, values = (tail.view(bucket, t) for t in (tail.keys, tail.values))
    step = max(1, _workspace(queries) // (group * n_now * keys.shape[1]))
    parts = []
    for first in range(0, n_rows, step):
        rows = slice(first, first + step)
        logits = queries[rows].reshape(-1, group * n_now, width) @ keys[rows].to(queries.dtype).transpose(1, 2)
        if mask is not None:
            here = (mask if mask.shape[0] == 1 else mask[rows])[:, None, start : start + n_now]
            shaped = logits.view(-1, group, n_now, logits.shape[-1])
            logits = (shaped + here if here.is_floating_point() else shaped.masked_fill(~here, float("-inf"))).view_as(logits)
        parts.append(Partial.of(logits, values[rows].to(queries.dtype)))
    return Partial.join(parts)


def _block(queries: Tensor, block: Block) -> Partial:
    """Attend from ``[R, G * n, D]`` to all entries of a block."""
    parts: list[Partial] = []
    for rows, groups in _chunks(block, _workspace(queries)):
        logits = queries[rows] @ block.keys.part(rows, groups).dense(queries.dtype).transpose(1, 2)
        columns = slice(groups.start * block.group, groups.stop * block.group)
        if block.bias is not None:
            logits += block.bias[rows, None, columns].to(logits.dtype)
        if block.lengths is not None:
            logits.masked_fill_(_beyond(block.lengths[rows], columns)[:, None], float("-inf"))
        found = Partial.of(logits, block.values.part(rows, groups).dense(queries.dtype))
        if groups.start:
            parts[-1].add(found)
        else:
            parts.append(found)
    return Partial.join(parts)


def _beyond(lengths: Tensor, columns: slice) -> Tensor:
    """Return which columns lie beyond the rows' lengths, bool ``[R, columns]``."""
    import torch

    return torch.arange(columns.start, columns.stop, device=lengths.device) >= lengths[:, None]


def _chunks(block: Block, workspace: int) -> Iterator[tuple[slice, slice]]:
    """Yield rows and groups of chunks of at most `workspace` numbers (one group of one row, at least), row slice by row slice."""
    of_group = block.group * max(block.keys.width, block.values.width)
    n_rows = min(block.n_rows, max(1, workspace // of_group))
    n_groups = max(1, workspace // (of_group * n_rows))
    for row in range(0, block.n_rows, n_rows):
        for group in range(0, block.n_groups, n_groups):
            yield slice(row, min(row + n_rows, block.n_rows)), slice(group, min(group + n_groups, block.n_groups))


def _workspace(queries: Tensor) -> int:
    return WORKSPACE["cpu" if queries.device.type == "cpu" else "cuda"]
