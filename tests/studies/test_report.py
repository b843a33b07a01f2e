"""The report of a whole study, from made-up (synthetic) records through the real command."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner

import kvtool
from kvtool.cli import cli


def benchmark() -> ModuleType:
    path = Path(kvtool.__file__).parent / "benchmarks" / "synthetic_study.py"
    spec = importlib.util.spec_from_file_location("synthetic_study", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out, made = tmp_path_factory.mktemp("study"), benchmark()
    made.write_study(out, made.study_text(models=1, lengths=1, retentions=6, methods=3, tasks=1, prompts=20))
    done = CliRunner().invoke(cli, ["analyze", "study", str(out)])
    assert done.exit_code == 0, done.output
    return out / "report", done.output


def test_answer_first_and_self_contained(report: tuple[Path, str]) -> None:
    page = (report[0] / "report.html").read_text(encoding="utf-8")
    answer = report[1].splitlines()[0]
    assert answer in re.sub(r"<[^>]+>", "", page).replace("&#39;", "'")
    assert page.index("<h1>") < page.index("<table")
    assert not re.search(r"(?:src|href)=\"(?:https?:)?//", page)
    assert not re.search(r"@import|url\((?!#)", page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert all(anchor in ids for anchor in re.findall(r'href="#([^"]+)"', page) if not anchor.startswith("m"))


def test_warns_that_there_is_no_control(report: tuple[Path, str]) -> None:
    assert "no random control was run" in report[1]
    assert "SYNTHETIC" in (report[0] / "report.html").read_text(encoding="utf-8")


def test_tables_in_every_form_hold_the_same_rows(report: tuple[Path, str]) -> None:
    folder = report[0] / "tables"
    names = {path.stem for path in folder.iterdir()}
    assert {"answers", "scores", "points", "cliffs", "nodes"} <= names
    for name in names:
        lines = len((folder / f"{name}.csv").read_text(encoding="utf-8").splitlines()) - 1
        latex = (folder / f"{name}.tex").read_text(encoding="utf-8")
        assert latex.count(r" \\") == lines + 1
        assert (
            sum(line.startswith("| ") for line in (folder / f"{name}.md").read_text(encoding="utf-8").splitlines()) == lines + 2
        )


def test_figures_have_their_data(report: tuple[Path, str]) -> None:
    folder = report[0] / "figures"
    names = {path.stem for path in folder.iterdir()}
    assert {"score_retention_0", "score_memory_0", "cliff_curves", "heads_kept_0", "layers_0"} <= names
    for name in names:
        assert {path.suffix for path in folder.glob(f"{name}.*")} == {".png", ".svg", ".pdf", ".csv"}


def test_cliffs_of_a_study(report: tuple[Path, str], tmp_path: Path) -> None:
    study = report[0].parent
    done = CliRunner().invoke(cli, ["analyze", "cliffs", str(study), "--refine", "2", "-o", str(tmp_path / "c")])
    assert done.exit_code == 0, done.output
    assert "critical retention" in done.output
    assert "add to the study's retentions" in done.output


def test_figures_of_a_second_process_are_the_same(
    report: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtool.analysis.study_report.MANY_POINTS", 1)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    done = CliRunner().invoke(cli, ["analyze", "study", str(report[0].parent), "--out", str(tmp_path / "again")])
    assert done.exit_code == 0, done.output
    mine, other = (
        {p.name: p.read_bytes() for p in (folder / "figures").iterdir()} for folder in (report[0], tmp_path / "again")
    )
    assert len(mine) > 8
    assert mine == other


def test_no_path_of_the_output_folder_in_the_report(report: tuple[Path, str]) -> None:
    """The study's own folder of this machine stands neither in the page, nor in tables, nor beside figures."""
    study = str(report[0].parent)
    text = [p for p in report[0].rglob("*") if p.suffix in (".html", ".csv", ".md", ".tex", ".svg")]
    assert len(text) > 20
    assert [str(p) for p in text if study in p.read_text(encoding="utf-8")] == []
