"""report.html: one self-contained file, the answer first, then the evidence."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from kvtool.analysis.answer import Answer
from kvtool.analysis.cliffs import Cliff
from kvtool.analysis.cliffs_report import cliff_table
from kvtool.analysis.fidelity import Agreement
from kvtool.analysis.figures import Figure
from kvtool.analysis.load import Reality, Simulation
from kvtool.analysis.page import render_page
from kvtool.analysis.tables import TableRow
from kvtool.analysis.tabular import Cell, Table, number, spread, words

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
    cliffs: Sequence[Cliff] = (),
    fall: Figure | None = None,
) -> str:
    """Return the page as HTML text.

    Parameters
    ----------
    rows : sequence of TableRow
    answer : Answer
    warnings : sequence of str
    figures : sequence of Figure
    agreements : sequence of Agreement
        Of predicted and real order; empty without a simulation, or without an order.
    simulation : Simulation or None
    reality : Reality
    cliffs : sequence of Cliff
    fall : Figure or None
        The cliffs' curves.
    """
    simulated = simulation is not None
    return render_page(
        "report.html.j2",
        answer=answer,
        warnings=warnings,
        table=comparison_table(rows, answer.policy, simulated),
        cliffs=cliff_table(cliffs) if cliffs else None,
        fall=fall,
        figures=figures,
        agreements=agreements,
        fidelity=[_agreement_table(agreements), _budget_table(agreements[0])] if agreements else [],
        facts=_facts(simulation, reality),
        provenance=json.dumps(_provenance(simulation, reality), indent=2, ensure_ascii=False),
        simulated=simulated,
    )


def comparison_table(rows: Sequence[TableRow], chosen: str | None, simulated: bool) -> Table:
    """Return what was run, one row per configuration, with its prediction where there is one.

    Parameters
    ----------
    rows : sequence of TableRow
    chosen : str or None
        Policy of the answer.
    simulated : bool
    """
    header = ["policy", "kept %", "KV saved %", *(["sim. rank", "real rank", "risk"] if simulated else ["real rank"])]
    header += ["accuracy (95 %)", "score (95 %)", "score − full", "ms/token", "note"]
    lines = []
    for row in rows:
        note = ", ".join(filter(None, ["recommended" if row.policy == chosen else "", row.note]))
        at = f" at {row.budget}" if row.status != "ok" else ""
        lines.append(
            (
                words((row.name or row.method) + at, row.policy),
                number(row.retention, 1, 100.0),
                number(row.saved, 1, 100.0),
                *([number(row.simulated_rank, 0)] if simulated else []),
                number(row.real_rank, 0),
                *([number(row.risk)] if simulated else []),
                spread(row.accuracy),
                spread(row.score),
                spread(row.change, 2, sign=True),
                number(row.tpot_s, 1, 1000.0),
                words(note),
            )
        )
    title = "Prediction beside reality" if simulated else "What was run"
    return Table("table", title, "", tuple(header), tuple(lines))


def _agreement_table(agreements: Sequence[Agreement]) -> Table:
    refined = any("refined_nll" in a.tau for a in agreements)
    header = ["real figure", "budgets", "tau of risk", "tau of attention recall", "difference"]
    header += [*(["tau of refined loss"] if refined else []), "ceiling", "regret top 3", "… by recall"]
    lines = []
    for a in agreements:
        tied = a.n_tied + a.n_noise
        finer = spread(a.tau["refined_nll"]) if "refined_nll" in a.tau else Cell("–", None)
        if "refined_nll" in a.tau:
            finer = Cell(f"{finer.text} of {a.n_cells_of['refined_nll']}", finer.value)
        lines.append(
            (
                words(TRUTH_NAMES[a.truth]),
                Cell(f"{a.n_cells}" + (f" (+{tied} without order)" if tied else ""), a.n_cells),
                spread(a.tau["risk"]),
                spread(a.tau["recall"]),
                spread(a.advantage["risk"], sign=True),
                *([finer] if refined else []),
                spread(a.ceiling),
                number(a.regret["risk"]["top3"].mean, 3),
                number(a.regret["recall"]["top3"].mean, 3),
            )
        )
    return Table("fidelity", "Agreement of the two orders", "", tuple(header), tuple(lines))


def _budget_table(agreement: Agreement) -> Table:
    header = ("budget", "configurations", "tau of risk", "tau of attention recall", "ceiling")
    lines = tuple(
        (words(c.budget), number(c.n_policies, 0), spread(c.tau["risk"]), spread(c.tau["recall"]), number(c.ceiling))
        for c in agreement.cells
    )
    title = f"Budget by budget, against {TRUTH_NAMES[agreement.truth]}"
    return Table("fidelity_budgets", title, "", header, lines)


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
