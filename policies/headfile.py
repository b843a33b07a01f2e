"""Read what is known about a model's heads: kvtool's heads.json, published HeadKV scores, DuoAttention patterns.

Shapes: L layers, Q query heads, H KV heads, G = Q / H.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvtool.errors import ConfigError, DataError
from kvtool.policies.budgetfile import read_budgets
from kvtool.policies.planfile import read_plan

if TYPE_CHECKING:
    from kvtool.policies.base import LayerView, Policy

SCHEMA = "kvtool.heads/1"
Float = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class HeadTable:
    """Facts about the heads of one model; what the file does not hold is None.

    Attributes
    ----------
    path : str
    scores : dict of str to ndarray of shape (L, Q)
        Importance of query heads by name (``importance``, ``retrieval``).
    kv_scores : dict of str to ndarray of shape (L, H)
        The same for KV heads; DuoAttention's ``gate``.
    kinds : tuple of tuple of str, or None
        Kind per layer and KV head.
    confidence : ndarray of shape (L, H) or None
        Confidence of the kinds.
    fingerprint, model_id : str or None
        The model that the file was made from.
    streaming : tuple of int or None
        Sink and recent sizes that a DuoAttention pattern was trained with.
    """

    path: str
    scores: dict[str, Float]
    kv_scores: dict[str, Float]
    kinds: tuple[tuple[str, ...], ...] | None = None
    confidence: Float | None = None
    fingerprint: str | None = None
    model_id: str | None = None
    streaming: tuple[int, int] | None = None

    def query_scores(self, name: str) -> Float:
        """Return scores of query heads, (L, Q).

        Raises
        ------
        DataError
            The file does not hold them.
        """
        if name not in self.scores:
            raise DataError(f"heads file {self.path} holds no {name!r} scores of query heads, only {self._known()}")
        return self.scores[name]

    def head_scores(self, name: str, n_kv_heads: int) -> Float:
        """Return scores of KV heads, (L, H): the file's own, or the mean over each group of query heads."""
        if name in self.kv_scores and self.kv_scores[name].shape[1] == n_kv_heads:
            return self.kv_scores[name]
        scores = self.query_scores(name)
        if scores.shape[1] % n_kv_heads:
            raise DataError(f"heads file {self.path} is of {scores.shape[1]} query heads, the model has {n_kv_heads} KV heads")
        grouped: Float = scores.reshape(len(scores), n_kv_heads, -1).mean(axis=2)
        return grouped

    def _known(self) -> str:
        return ", ".join([*self.scores, *(f"{name} of KV heads" for name in self.kv_scores)]) or "no scores"


def read_head_file(path: str) -> HeadTable:
    """Read a heads file; the same file is read once.

    Parameters
    ----------
    path : str
        ``heads.json`` of kvtool classify, the JSON file of HeadKV (``{"layer-head": [score per sample]}``), or DuoAttention's
        pattern folder or its ``full_attention_heads.tsv``.

    Raises
    ------
    DataError
        Missing, damaged, or of an unknown form.
    """
    where = _file(path)
    try:
        stat = where.stat()
    except OSError as error:
        raise DataError(
            f"heads file {path} not found; make one with kvtool classify, or give HeadKV's or DuoAttention's"
        ) from error
    return _read(str(where), path, stat.st_mtime_ns, stat.st_size)


def _file(path: str) -> Path:
    return Path(path) / "full_attention_heads.tsv" if Path(path).is_dir() else Path(path)


@lru_cache(maxsize=32)
def _read(where: str, path: str, mtime: int, size: int) -> HeadTable:
    file = Path(where)
    try:
        if file.suffix == ".tsv":
            return _read_pattern(file, path)
        # HeadKV's code reads one JSON object and ignores what follows it.
        value, _ = json.JSONDecoder().raw_decode(file.read_text(encoding="utf-8").lstrip())
    except (OSError, ValueError) as error:
        line = " ".join(str(error).split())[:160]
        raise DataError(f"heads file {path} cannot be read ({line}); make one with kvtool classify") from error
    if isinstance(value, dict) and value.get("schema") == SCHEMA:
        return _own(value, path)
    if isinstance(value, dict) and value and all(re.fullmatch(r"\d+-\d+", key) for key in value):
        return _published(value, path)
    raise DataError(
        f"heads file {path} is neither kvtool's heads.json ({SCHEMA}) nor HeadKV's {{'layer-head': [scores]}}; "
        "make one with kvtool classify"
    )


def _own(value: dict[str, Any], path: str) -> HeadTable:
    try:
        model, shapes = value["model"], {"heads": value["n_heads"], "kv_heads": value["n_kv_heads"]}
        tables = {key: _grid(value[key], int(value["n_layers"]), int(n)) for key, n in shapes.items()}
        found: dict[str, dict[str, Float]] = {key: {} for key in tables}
        for key, table in tables.items():
            for name in ("importance", "retrieval"):
                if all(head.get(name) is not None for row in table for head in row):
                    found[key][name] = np.asarray([[float(head[name]) for head in row] for row in table])
        kv = tables["kv_heads"]
        sure = all(head.get("confidence") is not None for row in kv for head in row)
        return HeadTable(
            path,
            found["heads"],
            found["kv_heads"],
            tuple(tuple(str(head["kind"]) for head in row) for row in kv),
            np.asarray([[float(head["confidence"]) for head in row] for row in kv]) if sure else None,
            str(model["fingerprint"]),
            str(model.get("model_id")),
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise DataError(f"heads file {path} is incomplete ({error!r}); make it again with kvtool classify") from error


def _grid(heads: list[dict[str, Any]], n_layers: int, n_heads: int) -> list[list[dict[str, Any]]]:
    """Put heads into [layer][head], each exactly once."""
    found = {(int(head["layer"]), int(head["head"])): head for head in heads}
    if len(found) != len(heads) or len(heads) != n_layers * n_heads:
        raise ValueError(f"{len(heads)} heads, {n_layers} x {n_heads} are needed")
    return [[found[layer, head] for head in range(n_heads)] for layer in range(n_layers)]


def _published(value: dict[str, Any], path: str) -> HeadTable:
    """HeadKV: the keys are parsed, not their order trusted."""
    keys = {tuple(int(x) for x in key.split("-")): key for key in value}
    n_layers, n_heads = max(k[0] for k in keys) + 1, max(k[1] for k in keys) + 1
    if len(keys) != n_layers * n_heads:
        raise DataError(f"heads file {path} names {len(keys)} heads, {n_layers} x {n_heads} are needed")
    scores = np.zeros((n_layers, n_heads))
    for (layer, head), key in keys.items():
        try:
            samples = np.asarray(value[key], dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise DataError(f"heads file {path}: the scores of head {key} are not numbers") from error
        if not samples.size or not np.isfinite(samples).all():
            raise DataError(f"heads file {path}: head {key} has no scores, or some that are not finite")
        scores[layer, head] = samples.mean()
    return HeadTable(path, {"importance": scores}, {})


def _read_pattern(file: Path, path: str) -> HeadTable:
    """DuoAttention: gates of KV heads, clipped to 0 ... 1 as its code does when it loads them."""
    rows = [
        [float(cell) for cell in line.split("\t")] for line in file.read_text(encoding="utf-8").splitlines() if line.strip()
    ]
    if not rows or len({len(row) for row in rows}) != 1 or not np.isfinite(rows).all():
        raise ValueError("rows of equally many finite gates, one per KV head, are needed")
    gates = np.clip(np.asarray(rows), 0.0, 1.0)
    sizes = None
    config = file.with_name("config.json")
    if config.is_file():
        value = json.loads(config.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("config.json holds no settings")
        if "sink_size" in value and "recent_size" in value:
            sizes = (int(value["sink_size"]), int(value["recent_size"]))
    return HeadTable(path, {}, {"gate": gates, "importance": gates, "retrieval": gates}, streaming=sizes)


def rows_of(table: Float, view: LayerView, path: str) -> Float:
    """Return the row of a view's layer, and refuse a table of another model's shape.

    Raises
    ------
    DataError
        The file has other layers or heads.
    """
    if len(table) != view.n_layers or table.shape[1] not in (view.n_heads, view.n_kv_heads):
        raise DataError(
            f"heads file {path} is of {len(table)} layers with {table.shape[1]} heads, the model has {view.n_layers} with "
            f"{view.n_heads} query and {view.n_kv_heads} KV heads"
        )
    row: Float = table[view.layer]
    return row


def check_path(name: str, path: str) -> None:
    """Refuse a path that the text form of a policy cannot hold; used by the methods' ``__post_init__``."""
    if "," in path:
        raise ConfigError(f"policy {name!r}: heads={path!r} holds a comma, which separates parameters; rename the file")


class ModelShape(Protocol):
    """What a heads file is checked by; `kvtool.models.ModelInfo` is one."""

    @property
    def model_id(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def n_layers(self) -> int: ...
    @property
    def n_heads(self) -> int: ...
    @property
    def n_kv_heads(self) -> int: ...


def with_heads(policy: Policy, path: str) -> Policy:
    """Return the policy with that heads file, if its method takes one and names none yet."""
    if not path or not policy.method.wants_heads:
        return policy
    return replace(policy, method=replace(policy.method, heads=path))  # type: ignore[call-arg]


def check_heads(policies: Sequence[Policy], model: ModelShape) -> dict[str, str]:
    """Read every heads file that the policies name and refuse those that cannot serve them, or are of another model.

    Returns
    -------
    dict of str to str
        Path -> hash of its content. Part of a run's identity: what was found with another file is not mixed.

    Raises
    ------
    ConfigError
        A policy that needs a file names none.
    DataError
        A file that cannot be read, lacks what the policy needs, or is of another model.
    """
    hashes: dict[str, str] = {}
    for policy in policies:
        policy.method.parts().allocator.check_files()
        path = getattr(policy.method, "heads", "")
        if path and path not in hashes:
            _check_model(read_head_file(path), model)
            hashes[path] = hashlib.sha256(_file(path).read_bytes()).hexdigest()[:16]
        if (path := getattr(policy.method, "plan", "")) and path not in hashes:
            read_plan(path).check_model(model.fingerprint, model.model_id)
            hashes[path] = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
        if (path := getattr(policy.method, "file", "")) and path not in hashes:
            read_budgets(path).check_model(model.fingerprint, model.model_id, model.n_layers, model.n_kv_heads)
            hashes[path] = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    return hashes


def _check_model(table: HeadTable, model: ModelShape) -> None:
    """Refuse a table of another model; published files name none, their shape has to do."""
    if table.fingerprint is not None and table.fingerprint != model.fingerprint:
        raise DataError(
            f"heads file {table.path} is of {table.model_id} ({table.fingerprint}), not of {model.model_id} ({model.fingerprint}); "
            "classify a capture of this model"
        )
    for scores, n_heads, what in ((table.scores, model.n_heads, "query"), (table.kv_scores, model.n_kv_heads, "KV")):
        for found in scores.values():
            if found.shape != (model.n_layers, n_heads):
                raise DataError(
                    f"heads file {table.path} is of {found.shape[0]} layers with {found.shape[1]} {what} heads, "
                    f"{model.model_id} has {model.n_layers} with {n_heads}"
                )
