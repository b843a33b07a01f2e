"""Why block representatives cost what they cost: counterfactuals of one compressed cache, and what each flaw contributes.

A representative of a block of evicted entries can have four flaws, each of which a capture can mend on paper:

========== ===================================== =================================================================
flaw       with it                               without it
========== ===================================== =================================================================
slots      its slot is taken from a real entry   all entries of the budget are real, representatives come on top
count      one entry's softmax mass              times n, the entries of the block (a logit bias of ln n)
variance   the mass at the mean logit            times the rest of the block's true mass, by Jensen at least 1
value      the plain mean of the values          the mean weighted by the probe token's own attention
========== ===================================== =================================================================

With all four it is the plain mean without a bias; with none it is perfect: every probe token gets its full-cache output. What the sets
of flaws between cost is a game of four players whose Shapley values add up to the whole.

Shapes: L layers, H KV heads, G query heads per KV head, P probe tokens, C = G P, T positions, N cells (budget and block), E evicted
entries, M blocks. Logits are ``ln a_ij`` up to a constant per probe token, see `kvtool.simulate.representatives`, whose floor for attention
below the file's precision is used here too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvtool.simulate.curves import Float, Int, ProbeTable, kept_sums
from kvtool.simulate.representatives import attention_floor

#: Flaws in the order of their bits: the set of flaws number 5 is slots and variance.
CAUSES = ("slots", "count", "variance", "value")
SLOTS, COUNT, VARIANCE, VALUE = 1, 2, 4, 8
N_SETS = 1 << len(CAUSES)
PLAIN = N_SETS - 1
#: The mean with a bias of ln n.
COUNTED = PLAIN & ~COUNT
#: States beside the sets of flaws: every entry of the budget real, and as many as are left beside the slots, nothing else.
EVICT, FEWER = N_SETS, N_SETS + 1
N_STATES = N_SETS + 2
#: One step after the other from evicting alone to the plain mean; the first two steps are lost slots and what perfect
#: representatives repair.
LADDER = (EVICT, FEWER, SLOTS, SLOTS | VALUE, SLOTS | VALUE | VARIANCE, PLAIN)
STEPS = ("slots", "repair", "value", "variance", "count")


@dataclass(frozen=True, slots=True)
class Cell:
    """One budget with one block size.

    Attributes
    ----------
    budget : ndarray of shape (L, H)
        Entries of each head, representatives included.
    kept : ndarray of shape (L, H)
        Real entries beside the representatives.
    block : int or None
        Evicted entries per representative; None: one for all.
    """

    budget: Int
    kept: Int
    block: int | None


@dataclass(frozen=True, slots=True)
class Measures:
    """What states cost, per head; all are 0 with the full cache.

    Attributes
    ----------
    harm : ndarray of shape (..., L, H)
        Minus the sum of the negative first-order margin changes over query heads and probe tokens.
    margin : ndarray of shape (..., L, H)
        Minus the sum of all of them: margin lost.
    mass : ndarray of shape (..., L, H)
        Mean over query heads and probe tokens of the relative error of the softmax's denominator.
    """

    harm: Float
    margin: Float
    mass: Float


@dataclass(frozen=True, slots=True)
class BlockMass:
    """Attention mass of evicted blocks beside the kept entries, summed over blocks, query heads and probe tokens; (N, L, H) each.

    Attributes
    ----------
    exact : ndarray
        What the evicted entries have.
    plain : ndarray
        What representatives without a bias have.
    counted : ndarray
        With a bias of ln n.
    gap : ndarray
        ``ln(exact / counted)`` per block and probe token, times the exact mass.
    """

    exact: Float
    plain: Float
    counted: Float
    gap: Float


def state_sums(table: ProbeTable, order: Int, cells: Sequence[Cell]) -> tuple[Float, BlockMass]:
    """Sum attention and gain of the prompt's entries in every state.

    Parameters
    ----------
    table : ProbeTable
    order : ndarray of shape (L, H, T)
        Positions in the order in which they are kept.
    cells : sequence of N Cell

    Returns
    -------
    ndarray of shape (N, N_STATES, L, H, 2 C)
        As `kvtool.simulate.curves.kept_sums`, representatives included.
    BlockMass
    """
    n_layers, n_heads, _, n_columns = table.rows.shape
    columns = n_columns // 2
    budgets, kept = (np.stack([getattr(cell, name) for cell in cells]) for name in ("budget", "kept"))
    real = kept_sums(table, order, np.concatenate([budgets, kept]))
    sums = np.empty((len(cells), N_STATES, n_layers, n_heads, n_columns))
    sums[:, EVICT], sums[:, FEWER] = real[: len(cells)], real[len(cells) :]
    masses = np.zeros((4, len(cells), n_layers, n_heads))
    for layer in range(n_layers):
        floor = attention_floor(table.rows[layer, ..., :columns])
        for head in range(n_heads):
            rows = _block_rows(table.rows[layer, head], floor)
            for n, cell in enumerate(cells):
                for slots, count in ((0, cell.budget), (SLOTS, cell.kept)):
                    evicted = np.sort(order[layer, head, int(count[layer, head]) :])
                    added, found = representative_states(rows[evicted], cell.block)
                    states = [slots | (flaws << 1) for flaws in range(N_SETS // 2)]
                    sums[n, states, layer, head] = added + sums[n, FEWER if slots else EVICT, layer, head]
                    masses[:, n, layer, head] = found
    return sums, BlockMass(*masses)


def _block_rows(rows: np.ndarray, floor: float) -> Float:
    """Return log attention, gain per attention, attention and gain of one head's positions, ``[T, 4 C]``."""
    columns = rows.shape[1] // 2
    attention, gain = rows[:, :columns].astype(np.float64), rows[:, columns:].astype(np.float64)
    along = np.divide(gain, attention, out=np.zeros_like(gain), where=attention > 0)
    attention = np.maximum(attention, floor)
    return np.concatenate([np.log(attention), along, attention, gain], axis=1)


def representative_states(rows: Float, block: int | None) -> tuple[Float, Float]:
    """Return what the representatives of one head add under each set of the flaws count, variance and value.

    Parameters
    ----------
    rows : ndarray of shape (E, 4 C)
        Log attention, gain per attention, attention and gain of the evicted entries in the order of the text.
    block : int or None

    Returns
    -------
    ndarray of shape (8, 2 C)
        Mass, then gain, summed over blocks; the number of a set is that of the flaws without slots, halved.
    ndarray of shape (4,)
        The fields of `BlockMass`.
    """
    columns = rows.shape[1] // 4
    if not len(rows):
        return np.zeros((N_SETS // 2, 2 * columns)), np.zeros(4)
    starts = np.arange(0, len(rows), block or len(rows))
    sizes = np.diff(np.append(starts, len(rows)))[:, None]
    total = np.add.reduceat(rows, starts, axis=0)
    logit, plain_value = total[:, :columns] / sizes, total[:, columns : 2 * columns] / sizes
    exact, gain = total[:, 2 * columns : 3 * columns], total[:, 3 * columns :]
    plain = np.exp(logit)
    counted = sizes * plain
    masses = (exact, exact / sizes, counted, plain)
    states = np.empty((N_SETS // 2, 2 * columns))
    for flaws in range(N_SETS // 2):
        mass = masses[flaws & ((COUNT | VARIANCE) >> 1)]
        wrong = bool(flaws & (VALUE >> 1))
        states[flaws, :columns] = mass.sum(axis=0)
        states[flaws, columns:] = (mass * (plain_value if wrong else gain / exact)).sum(axis=0)
    gap = exact * np.log(exact / counted)
    return states, np.array([exact.sum(), plain.sum(), counted.sum(), gap.sum()])


def measures(table: ProbeTable, sums: Float) -> Measures:
    """Return what states cost.

    Parameters
    ----------
    table : ProbeTable
    sums : ndarray of shape (..., L, H, 2 C)
        Attention and gain of the prompt's entries.
    """
    columns = sums.shape[-1] // 2
    mass = sums[..., :columns] + table.own_attention
    gain = sums[..., columns:] + table.own_gain
    change = np.divide(gain, mass, out=np.zeros_like(mass), where=mass > 0) - table.full_gain
    full = table.prompt_mass + table.own_attention
    error = np.abs(np.divide(mass, full, out=np.ones_like(mass), where=full > 0) - 1).mean(axis=-1)
    return Measures(-np.minimum(change, 0.0).sum(axis=-1), -change.sum(axis=-1), error)


def shapley(values: Float) -> Float:
    """Return the Shapley value of each player: its mean contribution over all orders in which players can join.

    Parameters
    ----------
    values : ndarray of shape (..., 2 ** n)
        Worth of every set of n players; player i is bit i of a set's number.

    Returns
    -------
    ndarray of shape (..., n)
        They add up to ``values[..., -1] - values[..., 0]``.
    """
    n = values.shape[-1].bit_length() - 1
    shares = []
    for player in range(n):
        others = [i for i in range(n) if i != player]
        share = np.zeros(values.shape[:-1])
        for size in range(n):
            weight = math.factorial(size) * math.factorial(n - 1 - size) / math.factorial(n)
            for members in itertools.combinations(others, size):
                without = sum(1 << i for i in members)
                share += weight * (values[..., without | (1 << player)] - values[..., without])
        shares.append(share)
    return np.stack(shares, axis=-1)
