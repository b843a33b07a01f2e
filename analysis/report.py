"""report.html: one self-contained file, the answer first, then the evidence."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from kvtool.analysis.answer import Answer
from kvtool.analysis.fidelity import Agreement
from kvtool.analysis.figures import Figure
from kvtool.analysis.load import Reality, Simulation
from kvtool.analysis.statistics import Interval
from kvtool.analysis.tables import TableRow

TRUTH_NAMES = {
    "answer_accuracy": "answer accuracy",
    "answer_exact": "exact match",
    "score": "task score",
    "answer_nll": "answer loss",
    "answer_margin": "answer margin",
}


def render_report(
    rows: Sequence[TableRow],
    answer: Answer,
    warnings: Sequence[str],
    figures: Sequence[Figure],
    agreements: Sequence[Agreement],
    simulation: Simulation | None,
    reality: Reality,
) -> str:
    """Return the page as HTML text."""
    from jinja2 import Environment

    source = files("kvtool.analysis").joinpath("templates/report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = lambda v: "–" if v is None else f"{100 * v:.1f} %"
    environment.filters["figure"] = lambda v, digits=2: "–" if v is None or v != v else f"{v:.{digits}f}"
    environment.filters["interval"] = _interval
    return environment.from_string(source).render(
        rows=rows,
        answer=answer,
        warnings=warnings,
        figures=figures,
        agreements=agreements,
        refined=any("refined_nll" in a.tau for a in agreements),
        truth_names=TRUTH_NAMES,
        facts=_facts(simulation, reality),
        provenance=json.dumps(_provenance(simulation, reality), indent=2, ensure_ascii=False),
        simulated=simulation is not None,
    )


def _interval(value: Interval | None, digits: int = 2) -> str:
    if value is None or value.mean != value.mean:
        return "–"
    mean, low, high = (f"{v:.{digits}f}".replace("-", "\u2212") for v in (value.mean, value.low, value.high))
    return f"{mean} ({low} to {high})"


def _facts(simulation: Simulation | None, reality: Reality) -> list[tuple[str, str]]:
    config, model = reality.config, reality.provenance.get("model", {})
    first = reality.records[0]
    facts = [
        ("Model", f"{model.get('model_id')} ({model.get('architecture')}, {model.get('n_layers')} layers, "
                  f"{model.get('n_heads')} query and {model.get('n_kv_heads')} KV heads)"),
        ("Task", f"{config.get('task')}, {first['seq_len']} tokens, {len(reality.samples)} prompts, scored by {first['metric']}"),
        ("The policy sees", "context and question" if config.get("compress_at") == "prompt" else "the context only"),
        ("Kernel", ", ".join(sorted({r["kernel"] for r in reality.records if r.get("kernel")}))),
    ]  # fmt: skip
    if simulation:
        fresh = "other" if simulation.config.get("prompt_seed") != config.get("seed") else "the same"
        facts.append(("Prediction from", f"{simulation.config.get('n')} captured prompts; the real run used {fresh} prompts"))
    return facts


def _provenance(simulation: Simulation | None, reality: Reality) -> dict[str, Any]:
    pair: dict[str, Any] = {"infer": {"config": reality.config, **reality.provenance}}
    if simulation:
        pair["simulate"] = {"config": simulation.config, **simulation.provenance}
    return pair
