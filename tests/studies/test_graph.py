"""The graph: what shares a result is one node, what changes a result changes its name, and nothing else does."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvtool.studies.content import is_fixed, model_content, n_prompts, task_files
from kvtool.studies.graph import Node, build_graph
from kvtool.studies.parse import parse_study

STUDY = """\
study: probe
models: [tiny]
tasks: [niah, "niah:kind=multikey,keys=2"]
lengths: [128, 256]
retentions: [10%]
policies: [hace, snapkv]
n: 4
stages:
  - capture
  - classify: {task: niah, length: 128}
  - simulate
  - refine: {top: 2}
  - infer
  - analyze
"""


def graph(text: str = STUDY, dtype: str = "auto") -> dict[str, Node]:
    return {node.title: node for node in build_graph(parse_study(text, "full"), dtype)}


def test_cells_share_what_is_the_same() -> None:
    nodes = graph()
    kinds = [node.stage.kind for node in nodes.values()]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "capture": 4, "classify": 1, "simulate": 4, "refine": 4, "infer": 4, "analyze": 4,
    }  # fmt: skip
    heads = nodes["classify tiny niah 128 prompt"]
    assert heads.inputs["capture"].key == nodes["capture tiny niah 128 prompt"].key
    assert nodes["infer tiny niah 256 prompt"].inputs == {"heads": heads}
    assert set(nodes["refine tiny niah 256 prompt"].inputs) == {"capture", "heads", "simulate"}


def test_real_runs_use_fresh_prompts() -> None:
    nodes = graph()
    assert nodes["capture tiny niah 128 prompt"].work["seed"] == 0
    assert nodes["infer tiny niah 128 prompt"].work["seed"] == 1000


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ("n: 4", "n: 5", {"capture", "classify", "simulate", "refine", "infer", "analyze"}),
        ("refine: {top: 2}", "refine: {top: 3}", {"refine", "analyze"}),
        ("- infer", "- infer: {generate: false}", {"infer", "analyze"}),
        ("[hace, snapkv]", "[hace, snapkv, h2o]", {"simulate", "refine", "infer", "analyze"}),
        ("[hace, snapkv]", "{A: hace, B: snapkv}", set()),
        ("study: probe", "study: other\nabout: words", set()),
        ("models: [tiny]", "models: {label: tiny}", set()),
    ],
)
def test_a_name_changes_with_what_decides_the_result(old: str, new: str, changed: set[str]) -> None:
    before = {(n.stage.kind, n.cell.task, n.cell.length): n.key for n in graph().values()}
    after = {(n.stage.kind, n.cell.task, n.cell.length): n.key for n in graph(STUDY.replace(old, new, 1)).values()}
    assert {place[0] for place in before if after[place] != before[place]} == changed


def test_another_dtype_is_another_result() -> None:
    assert {n.key for n in graph().values()}.isdisjoint({n.key for n in graph(dtype="bfloat16").values()})


def test_policies_without_heads_do_not_wait_for_them() -> None:
    nodes = graph(STUDY.replace("[hace, snapkv]", "[snapkv]"))
    assert nodes["infer tiny niah 256 prompt"].inputs == {}


def test_subsets_choose_cells_policies_and_retentions() -> None:
    text = STUDY.replace("  - capture\n", "  - capture: {lengths: [128], tasks: [niah]}\n")
    text = text.replace("  - infer\n", "  - infer: {policies: [snapkv], retentions: [20%, 40%]}\n")
    nodes = graph(text)
    assert [t for t in nodes if t.startswith("simulate")] == ["simulate tiny niah 128 prompt"]
    assert nodes["infer tiny niah 256 prompt"].policies == ("snapkv:budget=20%", "snapkv:budget=40%")


def test_repeats_are_nodes_of_their_own() -> None:
    nodes = graph(STUDY.replace("  - infer\n", "  - infer: {repeats: 2}\n"))
    first, second = nodes["infer tiny niah 128 prompt"], nodes["infer tiny niah 128 prompt run 2"]
    assert first.key != second.key
    assert first.policies == second.policies


def test_files_count_by_their_content(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("one")
    before = task_files(f"file:{file}")
    file.write_text("two")
    assert before != task_files(f"file:{file}")
    assert task_files("file:nowhere.jsonl") == {}
    assert is_fixed(f"file:{file}")
    assert not is_fixed("niah:kind=multikey")


def test_local_models_count_by_their_content(tmp_path: Path) -> None:
    for name, weights in (("a", b"x" * 9000), ("b", b"x" * 8999 + b"y")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(weights)
    assert model_content(str(tmp_path / "a")) != model_content(str(tmp_path / "b"))
    assert model_content("owner/name") is None
    assert model_content("tiny") is not None


def test_prompts_are_counted_over_the_points_of_a_grid() -> None:
    nodes = graph(STUDY.replace("[niah, ", '["niah:depths=3", ').replace("task: niah, ", "").replace("n: 4", "n: 7"))
    infer = nodes["infer tiny niah:depths=3 128 prompt"]
    assert infer.work["n"] == 3
    assert n_prompts(infer.work) == 9
    assert nodes["infer tiny niah:kind=multikey,keys=2 128 prompt"].work["n"] == 7


def test_keys_that_came_later_do_not_change_older_results() -> None:
    more = "  - search: {MORE}\n  - compare: {MORE}\n  - consistency: {MORE}\n  - stress: {max_length: 64MORE}\n"
    now = {node.stage.kind: node.work for node in graph(STUDY + more.replace("{MORE}", "{}").replace("MORE", "")).values()}
    for kind, later in (
        ("search", {"sampler", "by"}),
        ("compare", {"figures", "interval"}),
        ("consistency", {"baseline"}),
        ("stress", {"graphs"}),
    ):
        assert now[kind].keys().isdisjoint(later)
    text = STUDY + "  - search: {by: harm}\n  - consistency: {baseline: Mine}\n  - stress: {max_length: 64, graphs: true}\n"
    then = {n.stage.kind: n.work for n in graph(text.replace("[hace, snapkv]", "{HACE: hace, Mine: snapkv}")).values()}
    assert (then["search"]["by"], then["consistency"]["baseline"], then["stress"]["graphs"]) == ("harm", "snapkv", True)


def test_long_benchmark_prompts_are_cut_to_the_length() -> None:
    text = STUDY.replace('[niah, "niah:kind=multikey,keys=2"]', '["longbench:qasper"]').replace("task: niah, ", "")
    nodes = graph(text)
    capture, infer = (nodes[f"{kind} tiny longbench:qasper 128 prompt"] for kind in ("capture", "infer"))
    assert infer.work["task"] == "longbench:qasper,limit=128"
    # A fixed set: both draw with the study's seed, and the capture takes what the real run leaves.
    assert (infer.work["seed"], capture.work["seed"], capture.work["beside"]) == (0, 0, 4)
