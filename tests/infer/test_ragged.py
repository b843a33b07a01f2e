"""Ragged storage: what is put in comes out, whatever the lengths; bytes are those of the tensors."""

from __future__ import annotations

import pytest
import torch

from kvtool.infer.ragged import BUCKET_WASTE, ROOM, RaggedStore, Row, _buckets


def build(lengths: list[int], n_seqs: int = 1, room: int = ROOM, window: int | None = None) -> tuple[RaggedStore, list[Row]]:
    generator = torch.Generator().manual_seed(len(lengths))
    rows = []
    for n in lengths:
        keys, values = torch.randn(n, 8, generator=generator), torch.randn(n, 4, generator=generator)
        rows.append(Row(keys, values, None if window is None else torch.arange(n)))
    return RaggedStore(rows, n_seqs, room=room, window=window), rows


@pytest.mark.parametrize("lengths", [[5, 5, 5, 5], [3, 90, 3, 40], [1, 2, 3, 4], [100, 0, 50, 98], [7]])
@pytest.mark.parametrize("room", [0, 2, 64])
def test_appended_entries_follow_the_old_ones(lengths: list[int], room: int) -> None:
    store, rows = build(lengths, room=room)
    generator = torch.Generator().manual_seed(1)
    expected_keys, expected_values = [r.keys for r in rows], [r.values for r in rows]
    for n_new in (1, 3, 1, 40, 1):
        keys = torch.randn(1, len(lengths), n_new, 8, generator=generator)
        values = torch.randn(1, len(lengths), n_new, 4, generator=generator)
        store.append(keys, values)
        expected_keys = [torch.cat([old, keys[0, h]]) for h, old in enumerate(expected_keys)]
        expected_values = [torch.cat([old, values[0, h]]) for h, old in enumerate(expected_values)]
    for row, keys_of_row, values_of_row in zip(store.dense_rows(), expected_keys, expected_values, strict=True):
        assert torch.equal(row.keys, keys_of_row)
        assert torch.equal(row.values, values_of_row)


def test_no_repacking_while_there_is_room_and_doubling_afterwards() -> None:
    store, _ = build([10, 20], room=16)
    moves, where = 0, store.keys.data_ptr()
    for _ in range(496):
        store.append(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 4))
        moves += store.keys.data_ptr() != where
        where = store.keys.data_ptr()
    assert moves == 4  # rooms of 16, 32, 64, 128 and 256 entries: 496 tokens


def test_bytes_are_counted_from_the_tensors_and_slack_is_the_rest() -> None:
    store, _ = build([100, 40, 39, 38], room=4)
    counted = store.count_bytes()
    assert counted.allocated == store.keys.numel() * 4 + store.values.numel() * 4
    assert counted.used == (100 + 40 + 39 + 38) * (8 + 4) * 4
    # Buckets [100] and [40, 39, 38]: room 4 x 4 rows, padding 0 + 1 + 2.
    assert counted.slack == (4 * 4 + 3) * (8 + 4) * 4
    # A retained whole prompt behind a view would show: storage is counted, not shape.
    store.keys = torch.zeros(1000, 8)[: store.keys.shape[0]]
    assert store.count_bytes().allocated >= 1000 * 8 * 4


def test_buckets_bound_the_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    for n_rows in (2, 8, 32, 128):
        lengths = torch.randint(1, 1000, (n_rows,), generator=generator).tolist()
        groups = _buckets(lengths)
        assert sorted(r for g in groups for r in g) == list(range(n_rows))
        padding = sum(lengths[g[0]] - lengths[r] for g in groups for r in g)
        assert padding <= BUCKET_WASTE * sum(lengths)
        assert len(groups) <= (8 * n_rows / BUCKET_WASTE) ** 0.5


def test_a_sliding_window_drops_what_is_out_of_sight_when_it_grows() -> None:
    store, _ = build([9, 9], room=2, window=10)
    for position in range(9, 60):
        keys = torch.full((1, 2, 1, 8), float(position))
        store.append(keys, torch.zeros(1, 2, 1, 4), torch.tensor([[position]]))
    assert max(store.lengths) <= 10 + store.room
    for row in store.dense_rows():
        assert row.positions is not None
        assert set(range(50, 60)) <= set(row.positions.tolist())
        assert row.positions.tolist() == sorted(set(row.positions.tolist()))
