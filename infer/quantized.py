"""Quantized storage of one layer: what was kept of the prompt in 8 or 4 bits, the newest tokens as the model made them.

Every (sequence, KV head) row has its own number of entries, as in `kvtool.infer.ragged`. A row is, in the order of its entries:
groups of the prompt's entries, groups of tokens that came later, and a dense tail. New tokens enter the tail; whenever it
holds a full group beyond the residual, its oldest entries are quantized and move over, in all rows at once. Nothing that is quantized
is ever touched again: an attention step reads the codes chunk by chunk and copies none of them.

Shapes: B sequences, H KV heads, S = B * H rows, R rows of a block, M groups, g entries of a group, D head dimension, N new tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtool.infer.quantized_codes import Codes, quantize_keys, quantize_values
from kvtool.infer.ragged import ROOM, RaggedStore, Row, StoreBytes, buckets_of

if TYPE_CHECKING:
    from torch import Tensor

    from kvtool.policies.quant import Quant


@dataclass(slots=True)
class Block:
    """Quantized entries of some rows, in groups of one size.

    Attributes
    ----------
    members : list of int
        Which rows, R of them.
    rows : Tensor ``[R]`` or None
        The same as int64; None where these are all rows in their order.
    counts : list of int
        Entries per row; the last groups of shorter rows are filled up with zeros.
    lengths : Tensor ``[R]`` or None
        The same as int64; None where all groups are full.
    n_groups, group : int
        M in use, g.
    keys, values : Codes
        May have room for more groups.
    bias : Tensor ``[R, M * g]`` or None
        Added to the logits, float32.
    positions : Tensor ``[R, M * g]`` or None
        True positions, int32.
    """

    members: list[int]
    rows: Tensor | None
    counts: list[int]
    lengths: Tensor | None
    n_groups: int
    group: int
    keys: Codes
    values: Codes
    bias: Tensor | None = None
    positions: Tensor | None = None

    @property
    def n_rows(self) -> int:
        return len(self.members)

    @property
    def n_columns(self) -> int:
        """Entries of the longest row, rounded up to whole groups."""
        return self.n_groups * self.group

    def tensors(self) -> list[Tensor]:
        """Return all tensors of the block."""
        more = (self.rows, self.lengths, self.bias, self.positions)
        return [*self.keys.tensors, *self.values.tensors, *(t for t in more if t is not None)]

    def used_bytes(self) -> int:
        """Return the bytes of codes, scales and centres that stand for entries."""
        n_entries = sum(self.counts)
        n_groups = sum(-(-n // self.group) for n in self.counts)
        per_entry = sum(_bytes_of(t[0, 0, 0]) for t in (self.keys.packed, *self.values.tensors))
        per_group = sum(_bytes_of(t[0, 0]) for t in (self.keys.scale, self.keys.centre))
        return n_entries * per_entry + n_groups * per_group


def _bytes_of(t: Tensor) -> int:
    return t.numel() * t.element_size()


class QuantizedStore:
    """Keys and values of one layer without a sliding window.

    Parameters
    ----------
    dense : RaggedStore
        What was kept of the prompt; read, not held.
    quant : Quant
    room : int
        Free entries per row of the tail; it grows up to a group.

    Raises
    ------
    DataError
        Keys or values that are not finite.
    """

    #: sliding-window layers are left alone
    window = None

    def __init__(self, dense: RaggedStore, quant: Quant, room: int = ROOM) -> None:
        self.quant = quant
        self.n_seqs, self.n_kv_heads = dense.n_seqs, dense.n_kv_heads
        self.dtype, self.device = dense.keys.dtype, dense.device
        self.key_width, self.value_width = (int(t.shape[1]) for t in (dense.keys, dense.values))
        rows = list(dense.dense_rows())
        #: entries of the prompt that are quantized, per row
        self.coded = [quant.coded(int(row.keys.shape[0])) for row in rows]
        self.blocks = self._blocks(rows)
        #: groups of tokens that came later, all rows alike
        self.later: Block | None = None
        self.has_bias = dense.bias is not None
        tail = [_part(row, n, int(row.keys.shape[0])) for row, n in zip(rows, self.coded, strict=True)]
        longest = max(int(row.keys.shape[0]) for row in tail)
        # One capacity for all rows: the tail is a single strided view, with at most `LEAST` entries of padding and the residual's.
        self.tail = RaggedStore(tail, self.n_seqs, room=0, capacities=[longest] * len(rows))
        self._room = room
        self._reserve(min(room, self._until_full()))

    def _blocks(self, rows: Sequence[Row]) -> list[Block]:
        """Quantize the first entries of every row: whole groups, and what is left of them in smaller ones."""
        blocks: list[Block] = []
        coded = [n for n in self.coded if n]
        size = self.quant.quant_group
        for bucket in buckets_of(self.coded) if coded else []:
            longest = max(self.coded[r] for r in bucket)
            whole = longest // size * size
            if whole:
                blocks.append(self._block(rows, [r for r in bucket if self.coded[r]], 0, whole, size))
            if longest > whole:
                blocks.append(self._block(rows, [r for r in bucket if self.coded[r] > whole], whole, longest, longest - whole))
        return blocks

    def _block(self, rows: Sequence[Row], members: list[int], first: int, last: int, group: int) -> Block:
        """Quantize the entries ``first:last`` of some rows in groups of `group`."""
        import torch

        counts = [min(self.coded[r], last) - first for r in members]
        width = last - first
        parts = [_part(rows[r], first, first + n) for r, n in zip(members, counts, strict=True)]
        full = min(counts) == width
        lengths = None if full else torch.tensor(counts, device=self.device)
        keys, values = (_stack([getattr(p, name) for p in parts], width) for name in ("keys", "values"))
        keys, values = (t.view(len(parts), -1, group, t.shape[-1]) for t in (keys, values))
        bias = positions = None
        if any(p.bias is not None for p in parts):
            bias = _stack([torch.zeros(len(p.keys), device=self.device) if p.bias is None else p.bias for p in parts], width)
        if parts[0].positions is not None:
            positions = _stack([p.positions for p in parts if p.positions is not None], width).to(torch.int32)
        natural = members == list(range(len(rows)))
        return Block(
            members,
            None if natural else torch.tensor(members, device=self.device),
            counts,
            lengths,
            width // group,
            group,
            quantize_keys(keys, self.quant.bits, lengths),
            quantize_values(values, self.quant.bits, self.quant.channel_groups(self.value_width)),
            bias,
            positions,
        )

    def append(self, keys: Tensor, values: Tensor, positions: Tensor | None = None) -> None:
        """Add N entries to every row's tail, O(N); nothing quantized moves.

        Parameters
        ----------
        keys, values : Tensor ``[B, H, N, D]``
        positions : Tensor ``[B, N]``, optional
            True positions, where they are tracked.
        """
        n_new = int(keys.shape[2])
        if n_new > self._free():
            self._reserve(max(n_new, min(max(ROOM, 2 * self.tail.room), self._until_full())))
        self.tail.append(keys, values, positions)

    def settle(self) -> None:
        """Quantize the groups that have become full beyond the residual; a group of tokens after a group of tokens, in all rows."""
        import torch

        size = self.quant.quant_group
        n_groups = (self._shortest() - self.quant.quant_residual) // size
        if n_groups <= 0:
            return
        tail, n_moved = self.tail, n_groups * size
        bucket = tail.buckets[0]
        keys, values = (
            tail.view(bucket, t)[:, :n_moved].reshape(bucket.n_rows, n_groups, size, -1) for t in (tail.keys, tail.values)
        )
        found = (
            quantize_keys(keys, self.quant.bits),
            quantize_values(values, self.quant.bits, self.quant.channel_groups(self.value_width)),
        )
        bias, positions = (None if t is None else tail.view(bucket, t)[:, :n_moved] for t in (tail.bias, tail.positions))
        self._add(found[0], found[1], n_groups, bias, positions)
        lengths = [n - n_moved for n in tail.lengths]
        index = torch.arange(n_moved, n_moved + max(lengths), device=self.device).repeat(len(lengths), 1)
        last = torch.tensor(tail.lengths, device=self.device)[:, None] - 1
        tail.keep(torch.minimum(index, last), lengths)
        if self._free() > max(self._room, self._until_full()):
            # A wide forward (a question, say) had made the tail long.
            self._reserve(min(self._room, self._until_full()))

    def _add(self, keys: Codes, values: Codes, n_groups: int, bias: Tensor | None, positions: Tensor | None) -> None:
        """Put new groups behind those of earlier tokens; their room grows by half, so the cost per token stays constant."""
        import torch

        later, size = self.later, self.quant.quant_group
        n_rows = self.n_seqs * self.n_kv_heads
        if later is None:
            members = list(range(n_rows))
            copies = [None if t is None else t.clone() for t in (bias, positions)]
            counts = [n_groups * size] * n_rows
            self.later = Block(members, None, counts, None, n_groups, size, keys, values, copies[0], copies[1])
            return
        needed = later.n_groups + n_groups
        if needed > later.keys.packed.shape[1]:
            roomy = needed + later.n_groups // 2
            later.keys, later.values = later.keys.grown_to(roomy), later.values.grown_to(roomy)
        later.keys.put(later.n_groups, keys)
        later.values.put(later.n_groups, values)
        # Compensated prompts only (the merged entries of a residual), and tracked positions: rare enough to be copied.
        later.bias = None if later.bias is None or bias is None else torch.cat([later.bias, bias], dim=1)
        if later.positions is not None and positions is not None:
            later.positions = torch.cat([later.positions, positions], dim=1)
        later.n_groups, later.counts = needed, [needed * size] * n_rows

    def _shortest(self) -> int:
        return self.tail.buckets[0].shortest + self.tail.grown

    def _until_full(self) -> int:
        """Tokens that may come before a group is full."""
        return max(1, self.quant.quant_residual + self.quant.quant_group - self._shortest())

    def _free(self) -> int:
        bucket = self.tail.buckets[0]
        return bucket.capacity - bucket.longest - self.tail.grown

    def _reserve(self, room: int) -> None:
        self.tail.capacities = [max(self.tail.lengths)] * len(self.tail.lengths)
        self.tail.reserve(room)

    @property
    def all_blocks(self) -> list[Block]:
        """All quantized blocks."""
        return self.blocks if self.later is None else [*self.blocks, self.later]

    @property
    def room(self) -> int:
        """Free entries per row that were asked for."""
        return self._room

    @property
    def positions(self) -> Tensor | None:
        """Not None if true positions are tracked: those of the tail."""
        return self.tail.positions

    @property
    def n_later(self) -> int:
        """Later tokens that are quantized, per row."""
        return 0 if self.later is None else self.later.n_columns

    @property
    def lengths(self) -> list[int]:
        """Entries held per row, ``[S]``."""
        return [n + self.n_later + m for n, m in zip(self.coded, self.tail.lengths, strict=True)]

    @property
    def n_coded(self) -> int:
        """Entries that are quantized, all rows."""
        return sum(self.coded) + self.n_later * len(self.coded)

    def count_bytes(self) -> StoreBytes:
        """Count bytes from the tensors' storage; `used` are codes, scales and centres of entries, and the tail's entries."""
        blocks = self.all_blocks
        allocated = sum(t.untyped_storage().nbytes() for block in blocks for t in block.tensors())
        return StoreBytes(allocated, sum(block.used_bytes() for block in blocks)) + self.tail.count_bytes()

    def dense_rows(self) -> Iterable[Row]:
        """Yield the entries of each row, dequantized, float32 at least; for tests and inspection."""
        import torch

        wide = torch.promote_types(self.dtype, torch.float32)
        parts: list[list[Row]] = [[] for _ in self.coded]
        for block in self.all_blocks:
            keys, values = (
                codes.part(slice(0, block.n_rows), slice(0, block.n_groups)).dense(wide) for codes in (block.keys, block.values)
            )
            for i, (r, n) in enumerate(zip(block.members, block.counts, strict=True)):
                bias, positions = (None if t is None else t[i, :n] for t in (block.bias, block.positions))
                parts[r].append(Row(keys[i, :n], values[i, :n], positions, None, bias))
        for row, end in zip(parts, self.tail.dense_rows(), strict=True):
            pieces = [*row, end]
            where = [p.positions for p in pieces if p.positions is not None]
            bias = None
            if self.has_bias:
                zeros = [torch.zeros(len(p.keys), device=self.device) for p in pieces]
                bias = torch.cat([zero if p.bias is None else p.bias for p, zero in zip(pieces, zeros, strict=True)])
            keys, values = (torch.cat([getattr(p, name).to(wide) for p in pieces]) for name in ("keys", "values"))
            yield Row(keys, values, torch.cat(where) if where else None, None, bias)


def quantized(store: RaggedStore, quant: Quant, room: int = ROOM) -> RaggedStore | QuantizedStore:
    """Return the store as the policy wants it; a layer with a sliding window is left alone."""
    return QuantizedStore(store, quant, room) if quant.active and store.window is None else store


def _part(row: Row, first: int, last: int) -> Row:
    positions, bias = (None if t is None else t[first:last] for t in (row.positions, row.bias))
    return Row(row.keys[first:last], row.values[first:last], positions, None, bias)


def _stack(rows: Sequence[Tensor], width: int) -> Tensor:
    """Return rows of different lengths as ``[R, width, ...]``, filled up with zeros."""
    found = rows[0].new_zeros(len(rows), width, *rows[0].shape[1:])
    for i, row in enumerate(rows):
        found[i, : len(row)] = row
    return found
