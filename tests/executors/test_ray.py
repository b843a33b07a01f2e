"""A real Ray cluster of two nodes on this machine: a worker is killed, a unit kills its workers, and the records are a local run's."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import shard_toy as toy

from kvtool.errors import ConfigError
from kvtool.executors.execution import Execution, RayOptions, Shard
from kvtool.files import read_records
from kvtool.models import LoadedModel
from kvtool.policies import Budget, Policy

ray: Any = pytest.importorskip("ray", reason="ray is not installed (pip install 'kvtool[ray]')")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

ON_RAY = Execution(None, RayOptions(tries=2), "cpu")


def start_cluster(make: Any, **node: Any) -> Any:
    """Start two nodes; on a busy machine Ray's own limit of 30 seconds for one may not be enough at first."""
    for last in (False, False, True):
        made = make()
        try:
            made.add_node(**node, include_dashboard=False)
            made.add_node(**node)
            made.wait_for_nodes()
            return made
        except Exception as error:  # Ray raises plain Exception here
            made.shutdown()
            if last or "timed out" not in str(error).lower():
                raise
    return None


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes with one CPU each; this process is their driver."""
    import deadly
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    made = start_cluster(Cluster, num_cpus=1, object_store_memory=80 * 2**20)
    ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
    ray.cloudpickle.register_pickle_by_value(deadly)
    yield made
    ray.shutdown()
    made.shutdown()


def kill_from_outside(flag: Path, killed: list[int]) -> None:
    """Wait until a worker is in the middle of its unit, then kill it."""
    deadline = time.monotonic() + 300
    while not flag.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    killed.append(int(flag.read_text()))
    os.kill(killed[0], signal.SIGKILL)


def test_a_killed_worker_changes_nothing(
    cluster: Any, tmp_path: Path, loaded: LoadedModel, capfd: pytest.CaptureFixture[str]
) -> None:
    from deadly import Deadly

    lengths = [len(sample.prompt_ids) for sample in toy.samples()]
    method = Deadly(str(tmp_path / "flag"), os.getpid(), waits_at=lengths[1], dies_at=lengths[5])
    policies = [Policy.parse(toy.POLICIES[0]), Policy(method, Budget.parse("20")), Policy.parse(toy.POLICIES[1])]
    toy.infer(loaded, tmp_path / "whole", policies=policies)
    whole = toy.records(tmp_path / "whole")

    begun = toy.infer(loaded, tmp_path / "run", Execution(Shard(0, 3)), policies)
    assert begun.n_missing == 16
    killed: list[int] = []
    killer = threading.Thread(target=kill_from_outside, args=(tmp_path / "flag", killed))
    killer.start()
    summary = toy.infer(loaded, tmp_path / "run", ON_RAY, policies)
    killer.join()

    said = capfd.readouterr().err
    assert f"process {killed[0]}" in said
    assert "1 of 2" in said
    assert (summary.n_units, summary.n_reused, summary.n_failed, summary.n_missing) == (28, 12, 1, 0)
    found = toy.records(tmp_path / "run")
    lost = 5 * 4 + 2  # sample 5, the deadly policy: no worker survives it, and the others of that sample go on
    assert (found[lost]["status"], found[lost]["score"]) == ("failed", None)
    assert "died 2 times" in found[lost]["message"]
    assert set(found[lost]) == set(whole[lost])
    assert [r for i, r in enumerate(found) if i != lost] == [r for i, r in enumerate(whole) if i != lost]
    workers = read_records(tmp_path / "run" / "workers.jsonl")
    assert len({line["process"] for line in workers}) == len(workers) >= 3  # the shard, the killed one, at least one other
    assert {line["process"] for line in workers} >= {os.getpid(), killed[0]}
    notes = [unit for line in workers for unit in line["units"]]
    assert sorted(notes) == sorted(r["unit"] for i, r in enumerate(whole) if i != lost)

    again = toy.infer(loaded, tmp_path / "run", Execution(retry_failed=True), policies)
    assert (again.n_reused, again.n_failed) == (27, 0)
    assert toy.records(tmp_path / "run") == whole


def test_a_capture_on_ray_is_that_of_a_local_run(cluster: Any, tmp_path: Path, loaded: LoadedModel) -> None:
    toy.capture(loaded, tmp_path / "whole.h5")
    toy.capture(loaded, tmp_path / "c.h5", Execution(Shard(1, 3)))
    assert toy.capture(loaded, tmp_path / "c.h5", ON_RAY).n_reused == 2
    assert toy.content(tmp_path / "c.h5") == toy.content(tmp_path / "whole.h5")


def test_perplexity_on_ray_is_that_of_a_local_run(cluster: Any, tmp_path: Path, loaded: LoadedModel) -> None:
    whole = toy.perplexity(loaded, tmp_path / "whole")
    assert (whole.n_units, whole.n_missing) == (12, 0)
    begun = toy.perplexity(loaded, tmp_path / "run", Execution(Shard(0, 3)))
    assert 0 < begun.n_missing < 12
    on_ray = toy.perplexity(loaded, tmp_path / "run", ON_RAY)
    assert (on_ray.n_reused, on_ray.n_missing) == (12 - begun.n_missing, 0)
    assert toy.records(tmp_path / "run") == toy.records(tmp_path / "whole")


def test_what_does_not_fit_is_refused(
    cluster: Any, tmp_path: Path, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for options, message in (
        (RayOptions(cpus=2), "a worker needs CPU 2, but the nodes of the cluster have: CPU 1; CPU 1"),
        (RayOptions(gpus=1), "GPU 0"),
        (RayOptions(resources={"tape": 1}), "tape 1, but"),
    ):
        with pytest.raises(ConfigError, match=message):
            toy.infer(loaded, tmp_path, Execution(None, options, "cpu"))
    monkeypatch.setattr("kvtool.executors.worker.public_versions", lambda names: dict.fromkeys(names, "0.1"))
    with pytest.raises(ConfigError, match=r"differs from this machine \(.*torch .* there, 0.1 here"):
        toy.infer(loaded, tmp_path, Execution(None, RayOptions(workers=1), "cpu"))
