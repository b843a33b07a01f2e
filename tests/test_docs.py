"""Commands and names in README and docs exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

import kvtool
from kvtool.cli import cli
from kvtool.policies import method_classes

ROOT = Path(kvtool.__file__).parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[str]:
    found = []
    for page in PAGES:
        for block in re.findall(r"```(?:\w*)\n(.*?)```", page.read_text(), flags=re.S):
            found += [line.split("#")[0].strip() for line in block.splitlines() if line.startswith("kvtool ")]
    return found


@pytest.mark.parametrize("command", commands())
def test_documented_commands_parse(command: str) -> None:
    """With --help at the end click still refuses unknown commands and options."""
    result = CliRunner().invoke(cli, [*shlex.split(command)[1:], "--help"])
    assert result.exit_code == 0, result.output


def test_there_are_commands_to_check() -> None:
    assert len(commands()) >= 6


def test_every_policy_has_a_row() -> None:
    page = (ROOT / "docs" / "policies.md").read_text()
    assert [name for name in method_classes() if f"| `{name}` |" not in page] == []


def test_linked_files_exist() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
    for name in re.findall(r"`((?:docs|tests|benchmarks|data)/[\w./-]+)`", (ROOT / "README.md").read_text()):
        assert (ROOT / name).exists(), name
