"""Routes a model's attention through kvtool, by the public hook of transformers 5 (``AttentionInterface``).

A model set to the implementation ``"kvtool"`` calls `_attention`, which hands the post-RoPE tensors to a handler: the one a
cache handed over for this very call (`hand_over`), else the one installed by `attention_handler`, else plain SDPA.

Shapes: B batch, Q query heads, H KV heads, D head dimension, N new tokens, K keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kvtool.errors import UnsupportedModelError

if TYPE_CHECKING:
    from torch import Tensor

ATTENTION = "kvtool"


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One attention call of a model.

    Attributes
    ----------
    layer : int
    queries : Tensor ``[B, Q, N, D]``
        Post-RoPE.
    keys, values : Tensor ``[B, H, K, D]``
        What the cache's ``update`` returned, or the new tokens' own without a cache; KV heads are not repeated.
    padding : Tensor ``[B, K]`` of bool, or None
        True for real tokens; None where nothing is padded.
    scaling : float
        Factor of the logits.
    window : int or None
        Width of a sliding-window layer.
    module : object
        The model's attention module.
    """

    layer: int
    queries: Tensor
    keys: Tensor
    values: Tensor
    padding: Tensor | None
    scaling: float
    window: int | None
    module: Any = None


#: Returns the attention output ``[B, Q, N, D]``.
Handler = Callable[[AttentionCall], "Tensor"]


@dataclass(slots=True)
class _Handover:
    keys: Tensor
    handler: Handler


_installed: ContextVar[Handler | None] = ContextVar("kvtool_handler", default=None)
_handed: ContextVar[_Handover | None] = ContextVar("kvtool_handover", default=None)
_watching: ContextVar[Callable[[Handler, AttentionCall], Tensor] | None] = ContextVar("kvtool_watch", default=None)


def register() -> None:
    """Make the attention implementation ``"kvtool"`` known to transformers; harmless to repeat."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask

    AttentionInterface.register(ATTENTION, _attention)
    # The mask of the flash family: None, or the plain [B, K] padding mask; nothing of size N x K is built.
    AttentionMaskInterface.register(ATTENTION, flash_attention_mask)


def prepare(model: Any) -> None:
    """Switch a loaded model to kvtool's attention; without a kvtool cache or handler it computes what SDPA computes."""
    register()
    if model.config._attn_implementation != ATTENTION:
        model.set_attn_implementation(ATTENTION)


@contextmanager
def attention_handler(model: Any, handler: Handler) -> Iterator[None]:
    """Send all attention calls of `model` to `handler`; everything is restored at the end, after an exception too."""
    before = model.config._attn_implementation
    prepare(model)
    token = _installed.set(handler)
    try:
        yield
    finally:
        _installed.reset(token)
        if before != ATTENTION:
            model.set_attn_implementation(before)


@contextmanager
def watch_attention(watch: Callable[[Handler, AttentionCall], Tensor]) -> Iterator[None]:
    """Let `watch` make all attention calls, whoever handles them: it gets the handler and the call, and returns the handler's output."""
    token = _watching.set(watch)
    try:
        yield
    finally:
        _watching.reset(token)


def hand_over(keys: Tensor, handler: Handler) -> None:
    """Send the next attention call, which must carry this very `keys` tensor, to `handler`; used by caches in ``update``.

    Raises
    ------
    UnsupportedModelError
        The previous call never came: the model does not run kvtool's attention.
    """
    if _handed.get() is not None:
        _handed.set(None)
        raise UnsupportedModelError(
            "the model does not call kvtool's attention; call kvtool.prepare(model) once, "
            "or load it with attn_implementation='kvtool'"
        )
    _handed.set(_Handover(keys, handler))


def forget_handover() -> None:
    """Drop a handler that was handed over but not called, e.g. after an exception inside a forward."""
    _handed.set(None)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention function in the signature of transformers; returns ``[B, N, Q, D]``."""
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise UnsupportedModelError(f"the model's attention uses {name!r}, which kvtool does not serve")
    window = sliding_window if sliding_window is not None else getattr(module, "sliding_window", None)
    call = AttentionCall(
        layer=int(module.layer_idx),
        queries=query,
        keys=key,
        values=value,
        padding=attention_mask,
        scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        window=window,
        module=module,
    )
    handed = _handed.get()
    if handed is not None and handed.keys is key:
        _handed.set(None)
        handler: Handler = handed.handler
    else:
        handler = _installed.get() or dense_attention
    watch = _watching.get()
    out = handler(call) if watch is None else watch(handler, call)
    return out.transpose(1, 2).contiguous(), None


def dense_attention(call: AttentionCall) -> Tensor:
    """Plain causal attention by SDPA, ``[B, Q, N, D]``; the last new token sees the last key."""
    import torch

    n_new, n_keys = call.queries.shape[2], call.keys.shape[2]
    if call.window is not None and call.padding is None and call.window < n_keys and n_new > _SLIDING_BLOCK:
        return _sliding_attention(call, call.window)
    group = call.queries.shape[1] != call.keys.shape[1]
    masked = call.padding is not None or (call.window is not None and n_keys > call.window) or 1 < n_new < n_keys
    mask = _dense_mask(call, n_new, n_keys) if masked else None
    return torch.nn.functional.scaled_dot_product_attention(
        call.queries,
        call.keys,
        call.values,
        attn_mask=mask,
        is_causal=mask is None and n_new > 1,
        scale=call.scaling,
        enable_gqa=group,
    )


#: Query rows of one block of a sliding-window prefill.
_SLIDING_BLOCK = 256


def _sliding_attention(call: AttentionCall, window: int) -> Tensor:
    """Sliding-window attention in blocks of query rows: masks of B x (window + B), never of N x K."""
    import torch

    n_new, n_keys = call.queries.shape[2], call.keys.shape[2]
    offset, blocks = n_keys - n_new, []
    for start in range(0, n_new, _SLIDING_BLOCK):
        stop = min(n_new, start + _SLIDING_BLOCK)
        first, last = max(0, offset + start - window + 1), offset + stop
        near = replace(
            call, queries=call.queries[:, :, start:stop], keys=call.keys[:, :, first:last], values=call.values[:, :, first:last]
        )
        blocks.append(dense_attention(near))
    return torch.cat(blocks, dim=2)


def _dense_mask(call: AttentionCall, n_new: int, n_keys: int) -> Tensor:
    import torch

    columns = torch.arange(n_keys, device=call.keys.device)
    rows = torch.arange(n_keys - n_new, n_keys, device=call.keys.device)[:, None]
    visible = columns <= rows
    if call.window is not None:
        visible = visible & (columns > rows - call.window)
    visible = visible[None, None]
    if call.padding is not None:
        # A padded query sees itself, so that its (unused) row stays finite.
        visible = (visible & call.padding[:, None, None, :].bool()) | (columns == rows)[None, None]
    return visible


def seen_cache(seq_len: int, n_layers: int) -> Any:
    """Return a transformers cache that has seen `seq_len` tokens and hands back only the new ones.

    Position ids and masks follow from its length, for every architecture; an attention handler adds the earlier entries itself.
    """
    from transformers.cache_utils import Cache, CacheLayerMixin

    class SeenLayer(CacheLayerMixin):  # type: ignore[misc]
        is_sliding = False

        def lazy_initialization(self, key_states: Any, value_states: Any) -> None:
            self.is_initialized = True

        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            return key_states, value_states

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return seq_len + int(query_length), 0

        def get_seq_length(self) -> int:
            return seq_len

        def get_max_length(self) -> int:
            return -1

        get_max_cache_shape = get_max_length  # name in older releases of transformers

    return Cache(layers=[SeenLayer() for _ in range(n_layers)])
