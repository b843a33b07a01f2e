"""Head features from evenly spaced query rows: what kind of head this is, not what to keep.

Shapes: Q query heads, H KV heads, T prompt positions, R sampled query rows, K visible keys, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from kvtool.policies.statistics import BLOCK_ELEMENTS, AttentionInputs

if TYPE_CHECKING:
    from torch import Tensor

#: First positions that count as attention sink.
SINK = 4

#: Keys less than this far behind the query are local, in tokens; keys between the sink and these are far.
LOCAL = 32

#: Lower edges of the distance bins (query position - key position); the last bin is open. Fixed, so that profiles of prompts of
#: different lengths compare bin by bin.
DISTANCE_EDGES: tuple[int, ...] = (0, *(2**k for k in range(18)))


@dataclass(frozen=True, slots=True)
class HeadFeatures:
    """Features of the heads of one layer, each a mean over the sampled query rows. NaN: the prompt is too short to tell.

    Attributes
    ----------
    sink_mass : Tensor ``[Q]``
        Attention to the first `SINK` positions.
    entropy : Tensor ``[Q]``
        Entropy of a row divided by the logarithm of its visible keys: 0 (one key) to 1 (uniform). Rows that see one key
        only are left out.
    distance_profile : Tensor ``[Q, len(DISTANCE_EDGES)]``
        Attention by distance; sums to 1.
    masses : Tensor ``[Q, 3]``
        Attention to sink, far and local keys of the rows that see all three; no key counts twice, sums to 1.
    far_entropy : Tensor ``[Q]``
        Entropy of the far part of a row, divided by the logarithm of its number of keys; mean of the rows weighted by their
        far attention. NaN where there is none.
    offset_variance : Tensor ``[Q]``
        Share of the variance of attention that the distance alone explains, over all pairs of a sampled row and a visible
        key behind the sink; adjusted for the number of distances, so 0 (or a little less) where it explains nothing.
    head_output : Tensor ``[Q]``
        Euclidean norm of the head's output, after the output projection where that is known.
    """

    sink_mass: Tensor
    entropy: Tensor
    distance_profile: Tensor
    masses: Tensor
    far_entropy: Tensor
    offset_variance: Tensor
    head_output: Tensor

    def cpu(self) -> HeadFeatures:
        """Return the same on the CPU."""
        return HeadFeatures(*(getattr(self, f.name).cpu() for f in fields(self)))


def feature_rows(seq_len: int, n_rows: int) -> list[int]:
    """Return up to `n_rows` evenly spaced query positions; the last position is always among them."""
    n = min(n_rows, seq_len)
    return [(k + 1) * seq_len // n - 1 for k in range(n)]


def compute_features(inputs: AttentionInputs, outputs: Tensor, n_rows: int = 256) -> HeadFeatures:
    """Compute the head features of one layer of one prompt.

    Parameters
    ----------
    inputs : AttentionInputs
        Post-RoPE tensors of the whole prompt.
    outputs : Tensor ``[Q, T, D]``
        The heads' outputs, before the output projection.
    n_rows : int
        Query rows to sample.
    """
    import torch

    rows = torch.tensor(feature_rows(inputs.seq_len, n_rows), device=inputs.keys.device)
    sums = _Sums(inputs, rows)
    size = max(1, min(64, BLOCK_ELEMENTS // (inputs.n_heads * inputs.seq_len)))
    for block in rows.split(size):
        sums.add(rows_at(inputs.queries[:, block], inputs.keys, inputs.scaling, inputs.window, block), block)
    return sums.features(head_output(outputs[:, rows], inputs.output_weight))


class _Sums:
    """Sums over sampled rows, all float64; `entropy` and the far parts are sums of quotients row by row."""

    def __init__(self, inputs: AttentionInputs, rows: Tensor) -> None:
        import torch

        self.window = inputs.window
        self.rows, self.edges = rows, torch.tensor(DISTANCE_EDGES, device=rows.device)
        self.sink = torch.zeros(inputs.n_heads, dtype=torch.float64, device=rows.device)
        self.entropy, self.squares = torch.zeros_like(self.sink), torch.zeros_like(self.sink)
        self.profile = self.sink.new_zeros(inputs.n_heads, len(DISTANCE_EDGES))
        self.masses = self.sink.new_zeros(inputs.n_heads, 3)
        self.far_entropy, self.far_weight = torch.zeros_like(self.sink), torch.zeros_like(self.sink)
        self.by_offset = self.sink.new_zeros(inputs.n_heads, inputs.seq_len)
        self.pairs = self.sink.new_zeros(inputs.seq_len)
        self.n_whole = 0

    def add(self, attention: Tensor, rows: Tensor) -> None:
        """Add the attention ``[Q, R, K]`` of `rows`."""
        import torch

        visible = rows + 1 if self.window is None else (rows + 1).clamp(max=self.window)
        # A row that sees one key has entropy 0 and log 1 = 0: its quotient is set to 0 and it does not count at the end.
        log_visible = visible.double().log().clamp(min=1e-300)
        terms = torch.special.entr(attention)
        entropy = terms.sum(-1, dtype=torch.float64)
        self.entropy += (entropy / log_visible).sum(-1)
        below = torch.nn.functional.pad(attention.cumsum(-1, dtype=torch.float64), (1, 0))
        self.sink += below[:, :, min(SINK, below.shape[-1] - 1)].sum(-1)
        self.profile += _by_distance(below, rows, self.edges)
        if int(rows[-1]) >= SINK + LOCAL:
            self._add_parts(below, terms, entropy, rows)
        self._add_offsets(attention, rows)

    def _add_parts(self, below: Tensor, terms: Tensor, entropy: Tensor, rows: Tensor) -> None:
        """Add masses and far entropy of the rows that see sink, far and local keys.

        `below` ``[Q, R, K + 1]`` holds sums of the first keys, `terms` ``[Q, R, K]`` -a ln a, and `entropy` ``[Q, R]`` their sums.
        """
        import torch

        whole = rows >= SINK + LOCAL
        self.n_whole += int(whole.sum())
        edge = (rows - LOCAL + 1).clamp(min=SINK)
        sink = below[:, :, SINK]
        mass = below.gather(-1, edge.expand(len(sink), -1)[..., None])[..., 0] - sink
        parts = torch.stack([sink, mass, (1 - sink - mass).clamp(min=0)], dim=-1)
        self.masses += parts[:, whole].sum(1)
        n_far = rows - LOCAL - SINK + 1
        if self.window is not None:
            n_far = torch.minimum(n_far, torch.full_like(n_far, self.window - LOCAL))
        # Of the weights p = a / m within the part: m H(p) = sum -a ln a + m ln m. What is not far is few keys: it is taken off.
        local = (rows[:, None] - torch.arange(LOCAL, device=rows.device)).clamp(min=0)
        near = terms.gather(-1, local.expand(len(sink), -1, -1)).sum(-1, dtype=torch.float64)
        far = entropy - near - terms[:, :, :SINK].sum(-1, dtype=torch.float64) + torch.xlogy(mass, mass)
        many = whole & (n_far >= 2)  # one key alone has no entropy to speak of
        self.far_entropy += (far[:, many] / n_far[many].double().log()).sum(-1)
        self.far_weight += mass[:, many].sum(-1)

    def _add_offsets(self, attention: Tensor, rows: Tensor) -> None:
        """Add attention behind the sink by exact distance, and its squares."""
        import torch

        offsets = torch.arange(attention.shape[-1], device=rows.device)
        columns = rows[:, None] - offsets
        counted = columns >= SINK
        if self.window is not None:
            counted &= offsets < self.window
        shifted = attention.gather(-1, columns.clamp(min=0).expand(attention.shape[0], -1, -1)).masked_fill_(~counted, 0.0)
        self.by_offset[:, : len(offsets)] += shifted.sum(1, dtype=torch.float64)
        self.squares += shifted.square_().sum((1, 2), dtype=torch.float64)
        self.pairs[: len(offsets)] += counted.sum(0)

    def features(self, outputs: Tensor) -> HeadFeatures:
        """Return the means; `outputs` ``[Q]`` is the mean output norm."""
        n = len(self.rows)
        counted = max(1, int((self.rows > 0).sum())) if self.window != 1 else 1
        # Far attention below the rounding of a softmax has no shape.
        nan, nowhere = float("nan"), self.far_weight <= 1e-9 * n
        return HeadFeatures(
            (self.sink / n).float(),
            (self.entropy / counted).float(),
            (self.profile / n).float(),
            (self.masses / self.n_whole if self.n_whole else self.masses + nan).float(),
            (self.far_entropy / self.far_weight).clamp(0, 1).masked_fill(nowhere, nan).float(),
            self._explained().float(),
            outputs.float(),
        )

    def _explained(self) -> Tensor:
        """Return the adjusted share of variance explained by distance, ``[Q]``."""
        seen = self.pairs > 0
        pairs, sums = self.pairs[seen], self.by_offset[:, seen]
        n_pairs, n_offsets = pairs.sum(), len(pairs)
        mean = sums.sum(-1) ** 2 / n_pairs
        total = self.squares - mean
        within = self.squares - (sums**2 / pairs).sum(-1)
        share = 1 - (within / (n_pairs - n_offsets)) / (total / (n_pairs - 1))
        # What is left of a constant is rounding.
        return share.masked_fill((total <= 1e-12 * self.squares) | (n_pairs <= n_offsets), float("nan"))


def _by_distance(below: Tensor, rows: Tensor, edges: Tensor) -> Tensor:
    """Sum attention by distance bin over the rows, ``[Q, bins]``; `below` ``[Q, R, K + 1]`` holds sums of the first keys."""
    import torch

    # Distances e ... e' - 1 of row i are the keys i - e' + 1 ... i - e.
    ends = (rows[:, None] + 1 - edges).clamp(min=0)
    sums = below.gather(-1, ends.expand(below.shape[0], -1, -1))
    return (sums - torch.nn.functional.pad(sums[..., 1:], (0, 1))).sum(1)


def rows_at(queries: Tensor, keys: Tensor, scaling: float, window: int | None, rows: Tensor) -> Tensor:
    """Return the attention of some queries, float32 ``[Q, R, K]``, K = last row + 1.

    Parameters
    ----------
    queries : Tensor ``[Q, R, D]``
        Post-RoPE, of the positions `rows`.
    keys : Tensor ``[H, T, D]``
    scaling : float
    window : int or None
    rows : Tensor ``[R]``
        Ascending.
    """
    import torch

    stop = int(rows[-1]) + 1
    keys, n_heads = keys[:, :stop].float(), queries.shape[0]
    folded = (queries.float() * scaling).reshape(keys.shape[0], -1, keys.shape[2])
    logits = torch.bmm(folded, keys.transpose(1, 2)).view(n_heads, len(rows), stop)
    columns = torch.arange(stop, device=rows.device)
    hidden = columns > rows[:, None]
    if window is not None:
        hidden |= columns <= rows[:, None] - window
    attention: Tensor = torch.softmax(logits.masked_fill_(hidden, float("-inf")), dim=-1)
    return attention


def head_output(outputs: Tensor, weight: Tensor | None) -> Tensor:
    """Return the mean norm of the heads' outputs ``[Q, R, D]``, projected by `weight` ``[hidden, Q * D]`` where it is known."""
    import torch

    if weight is None:
        plain: Tensor = torch.linalg.vector_norm(outputs.float(), dim=-1).mean(-1)
        return plain
    n_heads, _, dim = outputs.shape
    parts = weight.view(-1, n_heads, dim)
    norms = [torch.linalg.vector_norm(outputs[q].float() @ parts[:, q].float().T, dim=-1).mean() for q in range(n_heads)]
    return torch.stack(norms)
