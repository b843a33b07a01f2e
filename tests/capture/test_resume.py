"""Kill -9 at any moment: the same call continues, and the file's content is that of an undisturbed run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import capture_toy as toy
import h5py
import numpy as np
import pytest

from kvtool.capture.runner import CaptureConfig, run_capture


def _content(path):
    """Everything in the file but the moment at which it was made."""
    found = {}

    def visit(name, item):
        found[name] = {k: np.asarray(v).tolist() for k, v in item.attrs.items()}
        if isinstance(item, h5py.Dataset):
            found[name]["data"] = (str(item.dtype), item.shape, item[()].tobytes())

    with h5py.File(path, "r") as file:
        file.visititems(visit)
        found["/"] = {k: v for k, v in file.attrs.items() if k != "created"}
    return found


@pytest.fixture(scope="module")
def kill_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kill")
    here = Path(__file__).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(here), *filter(None, sys.path)])}
    command = [sys.executable, str(here / "kill_run.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def test_killed_between_any_two_steps_that_touch_the_disk(kill_run):
    folder, deaths = kill_run
    assert deaths["everywhere"] >= 12
    whole = _content(folder / "undisturbed.h5")
    found = sorted(folder.glob("step*.h5"))
    assert len(found) == deaths["everywhere"] + 1
    assert all(_content(path) == whole for path in found)


def test_killed_at_random_moments(kill_run):
    folder, deaths = kill_run
    assert (
        deaths["random"] >= 1
    )  # how many hit depends on the machine; test_killed_between_any_two_steps leaves nothing to chance
    whole = _content(folder / "undisturbed.h5")
    found = sorted(folder.glob("random*.h5"))
    assert len(found) == 12
    assert all(_content(path) == whole for path in found)


def test_nothing_is_left_behind(kill_run):
    folder, _ = kill_run
    assert all(path.suffix == ".h5" for path in folder.iterdir())


def test_torn_parts_are_captured_again(tmp_path, monkeypatch):
    loaded, samples, out = toy.build_loaded("llama"), toy.make_samples(3), tmp_path / "c.h5"
    config = CaptureConfig("toy", "llama", 3, windows=(8,))
    run_capture(config, loaded, samples, tmp_path / "whole.h5")
    with monkeypatch.context() as patch:
        patch.setattr("kvtool.capture.store.assemble", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_capture(config, loaded, samples, out)
    parts = sorted((tmp_path / "c.h5.parts").glob("0*.h5"))
    assert len(parts) == 3
    parts[0].write_bytes(parts[0].read_bytes()[:-100])
    with h5py.File(parts[1], "r+") as file:
        del file["sample"].attrs["complete"]
    assert run_capture(config, loaded, samples, out).n_reused == 1
    assert _content(out) == _content(tmp_path / "whole.h5")
