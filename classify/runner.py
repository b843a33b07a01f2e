"""The classify stage: a capture in, heads.json out."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvtool.classify.features import HeadTable, distance_edges, head_table
from kvtool.classify.kinds import KINDS, MIN_PROMPTS, Kinds, classify_heads
from kvtool.errors import DataError
from kvtool.files import write_json

if TYPE_CHECKING:
    from kvtool.models import ModelInfo

SCHEMA = "kvtool.heads/1"
FIGURES = ("sink", "local", "far", "entropy", "importance", "retrieval")


@dataclass(frozen=True, slots=True)
class ClassifySummary:
    """What a classification found.

    Attributes
    ----------
    path : Path
    n_prompts : int
    counts : dict of str to int
        Heads per kind.
    n_unsure : int or None
        Heads whose kind changes too often under the bootstrap; None with too few prompts.
    top : tuple of dict
        The most important heads.
    """

    path: Path
    n_prompts: int
    counts: dict[str, int]
    n_unsure: int | None
    top: tuple[dict[str, Any], ...]

    def text(self) -> str:
        """Return what the command prints."""
        from kvtool.textgrid import figure, grid

        header = ["head (layer.head)", "kind", "confidence", "sink", "local", "far", "entropy", "importance", "retrieval"]
        rows = [
            [f"{h['layer']}.{h['head']}", h["kind"] + ("?" if h["unsure"] else ""), figure(h["confidence"], 2)]
            + [figure(h[name], 2) for name in FIGURES]
            for h in self.top
        ]
        counts = ", ".join(f"{n} {kind}" for kind, n in self.counts.items() if n)
        sure = (
            f"{self.n_unsure} unsure (?)" if self.n_unsure is not None else f"no confidence: fewer than {MIN_PROMPTS} prompts"
        )
        return f"{grid(header, rows)}\n\n{counts}; {sure}; from {self.n_prompts} prompts\n{self.path}"


def run_classify(capture_path: str | Path, out: str | Path, seed: int = 0, draws: int = 500) -> ClassifySummary:
    """Classify the heads of a captured model and write ``heads.json``: query heads, and KV heads from their group's means.

    Parameters
    ----------
    capture_path, out : path
    seed : int
        Of the bootstrap.
    draws : int

    Raises
    ------
    DataError
        Missing, damaged or empty capture.
    """
    from kvtool.capture.reader import open_capture

    with open_capture(capture_path) as capture:
        if not capture.samples:
            raise DataError(f"capture {capture_path} holds no complete sample; run the capture again, it continues")
        edges = distance_edges(list(capture.samples))
        table = head_table(list(capture.samples))
        grouped = table.grouped(capture.model.n_kv_heads)
        # The same draws of prompts for both.
        kinds, kv_kinds = (classify_heads(t, np.random.default_rng(seed), draws) for t in (table, grouped))
        heads = _heads(table, kinds)
        value = {
            "schema": SCHEMA,
            "model": asdict(capture.model),
            "data": {"task": capture.config.get("task"), "n": len(capture.samples), "seed": capture.config.get("seed")},
            "bootstrap": {"seed": seed, "draws": draws},
            "n_layers": capture.model.n_layers,
            "n_heads": capture.model.n_heads,
            "n_kv_heads": capture.model.n_kv_heads,
            "distance_edges": edges,
            "heads": heads,
            "kv_heads": _heads(grouped, kv_kinds),
        }
    path = Path(out)
    write_json(path, value)
    counts = {kind: sum(h["kind"] == kind for h in heads) for kind in KINDS}
    n_unsure = None if kinds.confidence is None else sum(bool(h["unsure"]) for h in heads)
    top = sorted(heads, key=lambda h: -h["importance"])[:10]
    return ClassifySummary(path, len(table.sink), counts, n_unsure, tuple(top))


def _heads(table: HeadTable, kinds: Kinds) -> list[dict[str, Any]]:
    unsure = kinds.unsure
    heads = []
    for layer, head in np.ndindex(kinds.kind.shape):
        heads.append(
            {
                "layer": layer,
                "head": head,
                "kind": KINDS[int(kinds.kind[layer, head])],
                "confidence": None if kinds.confidence is None else float(kinds.confidence[layer, head]),
                "unsure": None if unsure is None else bool(unsure[layer, head]),
                **{
                    name: None if (values := getattr(table, name)) is None else float(values[:, layer, head].mean())
                    for name in FIGURES
                },
                "distance_profile": [round(float(x), 6) for x in table.profile[:, layer, head].mean(0)],
            }
        )
    return heads


def read_heads(path: str | Path, info: ModelInfo) -> dict[str, Any]:
    """Read ``heads.json`` for a model.

    Raises
    ------
    DataError
        Missing or damaged file, or the heads of another model.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"heads file {path} cannot be read ({error}); make one with kvtool classify") from error
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        raise DataError(f"heads file {path} has another schema; {SCHEMA!r} is needed, make it with kvtool classify")
    model = value.get("model")
    if not isinstance(model, dict) or "fingerprint" not in model or not isinstance(value.get("heads"), list):
        raise DataError(f"heads file {path} is incomplete (it names no model or no heads); make it again with kvtool classify")
    if model["fingerprint"] != info.fingerprint:
        raise DataError(
            f"heads file {path} is of {model.get('model_id')}, not of {info.model_id}; classify a capture of this model"
        )
    return value
