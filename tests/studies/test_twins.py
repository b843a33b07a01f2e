"""Lengths that no sample reaches: such a cell is not run again, its row says whose result is its own, and what rests on it finds that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvtool.studies.graph import build_graph
from kvtool.studies.parse import parse_study, read_study
from kvtool.studies.plan import plan_nodes
from kvtool.studies.runner import StudySummary, run_study, study_status
from kvtool.studies.state import folder_of, own_folder

STUDY = """\
study: reach
models: {embedded: tiny}
tasks: ["longbench:qasper", niah]
lengths: [400, 2000, 4000, 9000]
policies: [streaming_4_28]
n: 2
stages:
  - capture: {n: 2, permute: 0, windows: [8], answer_tokens: 4, lengths: [2000, 4000], tasks: ["longbench:qasper"]}
  - simulate: {draws: 20}
  - infer: {generate: false, tasks: ["longbench:qasper"]}
  - compare: {draws: 20}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with four samples: two of some 700 tokens, one of more than 1000, and one that every draw of two leaves out."""
    folder = tmp_path_factory.mktemp("longbench")
    lines = [
        {
            "_id": name,
            "context": f"Story {name}. " + "The sea is wide. " * times,
            "input": "How is the sea?",
            "answers": ["wide"],
        }
        for name, times in (("a", 30), ("b", 35), ("c", 80), ("d", 90))
    ]
    text = "".join(json.dumps({**line, "length": 9, "all_classes": None}) + "\n" for line in lines)
    (folder / "qasper.jsonl").write_text(text)
    return folder


@pytest.fixture(scope="module")
def done(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, StudySummary]:
    path = tmp_path_factory.mktemp("twins") / "reach.yaml"
    path.write_text(STUDY.replace("longbench:qasper", f"longbench:qasper,path={data}"))
    out = path.parent / "out"
    return path, out, run_study(read_study(path, "full"), path, out, device="cpu")


def states(summary: StudySummary, kind: str) -> dict[int, tuple[str, str]]:
    """Length -> state and note."""
    rows = [row for row in summary.rows if row.kind == kind]
    return {int(row.title.split()[-2]): (row.state, row.note) for row in rows}


def test_a_cell_with_the_same_prompts_is_run_once(done: tuple[Path, Path, StudySummary]) -> None:
    path, out, summary = done
    infer = states(summary, "infer")
    own = [length for length, (state, _) in infer.items() if state == "done"]
    same = {length: note for length, (state, note) in infer.items() if state == "same"}
    assert infer[9000][0] == "impossible"
    assert "context of 4224" in infer[9000][1]
    assert own[0] == 400
    assert 4000 in same
    # What the rule promises, from the records of the run itself: no two cells that were run have the same prompts.
    nodes = {n.cell.length: n for n in build_graph(read_study(path, "full")) if n.stage.kind == "infer"}
    longest = {length: json.loads((own_folder(out, nodes[length]) / "prompts.json").read_text())["longest"] for length in own}
    assert len(set(longest.values())) == len(own)
    assert same[4000].endswith(f"its longest prompt has {longest[own[-1]]:,} tokens")
    assert f"{own[-1]} prompt" in same[4000]
    assert not (own_folder(out, nodes[4000]) / "records.jsonl").exists()
    assert folder_of(out, nodes[4000]) == own_folder(out, nodes[own[-1]])


def test_what_rests_on_such_a_cell_is_the_same_too(done: tuple[Path, Path, StudySummary]) -> None:
    _, _, summary = done
    for kind in ("compare", "infer"):
        assert [s for s, _ in states(summary, kind).values()][-2:] == ["same", "impossible" if kind == "infer" else "skipped"]
    for kind in ("capture", "simulate"):
        assert [s for s, _ in states(summary, kind).values()] == ["done", "same"]
    assert summary.exit_code == 0


def test_the_next_run_and_the_status_say_the_same(done: tuple[Path, Path, StudySummary]) -> None:
    path, out, summary = done
    before = {file: file.stat().st_mtime_ns for file in out.glob("nodes/**/*") if file.is_file()}
    again = run_study(read_study(path, "full"), path, out, device="cpu")
    assert [(r.title, r.state) for r in again.rows] == [(r.title, r.state) for r in summary.rows]
    assert {f: t for f, t in before.items() if f.stat().st_mtime_ns != t and f.name != "failed.json"} == {}
    assert study_status(read_study(path, "full"), out).counts() == summary.counts()
    table = (out / "results.csv").read_text().splitlines()
    assert sum(",4000," in line for line in table) == 0


def test_without_the_other_cell_it_is_run(done: tuple[Path, Path, StudySummary]) -> None:
    path, out, _ = done
    text = path.read_text().replace("lengths: [400, 2000, 4000, 9000]", "lengths: [400, 4000]")
    alone = path.parent / "alone.yaml"
    alone.write_text(text.replace("lengths: [2000, 4000], tasks", "lengths: [400], tasks"))
    again = run_study(read_study(alone, "full"), alone, out, device="cpu")
    assert states(again, "infer")[4000][0] == "done"
    assert "4,000 were allowed" in states(again, "infer")[4000][1]


def test_the_plan_tells_it_beforehand(done: tuple[Path, Path, StudySummary], tmp_path: Path) -> None:
    path, _, summary = done
    nodes = build_graph(read_study(path, "full"))
    marks, notes = plan_nodes(nodes, tmp_path)
    told = [mark.state for mark in marks]
    ran = [row.state for row in summary.rows]
    assert [s.replace("pending", "done") for s in told] == ran
    assert any("the same as infer" in note for note in notes)
    assert list(tmp_path.iterdir()) == []


def test_the_plan_says_what_it_cannot_tell(tmp_path: Path) -> None:
    text = STUDY.replace("longbench:qasper", f"longbench:qasper,path={tmp_path / 'nowhere'}")
    marks, notes = plan_nodes(build_graph(parse_study(text, "full")), tmp_path)
    assert {mark.state for mark in marks} == {"pending", "impossible", "skipped"}
    assert len(notes) == 1
    assert "found by the run" in notes[0]


def test_models_with_lengths_of_their_own() -> None:
    text = """\
study: own
models: {long: tiny, short: {id: "shape:llama-3m", lengths: [100]}}
tasks: [niah]
lengths: [200, 400]
retentions: [10%]
policies: [hace]
n: 4
stages:
  - capture: {lengths: [100, 200]}
  - classify: {task: niah, length: 200}
  - infer
  - perplexity
"""
    nodes = build_graph(parse_study(text, "full"))
    cells = {(n.stage.kind, n.cell.model.label, n.cell.length) for n in nodes}
    assert {c for c in cells if c[1] == "short"} == {
        (kind, "short", 100) for kind in ("capture", "classify", "infer", "perplexity")
    }
    assert {length for kind, label, length in cells if (kind, label) == ("infer", "long")} == {200, 400}
    # Its heads come from prompts that it can read; they do not name the model's lengths in their content.
    heads = next(n for n in nodes if n.stage.kind == "infer" and n.cell.model.label == "short").inputs["heads"]
    assert heads.inputs["capture"].work["length"] == 100
