"""One captured prompt under one method: every counterfactual of its compensation at several budgets and block sizes.

Shapes: L compressible layers, H KV heads, N cells (budget and block).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvtool.errors import ConfigError, DataError
from kvtool.policies import kept_counts
from kvtool.policies.compensation import Compensation
from kvtool.simulate.attribution import FEWER, N_STATES, BlockMass, Cell, Measures, measures, state_sums
from kvtool.simulate.curves import Float, Int
from kvtool.simulate.evaluate import sample_table
from kvtool.simulate.representatives import floored_share, representative_sums, stand_of

if TYPE_CHECKING:
    from kvtool.capture.reader import CapturedSample, CapturedView
    from kvtool.policies import Policy
    from kvtool.simulate.curves import ProbeTable

#: State after those of `kvtool.simulate.attribution`: means weighted by observed attention, with the entropy of the weights as bias.
WEIGHTED = N_STATES


@dataclass(frozen=True, slots=True)
class SampleCells:
    """What one prompt says about N cells.

    Attributes
    ----------
    measures : Measures
        Each of shape (N, WEIGHTED + 1, L, H).
    mass : BlockMass
    budget, kept : ndarray of shape (N, L, H)
        Entries, and the real ones among them.
    moved : ndarray of shape (N,)
        Entries that the budget rule had to move between heads to make room for slots; evicting alone is judged with them moved, too.
    variance : ndarray of shape (N, L, H)
        What a gate compares; NaN where the capture has no variance of such blocks.
    floored : float
        Share of the captured attention below the file's precision.
    """

    measures: Measures
    mass: BlockMass
    budget: Int
    kept: Int
    moved: Int
    variance: Float
    floored: float


def compensated(policy: Policy, block: str, kind: str = "mean", bias: str = "none") -> Policy:
    """Return the policy with representatives of blocks of `block`; ``kind="slots"`` is the control without them."""
    bias = "auto" if kind == "slots" else bias
    return replace(policy, compensation=Compensation(compensate=kind, block=block, bias=bias))  # type: ignore[arg-type]


def gate_values(views: Sequence[CapturedView], block: str) -> Float:
    """Return the statistic that a gate compares, (L, H), as `Compensation.gated` sees it; NaN where the capture lacks it."""
    name = Compensation(compensate="mean", block=block).gate_statistic
    found = np.full((len(views), views[0].n_kv_heads), np.nan)
    try:
        for row, view in zip(found, views, strict=True):
            row[:] = view.statistic(name).view(view.n_kv_heads, -1).mean(dim=1).numpy()
    except DataError:
        found[:] = np.nan
    return found


def possible(policies: Sequence[Policy], blocks: Sequence[str], sample: CapturedSample) -> dict[tuple[Policy, str], str | None]:
    """Return for each budget and block why it cannot be, or None if it can."""
    found: dict[tuple[Policy, str], str | None] = {}
    views = sample.views()
    for policy in policies:
        scorer = policy.method.parts().scorer
        scores = [scorer.score(view) for view in views]
        for block in blocks:
            try:
                kept_counts(compensated(policy, block), views, scores)
                found[policy, block] = None
            except ConfigError as error:
                found[policy, block] = str(error)
    return found


def sample_cells(sample: CapturedSample, cells: Sequence[tuple[Policy, str]], table: ProbeTable | None = None) -> SampleCells:
    """Compute all states of all cells of one method.

    Parameters
    ----------
    sample : CapturedSample
    cells : sequence of N (Policy, str)
        Policies of one method without compensation, differing in their budgets, and block sizes.
    table : ProbeTable, optional
        Of the sample, to be shared between methods.

    Raises
    ------
    ConfigError
        A budget is smaller than the protected entries and the slots.
    """
    views, table = sample.views(), table or sample_table(sample)
    parts = cells[0][0].method.parts()
    scores = [parts.scorer.score(view) for view in views]
    order = np.stack([parts.selector.order(score).numpy() for score in scores])
    chosen, moved = [], []
    for policy, block in cells:
        with_slots = compensated(policy, block)
        kept = np.asarray(kept_counts(with_slots, views, scores), dtype=np.int64)
        slots = np.vectorize(lambda k, c=with_slots.compensation: c.slots(int(k), sample.seq_len))(kept)
        plain = np.asarray(kept_counts(policy, views, scores), dtype=np.int64)
        moved.append(int(np.abs(kept + slots - plain).sum()) // 2)
        chosen.append(Cell(kept + slots, kept, with_slots.compensation.block_size))
    sums, mass = state_sums(table, order, chosen)
    kept = np.stack([cell.kept for cell in chosen])
    stands = {n: stand_of(compensated(policy, block, "weighted", "entropy"), views) for n, (policy, block) in enumerate(cells)}
    weighted = representative_sums(table, order, kept, {n: stand for n, stand in stands.items() if stand is not None})
    every = np.concatenate([sums, (weighted + sums[:, FEWER])[:, None]], axis=1)
    by_block: dict[str, NDArray[np.float64]] = {block: gate_values(views, block) for block in {block for _, block in cells}}
    return SampleCells(
        measures(table, every),
        mass,
        np.stack([cell.budget for cell in chosen]),
        kept,
        np.asarray(moved),
        np.stack([by_block[block] for _, block in cells]),
        floored_share(table),
    )
