"""From the nodes of a study to its report: what is done is read, each run once, and handed to `kvtool.analysis`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtool.files import read_records
from kvtool.studies.extras import extra_tables
from kvtool.studies.graph import Node, labels
from kvtool.studies.naming import named_as, without_heads
from kvtool.studies.results import ResultRow, collect, to_records
from kvtool.studies.runner import STUDY, NodeRow, open_folder, study_status
from kvtool.studies.schema import Study
from kvtool.studies.state import REPORT, STRESS, folder_of

if TYPE_CHECKING:
    from kvtool.analysis.cliffs_report import CliffSummary
    from kvtool.analysis.points import Place
    from kvtool.analysis.study_report import StudyReport

#: Where the report lies in a study's output folder.
FOLDER = "report"


def is_study(folder: Path) -> bool:
    """Return whether a folder was written by ``kvtool run``."""
    return (folder / STUDY).exists()


class Look:
    """Digests the records of every real run while `collect` has them in hand."""

    def __init__(self, study: Study) -> None:
        self._named = labels(study)
        self.places: list[tuple[Node, Place]] = []

    def __call__(self, node: Node, records: list[dict[str, Any]]) -> None:
        """Keep what the report needs of one node."""
        from kvtool.analysis.points import make_place

        named = {}
        for text in dict.fromkeys(record["policy"] for record in records):
            own = without_heads(text, node)
            # What was added where a curve falls goes by the name of its method.
            found = self._named.get(own) or named_as(own, self._named)
            if found:
                named[text] = (found[0].label, found[0].group)
        cell = node.cell
        place = make_place(records, cell.model.label, named, task=cell.task, length=cell.length, stage=node.stage.name)
        if place is not None:
            self.places.append((node, place))


def make_report(
    study: Study,
    nodes: Sequence[Node],
    rows: Sequence[ResultRow],
    look: Look,
    state: Sequence[NodeRow],
    folder: Path,
    out: Path,
) -> StudyReport:
    """Write the report of the finished nodes.

    Parameters
    ----------
    study : Study
    nodes : sequence of Node
        The finished ones.
    rows : sequence of ResultRow
    look : Look
        That saw the same nodes.
    state : sequence of NodeRow
        All nodes.
    folder, out : Path
        Of the study, of the report.
    """
    from kvtool.analysis.study import StudyData
    from kvtool.analysis.study_report import write_report

    stage_of = {node.name: node.stage.name for node in nodes}
    data = StudyData(
        name=study.name,
        scale=study.scale,
        about=study.about,
        places=tuple(place for _, place in look.places),
        predicted=tuple(_predicted(node, nodes, folder) for node, _ in look.places),
        rows=to_records(rows),
        nodes=[
            {
                "title": r.title,
                "name": r.name,
                "kind": r.kind,
                "stage": stage_of.get(r.name, r.kind),
                "state": r.state,
                "note": r.note,
                "seconds": r.seconds,
            }
            for r in state
        ],
        tables=[*_own_tables(study, rows), *extra_tables(nodes, folder)],
        folders=_folders(nodes, folder, out),
        provenance=_provenance(study, nodes, folder),
    )
    return write_report(data, out)


def _predicted(node: Node, nodes: Sequence[Node], folder: Path) -> dict[str, dict[str, Any]]:
    """Return policy text -> row of the last simulation of the same cell: refined, where there is one, and of what was added to it."""
    from kvtool.studies.work_cliffs import refined_rows

    same = [n for n in nodes if n.stage.kind in ("simulate", "refine") and n.cell == node.cell]
    added = [n for n in nodes if n.stage.kind == "cliffs" and n.inputs["infer"].key == node.key]
    finer = {text: row for n in added for text, row in refined_rows(folder_of(folder, n)).items()}
    return finer | ({row["policy"]: row for row in read_records(folder_of(folder, same[-1]) / "ranking.jsonl")} if same else {})


def _own_tables(study: Study, rows: Sequence[ResultRow]) -> list[tuple[str, list[str], list[list[str]]]]:
    """The study's own numbers and findings, as cells instead of text."""
    from kvtool.studies.tables import sections

    found = []
    for title, text in sections(study, rows, lambda header, lines: json.dumps([list(header), [list(line) for line in lines]])):
        header, lines = json.loads(text)
        found.append((title, header, lines))
    return found


def _folders(nodes: Sequence[Node], folder: Path, out: Path) -> dict[str, list[tuple[str, Path]]]:
    inner = {"stress": STRESS, "analyze": REPORT}
    found: dict[str, list[tuple[str, Path]]] = {}
    for node in nodes:
        kind = node.stage.kind
        found.setdefault(kind, []).append((node.title, folder_of(folder, node) / inner.get(kind, "")))
    needles = _needles(nodes, folder, out)
    return {**found, "needles": needles} if needles else found


def _needles(nodes: Sequence[Node], folder: Path, out: Path) -> list[tuple[str, Path]]:
    """Draw heat maps of needle tests whose prompts lie on a grid of depths, the lengths of one model and task together."""
    from kvtool.analysis.niah import read_needles, write_needles

    groups: dict[tuple[str, str, str], list[Path]] = {}
    for node in nodes:
        task = str(node.cell.task)
        if node.stage.kind == "infer" and node.work["repeat"] == 0 and task.startswith("niah") and "depths=" in task:
            groups.setdefault((node.cell.model.label, task, str(node.cell.compress_at)), []).append(folder_of(folder, node))
    found = []
    for number, (key, folders) in enumerate(groups.items()):
        target = out / "needles" / str(number)
        write_needles(read_needles(folders), target)
        found.append((f"{key[0]}, {key[1]}, compressed at the {key[2]}", target))
    return found


def _provenance(study: Study, nodes: Sequence[Node], folder: Path) -> dict[str, Any]:
    """Hashes of all nodes; settings, versions and machine of the first of each stage and model."""
    from kvtool import __version__

    runs = {}
    for node in nodes:
        path = folder_of(folder, node) / "run.json"
        key = f"{node.stage.name} {node.cell.model.label}"
        if key not in runs and path.exists():
            runs[key] = json.loads(path.read_text(encoding="utf-8"))
    return {
        "kvtool": __version__,
        "study": study.name,
        "scale": study.scale,
        "nodes": {n.title: n.key for n in nodes},
        "runs": runs,
    }


def _read(folder: Path) -> tuple[Study, list[Node], tuple[NodeRow, ...], list[ResultRow], Look]:
    """Read a study's folder: its finished nodes, state and results."""
    from kvtool.studies.graph import build_graph

    study, dtype = open_folder(folder)
    state = study_status(study, folder, dtype).rows
    done = {row.name for row in state if row.state == "done"}
    nodes = [node for node in build_graph(study, dtype) if node.name in done]
    look = Look(study)
    return study, nodes, state, collect(study, nodes, folder.absolute(), look), look


def report_of_folder(folder: Path, out: Path) -> StudyReport:
    """Write the report of a study's folder, finished or not.

    Raises
    ------
    ConfigError
        The folder holds no study.
    """
    study, nodes, state, rows, look = _read(folder)
    return make_report(study, nodes, rows, look, state, folder.absolute(), out)


def study_cliffs(folder: Path, out: Path, refine: int) -> CliffSummary:
    """Find the performance cliffs of a study's real runs.

    Raises
    ------
    DataError
        Nothing in it has a curve.
    """
    from kvtool.analysis.cliffs import find_cliffs
    from kvtool.analysis.cliffs_report import write_cliffs
    from kvtool.analysis.study_report import refinements
    from kvtool.errors import DataError

    _, nodes, _, _, look = _read(folder)
    cliffs = [c for node, place in look.places for c in find_cliffs(place, _predicted(node, nodes, folder.absolute()))]
    if not cliffs:
        raise DataError(
            f"{folder} holds no finished real runs at two retentions beside a full cache that scores above 0: no curve"
        )
    return write_cliffs(cliffs, refinements(cliffs, refine) if refine else [], out)
