"""Fixed budgets that travel: a file with what every head keeps, made by kvtool or taken from another tool.

A file holds one of three tables, as it was measured or published, so that nothing is lost on the way through kvtool:
`Levels` (entries or dropped shares at one or several budgets), `Gates` (DuoAttention) or `Importance` (HeadKV).

Shapes: N levels, L planned layers, Q query heads, H KV heads, T prompt positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kvtool.errors import ConfigError, DataError
from kvtool.files import write_json
from kvtool.policies.budget import Budget
from kvtool.policies.planfile import damage, load_json, stamp

SCHEMA = "kvtool.budgets/1"
HOW = "make one with kvtool plan export --budget or kvtool plan import"
Unit = Literal["entries", "dropped"]
Float = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Levels:
    """What every head keeps at each of N budgets.

    Attributes
    ----------
    budgets : tuple of str
        Text forms, by what is kept, rising.
    unit : str
        ``"entries"``: kept entries of a prompt of `length` tokens, sink and window included; ``"dropped"``: share of the prompt's
        entries that is given up, at any length.
    values : ndarray of shape (N, L, H)
        Whole numbers for ``"entries"``; in 0 ... 1 for ``"dropped"``, with the type (float32, float64) they came in.
    length : int
        T of ``"entries"``; 0 for ``"dropped"``.
    """

    budgets: tuple[str, ...]
    unit: Unit
    values: NDArray[Any]
    length: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and KV heads."""
        return int(self.values.shape[1]), int(self.values.shape[2])

    def check(self) -> None:
        """Refuse values that no head can have, and levels that fall in total."""
        if self.values.ndim != 3 or not self.values.size or len(self.budgets) != len(self.values):
            raise ValueError(
                f"{len(self.budgets)} budgets with values of shape {self.values.shape}, (budgets, layers, heads) is needed"
            )
        high = self.length if self.unit == "entries" else 1
        if not np.isfinite(self.values).all() or (self.values < 0).any() or (self.values > high).any():
            raise ValueError(f"{self.unit} must be in 0 ... {high}")
        for text in self.budgets:
            Budget.parse(text)
        kept = self.values.mean(axis=(1, 2), dtype=np.float64) * (1 if self.unit == "entries" else -1)
        # Equal ones are the protected entries of a short prompt, below which no budget goes.
        if (fallen := np.flatnonzero(np.diff(kept) < -1e-6)).size:
            pair = self.budgets[fallen[0]], self.budgets[fallen[0] + 1]
            raise ValueError(
                f"its heads keep less at {pair[1]} than at {pair[0]}; LU-KV's arrays hold shares that are dropped, row 0 the least"
            )

    def to_json(self) -> dict[str, Any]:
        """Return JSON values that `levels_from_json` reads back exactly."""
        facts: dict[str, Any] = {"length": self.length} if self.unit == "entries" else {"dtype": str(self.values.dtype)}
        return {"budgets": list(self.budgets), "unit": self.unit, **facts, "values": self.values.tolist()}


@dataclass(frozen=True, slots=True)
class Gates:
    """DuoAttention: the larger a head's gate, the sooner it keeps everything; the others keep sink and window.

    Attributes
    ----------
    values : ndarray of shape (L, H)
        As published, not clipped.
    sparsity : float
        Share of heads that stream where no budget decides it.
    config : dict
        The pattern's own settings.
    """

    values: Float
    sparsity: float
    config: dict[str, Any]

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and KV heads."""
        return int(self.values.shape[0]), int(self.values.shape[1])

    def check(self) -> None:
        """Refuse what is no table of gates."""
        if self.values.ndim != 2 or not self.values.size or not np.isfinite(self.values).all():
            raise ValueError("gates must be finite, one per layer and KV head")
        if not 0 <= self.sparsity <= 1:
            raise ValueError(f"sparsity {self.sparsity} is outside 0 ... 1")

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {"sparsity": self.sparsity, "config": self.config, "values": self.values.tolist()}


@dataclass(frozen=True, slots=True)
class Importance:
    """HeadKV: scores of query heads; budgets in proportion to their mean, above a floor.

    Attributes
    ----------
    heads : dict of str to list of float
        ``"layer-head"`` -> scores, one per sample, in the order and with the numbers that were published.
    n_kv_heads : int
    beta, temperature : float
        See `kvtool.policies.head_allocators.HeadImportance`.
    """

    heads: dict[str, list[float]]
    n_kv_heads: int
    beta: float = 1.5
    temperature: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and KV heads."""
        return len(self.scores()), self.n_kv_heads

    @property
    def n_heads(self) -> int:
        """Query heads."""
        return int(self.scores().shape[1])

    def scores(self) -> Float:
        """Return the mean score of every query head, (L, Q)."""
        keys = {tuple(int(x) for x in key.split("-")): key for key in self.heads}
        n_layers, n_heads = (max(key[axis] for key in keys) + 1 for axis in (0, 1))
        if len(keys) != len(self.heads) or len(keys) != n_layers * n_heads:
            raise ValueError(f"{len(self.heads)} heads are named, {n_layers} x {n_heads} are needed")
        if not all(self.heads.values()):
            raise ValueError("a head has no scores")
        means = [
            [np.mean(self.heads[keys[layer, head]], dtype=np.float64) for head in range(n_heads)] for layer in range(n_layers)
        ]
        return np.asarray(means)

    def check(self) -> None:
        """Refuse what is no table of scores."""
        scores = self.scores()
        if not np.isfinite(scores).all() or (scores < 0).any():
            raise ValueError("scores must be finite and not negative")
        if self.n_kv_heads < 1 or scores.shape[1] % self.n_kv_heads:
            raise ValueError(f"{scores.shape[1]} query heads do not share {self.n_kv_heads} KV heads evenly")
        if self.beta < 1 or self.temperature < 0:
            raise ValueError(f"beta={self.beta} must be at least 1, temperature={self.temperature} at least 0")

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {"beta": self.beta, "temperature": self.temperature, "n_kv_heads": self.n_kv_heads, "heads": self.heads}


Table = Levels | Gates | Importance
_NAMES: dict[type, str] = {Levels: "levels", Gates: "gates", Importance: "importance"}


@dataclass(frozen=True, slots=True)
class BudgetPlan:
    """Budgets of every head, and what ranks the entries.

    Attributes
    ----------
    path : str
    scorer : str
        Method that ranks and protects, text form without a budget; its own budgets play no part.
    sink, window : int
        Protected entries of that method, part of every budget.
    layers : tuple of int
        Model layers of the table's rows.
    table : Levels, Gates or Importance
    model : dict
        ``n_layers``, ``n_kv_heads``; ``n_heads``, ``model_id`` and ``fingerprint`` where known, else None.
    source : dict
        Where the numbers come from.
    """

    path: str
    scorer: str
    sink: int
    window: int
    layers: tuple[int, ...]
    table: Table
    model: dict[str, Any]
    source: dict[str, Any]

    @property
    def protected(self) -> int:
        """Entries that every head keeps."""
        return self.sink + self.window

    def check_model(self, fingerprint: str, model_id: str, n_layers: int, n_kv_heads: int) -> None:
        """Refuse another model; a file that names none is checked by its shape.

        Raises
        ------
        DataError
        """
        if self.model.get("fingerprint") not in (None, fingerprint):
            raise DataError(
                f"plan {self.path} is of {self.model['model_id']} ({self.model['fingerprint']}), not of {model_id} ({fingerprint}); {HOW}"
            )
        found, wanted = (self.model["n_layers"], self.model["n_kv_heads"]), (n_layers, n_kv_heads)
        if found != wanted:
            raise DataError(
                f"plan {self.path} is of {found[0]} layers with {found[1]} KV heads, {model_id} has {wanted[0]} with {wanted[1]}; {HOW}"
            )

    def rows(self, layers: Sequence[int]) -> list[int]:
        """Return the table's rows of model layers.

        Raises
        ------
        DataError
            The plan leaves some of them out.
        """
        missing = sorted(set(layers) - set(self.layers))
        if missing:
            raise DataError(
                f"plan {self.path} is of layers {list(self.layers)}, layers {missing} are to be compressed too; make it from prompts as "
                "long as these (sliding windows longer than a prompt are compressed as well)"
            )
        return [self.layers.index(layer) for layer in layers]

    def check(self) -> None:
        """Refuse contradictions within the file; raises ValueError, KeyError or TypeError."""
        self.table.check()
        shape = (len(self.layers), int(self.model["n_kv_heads"]))
        if self.table.shape != shape:
            raise ValueError(
                f"the table is of {self.table.shape[0]} layers with {self.table.shape[1]} heads, {shape[0]} with {shape[1]} are named"
            )
        if list(self.layers) != sorted(set(self.layers)) or not 0 <= self.layers[0] <= self.layers[-1] < int(
            self.model["n_layers"]
        ):
            raise ValueError(f"layers {list(self.layers)} must rise within 0 ... {int(self.model['n_layers']) - 1}")
        if min(self.sink, self.window) < 0:
            raise ValueError("sink and window must not be negative")
        if isinstance(self.table, Levels) and self.table.unit == "entries":
            least = min(self.protected, self.table.length)
            if (self.table.values < least).any():
                raise ValueError(f"a head keeps fewer than the {least} protected entries (sink + window)")


def make_plan(
    scorer: str, layers: Sequence[int], table: Table, model: dict[str, Any], source: dict[str, Any], path: str = ""
) -> BudgetPlan:
    """Put a plan together; protection is the scorer's.

    Raises
    ------
    ConfigError
        The scorer names a budget, cannot be read or cannot run for real, or the table contradicts itself.
    """
    selector = scorer_parts(scorer).selector
    plan = BudgetPlan(path, scorer, selector.sink, selector.window, tuple(layers), table, model, source)
    try:
        plan.check()
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"these budgets cannot be a plan: {error}") from error
    return plan


def scorer_parts(scorer: str) -> Any:
    """Return the `kvtool.policies.base.Parts` of a plan's scorer.

    Raises
    ------
    ConfigError
        It names a budget, an unknown method, one that cannot run for real, or one that needs a file (a plan stands alone).
    """
    from kvtool.policies.text import parse_policy

    if "budget" in scorer:
        raise ConfigError(f"scorer {scorer!r} names a budget; the plan has the budgets, leave it out")
    policy = parse_policy(f"{scorer}{',' if ':' in scorer else ':'}budget=100%")
    method = policy.method
    if method.simulate_only:
        raise ConfigError(f"scorer {scorer!r} looks into the future; no real run can follow such a plan")
    if getattr(method, "plan", "") or getattr(method, "file", "") or method.name in ("plan", "optimal"):
        raise ConfigError(f"scorer {scorer!r} is a plan itself; name the method that ranks, e.g. snapkv:window=32")
    return method.parts()


def write_budgets(path: Path, plan: BudgetPlan) -> None:
    """Write a plan atomically; `read_budgets` gives the same plan back, and writing that gives the same bytes."""
    value = {
        "schema": SCHEMA,
        "scorer": plan.scorer,
        "protection": {"sink": plan.sink, "window": plan.window},
        "model": plan.model,
        "source": plan.source,
        "layers": list(plan.layers),
        _NAMES[type(plan.table)]: plan.table.to_json(),
    }
    write_json(path, value)


def read_budgets(path: str) -> BudgetPlan:
    """Read a plan of fixed budgets; the same file is read once.

    Raises
    ------
    DataError
        Missing, damaged, or of another schema.
    """
    return _read(path, *stamp(path, HOW))


@lru_cache(maxsize=16)
def _read(path: str, mtime: int, size: int) -> BudgetPlan:
    value = load_json(path, HOW)
    schema = value.get("schema") if isinstance(value, dict) else None
    if schema == "kvtool.plan/1":
        raise DataError(
            f"plan {path} holds harm curves: run it with optimal:plan={path}, or fix its budgets with kvtool plan export {path} --budget 5%"
        )
    if schema != SCHEMA:
        raise DataError(f"{path} is no plan of budgets (schema {SCHEMA!r} is needed); {HOW}")
    with damage(path, HOW):
        protection = value["protection"]
        plan = BudgetPlan(
            path,
            str(value["scorer"]),
            int(protection["sink"]),
            int(protection["window"]),
            tuple(int(layer) for layer in value["layers"]),
            _table(value),
            dict(value["model"]),
            dict(value["source"]),
        )
        plan.check()
        selector = scorer_parts(plan.scorer).selector
        if (selector.sink, selector.window) != (plan.sink, plan.window):
            raise ValueError(
                f"scorer {plan.scorer} protects {selector.sink} + {selector.window} entries, the plan says {plan.sink} + {plan.window}"
            )
    return plan


def _table(value: dict[str, Any]) -> Table:
    if (found := value.get("levels")) is not None:
        whole = found["unit"] == "entries"
        if not whole and (found["unit"] != "dropped" or found["dtype"] not in ("float16", "float32", "float64")):
            raise ValueError(f"unit {found['unit']!r} of type {found.get('dtype')!r} is not known")
        values = np.asarray(found["values"], dtype=np.float64)
        if whole and (values != np.round(values)).any():
            raise ValueError("entries must be whole numbers")
        kind = np.int64 if whole else np.dtype(found["dtype"])
        return Levels(
            tuple(map(str, found["budgets"])), found["unit"], values.astype(kind), int(found["length"]) if whole else 0
        )
    if (found := value.get("gates")) is not None:
        return Gates(np.asarray(found["values"], dtype=np.float64), float(found["sparsity"]), dict(found["config"]))
    found = value["importance"]
    return Importance(dict(found["heads"]), int(found["n_kv_heads"]), float(found["beta"]), float(found["temperature"]))
