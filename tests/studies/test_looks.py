"""Stages that judge others: cliffs that are refined for real, comparisons, consistency, gaps, HIV, and the row without a cache."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from kvtool.errors import ConfigError
from kvtool.executors.records import read_units
from kvtool.studies.graph import Node, build_graph
from kvtool.studies.naming import method_text, named_as
from kvtool.studies.parse import parse_study, read_study
from kvtool.studies.runner import StudySummary, run_study
from kvtool.studies.schema import Choice

pytestmark = pytest.mark.filterwarnings("ignore:constrained_layout not applied")

STUDY = """\
study: looks
models: {embedded: tiny}
tasks: [niah, "niah:kind=multikey,keys=2"]
lengths: [128]
retentions: [20%, 90%]
policies:
  SnapKV: snapkv:window=8
  random (control): random:window=8
n: 2
stages:
  - capture: {permute: 0, windows: [8]}
  - gaps: {policies: [SnapKV], tasks: [niah], draws: 20}
  - hiv: {policies: [SnapKV], window: 8, draws: 20}
  - infer: {n: 12, tasks: [niah]}
  - cliffs: {points: 1, rounds: 2, policies: [random (control)]}
  - compare: {draws: 99, baseline: SnapKV-}
  - consistency: {draws: 99}
  - no_cache: {length: 32, max_length: 64, n_new: 2, repeats: 2}
directions:
  - {say: SnapKV beats random, metric: accuracy, better: SnapKV, worse: random (control), retention: 90%}
  - {say: random beats SnapKV, metric: accuracy, better: random (control), worse: SnapKV, retention: 20%}
""".replace(", baseline: SnapKV-", "")


def go(path: Path, out: Path) -> StudySummary:
    return run_study(read_study(path, "full"), path, out, device="cpu")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, StudySummary]:
    path = tmp_path_factory.mktemp("looks") / "looks.yaml"
    path.write_text(STUDY)
    out = path.parent / "out"
    return path, out, go(path, out)


def folder(out: Path, kind: str) -> Path:
    return next(out.glob(f"nodes/{kind}-*"))


def test_every_stage_ends_and_leaves_data_and_a_figure(done: tuple[Path, Path, StudySummary]) -> None:
    _, out, summary = done
    assert summary.counts() == {"done": 9}
    for kind, names in {
        "gaps": ("gaps.jsonl", "gaps.csv", "gaps.svg", "gaps.pdf"),
        "hiv": ("hiv.json", "hiv.csv", "patterns.csv", "hiv_curves.svg", "hiv_curves.csv"),
        "cliffs": ("cliffs.json", "cliffs.csv", "refined.md", "cliff_curves.svg", "cliff_curves.csv"),
        "compare": ("compare.json", "compare.csv", "pairs.csv", "changes.svg", "changes.csv"),
        "consistency": ("consistency.json", "consistency.csv", "review.html", "agreement.svg", "agreement.csv"),
        "no_cache": ("no_cache.json", "no_cache.csv"),
    }.items():
        for name in names:
            assert (folder(out, kind) / name).stat().st_size > 0, (kind, name)


def accuracy(records: list[dict[str, Any]], policy: str) -> list[float]:
    return [r["answer_accuracy"] for r in sorted(records, key=lambda r: r["sample"]) if r["policy"] == policy]


def test_cliffs_are_refined_by_real_runs_between_grid_values(done: tuple[Path, Path, StudySummary]) -> None:
    _, out, _ = done
    facts = json.loads((folder(out, "cliffs") / "cliffs.json").read_text())
    (cliff,) = facts["cliffs"]  # of the named policy alone
    assert cliff["label"] == "random (control)"
    added = [r for path in folder(out, "cliffs").glob("round-*") for r in read_units(path) if r["policy"] != "full"]
    assert {r["policy"] for r in added} == set(facts["added"])
    assert len(added) == 12 * len(facts["added"])
    grid = read_units(folder(out, "infer"))
    every = {*(r["policy"] for r in grid if r["policy"].startswith("random")), *facts["added"]}
    assert len(every) == len(facts["added"]) + 2 > 2
    # The table's loss is that of the records, by hand, on the prompts of the grid.
    full = [r["score"] for r in sorted(grid, key=lambda r: r["sample"]) if r["policy"] == "full"]
    by_policy = {p["policy"]: p["loss"] for p in cliff["curve"]}
    assert set(by_policy) == every
    for policy, loss in by_policy.items():
        mine = [r["score"] for r in sorted([*grid, *added], key=lambda r: r["sample"]) if r["policy"] == policy]
        assert loss == pytest.approx(1 - sum(mine) / sum(full))
    if cliff["critical"] is not None and cliff["safe"] is not None:
        shares = sorted(float(p.split("budget=")[1].split("%")[0]) / 100 for p in every)
        assert shares.index(cliff["safe"]) == shares.index(cliff["critical"]) + 1


def test_rounds_take_the_full_cache_over_and_resume(done: tuple[Path, Path, StudySummary]) -> None:
    path, out, _ = done
    node = folder(out, "cliffs")
    full = {r["unit"]: r for r in read_units(folder(out, "infer")) if r["policy"] == "full"}
    for each in node.glob("round-*"):
        assert {r["unit"]: r for r in read_units(each) if r["policy"] == "full"} == full
    before = {p: p.read_bytes() for p in node.rglob("records.jsonl")}
    first = min(before)
    # As after a kill: not marked as done, the last units of the first round lost, the second round not there.
    (node / "done.json").unlink()
    lines = before[first].splitlines(keepends=True)
    first.write_bytes(b"".join(lines[:-2]) + lines[-1][:40])
    assert go(path, out).counts() == {"done": 9}
    strip = [{k: v for k, v in json.loads(line).items() if not k.endswith("_s")} for line in first.read_bytes().splitlines()]
    again = {r["unit"]: r for r in strip}
    for line in lines:
        old = {k: v for k, v in json.loads(line).items() if not k.endswith("_s")}
        for key in ("policy", "sample", "score", "answer_accuracy", "text", "head_entries"):
            assert again[old["unit"]].get(key) == old.get(key)


def test_rows_of_every_stage_are_in_the_results(done: tuple[Path, Path, StudySummary]) -> None:
    _, out, summary = done
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    stages = {row["stage"] for row in rows}
    assert {"infer", "cliffs", "no_cache"} <= stages
    added = [row for row in rows if row["stage"] == "cliffs"]
    assert {row["label"] for row in added} == {"random (control)"}
    without = [row for row in rows if row["stage"] == "no_cache"]
    assert [(row["label"], row["length"], row["kv_mb"]) for row in without] == [
        ("no KV cache", "32", "0.0"),
        ("no KV cache", "64", "0.0"),
    ]
    assert all(float(row["tpot_ms"]) > 0 and float(row["total_s"]) > 0 for row in without)
    text = (out / "summary.md").read_text()
    assert "## Critical retentions, refined where curves fall" in text
    assert "## Why policies fall short of the oracle" in text
    assert "SnapKV beats random (answer accuracy" in text
    assert "SnapKV beats random (answer accuracy" in summary.tables


def test_findings_are_judged_prompt_by_prompt(done: tuple[Path, Path, StudySummary]) -> None:
    from kvtool.studies.reference import findings
    from kvtool.studies.results import collect
    from kvtool.studies.sayings import sentence

    path, out, _ = done
    study = read_study(path, "full")
    rows = collect(study, build_graph(study), out)
    first, second = findings(study, rows, [])
    records = read_units(folder(out, "infer"))
    a, b = (accuracy(records, f"{name}:budget=90%,window=8") for name in ("snapkv", "random"))
    assert first.difference is not None
    assert first.difference.mean == pytest.approx(sum(x - y for x, y in zip(a, b, strict=True)) / 12)
    assert sentence(first).startswith(
        ("Holds here", "Not clear here", "Does not hold here")[["agrees", "not clear", "differs"].index(first.verdict)]
    )
    # The contrary at another retention: what one finding gains the other would lose.
    assert second.verdict != "agrees" or sum(accuracy(records, "random:budget=20%,window=8")) > sum(
        accuracy(records, "snapkv:budget=20%,window=8")
    )


def graph(text: str) -> dict[str, Node]:
    return {node.title: node for node in build_graph(parse_study(text, "full"))}


def test_hiv_puts_the_captures_of_all_tasks_together() -> None:
    node = graph(STUDY)["hiv embedded 128 prompt"]
    assert [captured.cell.task for captured in node.inputs.values()] == ["niah", "niah:kind=multikey,keys=2"]


def test_cliffs_rest_on_one_real_run() -> None:
    text = STUDY.replace("  - infer: {n: 12, tasks: [niah]}", "  - infer\n  - infer: {name: again, n: 3}")
    cliffs = [node for node in build_graph(parse_study(text, "full")) if node.stage.kind == "cliffs"]
    assert sorted(node.inputs["infer"].stage.name for node in cliffs) == ["again", "again", "infer", "infer"]
    before, after = (graph(each) for each in (STUDY, STUDY.replace("points: 1", "points: 3")))
    assert {title.split()[0] for title in before if before[title].key != after[title].key} == {"cliffs"}


def test_compensation_asks_for_its_window() -> None:
    text = STUDY.replace("  - gaps:", '  - compensation: {policies: [SnapKV], blocks: ["16"]}\n  - gaps:')
    assert graph(STUDY)["capture embedded niah 128 prompt"].work["windows"] == [8]
    assert graph(text)["capture embedded niah 128 prompt"].work["windows"] == [8, 32]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("points: 1", "point: 1", "Did you mean 'points'"),
        ("points: 1", "points: 0", "points=0 must be 1 to 16"),
        ("max_length: 64", "max_length: 16", "max_length=16 is below length=32"),
        ("infer: {n: 12, tasks: [niah]}", "infer: {generate: false}", "compares texts"),
        ("- gaps:", "- gasp:", "Did you mean 'gaps'"),
        ("  - infer: {n: 12, tasks: [niah]}\n", "", "needs a stage 'infer'"),
        ("worse: SnapKV, retention", "worse: SnapKW, retention", "Did you mean 'SnapKV'"),
        ("metric: accuracy, better: SnapKV", "metrc: accuracy, better: SnapKV", "Did you mean 'metric'"),
    ],
)
def test_wrong_settings_are_refused_with_their_line(old: str, new: str, words: str) -> None:
    text = STUDY.replace(old, new, 1)
    assert text != STUDY
    with pytest.raises(ConfigError, match=r"line \d+") as found:
        parse_study(text, "full")
    assert words in str(found.value)


def test_a_refined_policy_goes_by_the_name_of_its_method() -> None:
    one, other = Choice("SnapKV", "snapkv"), Choice("c64", "h2o_4_8_64", "H2O")
    again = Choice("c128", "h2o_4_8_128", "H2O")
    named = {
        "snapkv:budget=10%": [one],
        "h2o:budget=64,window=8,sink=4,decode=evict": [other],
        "h2o:budget=128,window=8,sink=4,decode=evict": [again],
    }
    assert named_as("snapkv:budget=12%", named) == [one]
    (found,) = named_as("h2o:budget=12%,window=8,sink=4,decode=evict", named)
    assert found.label == method_text("h2o_4_8_64") == found.text
    assert found.group == "H2O"
    assert named_as("full", named) == []
