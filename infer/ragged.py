"""Ragged key/value storage of one layer: every (sequence, KV head) has its own number of entries.

Shapes: B sequences, H KV heads, S = B * H rows (row = sequence * H + head), D head dimension, N new tokens,
C = sum of all capacities. Keys and values lie in one flat ``[C, D]`` tensor each, at fixed offsets. Rows of like length
form a bucket and share one capacity, so that a bucket is a strided view and an attention step copies nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
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
    """Entries of one (sequence, KV head): keys ``[n, D]``, values ``[n, D]`` and, where needed, true positions ``[n]``, the
    scores that entries carry while decoding, ``[n, G]``, and what is added to their logits, float32 ``[n]``."""

    keys: Tensor
    values: Tensor
    positions: Tensor | None = None
    scores: Tensor | None = None
    bias: Tensor | None = None


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
    """Bytes of a store, counted from its tensors: `allocated` = `used` by entries + `slack` (room, padding, positions, scores,
    logit biases)."""

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
    capacities : sequence of (int or None), or None
        Entries per row to lay out for, where rows will grow up to a bound and be cut (`keep`); `room` comes on top. None for a
        row without a bound.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        n_seqs: int,
        *,
        room: int = ROOM,
        window: int | None = None,
        capacities: Sequence[int | None] | None = None,
    ) -> None:
        self.n_seqs = n_seqs
        self.n_kv_heads = len(rows) // n_seqs
        self.window = window
        self.capacities = None if capacities is None else list(capacities)
        self._lay_out(list(rows), room)

    @classmethod
    def from_prompt(
        cls,
        keys: Tensor,
        values: Tensor,
        kept: Sequence[Sequence[Tensor]],
        where: Sequence[Sequence[Tensor]],
        *,
        room: int = ROOM,
        window: int | None = None,
        capacities: Sequence[int | None] | None = None,
        track: bool = False,
        enter: Callable[[Tensor, Tensor], Tensor] | None = None,
        scores: Sequence[Tensor] | None = None,
    ) -> RaggedStore:
        """Copy the kept entries out of a whole prompt.

        Parameters
        ----------
        keys, values : Tensor ``[B, H, T, D]``
        kept : sequence of sequence of Tensor
            ``[B][H]`` ascending positions within the row, padding not counted.
        where : sequence of sequence of Tensor
            ``[B][H]`` their indices along T.
        room, window, capacities
            See `RaggedStore`.
        track : bool
            Hold true positions without a window, too.
        enter : callable, optional
            Applied to the kept keys ``[n, D]`` and their positions ``[n]`` before they are stored.
        scores : sequence of Tensor ``[Q, length]``, optional
            Per sequence, what each entry carries per query head.
        """
        n_seqs, n_kv_heads = keys.shape[:2]

        def row(b: int, h: int) -> Row:
            positions = kept[b][h].to(keys.device)
            picked = [t[b, h].detach().index_select(0, where[b][h]) for t in (keys, values)]
            carried = None
            if scores is not None:
                carried = scores[b].view(n_kv_heads, -1, scores[b].shape[1])[h, :, positions].T
            key = picked[0] if enter is None else enter(picked[0], positions)
            return Row(key, picked[1], positions if track or window is not None else None, carried)

        rows = [row(b, h) for b in range(n_seqs) for h in range(n_kv_heads)]
        return cls(rows, n_seqs, room=room, window=window, capacities=capacities)

    def _lay_out(self, rows: list[Row], room: int) -> None:
        import torch

        like = rows[0].keys
        lengths = [int(row.keys.shape[0]) for row in rows]
        sizes = lengths if self.capacities is None else [max(n, c or 0) for n, c in zip(lengths, self.capacities, strict=True)]
        self.buckets: list[Bucket] = []
        self.room, self.grown = room, 0
        starts = [0] * len(rows)
        total = 0
        self._members = buckets_of(sizes)
        #: bucket and index within it of each row
        self.places = [(0, 0)] * len(rows)
        for place, members in enumerate(self._members):
            capacity = sizes[members[0]] + room
            natural = members == list(range(len(rows)))
            index = None if natural else torch.tensor(members, device=like.device)
            held = [lengths[r] for r in members]
            counted = torch.tensor(held, device=like.device)
            self.buckets.append(Bucket(index, counted, max(held), min(held), total, capacity))
            for r in members:
                starts[r], total = total, total + capacity
            for i, r in enumerate(members):
                self.places[r] = (place, i)
        # Zeros, not garbage: padding inside a bucket is masked, but 0 * NaN would still be NaN.
        self.keys = like.new_zeros(total, like.shape[1])
        self.values = rows[0].values.new_zeros(total, rows[0].values.shape[1])
        self.positions = None if rows[0].positions is None else like.new_zeros(total, dtype=torch.int32)
        carried = rows[0].scores
        self.scores = None if carried is None else carried.new_zeros(total, carried.shape[1])
        #: added to the logits, float32 [C]; None where no row has any (`kvtool.policies.leftovers`)
        self.bias = like.new_zeros(total, dtype=torch.float32) if any(row.bias is not None for row in rows) else None
        for row, start, length in zip(rows, starts, lengths, strict=True):
            self.keys[start : start + length] = row.keys
            self.values[start : start + length] = row.values
            if self.positions is not None and row.positions is not None:
                self.positions[start : start + length] = row.positions.to(torch.int32)
            if self.scores is not None and row.scores is not None:
                self.scores[start : start + length] = row.scores
            if self.bias is not None and row.bias is not None:
                self.bias[start : start + length] = row.bias
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
        if any(b.longest + self.grown + n_new > b.capacity for b in self.buckets):
            self._grow(n_new, positions)
        n_rows = len(self._base)
        index = self._next if n_new == 1 else (self._next[:, None] + torch.arange(n_new, device=keys.device)).flatten()
        with torch.no_grad():
            self.keys.index_copy_(0, index, keys.detach().reshape(n_rows * n_new, -1))
            self.values.index_copy_(0, index, values.detach().reshape(n_rows * n_new, -1))
            if self.positions is not None and positions is not None:
                repeated = positions.to(torch.int32).repeat_interleave(self.n_kv_heads, dim=0)
                self.positions.index_copy_(0, index, repeated.flatten())
            if self.scores is not None:
                self.scores.index_fill_(0, index, 0.0)
            if self.bias is not None:
                self.bias.index_fill_(0, index, 0.0)
            self._next += n_new
        self.grown += n_new

    def _grow(self, n_new: int, positions: Tensor | None) -> None:
        rows = []
        for r, row in enumerate(self.dense_rows()):
            if self.window is not None and positions is not None and row.positions is not None:
                seen = row.positions > positions[r // self.n_kv_heads, 0] - self.window
                scores, bias = (None if t is None else t[seen] for t in (row.scores, row.bias))
                row = Row(row.keys[seen], row.values[seen], row.positions[seen], scores, bias)
            rows.append(row)
        # Rows with a capacity are cut back to it after every forward: the room is for the new tokens alone.
        self._lay_out(rows, n_new if self.bounded else max(ROOM, 2 * self.room, n_new))

    def reserve(self, room: int) -> None:
        """Lay all entries out anew, with `room` free entries per row."""
        self._lay_out(list(self.dense_rows()), room)

    def keep(self, chosen: Tensor, lengths: Sequence[int]) -> None:
        """Drop all entries of every row but the chosen ones, in place and in their order; nothing is laid out anew.

        Parameters
        ----------
        chosen : Tensor ``[S, n]``
            Ascending indices within each row, int64. What lies beyond a row's new length is not looked at, but must be
            an index of the row.
        lengths : sequence of int
            Entries that each row keeps, at most n.
        """
        import torch

        for bucket, members in zip(self.buckets, self._members, strict=True):
            index = chosen[:, : max(lengths[r] for r in members)]
            index = index if bucket.rows is None else index.index_select(0, bucket.rows)
            for flat in self._columns():
                entries = self.view(bucket, flat)
                wide = index.view(*index.shape, *[1] * (entries.dim() - 2)).expand(*index.shape, *entries.shape[2:])
                entries[:, : index.shape[1]] = entries.gather(1, wide)
        if list(lengths) == self._base:
            # The usual case, a row at its capacity loses what it got: no counter changes, nothing goes to the device.
            self._next -= self.grown
        else:
            self._base = list(lengths)
            self._next = torch.tensor([s + n for s, n in zip(self._starts, lengths, strict=True)], device=self.device)
            held = [[lengths[r] for r in members] for members in self._members]
            self.buckets = [
                replace(b, lengths=torch.tensor(n, device=self.device), longest=max(n), shortest=min(n))
                for b, n in zip(self.buckets, held, strict=True)
            ]
        self.grown = 0

    @property
    def bounded(self) -> bool:
        """True if every row has a capacity."""
        return self.capacities is not None and None not in self.capacities

    def shrink(self, room: int) -> None:
        """Give room beyond `room` entries per row back, after a wide forward; rows without a bound need theirs."""
        if self.room > room and self.bounded:
            self.reserve(room)

    def _columns(self) -> list[Tensor]:
        """All flat tensors that hold something per entry."""
        return [t for t in (self.keys, self.values, self.positions, self.scores, self.bias) if t is not None]

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
        tensors = self._columns()
        per_entry = self.keys.shape[1] * self.keys.element_size() + self.values.shape[1] * self.values.element_size()
        return StoreBytes(sum(t.untyped_storage().nbytes() for t in tensors), sum(self.lengths) * per_entry)

    def dense_rows(self) -> Iterable[Row]:
        """Yield the entries of each row, as views; for tests and inspection."""
        for start, length in zip(self._starts, self.lengths, strict=True):
            part = slice(start, start + length)
            positions, scores, bias = (None if t is None else t[part] for t in (self.positions, self.scores, self.bias))
            yield Row(self.keys[part], self.values[part], positions, scores, bias)


def buckets_of(lengths: Sequence[int]) -> list[list[int]]:
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
