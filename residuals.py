"""What confirmed runs say of single policies, beyond what the curve of a calibration predicts.

A curve knows a policy by its figures only. Where two policies lose the same in figures, one may still do better for real, and does
so again on the next task: its error on confirmed runs is carried over to the same policy, at shares of the prompt close to it, under
the same model, query mode, kind of prompt and prompt length. Errors of few runs are drawn towards none (the mean of a partial pooling,
as the posterior mean of a Gaussian process is, Rasmussen and Williams 2006, equation 2.23, with weights in place of the inverse kernel).

Shapes: N configurations of one run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]
#: distance of two shares, as the difference of their logarithms, at which a confirmed error counts 1 / e; from benchmarks/fidelity.py
#: on the embedded model (anything from 0.2 to 0.5 does as well)
SCALE = 0.3
#: errors of no size that are averaged in: one confirmed error at the same share counts 1 / (1 + PRIOR)
PRIOR = 0.25
#: lengths of prompts count as the same up to this factor
SAME_LENGTH = 1.25
#: kind of prompts that name their evidence, whatever their task; others are of their own task's kind
EVIDENCE = "evidence"


@dataclass(frozen=True, slots=True)
class Setting:
    """Where an error is carried over to: needles say nothing of texts, nor one model or query mode of another.

    The order of policies on texts changes with the length (docs/decisions.md): between lengths only what all policies have in
    common is carried over.

    Attributes
    ----------
    model : str
        Fingerprint.
    compress_at : str
    kind : str
        `EVIDENCE` where prompts name it, else the task: what was measured for needles is not known of others.
    length : float
        Mean tokens of the prompts, above 0; what was asked for may be a limit that no prompt reaches.
    """

    model: str
    compress_at: str
    kind: str
    length: float

    def alike(self, other: Setting) -> bool:
        """Return whether only the length may differ."""
        return (self.model, self.compress_at, self.kind) == (other.model, other.compress_at, other.kind)

    def same(self, other: Setting) -> bool:
        """Return whether errors of single policies hold here and there."""
        return self.alike(other) and abs(math.log(self.length / other.length)) <= math.log(SAME_LENGTH)


@dataclass(frozen=True, slots=True)
class Residuals:
    """Errors of a curve on one confirmed run.

    Attributes
    ----------
    setting : Setting
    methods : tuple of N str
        Policies without their budget, files named by their content (`identified`).
    shares : tuple of N float
        Kept share of the prompt, above 0.
    errors : tuple of N float
        Mean real accuracy less the curve's.
    """

    setting: Setting
    methods: tuple[str, ...]
    shares: tuple[float, ...]
    errors: tuple[float, ...]

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> Residuals:
        """Read what a file holds.

        Raises
        ------
        KeyError, TypeError, ValueError
            It does not hold that.
        """
        where = value["setting"]
        found = cls(
            Setting(str(where["model"]), str(where["compress_at"]), str(where["kind"]), float(where["length"])),
            tuple(map(str, value["methods"])),
            tuple(map(float, value["shares"])),
            tuple(map(float, value["errors"])),
        )
        numbers = [*found.shares, *found.errors, found.setting.length]
        if len({len(found.methods), len(found.shares), len(found.errors)}) != 1 or not np.isfinite(numbers).all():
            raise ValueError("its errors do not fit together")
        if min(*found.shares, found.setting.length, 1.0) <= 0:
            raise ValueError("a share or length is not above 0")
        return found


def identified(methods: Sequence[str], files: Mapping[str, str]) -> list[str]:
    """Return policies with the hash of a file's content in the place of its path: another file is another policy.

    Parameters
    ----------
    methods : sequence of str
    files : mapping of str to str
        Path -> hash.
    """
    return [re.sub(r"=([^,]+)", lambda found: f"={files.get(found[1], found[1])}", method) for method in methods]


def carried_over(
    known: Sequence[Residuals], setting: Setting, methods: Sequence[str], shares: Sequence[float]
) -> tuple[Float, NDArray[np.bool_]]:
    """Return what confirmed runs of a setting add to the curve's accuracy.

    Two parts: what all policies of about that share have in common (the curve's level is off there), and what is the policy's own
    beyond that. A policy that was never confirmed has the first only. The first comes from other lengths where this one was not
    run; without any run of the setting both are 0.

    Parameters
    ----------
    known : sequence of Residuals
    setting : Setting
    methods : sequence of N str
    shares : sequence of N float

    Returns
    -------
    (ndarray of shape (N,), ndarray of bool of shape (N,))
        Second: which policies have a part of their own.
    """
    here = [each for each in known if each.setting.same(setting)]
    alike = here or [each for each in known if each.setting.alike(setting)]
    added, confirmed = np.zeros(len(methods)), np.zeros(len(methods), dtype=bool)
    if not alike:
        return added, confirmed
    at = np.log(np.concatenate([each.shares for each in alike]))
    errors = np.concatenate([each.errors for each in alike])
    wanted = np.log(np.asarray(shares, dtype=np.float64))
    added = _smooth(at, errors, wanted)
    if here:
        own = errors - _smooth(at, errors, at)
        places = _places([method for each in here for method in each.methods])
        for method, mine in _places(methods).items():
            if method in places:
                theirs = places[method]
                added[mine] += _smooth(at[theirs], own[theirs], wanted[mine])
                confirmed[mine] = True
    return added, confirmed


def _places(names: Sequence[str]) -> dict[str, list[int]]:
    """Return name -> where it stands."""
    found: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        found.setdefault(name, []).append(index)
    return found


def _smooth(at: Float, values: Float, wanted: Float) -> Float:
    """Return the mean of values around each wanted place, drawn towards 0 where few are near."""
    weights = np.exp(-np.abs(wanted[:, None] - at[None, :]) / SCALE)
    return np.asarray(weights @ values / (weights.sum(1) + PRIOR))
