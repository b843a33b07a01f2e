"""What a ragged store is made of: rows, buckets of rows of like length, and their bytes.

Shapes: S rows, R rows of a bucket, G query heads of a KV head, D head dimension, n entries of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: Padding inside buckets, as a share of the entries, at most.
BUCKET_WASTE = 0.125

#: Steps of the search for the widest buckets.
HALVINGS = 8

#: Where a mask hides what is beyond a row's end, views show so many slots more at a time.
SHOWN_STEP = 16

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
        return len(self.lengths)


@dataclass(frozen=True, slots=True)
class Slab:
    """The first slots of a bucket's rows as SDPA takes them, one sequence with R heads: views of the store's tensors.

    A step that had to make them anew would spend more time on that than on the attention over a small bucket.

    Attributes
    ----------
    keys, values : Tensor ``[1, R, shown, D]``
    mask : Tensor ``[1, R, 1, shown]`` or None
        Added to the logits.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor | None

    @classmethod
    def of(cls, bucket: Bucket, keys: Tensor, values: Tensor, mask: Tensor | None) -> Slab:
        """Shape the flat tensors ``[C, D]``, ``[C, D]`` and ``[C]``, all slots shown."""
        part, n_rows, capacity = (
            slice(bucket.start, bucket.start + bucket.n_rows * bucket.capacity),
            bucket.n_rows,
            bucket.capacity,
        )
        return cls(
            keys[part].view(1, n_rows, capacity, keys.shape[1]),
            values[part].view(1, n_rows, capacity, values.shape[1]),
            None if mask is None else mask[part].view(1, n_rows, 1, capacity),
        )

    def first(self, shown: int) -> Slab:
        """Return the same with fewer slots shown."""
        mask = None if self.mask is None else self.mask.narrow(3, 0, shown)
        return Slab(self.keys.narrow(2, 0, shown), self.values.narrow(2, 0, shown), mask)


@dataclass(frozen=True, slots=True)
class StoreBytes:
    """Bytes of a store, counted from its tensors: `allocated` = `used` by entries + `slack` (room, padding, positions, scores,
    logit biases, masks, and the order of entries that lie out of order)."""

    allocated: int
    used: int

    @property
    def slack(self) -> int:
        return self.allocated - self.used

    def __add__(self, other: StoreBytes) -> StoreBytes:
        return StoreBytes(self.allocated + other.allocated, self.used + other.used)


def buckets_of(lengths: Sequence[int]) -> list[list[int]]:
    """Group rows into few buckets of like length, longest first; all padding is at most `BUCKET_WASTE` of the entries.

    Every bucket is a kernel call of its own at every step, so the widest buckets that the bound allows are looked for.
    """
    if min(lengths) == max(lengths):
        return [list(range(len(lengths)))]
    most = BUCKET_WASTE * sum(lengths)
    # Rows of a bucket differ by `low` at most: its padding is within the bound, whatever the lengths.
    low, high = most / len(lengths), float(max(lengths) - min(lengths))
    found = _groups(lengths, low)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        groups = _groups(lengths, middle)
        if sum(lengths[g[0]] - lengths[r] for g in groups for r in g) <= most:
            low = middle
            found = min(found, groups, key=len)
        else:
            high = middle
    return found


def _groups(lengths: Sequence[int], allowed: float) -> list[list[int]]:
    """Group rows, longest first, so that those of a group differ by `allowed` at most."""
    key: Callable[[int], tuple[int, int]] = lambda r: (-lengths[r], r)  # noqa: E731
    groups: list[list[int]] = []
    for r in sorted(range(len(lengths)), key=key):
        if groups and lengths[groups[-1][0]] - lengths[r] <= allowed:
            groups[-1].append(r)
        else:
            groups.append([r])
    return groups


def stored_order(members: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Return in which order rows lie that are stored bucket by bucket, int64 ``[S]``, and the way back; None where it is their own."""
    import torch

    stored = [r for rows in members for r in rows]
    if stored == list(range(len(stored))):
        return None, None
    back = sorted(range(len(stored)), key=stored.__getitem__)
    return torch.tensor(stored, device=device), torch.tensor(back, device=device)


def biased_columns(bucket: Bucket, bias: Tensor) -> int:
    """Return how many first entries of a bucket's rows hold all entries that have a bias; `bias` is flat, ``[C]``."""
    stop = bucket.start + bucket.n_rows * bucket.capacity
    columns = (bias[bucket.start : stop].view(bucket.n_rows, -1) != 0).any(dim=0).nonzero()
    return int(columns.max()) + 1 if columns.numel() else 0


def room_left(buckets: Sequence[Bucket]) -> int:
    """Return how many tokens all rows of these buckets have room for."""
    return min(b.capacity - b.longest for b in buckets)


def hide_beyond(mask: Tensor, bucket: Bucket, grown: int) -> None:
    """Set -inf in the flat `mask` ``[C]`` beyond the ends of a bucket's rows, which grew by `grown` entries since they were laid out."""
    import torch

    stop = bucket.start + bucket.n_rows * bucket.capacity
    beyond = torch.arange(bucket.capacity, device=mask.device) >= (bucket.lengths + grown)[:, None]
    mask[bucket.start : stop].view(bucket.n_rows, -1).masked_fill_(beyond, float("-inf"))
