"""Ragged key/value storage of one layer: every (sequence, KV head) has its own number of entries.

Shapes: B sequences, H KV heads, S = B * H rows (row = sequence * H + head), D head dimension, N new tokens,
C = sum of all capacities. Keys and values lie in one flat ``[C, D]`` tensor each, at fixed offsets. Rows of like length
form a bucket and share one capacity, so that a bucket is a strided view and an attention step copies nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: Rows join a bucket as long as they are shorter than its longest row by at most this share of the mean length:
#: padding inside buckets stays below 1/8 of the entries.
BUCKET_WASTE = 0.125

#: Free entries per row of a new store; doubled whenever they are used up.
ROOM = 16


@dataclass(frozen=True, slots=True)
class Row:
    """Entries of one (sequence, KV head): keys ``[n, D]``, values ``[n, D]`` and, where needed, true positions ``[n]``."""

    keys: Tensor
    values: Tensor
    positions: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Bucket:
    """Rows of like length that lie at one stride.

    Attributes
    ----------
    rows : Tensor ``[R]`` or None
        Which rows, int64; None where the bucket holds all rows in their order.
    lengths : Tensor ``[R]``
        Entries when the store was laid out, int64.
    longest, shortest : int
        Extremes of `lengths`.
    start : int
        First flat index.
    capacity : int
        Flat entries per row.
    """

    rows: Tensor | None
    lengths: Tensor
    longest: int
    shortest: int
    start: int
    capacity: int

    @property
    def n_rows(self) -> int:
        return int(self.lengths.shape[0])


@dataclass(frozen=True, slots=True)
class StoreBytes:
    """Bytes of a store, counted from its tensors: `allocated` = `used` by entries + `slack` (room, padding, positions)."""

    allocated: int
    used: int

    @property
    def slack(self) -> int:
        return self.allocated - self.used

    def __add__(self, other: StoreBytes) -> StoreBytes:
        return StoreBytes(self.allocated + other.allocated, self.used + other.used)


class RaggedStore:
    """Keys and values of one layer.

    Parameters
    ----------
    rows : sequence of Row
        ``B * H`` rows; copied.
    n_seqs : int
    room : int
        Free entries per row before the store has to grow.
    window : int or None
        Width of a sliding window: the rows must carry positions, and entries out of sight are dropped when the store grows.
    """

    def __init__(self, rows: Sequence[Row], n_seqs: int, *, room: int = ROOM, window: int | None = None) -> None:
        self.n_seqs = n_seqs
        self.n_kv_heads = len(rows) // n_seqs
        self.window = window
        self._lay_out(list(rows), room)

    @classmethod
    def from_prompt(
        cls,
        keys: Tensor,
        values: Tensor,
        kept: Sequence[Sequence[Tensor]],
        pads: Sequence[int],
        *,
        room: int = ROOM,
        window: int | None = None,
    ) -> RaggedStore:
        """Copy the kept entries out of a whole prompt.

        Parameters
        ----------
        keys, values : Tensor ``[B, H, T, D]``
        kept : sequence of sequence of Tensor
            ``[B][H]`` ascending positions within the row, padding not counted.
        pads : sequence of int
            Padding tokens at the start of each row.
        """

        def row(b: int, h: int) -> Row:
            positions = kept[b][h].to(keys.device)
            where = positions + pads[b] if pads[b] else positions
            picked = [t[b, h].detach().index_select(0, where) for t in (keys, values)]
            return Row(picked[0], picked[1], None if window is None else positions)

        n_seqs, n_kv_heads = keys.shape[:2]
        return cls([row(b, h) for b in range(n_seqs) for h in range(n_kv_heads)], n_seqs, room=room, window=window)

    def _lay_out(self, rows: list[Row], room: int) -> None:
        import torch

        like = rows[0].keys
        lengths = [int(row.keys.shape[0]) for row in rows]
        self.buckets: list[Bucket] = []
        self.room, self.grown = room, 0
        starts = [0] * len(rows)
        total = 0
        for members in _buckets(lengths):
            longest = lengths[members[0]]
            capacity = longest + room
            natural = members == list(range(len(rows)))
            index = None if natural else torch.tensor(members, device=like.device)
            held = torch.tensor([lengths[r] for r in members], device=like.device)
            self.buckets.append(Bucket(index, held, longest, lengths[members[-1]], total, capacity))
            for r in members:
                starts[r], total = total, total + capacity
        # Zeros, not garbage: padding inside a bucket is masked, but 0 * NaN would still be NaN.
        self.keys = like.new_zeros(total, like.shape[1])
        self.values = rows[0].values.new_zeros(total, rows[0].values.shape[1])
        self.positions = like.new_zeros(total, dtype=torch.int32) if self.window is not None else None
        for row, start, length in zip(rows, starts, lengths, strict=True):
            self.keys[start : start + length] = row.keys
            self.values[start : start + length] = row.values
            if self.positions is not None and row.positions is not None:
                self.positions[start : start + length] = row.positions.to(torch.int32)
        self._starts, self._base = starts, lengths
        self._next = torch.tensor([s + n for s, n in zip(starts, lengths, strict=True)], device=like.device)

    def append(self, keys: Tensor, values: Tensor, positions: Tensor | None = None) -> None:
        """Add N entries to every row, O(N); grows (rarely) when the room is used up.

        Parameters
        ----------
        keys, values : Tensor ``[B, H, N, D]``
        positions : Tensor ``[B, N]``, optional
            True positions; needed with a window.
        """
        import torch

        n_new = int(keys.shape[2])
        if self.grown + n_new > self.room:
            self._grow(n_new, positions)
        n_rows = len(self._base)
        index = self._next if n_new == 1 else (self._next[:, None] + torch.arange(n_new, device=keys.device)).flatten()
        with torch.no_grad():
            self.keys.index_copy_(0, index, keys.detach().reshape(n_rows * n_new, -1))
            self.values.index_copy_(0, index, values.detach().reshape(n_rows * n_new, -1))
            if self.positions is not None and positions is not None:
                repeated = positions.to(torch.int32).repeat_interleave(self.n_kv_heads, dim=0)
                self.positions.index_copy_(0, index, repeated.flatten())
            self._next += n_new
        self.grown += n_new

    def _grow(self, n_new: int, positions: Tensor | None) -> None:
        rows = []
        for r, (start, length) in enumerate(zip(self._starts, self.lengths, strict=True)):
            part = slice(start, start + length)
            row = Row(self.keys[part], self.values[part], None if self.positions is None else self.positions[part])
            if self.window is not None and positions is not None and row.positions is not None:
                seen = row.positions > positions[r // self.n_kv_heads, 0] - self.window
                row = Row(row.keys[seen], row.values[seen], row.positions[seen])
            rows.append(row)
        self._lay_out(rows, max(ROOM, 2 * self.room, n_new))

    @property
    def lengths(self) -> list[int]:
        """Entries held per row, ``[S]``."""
        return [n + self.grown for n in self._base]

    @property
    def starts(self) -> list[int]:
        """First flat index per row, ``[S]``."""
        return list(self._starts)

    @property
    def device(self) -> torch.device:
        return self.keys.device

    def view(self, bucket: Bucket, flat: Tensor) -> Tensor:
        """Return a bucket of `flat` as a strided view ``[R, longest, ...]``; nothing is copied."""
        stop = bucket.start + bucket.n_rows * bucket.capacity
        shaped = flat[bucket.start : stop].view(bucket.n_rows, bucket.capacity, *flat.shape[1:])
        return shaped[:, : bucket.longest + self.grown]

    def count_bytes(self) -> StoreBytes:
        """Count bytes from the tensors' storage."""
        tensors = [t for t in (self.keys, self.values, self.positions) if t is not None]
        per_entry = self.keys.shape[1] * self.keys.element_size() + self.values.shape[1] * self.values.element_size()
        return StoreBytes(sum(t.untyped_storage().nbytes() for t in tensors), sum(self.lengths) * per_entry)

    def dense_rows(self) -> Iterable[Row]:
        """Yield the entries of each row, as views; for tests and inspection."""
        for start, length in zip(self._starts, self.lengths, strict=True):
            part = slice(start, start + length)
            yield Row(self.keys[part], self.values[part], None if self.positions is None else self.positions[part])


def _buckets(lengths: Sequence[int]) -> list[list[int]]:
    """Group rows into few buckets of like length, longest first; the padding is bounded by `BUCKET_WASTE`."""
    if min(lengths) == max(lengths):
        return [list(range(len(lengths)))]
    allowed = BUCKET_WASTE * sum(lengths) / len(lengths)
    key: Callable[[int], tuple[int, int]] = lambda r: (-lengths[r], r)  # noqa: E731
    groups: list[list[int]] = []
    for r in sorted(range(len(lengths)), key=key):
        if groups and lengths[groups[-1][0]] - lengths[r] <= allowed:
            groups[-1].append(r)
        else:
            groups.append([r])
    return groups
