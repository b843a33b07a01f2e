"""Refine performance cliffs: run retentions between those where a curve falls, on the same prompts, and find the cliff again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtool.executors.claims import claimed
from kvtool.executors.records import RECORDS, read_units
from kvtool.files import append_records, read_records, write_json, write_text
from kvtool.studies.graph import Node
from kvtool.studies.naming import method_text, named_as, without_heads
from kvtool.studies.state import CAPTURE, folder_of

if TYPE_CHECKING:
    from kvtool.analysis.cliffs import Cliff
    from kvtool.analysis.points import Place
    from kvtool.policies import Policy
    from kvtool.studies.schema import Choice
    from kvtool.studies.work import Bench

#: Real runs of each round, and the simulation of what was added, in the node's folder.
ROUND, SIMULATED, JUDGED = "round", "simulated", "judged"
FACTS, WORDS = "cliffs.json", "refined.md"


def refine_cliffs(node: Node, bench: Bench) -> tuple[int, list[str]]:
    """Run further retentions where curves fall; returns the pieces that other shards have to do, and notes.

    Stopped at any moment, the same call continues: what a round runs follows from the rounds before, which are complete.
    """
    work, folder, real = node.work, folder_of(bench.out, node), node.inputs["infer"]
    source = folder_of(bench.out, real)
    records, added, first = read_units(source), list[str](), list["Cliff"]()
    for number in range(1, work["rounds"] + 1):
        cliffs = cliffs_of(node, records, bench)
        first = first or cliffs
        wanted = _wanted(node, cliffs, {record["policy"] for record in records})
        if not wanted:
            break
        missing, found = _run(node, bench, wanted, folder / f"{ROUND}-{number}", records)
        if missing:
            return missing, [f"round {number}: {missing} units are for other shards"]
        added += wanted
        records += [record for record in found if record["policy"] != "full"]
    # Several shards may come here at the same time.
    with claimed(folder / JUDGED, None, lambda alone: None):
        predicted = _predict(node, bench, added)
        cliffs = cliffs_of(node, records, bench, predicted)
        return 0, [_write(node, folder, first, cliffs, added)]


def _place(node: Node, records: Sequence[Mapping[str, Any]], named: Mapping[str, list[Choice]]) -> Place | None:
    from kvtool.analysis.points import make_place

    real, cell = node.inputs["infer"], node.cell
    shown = {}
    for text in dict.fromkeys(record["policy"] for record in records):
        own = without_heads(text, real)
        found = named.get(own) or named_as(own, named)
        if found:
            shown[text] = (found[0].label, found[0].group)
    return make_place(records, cell.model.label, shown, task=cell.task, length=cell.length, stage=real.stage.name)


def cliffs_of(
    node: Node, records: Sequence[Mapping[str, Any]], bench: Bench, predicted: Mapping[str, Mapping[str, Any]] | None = None
) -> list[Cliff]:
    """Return the cliffs of some records; of the methods that the stage names, if it names any."""
    from kvtool.analysis.cliffs import find_cliffs

    place = _place(node, records, bench.named)
    if place is None:
        return []
    methods = {method_text(text) for text in node.policies}
    found = find_cliffs(place, predicted)
    return [c for c in found if not methods or method_text(without_heads(c.curve[0][0].policy, node)) in methods]


def _wanted(node: Node, cliffs: Sequence[Cliff], there: set[str]) -> list[str]:
    """Return the policies to add, as text."""
    from kvtool.analysis.cliffs import between
    from kvtool.analysis.cliffs_report import at_retention
    from kvtool.policies import parse_policy

    texts = [at_retention(cliff.method, value) for cliff in cliffs for value in between(cliff, node.work["points"])]
    return [text for text in dict.fromkeys(str(parse_policy(text)) for text in texts) if text not in there]


def _run(
    node: Node, bench: Bench, wanted: Sequence[str], folder: Path, records: Sequence[dict[str, Any]]
) -> tuple[int, list[dict[str, Any]]]:
    """Run policies on the prompts of the real run that is looked at; the full cache's units are that run's."""
    from kvtool.infer.runner import InferConfig, run_infer
    from kvtool.policies import parse_policy
    from kvtool.studies.work import samples_of

    real, notes = node.inputs["infer"], list[str]()
    loaded = bench.loaded(real)
    samples = samples_of(real, loaded, notes)
    policies: list[Policy] = [parse_policy(text) for text in wanted]
    config = InferConfig(**{key: real.work[key] for key in InferConfig.__dataclass_fields__ if key in real.work})
    if bench.execution.shard is None and not (folder / "run.json").exists() and not (folder / RECORDS).exists():
        full = [record for record in records if record["policy"] == "full"]
        append_records(folder / RECORDS, full)
    summary = run_infer(config, loaded, samples, policies, folder, bench.execution)
    return summary.n_missing, [] if summary.n_missing else read_units(folder)


def _predict(node: Node, bench: Bench, added: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Simulate what was added and what it stands between, for the reason of a fall; nothing without a capture."""
    from kvtool.simulate.runner import SimulateConfig, run_simulate

    if "capture" not in node.inputs:
        return {}
    source = folder_of(bench.out, node.inputs["infer"])
    of_grid = dict.fromkeys(r["policy"] for r in read_units(source) if r["policy"] != "full" and r["status"] == "ok")
    target = folder_of(bench.out, node) / SIMULATED
    policies = tuple(dict.fromkeys([*of_grid, *added]))
    capture = str(bench.file(node.inputs["capture"], CAPTURE))
    run_simulate(SimulateConfig(capture=capture, policies=policies, draws=100, jobs=0), target)
    return {row["policy"]: row for row in read_records(target / "ranking.jsonl")}


def _write(node: Node, folder: Path, before: Sequence[Cliff], after: Sequence[Cliff], added: Sequence[str]) -> str:
    """Write table, figure and facts; returns a note."""
    from kvtool.analysis.cliffs_report import cliff_facts, write_cliffs
    from kvtool.textgrid import markdown_grid

    was = {(cliff.label, cliff.method): cliff for cliff in before}
    facts = []
    for cliff in after:
        grid = was.get((cliff.label, cliff.method))
        found = {} if grid is None else {"before": grid.critical, "before_safe": grid.safe}
        facts.append({**cliff_facts(cliff), "before": None, "before_safe": None, **found})
    write_json(folder / FACTS, {"schema": "kvtool.cliffs/1", "cell": str(node.cell), "added": list(added), "cliffs": facts})
    lines = [refined_cells(fact) for fact in facts]
    text = markdown_grid(list(REFINED), lines) if lines else "No curve: nothing was run at two retentions that lose something."
    write_text(folder / WORDS, f"# Performance cliffs, refined: {node.cell}\n\n{text}\n")
    if after:
        write_cliffs(after, (), folder)
    narrower = sum(fact["critical"] is not None and fact["critical"] != fact["before"] for fact in facts)
    n_critical = sum(fact["critical"] is not None for fact in facts)
    return f"{len(added)} retentions added; {n_critical} of {len(facts)} curves have a critical retention, {narrower} moved"


#: Columns of the table of refined cliffs.
REFINED = (
    *("method", "critical on the grid", "critical, refined", "no clear loss at", "loss there (95 %)"),
    *("smallest loss that shows", "bracket of 3 %", "largest drop", "loss in it", "reason"),
)


def refined_cells(fact: Mapping[str, Any]) -> list[str]:
    """Return the cells of one refined cliff, of its facts."""
    from kvtool.analysis.cliffs import percent

    drop, critical, held, shows = fact["drop"], fact["critical"], fact.get("held"), fact.get("shows")
    return [
        str(fact["label"]),
        # Folders of older versions do not say what was safe on the grid.
        ("at or above " if fact["before"] is not None and fact.get("before_safe", fact["safe"]) is None else "")
        + percent(fact["before"]),
        ("at or above " if critical is not None and fact["safe"] is None else "")
        + percent(critical)
        + (" (no clear loss again below)" if fact["back"] else ""),
        percent(fact["safe"]),
        "-" if held is None else f"{100 * held['mean']:.0f} ({100 * held['low']:.0f} to {100 * held['high']:.0f}) %",
        "-" if shows is None else f"{100 * shows:.2g} % ({fact['n']} prompts)",
        str((fact.get("surely") or {}).get("words", "-")),
        "-" if drop is None else f"{percent(drop['above'])} to {percent(drop['below'])}",
        "-" if drop is None else f"{100 * drop['loss']:.0f} %",
        str(fact["reason"] or "-"),
    ]


def read_facts(folder: Path) -> dict[str, Any]:
    """Return what a finished node found."""
    found: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    return found


def refined_records(folder: Path) -> list[dict[str, Any]]:
    """Return the records of the retentions that a node added, without the full cache's."""
    return [r for path in sorted(folder.glob(f"{ROUND}-*")) for r in read_units(path) if r["policy"] != "full"]


def refined_rows(folder: Path) -> dict[str, dict[str, Any]]:
    """Return policy text -> row of the simulation of what was added."""
    path = folder / SIMULATED / "ranking.jsonl"
    return {row["policy"]: row for row in read_records(path)} if path.exists() else {}
