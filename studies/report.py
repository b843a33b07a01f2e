"""From the nodes of a study to its report: what is done is read, each run once, and handed to `kvtool.analysis`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtool.files import read_records
from kvtool.studies.extras import extra_tables
from kvtool.studies.graph import Node
from kvtool.studies.look import Look
from kvtool.studies.results import ResultRow, collect, to_records
from kvtool.studies.runner import STUDY, NodeRow, open_folder, study_status
from kvtool.studies.schema import Study
from kvtool.studies.state import REPORT, STRESS, folder_of

if TYPE_CHECKING:
    from kvtool.analysis.cliffs_report import CliffSummary
    from kvtool.analysis.study_report import StudyReport

#: Where the report lies in a study's output folder.
FOLDER = "report"


def is_study(folder: Path) -> bool:
    """Return whether a folder was written by ``kvtool run``."""
    return (folder / STUDY).exists()


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
        texts=look.texts(nodes, folder),
        asks=_asks(study),
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
        folders=_folders(nodes, look, folder, out),
        provenance=_provenance(study, nodes, folder),
    )
    return write_report(data, out)


def _asks(study: Study) -> str:
    """Return the metric that most of the study's findings are about; empty without findings."""
    counts = Counter(direction.metric for direction in study.directions)
    return max(counts, key=lambda metric: counts[metric]) if counts else ""


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


def _folders(nodes: Sequence[Node], look: Look, folder: Path, out: Path) -> dict[str, list[tuple[str, Path]]]:
    inner = {"stress": STRESS, "analyze": REPORT}
    titles = Counter(node.title for node in nodes)
    found: dict[str, list[tuple[str, Path]]] = {}
    for node in nodes:
        kind = node.stage.kind
        # Two stages that look at two runs of one cell would go by the same name.
        of = f" of {', '.join(below.stage.name for below in node.inputs.values())}" if titles[node.title] > 1 else ""
        found.setdefault(kind, []).append((node.title + of, folder_of(folder, node) / inner.get(kind, "")))
    needles = _needles(nodes, look, folder, out)
    return {**found, "needles": needles} if needles else found


def _needles(nodes: Sequence[Node], look: Look, folder: Path, out: Path) -> list[tuple[str, Path]]:
    """Draw heat maps of needle tests, the lengths of one stage, model and task together."""
    from kvtool.analysis.niah import read_needles, write_needles
    from kvtool.errors import DataError

    groups: dict[tuple[str, str, str, str], list[Path]] = {}
    for node in nodes:
        cell = node.cell
        if node.stage.kind == "infer" and node.work["repeat"] == 0 and str(cell.task).startswith("niah"):
            key = (node.stage.name, cell.model.label, str(cell.task), str(cell.compress_at))
            groups.setdefault(key, []).append(folder_of(folder, node))
    several = len({key[0] for key in groups}) > 1
    named = {p.policy: p.label + (f" at {p.budget}" if p.share else "") for _, place in look.places for p in place.points}
    found = []
    for number, (key, folders) in enumerate(groups.items()):
        target = out / "needles" / str(number)
        try:
            write_needles(read_needles(folders), target, named)
        except DataError:  # several needles in a prompt have no one depth
            continue
        found.append((f"{key[1]}, {key[2]}, compressed at the {key[3]}" + (f", stage {key[0]}" if several else ""), target))
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
    cliffs += [c for place in look.texts(nodes, folder.absolute()) for c in find_cliffs(place)]
    if not cliffs:
        raise DataError(
            f"{folder} holds no finished real runs at two retentions beside a full cache that scores above 0: no curve"
        )
    return write_cliffs(cliffs, refinements(cliffs, refine) if refine else [], out)
