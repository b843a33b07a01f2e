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
from kvtool.errors import KvtoolError
from kvtool.infer.present import decoding_needs
from kvtool.policies import Policy, method_classes
from kvtool.policies.describe import WIDTH, can_decode, policy_facts


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
    heads = ("--heads", out / "heads.json")
    few = ("--draws", "50")
    for args in (
        ("capture", "-m", model_folder, *sample, "-o", out / "c.h5"),
        ("classify", out / "c.h5", "-o", out / "heads.json"),
        ("simulate", out / "c.h5", "-r", "15%,40%", *heads, "--refine", "3", "-m", model_folder, *few, "-o", out / "sim"),
        ("infer", "-m", model_folder, *sample, "-r", "15%,40%", *heads, "-o", out / "run"),
        ("analyze", "report", out / "sim", out / "run", "-o", out / "report"),
        ("analyze", "fidelity", out / "sim", out / "run", "--draws", "50", "--order-level", "1", "-o", out / "fidelity"),
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
    # Three prompts are too few for a confidence of head kinds, so head_windows is left out.
    left_out = {"head_windows", "optimal", "plan"}
    able = [n for n, cls in method_classes().items() if not (cls.simulate_only or cls.keeps_all or n in left_out)]
    assert len(records) == 3 * (1 + len(able) * 2)
    # DuoAttention's sink and recent entries are as many as the prompt's.
    assert {r["method"].split(":")[0] for r in records if r["status"] != "ok"} == {"duo"}
    assert {r["status"] for r in records} == {"ok", "impossible"}


def test_rerun_continues_and_changes_nothing(chain: Path, model_folder: Path) -> None:
    before = (chain / "run/records.jsonl").read_bytes()
    args = ("-n", "3", "--length", "300", "-r", "15%,40%", "--heads", chain / "heads.json")
    result = run("infer", "-m", model_folder, *args, "-o", chain / "run")
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
        (("infer", "-p", "headkv", "-m", "MODEL"), 2, "add heads=FILE or --heads FILE (kvtool classify makes one)"),
        (("infer", "-p", "hace", "--heads", "/no/heads.json", "-m", "MODEL"), 1, "heads file /no/heads.json not found"),
        (("infer", "-p", "h2o_8_64_50", "-m", "MODEL"), 2, "capacity of 50 is smaller than"),
        (("infer", "-p", "/no/policy.yaml", "-m", "MODEL"), 1, "policy file /no/policy.yaml cannot be read"),
        (("simulate", "/no/c.h5", "-p", "G_conf0.7_base64"), 2, "add heads=FILE"),
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
    result = run("simulate", tmp_path / "c.h5", "-p", "snapkv", "-o", tmp_path / "sim")
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


def test_heads_file_is_part_of_a_run(chain: Path, model_folder: Path, tmp_path: Path) -> None:
    heads = tmp_path / "heads.json"
    heads.write_bytes((chain / "heads.json").read_bytes())
    infer = ("infer", "-m", model_folder, "-n", "1", "--length", "300", "-r", "30%", "-o", tmp_path / "run")
    simulate = ("simulate", chain / "c.h5", "-r", "30%", "--draws", "50", "-o", tmp_path / "sim")
    for command in (infer, simulate):
        args = (*command, "-p", "hace", "-p", "headkv", "--heads", heads)
        assert run(*args).exit_code == 0
        folder = Path(str(args[args.index("-o") + 1]))
        config = json.loads((folder / "run.json").read_text())["config"]
        assert list(config["heads"]) == [str(heads)]
        assert any(f"heads={heads}" in policy for policy in config["policies"])
        assert run(*args).exit_code == 0
        heads.write_text(heads.read_text() + " ")
        result = run(*args)
        assert result.exit_code == 2
        assert "holds a run of another configuration (heads:" in result.stderr
        heads.write_bytes((chain / "heads.json").read_bytes())
        value = json.loads(heads.read_text())
        value["model"]["fingerprint"] = "another"
        (other := tmp_path / "other.json").write_text(json.dumps(value))
        result = run(*args[:-1], other)
        assert result.exit_code == 1
        assert "classify a capture of this model" in result.stderr


def test_head_methods_decide_alike_offline_and_live(chain: Path, model_folder: Path) -> None:
    rows = {r["policy"]: r for r in map(json.loads, (chain / "sim/ranking.jsonl").read_text().splitlines())}
    records = [json.loads(line) for line in (chain / "run/records.jsonl").read_text().splitlines()]
    seen = {r["policy"]: r["retention"] for r in records if r["status"] == "ok" and "heads=" in r["policy"]}
    assert {p.split(":")[0] for p in seen} == {"hace", "hace-head", "headkv"}
    for policy, retention in seen.items():
        assert rows[policy]["retention"] == pytest.approx(retention, abs=0.01)


def test_study_names_run(model_folder: Path, chain: Path, tmp_path: Path) -> None:
    heads = tmp_path / "heads.json"
    value = json.loads((chain / "heads.json").read_text())
    for head in value["kv_heads"]:
        head["confidence"] = 0.9 if head["head"] else 0.1
    heads.write_text(json.dumps(value))
    names = ("h2o_4_16_64", "streaming_4_60", "A_window_64", "B_streaming_60", "G_conf0.7_base64", "J_pos64_mix64_g128")
    names += ("K_uniform64_aware", "ablation_c128_w16_b32_k7_maxpool", "baseline")
    chosen = [item for name in names for item in ("-p", name)]
    task = ("-m", model_folder, "-n", "1", "--length", "300", "--heads", heads, "-o", tmp_path / "run")
    result = run("infer", *task, *chosen)
    assert result.exit_code == 0, result.output
    records = {r["policy"]: r for r in map(json.loads, (tmp_path / "run/records.jsonl").read_text().splitlines())}
    # streaming_4_60 and B_streaming_60 are one policy, and the baseline is the full cache.
    assert len(records) == len(names) - 1
    assert {r["status"] for r in records.values()} == {"ok"}
    uniform = records[str(Policy.parse(f"K_uniform64_aware:heads={heads}"))]
    assert uniform["planned_entries"] == 68
    assert uniform["retention"] == pytest.approx(68 / uniform["seq_len"], abs=1e-6)
    by_kind = records[str(Policy.parse(f"G_conf0.7_base64:heads={heads}"))]
    windows = {"positional": 16, "mixed": 64, "gathering": 256}
    mean = sum(4 + (windows.get(h["kind"], 64) if h["head"] else 64) for h in value["kv_heads"]) / len(value["kv_heads"])
    assert by_kind["retention"] == pytest.approx(mean / by_kind["seq_len"], abs=1e-6)


def test_policies_are_listed_with_what_they_need_and_can() -> None:
    listing = run("policies").output
    assert max(len(line) for line in listing.splitlines()) <= WIDTH
    rows = {
        line.split()[0]: line.split()
        for line in listing.splitlines()
        if line.split()[:1] and line.split()[0] in method_classes()
    }
    assert rows.keys() == method_classes().keys()
    for name, cls in method_classes().items():
        facts, method = policy_facts(name), cls()
        assert rows[name][1] == ("none" if cls.keeps_all else "optional" if cls.implies_budget else "needed")
        assert rows[name][2] == ("file" if {"heads", "plan", "file"} & set(cls.__dataclass_fields__) else "-")
        if cls.keeps_all:
            continue
        try:
            decoding_needs(Policy.parse(f"{name}:budget=50%,decode=evict"))
            decodes = True
        except KvtoolError:
            decodes = False
        # What the list says is what real inference does.
        assert can_decode(method) == decodes == (rows[name][3] == "yes")
        assert facts["exact"] == (rows[name][4] == "yes")
        assert facts["layer_local"] == (rows[name][5] == "yes") == method.parts().allocator.layer_local
    assert "ablation_cC_wW[_bB|_fullc]_kK_maxpool" in listing


@pytest.mark.parametrize("name", sorted(method_classes()))
def test_policies_show_tells_everything(name: str) -> None:
    cls, shown = method_classes()[name], run("policies", "show", name).output
    assert max(len(line) for line in shown.splitlines()) <= WIDTH
    words = " ".join(shown.split())
    for text in (cls.summary, cls.formula, cls.source, *(f"{key}=" for key in cls().parameters())):
        assert " ".join(text.split()) in words, text
    facts = json.loads(run("policies", "show", name, "--json").stdout)
    assert facts["parameters"] == cls().parameters()
    assert facts["needs"] == list(cls().parts().needs())
    assert facts["options"]["decode"]["default"] == "grow"
    if not cls.keeps_all:
        assert all(f"{option}=" in shown for option in facts["options"])
    assert all(form in words for form in facts["study_names"])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("h2o_8_64_512", "h2o:budget=512,window=64,sink=8,decode=evict"),
        ("snapkv:budget=5%,window=8", "snapkv:budget=5%,window=8"),
    ],
)
def test_a_study_name_or_a_text_is_shown_as_the_policy_it_is(name: str, text: str) -> None:
    result = CliRunner().invoke(cli, ["policies", "show", name])
    assert result.exit_code == 0, result.output
    assert result.output.startswith(f"{name} is {text}\n")
    assert CliRunner().invoke(cli, ["policies", "show", "baseline"]).output.startswith("full: ")
