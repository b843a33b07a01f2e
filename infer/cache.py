"""A compressed KV cache that drops into ``model.generate(..., past_key_values=CompressedCache("snapkv:budget=10%", model))``.

The first forward is the prompt. Each layer answers it with plain causal attention, then the policy chooses what stays,
and the chosen entries move into a ragged store; with a layer-local allocator that happens layer by layer, so that the
whole prompt is never held for all layers. Later forwards append to the stores. Positions go on from the tokens seen.

Shapes: B sequences, Q query heads, H KV heads, N new tokens, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from typing import TYPE_CHECKING, Any

from transformers.cache_utils import Cache, CacheLayerMixin

from kvtool.attention import AttentionCall, dense_attention, forget_handover, hand_over, prepare
from kvtool.errors import ConfigError, KvtoolError, UnsupportedModelError
from kvtool.infer.kernels import check_kernel, pick_kernel, ragged_attention
from kvtool.infer.live import Kept, PromptLayer, build_store, choose, clock, observe
from kvtool.infer.ragged import ROOM, RaggedStore, StoreBytes
from kvtool.models import rotary
from kvtool.policies.base import Policy

if TYPE_CHECKING:
    from torch import Tensor

UNFINISHED = "an earlier forward through this CompressedCache did not finish; make a new cache"


class CompressedLayer(CacheLayerMixin):  # type: ignore[misc]
    """State of one layer: the prompt until it is compressed, then the store."""

    is_sliding = False
    is_compileable = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.prompt: PromptLayer | None = None
        self.store: RaggedStore | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the prompt's attention fills the layer."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refuse: only `CompressedCache.update` knows what to do."""
        raise UnsupportedModelError("a layer of a CompressedCache cannot be used on its own; pass the whole cache to the model")

    def get_seq_length(self) -> int:
        """Return the tokens seen, evicted ones included."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of the padding mask: it covers every token ever seen."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: the cache grows."""
        return -1

    get_max_cache_shape = get_max_length  # name in older releases of transformers

    def reset(self) -> None:
        """Forget everything."""
        self.seen, self.prompt, self.store = 0, None, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refuse beam search."""
        raise UnsupportedModelError("beam search is not supported with a CompressedCache; use num_beams=1")

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to take tokens back."""
        raise UnsupportedModelError("assisted decoding does not work with a CompressedCache: evicted entries cannot come back")


class CompressedCache(Cache):  # type: ignore[misc]
    """KV cache compressed by a policy after the first forward.

    Parameters
    ----------
    policy : Policy or str
        Policy or its text form, e.g. ``"snapkv:budget=10%"``.
    model : transformers model, optional
        Switched to kvtool's attention (which computes the same as SDPA for everyone else). Without it, the model must
        have been prepared (`kvtool.attention.prepare`), and compression waits for the second forward, as the number of
        layers is not known before.
    seeds : int or sequence of int
        Seed, or one per row of the batch, for policies that draw.
    compress_at_length : int, optional
        Compress after that many tokens of the first forward; the rest of it (a question, say) is fed on top of the
        compressed cache and always kept. Needs a layer-local allocator and a batch without padding.
    kernel : str
        See `kvtool.infer.kernels.KERNELS`.
    room : int
        Free entries per row before a store grows.
    keep_positions : bool
        Hold the kept sets in the attribute `kept`.

    Raises
    ------
    ConfigError
        Unknown policy or kernel; during the first forward: a budget smaller than the protected entries.
    """

    def __init__(
        self,
        policy: Policy | str,
        model: Any = None,
        *,
        seeds: int | Sequence[int] = 0,
        compress_at_length: int | None = None,
        kernel: str = "auto",
        room: int = ROOM,
        keep_positions: bool = False,
    ) -> None:
        self.policy = Policy.parse(policy) if isinstance(policy, str) else policy
        self.kernel = check_kernel(kernel)
        self.kernels_used: set[str] = set()
        self.room = room
        self.seeds = seeds
        self.compress_at_length = compress_at_length
        self.keep_positions = keep_positions
        self.kept: dict[int, list[list[Tensor]]] = {}
        self.compress_s = 0.0
        self._parts = self.policy.method.parts()
        self._rope = None if model is None else rotary(model)
        self._expected = 0
        self._pads: tuple[int, ...] = ()
        if model is not None:
            prepare(model)
        self.n_layers = None if model is None else int(model.config.get_text_config().num_hidden_layers)
        if compress_at_length is not None and not (self._parts.allocator.layer_local and self.n_layers):
            raise ConfigError(
                f"compress_at_length needs the model and a policy whose budgets depend on one layer only, {self.policy} is not "
                "such a case; feed the context in a first forward and the question in a second one instead"
            )
        super().__init__(layers=[CompressedLayer() for _ in range(self.n_layers or 0)])

    @classmethod
    def from_prompt(
        cls,
        policy: Policy,
        prompt: Sequence[PromptLayer],
        kept: Kept,
        *,
        kernel: str = "auto",
        room: int = ROOM,
        n_seen: int | None = None,
    ) -> CompressedCache:
        """Build the cache from a prompt that has run already; the prompt is left as it is, for other policies.

        Parameters
        ----------
        prompt : sequence of PromptLayer
            All layers.
        kept : Kept
            From `kvtool.infer.live.choose`.
        """
        cache = cls(policy, kernel=kernel, room=room)
        cache.n_layers = len(prompt)
        for layer, chosen in zip(prompt, kept, strict=True):
            state = CompressedLayer()
            state.seen = int(layer.keys.shape[2]) if n_seen is None else n_seen
            state.store = build_store(layer, chosen, room)
            cache._note_kernel(state.store)
            cache.layers.append(state)
        cache._pads = prompt[0].pads
        return cache

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand the attention call that follows over to this cache; the tensors pass through unchanged.

        Raises
        ------
        UnsupportedModelError
            The model does not run kvtool's attention.
        KvtoolError
            An earlier forward through this cache did not finish.
        """
        if layer_idx == 0:
            self._begin_forward()
        while self.n_layers is None and len(self.layers) <= layer_idx:
            self.layers.append(CompressedLayer())
        layer = self.layers[layer_idx]
        if layer.seen != self._expected:
            raise KvtoolError(UNFINISHED)
        hand_over(key_states, self._decode if layer.store is not None else self._prompt)
        return key_states, value_states

    def _begin_forward(self) -> None:
        """Clear what an exception may have left, and compress a prompt that had to wait for its last layer."""
        forget_handover()
        n_seen = {layer.seen for layer in self.layers}
        if len(n_seen) > 1:
            raise KvtoolError(UNFINISHED)
        if self.layers and self.layers[0].prompt is not None:
            self._compress(range(len(self.layers)))
        self._expected = n_seen.pop() if n_seen else 0

    def _prompt(self, call: AttentionCall) -> Tensor:
        """Answer the prompt: plain attention, then compression."""
        cut = self.compress_at_length
        if cut is not None and cut < call.keys.shape[2]:
            return self._prompt_then_rest(call, cut)
        out = dense_attention(call)
        self._take(call)
        self.layers[call.layer].seen += int(call.keys.shape[2])
        return out

    def _prompt_then_rest(self, call: AttentionCall, cut: int) -> Tensor:
        import torch

        if call.padding is not None:
            raise ConfigError("compress_at_length works on batches without padding; group prompts of equal length")
        first = replace(call, queries=call.queries[:, :, :cut], keys=call.keys[:, :, :cut], values=call.values[:, :, :cut])
        out = dense_attention(first)
        self._take(first)
        self.layers[call.layer].seen += cut
        rest = replace(call, queries=call.queries[:, :, cut:], keys=call.keys[:, :, cut:], values=call.values[:, :, cut:])
        return torch.cat([out, self._decode(rest)], dim=2)

    def _take(self, call: AttentionCall) -> None:
        """Hold a layer of the prompt, and compress as soon as the policy's allocator allows."""
        layer = self.layers[call.layer]
        layer.prompt = observe(call, self._parts.needs(), self._rope)
        self._pads = layer.prompt.pads
        self.compress_s += sum(layer.prompt.seconds.values())
        if self.n_layers is not None and self._parts.allocator.layer_local:
            self._compress([call.layer])
        elif call.layer + 1 == self.n_layers:
            self._compress(range(self.n_layers))

    def _compress(self, indices: Sequence[int]) -> None:
        prompts = [prompt for i in indices if (prompt := self.layers[i].prompt) is not None]
        started = clock(prompts[0].keys.device)
        chosen = choose(self.policy, prompts, self.n_layers or len(self.layers), self._row_seeds(len(prompts[0].lengths)))
        for index, prompt, kept in zip(indices, prompts, chosen, strict=True):
            layer = self.layers[index]
            layer.store = build_store(prompt, kept, self.room)
            layer.prompt = None
            self._note_kernel(layer.store)
            if self.keep_positions:
                self.kept[index] = kept
        self.compress_s += clock(prompts[0].keys.device) - started

    def _decode(self, call: AttentionCall) -> Tensor:
        """Answer new tokens: append them, attend to the store."""
        import torch

        layer = self.layers[call.layer]
        store = layer.store
        if store.n_seqs != call.keys.shape[0]:
            raise ConfigError(
                f"the cache holds {store.n_seqs} sequences, the model was called with {call.keys.shape[0]}; use a new cache"
            )
        n_new = int(call.keys.shape[2])
        if call.padding is not None and not bool(call.padding[:, -n_new:].all()):
            raise ConfigError("padding after the prompt is not supported with a CompressedCache; pad the prompt on the left")
        positions = None
        if store.window is not None:
            first = layer.seen - torch.tensor(self._pads, device=store.device)
            positions = first[:, None] + torch.arange(n_new, device=store.device)
        store.append(call.keys, call.values, positions)
        layer.seen += n_new
        return ragged_attention(call.queries, store, call.scaling, self.kernel)

    def _row_seeds(self, n_rows: int) -> list[int]:
        seeds = [self.seeds] * n_rows if isinstance(self.seeds, int) else list(self.seeds)
        if len(seeds) != n_rows:
            raise ConfigError(f"{len(seeds)} seeds were given for a batch of {n_rows} rows")
        return seeds

    def _note_kernel(self, store: RaggedStore) -> None:
        self.kernels_used.add(pick_kernel(self.kernel, store))

    @property
    def stores(self) -> list[RaggedStore]:
        """The stores of all layers; empty before compression."""
        return [layer.store for layer in self.layers if layer.store is not None]

    @property
    def kernel_name(self) -> str:
        """Kernels in use, joined by ``+``."""
        return "+".join(sorted(self.kernels_used))

    def count_bytes(self) -> StoreBytes:
        """Count the bytes of all layers from their tensors."""
        return reduce(lambda a, b: a + b, (store.count_bytes() for store in self.stores), StoreBytes(0, 0))

    def entries(self) -> list[list[list[int]]]:
        """Return the entries held per ``[layer][row][KV head]``."""
        return [[s.lengths[b * s.n_kv_heads : (b + 1) * s.n_kv_heads] for b in range(s.n_seqs)] for s in self.stores]
