"""Run the nodes that judge what others made: comparisons, consistency, the head-importance-variance test, and the row without a cache."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import TYPE_CHECKING

from kvtool.studies.state import CAPTURE, folder_of

if TYPE_CHECKING:
    from kvtool.studies.graph import Node
    from kvtool.studies.work import Bench


def gaps(node: Node, bench: Bench) -> list[str]:
    """Take what policies lose against the oracle apart; returns notes."""
    from kvtool.simulate.gap_runner import GapConfig, run_gaps

    work = node.work
    config = GapConfig(
        capture=str(bench.file(node.inputs["capture"], CAPTURE)),
        policies=node.policies,
        budgets=(),
        heads=bench.heads(node),
        shapes=work["shapes"],
        draws=work["draws"],
        seed=work["seed"],
    )
    summary = run_gaps(config, folder_of(bench.out, node))
    return [f"{len(summary.rows)} configurations on {summary.n_samples} prompts", *summary.sentences[:1]]


def hiv(node: Node, bench: Bench) -> list[str]:
    """Measure what becomes of head importance on every kind of prompts; returns notes."""
    from kvtool.analysis.hiv_report import write_hiv
    from kvtool.simulate.importance import COMPRESSED, RECORDS, CutConfig, run_compressed

    work, out = node.work, folder_of(bench.out, node)
    sources = {}
    for role, captured in node.inputs.items():
        if role.startswith("capture"):
            name = re.sub(r"[^A-Za-z0-9.]+", "-", str(captured.cell.task)).strip("-")
            cut = CutConfig(str(bench.file(captured, CAPTURE)), work["sink"], work["window"])
            run_compressed(cut, bench.loaded(captured), out / name, node.policies, (), bench.heads(node), work["ablate"])
            sources[name] = out / name / COMPRESSED / RECORDS
    summary = write_hiv(out, sources, (work["sink"], work["window"]), work["draws"], work["seed"])
    return [f"{len(sources)} kinds of prompts x {len(node.policies)} policies", *summary.notes[-1:]]


def compare(node: Node, bench: Bench) -> list[str]:
    """Put the policies of a real run side by side; returns notes."""
    from kvtool.analysis.compare import LEVEL, Draws
    from kvtool.analysis.compare_report import run_compare

    work, source = node.work, folder_of(bench.out, node.inputs["infer"])
    how = Draws(work["draws"], work["seed"], work.get("interval", "expanded"))
    summary = run_compare([source], folder_of(bench.out, node), work["baseline"], work.get("figures", ()), how)
    clear = sum(row.p_holm < LEVEL for row in summary.pairs)
    return [f"{len(summary.rows)} policies; {clear} of {len(summary.pairs)} pairs within a budget differ"]


def consistency(node: Node, bench: Bench) -> list[str]:
    """Compare the answers of a real run with the full cache's; returns notes."""
    from kvtool.analysis.consistency_report import run_consistency

    work, source = node.work, folder_of(bench.out, node.inputs["infer"])
    summary = run_consistency(
        source,
        folder_of(bench.out, node),
        work.get("baseline", "full"),
        right_from=work["right_from"],
        shown=work["review"],
        draws=work["draws"],
        seed=work["seed"],
    )
    return [f"{summary.n_pairs} answers, {summary.n_flips} turned right or wrong"]


def no_cache(node: Node, bench: Bench) -> list[str]:
    """Time decoding without a cache; returns notes."""
    from kvtool.infer.nocache import NoCacheConfig, run_no_cache

    config = NoCacheConfig(**{field.name: node.work[field.name] for field in fields(NoCacheConfig)})
    rows = run_no_cache(config, bench.loaded(node), folder_of(bench.out, node))
    bad = [f"{row.length} tokens: {row.status}" for row in rows if row.status != "ok"]
    return [f"{len(rows)} lengths", *bad[:3]]
