"""Ragged key/value storage of one layer: every (sequence, KV head) has its own number of entries.

Shapes: B sequences, H KV heads, S = B * H rows (row = sequence * H + head), D head dimension, N new tokens,
C = sum of all capacities. Keys and values lie in one flat ``[C, D]`` tensor each, at fixed offsets. Rows of like length
form a bucket and share one capacity, so that a bucket is a strided view and an attention step copies nothing. The entries of a row
fill its first slots, in the order of the text until `kvtool.infer.inplace` drops some of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from kvtool.infer.inplace import Ring
from kvtool.infer.rows import BUCKET_WASTE as BUCKET_WASTE
from kvtool.infer.rows import ROOM as ROOM
from kvtool.infer.rows import SHOWN_STEP, biased_columns, hide_beyond, room_left, stored_order
from kvtool.infer.rows import Bucket as Bucket
from kvtool.infer.rows import Row as Row
from kvtool.infer.rows import Slab as Slab
from kvtool.infer.rows import StoreBytes as StoreBytes
from kvtool.infer.rows import buckets_of as buckets_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor


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
        self.ordered = False
        #: True: kernels are shown all slots, and shapes and addresses stay what they are until the store grows
        self.fixed = False
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
        self.members = buckets_of(sizes)
        #: bucket and index within it of each row
        self.places = [(0, 0)] * len(rows)
        for place, members in enumerate(self.members):
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
        self._free = room_left(self.buckets)
        self._whole: tuple[tuple[Tensor, Tensor, Tensor | None], list[Slab]] | None = None
        self._hidden: tuple[int, list[Slab]] | None = None
        #: (asked for, found), see `kvtool.infer.kernels.ragged_attention`
        self.kernel: tuple[str, str] | None = None
        # Zeros, not garbage: padding inside a bucket is masked, but 0 * NaN would still be NaN.
        self.keys = like.new_zeros(total, like.shape[1])
        self.values = rows[0].values.new_zeros(total, rows[0].values.shape[1])
        self.positions = None if rows[0].positions is None else like.new_zeros(total, dtype=torch.int32)
        carried = rows[0].scores
        self.scores = None if carried is None else carried.new_zeros(total, carried.shape[1])
        #: added to the logits, float32 [C], without a window -inf beyond the rows' ends; None where no row has any
        #: (`kvtool.policies.leftovers`)
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
        #: first flat index per row, and the one behind its last entry, int64 [S]
        self.first = torch.tensor(starts, device=like.device)
        self._next = self.first + torch.tensor(lengths, device=like.device)
        #: slot of each entry in the order of the text, int64 [S or 1, W]; None: as they lie, or as the ring says
        self.slots: Tensor | None = None
        self.ring: Ring | None = None
        self._numbers: Tensor | None = None
        if self.ordered:
            self._sort()
        #: in which order the rows lie in the store, and back, int64 [S]; None where it is their own
        self.stored_rows, self.row_places = stored_order(self.members, self.device)
        #: per bucket, how many first entries of its rows hold all biased ones; cuts only move entries to the front
        self.biased = [0 if self.bias is None else biased_columns(bucket, self.bias) for bucket in self.buckets]
        self._hide()
        self.slabs()

    def splits(self, most: float) -> bool:
        """True if all biased entries lie among the first ones of rows without reaching a row's end, and are `most` of all entries."""
        few = sum(n * b.n_rows for b, n in zip(self.buckets, self.biased, strict=True)) <= most * sum(self.lengths)
        return few and all(n <= b.shortest for b, n in zip(self.buckets, self.biased, strict=True))

    def _hide(self) -> None:
        """Make what is added to the logits of single new tokens where rows of a bucket differ in length: -inf beyond a row's end.

        Where entries have a bias, that is its own place: nothing is held twice, and nothing is built anew for a token.
        """
        self.mask: Tensor | None = None
        equal = all(b.longest == b.shortest for b in self.buckets) and not self.fixed
        if self.window is not None or (self.bias is None and equal):
            return
        self.mask = self.keys.new_zeros(self.keys.shape[0]) if self.bias is None else self.bias
        for bucket in self.buckets:
            hide_beyond(self.mask, bucket, self.grown)

    def append(self, keys: Tensor, values: Tensor, positions: Tensor | None = None) -> None:
        """Add N entries to every row, O(N); grows (rarely) when the room is used up.

        Parameters
        ----------
        keys, values : Tensor ``[B, H, N, D]``
        positions : Tensor ``[B, N]``, optional
            True positions; needed with a window.
        """
        import torch

        if torch.is_grad_enabled():
            with torch.no_grad():
                return self.append(keys, values, positions)
        n_new = int(keys.shape[2])
        if self.grown + n_new > self._free:
            self._grow(n_new, positions)
        n_rows = len(self._base)
        index = self._next if n_new == 1 else (self._next[:, None] + torch.arange(n_new, device=keys.device)).flatten()
        self.keys.index_copy_(0, index, keys.reshape(n_rows * n_new, -1))
        self.values.index_copy_(0, index, values.reshape(n_rows * n_new, -1))
        if self.positions is not None and positions is not None:
            repeated = positions.to(torch.int32).repeat_interleave(self.n_kv_heads, dim=0)
            self.positions.index_copy_(0, index, repeated.flatten())
        if self.scores is not None:
            self.scores.index_fill_(0, index, 0.0)
        for added in (self.bias, None if self.mask is self.bias else self.mask):
            if added is not None:
                added.index_fill_(0, index, 0.0)
        self._next += n_new
        self.grown += n_new
        return None

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

    def fix(self, room: int) -> None:
        """Lay all entries out anew with `room` free ones per row; from now on a step's shapes change only when the store grows."""
        self.fixed = True
        self.reserve(room)

    @property
    def full(self) -> bool:
        """True if the next token makes the store grow."""
        return self.grown >= self._free

    def reserve(self, room: int) -> None:
        """Lay all entries out anew, with `room` free ones per row."""
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

        order = self.order()
        if order is not None:
            chosen = order.expand(len(lengths), -1).gather(1, chosen)
            self._sort()
        for bucket, members in zip(self.buckets, self.members, strict=True):
            index = chosen[:, : max(lengths[r] for r in members)]
            index = index if bucket.rows is None else index.index_select(0, bucket.rows)
            for flat in self.columns():
                entries = self.view(bucket, flat)
                wide = index.view(*index.shape, *[1] * (entries.dim() - 2)).expand(*index.shape, *entries.shape[2:])
                entries[:, : index.shape[1]] = entries.gather(1, wide)
        self.shorten(lengths)

    def shorten(self, lengths: Sequence[int]) -> None:
        """Say that every row holds only so many entries, those in its first slots."""
        import torch

        if list(lengths) == self._base:
            # The usual case, a row at its capacity loses what it got: no counter changes, nothing goes to the device.
            self._next -= self.grown
            # A single hidden slot becomes visible again with the next token, before anything looks at it.
            # Not so a bias that a cut has moved.
            stale = self.grown > 1 or self.bias is not None
        else:
            self._base, stale = list(lengths), True
            self._next = self.first + torch.tensor(self._base, device=self.device)
            held = [[lengths[r] for r in members] for members in self.members]
            self.buckets = [
                replace(b, lengths=torch.tensor(n, device=self.device), longest=max(n), shortest=min(n))
                for b, n in zip(self.buckets, held, strict=True)
            ]
            self._free, self._hidden = room_left(self.buckets), None
        self.grown = 0
        if stale:
            self._hide()

    def shorten_all(self, n: int) -> None:
        """Say that every row lost its last `n` slots."""
        if n == self.grown:
            self._next -= n
            self.grown = 0
            if n > 1:
                self._hide()
        else:
            self.shorten([m - n for m in self.lengths])

    @property
    def bounded(self) -> bool:
        """True if every row has a capacity."""
        return self.capacities is not None and None not in self.capacities

    def shrink(self, room: int) -> None:
        """Give room beyond `room` entries per row back, after a wide forward; rows without a bound need theirs."""
        if self.room > room and self.bounded:
            self.reserve(room)

    def columns(self) -> list[Tensor]:
        """Return all flat tensors that hold something per entry."""
        return [t for t in (self.keys, self.values, self.positions, self.scores, self.bias) if t is not None]

    @property
    def base(self) -> list[int]:
        """Entries per row without the `grown` ones since the last cut; another list after a cut that changed a length."""
        return self._base

    @property
    def lengths(self) -> list[int]:
        """Entries held per row, ``[S]``."""
        return [n + self.grown for n in self._base]

    def lengths_now(self) -> Tensor:
        """Return the entries held per row as int64 ``[S]`` on the device."""
        return self._next - self.first

    def used(self, bucket: Bucket) -> Tensor:
        """Return the entries held per row of a bucket, int64 ``[R]``; of a fixed store from tensors that `append` changes in place."""
        if not self.fixed:
            return bucket.lengths + self.grown
        return self.lengths_now() if bucket.rows is None else self.lengths_now().index_select(0, bucket.rows)

    def shown(self, bucket: Bucket) -> int:
        """Return how many slots of a bucket's rows kernels are shown."""
        return bucket.capacity if self.fixed else bucket.longest + self.grown

    def slot_numbers(self) -> Tensor:
        """Return ``arange(W)``, W slots of the longest row."""
        import torch

        if self._numbers is None:
            self._numbers = torch.arange(max(b.capacity for b in self.buckets), device=self.device)
        return self._numbers

    def order(self) -> Tensor | None:
        """Return the slot of each entry in the order of the text, int64 ``[S or 1, W]``; None: as they lie."""
        if self.slots is None and self.ring is not None and self.ring.turns:
            return self.ring.order(self.slot_numbers())
        return self.slots

    def own_slots(self) -> Tensor:
        """Return the order for all rows, ``[S, W]``, to be changed and put back as `slots`; from now on it is held for each row."""
        if self.slots is None:
            order = self.order()
            self.slots = (self.slot_numbers()[None] if order is None else order).repeat(len(self._base), 1)
            self.ordered, self.ring = True, None
        return self.slots

    def _sort(self) -> None:
        """Say that entries lie in the order of the text."""
        self.ring = self.slots = None
        if self.ordered:
            self.own_slots()

    @property
    def uniform(self) -> bool:
        """True if all rows lie in their order at one stride and hold equally many entries."""
        return len(self.buckets) == 1 and self.buckets[0].rows is None and self.buckets[0].longest == self.buckets[0].shortest

    @property
    def starts(self) -> list[int]:
        """First flat index per row, ``[S]``."""
        return list(self._starts)

    @property
    def device(self) -> torch.device:
        return self.keys.device

    def view(self, bucket: Bucket, flat: Tensor) -> Tensor:
        """Return a bucket of `flat` as a strided view ``[R, shown, ...]``; nothing is copied."""
        # One operation, not three: this runs for keys, values and mask of every bucket and layer at every step.
        strides = flat.stride()
        return flat.as_strided(
            (bucket.n_rows, self.shown(bucket), *flat.shape[1:]),
            (bucket.capacity * strides[0], *strides),
            flat.storage_offset() + bucket.start * strides[0],
        )

    def slabs(self) -> list[Slab]:
        """Return what a single new token per row looks at, bucket by bucket; without a window."""
        of = (self.keys, self.values, self.mask)
        # A store that was copied with other keys, or has a new mask, makes its own.
        if self._whole is None or any(a is not b for a, b in zip(self._whole[0], of, strict=True)):
            self._whole, self._hidden = (of, [Slab.of(bucket, *of) for bucket in self.buckets]), None
        whole = self._whole[1]
        if self.mask is None:
            return [slab.first(self.shown(bucket)) for slab, bucket in zip(whole, self.buckets, strict=True)]
        if self._hidden is None or self._hidden[0] < self.grown:
            more = max(b.capacity for b in self.buckets) if self.fixed else -(-self.grown // SHOWN_STEP) * SHOWN_STEP
            shown = [min(b.capacity, b.longest + more) for b in self.buckets]
            self._hidden = more, [slab.first(n) for slab, n in zip(whole, shown, strict=True)]
        return self._hidden[1]

    def count_bytes(self) -> StoreBytes:
        """Count bytes from the tensors' storage."""
        mask = None if self.mask is self.bias else self.mask
        tensors = [*self.columns(), *(t for t in (mask, self.slots) if t is not None)]
        per_entry = self.keys.shape[1] * self.keys.element_size() + self.values.shape[1] * self.values.element_size()
        return StoreBytes(sum(t.untyped_storage().nbytes() for t in tensors), sum(self.lengths) * per_entry)

    def dense_rows(self) -> Iterable[Row]:
        """Yield the entries of each row in the order of the text: views, or copies where they lie out of order."""
        order = self.order()
        for r, (start, length) in enumerate(zip(self._starts, self.lengths, strict=True)):
            part: slice | Tensor = slice(start, start + length)
            if order is not None:
                part = start + order[r if order.shape[0] > 1 else 0, :length]
            positions, scores, bias = (None if t is None else t[part] for t in (self.positions, self.scores, self.bias))
            yield Row(self.keys[part], self.values[part], positions, scores, bias)
