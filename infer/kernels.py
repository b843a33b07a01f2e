"""Attention of new tokens over a ragged store, behind one function.

Shapes: B sequences, Q query heads, H KV heads, G = Q / H, N new tokens, D head dimension, S = B * H rows, R rows of a bucket.
The new tokens are the last N entries of every row and are causal among themselves. The G query heads of a KV head are
folded into the query axis, so KV heads are never repeated.

============== ===================================== =============================================================
name           where                                 how
============== ===================================== =============================================================
flash-attn     CUDA, half precision, package there   ``flash_attn_with_kvcache`` per bucket
torch-varlen   CUDA, half precision, torch's own     ``torch.nn.attention.varlen``, one call for all rows
...-merged     as flash-attn and torch-varlen        few entries with a logit bias in float32 beside them (`kvtool.infer.merge`)
sdpa-buckets   everywhere                            SDPA per bucket; one call and no copy where all lengths are equal
dequant-chunks everywhere, quantized stores          float32 sums, codes chunk by chunk, parts merged by log-sum-exp
reference      everywhere                            literal float64, one row and head at a time
============== ===================================== =============================================================
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from kvtool.errors import ConfigError, near_matches
from kvtool.infer.quantized import QuantizedStore

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kvtool.infer.ragged import Bucket, RaggedStore

KERNELS = ("auto", "flash-attn", "torch-varlen", "sdpa-buckets", "reference")

#: What stands for a flash kernel where entries have a logit bias, which it cannot take.
MERGED = {"flash-attn": "flash-attn-merged", "torch-varlen": "torch-varlen-merged"}

#: Biased entries that a merged kernel takes, as a share of all: they are copied to float32. Not measured on a GPU.
MOST_BIASED = 0.25

#: What runs for a quantized store, unless the reference is asked for.
DEQUANT = "dequant-chunks"


@dataclass(slots=True)
class Partial:
    """Attention over a part of the entries, not yet divided by its sum: any number of parts merge exactly.

    Attributes
    ----------
    top : Tensor ``[R, M, 1]``
        Largest logit; the smallest finite number where nothing is visible.
    total : Tensor ``[R, M, 1]``
        Sum of ``exp(logit - top)``; the part's log-sum-exp is ``top + log(total)``.
    weighted : Tensor ``[R, M, D]``
        The same sum of values.
    """

    top: Tensor
    total: Tensor
    weighted: Tensor

    @classmethod
    def of(cls, logits: Tensor, values: Tensor) -> Partial:
        """Take a part in: logits ``[R, M, n]`` (overwritten; hidden entries are -inf) and values ``[R, n, D]``."""
        import torch

        top = logits.amax(dim=-1, keepdim=True).clamp_(min=torch.finfo(logits.dtype).min)
        weights = logits.sub_(top).exp_()
        return cls(top, weights.sum(dim=-1, keepdim=True), weights @ values)

    @classmethod
    def join(cls, parts: Sequence[Partial]) -> Partial:
        """Put parts of different rows one behind the other."""
        import torch

        if len(parts) == 1:
            return parts[0]
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in ("top", "total", "weighted")))

    def add(self, other: Partial, rows: Tensor | None = None) -> None:
        """Merge in place the same queries' attention over other entries, of all rows or of some (int64)."""
        import torch

        mine = self if rows is None else Partial(*(t.index_select(0, rows) for t in (self.top, self.total, self.weighted)))
        top = torch.maximum(mine.top, other.top)
        own, new = (mine.top - top).exp_(), (other.top - top).exp_()
        total, weighted = own * mine.total + new * other.total, own * mine.weighted + new * other.weighted
        if rows is None:
            self.top, self.total, self.weighted = top, total, weighted
            return
        for old, merged in ((self.top, top), (self.total, total), (self.weighted, weighted)):
            old.index_copy_(0, rows, merged)

    def output(self) -> Tensor:
        """Return the attention over all parts, ``[R, M, D]``."""
        return self.weighted / self.total


def check_kernel(name: str) -> str:
    """Return `name` if it is a kernel.

    Raises
    ------
    ConfigError
        Unknown, with near matches.
    """
    if name not in KERNELS:
        raise ConfigError(f"unknown kernel {name!r}.{near_matches(name, KERNELS)} Known: {', '.join(KERNELS)}")
    return name


def pick_kernel(requested: str, store: RaggedStore | QuantizedStore) -> str:
    """Return the kernel that will run for this store.

    Sliding-window layers hold true positions and need a mask of their own: they always run in SDPA buckets (or the reference).
    Entries with a logit bias run beside a flash kernel where that is possible and they are few (`MERGED`), else in SDPA buckets too,
    and quantized stores in chunks of their own (or the reference). The name that is returned, and recorded, says so.

    Raises
    ------
    ConfigError
        The requested kernel cannot run here; nothing falls back silently.
    """
    if isinstance(store, QuantizedStore):
        return "reference" if check_kernel(requested) == "reference" else DEQUANT
    flash = [requested] if check_kernel(requested) in MERGED else list(MERGED)
    fit = [name for name in flash if _why_not(name, store) is None]
    if requested == "auto" or (requested in MERGED and (store.window is not None or store.bias is not None)):
        return "sdpa-buckets" if not fit else fit[0] if store.bias is None else MERGED[fit[0]]
    why = _why_not(requested, store) if requested in MERGED else None
    if why is not None:
        raise ConfigError(f"kernel {requested!r} cannot run: {why}; use kernel 'auto' or 'sdpa-buckets'")
    return requested


def _why_not(name: str, store: RaggedStore) -> str | None:
    """Return why a flash kernel cannot serve a store, with biases beside it where there are any; None if it can."""
    why = _why_not_at_all(name, store)
    if why is not None or store.bias is None:
        return why
    if not store.splits(MOST_BIASED):
        return "too many entries have a logit bias"
    from kvtool.infer.merge import probe

    return probe(name, store.device, store.keys.dtype, int(store.keys.shape[1]))


def _why_not_at_all(name: str, store: RaggedStore) -> str | None:
    import torch

    width = store.keys.shape[1]
    if store.device.type != "cuda":
        return f"it needs CUDA, the cache is on {store.device.type}"
    if store.keys.dtype not in (torch.float16, torch.bfloat16):
        return f"it needs float16 or bfloat16, the cache holds {store.keys.dtype}"
    if width % 8 or width > 256 or store.values.shape[1] != width:
        return f"head dimension {width} is not a multiple of 8 up to 256"
    if store.window is not None:
        return "the layer has a sliding window"
    return _missing(name)


@lru_cache(maxsize=4)
def _missing(name: str) -> str | None:
    """Return what this installation lacks for a kernel."""
    if name == "flash-attn":
        return None if importlib.util.find_spec("flash_attn") else "flash-attn is not installed (pip install 'kvtool[flash]')"
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return "this torch has no torch.nn.attention.varlen"
    needed = {"seqused_k", "enable_gqa", "window_size", "scale", "return_aux"} - set(inspect.signature(varlen_attn).parameters)
    return f"this torch's varlen_attn has no {', '.join(sorted(needed))}" if needed else None


def ragged_attention(queries: Tensor, store: RaggedStore | QuantizedStore, scaling: float, kernel: str = "auto") -> Tensor:
    """Attention of the newest N entries of every row over all entries of the row.

    Parameters
    ----------
    queries : Tensor ``[B, Q, N, D]``
    store : RaggedStore or QuantizedStore
        Holds the keys and values of these N tokens already, as the last ones.
    scaling : float
        Factor of the logits.
    kernel : str
        One of `KERNELS`.

    Returns
    -------
    Tensor ``[B, Q, N, D]``
    """
    if isinstance(store, QuantizedStore):
        name = pick_kernel(kernel, store)
    else:
        # What a kernel needs changes only when the store is laid out anew.
        if store.kernel is None or store.kernel[0] != kernel:
            store.kernel = kernel, pick_kernel(kernel, store)
        name = store.kernel[1]
    if name == "reference":
        return reference_attention(queries, store, scaling)
    if isinstance(store, QuantizedStore):
        from kvtool.infer.quantized_attention import quantized_attention

        return quantized_attention(queries, store, scaling)
    return run_kernel(name, queries, store, scaling)


def run_kernel(name: str, queries: Tensor, store: RaggedStore, scaling: float) -> Tensor:
    """Run the kernel that `pick_kernel` named, see `ragged_attention`."""
    if name == MERGED["torch-varlen"]:
        from torch.nn.attention.varlen import AuxRequest, varlen_attn

        from kvtool.infer.merge import merged_varlen

        return in_order(queries, store, lambda rows: merged_varlen(rows, store, scaling, varlen_attn, AuxRequest(lse=True)))
    if name == MERGED["flash-attn"]:
        from flash_attn import flash_attn_with_kvcache

        from kvtool.infer.merge import merged_flash

        return in_order(queries, store, lambda rows: merged_flash(rows, store, scaling, flash_attn_with_kvcache))
    if name == "torch-varlen":
        from torch.nn.attention.varlen import varlen_attn

        from kvtool.infer.flash import varlen_rows

        return varlen_rows(queries, store, scaling, varlen_attn)
    if name == "flash-attn":
        from flash_attn import flash_attn_with_kvcache

        from kvtool.infer.flash import flash_bucket

        return _by_bucket(queries, store, lambda q, b: flash_bucket(q, store, b, scaling, flash_attn_with_kvcache))
    if queries.shape[2] == 1 and store.window is None:
        return _sdpa_token(queries, store, scaling)
    return _by_bucket(queries, store, lambda q, b: _sdpa_bucket(q, store, b, scaling))


def in_order(queries: Tensor, store: RaggedStore, attend: Callable[[Tensor], Tensor]) -> Tensor:
    """Run `attend` (``[S, G, N, D] -> [S, G, N, D]``) on rows in the order in which they lie in the store, and put them back."""
    n_seqs, n_heads, n_new, _ = queries.shape
    rows = queries.reshape(n_seqs * store.n_kv_heads, n_heads // store.n_kv_heads, n_new, -1)
    if store.stored_rows is not None:
        rows = rows.index_select(0, store.stored_rows)
    out = attend(rows)
    if store.row_places is not None:
        out = out.index_select(0, store.row_places)
    return out.reshape(n_seqs, n_heads, n_new, -1)


def _by_bucket(queries: Tensor, store: RaggedStore, attend: Callable[[Tensor, Bucket], Tensor]) -> Tensor:
    """Run `attend` (``[R, G, N, D] -> [R, G, N, D]``) for every bucket and put the rows back into their order."""
    import torch

    def all_buckets(rows: Tensor) -> Tensor:
        found, first = [], 0
        for bucket in store.buckets:
            found.append(attend(rows[first : first + bucket.n_rows], bucket))
            first += bucket.n_rows
        return found[0] if len(found) == 1 else torch.cat(found)

    return in_order(queries, store, all_buckets)


def _sdpa_token(queries: Tensor, store: RaggedStore, scaling: float) -> Tensor:
    """A single new token per sequence, without a window: nothing is made but what the store keeps up to date."""
    import torch

    sdpa = torch.nn.functional.scaled_dot_product_attention

    n_seqs, n_heads, _, width = queries.shape
    rows = queries.reshape(1, n_seqs * store.n_kv_heads, n_heads // store.n_kv_heads, width)
    if store.stored_rows is not None:
        rows = rows.index_select(1, store.stored_rows)
    found, first = [], 0
    for slab in store.slabs():
        keys, mask = slab.keys, slab.mask
        if store.bias is not None and mask is not None:
            mask = mask.to(_mask_dtype(store))
        mine = rows.narrow(1, first, keys.shape[1])
        found.append(sdpa(mine, keys, slab.values, attn_mask=mask, scale=scaling))
        first += keys.shape[1]
    out = found[0] if len(found) == 1 else torch.cat(found, dim=1)
    if store.row_places is not None:
        out = out.index_select(1, store.row_places)
    return out.reshape(n_seqs, n_heads, 1, -1)


def _sdpa_bucket(queries: Tensor, store: RaggedStore, bucket: Bucket, scaling: float) -> Tensor:
    import torch

    n_rows, group, n_new, width = queries.shape
    keys, values = store.view(bucket, store.keys), store.view(bucket, store.values)
    mask = bucket_mask(store, bucket, n_new)
    if mask is not None and mask.shape[1] > 1:
        mask = mask.repeat(1, group, 1)
    out = torch.nn.functional.scaled_dot_product_attention(
        queries.reshape(1, n_rows, group * n_new, width),
        keys[None],
        values[None],
        attn_mask=None if mask is None else mask[None],
        scale=scaling,
    )
    return out.view(n_rows, group, n_new, -1)


def bucket_mask(store: RaggedStore, bucket: Bucket, n_new: int) -> Tensor | None:
    """Return which entries each new token sees, bool ``[R or 1, N, shown]``, or None for all.

    With logit biases: what is added to the logits, float ``[R, N, shown]``.
    """
    import torch

    equal = bucket.longest == bucket.shortest and not store.fixed
    if equal and n_new == 1 and store.window is None and store.bias is None:
        return None
    lengths = store.used(bucket)
    if equal and store.window is None:
        lengths = lengths[:1]
    columns = torch.arange(store.shown(bucket), device=store.device)
    own = lengths[:, None] - n_new + torch.arange(n_new, device=store.device)
    visible = columns <= own[:, :, None]
    if store.window is not None and store.positions is not None:
        positions = store.view(bucket, store.positions)
        visible &= positions[:, None, :] > positions.gather(1, own)[:, :, None] - store.window
    if store.bias is not None:
        bias = store.view(bucket, store.bias)[:, None, :].expand(-1, n_new, -1)
        return bias.masked_fill(~visible, float("-inf")).to(_mask_dtype(store))
    return visible


def _mask_dtype(store: RaggedStore) -> torch.dtype:
    """Return the dtype of what is added to the logits."""
    import torch

    if store.bias is None or store.device.type == "cuda":
        # CUDA's fused kernels take a mask in the dtype of the queries only: a bias is rounded to half precision there.
        return store.keys.dtype
    return torch.promote_types(store.keys.dtype, torch.float32)


def reference_attention(queries: Tensor, store: RaggedStore | QuantizedStore, scaling: float) -> Tensor:
    """Literal float64 attention, one row and query head at a time: what every kernel is tested against."""
    import torch

    n_seqs, n_heads, n_new, _ = queries.shape
    group = n_heads // store.n_kv_heads
    rows = list(store.dense_rows())
    out = queries.new_empty(n_seqs, n_heads, n_new, rows[0].values.shape[1])
    for r, row in enumerate(rows):
        seq, head = divmod(r, store.n_kv_heads)
        keys, values = row.keys.double(), row.values.double()
        for q in range(head * group, (head + 1) * group):
            for n in range(n_new):
                own = keys.shape[0] - n_new + n
                logits = keys[: own + 1] @ queries[seq, q, n].double() * scaling
                if store.window is not None and row.positions is not None:
                    logits[row.positions[: own + 1] <= row.positions[own] - store.window] = float("-inf")
                if row.bias is not None:
                    logits += row.bias[: own + 1].double()
                out[seq, q, n] = (torch.softmax(logits, 0) @ values[: own + 1]).to(out.dtype)
    return out
