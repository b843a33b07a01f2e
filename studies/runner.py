"""Run a study: node by node, what is done stays done, what fails is a row and the rest goes on."""

from __future__ import annotations

import os
import time
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvtool.errors import BusyError, CapacityError, ConfigError, KvtoolError, is_out_of_memory
from kvtool.executors.claims import claimed
from kvtool.executors.execution import LOCAL, Execution
from kvtool.files import read_records, write_json, write_text
from kvtool.progress import say
from kvtool.studies.estimate import beyond_context
from kvtool.studies.graph import ImpossibleCell, Node, build_graph, labels
from kvtool.studies.schema import Study
from kvtool.studies.state import BAD, STATES, Mark, begin, fail, finish, own_folder, unable
from kvtool.studies.twins import Marks, TwinCell, Twins
from kvtool.studies.work import LOCAL_ONLY, Bench, Models, Outcome, run_node

if TYPE_CHECKING:
    from kvtool.studies.look import Look
    from kvtool.studies.results import ResultRow

STUDY_SCHEMA = "kvtool.study/1"
STUDY, SOURCE, SESSIONS = "study.json", "study.yaml", "sessions.jsonl"
#: Stages that take care themselves of several processes in one folder.
SHARED = ("capture", "infer", "perplexity", "cliffs")


@dataclass(frozen=True, slots=True)
class NodeRow:
    """A node and what is known of it.

    Attributes
    ----------
    title, name, kind : str
        `name` is its folder under ``nodes/``.
    state, note : str
    seconds : float or None
    """

    title: str
    name: str
    kind: str
    state: str
    note: str
    seconds: float | None


@dataclass(frozen=True, slots=True)
class StudySummary:
    """What a run of a study left.

    Attributes
    ----------
    out : Path
    study, scale : str
    rows : tuple of NodeRow
    tables : str
        Results, as text; empty where there are none yet.
    seconds : float
        Wall time of this call.
    report : str
        Answer and place of the report, or why there is none.
    """

    out: Path
    study: str
    scale: str
    rows: tuple[NodeRow, ...]
    tables: str
    seconds: float
    report: str = ""

    @property
    def exit_code(self) -> int:
        """1 if a node failed or works on one that did."""
        return 1 if any(row.state in BAD for row in self.rows) else 0

    def counts(self) -> dict[str, int]:
        """Return how many nodes are in each state."""
        found = Counter(row.state for row in self.rows)
        return {state: found[state] for state in STATES if found[state]}

    def text(self) -> str:
        """Return what the command prints."""
        from kvtool.studies.tables import status_text

        return "\n\n".join(part for part in (self.tables, status_text(self), self.report) if part)


def run_study(
    study: Study,
    source: Path,
    out: Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    device_map: str | None = None,
    execution: Execution = LOCAL,
) -> StudySummary:
    """Run what is missing of a study; stopped at any moment, the same call continues.

    Parameters
    ----------
    study : Study
    source : Path
        The study's file; a copy is kept.
    out : Path
        Output folder; several studies and scales may share it.
    device, dtype, device_map : str, str, str or None
        See `kvtool.models.load_model`.
    execution : Execution
        How capture and infer run; the other stages run in this process.
    """
    began, out = time.monotonic(), out.absolute()
    nodes = build_graph(study, dtype)
    keep_source(study, source, out, dtype)
    bench = Bench(out, Models(device, device_map), execution, labels(study), Twins(out, nodes))
    marks = Marks(out, bench.twins)
    tried: set[str] = set()
    while True:
        progress = False
        for number, node in enumerate(nodes, start=1):
            mark = marks.look(node)
            marks.point(node)
            if mark.state in ("done", "blocked", "skipped", "same") or node.key in tried:
                continue
            mark = marks[node.key] = _advance(node, bench, marks, f"{number}/{len(nodes)} {node.title}")
            marks.point(node)
            if mark.state != "waiting":
                tried |= {node.key} if mark.state != "partial" else set()
                progress |= mark.state == "done"
        if not progress or all(marks[node.key].state not in ("waiting", "partial") for node in nodes):
            break
    return _summary(study, nodes, marks, out, time.monotonic() - began)


def keep_source(study: Study, source: Path, out: Path, dtype: str) -> None:
    """Keep what was run beside the results, so that its status can be told from the folder alone."""
    text, target = source.read_text(encoding="utf-8"), out / SOURCE
    if not target.exists() or target.read_text(encoding="utf-8") != text:
        write_text(target, text)
    facts = {
        "schema": STUDY_SCHEMA,
        "study": study.name,
        "scale": study.scale,
        "dtype": dtype,
        "source": str(source.absolute()),
    }
    write_json(out / STUDY, facts)


def _advance(node: Node, bench: Bench, marks: Marks, label: str) -> Mark:
    """Run a node if what it works on is complete."""
    above = unable(node, marks.results)
    if above is not None:
        return above
    for below in node.inputs.values():
        if marks.results[below.key].state != "done":
            return Mark("waiting", f"for {below.title}")
    if bench.execution.ray and node.stage.kind in LOCAL_ONLY:
        return Mark(
            "waiting", "measures time where it runs: run it with --executor local on the machine that is to be measured"
        )
    say(f"[{label}]")
    try:
        if (why := beyond_context(node)) is not None:
            raise ImpossibleCell(why)
        return _run(node, bench)
    except BusyError as error:
        return Mark("waiting", str(error))
    except TwinCell as error:
        mark = Mark("same", str(error))
    except ImpossibleCell as error:
        mark = fail(bench.out, node, "impossible", str(error))
    except CapacityError as error:
        mark = fail(bench.out, node, "oom", str(error))
    except KvtoolError as error:
        mark = fail(bench.out, node, "failed", str(error))
    except Exception as error:
        line = " ".join(str(error).split())[:300] or type(error).__name__
        oom = is_out_of_memory(error)
        mark = fail(
            bench.out,
            node,
            "oom" if oom else "crashed",
            line if oom else f"{type(error).__name__}: {line}",
            traceback.format_exc(),
        )
    say(f"  {mark.state}: {mark.note}")
    return mark


def _run(node: Node, bench: Bench) -> Mark:
    folder = own_folder(bench.out, node)
    if node.stage.kind in SHARED:
        return _timed(node, bench, begin(bench.out, node))
    with claimed(folder, None, lambda alone: None):
        return _timed(node, bench, begin(bench.out, node))


def _timed(node: Node, bench: Bench, resumed: bool) -> Mark:
    """Run a node and mark it as done where its result is complete."""
    from kvtool.files import append_records

    started, processor = time.monotonic(), _processor_s()
    outcome: Outcome = run_node(node, bench)
    seconds = time.monotonic() - started
    sessions = own_folder(bench.out, node) / SESSIONS
    facts = {"seconds": seconds, "processor_s": _processor_s() - processor}
    append_records(sessions, [{**facts, "shard": str(bench.execution.shard or ""), "missing": outcome.missing}])
    if outcome.missing:
        return Mark("partial", f"{outcome.missing} pieces are for other shards")
    total = sum(record["seconds"] for record in read_records(sessions))
    return finish(bench.out, node, outcome.notes, total, not resumed)


def _processor_s() -> float:
    """Return the processor time of this process and of the children that have ended."""
    return sum(os.times()[:4])


def _summary(study: Study, nodes: Sequence[Node], marks: Mapping[str, Mark], out: Path, seconds: float) -> StudySummary:
    from kvtool.studies.extras import extra_tables
    from kvtool.studies.look import Look
    from kvtool.studies.results import collect
    from kvtool.studies.tables import results_text, write_results

    rows = tuple(_row(node, marks[node.key]) for node in nodes)
    done = [node for node in nodes if marks[node.key].state == "done"]
    look = Look(study)
    results = collect(study, done, out, look)
    extra = extra_tables(done, out)
    write_results(study, results, rows, out, extra)
    report = _report(study, done, results, look, rows, out) if results else ""
    return StudySummary(out, study.name, study.scale, rows, results_text(study, results, extra), seconds, report)


def _report(
    study: Study, done: Sequence[Node], results: list[ResultRow], look: Look, rows: Sequence[NodeRow], out: Path
) -> str:
    """Write the report; a fault there must not take the results with it."""
    from kvtool.studies.report import FOLDER, make_report

    try:
        return make_report(study, done, results, look, rows, out, out / FOLDER).text()
    except Exception as error:
        line = " ".join(str(error).split())[:300] or type(error).__name__
        again = "" if isinstance(error, KvtoolError) else f"; a fault of kvtool, see it whole with: kvtool analyze study {out}"
        return f"no report: {type(error).__name__}: {line}{again}"


def study_status(study: Study, out: Path, dtype: str = "auto") -> StudySummary:
    """Return what is known of a study's nodes, from the output folder; runs nothing."""
    out, nodes = out.absolute(), build_graph(study, dtype)
    marks = Marks(out, Twins(out, nodes))
    for node in nodes:
        marks.look(node)
    return StudySummary(out, study.name, study.scale, tuple(_row(node, marks[node.key]) for node in nodes), "", 0.0)


def _row(node: Node, mark: Mark) -> NodeRow:
    return NodeRow(node.title, node.name, node.stage.kind, mark.state, mark.note, mark.seconds)


def open_folder(out: Path) -> tuple[Study, str]:
    """Return the study that an output folder holds, and its dtype.

    Raises
    ------
    ConfigError
        It holds none.
    """
    import json

    from kvtool.studies.parse import parse_study

    try:
        facts = json.loads((out / STUDY).read_text(encoding="utf-8"))
        text, source = (out / SOURCE).read_text(encoding="utf-8"), str(facts["source"])
        return parse_study(text, facts["scale"], source), str(facts["dtype"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{out} holds no study ({error}); give the study's file, or -o the folder of its run") from error
