"""Two kernels for one step: entries with a logit bias in float32, all others in a flash kernel, merged by their log-sum-exps.

Flash kernels take no bias, but return the log-sum-exp of the logits they saw. What stands for evicted entries lies at the front of
every row (`kvtool.infer.hold.compensated_store`), so a step splits each row: its first entries, the same number for all rows of a
bucket, are attended densely with their bias in float32, the rest, new tokens included, by the flash kernel.

Shapes: S rows in the order in which they lie in the store, R rows of a bucket, G query heads of a KV head, N new tokens,
M = G * N, P biased entries, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from kvtool.errors import KvtoolError
from kvtool.infer.flash import flash_part, varlen_stored
from kvtool.infer.kernels import MERGED, Partial, reference_attention, run_kernel
from kvtool.infer.ragged import RaggedStore, Row

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: Largest error that `probe` lets pass: rounding of half precision on numbers of order 1.
PROBE_ERROR = 2e-2


def merge_attention(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merge attention of the same queries over disjoint sets of entries into attention over all of them.

    Exact but for rounding: out = sum_i out_i e^(lse_i - m) / sum_i e^(lse_i - m), m the largest lse, which no logits overflow.

    Parameters
    ----------
    outputs : sequence of Tensor ``[..., D]``
        Of any floating dtype.
    lses : sequence of Tensor ``[...]``
        Natural log of the sum of exp(logit) over each part's entries. -inf: the part has no entry that the query sees; its output
        is not looked at and may be NaN. Kernels disagree about that case (0 in torch's CPU kernel, +inf in flash-attn), so
        whoever calls them must see to it that a query sees something, or put -inf there.

    Returns
    -------
    Tensor ``[..., D]``, Tensor ``[...]``
        Output and log-sum-exp in float32 (float64 where a part is float64); 0 and -inf where no part has an entry.
    """
    import torch

    wide = torch.float64 if torch.float64 in {t.dtype for t in (*outputs, *lses)} else torch.float32
    stacked = torch.stack([lse.to(wide) for lse in lses])
    top = stacked.amax(dim=0).clamp(min=torch.finfo(wide).min)
    weights = (stacked - top).exp()
    total = weights.sum(dim=0)
    merged = torch.zeros((), dtype=wide, device=top.device)
    for out, weight in zip(outputs, weights, strict=True):
        seen = weight[..., None]
        merged = merged + torch.where(seen > 0, out.to(wide), 0) * seen
    # The largest weight is 1, unless there is no entry at all.
    return merged / total.clamp(min=1)[..., None], top + total.log()


def biased_attention(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Attention over entries with a logit bias, all of which every query sees; all sums in float32 (float64 for float64 inputs).

    Parameters
    ----------
    queries : Tensor ``[R, M, D]``
    keys, values : Tensor ``[R, P, D]``
        P may be 0.
    bias : Tensor ``[R, P]``
        Added to the scaled logits; -inf hides an entry.
    scaling : float
        Factor of the logits.

    Returns
    -------
    Tensor ``[R, M, D]``, Tensor ``[R, M]``
        Output and log-sum-exp, as `merge_attention` takes them.
    """
    import torch

    wide = torch.float64 if queries.dtype == torch.float64 else torch.float32
    if not keys.shape[1]:
        return (
            queries.new_zeros(*queries.shape[:2], values.shape[-1], dtype=wide),
            queries.new_full(queries.shape[:2], float("-inf"), dtype=wide),
        )
    logits = torch.baddbmm(bias[:, None].to(wide), queries.to(wide) * scaling, keys.to(wide).transpose(1, 2))
    found = Partial.of(logits, values.to(wide))
    return found.output(), (found.top + found.total.log())[..., 0]


def merged_rows(
    rows: Tensor, store: RaggedStore, scaling: float, plain: Callable[[Tensor, Sequence[int]], tuple[Tensor, Tensor]]
) -> Tensor:
    """Attention over a store with biases: `plain` for the entries behind the biased ones, and the biased ones, merged.

    Parameters
    ----------
    rows : Tensor ``[S, G, N, D]``
        Queries, in the order in which the rows lie in the store.
    store : RaggedStore
        `kvtool.infer.ragged.RaggedStore.biased` says how many entries of each bucket's rows are biased.
    scaling : float
    plain : callable
        From the queries and the number of entries to pass over per bucket to output ``[S, G, N, D]`` and log-sum-exp ``[S, G, N]``.

    Returns
    -------
    Tensor ``[S, G, N, D]`` in the dtype of the queries.

    Raises
    ------
    KvtoolError
        A row has fewer entries than are taken for biased, new tokens not counted.
    """
    import torch

    assert store.bias is not None
    n_rows, group, n_new, width = rows.shape
    if any(n > b.shortest + store.grown - n_new for b, n in zip(store.buckets, store.biased, strict=True)):
        raise KvtoolError(f"biased entries reach into the {n_new} new tokens of a store; use kernel 'sdpa-buckets'")
    outputs, lses, first = [], [], 0
    for bucket, n_biased in zip(store.buckets, store.biased, strict=True):
        keys, values, bias = (store.view(bucket, flat)[:, :n_biased] for flat in (store.keys, store.values, store.bias))
        mine = rows[first : first + bucket.n_rows].reshape(bucket.n_rows, group * n_new, width)
        out, lse = biased_attention(mine, keys, values, bias, scaling)
        outputs.append(out)
        lses.append(lse)
        first += bucket.n_rows
    out, lse = (parts[0] if len(parts) == 1 else torch.cat(parts) for parts in (outputs, lses))
    others, other_lse = plain(rows, store.biased)
    shape = (n_rows, group, n_new)
    merged, _ = merge_attention([others, out.view(*shape, -1)], [other_lse, lse.view(shape)])
    return merged.to(rows.dtype)


def merged_varlen(rows: Tensor, store: RaggedStore, scaling: float, attend: Callable[..., Any], aux: object) -> Tensor:
    """Merge with torch's variable-length kernel; `aux` is its request for the log-sum-exp.

    Never run on CUDA: tested on the CPU with a literal kernel in its place. The log-sum-exp is taken as ``[heads, tokens]``, as
    torch's shape function and kernels have it, although the page of `varlen_attn` says ``[tokens, heads]``; `probe` tells.
    """

    def plain(rows: Tensor, skip: Sequence[int]) -> tuple[Tensor, Tensor]:
        n_rows, group, n_new, _ = rows.shape
        out, lse = varlen_stored(rows, store, scaling, attend, skip, return_aux=aux)
        out = out.view(n_rows, n_new, *out.shape[1:]).transpose(1, 2)
        return out[:, :group], lse.reshape(-1, n_rows, n_new).transpose(0, 1)[:, :group]

    return merged_rows(rows, store, scaling, plain)


def merged_flash(rows: Tensor, store: RaggedStore, scaling: float, attend: Callable[..., tuple[Tensor, Tensor]]) -> Tensor:
    """Merge with flash-attn's decode kernel, one call per bucket.

    Never run on CUDA: tested on the CPU with a literal kernel in its place.
    """
    import torch

    def plain(rows: Tensor, skip: Sequence[int]) -> tuple[Tensor, Tensor]:
        found, first = [], 0
        for bucket, n in zip(store.buckets, skip, strict=True):
            mine = rows[first : first + bucket.n_rows]
            found.append(flash_part(mine, store, bucket, scaling, attend, n, return_softmax_lse=True))
            first += bucket.n_rows
        out, lse = (torch.cat(parts) for parts in zip(*found, strict=True))
        return out.transpose(1, 2), lse

    return merged_rows(rows, store, scaling, plain)


@lru_cache(maxsize=64)
def probe(name: str, device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """Run a merged kernel on four short rows with biases, once per process; return what is wrong with it, or None.

    What a kernel's log-sum-exp means is not the same in all versions: one that is off would spoil every token without a word.
    """
    for n_new, group in ((1, 4), (1, 1), (3, 4)):
        store, queries = _probe_case(device, dtype, width, n_new, group)
        try:
            found = run_kernel(MERGED[name], queries, store, width**-0.5)
            error = float((found.double() - reference_attention(queries, store, width**-0.5).double()).abs().max())
        except (AttributeError, ImportError, RuntimeError, TypeError, ValueError) as failure:
            return f"{name} with its log-sum-exp failed here: {str(failure).splitlines()[0] if str(failure) else type(failure).__name__}"
        # Not "error > ...": NaN is wrong, too.
        if not error <= PROBE_ERROR:
            return f"{name} with its log-sum-exp is off by {error:.3g} here"
    return None


def _probe_case(device: torch.device, dtype: torch.dtype, width: int, n_new: int, group: int) -> tuple[RaggedStore, Tensor]:
    """Return a store of two sequences with two KV heads of several lengths, and queries ``[2, 2 * group, N, D]``."""
    import torch

    # Drawn on the CPU: the device's own generator is left as it is.
    generator = torch.Generator().manual_seed(0)
    rows = []
    for n in (40, 9, 23, 38):
        keys, values = (torch.randn(n, width, generator=generator).to(device, dtype) for _ in range(2))
        bias = torch.tensor([3.0, 0.0, 1.5] + [0.0] * (n - 3))
        rows.append(Row(keys, values, bias=bias.to(device)))
    store = RaggedStore(rows, 2, room=8)
    new = [torch.randn(2, 2, n_new, width, generator=generator).to(device, dtype) for _ in range(2)]
    store.append(new[0], new[1])
    return store, torch.randn(2, 2 * group, n_new, width, generator=generator).to(device, dtype)
