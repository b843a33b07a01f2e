"""Where a policy's predicted harm comes from: its budgets, their shape, its ranking, and what it protects.

Everything is a difference of harms on the same prompts at the same total of entries, going from the policy to the oracle in steps:

    policy  ->  best budgets of its shape  ->  best free budgets  ->  oracle, same protection  ->  oracle
            allocation                  price                  selection                   protection

The first three have the policy's own ranking, the last two rank by future attention with the best free budgets. Best budgets are the ones
for all prompts together: the optimum of the mean curves, found exactly (`kvtool.policies.shapes.exact_budgets`).

Shapes: S prompts, L layers, H KV heads, K = L H, T prompt positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from kvtool.policies.shapes import BudgetShape, ShapedChoice, exact_budgets
from kvtool.policies.shares import share
from kvtool.simulate.gap_curves import ORACLE, PromptCurves, Ranking, protected_oracle

Float = NDArray[np.float64]
Int = NDArray[np.int64]
Part = Literal["allocation", "price", "selection", "protection"]
PARTS: tuple[Part, ...] = get_args(Part)
#: Steps for the proof of one optimum; real curves need a hundredth of it.
WORK = 50_000_000


@dataclass(frozen=True, slots=True)
class Gaps:
    """One configuration, in harm.

    Attributes
    ----------
    harm, in_shape, free, protected, oracle : ndarray of shape (S,)
        Of the policy, of the best budgets of its shape, of the best free budgets, and of the oracle with and without the policy's
        protected entries.
    adapts : bool
        Budgets differ among prompts.
    same : bool
        All prompts have one length and one total, so best budgets are exactly those that were found; else they are scaled.
    slack : float
        How much better the best budgets could be at most, where a proof was broken off; of ``rank1`` nothing is proved.
    """

    harm: Float
    in_shape: Float
    free: Float
    protected: Float
    oracle: Float
    adapts: bool
    same: bool
    slack: float

    def parts(self) -> dict[Part, Float]:
        """Return the parts per prompt, (S,) each; they sum to `harm` - `oracle`."""
        steps = (self.harm, self.in_shape, self.free, self.protected, self.oracle)
        return {name: steps[i] - steps[i + 1] for i, name in enumerate(PARTS)}


@dataclass(slots=True)
class Yardstick:
    """The best budgets of one ranking, for all prompts together.

    Attributes
    ----------
    curves : list of S ndarray of shape (T + 1, L, H)
    low : int
        Protected entries.
    work : int
        See `kvtool.policies.choice.best_choice`.
    mean : ndarray of shape (N, L, H)
        Mean curve at budgets ``least ... length``.
    """

    curves: list[Float]
    low: int
    work: int = WORK
    mean: Float = field(init=False)
    _known: dict[tuple[int, BudgetShape, bytes], ShapedChoice] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.mean = np.mean([curve[self._places(len(curve) - 1)] for curve in self.curves], axis=0)

    @property
    def length(self) -> int:
        """Length of the longest prompt; budgets are found for it and scaled to the others."""
        return max(len(curve) for curve in self.curves) - 1

    @property
    def least(self) -> int:
        return min(self.low, self.length)

    def _places(self, seq_len: int) -> Int:
        """Return a prompt's budgets that stand for ``least ... length`` of the longest: the same share of what is not protected."""
        low, room = min(self.low, seq_len), self.length - self.least
        shares = np.arange(room + 1) / max(room, 1)
        return low + np.round(shares * (seq_len - low)).astype(np.int64)

    def best(self, total: int, shape: BudgetShape, kinds: Int | None = None) -> ShapedChoice:
        """Return the best budgets of a shape for the longest prompt, from the mean curves."""
        key = (total, shape, b"" if kinds is None else kinds.tobytes())
        if key not in self._known:
            self._known[key] = exact_budgets(self.least, self.mean, total, shape, kinds, work=self.work)
        return self._known[key]

    def reference_total(self, totals: Sequence[int]) -> int:
        """Return the total at the longest prompt that stands for the prompts' totals: the same mean share of what is not protected."""
        n_heads, shares = int(self.curves[0][0].size), []
        for curve, total in zip(self.curves, totals, strict=True):
            seq_len = len(curve) - 1
            low = min(self.low, seq_len)
            shares.append((total / n_heads - low) / (seq_len - low) if seq_len > low else 1.0)
        wanted = self.least + float(np.mean(shares)) * (self.length - self.least)
        # Whole entries per head where the prompts have such: heads can then be alike.
        whole = n_heads if all(total % n_heads == 0 for total in totals) else 1
        found = whole * round(n_heads * wanted / whole)
        return min(max(found, n_heads * self.least), n_heads * self.length)

    def reference_budgets(self, counts: Sequence[Int], total: int) -> Int:
        """Return budgets at the longest prompt that stand for what a policy keeps, (L, H): the mean share of what is not protected."""
        shares = []
        for curve, count in zip(self.curves, counts, strict=True):
            seq_len = len(curve) - 1
            low = min(self.low, seq_len)
            shares.append((count - low) / (seq_len - low) if seq_len > low else np.ones(count.shape))
        # Official rules can leave a head less than its protected entries.
        wanted = np.maximum(np.mean(shares, axis=0) * (self.length - self.least), 0.0)
        return np.asarray(share(total, wanted.ravel().tolist(), self.least, self.length)).reshape(wanted.shape)

    def scaled(self, budgets: Int, totals: Sequence[int]) -> list[Int]:
        """Return the budgets of each prompt, (L, H), that budgets at the longest one stand for: same shares, the prompt's own total."""
        found = []
        for curve, total in zip(self.curves, totals, strict=True):
            seq_len = len(curve) - 1
            low = min(self.low, seq_len)
            wanted = (budgets - self.least) * ((seq_len - low) / max(self.length - self.least, 1))
            found.append(np.asarray(share(total, wanted.ravel().tolist(), low, seq_len)).reshape(budgets.shape))
        return found

    def harms(self, counts: Sequence[Int]) -> Float:
        """Return the harm of each prompt, (S,), of which heads keep so many entries, S times (L, H)."""
        return np.asarray([harm_at(curve, count) for curve, count in zip(self.curves, counts, strict=True)])

    def least_harm(self, options: Sequence[Int], totals: Sequence[int]) -> tuple[Int, Float]:
        """Return which budgets at the longest prompt do least harm on the prompts, the first of equal ones, and their harms, (S,)."""
        harms = [self.harms(self.scaled(budgets, totals)) for budgets in options]
        best = int(np.argmin([harm.mean() for harm in harms]))
        return options[best], harms[best]


def harm_at(curve: Float, counts: Int) -> float:
    """Return the harm of heads that keep so many entries, (L, H), by their curves, (T + 1, L, H)."""
    layer, head = np.indices(counts.shape)
    return float(curve[counts, layer, head].sum())


@dataclass(slots=True)
class Decomposer:
    """All configurations of one capture; yardsticks are shared.

    Attributes
    ----------
    prompts : sequence of S PromptCurves
    work : int
        See `kvtool.policies.choice.best_choice`.
    """

    prompts: Sequence[PromptCurves]
    work: int = WORK
    _yardsticks: dict[Ranking, Yardstick] = field(init=False, default_factory=dict)

    def yardstick(self, ranking: Ranking) -> Yardstick:
        """Return the best budgets of a ranking."""
        if ranking not in self._yardsticks:
            curves = [prompt.harm[ranking] for prompt in self.prompts]
            self._yardsticks[ranking] = Yardstick(curves, ranking[1].protected, self.work)
        return self._yardsticks[ranking]

    def gaps(self, ranking: Ranking, counts: Sequence[Int], shape: BudgetShape, kinds: Int | None = None) -> Gaps:
        """Take the harm of one configuration apart.

        Parameters
        ----------
        ranking : Ranking
        counts : sequence of S ndarray of shape (L, H)
            What it keeps of each prompt.
        shape : str
            The tightest shape that its budgets always have.
        kinds : ndarray of shape (L, H), optional
        """
        own, oracle = self.yardstick(ranking), self.yardstick(ORACLE)
        protected = self.yardstick(protected_oracle(ranking))
        totals = [int(count.sum()) for count in counts]
        total, bare = own.reference_total(totals), oracle.reference_total(totals)
        same = len(set(totals)) == 1 and len({prompt.seq_len for prompt in self.prompts}) == 1
        given = own.reference_budgets(counts, total)
        # Scaled to another length the policy's own budgets may be off by one.
        adapts = any((np.abs(n - m) > (not same)).any() for n, m in zip(counts, own.scaled(given, totals), strict=True))
        in_shape, free = own.best(total, shape, kinds), own.best(total, "free")
        # The optimum of the mean curves is the best of its shape where all prompts are alike. Elsewhere, and where nothing is proved, the
        # policy's own budgets may do less harm, which have this shape too (a mean of products is no product).
        options = [in_shape.budgets] if adapts and shape == "rank1" else [in_shape.budgets, given]
        chosen, shape_harm = own.least_harm(options, totals)
        _, free_harm = own.least_harm([free.budgets, chosen], totals)
        choices = {
            "in_shape": in_shape,
            "free": free,
            "protected": protected.best(total, "free"),
            "oracle": oracle.best(bare, "free"),
        }
        slack = [choice.harm - choice.bound for name, choice in choices.items() if name != "in_shape" or shape != "rank1"]
        return Gaps(
            harm=own.harms(counts),
            in_shape=shape_harm,
            free=free_harm,
            protected=protected.harms(protected.scaled(choices["protected"].budgets, totals)),
            oracle=oracle.harms(oracle.scaled(choices["oracle"].budgets, totals)),
            adapts=adapts,
            same=same,
            slack=max(slack),
        )
