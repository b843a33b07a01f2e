"""Selection statistics: what a policy may see of a prompt. Defined once, computed block by block.

Shapes: L layers, Q query heads, H KV heads, G = Q / H, T prompt positions, D head dimension, B query block.
Nothing of size T x T is ever held. ``capture`` stores the result, ``infer`` computes it live with this same code,
so both select the same entries to the bit.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtool.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

#: Elements of one logits block (Q x B x T floats): 8 MB.
BLOCK_ELEMENTS = 1 << 21

#: name -> what it is; ``{w}`` is a window size, ``{n}`` a block size or ``full``, ``{s}+{n}`` first positions left out and future positions
KINDS = {
    "accumulated": "[Q, T] sum over all prompt queries of the attention to the position",
    "window_mean/{w}": "[Q, T] mean over the last w prompt queries of the attention to the position",
    "window_var/{w}": "[Q, T] population variance over the last w prompt queries of the attention to the position",
    "window_max/{w}": "[Q, T] maximum over the last w prompt queries of the attention to the position",
    "window_entropy/{w}": "[Q, 1] mean over the last w prompt queries of -sum P ln P over the positions before that window",
    "block_variance/{n}": "[Q, 1] median over blocks of n positions, before the last 32, of the variance of the logits in a block",
    "last": "[Q, T] attention of the last prompt query, = window_mean/1",
    "key_norm": "[H, T] Euclidean norm of the post-RoPE key",
    "value_norm": "[H, T] Euclidean norm of the value",
    "value_norm1": "[H, T] sum of the absolute components of the value",
    "key_similarity": "[H, T] cosine between the key and the mean of all normalised keys of the head",
    "expected_logit/{s}+{n}": "[Q, T] logit of the mean query, rotated to the next n positions on average",
    "expected_spread/{s}+{n}": "[Q, T] half the variance of that logit over the prompt's queries",
    "output_norm": "[H, T] mean over the group of the L1 norm of the value after the head's output projection",
}

#: Queries whose logits ``block_variance`` looks at, its block sizes in a capture, and what ``full`` stands for.
VARIANCE_QUERIES = 32
VARIANCE_BLOCKS = ("16", "32", "64", "128", "256", "full")
EVERYTHING = 1 << 62

#: Known to some views only, never captured: what the tensors' owner says, and the future of a captured prompt.
SPECIAL = {
    "head_scores": "[Q, 1] importance of the query heads, as given to `select`",
    "future": "[Q, T] attention of the evaluation probes to the position, summed",
}

#: Statistics that ask something of the model beside its tensors.
NEEDS_ROPE = ("expected_logit", "expected_spread")
NEEDS_OUTPUT_WEIGHT = ("output_norm",)

#: What Expected Attention (arXiv 2510.00636) does by default: first positions whose queries are left out, positions ahead.
EXPECTED_SINK, EXPECTED_FUTURE = 4, 512


def parse_statistic(name: str) -> tuple[str, int]:
    """Split ``"window_mean/32"`` into ``("window_mean", 32)``; the number is 0 for statistics without one.

    Raises
    ------
    ConfigError
        Unknown name.
    """
    if name in SPECIAL:
        hint = "add heads=FILE (kvtool classify makes one)" if name == "head_scores" else "only kvtool simulate can run it"
        raise ConfigError(f"the policy needs {name!r}, which is not there: {hint}")
    kind, _, number = name.partition("/")
    forms = {k.partition("/")[0]: k.partition("/")[2] for k in KINDS}
    pattern = {"": "", "{n}": r"[1-9]\d*|full", "{s}+{n}": r"\d+\+[1-9]\d*"}.get(forms.get(kind, ""), r"[1-9]\d*")
    if kind not in forms or not re.fullmatch(pattern, number):
        raise ConfigError(f"unknown statistic {name!r}; there are {', '.join(KINDS)}")
    return kind, EVERYTHING if number == "full" else int(number.rpartition("+")[2] or 0)


def default_statistics(windows: Iterable[int] = (8, 16, 32, 64)) -> tuple[str, ...]:
    """Return the names of all statistics, with the window menu `windows`."""
    plain = tuple(k for k in KINDS if "/" not in k)
    kinds = [k.removesuffix("/{w}") for k in KINDS if k.endswith("/{w}")]
    expected = tuple(f"{kind}/{EXPECTED_SINK}+{EXPECTED_FUTURE}" for kind in NEEDS_ROPE)
    expected += tuple(f"block_variance/{n}" for n in VARIANCE_BLOCKS)
    return plain + expected + tuple(f"{kind}/{w}" for w in sorted(set(windows)) for kind in kinds)


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding in the half-split convention: dimension i pairs with i + R/2 of the R rotated ones.

    Attributes
    ----------
    inv_freq : Tensor ``[R / 2]``
        Angle per position of each pair; empty for models without rotation.
    """

    inv_freq: Tensor

    def rotate(self, x: Tensor, positions: Tensor, sign: float = 1.0) -> Tensor:
        """Rotate ``[..., T, D]`` to `positions` ``[T]`` (or ``[..., T]``); ``sign=-1`` rotates back."""
        angles = positions[..., None].float() * self.inv_freq.float().to(x.device)
        return self.turn(x, angles.cos(), sign * angles.sin())

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Apply cosines and sines ``[..., R / 2]`` of the angles; dimensions beyond R are left alone."""
        import torch

        half = self.inv_freq.shape[0]
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


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
    rope : Rope or None
        How the model rotates; None where that is not known.
    output_weight : Tensor ``[hidden, Q * D]`` or None
        The layer's output projection.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    scaling: float
    window: int | None = None
    rope: Rope | None = None
    output_weight: Tensor | None = None

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
        float32, ``[Q, T]``, ``[H, T]`` or ``[Q, 1]``, on the device of the inputs. A window longer than the prompt uses all of it.
    """
    wanted = {name: parse_statistic(name) for name in names}
    result: dict[str, Tensor] = {}
    for window in sorted({1 if kind == "last" else w for kind, w in wanted.values() if kind == "last" or _is_window(kind)}):
        rows = attention_rows(inputs, max(0, inputs.seq_len - window), inputs.seq_len)
        for name, (kind, w) in wanted.items():
            if (kind == "last" and window == 1) or (_is_window(kind) and w == window):
                result[name] = window_statistic(kind, rows)
    for name, (kind, number) in wanted.items():
        if kind in NEEDS_ROPE:
            n_sink = int(name.partition("/")[2].partition("+")[0])
            result[name] = expected_attention(inputs, kind, n_sink, number)
        elif kind == "block_variance":
            result[name] = block_variance(inputs, number)
        elif name not in result:
            result[name] = _plain_statistic(inputs, kind)
    return {name: result[name] for name in wanted}


def _is_window(kind: str) -> bool:
    return kind.startswith("window_")


def window_statistic(kind: str, rows: Tensor) -> Tensor:
    """Reduce the attention rows ``[Q, w, T]`` of the last queries to ``[Q, T]`` (the entropy: to ``[Q, 1]``)."""
    if kind == "last":
        return rows[:, -1].clone()
    if kind == "window_mean":
        return rows.mean(dim=1)
    if kind == "window_var":
        return rows.var(dim=1, correction=0)
    if kind == "window_max":
        return rows.amax(dim=1)
    past = rows[:, :, : rows.shape[2] - rows.shape[1]]
    # The offset inside the logarithm is CAKE's (arXiv 2503.12491, official code).
    return -(past * (past + 1e-10).log()).sum(dim=2).mean(dim=1, keepdim=True)


def _plain_statistic(inputs: AttentionInputs, kind: str) -> Tensor:
    import torch

    if kind == "accumulated":
        return accumulated_attention(inputs)
    if kind in ("key_norm", "value_norm", "value_norm1"):
        tensor = inputs.keys if kind == "key_norm" else inputs.values.contiguous()
        norm: Tensor = torch.linalg.vector_norm(tensor.float(), ord=1 if kind == "value_norm1" else 2, dim=-1)
        return norm
    if kind == "output_norm":
        return output_norm(inputs)
    keys = inputs.keys.float()
    unit = torch.nn.functional.normalize(keys, dim=-1)
    return torch.nn.functional.cosine_similarity(keys, unit.mean(dim=1, keepdim=True), dim=-1)


def block_variance(inputs: AttentionInputs, block: int) -> Tensor:
    """Return how much logits differ within blocks of consecutive positions, float32 ``[Q, 1]``, in squared nats.

    Per block the population variance over its positions, mean over the last queries; then the median over blocks, so that
    a sink or a few strong entries, which a policy keeps anyway, do not count. A short block at the end counts only if it is
    the only one. To second order half of it is the log of the softmax mass that a mean representative with a count bias lacks.
    """
    import torch

    seq_len, n_kv = inputs.seq_len, inputs.keys.shape[0]
    n_queries = min(VARIANCE_QUERIES, seq_len)
    n_past = seq_len - n_queries
    if n_past == 0:
        return inputs.queries.new_zeros(inputs.n_heads, 1, dtype=torch.float32)
    block = min(block, n_past)
    n_blocks = n_past // block
    queries = inputs.queries[:, seq_len - n_queries :].float() * inputs.scaling
    keys = inputs.keys[:, : n_blocks * block].float()
    # Centred keys first: the variance is that of the centred logits, and nothing cancels.
    centred = keys.view(n_kv, n_blocks, block, -1)
    centred = (centred - centred.mean(dim=2, keepdim=True)).view(n_kv, n_blocks * block, -1)
    logits = torch.bmm(queries.reshape(n_kv, -1, queries.shape[-1]), centred.transpose(1, 2))
    within = logits.view(inputs.n_heads, n_queries, n_blocks, block).square().mean(dim=(1, 3))
    return within.quantile(0.5, dim=1, keepdim=True) if n_blocks > 1 else within


def output_norm(inputs: AttentionInputs) -> Tensor:
    """Return ``mean over the group of ||W_o^h v_j||_1``, float32 ``[H, T]`` (CriticalKV, arXiv 2502.03805).

    Raises
    ------
    ConfigError
        The output projection is not known.
    """
    import torch

    if inputs.output_weight is None:
        raise ConfigError("output_norm needs the layer's output projection, which is not known here; give output_weights=")
    (n_kv, seq_len, width), values = inputs.values.shape, inputs.values.contiguous()
    group = inputs.n_heads // n_kv
    weight = inputs.output_weight.float().view(-1, inputs.n_heads, width)
    norms = []
    for kv_head in range(n_kv):
        total = torch.zeros(seq_len, device=values.device)
        for head in range(kv_head * group, (kv_head + 1) * group):
            for start in range(0, seq_len, 1024):
                part = values[kv_head, start : start + 1024].float() @ weight[:, head].T
                total[start : start + 1024] += part.abs().sum(dim=-1)
        norms.append(total / group)
    return torch.stack(norms)


def expected_attention(inputs: AttentionInputs, kind: str, n_sink: int, n_future: int) -> Tensor:
    """Return mean logit or half its variance for queries of the next `n_future` positions, float32 ``[Q, T]``.

    Expected Attention (arXiv 2510.00636): the prompt's unrotated queries from position `n_sink` on give mean and covariance per
    head; both are turned by the average rotation of the positions ``T ... T + n_future - 1``.

    Raises
    ------
    ConfigError
        It is not known how the model rotates.
    """
    import torch

    if inputs.rope is None:
        raise ConfigError("expected attention needs the model's rotary embedding, which is not known here; give rope=")
    seq_len, rope = inputs.seq_len, inputs.rope
    first = n_sink if seq_len > n_sink else 0
    where = torch.arange(first, seq_len, device=inputs.queries.device)
    queries = rope.rotate(inputs.queries[:, first:].float(), where, sign=-1.0)
    mean = queries.mean(dim=1)
    angles = torch.arange(seq_len, seq_len + n_future).float()[:, None] * rope.inv_freq.float().cpu()
    cos, sin = (f.mean(dim=0).to(queries.device) for f in (angles.cos(), angles.sin()))
    keys = inputs.keys.float().repeat_interleave(inputs.n_heads // inputs.keys.shape[0], dim=0)
    if kind == "expected_logit":
        return (keys @ rope.turn(mean, cos, sin)[..., None])[..., 0] * inputs.scaling
    centred = queries - mean[:, None]
    covariance = centred.transpose(1, 2) @ centred / centred.shape[1]
    # R C R^T: the rows are turned, then the columns.
    turned = rope.turn(rope.turn(covariance, cos, sin).transpose(1, 2), cos, sin)
    return ((keys @ turned) * keys).sum(dim=-1) * (inputs.scaling**2 / 2)


def accumulated_attention(inputs: AttentionInputs) -> Tensor:
    """Return the sum over all queries of the attention to each position, float32 ``[Q, T]`` (H2O, arXiv 2306.14048)."""
    total = inputs.queries.new_zeros(inputs.n_heads, inputs.seq_len, dtype=inputs.queries.float().dtype)
    for start, stop in query_blocks(inputs):
        total[:, :stop] += attention_rows(inputs, start, stop).sum(dim=1)
    return total
