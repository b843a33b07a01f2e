"""Kill -9 at any moment: the same call continues, and its files are those of an undisturbed run, byte for byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvtool.files import read_records

NAMES = ("ranking.jsonl", "shortlist.yaml", "run.json", "predictions.jsonl", "refined.jsonl", "ranking.png", "ranking.csv")


@pytest.fixture(scope="module")
def kill_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    folder = tmp_path_factory.mktemp("kill")
    here = Path(__file__).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(here / "kill_run.py"), str(here.parent), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])


def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in NAMES}


def test_killed_between_any_two_steps_that_touch_the_disk(kill_run: tuple[Path, dict[str, int]]) -> None:
    folder, deaths = kill_run
    # run.json, two samples predicted and refined, four results: 5 atomic files of two steps, 4 records of one.
    assert deaths["everywhere"] == 5 * 2 + 4
    whole = content(folder / "undisturbed")
    found = sorted(folder.glob("step*"))
    assert len(found) == deaths["everywhere"] + 1
    assert [path.name for path in found if content(path) != whole] == []


def test_killed_at_random_moments(kill_run: tuple[Path, dict[str, int]]) -> None:
    folder, deaths = kill_run
    assert deaths["random"] >= 1  # how many hit depends on the machine
    whole = content(folder / "undisturbed")
    found = sorted(folder.glob("random*"))
    assert len(found) == 4
    assert [path.name for path in found if content(path) != whole] == []


def test_nothing_is_predicted_twice(kill_run: tuple[Path, dict[str, int]]) -> None:
    for path in kill_run[0].glob("*/predictions.jsonl"):
        samples = [record["sample"] for record in read_records(path)]
        assert len(samples) == len(set(samples)) == 2
