"""A compressed KV cache that drops into ``model.generate(..., past_key_values=CompressedCache("snapkv:budget=10%", model))``.

The first forward is the prompt. Each layer answers it with plain causal attention, then the policy chooses what stays,
and the chosen entries move into a ragged store; with a layer-local allocator that happens layer by layer, so that the
whole prompt is never held for all layers. Later forwards append to the stores. Positions go on from the tokens seen.

Shapes: B sequences, Q query heads, H KV heads, N new tokens, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

from transformers.cache_utils import Cache, CacheLayerMixin

from kvtool.attention import AttentionCall, dense_attention, forget_handover, hand_over, prepare
from kvtool.errors import ConfigError, KvtoolError, UnsupportedModelError
from kvtool.infer.cascade import Cascade, cascades
from kvtool.infer.chunks import ChunkedPrompt, part_of
from kvtool.infer.hold import Holding, hold, own_bounds
from kvtool.infer.kernels import check_kernel, pick_kernel
from kvtool.infer.live import Kept, PromptLayer, choose, clock, observe
from kvtool.infer.present import decoding_needs
from kvtool.infer.quantized import QuantizedStore
from kvtool.infer.ragged import ROOM, StoreBytes
from kvtool.infer.rotation import cache_positions
from kvtool.models import rotary
from kvtool.policies.base import Policy
from kvtool.policies.leftovers import Leftovers
from kvtool.policies.when import When

if TYPE_CHECKING:
    from torch import Tensor

    from kvtool.infer.evict import HeldLayer
    from kvtool.infer.ragged import RaggedStore
    from kvtool.infer.rotation import CachePositions
    from kvtool.policies.statistics import Rope

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
        self.chunks: ChunkedPrompt | None = None
        self.held: HeldLayer | None = None

    @property
    def store(self) -> RaggedStore | QuantizedStore | None:
        """The entries held; None before compression."""
        return None if self.held is None else self.held.store

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
        self.seen, self.prompt, self.chunks, self.held = 0, None, None, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refuse beam search."""
        raise UnsupportedModelError("beam search is not supported with a CompressedCache; use num_beams=1")

    def batch_select_indices(self, *args: Any) -> None:
        """Refuse to pick out or repeat sequences."""
        raise UnsupportedModelError("a CompressedCache keeps its batch as it is; sequences cannot be picked out or repeated")

    batch_repeat_interleave = batch_select_indices

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to take tokens back."""
        raise UnsupportedModelError("assisted decoding does not work with a CompressedCache: evicted entries cannot come back")


class CompressedCache(Cache):  # type: ignore[misc]
    """KV cache compressed by a policy after the first forward; with ``decode=evict`` after every forward.

    The first forward is taken for the prompt. With `generate`'s own ``prefill_chunk_size`` that would be the first chunk only; use
    the policy's ``chunk=n`` instead.

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
        compressed cache and kept (unless the policy evicts while decoding). Needs a layer-local allocator and a batch
        without padding.
    prompt_length : int, optional
        Tokens of the whole prompt, for policies with ``chunk=n`` whose prompt comes in several forwards; default: the first
        forward is the prompt. See `kvtool.infer.chunks.prefill_in_chunks`.
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
        prompt_length: int | None = None,
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
        self.prompt_length = prompt_length
        self.keep_positions = keep_positions
        self.kept: dict[int, list[list[Tensor]]] = {}
        self.compress_s = 0.0
        self._parts = self.policy.method.parts()
        self._rope = None if model is None else rotary(model)
        self._positions: CachePositions | None = None
        evicts = self.policy.when.decode == "evict"
        self._n_recent = decoding_needs(self.policy).n_queries if evicts else self.policy.compensation.n_queries
        self._cascades = model is not None and cascades(self.policy, model)
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
        self._check_moments(model is not None)
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
        rope: Rope | None = None,
        seeds: int | Sequence[int] = 0,
    ) -> CompressedCache:
        """Build the cache from a prompt that has run already; the prompt is left as it is, for other policies.

        Parameters
        ----------
        prompt : sequence of PromptLayer
            All layers.
        kept : Kept
            From `kvtool.infer.live.choose`.
        rope : Rope or None
            How the model rotates (`kvtool.models.rotary`), for ``positions=cache``.
        """
        cache = cls(policy, kernel=kernel, room=room, seeds=seeds)
        cache.n_layers, cache._rope = len(prompt), rope
        how = cache._holding(len(prompt[0].lengths))
        bounds = own_bounds(prompt, how) or [None] * len(prompt)
        for i, (layer, chosen) in enumerate(zip(prompt, kept, strict=True)):
            state = CompressedLayer()
            state.seen = int(layer.keys.shape[2]) if n_seen is None else n_seen
            state.held = hold(layer, chosen, how, bounds[i])
            cache._note_kernel(state.held.store)
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
        hand_over(key_states, self._decode if layer.held is not None else self._prompt)
        return key_states, value_states

    def _check_moments(self, has_model: bool) -> None:
        """Refuse at once what the policy's moments cannot do."""
        when = self.policy.when
        if when.decode == "evict" or when.chunk:
            decoding_needs(self.policy)
        if when.positions == "cache" and has_model:
            cache_positions(self.policy, self._rope)
        if when.chunk and not (self._parts.allocator.layer_local and has_model):
            raise ConfigError(
                f"policy {self.policy}: chunk= evicts layer by layer while the prompt comes in; it needs the model, as in "
                "CompressedCache(policy, model), and a method whose budgets depend on one layer only"
            )

    def _holding(self, n_rows: int) -> Holding:
        """Return how the layers hold their entries."""
        n_layers, seeds = self.n_layers or len(self.layers), tuple(self._row_seeds(n_rows))
        # One for all layers: it remembers the angles of a step.
        self._positions = self._positions or cache_positions(self.policy, self._rope)
        return Holding(self.policy, n_layers, seeds, self._positions, self.room, self.keep_positions)

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
        if self.policy.when.chunk:
            return self._prompt_in_chunks(call)
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
        first = part_of(call, 0, cut)
        out = dense_attention(first)
        self._take(first)
        self.layers[call.layer].seen += cut
        rest = part_of(call, cut, int(call.keys.shape[2]))
        return torch.cat([out, self._decode(rest)], dim=2)

    def _prompt_in_chunks(self, call: AttentionCall) -> Tensor:
        """Answer the prompt, or the next part of it, chunk by chunk; what goes beyond it is decoded."""
        import torch

        layer, n_new = self.layers[call.layer], int(call.keys.shape[2])
        if layer.chunks is None:
            total = self.prompt_length or self.compress_at_length or n_new
            layer.chunks = ChunkedPrompt(call, self._holding(int(call.keys.shape[0])), total)
            self._pads = layer.chunks.pads
        n_mine = min(n_new, layer.chunks.missing)
        out = layer.chunks.feed(part_of(call, 0, n_mine), self.kernel)
        layer.seen += n_mine
        self.compress_s += layer.chunks.compress_s
        layer.chunks.compress_s = 0.0
        if not layer.chunks.missing:
            layer.held, layer.chunks = layer.chunks.finish(), None
            self._note_kernel(layer.held.store)
            if self.keep_positions:
                self.kept[call.layer] = layer.held.positions()
        return out if n_mine == n_new else torch.cat([out, self._decode(part_of(call, n_mine, n_new))], dim=2)

    def _take(self, call: AttentionCall) -> None:
        """Hold a layer of the prompt, and compress as soon as the policy's allocator allows."""
        layer = self.layers[call.layer]
        layer.prompt = observe(call, self.policy.needs(), self._rope, self._n_recent)
        self._pads = layer.prompt.pads
        self.compress_s += sum(layer.prompt.seconds.values())
        if self._cascades and self.n_layers is not None:
            started = clock(call.keys.device)
            if call.layer == 0:
                self._cascade = Cascade(self.policy, self.n_layers, self._row_seeds(len(layer.prompt.lengths)))
            self._cascade.add(layer.prompt)
            self.compress_s += clock(call.keys.device) - started
        if self.n_layers is not None and self._parts.allocator.layer_local:
            self._compress([call.layer])
        elif call.layer + 1 == self.n_layers:
            self._compress(range(self.n_layers))

    def _compress(self, indices: Sequence[int]) -> None:
        prompts = [prompt for i in indices if (prompt := self.layers[i].prompt) is not None]
        started = clock(prompts[0].keys.device)
        chosen = choose(self.policy, prompts, self.n_layers or len(self.layers), self._row_seeds(len(prompts[0].lengths)))
        how = self._holding(len(prompts[0].lengths))
        bounds = own_bounds(prompts, how) or [None] * len(prompts)
        for i, (index, prompt, kept) in enumerate(zip(indices, prompts, chosen, strict=True)):
            layer = self.layers[index]
            layer.held = hold(prompt, kept, how, bounds[i])
            layer.prompt = None
            self._note_kernel(layer.held.store)
            if self.keep_positions:
                self.kept[index] = kept
        self.compress_s += clock(prompts[0].keys.device) - started

    def _decode(self, call: AttentionCall) -> Tensor:
        """Answer new tokens: append them, attend to the store, evict if the policy does."""
        layer = self.layers[call.layer]
        store, n_seqs = layer.held.store, int(call.keys.shape[0])
        if store.n_seqs != n_seqs:
            raise ConfigError(f"the cache holds {store.n_seqs} sequences, the model was called with {n_seqs}; use a new cache")
        n_new = int(call.keys.shape[2])
        if call.padding is not None and not bool(call.padding[:, -n_new:].all()):
            raise ConfigError("padding after the prompt is not supported with a CompressedCache; pad the prompt on the left")
        layer.seen += n_new
        return layer.held.feed(call, self.kernel)  # type: ignore[no-any-return]

    def _row_seeds(self, n_rows: int) -> list[int]:
        seeds = [self.seeds] * n_rows if isinstance(self.seeds, int) else list(self.seeds)
        if len(seeds) != n_rows:
            raise ConfigError(f"{len(seeds)} seeds were given for a batch of {n_rows} rows")
        return seeds

    def _note_kernel(self, store: RaggedStore | QuantizedStore) -> None:
        self.kernels_used.add(pick_kernel(self.kernel, store))

    @property
    def stores(self) -> list[RaggedStore | QuantizedStore]:
        """The stores of all layers; empty before compression."""
        return [layer.store for layer in self.layers if layer.store is not None]

    @property
    def left(self) -> Leftovers:
        """What the policy's compensation did, summed over layers."""
        total = Leftovers()
        for layer in self.layers:
            if layer.held is not None and layer.held.left is not None:
                total.add(layer.held.left)
        return total

    @property
    def quantized(self) -> dict[str, float] | None:
        """Layers that are quantized and those left alone, and the share of all entries in codes; None without quantization."""
        if not self.policy.quant.active:
            return None
        found = [store for store in self.stores if isinstance(store, QuantizedStore)]
        n_coded, n_all = sum(store.n_coded for store in found), sum(sum(store.lengths) for store in self.stores)
        return {"layers": len(found), "left_alone": len(self.stores) - len(found), "share": n_coded / n_all if n_all else 0.0}

    @property
    def kernel_name(self) -> str:
        """Kernels in use, joined by ``+``."""
        return "+".join(sorted(self.kernels_used))

    def check_capacities(self) -> None:
        """Check that no head of a policy that evicts while decoding holds more than its capacity.

        Raises
        ------
        KvtoolError
            A cut was missed, and no result may be written.
        """
        for index, layer in enumerate(self.layers):
            eviction = None if layer.held is None else layer.held.eviction
            for n, limit in zip(layer.store.lengths, eviction.limits, strict=True) if eviction is not None else ():
                if limit is not None and n > limit:
                    raise KvtoolError(f"policy {self.policy}: layer {index} holds {n} entries in a head with capacity {limit}")

    def count_bytes(self) -> StoreBytes:
        """Count the bytes of all layers from their tensors."""
        extra = sum(layer.held.extra_bytes() for layer in self.layers if layer.held is not None)
        return reduce(lambda a, b: a + b, (store.count_bytes() for store in self.stores), StoreBytes(extra, 0))

    def entries(self) -> list[list[list[int]]]:
        """Return the entries held per ``[layer][row][KV head]``."""
        return [[s.lengths[b * s.n_kv_heads : (b + 1) * s.n_kv_heads] for b in range(s.n_seqs)] for s in self.stores]


def check_moments(policies: Sequence[Policy], model: Any) -> None:
    """Refuse policies whose moments of eviction this model, or their method, cannot serve.

    Raises
    ------
    ConfigError
        Of the first one, with what to do.
    """
    for policy in policies:
        if policy.when != When():
            CompressedCache(policy, model)
