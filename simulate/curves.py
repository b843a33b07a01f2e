"""Predicted harm of a kept set, at every budget at once: one order per head, one gather, prefix sums at the cuts.

Shapes: L layers, H KV heads, G query heads per KV head, Q = H G, P probe tokens, T positions, N cuts (configurations).

First-order change of the answer's margins when only S is kept, per (layer, query head, probe token), own probe tokens
always kept: ``(sum_S b + b_own) / (sum_S a + a_own) - (sum_all b + b_own) / (sum_all a + a_own)``, a = attention, b = gain.
The last divisor is 1 but for the rounding of stored values; with it, keeping everything changes exactly nothing. The *harm* is
minus the sum of the negative changes only: gains predicted to first order do not come true, losses do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]
Int = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ProbeTable:
    """Probes of one sample, laid out so that one position is one contiguous row.

    Attributes
    ----------
    rows : ndarray of shape (L, H, T, 2 G P), float32
        Attention, then gain, of the group's query heads and probe tokens.
    own_attention, own_gain : ndarray of shape (L, H, G P), float64
        Of the probe tokens' own entries, never evicted.
    full_gain : ndarray of shape (L, H, G P), float64
        Gain over attention with all entries kept, own ones included.
    prompt_mass : ndarray of shape (L, H, G P), float64
        Attention to all entries of the prompt.
    """

    rows: NDArray[np.float32]
    own_attention: Float
    own_gain: Float
    full_gain: Float
    prompt_mass: Float

    @property
    def n_kv_heads(self) -> int:
        return int(self.rows.shape[1])


@dataclass(frozen=True, slots=True)
class Curves:
    """Predictions for N configurations of one sample.

    Attributes
    ----------
    harm : ndarray of shape (N,)
        Minus the sum of the negative first-order margin changes; smaller is better.
    margin_change : ndarray of shape (N,)
        Signed sum of all changes.
    layer_harm : ndarray of shape (N,)
        Largest harm of one layer.
    recall : ndarray of shape (N,)
        Mean share of the prompt's attention mass that is kept; NaN without probe tokens: an answer of one token is predicted by the
        last token of the prompt, before anything is dropped.
    head_harm : ndarray of shape (N,)
        Largest harm of one KV head: one head that loses what only it reads can ruin the answer, however well the others do.
    missing : ndarray of shape (N,)
        Share of attention mass (own tokens and representatives count as there) that is missing, weighted over heads and probe
        tokens by how much the margin hangs on them, abs(g . o).
    """

    harm: Float
    margin_change: Float
    layer_harm: Float
    recall: Float
    head_harm: Float
    missing: Float


def probe_table(
    attention: NDArray[np.float32],
    gain: NDArray[np.float32],
    own_attention: NDArray[np.float32],
    own_gain: NDArray[np.float32],
    n_kv_heads: int,
) -> ProbeTable:
    """Lay out the probes of one sample.

    Parameters
    ----------
    attention, gain : ndarray of shape (L, Q, P, T)
    own_attention, own_gain : ndarray of shape (L, Q, P)
    n_kv_heads : int
    """
    n_layers, n_heads, n_probe, seq_len = attention.shape
    columns = n_heads // n_kv_heads * n_probe

    def by_position(values: NDArray[np.float32]) -> NDArray[np.float32]:
        return values.reshape(n_layers, n_kv_heads, columns, seq_len).transpose(0, 1, 3, 2)

    rows = np.ascontiguousarray(np.concatenate([by_position(attention), by_position(gain)], axis=-1), dtype=np.float32)
    own_a = own_attention.reshape(n_layers, n_kv_heads, columns).astype(np.float64)
    own_b = own_gain.reshape(n_layers, n_kv_heads, columns).astype(np.float64)
    sums = rows.sum(axis=2, dtype=np.float64)
    mass = sums[..., :columns]
    return ProbeTable(rows, own_a, own_b, _mean_gain(sums[..., columns:] + own_b, mass + own_a), mass)


def _mean_gain(gain: Float, mass: Float) -> Float:
    """Gain over attention mass; without any mass (nothing kept, no own token) the head's output, and so its gain, is 0."""
    return np.divide(gain, mass, out=np.zeros_like(mass), where=mass > 0)


def kept_sums(table: ProbeTable, order: Int, counts: Int) -> Float:
    """Sum attention and gain over the first entries of each head's order.

    Parameters
    ----------
    table : ProbeTable
    order : ndarray of shape (L, H, T)
        Positions in the order in which they are kept.
    counts : ndarray of shape (N, L, H)
        Entries kept.

    Returns
    -------
    ndarray of shape (N, L, H, 2 G P)
    """
    n_layers, n_heads, _, n_columns = table.rows.shape
    sums = np.zeros((len(counts), n_layers, n_heads, n_columns))
    for layer in range(n_layers):
        for head in range(n_heads):
            cuts, back = np.unique(counts[:, layer, head], return_inverse=True)
            positive = cuts[cuts > 0]
            prefix = np.zeros((len(cuts), n_columns))
            if len(positive):
                kept = table.rows[layer, head].take(order[layer, head, : positive[-1]], axis=0)
                starts = np.concatenate([[0], positive[:-1]])
                prefix[len(cuts) - len(positive) :] = np.add.reduceat(kept, starts, axis=0, dtype=np.float64).cumsum(axis=0)
            sums[:, layer, head] = prefix[back]
    return sums


def curves(table: ProbeTable, order: Int, counts: Int, added: Float | None = None) -> Curves:
    """Predict N configurations that share one order per head; parameters as `curve_parts`."""
    return join_parts([curve_parts(table, order, counts, added)])


@dataclass(frozen=True, slots=True)
class CurveParts:
    """What some layers contribute to the predictions for N configurations; `join_parts` adds them up.

    Attributes
    ----------
    negative : ndarray of shape (N, L)
        Minus the sum of the negative changes of a layer.
    change : ndarray of shape (N, L)
        Signed sum of a layer's changes.
    recall : ndarray of shape (N, L)
        Mean share of the prompt's attention mass that a layer keeps.
    head : ndarray of shape (N, L)
        Largest of the KV heads' parts of `negative`.
    missing : ndarray of shape (N, L)
        Missing attention mass times importance, summed.
    weight : ndarray of shape (L,)
        Sum of the importances.
    """

    negative: Float
    change: Float
    recall: Float
    head: Float
    missing: Float
    weight: Float


def join_parts(parts: Sequence[CurveParts]) -> Curves:
    """Return the predictions of all layers together."""
    negative, change, recall, head, missing = (
        np.concatenate([getattr(part, name) for part in parts], axis=1)
        for name in ("negative", "change", "recall", "head", "missing")
    )
    weight = float(sum(part.weight.sum() for part in parts))
    return Curves(
        harm=negative.sum(axis=1),
        margin_change=change.sum(axis=1),
        layer_harm=negative.max(axis=1),
        recall=recall.mean(axis=1),
        head_harm=head.max(axis=1),
        missing=missing.sum(axis=1) / weight if weight > 0 else np.zeros(len(missing)),
    )


def curve_parts(table: ProbeTable, order: Int, counts: Int, added: Float | None = None) -> CurveParts:
    """Predict what each layer contributes, for N configurations that share one order per head.

    Parameters
    ----------
    table : ProbeTable
        Of all layers, or of some: a large capture is predicted layer by layer.
    order : ndarray of shape (L, H, T)
    counts : ndarray of shape (N, L, H)
        Entries kept per layer and KV head; they may differ per head.
    added : ndarray of shape (N, L, H, 2 G P), optional
        Attention and gain of entries that stand for evicted ones. They are no part of the recall.
    """
    sums = kept_sums(table, order, counts)
    columns = sums.shape[-1] // 2
    attention = sums[..., :columns]
    held = sums if added is None else sums + added
    change = _change(table, held)
    share = np.divide(attention, table.prompt_mass, out=np.ones_like(attention), where=table.prompt_mass > 0)
    per_head, importance = -np.minimum(change, 0.0).sum(axis=3), np.abs(table.full_gain)
    there, whole = held[..., :columns] + table.own_attention, table.prompt_mass + table.own_attention
    there = np.divide(there, whole, out=np.ones_like(there), where=whole > 0)
    return CurveParts(
        negative=per_head.sum(axis=2),
        change=change.sum(axis=(2, 3)),
        recall=share.mean(axis=(2, 3)) if columns else np.full(share.shape[:2], np.nan),
        head=per_head.max(axis=2),
        missing=(np.maximum(1.0 - there, 0.0) * importance).sum(axis=(2, 3)),
        weight=importance.sum(axis=(1, 2)),
    )


def evidence_lost(table: ProbeTable, evidence: Int, order: Int, counts: Int) -> tuple[Float, float]:
    """Return how much attention to the evidence is lost, and how much there was, weighted by abs(g . o) of head and probe token.

    No renormalisation brings evidence back: a head that has lost it attends to something else.

    Parameters
    ----------
    table : ProbeTable
    evidence : ndarray of shape (E,)
        Positions.
    order : ndarray of shape (L, H, T)
    counts : ndarray of shape (N, L, H)

    Returns
    -------
    ndarray of shape (N,), float
    """
    by_head, whole = head_evidence(table, evidence, order, counts)
    lost = np.zeros(len(counts))
    for layer, head in np.ndindex(order.shape[:2]):
        lost = lost + by_head[:, layer, head]
    return lost, whole


def head_evidence(table: ProbeTable, evidence: Int, order: Int, counts: Int) -> tuple[Float, float]:
    """Return what each head loses of the attention to the evidence, (N, L, H), and how much all have; see `evidence_lost`."""
    columns = table.rows.shape[-1] // 2
    lost, whole = np.zeros(counts.shape), 0.0
    if not len(evidence):
        return lost, whole
    for layer, head in np.ndindex(order.shape[:2]):
        place = np.empty(order.shape[2], dtype=np.int64)
        place[order[layer, head]] = np.arange(order.shape[2])
        attention = table.rows[layer, head, evidence, :columns].astype(np.float64) @ np.abs(table.full_gain[layer, head])
        gone = place[evidence] >= counts[:, layer, head][:, None]
        # Row by row: a product would round differently with the number of configurations.
        lost[:, layer, head], whole = np.where(gone, attention, 0.0).sum(axis=1), whole + float(attention.sum())
    return lost, whole


def _change(table: ProbeTable, sums: Float) -> Float:
    """First-order change of the margin per configuration, head and probe, ``(N, L, H, G P)``, of sums of attention and gain."""
    columns = sums.shape[-1] // 2
    mass = sums[..., :columns] + table.own_attention
    return _mean_gain(sums[..., columns:] + table.own_gain, mass) - table.full_gain


def head_harm(table: ProbeTable, order: Int, counts: Int) -> Float:
    """Return the harm that each head contributes, ``(N, L, H)``; it sums to `Curves.harm`.

    Parameters
    ----------
    table : ProbeTable
    order : ndarray of shape (L, H, T)
    counts : ndarray of shape (N, L, H)
    """
    harm: Float = -np.minimum(_change(table, kept_sums(table, order, counts)), 0.0).sum(axis=3)
    return harm
