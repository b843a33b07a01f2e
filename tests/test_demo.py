"""The demonstration on the embedded model, small, and that this model is what its card says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvtool.cli import cli
from kvtool.models import embedded_folder


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("demo") / "out"
    result = CliRunner().invoke(
        cli, ["demo", "-n", "6", "--length", "768", "--device", "cpu", "-o", str(out)], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    return out, result.stdout


def test_demo_ends_with_a_report_and_a_comparison(demo: tuple[Path, str]) -> None:
    out, text = demo
    assert (out / "report/report.html").stat().st_size > 20_000
    assert "rank sim" in text
    assert "rank real" in text
    assert str((out / "report/report.html").resolve()) in text


def test_the_embedded_model_retrieves_and_loses_what_random_eviction_drops(demo: tuple[Path, str]) -> None:
    records = [json.loads(line) for line in (demo[0] / "infer/records.jsonl").read_text().splitlines()]

    def mean(policy: str, key: str) -> float:
        found = [r[key] for r in records if r["policy"] == policy]
        return float(sum(found)) / len(found)

    assert mean("full", "score") == 1
    assert mean("random:budget=8%", "score") <= 0.2
    assert mean("h2o:budget=16%", "answer_accuracy") > mean("random:budget=16%", "answer_accuracy") + 0.3


def test_the_simulation_saw_the_best_policy_coming(demo: tuple[Path, str]) -> None:
    rows = [json.loads(line) for line in (demo[0] / "simulate/ranking.jsonl").read_text().splitlines()]
    # 4 % of 768 tokens are fewer entries than h2o protects: it is impossible there, and says so.
    assert {r["method"] for r in rows if r["rank"] == 1 and r["budget"] in ("8%", "16%", "32%")} == {"h2o"}
    assert [r["status"] for r in rows if r["policy"] == "h2o:budget=4%"] == ["impossible"]


def test_heads_differ_and_rest_on_the_first_token(demo: tuple[Path, str]) -> None:
    heads = json.loads((demo[0] / "heads.json").read_text())["heads"]
    sinks = [h["sink"] for h in heads]
    assert max(sinks) > 0.9
    assert min(sinks) < 0.5
    assert len({h["kind"] for h in heads}) >= 3


def test_shipped_weights_are_small() -> None:
    assert (embedded_folder() / "model.safetensors").stat().st_size <= 16_000_000
