"""Representatives in the store, in every kernel and through a whole model, against literal float64 loops."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvtool.attention import AttentionCall, attention_handler
from kvtool.errors import ConfigError
from kvtool.infer.cache import CompressedCache
from kvtool.infer.generate import feed, prefill, score_answer
from kvtool.infer.kernels import pick_kernel, ragged_attention, reference_attention
from kvtool.infer.measure import check_plan, plan
from kvtool.infer.ragged import RaggedStore, Row
from kvtool.policies import Policy

LENGTHS = {"equal": [12] * 4, "ragged": [40, 3, 17, 9]}


def build(lengths: list[int], n_new: int, window: int | None, group: int = 2) -> tuple[RaggedStore, Tensor, list[Row]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    rows = []
    for i, n in enumerate(lengths):
        keys, values = (torch.randn(n, 16, generator=generator) for _ in range(2))
        # Row 1 has no bias of its own.
        bias = None if i == 1 else torch.cat([torch.tensor([4.2, 1.5]), torch.zeros(n - 2)])
        where = torch.randperm(50, generator=generator)[:n].sort().values
        rows.append(Row(keys, values, None if window is None else where, bias=bias))
    store = RaggedStore(rows, 2, room=4, window=window)
    new = [torch.randn(2, len(lengths) // 2, n_new, 16, generator=generator) for _ in range(2)]
    store.append(new[0], new[1], None if window is None else (50 + torch.arange(n_new)).expand(2, -1))
    return store, torch.randn(2, len(lengths) // 2 * group, n_new, 16, generator=generator), rows


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("n_new", [1, 3])
@pytest.mark.parametrize("window", [None, 30])
def test_kernels_add_the_bias(lengths: list[int], n_new: int, window: int | None) -> None:
    store, queries, _ = build(lengths, n_new, window)
    expected = reference_attention(queries, store, 0.3)
    found = ragged_attention(queries, store, 0.3, "sdpa-buckets")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    # The reference itself: an entry with bias ln n counts as n copies of it.
    if window is None:
        for r, row in enumerate(store.dense_rows()):
            seq, head = divmod(r, store.n_kv_heads)
            bias = torch.zeros(len(row.keys)) if row.bias is None else row.bias
            for q in (2 * head, 2 * head + 1):
                weights = bias.double().exp() * (row.keys.double() @ queries[seq, q, -1].double() * 0.3).exp()
                want = (weights[:, None] * row.values.double()).sum(0) / weights.sum()
                torch.testing.assert_close(expected[seq, q, -1].double(), want, rtol=1e-5, atol=1e-6)
        plain = RaggedStore([Row(row.keys, row.values) for row in store.dense_rows()], 2)
        assert not torch.allclose(reference_attention(queries, plain, 0.3), expected, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_bias_in_float32_on_the_cpu(dtype: torch.dtype) -> None:
    store, queries, _ = build([40, 3, 17, 9], 1, None)
    half = [Row(row.keys.to(dtype), row.values.to(dtype), bias=row.bias) for row in store.dense_rows()]
    moved = RaggedStore(half, 2)
    assert moved.bias is not None
    assert moved.bias.dtype == torch.float32
    found = ragged_attention(queries.to(dtype), moved, 0.3, "sdpa-buckets").float()
    torch.testing.assert_close(found, reference_attention(queries.to(dtype), moved, 0.3).float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("window", [None, 30])
def test_appending_growing_and_cutting_keep_the_bias_where_it_belongs(window: int | None) -> None:
    store, _, rows = build([40, 3, 17, 9], 1, window)
    before = store.count_bytes()
    for step in range(40):
        new = torch.ones(2, 2, 1, 16)
        store.append(new, new, None if window is None else torch.full((2, 1), 51 + step))
    assert store.grown < 41, "the store has grown at least once"
    for row, held in zip(rows, store.dense_rows(), strict=True):
        assert held.bias is not None
        if window is None:
            want = torch.zeros(len(row.keys)) if row.bias is None else row.bias
            assert torch.equal(held.bias[: len(want)], want)
            assert bool((held.bias[len(want) :] == 0).all())
            continue
        # A biased entry goes when its position is out of sight, with its bias.
        marked = held.keys[held.bias > 0]
        assert all(any(torch.equal(key, old) for old in row.keys[:2]) for key in marked)
    assert store.bias is not None
    assert before.slack >= 4 * 4 * 12  # float32 per entry, on top of room and padding
    counted = store.count_bytes()
    tensors = (store.keys, store.values, store.bias, *([] if store.positions is None else [store.positions]))
    assert counted.allocated == sum(t.numel() * t.element_size() for t in tensors)
    assert counted.used == sum(store.lengths) * (16 + 16) * 4


def test_a_cut_moves_biases_with_their_entries() -> None:
    store, _, rows = build([12, 12, 12, 12], 1, None)
    chosen = torch.tensor([[0, 5, 12]] * 4)
    store.keep(chosen, [3, 3, 3, 3])
    store.append(torch.zeros(2, 2, 1, 16), torch.zeros(2, 2, 1, 16))
    for row, held in zip(rows, store.dense_rows(), strict=True):
        assert held.bias is not None
        assert held.bias.tolist() == pytest.approx([0.0 if row.bias is None else 4.2, 0.0, 0.0, 0.0])


def test_flash_kernels_that_cannot_take_a_bias_give_way_to_sdpa_by_name() -> None:
    store, _, _ = build([12] * 4, 1, None)
    plain = RaggedStore([Row(row.keys, row.values) for row in store.dense_rows()], 2)
    for name in ("flash-attn", "torch-varlen"):
        assert pick_kernel(name, store) == "sdpa-buckets"
        with pytest.raises(ConfigError, match="needs CUDA"):
            pick_kernel(name, plain)
    assert pick_kernel("reference", store) == "reference"
    assert pick_kernel("auto", store) == "sdpa-buckets"


# ---- a whole model


def literal_logits(model: Any, prompt: list[int], fed: list[int], kept: list[list[Tensor]], block: int) -> Tensor:
    """Logits ``[N, V]`` of the fed tokens in float64: evicted entries are replaced by block means whose bias is log n."""
    double = copy.deepcopy(model).double()
    n_prompt, n_all = len(prompt), len(prompt) + len(fed)

    def handler(call: AttentionCall) -> Tensor:
        group = call.queries.shape[1] // call.keys.shape[1]
        out = torch.empty_like(call.queries)
        for q in range(call.queries.shape[1]):
            h = q // group
            keys, values, where = call.keys[0, h], call.values[0, h], kept[call.layer][h].tolist()
            gone = [j for j in range(n_prompt) if j not in where]
            blocks = [gone[i : i + block] for i in range(0, len(gone), block)]
            for i in range(n_all):
                if i < n_prompt:
                    shown = [(keys[j], values[j], 1) for j in range(i + 1)]
                else:
                    shown = [(keys[b].mean(0), values[b].mean(0), len(b)) for b in blocks]
                    shown += [(keys[j], values[j], 1) for j in [*where, *range(n_prompt, i + 1)]]
                logits = torch.stack([k for k, _, _ in shown]) @ call.queries[0, q, i] * call.scaling
                weights = logits.exp() * torch.tensor([n for _, _, n in shown], dtype=torch.float64)
                out[0, q, i] = (weights[:, None] * torch.stack([v for _, v, _ in shown])).sum(0) / weights.sum()
        return out

    with torch.no_grad(), attention_handler(double, handler):
        return double(torch.tensor([prompt + fed]), use_cache=False).logits[0, n_prompt:]  # type: ignore[no-any-return]


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt_neox"])
def test_decoding_over_representatives_equals_a_literal_model(architecture: str, random_model: Callable[..., Any]) -> None:
    model = random_model(architecture)
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 250, (56,), generator=generator).tolist()
    prompt, fed = ids[:50], ids[50:]
    policy = Policy.parse("snapkv:budget=40%,window=4,compensate=mean,block=7")
    cache = CompressedCache(policy, model, keep_positions=True)
    with torch.no_grad():
        model(torch.tensor([prompt]), past_key_values=cache)
        steps = [model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1] for token in fed]
    kept = [cache.kept[layer][0] for layer in range(2)]
    assert all(len(p) < 20 for heads in kept for p in heads)
    expected = literal_logits(model, prompt, fed, kept, 7)
    torch.testing.assert_close(torch.stack(steps).double(), expected, rtol=1e-3, atol=1e-4)
    assert cache.left.representatives > 0
    # All at once on a cache built from the same prompt, and after growing beyond the room.
    state = prefill(model, prompt, policy.needs(), 0)
    for room in (1, 16):
        forked = state.fork(policy, state.choose(policy), room=room)
        torch.testing.assert_close(feed(model, forked, fed).double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    ["mean,block=8", "weighted,block=8", "weighted,block=full,gate=0.001", "merge,bias=count", "merge,merge=cam", "refit"],
)
def test_bytes_are_those_of_the_uncompensated_policy(options: str, random_model: Callable[..., Any]) -> None:
    model = random_model("llama")
    ids = torch.randint(3, 250, (90,), generator=torch.Generator().manual_seed(6)).tolist()
    plain = Policy.parse("adakv:budget=30,window=4")
    policy = Policy.parse(f"adakv:budget=30,window=4,compensate={options}")
    state = prefill(model, ids, sorted({*plain.needs(), *policy.needs()}), 3)
    counted = []
    for p in (plain, policy):
        cache = state.fork(p, state.choose(p))
        held = cache.count_bytes()
        entries = [[[range(n) for n in heads] for heads in rows] for rows in cache.entries()]
        assert check_plan(p, plan(p, state), state, entries, held) == 30
        counted.append(held)
    assert counted[0].used == counted[1].used == plan(plain, state).total_bytes
    assert counted[1].slack >= counted[0].slack


def test_the_control_is_planned_as_asked_and_checked_as_chosen(random_model: Callable[..., Any]) -> None:
    model = random_model("llama")
    ids = torch.randint(3, 250, (90,), generator=torch.Generator().manual_seed(6)).tolist()
    policy = Policy.parse("snapkv:budget=30,window=4,compensate=slots,block=8")
    state = prefill(model, ids, policy.needs(), 3)
    cache = state.fork(policy, state.choose(policy))
    entries = [[[range(n) for n in heads] for heads in rows] for rows in cache.entries()]
    planned = plan(policy, state)
    assert planned.entries == 30
    n_kept = policy.compensation.kept(30, 90)
    assert check_plan(policy, planned, state, entries, cache.count_bytes()) == n_kept < 30
    with pytest.raises(Exception, match="the cache holds"):
        check_plan(policy, planned, state, [[[range(30)] * 2]] * 2, cache.count_bytes())


def test_padded_rows_are_compensated_as_if_alone(random_model: Callable[..., Any]) -> None:
    model = random_model("llama")
    generator = torch.Generator().manual_seed(8)
    short, long = (torch.randint(3, 250, (n,), generator=generator).tolist() for n in (33, 60))
    batch = torch.tensor([[0] * 27 + short, long])
    mask = torch.tensor([[0] * 27 + [1] * 33, [1] * 60])
    for options in ("weighted,block=8", "refit", "merge,merge=d2o", "merge,merge=cam"):
        policy = Policy.parse(f"snapkv:budget=50%,window=4,compensate={options}")
        cache = CompressedCache(policy, model, seeds=[1, 2])
        with torch.no_grad():
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            model(batch, attention_mask=mask, position_ids=positions, past_key_values=cache)
        for row, ids in enumerate((short, long)):
            alone = CompressedCache(policy, model, seeds=row + 1)
            with torch.no_grad():
                model(torch.tensor([ids]), past_key_values=alone)
            for layer in range(2):
                mine = list(cache.stores[layer].dense_rows())[2 * row : 2 * row + 2]
                for found, want in zip(mine, alone.stores[layer].dense_rows(), strict=True):
                    torch.testing.assert_close(found.keys, want.keys, rtol=1e-3, atol=1e-4)
                    torch.testing.assert_close(found.values, want.values, rtol=1e-3, atol=1e-4)
                    if want.bias is not None:
                        torch.testing.assert_close(found.bias, want.bias, rtol=1e-3, atol=1e-4)


def test_sliding_windows_shorter_than_the_prompt_are_left_alone(random_model: Callable[..., Any]) -> None:
    model = random_model("mistral")  # window 16
    ids = torch.randint(3, 250, (60,), generator=torch.Generator().manual_seed(9)).tolist()
    cache = CompressedCache("window:budget=50%,compensate=mean,block=4", model)
    with torch.no_grad():
        model(torch.tensor([ids]), past_key_values=cache)
    assert cache.left.representatives == 0
    assert all(store.bias is None for store in cache.stores)
    state = prefill(model, ids[:12], (), 0)
    policy = Policy.parse("window:budget=50%,compensate=mean,block=4")
    forked = state.fork(policy, state.choose(policy))
    assert forked.left.representatives > 0
    assert score_answer(model, forked, ids[12:30], ids[30:40]).nll
