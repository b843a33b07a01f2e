"""Verify plans: of which model, do budgets sum, and does every head keep more when the total grows.

Shapes: L layers, H KV heads, T prompt positions.
"""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from kvtool.errors import DataError
from kvtool.policies.budget import Budget
from kvtool.policies.budgetfile import SCHEMA, BudgetPlan, Gates, Levels, read_budgets
from kvtool.policies.headfile import ModelShape
from kvtool.policies.planfile import Plan, read_plan
from kvtool.policies.planformats import budgets_at

#: Rounding to whole entries may take one from a head while the total grows.
ROUNDING = 1
#: A level of dropped shares may miss its nominal retention by this: published arrays are means over prompts.
NOMINAL = 0.005


def read_any_plan(path: str) -> Plan | BudgetPlan:
    """Read a plan of harm curves or of fixed budgets.

    Raises
    ------
    DataError
        Neither, missing or damaged.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return read_plan(path)  # which says what is wrong
    fixed = isinstance(value, dict) and value.get("schema") == SCHEMA
    return read_budgets(path) if fixed else read_plan(path)


def check_plan(plan: Plan | BudgetPlan, seq_len: int, model: ModelShape | None = None) -> list[str]:
    """Verify a plan; returns what was verified and what is odd, in words.

    Parameters
    ----------
    plan : Plan or BudgetPlan
    seq_len : int
        Prompt length at which budgets are summed and compared.
    model : ModelShape, optional

    Raises
    ------
    DataError
        The first thing that is wrong: another model, a sum that misses the budget, or a head that keeps less when the total grows.
    """
    said = [_check_model(plan, model)]
    if isinstance(plan, BudgetPlan) and isinstance(plan.table, Levels):
        said += _check_levels(plan.table, plan.path)
    least = min(plan.protected, seq_len)
    before: np.ndarray[Any, Any] | None = None
    first = 100
    for percent in range(1, 101):
        budget = Budget(retention=Decimal(percent) / 100)
        if budget.resolve(seq_len) < least:
            continue
        first = min(first, percent)
        found = budgets_at(plan, seq_len, budget)
        if int(found.sum()) != budget.resolve(seq_len) * found.size:
            wanted = budget.resolve(seq_len) * found.size
            raise DataError(f"plan {plan.path}: budgets at {percent} % of {seq_len} tokens sum to {found.sum()}, not {wanted}")
        if before is not None and (found < before - ROUNDING).any():
            layer, head = (int(i) for i in np.argwhere(found < before - ROUNDING)[0])
            raise DataError(
                f"plan {plan.path}: head {head} of layer {plan.layers[layer]} keeps {before[layer, head]} of {seq_len} entries at "
                f"{percent - 1} %, but {found[layer, head]} at {percent} %; budgets must not fall as the total grows"
            )
        before = found
    gates = isinstance(plan, BudgetPlan) and isinstance(plan.table, Gates)
    return [
        *said,
        f"budgets sum to the total and grow with it at {first} to 100 % of {seq_len} tokens"
        + (", heads filled one by one" if gates else ""),
    ]


def _check_model(plan: Plan | BudgetPlan, model: ModelShape | None) -> str:
    known = plan.model.get("fingerprint")
    if model is None:
        return f"of {plan.model['model_id']} ({known}), not compared with a model" if known else "no model named, none compared"
    if isinstance(plan, BudgetPlan):
        plan.check_model(model.fingerprint, model.model_id, model.n_layers, model.n_kv_heads)
    else:
        plan.check_model(model.fingerprint, model.model_id)
    if max(plan.layers) >= model.n_layers or int(plan.model["n_kv_heads"]) != model.n_kv_heads:
        raise DataError(
            f"plan {plan.path} is of layers {list(plan.layers)} with {plan.model['n_kv_heads']} KV heads, {model.model_id} has "
            f"{model.n_layers} with {model.n_kv_heads}"
        )
    if known is None:
        return f"fits the shape of {model.model_id}; the file names no model"
    return f"of {model.model_id} ({known}): the same model"


def _check_levels(table: Levels, path: str) -> list[str]:
    """Compare neighbouring levels, and dropped shares with the retention they stand for."""
    kept = table.values.astype(np.float64) * (1 if table.unit == "entries" else -1)
    fallen = np.argwhere(np.diff(kept, axis=0) < -1e-6)
    if len(fallen):
        level, layer, head = (int(i) for i in fallen[0])
        there, here = (float(table.values[level + i, layer, head]) for i in (0, 1))
        raise DataError(
            f"plan {path}: head {head} of row {layer} has {table.unit} {there:g} at {table.budgets[level]} and {here:g} at "
            f"{table.budgets[level + 1]}; budgets must not fall as the total grows ({len(fallen)} places)"
        )
    if table.unit == "entries":
        return []
    nominal = np.asarray([float(Budget.parse(text).retention or 0) for text in table.budgets])
    missed = np.abs(1 + kept.mean(axis=(1, 2)) - nominal)
    # Levels below the protected entries of the prompts they were made for keep only these, every head alike.
    alike = np.ptp(kept.reshape(len(kept), -1), axis=1) < 1e-6
    missed[alike & (1 + kept.mean(axis=(1, 2)) > nominal)] = 0.0
    worst = int(missed.argmax())
    if missed[worst] > NOMINAL:
        raise DataError(
            f"plan {path}: at {table.budgets[worst]} its heads keep {100 * (1 + kept[worst].mean()):.2f} % on average; does the array "
            "hold shares that are dropped (as LU-KV's), row 0 dropping least?"
        )
    return [f"{len(table.budgets)} levels, mean kept share within {100 * missed[worst]:.2g} points of each"]
