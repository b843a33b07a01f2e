"""The shortlist: per budget every configuration that is not clearly worse than the best, and the control."""

from __future__ import annotations

from collections.abc import Sequence
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
#: configurations per budget, the control not counted
CAP = 5
#: with n prompts all differences have one sign by luck alone with probability 2^-n, which is below 2.5 % from here on
MIN_PROMPTS = 6


def make_shortlist(rows: Sequence[Row], weights: NDArray[np.float64]) -> list[dict[str, Any]]:
    """Mark and return the shortlisted rows, with the reason in plain words.

    A configuration is left out if its harm is larger than that of the best one of its budget with 97.5 % of the paired
    bootstrap draws, or if `CAP` better ones are in. With fewer than `MIN_PROMPTS` prompts nothing is clearly worse.

    Parameters
    ----------
    rows : sequence of Row
        All configurations; `shortlisted` is set.
    weights : ndarray of shape (draws, S)
        Bootstrap weights over samples, the same for all rows: differences are paired.
    """
    entries = []
    rows = [row for row in rows if not row.yardstick]
    budgets = dict.fromkeys(row.budget for row in rows if row.status == "ok" and row.budget is not None)
    for budget in budgets:
        group = sorted((r for r in rows if r.budget == budget and r.status == "ok"), key=lambda r: (r.rank or 0, r.policy))
        best = np.asarray(group[0].per_sample["harm"])
        tied = [row for row in group if _not_clearly_worse(np.asarray(row.per_sample["harm"]) - best, weights)]
        for row in group:
            reason = _reason(row, group[0], tied)
            if reason:
                row.shortlisted = True
                entries.append({"policy": row.policy, "retention": round(row.retention, 6), "harm": row.harm, "why": reason})
    return entries


def _not_clearly_worse(difference: NDArray[np.float64], weights: NDArray[np.float64]) -> bool:
    return len(difference) < MIN_PROMPTS or bool(np.quantile(weights @ difference, 0.025) <= 0)


def _reason(row: Row, best: Row, tied: list[Row]) -> str | None:
    place = tied.index(row) if row in tied else None
    if place is not None and place < CAP:
        others = "" if len(tied) <= CAP else f" ({len(tied) - CAP} more are as close and left out)"
        n_prompts = len(best.per_sample["harm"])
        few = f": {n_prompts} prompts are too few to tell" if n_prompts < MIN_PROMPTS else ""
        return "smallest predicted harm at this budget" if row is best else f"not clearly worse than {best.policy}{few}{others}"
    return "control: random entries with the same kind of protection" if row.method.split(":")[0] == CONTROL else None


def write_shortlist(path: Path, entries: list[dict[str, Any]], provenance: dict[str, Any]) -> None:
    """Write ``shortlist.yaml`` atomically."""
    value = {"schema": SCHEMA, **provenance, "policies": entries}
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
