"""Cache positions: keys are held without rotation and rotated by their index in the cache (StreamingLLM, arXiv 2309.17453).

The model hands over rotated queries and keys. They are turned back by their true position as they come in, and turned to
their index in the cache when attention needs them: the newest token of a cache of n entries stands at n - 1. A constant
offset of the model's positions (left padding that is counted, say) turns queries and keys alike and cancels in the logits.

Shapes: B sequences, Q query heads, H KV heads, N new tokens, D head dimension, S = B * H rows.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtool.errors import ConfigError
from kvtool.infer.ragged import RaggedStore

if TYPE_CHECKING:
    from torch import Tensor

    from kvtool.policies.base import Policy
    from kvtool.policies.statistics import Rope


@dataclass(frozen=True, slots=True)
class CachePositions:
    """Rotation by index in the cache.

    Attributes
    ----------
    rope : Rope
        How the model rotates.
    """

    rope: Rope

    def turn_back(self, x: Tensor, positions: Tensor) -> Tensor:
        """Take the model's rotation off ``[..., T, D]`` at the true `positions` ``[..., T]``."""
        return self.rope.rotate(_wide(x), positions, sign=-1.0).to(x.dtype)

    def enter(self, x: Tensor, first: Tensor) -> Tensor:
        """Take the rotation off new tokens ``[B, heads, N, D]`` whose first true positions are `first` ``[B]``."""
        import torch

        positions = first[:, None] + torch.arange(x.shape[2], device=x.device)
        return self.turn_back(x, positions[:, None])

    def attended(self, store: RaggedStore) -> RaggedStore:
        """Return a store with the same entries whose keys are rotated by their index; only the keys are copied."""
        import torch

        turned = copy.copy(store)
        # Zeros, not garbage: padding inside a bucket is masked, but 0 * NaN would still be NaN.
        turned.keys = torch.zeros_like(store.keys)
        for bucket in store.buckets:
            keys = store.view(bucket, store.keys)
            index = torch.arange(keys.shape[1], device=keys.device)
            store.view(bucket, turned.keys)[:] = self.rope.rotate(_wide(keys), index).to(keys.dtype)
        return turned

    def queries(self, x: Tensor, store: RaggedStore) -> Tensor:
        """Rotate the queries ``[B, Q, N, D]`` of the newest N entries of every row by the index of their own entries."""
        import torch

        n_seqs, n_heads, n_new, width = x.shape
        lengths = torch.tensor(store.lengths, device=x.device)
        index = lengths[:, None] - n_new + torch.arange(n_new, device=x.device)
        rows = x.reshape(n_seqs * store.n_kv_heads, n_heads // store.n_kv_heads, n_new, width)
        return self.rope.rotate(_wide(rows), index[:, None]).to(x.dtype).view(n_seqs, n_heads, n_new, width)


def _wide(x: Tensor) -> Tensor:
    """Rotate in float32 at least, as models do with their angles."""
    import torch

    return x if x.dtype == torch.float64 else x.float()


def cache_positions(policy: Policy, rope: Rope | None) -> CachePositions | None:
    """Return the rotation that `policy` asks for, None for true positions.

    Raises
    ------
    ConfigError
        The model has no rotary embedding, or one that cannot be undone.
    """
    if policy.when.positions == "true":
        return None
    if rope is None:
        raise ConfigError(
            f"policy {policy}: positions=cache needs a model with one rotary embedding whose frequencies do not change, "
            "and the model itself as CompressedCache(policy, model); this is not known here, use positions=true"
        )
    if not rope.inv_freq.numel():
        raise ConfigError(f"policy {policy}: positions=cache is for rotary embeddings, the model has none; use positions=true")
    return CachePositions(rope)
