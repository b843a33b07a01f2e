"""Which kinds a head may show on a new prompt: split-conformal sets.

Half of the prompts decide: per head, the share of them on which each kind is shown. The other half calibrates: how small a share
the kinds shown there had. Heads that showed one kind throughout the deciding half are calibrated apart from the others, or their
number would hide what happens to the rest.

Shapes: S prompts, L layers, Q heads, K kinds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvtool.classify.features import HeadTable
from kvtool.classify.kinds import KINDS, Float, Int, kinds_per_prompt

#: share of new prompts on which the kind may lie outside of the set
ALPHA = 0.1


@dataclass(frozen=True, slots=True)
class KindSets:
    """Prediction sets of heads.

    Attributes
    ----------
    members : ndarray of bool, shape (L, Q, K)
        Which kinds are in the set.
    known : ndarray of bool, shape (L, Q)
        False where there are too few calibration pairs for any set.
    """

    members: np.ndarray
    known: np.ndarray

    def names(self, layer: int, head: int) -> list[str] | None:
        """Return the kinds in a head's set, None where it is not known."""
        if not self.known[layer, head]:
            return None
        return [kind for kind, inside in zip(KINDS, self.members[layer, head], strict=True) if inside]


@dataclass(frozen=True, slots=True)
class Coverage:
    """What the sets hold on prompts that neither decided nor calibrated.

    Attributes
    ----------
    coverage : float
        Share of (prompt, head) pairs whose kind lies in the head's set.
    coverage_contested : float or None
        The same over heads that showed several kinds; None without such heads.
    size : float
        Mean number of kinds in a set.
    n_splits : int
    """

    coverage: float
    coverage_contested: float | None
    size: float
    n_splits: int


def conformal_sets(deciding: Int, calibrating: Int, alpha: float = ALPHA) -> KindSets:
    """Return the sets from kinds per prompt, ``(S, L, Q)`` each, of disjoint prompts.

    The set of a head holds the kinds whose share among its deciding prompts is at least the one that all but a share `alpha` of the
    calibration pairs of its group reach (with the correction of finite samples). A new prompt's kind then lies in it with
    probability 1 - `alpha`, on average over prompts and the heads of a group.
    """
    shares = kind_shares(deciding)
    contested = shares.max(-1) < 1
    members, known = np.zeros(shares.shape, dtype=bool), np.zeros(contested.shape, dtype=bool)
    # Nonconformity of a pair: 1 - share of the kind it shows.
    scores = 1 - np.take_along_axis(shares[None], calibrating[..., None], axis=-1)[..., 0]
    for group in (contested, ~contested):
        found = np.sort(scores[:, group].flatten())
        rank = int(np.ceil((len(found) + 1) * (1 - alpha)))
        if not 0 < rank <= len(found):
            continue
        # A tolerance for shares that differ by rounding only.
        members[group] = 1 - shares[group] <= found[rank - 1] + 1e-12
        known |= group
    return KindSets(members, known)


def kind_shares(kinds: Int) -> Float:
    """Return the share of prompts on which each kind is shown, ``(L, Q, K)``, from kinds ``(S, L, Q)``."""
    return np.asarray((kinds[..., None] == np.arange(len(KINDS))).mean(0), dtype=np.float64)


def split_sets(table: HeadTable, rng: np.random.Generator, alpha: float = ALPHA) -> KindSets | None:
    """Split the prompts at random into a deciding and a calibrating half and return the sets; None with fewer than 4."""
    kinds = kinds_per_prompt(table)
    if len(kinds) < 4:
        return None
    order = rng.permutation(len(kinds))
    half = len(kinds) // 2
    return conformal_sets(kinds[order[:half]], kinds[order[half:]], alpha)


def set_coverage(table: HeadTable, rng: np.random.Generator, splits: int, alpha: float = ALPHA) -> Coverage | None:
    """Measure coverage: thirds of the prompts decide, calibrate and judge, `splits` times; None with fewer than 12 prompts."""
    kinds = kinds_per_prompt(table)
    if len(kinds) < 12:
        return None
    third, hits, pairs, sizes = len(kinds) // 3, np.zeros(2), np.zeros(2), []
    for _ in range(splits):
        order = rng.permutation(len(kinds))
        deciding, calibrating, fresh = (kinds[part] for part in np.split(order, [third, 2 * third]))
        sets = conformal_sets(deciding, calibrating, alpha)
        inside = np.take_along_axis(sets.members[None], fresh[..., None], axis=-1)[..., 0]
        contested = kind_shares(deciding).max(-1) < 1
        for k, heads in enumerate((sets.known, sets.known & contested)):
            hits[k] += inside[:, heads].sum()
            pairs[k] += inside[:, heads].size
        sizes.append(sets.members[sets.known].sum(-1).mean())
    if not pairs[0]:
        return None
    return Coverage(hits[0] / pairs[0], hits[1] / pairs[1] if pairs[1] else None, float(np.nanmean(sizes)), splits)
