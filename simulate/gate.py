"""Which heads to compensate: a threshold on the variance of logits within blocks, fitted on some prompts and judged on others.

Shapes: S prompts, K heads.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from kvtool.simulate.curves import Float

#: Prompts are judged by a threshold from the others, in this many groups.
FOLDS = 8
#: Significant digits of a threshold, as it stands in a policy's text.
DIGITS = 4


@dataclass(frozen=True, slots=True)
class Gate:
    """A threshold and what it is worth.

    Attributes
    ----------
    threshold : float
        Heads above it are left alone; 0: compensate none; infinite: compensate all.
    open : float
        Share of (prompt, head) that it lets through.
    fitted : float
        Loss against evicting alone on the prompts it was fitted on, mean over prompts.
    held_out : ndarray of shape (S,) or None
        The same per prompt, with thresholds fitted on other prompts; None for one prompt.
    """

    threshold: float
    open: float
    fitted: float
    held_out: Float | None

    def option(self) -> str | None:
        """Return the option of a policy, ``""`` where none is needed, None where heads are better left alone."""
        if self.threshold == 0:
            return None
        return "" if math.isinf(self.threshold) else f"gate={self.threshold:.{DIGITS}g}"


def choose_threshold(variance: Float, loss: Float) -> float:
    """Return the threshold with the smallest total loss; 0 if no head should be compensated, infinite if all.

    Parameters
    ----------
    variance : ndarray of shape (S, K)
        Not negative.
    loss : ndarray of shape (S, K)
        What compensating costs against evicting alone; negative where it helps.
    """
    order = np.argsort(variance, axis=None, kind="stable")
    values, total = variance.ravel()[order], np.cumsum(loss.ravel()[order])
    # A threshold separates different values only, and still does when it is written with few digits.
    cuts = [*(_between(a, b) for a, b in itertools.pairwise(values)), math.inf]
    able = [i for i, cut in enumerate(cuts) if cut is not None]
    best = min(able, key=lambda i: float(total[i]))
    return float(cuts[best] or 0.0) if total[best] < 0 else 0.0


def _between(low: float, high: float) -> float | None:
    """Return a number of `DIGITS` digits with ``low <= number < high``, or None."""
    middle = float(f"{(low + high) / 2:.{DIGITS}g}")
    return middle if low <= middle < high and middle > 0 else None


def gated_loss(threshold: float, variance: Float, loss: Float) -> Float:
    """Return the loss per prompt if only heads up to the threshold are compensated, (S,)."""
    total: Float = np.where((variance <= threshold) & (threshold > 0), loss, 0.0).sum(axis=1)
    return total


def fit_gate(variance: Float, loss: Float) -> Gate:
    """Fit a threshold on all prompts, and judge how such thresholds do on prompts that they were not fitted on.

    Parameters
    ----------
    variance, loss : ndarray of shape (S, K)
        See `choose_threshold`.
    """
    n_samples = len(loss)
    threshold = choose_threshold(variance, loss)
    passed = (variance <= threshold) & (threshold > 0)
    held_out: Float | None = None
    if n_samples > 1:
        held_out = np.zeros(n_samples)
        for fold in range(min(FOLDS, n_samples)):
            judged = np.arange(n_samples) % min(FOLDS, n_samples) == fold
            held_out[judged] = gated_loss(choose_threshold(variance[~judged], loss[~judged]), variance[judged], loss[judged])
    return Gate(threshold, float(passed.mean()), float(gated_loss(threshold, variance, loss).mean()), held_out)
