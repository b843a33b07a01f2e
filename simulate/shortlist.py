"""The shortlist: per budget every configuration that is not clearly dominated, and the control that was ranked."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from kvtool.errors import DataError, KvtoolError
from kvtool.files import write_text
from kvtool.policies import Policy
from kvtool.simulate.rank import Row

SCHEMA = "kvtool.shortlist/1"
CONTROL = "random"
#: risk below which a difference is none: sums of the same entries in another order
ROUNDING = 1e-9
CONTROL_WHY = "control: random entries with the same kind of protection"
#: what the budget of policies is called that bring their own
OWN_BUDGET = "own"
#: with n prompts all differences have one sign by luck alone with probability 2^-n, which is below 2.5 % from here on
MIN_PROMPTS = 6


@dataclass(frozen=True, slots=True)
class Shortlist:
    """What to run for real.

    Attributes
    ----------
    entries : list of dict
        ``policy``, ``retention``, ``harm``, ``risk``, ``why``, and ``alike``: configurations that this one stands for.
    cut : dict of str to list of str
        Budget -> configurations as close as the others that only the cap left out, least risk first.
    """

    entries: list[dict[str, Any]]
    cut: dict[str, list[str]]


def make_shortlist(
    rows: Sequence[Row], weights: NDArray[np.float64], cap: int | None = None, gap_width: float = 0.0
) -> Shortlist:
    """Mark and return the rows that are not clearly dominated, with the reason in plain words.

    A configuration is dominated if the best one among those of its budget that keep at most as many bytes has clearly less
    risk: with 97.5 % of the paired bootstrap draws. One without a budget is compared with all that keep at most as many bytes.
    With fewer than `MIN_PROMPTS` prompts nothing is clearly worse. Those that have the same figures on every prompt (the same
    kept sets, as far as the capture can tell) are represented by the one with the shortest text. A control that was ranked is in. With a
    calibration the predicted accuracy takes the place of risk, and a difference must also exceed what the calibration errs by.

    Parameters
    ----------
    rows : sequence of Row
        All configurations; `shortlisted` is set.
    weights : ndarray of shape (draws, S)
        Bootstrap weights over samples, the same for all rows: differences are paired.
    cap : int or None
        At most so many configurations per budget, least risk first; the control is not counted. None: all.
    gap_width : float
        Error of a calibration's differences, see `kvtool.calibration.Calibration`.
    """
    entries: list[dict[str, Any]] = []
    cut: dict[str, list[str]] = {}
    able = [row for row in rows if row.status == "ok" and not row.yardstick]
    for budget in dict.fromkeys(row.budget for row in able):
        group = sorted((r for r in able if r.budget == budget), key=lambda r: (_mean(r), r.policy))
        if budget is None:
            # The full cache is run anyway.
            group = [row for row in group if not Policy.parse(row.policy).lossless]
        rivals = _rivals(group, able if budget is None else group)
        tied = [
            row
            for row, best in zip(group, rivals, strict=True)
            if _mean(row) - _mean(best) <= gap_width or not_clearly_worse(_loss(row) - _loss(best), weights)
        ]
        alike = _represented(tied)
        stand = [row for row in tied if row.policy in alike and not _is_control(row)]
        kept = {id(row) for row in (stand if cap is None else stand[:cap])}
        if len(kept) < len(stand):
            cut[budget or OWN_BUDGET] = [row.policy for row in stand if id(row) not in kept]
        for row, best in zip(group, rivals, strict=True):
            if id(row) in kept or _is_control(row):
                row.shortlisted = True
                entries.append(_entry(row, best, alike.get(row.policy, [])))
    return Shortlist(entries, cut)


def _loss(row: Row) -> NDArray[np.float64]:
    return np.asarray(row.loss, dtype=np.float64)


def _mean(row: Row) -> float:
    return float(_loss(row).mean())


def _is_control(row: Row) -> bool:
    return row.method.split(":")[0] == CONTROL


def _rivals(group: Sequence[Row], field: Sequence[Row]) -> list[Row]:
    """Return for each row the one of `field` with the least risk among those that keep at most as many bytes."""
    cheapest = sorted(field, key=lambda r: (r.kv_bytes_fp16, _mean(r), r.policy))
    costs, best = [row.kv_bytes_fp16 for row in cheapest], list(accumulate(cheapest, _less_risk))
    return [best[bisect_right(costs, row.kv_bytes_fp16) - 1] for row in group]


def _less_risk(first: Row, second: Row) -> Row:
    return second if _mean(second) < _mean(first) else first


def _represented(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Return the configurations that stand for themselves and others, with the others; what looks alike must also act alike."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for row in rows:
        policy = Policy.parse(row.policy)
        # Sums of the same entries in another order differ in the last digits.
        # As text: NaN (no recall of an answer of one token) is not equal to itself. Plus 0: -0 is 0.
        figures = tuple(f"{v + 0.0:.9g}" for name, values in row.per_sample.items() if name != "predicted" for v in values)
        options = (policy.compensation, policy.when, policy.quant)
        key = row.policy if _is_control(row) else (options, f"{row.entries:.6g}", figures)
        groups.setdefault((key,), []).append(row.policy)
    found = {}
    for names in groups.values():
        stands = min(names, key=lambda name: (len(name), name))
        found[stands] = [name for name in names if name != stands]
    return found


def not_clearly_worse(difference: NDArray[np.float64], weights: NDArray[np.float64]) -> bool:
    """Return False if a mean paired difference is above 0 with 97.5 % of the draws; few prompts cannot tell.

    Parameters
    ----------
    difference : ndarray of shape (S,)
    weights : ndarray of shape (draws, S)
    """
    return len(difference) < MIN_PROMPTS or bool(np.quantile(weights @ difference, 0.025) <= ROUNDING)


def _entry(row: Row, best: Row, alike: list[str]) -> dict[str, Any]:
    among = "at this budget" if row.budget is not None else "of all that keep at most as many bytes"
    n_prompts = len(row.per_sample["harm"])
    few = f": {n_prompts} prompts are too few to tell" if n_prompts < MIN_PROMPTS else ""
    figure = "smallest predicted risk" if row.predicted is None else "largest predicted accuracy"
    why = f"{figure} {among}" if row is best else f"not clearly worse than {best.policy}{few}"
    why = CONTROL_WHY if _is_control(row) else why
    entry = {"policy": row.policy, "retention": round(row.retention, 6), "harm": row.harm, "risk": row.risk, "why": why}
    entry |= {} if row.predicted is None else {"predicted": row.predicted}
    return {**entry, "alike": alike} if alike else entry


def write_shortlist(path: Path, shortlist: Shortlist, provenance: dict[str, Any]) -> None:
    """Write ``shortlist.yaml`` atomically."""
    left_out = {"left_out_by_the_cap": shortlist.cut} if shortlist.cut else {}
    value = {"schema": SCHEMA, **provenance, **left_out, "policies": shortlist.entries}
    write_text(path, yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=120))


def read_shortlist(path: Path) -> list[Policy]:
    """Read the policies of a ``shortlist.yaml``; a hand-written one with just ``policies: [{policy: ...}]`` will do.

    Raises
    ------
    DataError
        Missing or malformed file.
    """
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
        return [Policy.parse(str(entry["policy"])) for entry in value["policies"]]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, KeyError) as error:
        line = " ".join(str(error).split())
        raise DataError(f"shortlist {path} cannot be read ({line}); give the shortlist.yaml of kvtool simulate") from error
    except KvtoolError as error:
        raise DataError(f"shortlist {path}: {error}") from error
