"""Every kernel against the literal float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvtool.errors import ConfigError
from kvtool.infer.flash import varlen_rows
from kvtool.infer.kernels import pick_kernel, ragged_attention, reference_attention
from kvtool.infer.ragged import RaggedStore, Row

LENGTHS = {
    "equal": [12] * 8,
    "near": [12, 11, 12, 11, 12, 12, 11, 12],
    "ragged": [40, 3, 17, 1, 90, 16, 2, 40],
    "one long": [200, 5, 5, 5, 5, 5, 5, 5],
}


def build(
    lengths: list[int], n_seqs: int, n_new: int, group: int, window: int | None = None, width: int = 16
) -> tuple[RaggedStore, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths) + n_new)
    longest = max(lengths)
    rows = []
    for n in lengths:
        where = torch.randperm(longest, generator=generator)[:n].sort().values
        keys, values = (torch.randn(n, width, generator=generator) for _ in range(2))
        rows.append(Row(keys, values, None if window is None else where))
    store = RaggedStore(rows, n_seqs, room=4, window=window)
    n_kv = len(lengths) // n_seqs
    new = [torch.randn(n_seqs, n_kv, n_new, width, generator=generator) for _ in range(2)]
    positions = None if window is None else (longest + torch.arange(n_new)).expand(n_seqs, -1)
    store.append(new[0], new[1], positions)
    return store, torch.randn(n_seqs, n_kv * group, n_new, width, generator=generator)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("n_seqs", [1, 4])
@pytest.mark.parametrize("n_new", [1, 3, 9])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("window", [None, 13])
def test_sdpa_buckets_equal_the_reference(lengths: list[int], n_seqs: int, n_new: int, group: int, window: int | None) -> None:
    store, queries = build(lengths, n_seqs, n_new, group, window)
    found = ragged_attention(queries, store, 0.3, "sdpa-buckets")
    torch.testing.assert_close(found, reference_attention(queries, store, 0.3), rtol=1e-5, atol=1e-6)


def test_equal_lengths_need_one_call_and_no_copy() -> None:
    store, queries = build([50] * 8, 2, 1, 2)
    assert len(store.buckets) == 1
    assert store.view(store.buckets[0], store.keys).data_ptr() == store.keys.data_ptr()
    calls = []
    original = torch.nn.functional.scaled_dot_product_attention

    def counting(*arguments: Any, **options: Any) -> torch.Tensor:
        calls.append((arguments[1].untyped_storage().data_ptr(), options["attn_mask"]))
        return original(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", counting)
        ragged_attention(queries, store, 0.3)
    assert calls == [(store.keys.untyped_storage().data_ptr(), None)]


def literal_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: torch.Tensor,
) -> torch.Tensor:
    """What the documentation of ``torch.nn.attention.varlen.varlen_attn`` says, in loops; it runs on CUDA only."""
    assert window_size == ((-1, 0) if max_q > 1 else (-1, -1))
    # Split-KV is for more query heads than KV heads.
    assert max_q > 1 or query.shape[1] > 1
    assert enable_gqa
    assert cu_seq_k.diff().min() > 0
    out = torch.empty_like(query)
    for s in range(len(cu_seq_q) - 1):
        q = query[cu_seq_q[s] : cu_seq_q[s + 1]]
        used = int(seqused_k[s])
        k, v = (t[cu_seq_k[s] : cu_seq_k[s] + used, 0] for t in (key, value))
        assert len(q) <= max_q
        assert used <= max_k
        assert used <= cu_seq_k[s + 1] - cu_seq_k[s]
        visible = torch.arange(used)[None] <= used - len(q) + torch.arange(len(q))[:, None]
        for h in range(query.shape[1]):
            logits = (q[:, h] @ k.T * scale).masked_fill(~visible, float("-inf"))
            out[cu_seq_q[s] : cu_seq_q[s + 1], h] = logits.softmax(-1) @ v
    return out


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize(("n_seqs", "n_new", "group"), [(1, 1, 1), (2, 3, 4), (4, 1, 2)])
@pytest.mark.parametrize("fixed", [False, True])
def test_offsets_of_the_variable_length_call(lengths: list[int], n_seqs: int, n_new: int, group: int, fixed: bool) -> None:
    store, queries = build(lengths, n_seqs, n_new, group)
    if fixed:
        store.fix(7)
        store.append(*(torch.ones(n_seqs, len(lengths) // n_seqs, n_new, 16) for _ in range(2)))
    found = varlen_rows(queries, store, 0.3, literal_varlen)
    torch.testing.assert_close(found, reference_attention(queries, store, 0.3), rtol=1e-5, atol=1e-6)


def test_a_kernel_that_cannot_run_is_refused_not_replaced() -> None:
    store, queries = build([5, 6], 1, 1, 1)
    assert pick_kernel("auto", store) == "sdpa-buckets"
    for name in ("flash-attn", "torch-varlen"):
        with pytest.raises(ConfigError, match="needs CUDA"):
            ragged_attention(queries, store, 0.3, name)
    with pytest.raises(ConfigError, match="sdpa-buckets"):
        ragged_attention(queries, store, 0.3, "sdpa-bucket")


#: Also rows as long as prompts are, which flash kernels split among thread blocks.
LONG = {**LENGTHS, "long": [4096, 300, 4500, 4096]}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("lengths", LONG.values(), ids=LONG.keys())
@pytest.mark.parametrize("n_new", [1, 3])
@pytest.mark.parametrize(("group", "width"), [(1, 128), (4, 16), (4, 64), (8, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("fixed", [False, True], ids=["grows", "fixed"])
@pytest.mark.parametrize("name", ["flash-attn", "torch-varlen", "sdpa-buckets"])
def test_cuda_kernels_equal_the_reference(
    lengths: list[int], n_new: int, group: int, width: int, dtype: torch.dtype, fixed: bool, name: str
) -> None:
    store, queries = build(lengths, 2, n_new, group, width=width)
    moved = RaggedStore([Row(row.keys.cuda().to(dtype), row.values.cuda().to(dtype)) for row in store.dense_rows()], 2)
    if fixed:
        moved.fix(5)
    try:
        pick_kernel(name, moved)
    except ConfigError as error:
        pytest.skip(str(error))
    asked = queries.cuda().to(dtype)
    found, expected = (
        attend.float() for attend in (ragged_attention(asked, moved, 0.3, name), reference_attention(asked, moved, 0.3))
    )
    # The largest error is one of rounding the output: bfloat16 has 8 bits. The mean is the bar.
    largest = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-3}[dtype]
    torch.testing.assert_close(found, expected, rtol=largest, atol=largest)
    assert (found - expected).abs().mean() <= 1e-3
