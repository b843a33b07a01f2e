"""Selection statistics: what a policy may see of a prompt. Defined once, computed block by block.

Shapes: L layers, Q query heads, H KV heads, G = Q / H, T prompt positions, D head dimension, B query block.
Nothing of size T x T is ever held. ``capture`` stores the result, ``infer`` computes it live with this same code,
so both select the same entries to the bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtool.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

#: Elements of one logits block (Q x B x T floats): 8 MB.
BLOCK_ELEMENTS = 1 << 21

#: name -> what it is; ``{w}`` is a window size
KINDS = {
    "accumulated": "[Q, T] sum over all prompt queries of the attention to the position",
    "window_mean/{w}": "[Q, T] mean over the last w prompt queries of the attention to the position",
    "window_var/{w}": "[Q, T] population variance over the last w prompt queries of the attention to the position",
    "last": "[Q, T] attention of the last prompt query, = window_mean/1",
    "key_norm": "[H, T] Euclidean norm of the post-RoPE key",
    "value_norm": "[H, T] Euclidean norm of the value",
    "key_similarity": "[H, T] cosine between the key and the mean of all normalised keys of the head",
}


def parse_statistic(name: str) -> tuple[str, int]:
    """Split ``"window_mean/32"`` into ``("window_mean", 32)``; the number is 0 for statistics without a window.

    Raises
    ------
    ConfigError
        Unknown name.
    """
    kind, _, number = name.partition("/")
    known = {k.partition("/")[0]: "/" in k for k in KINDS}
    if kind not in known or known[kind] != number.isdigit() or (number and int(number) < 1):
        raise ConfigError(f"unknown statistic {name!r}; there are {', '.join(KINDS)}")
    return kind, int(number or 0)


def default_statistics(windows: Iterable[int] = (16, 32, 64)) -> tuple[str, ...]:
    """Return the names of all statistics, with the window menu `windows`."""
    plain = tuple(k for k in KINDS if "/" not in k)
    return plain + tuple(f"{kind}/{w}" for w in sorted(set(windows)) for kind in ("window_mean", "window_var"))


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """Post-RoPE tensors of one layer of one prompt.

    Attributes
    ----------
    queries : Tensor ``[Q, T, D]``
    keys, values : Tensor ``[H, T, D]``
    scaling : float
        Factor of the logits (1 / sqrt(D) for most models).
    window : int or None
        Width of a sliding-window layer: query i sees the keys i - window < j <= i.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    scaling: float
    window: int | None = None

    @property
    def seq_len(self) -> int:
        return int(self.queries.shape[1])

    @property
    def n_heads(self) -> int:
        return int(self.queries.shape[0])


def attention_rows(inputs: AttentionInputs, start: int, stop: int) -> Tensor:
    """Return the attention of the queries ``start:stop``, float32 ``[Q, stop - start, stop]``: later keys are unseen."""
    import torch

    queries = inputs.queries[:, start:stop].float()
    keys = inputs.keys[:, :stop].float()
    n_kv, group = keys.shape[0], queries.shape[0] // keys.shape[0]
    folded = (queries * inputs.scaling).reshape(n_kv, group * (stop - start), -1)
    logits = torch.bmm(folded, keys.transpose(1, 2)).view(inputs.n_heads, stop - start, stop)
    rows = torch.arange(start, stop, device=keys.device)[:, None]
    # Only the last block of columns can hold unseen keys (and, with a sliding window, the first ones).
    hidden = torch.arange(start, stop, device=keys.device)[None, :] > rows
    logits[:, :, start:].masked_fill_(hidden, float("-inf"))
    if inputs.window is not None and stop > inputs.window:
        columns = torch.arange(stop, device=keys.device)[None, :]
        logits.masked_fill_(columns <= rows - inputs.window, float("-inf"))
    return torch.softmax(logits, dim=-1)


def query_blocks(inputs: AttentionInputs, start: int = 0) -> Iterator[tuple[int, int]]:
    """Yield ``(start, stop)`` of query blocks whose logits stay below `BLOCK_ELEMENTS`."""
    seq_len = inputs.seq_len
    while start < seq_len:
        size = max(1, BLOCK_ELEMENTS // (inputs.n_heads * min(seq_len, start + 256)))
        stop = min(seq_len, start + min(size, 256))
        yield start, stop
        start = stop


def compute_statistics(inputs: AttentionInputs, names: Iterable[str]) -> dict[str, Tensor]:
    """Compute selection statistics of one layer of one prompt.

    Parameters
    ----------
    inputs : AttentionInputs
        Post-RoPE tensors of the whole prompt.
    names : iterable of str
        See `KINDS`.

    Returns
    -------
    dict of str to Tensor
        float32, ``[Q, T]`` or ``[H, T]``, on the device of the inputs. A window longer than the prompt uses all of it.
    """
    import torch

    wanted = {name: parse_statistic(name) for name in names}
    result: dict[str, Tensor] = {}
    if any(kind == "accumulated" for kind, _ in wanted.values()):
        result["accumulated"] = accumulated_attention(inputs)
    for window in sorted({1 if kind == "last" else w for kind, w in wanted.values() if kind == "last" or w}):
        rows = attention_rows(inputs, max(0, inputs.seq_len - window), inputs.seq_len)
        for name, (kind, w) in wanted.items():
            if kind == "last" and window == 1:
                result[name] = rows[:, -1].clone()
            elif kind == "window_mean" and w == window:
                result[name] = rows.mean(dim=1)
            elif kind == "window_var" and w == window:
                result[name] = rows.var(dim=1, correction=0)
    keys, values = inputs.keys.float(), inputs.values.float()
    if "key_norm" in wanted:
        result["key_norm"] = keys.norm(dim=-1)
    if "value_norm" in wanted:
        result["value_norm"] = values.norm(dim=-1)
    if "key_similarity" in wanted:
        unit = torch.nn.functional.normalize(keys, dim=-1)
        result["key_similarity"] = torch.nn.functional.cosine_similarity(keys, unit.mean(dim=1, keepdim=True), dim=-1)
    return {name: result[name] for name in wanted}


def accumulated_attention(inputs: AttentionInputs) -> Tensor:
    """Return the sum over all queries of the attention to each position, float32 ``[Q, T]`` (H2O, arXiv 2306.14048)."""
    total = inputs.queries.new_zeros(inputs.n_heads, inputs.seq_len, dtype=inputs.queries.float().dtype)
    for start, stop in query_blocks(inputs):
        total[:, :stop] += attention_rows(inputs, start, stop).sum(dim=1)
    return total
