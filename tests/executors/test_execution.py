"""Shares, what is asked of a cluster, and who may work in a folder."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtool.errors import ConfigError, MissingDependencyError
from kvtool.executors.claims import claimed
from kvtool.executors.execution import LOCAL, Execution, RayOptions, Shard
from kvtool.executors.ray_pool import import_ray, room, run_on_ray
from kvtool.executors.worker import ModelOrigin
from kvtool.models import LoadedModel


@given(count=st.integers(1, 12), n=st.integers(0, 40))
def test_every_sample_is_in_one_shard_and_shares_are_even(count: int, n: int) -> None:
    shares = [[i for i in range(n) if Execution(Shard.parse(f"{k}/{count}")).mine(i)] for k in range(count)]
    assert sorted(i for share in shares for i in share) == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert all(LOCAL.mine(i) for i in range(n))


@pytest.mark.parametrize("text", ["3/2", "2/2", "0/0", "-1/2", "1", "a/b", "1/2/3", "", "1.0/2", "/2", "²/3"])
def test_no_such_shard(text: str) -> None:
    with pytest.raises(ConfigError, match=r"shard.*counted from 0"):
        Shard.parse(text)


def test_resources_of_a_worker() -> None:
    options = RayOptions.parse("gpu=0.5, CPU=4,tape=2,memory=1e9", workers=3)
    assert options == RayOptions(None, 4.0, 0.5, {"tape": 2.0, "memory": 1e9}, 3)
    assert options.needs(0.5) == {"CPU": 4.0, "GPU": 0.5, "tape": 2.0, "memory": 1e9}
    assert RayOptions.parse() == RayOptions()
    for text in ("gpu", "gpu=x", "=1", "cpu=-1", "cpu=nan", "cpu=inf"):
        with pytest.raises(ConfigError, match="give name=amount"):
            RayOptions.parse(text)
    for wrong in ({"workers": 0}, {"tries": 0}):
        with pytest.raises(ConfigError, match="must be at least 1"):
            RayOptions.parse(**wrong)
    with pytest.raises(ConfigError, match="a worker must ask for something"):
        RayOptions.parse("cpu=0,gpu=0")


def test_room_on_the_nodes() -> None:
    nodes = [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 1.0, "GPU": 4.0}, {"CPU": 64.0}]
    assert room(nodes, {"CPU": 1.0, "GPU": 1.0}) == 3
    assert room(nodes, {"CPU": 4.0, "GPU": 0.0}) == 18
    assert room(nodes, {"CPU": 0.0, "GPU": 0.1}) == 60  # 0.1 fits ten times into 1, in floats too
    assert room([], {"CPU": 1.0}) == 0


def test_missing_ray_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'kvtool\[ray\]'"):
        import_ray()


def test_another_model_is_refused(loaded: LoadedModel) -> None:
    origin = ModelOrigin.of(loaded, ("kvtool", "torch"))
    origin.check_versions()
    assert origin.load("cpu", None).info == loaded.info
    with pytest.raises(ConfigError, match=r"differs from this machine \(weights .* there, 0123 here\)"):
        replace(origin, fingerprint="0123").load("cpu", None)
    with pytest.raises(ConfigError, match=r"torch .* there, 1.0 here"):
        replace(origin, versions={"torch": "1.0"}).check_versions()


@pytest.mark.filterwarnings("ignore")
def test_an_address_where_nobody_answers_is_said_at_once() -> None:
    pytest.importorskip("ray", reason="ray is not installed (pip install 'kvtool[ray]')")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=rf"no Ray cluster at {address}.*ray start --head"):
            next(run_on_ray(None, [], Execution(None, RayOptions(address=address))))  # type: ignore[arg-type]


HOLD = """
import sys, time
from pathlib import Path
from kvtool.executors.claims import claimed
from kvtool.executors.execution import Shard
shard = Shard.parse(sys.argv[2]) if sys.argv[2] else None
with claimed(Path(sys.argv[1]), shard, lambda alone: None):
    print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def holder(folder: Path, shard: str) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that works in the folder, until it is killed."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), shard], stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def begin(folder: Path, shard: str | None) -> bool:
    """Claim and finish; return whether nobody else was at work at the end."""
    with claimed(folder, Shard.parse(shard) if shard else None, lambda alone: None) as claim:
        return claim.finish(lambda alone: alone)


def test_a_living_process_keeps_others_out_and_a_dead_one_does_not(tmp_path: Path) -> None:
    with holder(tmp_path, "") as other:
        with pytest.raises(ConfigError, match=rf"another run is at work in .*process {other.pid} on"):
            begin(tmp_path, None)
        with pytest.raises(ConfigError, match="another run is at work"):
            begin(tmp_path, "0/2")
    assert begin(tmp_path, None)
    with holder(tmp_path, "0/2") as other:
        for mine in ("0/2", None):
            with pytest.raises(ConfigError, match=rf"shard 0/2 is at work in .*process {other.pid} on"):
                begin(tmp_path, mine)
        assert not begin(tmp_path, "1/2")
        assert not begin(tmp_path, "0/3")
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
        assert begin(tmp_path, "0/2")
    assert not list(tmp_path.iterdir())


def test_a_claim_goes_with_its_folder(tmp_path: Path) -> None:
    """The folder of a finished capture is removed with the claims in it; the next run begins afresh."""
    folder = tmp_path / "c.h5.parts"
    with claimed(folder, None, lambda alone: None):
        for path in [*folder.iterdir()]:
            path.unlink()
        folder.rmdir()
        with claimed(folder, None, lambda alone: None):
            assert json.loads((folder / ".all.claim").read_text())["process"] == os.getpid()
    assert begin(folder, None)


def test_begin_is_told_whether_leftovers_may_go_and_its_error_gives_the_claim_back(tmp_path: Path) -> None:
    told: list[bool] = []
    with claimed(tmp_path, Shard(0, 2), told.append), claimed(tmp_path, Shard(1, 2), told.append):
        pass
    assert told == [True, False]

    def fail(alone: bool) -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"), claimed(tmp_path, None, fail):
        time.sleep(0)
    assert begin(tmp_path, None)
