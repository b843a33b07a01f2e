"""Tables, answer and report from folders made of records with known figures."""

from __future__ import annotations

import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from kvtool.analysis.fidelity_report import run_fidelity
from kvtool.analysis.runner import run_analyze
from kvtool.errors import ConfigError, DataError
from kvtool.files import append_records, open_run

SAMPLES = [f"s{i}" for i in range(20)]
#: policy -> (budget, share kept, prompts of 20 answered right, harm)
POLICIES: dict[str, tuple[str | None, float, int, float]] = {
    "full": (None, 1.0, 20, 0.0),
    "h2o:budget=10%": ("10%", 0.1, 20, 1.0),
    "snapkv:budget=10%": ("10%", 0.1, 12, 4.0),
    "random:budget=10%": ("10%", 0.1, 2, 9.0),
    "h2o:budget=5%": ("5%", 0.05, 9, 6.0),
    "snapkv:budget=5%": ("5%", 0.05, 4, 8.0),
    "random:budget=5%": ("5%", 0.05, 1, 10.0),
}
CONFIG = {"task": "niah", "length": 1000, "compress_at": "prompt", "fingerprint": "f", "seed": 1, "policies": list(POLICIES)}


def record(sample: str, policy: str) -> dict[str, Any]:
    budget, kept, right, _ = POLICIES[policy]
    hit = float(SAMPLES.index(sample) < right)
    return {
        "sample": sample, "policy": policy, "method": policy.split(":")[0], "budget": budget, "retention": kept,
        "entries": 1000 * kept, "seq_len": 1000,
        "compress_at": "prompt", "status": "ok", "message": None, "degenerate": False, "metric": "exact", "score": hit,
        "answer_accuracy": 0.2 + 0.8 * hit, "answer_exact": hit, "answer_nll": 2 - hit, "answer_margin": hit,
        "kv_bytes_prompt_end": 1000 * kept + 50,
        "kv_bytes_full": 1000, "slack_bytes": 50, "ttft_s": 0.5, "tpot_s": 0.01, "kernel": "sdpa-buckets", "meta": {},
    }  # fmt: skip


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    simulate, infer = tmp_path / "sim", tmp_path / "run"
    model = {"fingerprint": "f", "model_id": "m"}
    open_run(simulate, {"model": model, "task": "niah", "length": 1000, "compress_at": "prompt", "prompt_seed": 0, "n": 20}, {})
    rows = [
        {"policy": p, "method": p.split(":")[0], "budget": b, "retention": k, "status": "ok", "degenerate": False, "harm": h,
         "per_sample": {"harm": [h + 0.01 * i for i in range(20)], "recall": [k] * 20}}
        for p, (b, k, _, h) in POLICIES.items()
    ]  # fmt: skip
    append_records(simulate / "ranking.jsonl", rows)
    open_run(infer, CONFIG, {"model": {"model_id": "m", "n_layers": 2}})
    append_records(infer / "records.jsonl", [record(s, p) for s in SAMPLES for p in POLICIES])
    return simulate, infer


def test_answer_is_the_smallest_cache_that_costs_nothing(folders: tuple[Path, Path], tmp_path: Path) -> None:
    summary = run_analyze(*folders, tmp_path / "out")
    assert summary.answer.startswith(
        "For this model and workload run h2o at 10.0 % of the entries: it saves 90.0 % of the KV cache"
    )
    assert "costs nothing on 20 prompts (a true loss of up to 0.13 could go unseen)" in summary.answer
    assert any("at 5% no clear gain in answer accuracy over random" in w and "snapkv" in w for w in summary.warnings)
    assert not any("h2o" in w for w in summary.warnings)


def test_table_holds_the_figures_of_the_records(folders: tuple[Path, Path], tmp_path: Path) -> None:
    run_analyze(*folders, tmp_path / "out")
    rows = {r["policy"]: r for r in csv.DictReader(io.StringIO((tmp_path / "out/table.csv").read_text()))}
    for policy, (budget, kept, right, harm) in POLICIES.items():
        row = rows[policy]
        assert float(row["score"]) == pytest.approx(right / 20)
        assert float(row["accuracy"]) == pytest.approx(0.2 + 0.8 * right / 20)
        assert float(row["saved"]) == pytest.approx(1 - kept)
        assert float(row["harm"]) == harm
        if budget:
            assert row["simulated_rank"] == row["real_rank"]
    assert [rows[f"{m}:budget=10%"]["real_rank"] for m in ("h2o", "snapkv", "random")] == ["1", "2", "3"]


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action", "data") and not (value or "").startswith("#"):
                self.outside.append(f"{tag} {name}={value}")
            if name == "id":
                self.ids.append(value or "")


def test_report_is_one_file_without_outside_references(folders: tuple[Path, Path], tmp_path: Path) -> None:
    page = run_analyze(*folders, tmp_path / "out").report.read_text()
    parser = Links()
    parser.feed(page)
    assert parser.outside == []
    assert not re.search(r"@import|url\((?!#)", page)
    assert len(set(parser.ids)) == len(parser.ids)
    assert page.count("<svg") == 4  # three of the run, and the cliffs' curves
    assert 'id="theme"' in page
    assert '<h2 id="cliffs">' in page
    assert "0.60 (0.39 to 0.78)" in page  # snapkv at 10 %: 12 of 20, Wilson


def test_figures_come_in_three_formats_with_their_data(folders: tuple[Path, Path], tmp_path: Path) -> None:
    run_analyze(*folders, tmp_path / "out")
    for name in ("score_retention", "pareto", "simulated_real"):
        for ending, start in (("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF"), ("csv", b"policy,")):
            assert (tmp_path / f"out/figures/{name}.{ending}").read_bytes().startswith(start)


def test_again_gives_the_same_report(folders: tuple[Path, Path], tmp_path: Path) -> None:
    first = run_analyze(*folders, tmp_path / "out").report.read_bytes()
    assert run_analyze(*folders, tmp_path / "out").report.read_bytes() == first


def test_without_a_simulation(folders: tuple[Path, Path], tmp_path: Path) -> None:
    page = run_analyze(None, folders[1], tmp_path / "out").report.read_text()
    assert "What was run" in page
    assert "Sim. rank" not in page


@pytest.mark.parametrize(
    ("key", "value"), [("compress_at", "context"), ("task", "text"), ("length", 500), ("fingerprint", "g")]
)
def test_what_does_not_belong_together_is_refused(key: str, value: Any, folders: tuple[Path, Path], tmp_path: Path) -> None:
    run = json.loads((folders[1] / "run.json").read_text())
    run["config"][key] = value
    (folders[1] / "run.json").write_text(json.dumps(run))
    with pytest.raises(ConfigError, match="do not belong together"):
        run_analyze(*folders, tmp_path / "out")


def test_an_unfinished_sample_is_left_out(folders: tuple[Path, Path], tmp_path: Path) -> None:
    lines = (folders[1] / "records.jsonl").read_text().splitlines(keepends=True)
    (folders[1] / "records.jsonl").write_text("".join(lines[:-1]))
    assert "19 prompts" in run_analyze(*folders, tmp_path / "out").report.read_text()


def test_unfinished_folders(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (folders[0] / "ranking.jsonl").unlink()
    with pytest.raises(DataError, match="holds no ranking"):
        run_analyze(*folders, tmp_path / "out")


def test_fidelity_of_folders(folders: tuple[Path, Path], tmp_path: Path) -> None:
    summary = run_fidelity([folders], draws=50, out=tmp_path / "f")
    by_truth = {a.truth: a for a in summary.agreements}
    assert by_truth["score"].tau["harm"].mean == pytest.approx(1)
    assert by_truth["score"].tau["recall"].mean == 0  # recall is the same for all policies of a budget here
    assert by_truth["score"].tau["retention"].mean == 0
    assert {c.budget for c in by_truth["score"].cells} == {"10%", "5%"}
    assert not summary.paired
    saved = json.loads((tmp_path / "f/fidelity.json").read_text())
    assert saved["agreements"][0]["tau"]["harm"]["mean"] == pytest.approx(1)
    assert "| niah | prompt | 1000 | 10% | 3 | 1.00" in (tmp_path / "f/fidelity.md").read_text()


def edit(folder: Path, name: str, change: Any) -> None:
    path = folder / name
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for index, value in enumerate(records):
        change(index, value)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def test_what_is_left_out_is_counted_by_reason(folders: tuple[Path, Path], tmp_path: Path) -> None:
    def spoil(_: int, row: dict[str, Any]) -> None:
        if row["policy"] == "snapkv:budget=5%":
            row["degenerate"] = True

    edit(folders[0], "ranking.jsonl", spoil)
    extra = json.loads((folders[0] / "ranking.jsonl").read_text().splitlines()[1]) | {"policy": "window:budget=10%"}
    with (folders[0] / "ranking.jsonl").open("a") as file:
        file.write(json.dumps(extra) + "\n")
    summary = run_fidelity([folders], draws=50)
    assert summary.left_out.text() == "1 degenerate, 1 not run, 2 alone"
    assert "1 degenerate, 1 not run, 2 alone" in summary.text()


def test_out_of_memory_is_a_row_and_left_out_of_fidelity(folders: tuple[Path, Path], tmp_path: Path) -> None:
    def spoil(_: int, row: dict[str, Any]) -> None:
        if row["policy"] == "snapkv:budget=5%" and row["sample"] == "s3":
            row.update(status="oom", message="no memory left", score=None, answer_accuracy=None)

    edit(folders[1], "records.jsonl", spoil)
    summary = run_analyze(*folders, tmp_path / "out")
    assert any("ran out of memory" in w and "snapkv:budget=5%" in w for w in summary.warnings)
    row = next(
        r for r in csv.DictReader(io.StringIO((tmp_path / "out/table.csv").read_text())) if r["policy"] == "snapkv:budget=5%"
    )
    assert (row["status"], row["score"]) == ("oom", "")
    assert run_fidelity([folders], draws=50).left_out.out_of_memory == 1


def test_a_prompt_with_an_answer_of_one_token_does_not_hide_the_others(folders: tuple[Path, Path], tmp_path: Path) -> None:
    def spoil(_: int, row: dict[str, Any]) -> None:
        if row["sample"] == "s0":
            row.update(answer_accuracy=None, answer_exact=None, answer_nll=None, answer_margin=None)

    edit(folders[1], "records.jsonl", spoil)
    summary = run_analyze(*folders, tmp_path / "out")
    assert any("1 prompts have an answer of one token" in w for w in summary.warnings)
    rows = {r["policy"]: r for r in csv.DictReader(io.StringIO((tmp_path / "out/table.csv").read_text()))}
    assert float(rows["snapkv:budget=10%"]["accuracy"]) == pytest.approx(0.2 + 0.8 * 11 / 19)
    assert float(rows["snapkv:budget=10%"]["score"]) == pytest.approx(12 / 20)
    taus = {a.truth: a.tau["harm"].mean for a in run_fidelity([folders], draws=50).agreements}
    assert taus["answer_accuracy"] == pytest.approx(1)


def test_a_control_with_other_parameters_is_still_the_control(folders: tuple[Path, Path], tmp_path: Path) -> None:
    def rename(_: int, row: dict[str, Any]) -> None:
        if row["method"] == "random":
            row.update(method="random:window=16", policy=row["policy"] + ",window=16")

    edit(folders[1], "records.jsonl", rename)
    run = json.loads((folders[1] / "run.json").read_text())
    run["config"]["policies"] = [p + ",window=16" if p.startswith("random") else p for p in run["config"]["policies"]]
    (folders[1] / "run.json").write_text(json.dumps(run))
    run_analyze(None, folders[1], tmp_path / "out")
    rows = {r["policy"]: r for r in csv.DictReader(io.StringIO((tmp_path / "out/table.csv").read_text()))}
    assert rows["h2o:budget=10%"]["beats_control"] == "True"
    assert rows["snapkv:budget=5%"]["beats_control"] == "False"
    assert rows["random:budget=10%,window=16"]["beats_control"] == ""


def test_refined_loss_is_a_predictor_where_all_of_a_budget_are_refined(folders: tuple[Path, Path], tmp_path: Path) -> None:
    def refine(_: int, row: dict[str, Any]) -> None:
        if row["budget"] == "10%":
            losses = row["per_sample"]["harm"]
            row["refined"] = {"nll": row["harm"], "per_sample": {"nll": losses, "accuracy": [-x for x in losses]}}

    edit(folders[0], "ranking.jsonl", refine)
    score = next(a for a in run_fidelity([folders], draws=50).agreements if a.truth == "score")
    assert score.tau["refined_nll"].mean == pytest.approx(1)
    assert score.tau["refined_accuracy"].mean == pytest.approx(1)
    assert (score.n_cells, score.n_cells_of["refined_nll"]) == (2, 1)
    page = run_analyze(*folders, tmp_path / "out").report.read_text()
    assert "tau of refined loss" in page
