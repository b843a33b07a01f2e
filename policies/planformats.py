"""Budgets in the forms of other tools: LU-KV's arrays, DuoAttention's patterns, HeadKV's scores.

LU-KV (arXiv 2602.08585; its repository, and NVIDIA kvpress, which reads the same files): one ``.npy`` array (99, L, H). Row i
belongs to a global compression of (i + 1) %, and its numbers are the share of a prompt's entries that each KV head *drops* there,
protected entries included in the count. A file belongs to one model and one scorer, which it does not name.

DuoAttention: ``full_attention_heads.tsv`` with one gate per layer and KV head, and ``config.json`` beside it. HeadKV: one JSON object
``{"layer-head": [score per sample]}`` of query heads.

Shapes: L layers, Q query heads, H KV heads, T prompt positions.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtool.errors import ConfigError, DataError
from kvtool.files import write_atomic, write_text
from kvtool.policies.budget import Budget
from kvtool.policies.budgetfile import BudgetPlan, Gates, Importance, Levels, Table, make_plan
from kvtool.policies.fixed_allocator import own_entries, plan_budgets
from kvtool.policies.headfile import ModelShape
from kvtool.policies.planfile import Plan
from kvtool.progress import say

FORMATS = ("lukv", "duo", "headkv")
LUKV_LEVELS = 99
Int = NDArray[np.int64]


def guess_format(path: Path) -> str:
    """Return the form of a foreign file by its name: a folder or ``.tsv`` is DuoAttention's, ``.npy`` and ``.npz`` LU-KV's.

    Raises
    ------
    ConfigError
        The name does not tell.
    DataError
        There is no such file.
    """
    _refuse_missing(path)
    if path.is_dir() or path.suffix == ".tsv":
        return "duo"
    found = {".npy": "lukv", ".npz": "lukv", ".json": "headkv"}.get(path.suffix)
    if found is None:
        raise ConfigError(f"{path}: the form of this file cannot be told by its name; add --format {'|'.join(FORMATS)}")
    return found


def import_plan(path: Path, form: str, scorer: str, model: ModelShape | None, options: dict[str, Any]) -> BudgetPlan:
    """Read another tool's file as a plan.

    Parameters
    ----------
    path : Path
    form : str
        One of `FORMATS`.
    scorer : str
        Method that ranks, without a budget. Empty: DuoAttention's own sink and recent entries, HeadKV's SnapKV with a window of 8; LU-KV's
        arrays belong to one scorer, which must be named.
    model : ModelShape or None
        The model that the file is of; None: not known, and checked by its shape only.
    options : dict
        ``sparsity`` (DuoAttention), ``beta``, ``temperature`` (HeadKV); ``n_kv_heads`` where no model is given (HeadKV).

    Raises
    ------
    ConfigError
        The scorer is missing or does not fit.
    DataError
        The file is missing, damaged or of another shape than the model.
    """
    _refuse_missing(path)
    try:
        table = _READERS[form](path, model, options)
        table.check()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        line = " ".join(str(error).split())[:200]
        raise DataError(f"{path} is no {form} file ({line}); see docs/plans.md for what is read") from error
    facts = {"model_id": None, "fingerprint": None, "n_layers": table.shape[0], "n_heads": None, "n_kv_heads": table.shape[1]}
    if isinstance(table, Importance):
        facts["n_heads"] = table.n_heads
    if model is not None:
        wanted = {key: getattr(model, key) for key in facts}
        shape = {
            key: (facts[key], wanted[key])
            for key in ("n_layers", "n_heads", "n_kv_heads")
            if facts[key] not in (None, wanted[key])
        }
        if shape:
            what = ", ".join(f"{key} {found} there, {needed} in the model" for key, (found, needed) in shape.items())
            raise DataError(f"{path} is not of {model.model_id}: {what}")
        facts = wanted
    source = {"from": form, "file": path.name}
    return make_plan(scorer or _default_scorer(form, table), range(table.shape[0]), table, facts, source, str(path))


def _refuse_missing(path: Path) -> None:
    if not path.exists():
        raise DataError(f"{path} not found; give a file of {', '.join(FORMATS)}")


def _default_scorer(form: str, table: Table) -> str:
    if form == "lukv":
        raise ConfigError(
            "LU-KV's arrays belong to one scorer, and do not name it: add --scorer, e.g. snapkv:window=32,sink=4 or "
            "expected:sink=4,window=1,epsilon=0.02"
        )
    if isinstance(table, Gates):
        return f"duo:sink={int(table.config['sink_size'])},recent={int(table.config['recent_size'])}"
    return "snapkv:window=8"


def _read_lukv(path: Path, model: ModelShape | None, options: dict[str, Any]) -> Levels:
    found = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
    if isinstance(found, np.lib.npyio.NpzFile):
        if len(found.files) != 1:
            raise ValueError(f"an .npz file with one array is needed, this one holds {', '.join(found.files) or 'none'}")
        found = found[found.files[0]]
    if found.ndim != 3 or len(found) != LUKV_LEVELS or found.dtype.kind != "f":
        raise ValueError(f"an array of floats of shape (99, layers, KV heads) is needed, found {found.dtype} {found.shape}")
    # Row 98 drops most. Levels rise by what is kept.
    return Levels(tuple(f"{p}%" for p in range(1, LUKV_LEVELS + 1)), "dropped", np.ascontiguousarray(found[::-1]))


def _read_duo(path: Path, model: ModelShape | None, options: dict[str, Any]) -> Gates:
    file = path / "full_attention_heads.tsv" if path.is_dir() else path
    lines = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines or len({len(line) for line in lines}) != 1:
        raise ValueError("rows of equally many gates, one per KV head, are needed")
    settings = file.with_name("config.json")
    config = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    for key, default in (("sink_size", 64), ("recent_size", 256)):
        int(config.setdefault(key, default))
    return Gates(np.asarray(lines, dtype=np.float64), float(options.get("sparsity", 0.5)), config)


def _read_headkv(path: Path, model: ModelShape | None, options: dict[str, Any]) -> Importance:
    value, _ = json.JSONDecoder().raw_decode(path.read_text(encoding="utf-8").lstrip())
    if not isinstance(value, dict) or not value:
        raise ValueError('{"layer-head": [scores]} is needed')
    n_kv_heads = options.get("n_kv_heads") or (None if model is None else model.n_kv_heads)
    if not n_kv_heads:
        raise ConfigError(
            "HeadKV's scores are of query heads; how many KV heads has the model? add --model, --capture or --kv-heads"
        )
    return Importance(value, int(n_kv_heads), float(options.get("beta", 1.5)), float(options.get("temperature", 1.0)))


_READERS: dict[str, Callable[[Path, ModelShape | None, dict[str, Any]], Table]] = {
    "lukv": _read_lukv,
    "duo": _read_duo,
    "headkv": _read_headkv,
}


def budgets_at(plan: Plan | BudgetPlan, seq_len: int, budget: Budget | None) -> Int:
    """Return the budgets of the planned layers, (L, H); `budget` None: the plan's own.

    Raises
    ------
    ConfigError
        The budget does not hold the protected entries, or the plan has no own one.
    """
    least = min(plan.protected, seq_len)
    if budget is None:
        if isinstance(plan, Plan):
            raise ConfigError(f"plan {plan.path} serves any budget; add --budget, e.g. --budget 5%")
        own_entries(plan, seq_len)
        return plan_budgets(plan, range(len(plan.layers)), 0, least, seq_len, own=True)
    entries = budget.resolve(seq_len)
    if entries < least:
        raise ConfigError(
            f"a budget of {entries} of {seq_len} entries does not hold the plan's {least} protected ones (sink + window)"
        )
    if isinstance(plan, Plan):
        return plan.budgets(entries, seq_len, least)
    return plan_budgets(plan, range(len(plan.layers)), entries, least, seq_len)


def fix_budgets(plan: Plan | BudgetPlan, seq_len: int, budget: Budget | None) -> BudgetPlan:
    """Return a plan with the budgets at one total and length, as entries."""
    table = Levels((str(budget or "own"),), "entries", budgets_at(plan, seq_len, budget)[None], seq_len)
    if budget is None:
        table = Levels((f"{max(2, round(float(table.values.mean())))}",), "entries", table.values, seq_len)
    model = {**dict.fromkeys(("model_id", "fingerprint", "n_heads")), **plan.model}
    return make_plan(plan.scorer, plan.layers, table, model, plan.source)


def to_lukv(plan: Plan | BudgetPlan, seq_len: int) -> NDArray[Any]:
    """Return the array (99, all layers, H) of dropped shares; what came as such an array goes out unchanged.

    Layers that are not planned (sliding windows) drop nothing. Where a retention does not hold the protected entries, these alone
    are kept, and it is said.
    """
    if isinstance(plan, BudgetPlan) and isinstance(plan.table, Levels):
        table = plan.table
        if table.unit == "dropped" and len(table.budgets) == LUKV_LEVELS and len(plan.layers) == plan.model["n_layers"]:
            return np.ascontiguousarray(table.values[::-1])
    dropped = np.zeros((LUKV_LEVELS, int(plan.model["n_layers"]), int(plan.model["n_kv_heads"])))
    least, short = min(plan.protected, seq_len), 0
    for percent in range(1, LUKV_LEVELS + 1):
        budget = Budget(retention=Decimal(percent) / 100)
        short += budget.resolve(seq_len) < least
        kept = budgets_at(plan, seq_len, budget if budget.resolve(seq_len) >= least else Budget(entries=least))
        dropped[LUKV_LEVELS - percent, list(plan.layers)] = 1.0 - kept / seq_len
    if short:
        say(f"plan export: the {least} protected entries are more than 1 % to {short} % of {seq_len}; there only they are kept")
    return dropped


def write_lukv(path: Path, plan: Plan | BudgetPlan, seq_len: int) -> None:
    """Write LU-KV's array, ``numpy.save``'s bytes."""
    array = to_lukv(plan, seq_len)
    write_atomic(path, lambda file: np.save(file, array))


def write_duo(path: Path, plan: Plan | BudgetPlan, seq_len: int, budget: Budget | None) -> None:
    """Write DuoAttention's folder; the gate of a head is the share of the unprotected entries that it keeps.

    Heads keep all or sink and recent entries there: what lies between is lost, only its order stays. A pattern that was imported goes
    out unchanged.
    """
    if isinstance(plan, BudgetPlan) and isinstance(plan.table, Gates) and budget is None:
        gates, config = plan.table.values, plan.table.config
    else:
        _refuse_partial(plan, "duo")
        least = min(plan.protected, seq_len)
        gates = (budgets_at(plan, seq_len, budget) - least) / max(1, seq_len - least)
        sink, recent = (plan.sink, plan.window) if isinstance(plan, BudgetPlan) else (0, plan.protected)
        config = {"sink_size": sink, "recent_size": recent}
    buffer = io.StringIO()
    np.savetxt(buffer, gates, delimiter="\t")
    write_text(path / "full_attention_heads.tsv", buffer.getvalue())
    write_text(path / "config.json", json.dumps(config))


def write_headkv(path: Path, plan: Plan | BudgetPlan, seq_len: int, budget: Budget | None) -> None:
    """Write HeadKV's JSON; the score of a query head is what its KV head keeps beside the protected entries.

    With beta = 1 HeadKV's rule gives these budgets back. Scores that were imported go out unchanged.

    Raises
    ------
    ConfigError
        The plan does not know how many query heads the model has, or leaves layers out.
    """
    if isinstance(plan, BudgetPlan) and isinstance(plan.table, Importance) and budget is None:
        heads: dict[str, list[Any]] = dict(plan.table.heads)
    else:
        _refuse_partial(plan, "headkv")
        if not plan.model.get("n_heads"):
            raise ConfigError(
                f"plan {plan.path} does not say how many query heads the model has; export it again from a capture"
            )
        kept = budgets_at(plan, seq_len, budget) - min(plan.protected, seq_len)
        scores = np.repeat(kept, int(plan.model["n_heads"]) // kept.shape[1], axis=1)
        heads = {f"{layer}-{head}": [int(n)] for layer, row in enumerate(scores) for head, n in enumerate(row)}
    write_text(path, json.dumps(heads))


def _refuse_partial(plan: Plan | BudgetPlan, form: str) -> None:
    if len(plan.layers) != int(plan.model["n_layers"]):
        left: Sequence[int] = sorted(set(range(int(plan.model["n_layers"]))) - set(plan.layers))
        raise ConfigError(
            f"plan {plan.path} leaves layers {list(left)} alone (sliding windows), which {form} has no way to say; use --format lukv"
        )


def export_as(form: str, path: Path, plan: Plan | BudgetPlan, seq_len: int, budget: Budget | None) -> None:
    """Write a plan in another tool's form, see `FORMATS`."""
    if form == "lukv":
        write_lukv(path, plan, seq_len)
    elif form == "duo":
        write_duo(path, plan, seq_len, budget)
    else:
        write_headkv(path, plan, seq_len, budget)
