"""The calls of flash kernels over a ragged store: flash-attn's bucket by bucket, torch's variable-length one for all rows at once.

Shapes: S rows, R rows of a bucket, G query heads of a KV head, N new tokens, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from kvtool.infer.kernels import in_order

if TYPE_CHECKING:
    from torch import Tensor

    from kvtool.infer.ragged import Bucket, RaggedStore


def flash_bucket(queries: Tensor, store: RaggedStore, bucket: Bucket, scaling: float, attend: Callable[..., Tensor]) -> Tensor:
    """One call of flash-attn's decode kernel per bucket."""
    out: Tensor = flash_part(queries, store, bucket, scaling, attend)
    return out.transpose(1, 2)


def flash_part(
    queries: Tensor, store: RaggedStore, bucket: Bucket, scaling: float, attend: Callable[..., Any], skip: int = 0, **more: Any
) -> Any:
    """Return what flash-attn's decode kernel says of a bucket: a batch of R sequences with one KV head and G query heads.

    The first `skip` entries of every row are passed over; queries are ``[R, G, N, D]``, the output is ``[R, N, G, D]``.
    """
    import torch

    keys, values = store.view(bucket, store.keys)[:, skip:], store.view(bucket, store.values)[:, skip:]
    return attend(
        queries.transpose(1, 2).contiguous(),
        keys[:, :, None],
        values[:, :, None],
        cache_seqlens=(store.used(bucket) - skip).to(torch.int32),
        softmax_scale=scaling,
        causal=True,
        **more,
    )


def varlen_rows(queries: Tensor, store: RaggedStore, scaling: float, attend: Callable[..., Any]) -> Tensor:
    """One variable-length call for all rows: row = sequence with one KV head and G query heads.

    The rows are taken in the order in which they lie in the store, so that their offsets ascend, and put back afterwards.
    """

    def attended(rows: Tensor) -> Tensor:
        n_rows, group, n_new, _ = rows.shape
        out: Tensor = varlen_stored(rows, store, scaling, attend)
        return out.view(n_rows, n_new, -1, out.shape[-1]).transpose(1, 2)[:, :group]

    return in_order(queries, store, attended)


def varlen_stored(
    rows: Tensor,
    store: RaggedStore,
    scaling: float,
    attend: Callable[..., Any],
    skip: Sequence[int] | None = None,
    **more: Any,
) -> Any:
    """Return what a variable-length kernel says of rows ``[S, G, N, D]`` in the order in which they lie in the store.

    The first `skip` entries per bucket are passed over. The output is ``[S * N, G, D]``, with two heads for G = N = 1.
    """
    import torch

    n_rows, group, n_new, width = rows.shape
    skip = skip or [0] * len(store.buckets)
    if group == n_new == 1:
        # A row with one query head would be read by one thread block. With two, which say the same, the flash kernels split its
        # entries among many: torch takes that path for a single new token with more query heads than KV heads, and no window.
        rows, group = rows.expand(-1, 2, -1, -1), 2
    placed = list(zip(store.buckets, skip, strict=True))
    starts = [torch.arange(b.n_rows, device=store.device) * b.capacity + (b.start + n) for b, n in placed]
    # Filled on the device: a copy from the host cannot be captured.
    end = torch.full((1,), store.keys.shape[0], device=store.device)
    return attend(
        rows.transpose(1, 2).reshape(n_rows * n_new, group, width),
        store.keys[:, None],
        store.values[:, None],
        torch.arange(0, (n_rows + 1) * n_new, n_new, device=store.device, dtype=torch.int32),
        torch.cat([*starts, end]).to(torch.int32),
        n_new,
        max(store.shown(b) - n for b, n in placed),
        scale=scaling,
        # A single new token is the last one: there is nothing to hide from it.
        window_size=(-1, 0) if n_new > 1 else (-1, -1),
        enable_gqa=True,
        seqused_k=torch.cat([store.used(b) - n for b, n in placed]).to(torch.int32),
        **more,
    )
