"""Run the nodes that ask a capture further questions: search, compensation, importance."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtool.studies.state import CAPTURE, folder_of

if TYPE_CHECKING:
    from kvtool.studies.graph import Node
    from kvtool.studies.work import Bench


def search(node: Node, bench: Bench) -> list[str]:
    """Search settings; returns notes."""
    from kvtool.simulate.search import SearchConfig, run_search

    work = node.work
    config = SearchConfig(
        capture=str(bench.file(node.inputs["capture"], CAPTURE)),
        space=work["space"],
        budgets=tuple(work["budgets"]),
        trials=work["trials"],
        auto=not work["space"],
        sampler=work.get("sampler", "auto"),
        by=work.get("by", "risk"),
        heads=bench.heads(node),
        draws=work["draws"],
        seed=work["seed"],
    )
    summary = run_search(config, folder_of(bench.out, node))
    return summary.text().strip().splitlines()[-1:]


def compensation(node: Node, bench: Bench) -> list[str]:
    """Attribute what compensation loses; returns notes."""
    from kvtool.simulate.attribution_runner import AttributionConfig, run_attribution

    work, captured = node.work, node.inputs["capture"]
    config = AttributionConfig(
        capture=str(bench.file(captured, CAPTURE)),
        policies=node.policies,
        budgets=(),
        blocks=tuple(work["blocks"]),
        heads=bench.heads(node),
        measure=work["measure"],
        refine=work["refine"],
        draws=work["draws"],
        seed=work["seed"],
    )
    run_attribution(config, folder_of(bench.out, node), bench.loaded(captured) if work["refine"] else None)
    return [f"{len(node.policies)} policies x {len(work['blocks'])} block sizes"]


def importance(node: Node, bench: Bench) -> list[str]:
    """Measure the importance of heads, and what becomes of it under every policy; returns notes."""
    from kvtool.analysis.importance_report import write_importance
    from kvtool.classify.importance import CAPTURED, measure_captured
    from kvtool.simulate.importance import ABLATION, COMPRESSED, RECORDS, CutConfig, run_ablation, run_compressed

    work, captured, out = node.work, node.inputs["capture"], folder_of(bench.out, node)
    file, loaded = bench.file(captured, CAPTURE), bench.loaded(captured)
    cut, sources = CutConfig(str(file), work["sink"], work["window"]), [out / CAPTURED]
    facts = measure_captured(file, out, work["sink"], work["window"])
    if work["ablate"]:
        run_ablation(cut, loaded, out)
        sources.append(out / ABLATION / RECORDS)
    run_compressed(cut, loaded, out, node.policies, (), bench.heads(node), work["ablate"])
    write_importance(out, sources, out / COMPRESSED / RECORDS, facts, work["draws"], work["seed"])
    return [f"{len(node.policies)} policies"]
