"""The command line as a user meets it: a whole run on a small model folder, and one clear line for every wrong input."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from kvtool.cli import cli


def run(*args: object) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in args], catch_exceptions=False)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory, random_model: Callable[..., Any], byte_tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("model")
    random_model("llama", max_position_embeddings=1024).save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """All stages once; each command must end with 0."""
    out = tmp_path_factory.mktemp("chain")
    sample = ("-n", "3", "--length", "300")
    for args in (
        ("capture", "-m", model_folder, *sample, "-o", out / "c.h5"),
        ("classify", out / "c.h5", "-o", out / "heads.json"),
        ("simulate", out / "c.h5", "-r", "15%,40%", "--refine", "3", "-m", model_folder, "--draws", "50", "-o", out / "sim"),
        ("infer", "-m", model_folder, *sample, "-r", "15%,40%", "-o", out / "run"),
        ("analyze", "report", out / "sim", out / "run", "-o", out / "report"),
        ("analyze", "fidelity", out / "sim", out / "run", "--draws", "50", "-o", out / "fidelity"),
    ):
        result = run(*args)
        assert result.exit_code == 0, f"{args}: {result.output}"
    return out


def test_chain_leaves_its_files(chain: Path) -> None:
    for name in (
        "c.h5",
        "heads.json",
        "sim/ranking.jsonl",
        "sim/shortlist.yaml",
        "sim/ranking.png",
        "run/records.jsonl",
        "report/report.html",
    ):
        assert (chain / name).stat().st_size > 0, name
    records = [json.loads(line) for line in (chain / "run/records.jsonl").read_text().splitlines()]
    assert len(records) == 3 * (1 + 5 * 2)
    assert {r["status"] for r in records} == {"ok"}


def test_rerun_continues_and_changes_nothing(chain: Path, model_folder: Path) -> None:
    before = (chain / "run/records.jsonl").read_bytes()
    result = run("infer", "-m", model_folder, "-n", "3", "--length", "300", "-r", "15%,40%", "-o", chain / "run")
    assert result.exit_code == 0
    assert (chain / "run/records.jsonl").read_bytes() == before


def test_json_output_is_json(chain: Path, model_folder: Path) -> None:
    for args in (("policies",), ("policies", "show", "snapkv"), ("tasks",)):
        assert json.loads(run(*args, "--json").stdout)
    result = run("capture", "-m", model_folder, "-n", "3", "--length", "300", "-o", chain / "c.h5", "--json")
    assert json.loads(result.stdout)["n_samples"] == 3


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("capture", "-m", "/no/model"), 1, "model '/no/model' not found"),
        (("infer", "-p", "snapk", "-m", "MODEL"), 2, "Did you mean 'snapkv'"),
        (("infer", "-p", "snapkv:budget=0", "-m", "MODEL"), 2, "retention 0 is outside (0, 1]"),
        (("infer", "-r", "1.5", "-m", "MODEL"), 2, "retention 1.5 is outside (0, 1]"),
        (("infer", "-r", "150%", "-m", "MODEL"), 2, "outside (0, 1]"),
        (("infer", "-r", " ", "-m", "MODEL"), 2, "--retention is empty"),
        (("capture", "-m", "MODEL", "--length", "5000"), 2, "has a context of 1024"),
        (("capture", "-m", "MODEL", "-t", "file:/no/file.jsonl"), 1, "cannot be read"),
        (("capture", "-m", "MODEL", "-t", "nia"), 2, "Did you mean 'niah'"),
        (("simulate", "/no/capture.h5"), 1, "/no/capture.h5"),
        (("classify", "/no/capture.h5"), 1, "/no/capture.h5"),
        (("analyze", "report", "/no/sim", "/no/run"), 1, "holds no run"),
        (("analyze", "fidelity", "/only/one"), 2, "pairs of folders"),
        (("policies", "show", "h3o"), 2, "Did you mean 'h2o'"),
    ],
)
def test_wrong_input_is_one_line(args: tuple[str, ...], code: int, message: str, model_folder: Path, tmp_path: Path) -> None:
    filled = [str(model_folder) if a == "MODEL" else a for a in args]
    out = [] if args[0] == "policies" or "fidelity" in args else ["-o", str(tmp_path / "out")]
    result = run(*filled, *out)
    assert result.exit_code == code, result.output
    lines = [line for line in result.stderr.splitlines() if message in line]
    assert len(lines) == 1, result.output
    assert "Traceback" not in result.output


def test_budget_below_protected_entries(model_folder: Path, tmp_path: Path) -> None:
    args = ("infer", "-m", model_folder, "-n", "1", "--length", "300", "-o", tmp_path / "run", "-p", "snapkv", "-r", "1%")
    result = run(*args)
    assert result.exit_code == 2
    assert "smaller than its 32 protected entries" in result.stderr
    assert not (tmp_path / "run").exists()


def test_template(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps({"context": "x " * 80, "question": "Why?", "answers": ["so it is"]}) + "\n")
    task = (
        "infer",
        "-m",
        model_folder,
        "-t",
        f"file:{tmp_path / 'q.jsonl'}",
        "-p",
        "window",
        "-r",
        "50%",
        "-o",
        tmp_path / "run",
    )
    assert run(*task, "--template", "Q: {question} {context}").exit_code == 2
    assert run(*task, "--template", "Read: {context}\n{question} A:").exit_code == 0
    record = json.loads((tmp_path / "run/records.jsonl").read_text().splitlines()[0])
    # one first token, one byte a token
    assert record["n_prompt"] == 1 + len("Read: " + "x " * 80 + "\nWhy? A:")


def test_other_configuration_in_the_same_folder(chain: Path, model_folder: Path) -> None:
    before = (chain / "run/records.jsonl").read_bytes()
    result = run("infer", "-m", model_folder, "-n", "2", "--length", "300", "-o", chain / "run")
    assert result.exit_code == 2
    assert "holds a run of another configuration" in result.stderr
    assert (chain / "run/records.jsonl").read_bytes() == before


def test_truncated_capture(chain: Path, tmp_path: Path) -> None:
    (tmp_path / "c.h5").write_bytes((chain / "c.h5").read_bytes()[:5000])
    result = run("simulate", tmp_path / "c.h5", "-o", tmp_path / "sim")
    assert result.exit_code == 1
    assert len(result.stderr.strip().splitlines()) == 1


def test_capture_of_another_model(chain: Path, tmp_path: Path, random_model: Callable[..., Any], byte_tokenizer: Any) -> None:
    other = tmp_path / "other"
    random_model("llama", seed=9, max_position_embeddings=1024).save_pretrained(other)
    byte_tokenizer.save_pretrained(other)
    result = run("simulate", chain / "c.h5", "--refine", "2", "-m", other, "-o", tmp_path / "sim")
    assert result.exit_code == 1
    assert "use that model or capture this one" in result.stderr


@pytest.mark.parametrize(
    "command", [(), *((name,) for name in cli.commands), ("analyze", "report"), ("analyze", "fidelity"), ("policies", "show")]
)
def test_every_command_has_help(command: tuple[str, ...]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    # A group lists its commands, a command shows an example (policies show: its group's help has it).
    assert "kvtool" in result.output or "Commands:" in result.output or command == ("policies", "show")


def test_help_as_a_program() -> None:
    result = subprocess.run([sys.executable, "-m", "kvtool", "--help"], capture_output=True, text=True, check=True)
    assert "capture" in result.stdout
