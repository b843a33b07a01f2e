"""Tables of stages that judge others, for the summary and the report: refined cliffs, and why policies fall short of the oracle."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from kvtool.naming import short_name
from kvtool.studies.graph import Node
from kvtool.studies.naming import without_heads
from kvtool.studies.state import folder_of
from kvtool.studies.work_cliffs import REFINED, read_facts, refined_cells

CLIFFS = "Critical retentions, refined where curves fall"
Line = list[str]
Extra = tuple[str, list[str], list[list[str]]]


def extra_tables(nodes: Sequence[Node], out: Path) -> list[Extra]:
    """Return title, header and lines of what finished nodes say beside results.

    Parameters
    ----------
    nodes : sequence of Node
        The finished ones.
    out : Path
        Of the study.
    """
    cliffs, gaps, metrics, hiv = list[Line](), list[Line](), list[Line](), list[Line]()
    answers = {n.inputs["infer"].key: folder_of(out, n) / "consistency.json" for n in nodes if n.stage.kind == "consistency"}
    for node in nodes:
        if node.stage.kind == "cliffs":
            cliffs += [[str(node.cell), *refined_cells(fact)] for fact in read_facts(folder_of(out, node))["cliffs"]]
        elif node.stage.kind == "gaps":
            gaps += [[str(node.cell), *cells] for cells in _gaps(folder_of(out, node) / "gaps.jsonl")]
        elif node.stage.kind == "compare":
            metrics += [[str(node.cell), *cells] for cells in _metrics(node, out, answers)]
        elif node.stage.kind == "hiv":
            hiv += [[str(node.cell), *cells] for cells in _hiv(folder_of(out, node))]
    found: list[Extra] = []
    if cliffs:
        found.append((CLIFFS, ["cell", *REFINED], cliffs))
    if gaps:
        found.append(("Why policies fall short of the oracle (predicted)", ["cell", *GAPS], gaps))
    if metrics:
        found.append(("Metrics of every policy", ["cell", *METRICS], metrics))
    if hiv:
        found.append(("Head importance before and after compression (KV heads)", ["cell", *HIV], hiv))
    return found


#: Of the design: cache efficiency is score % / kept %, specialization the Gini coefficient of the entries that heads keep.
METRICS = (
    *("policy", "kept %", "score", "score - full", "efficiency", "head specialization"),
    *("same answer", "token F1 with full", "ms/token / full"),
)
HIV = ("prompts", "policy", "importance", "kept %", "variance / full", "Spearman with full", "top heads shared")
GAPS = ("policy", "budget", "harm", "oracle", "protection", "selection", "price of the shape", "allocation")


def _gaps(path: Path) -> list[list[str]]:
    """Return the decomposition of each policy that could be run."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["status"] == "ok" and row.get("harm") is not None:
            parts = [row["parts"].get(name) for name in ("protection", "selection", "price", "allocation")]
            figures = [row["harm"], row["oracle"], *parts]
            cells = ["-" if figure is None else f"{figure['mean']:.2f}" for figure in figures]
            found.append([row["policy"].partition(":")[0], str(row["budget"] or "own"), *cells])
    return found


def _metrics(node: Node, out: Path, consistency: Mapping[str, Path]) -> list[list[str]]:
    """Return the design's metrics of each policy of a compared run: one line each."""
    compared = json.loads((folder_of(out, node) / "compare.json").read_text(encoding="utf-8"))
    path = consistency.get(node.inputs["infer"].key)
    answers = {} if path is None else {r["policy"]: r for r in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    found = []
    for row in compared["rows"]:
        if row["status"] != "ok" or row["retention"] is None:
            continue
        score = row["figures"].get("score") or row["figures"].get("answer_accuracy") or {}
        same = answers.get(row["policy"]) or {}
        cells = [without_heads(row["policy"], node.inputs["infer"]), f"{100 * row['retention']:.2f}"]
        cells += [_mean(score.get("mean")), _mean(score.get("change"), sign=True), _mean(row["efficiency"])]
        cells += [f"{row['heads']['gini']:.2f}" if row["heads"].get("gini") is not None else "-"]
        cells += [_mean(same.get("exact")), _mean(same.get("f1")), _mean(row["speed"].get("tpot_s"))]
        found.append(cells)
    return found


def _mean(figure: Mapping[str, float] | None, sign: bool = False) -> str:
    return "-" if figure is None else f"{figure['mean']:{'+' if sign else ''}.2f}"


def _hiv(folder: Path) -> list[list[str]]:
    """Return what compression does to the importance of KV heads, by policy and kind of prompts."""
    found = []
    for pattern, rows in json.loads((folder / "hiv.json").read_text(encoding="utf-8"))["changed"].items():
        for row in rows:
            if row["level"] == "kv_heads" and row["policy"] != "full" and row["message"] is None:
                cells = [_mean(row[name]) for name in ("ratio", "spearman", "overlap")]
                found.append([pattern, short_name(row["policy"]), row["measure"], f"{100 * row['retention']:.1f}", *cells])
    return found
