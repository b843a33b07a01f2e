"""Plans: how much harm each head takes at each budget, measured once, from which budgets for any total follow.

Shapes: L planned layers, H KV heads, N points of a curve, T prompt positions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtool.errors import ConfigError, DataError
from kvtool.files import write_json
from kvtool.policies.hull import Hull, lower_hull
from kvtool.policies.shapes import BudgetShape, shaped_budgets

SCHEMA = "kvtool.plan/1"
Float = NDArray[np.float64]
HOW = "make one with kvtool plan export"


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Harm curves of all heads under one scorer, averaged over calibration prompts.

    Attributes
    ----------
    path : str
    scorer : str
        Method whose scores and protected entries the curves were measured with, text form without a budget.
    protected : int
        Sink and window of that method.
    free_shares : ndarray of shape (N,)
        Share of the unprotected entries that is kept, rising from 0 to 1.
    harm : ndarray of shape (N, L, H)
        Predicted harm of the head alone at that share.
    layers : tuple of int
        Model layers that were planned.
    model : dict
        ``model_id``, ``fingerprint``, ``n_layers``, ``n_kv_heads``.
    source : dict
        Task, number of prompts, length, seed and query mode of the capture.
    """

    path: str
    scorer: str
    protected: int
    free_shares: Float
    harm: Float
    layers: tuple[int, ...]
    model: dict[str, Any]
    source: dict[str, Any]

    def check_model(self, fingerprint: str, model_id: str) -> None:
        """Refuse another model.

        Raises
        ------
        DataError
        """
        if self.model["fingerprint"] != fingerprint:
            raise DataError(
                f"plan {self.path} is of {self.model['model_id']} ({self.model['fingerprint']}), not of {model_id} ({fingerprint}); "
                f"{HOW} from a capture of this model"
            )

    def hulls(self, seq_len: int, minimum: int) -> list[Hull]:
        """Return the lower convex hull of every (layer, head), layer-major, over budgets ``minimum ... seq_len``."""
        entries, harm = self.curves(seq_len, minimum)
        curves = harm.reshape(len(entries), -1)
        return [lower_hull(entries, curves[:, k]) for k in range(curves.shape[1])]

    def curves(self, seq_len: int, minimum: int) -> tuple[NDArray[np.int64], Float]:
        """Return the budgets ``minimum ... seq_len`` at which harm is known, (M,), rising, and the harm there, (M, L, H)."""
        entries = minimum + np.round(self.free_shares * (seq_len - minimum)).astype(np.int64)
        entries, first = np.unique(entries, return_index=True)
        return entries, self.harm[first]

    def budgets(
        self,
        budget: int,
        seq_len: int,
        minimum: int,
        shape: BudgetShape = "free",
        kinds: tuple[tuple[int, ...], ...] | None = None,
    ) -> NDArray[np.int64]:
        """Return budgets of every (layer, head) with the mean `budget`, (L, H).

        Parameters
        ----------
        shape : str
            ``"free"``: the optimum of the curves; ``"layer"``, ``"head"``, ``"kinds"``: heads of a layer, of an index, of a kind alike;
            ``"within"``: layers alike, their heads free; ``"rank1"``: a factor per layer times one per head above a floor, HACE's
            shape; ``"uniform"``. See `kvtool.policies.shapes.shaped_budgets`.
        kinds : tuple of tuple of int, optional
            Number of each head's kind, (L, H), for ``"kinds"``.
        """
        n_layers, n_heads = self.harm.shape[1:]
        if minimum >= seq_len:
            return np.full((n_layers, n_heads), seq_len)
        return _budgets(self, budget * n_layers * n_heads, seq_len, minimum, shape, kinds).copy()


@lru_cache(maxsize=512)
def _budgets(
    plan: Plan, total: int, seq_len: int, minimum: int, shape: BudgetShape, kinds: tuple[tuple[int, ...], ...] | None
) -> NDArray[np.int64]:
    """Kept, since every prompt of a length asks for the same."""
    return shaped_budgets(*plan.curves(seq_len, minimum), total, shape, None if kinds is None else np.asarray(kinds))


def stamp(path: str, how: str) -> tuple[int, int]:
    """Return time and size of a plan file, by which one that was read before is known again; `how` says how to make one.

    Raises
    ------
    DataError
        Missing.
    """
    try:
        stat = Path(path).stat()
    except OSError as error:
        raise DataError(f"plan {path} not found; {how}") from error
    return stat.st_mtime_ns, stat.st_size


def load_json(path: str, how: str) -> Any:
    """Return the JSON value of a plan file; `how` says how to make one.

    Raises
    ------
    DataError
        It cannot be read.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"plan {path} cannot be read ({' '.join(str(error).split())[:120]}); {how}") from error


@contextmanager
def damage(path: str, how: str) -> Iterator[None]:
    """Turn what reading the values of a plan file may raise into one line; `how` says how to make one.

    Raises
    ------
    DataError
        A value is missing, of another type, or does not fit the others.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
        raise DataError(f"plan {path} is damaged ({error}); {how}") from error


def write_plan(path: Path, plan: Plan) -> None:
    """Write a plan atomically; `read_plan` gives the same figures back."""
    value = {"schema": SCHEMA, **asdict(plan)}
    del value["path"]
    value |= {"free_shares": plan.free_shares.tolist(), "harm": plan.harm.tolist(), "layers": list(plan.layers)}
    write_json(path, value)


def read_plan(path: str) -> Plan:
    """Read a plan; the same file is read once.

    Raises
    ------
    DataError
        Missing, damaged, or of another schema.
    """
    return _read(path, *stamp(path, HOW))


@lru_cache(maxsize=16)
def _read(path: str, mtime: int, size: int) -> Plan:
    value = load_json(path, HOW)
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        raise DataError(f"{path} is no plan (schema {SCHEMA!r} is needed); {HOW}")
    with damage(path, HOW):
        plan = Plan(
            path,
            str(value["scorer"]),
            int(value["protected"]),
            np.asarray(value["free_shares"], dtype=np.float64),
            np.asarray(value["harm"], dtype=np.float64),
            tuple(int(layer) for layer in value["layers"]),
            dict(value["model"]),
            dict(value["source"]),
        )
        shape = (len(plan.free_shares), len(plan.layers), int(plan.model["n_kv_heads"]))
        if plan.harm.shape != shape:
            raise ValueError(f"harm has shape {plan.harm.shape}, {shape} is needed")
        rising = len(plan.free_shares) > 1 and (np.diff(plan.free_shares) > 0).all()
        if not rising or plan.free_shares[0] != 0 or plan.free_shares[-1] != 1:
            raise ValueError("free_shares must rise from 0 to 1")
        if not np.isfinite(plan.harm).all() or not isinstance(plan.model["fingerprint"], str):
            raise ValueError("harm must be finite, and the model's fingerprint a text")
    return plan
