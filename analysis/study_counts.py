"""What stands behind a picture that a stage has made: how many prompts, which intervals; and the study's own names in its texts."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from kvtool.analysis.study import StudyData
from kvtool.naming import figure_names

_PROMPTS = re.compile(r"\b(\d+) prompts\b")


def behind(stem: str, folder: Path, rows: str) -> str:
    """Return a sentence of the prompts and intervals behind a picture, as its stage's folder says; empty where it says nothing."""
    if stem == "gaps":
        n = _first_count(folder / "gaps.md")
        return f" Means over {n} prompts; their 95 % intervals stand in the stage's gaps.csv." if n else ""
    if stem == "importance":
        n = _first_count(folder / "importance.md")
        return f" Means over {n} prompts; their 95 % intervals stand in the data of the figure." if n else ""
    if stem in ("causes", "heads"):
        n = _json(folder / "compensation.json").get("prompts")
        return f" Means over {n} prompts; their 95 % intervals stand in the data of the figure." if n else ""
    if stem == "heads_reliability":
        pairs = sum(int(float(line["n"])) for line in csv.DictReader(io.StringIO(rows)))
        n = _json(folder / "heads.json").get("data", {}).get("n")
        return f" {pairs} pairs of a head and a half" + (f", of {n} prompts; shares without intervals." if n else ".")
    if stem == "search":
        return _searched(folder / "auto.yaml")
    if stem == "endless":
        return " One run of each, on the machine that ran it: no intervals."
    return ""


def _searched(path: Path) -> str:
    import yaml

    found = (yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None) or {}
    counts = found.get("prompts") or {}
    if not counts:
        return ""
    what = str(found.get("by", "risk"))
    return (
        f" Lower is better: mean predicted {what} over the {counts.get('searched')} prompts of the search; the choice is judged on "
        f"{counts.get('held_out')} others, the 95 % intervals of its difference from the defaults stand in the data of the figure."
    )


def prompts_of(data: StudyData, title: str) -> int | None:
    """Return how many prompts the workload has that a stage's title names; None where that is not one number."""
    words = title.split()
    counts = {len(p.samples) for p in data.places if {p.model, p.task, str(p.length), p.compress_at} <= set(words)}
    return counts.pop() if len(counts) == 1 else None


def segments_of(data: StudyData, place: Sequence[object]) -> int | None:
    """Return how many pieces of a text were read, as its stage notes."""
    stage, model, task, length = place
    own = [n for n in data.nodes if n["stage"] == stage and {str(model), str(task), str(length)} <= set(n["title"].split())]
    counts = {int(found[1]) for n in own if (found := re.match(r"(\d+) segments", str(n["note"])))}
    return counts.pop() if len(counts) == 1 else None


def study_words(svg: str, stem: str, title: str, data: StudyData, rows: str) -> str:
    """Return a picture whose texts name model and policies as the study does."""
    for old, new in (*_models(data, title), *(_policies(data, rows) if stem == "endless" else [])):
        pattern = re.compile(rf"(>[^<]*?)(?<![\w:/.-]){re.escape(escape(old))}(?=[,\s])")
        svg = pattern.sub(lambda found, new=new: found[1] + escape(new), svg)  # type: ignore[misc]
    return svg


def _models(data: StudyData, title: str) -> list[tuple[str, str]]:
    """Return the id of the model of a stage, and what the study calls it, where both are known and differ."""
    labels = {str(name) for name in (*(p.model for p in data.places), *(row.get("model") for row in data.rows)) if name}
    mine = [label for label in labels if f" {label} " in f" {title} "]
    ids = {str(_model_id(run)) for key, run in data.provenance.get("runs", {}).items() if mine and key.endswith(f" {mine[0]}")}
    known = ids - {"None"}
    return [(known.pop(), mine[0])] if len(mine) == 1 and len(known) == 1 and known != {mine[0]} else []


def _model_id(run: Mapping[str, Any]) -> object:
    model = run.get("config", {}).get("model")
    return model.get("model_id") if isinstance(model, Mapping) else model


def _policies(data: StudyData, rows: str) -> list[tuple[str, str]]:
    """Return policies as the stage's figure shows them, and what the study calls them."""
    texts = list(dict.fromkeys(line["policy"] for line in csv.DictReader(io.StringIO(rows))))
    labels = {str(row["policy"]): str(row["label"]) for row in data.rows if row.get("label")}
    shown = figure_names(texts)
    return [(shown[text], labels[text]) for text in texts if text in labels]


def _first_count(path: Path) -> int | None:
    found = _PROMPTS.search(path.read_text(encoding="utf-8")) if path.exists() else None
    return int(found[1]) if found else None


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found
