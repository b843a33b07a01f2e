"""Units of work on a Ray cluster: workers that load the model once, units that survive the death of a worker.

Workers are Ray actors, as a process that holds a model on a GPU must belong to one run and not be picked at random from a
pool. They are never restarted by Ray: the driver counts how often the worker of one unit has died, which is what tells a
machine that failed from a unit that kills whatever runs it.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from kvtool.errors import CapacityError, ConfigError, KvtoolError, MissingDependencyError
from kvtool.executors.execution import Execution, RayOptions
from kvtool.executors.worker import Worker
from kvtool.progress import say

#: Seconds between two looks at the cluster's nodes; they come and go.
LOOK_S = 5.0


class Task(Protocol):
    """Work on one sample that ends in one or more results. Immutable; travels to the workers."""

    @property
    def name(self) -> str:
        """For messages."""

    def after(self, result: Any) -> Task | None:
        """Return what is left to do once `result` has come back."""

    def give_up(self, message: str) -> tuple[list[Any], Task | None]:
        """Return results that stand for the next one, which no worker survives, and what is left to do."""


class Job(Protocol):
    """What all tasks of a run share. Travels to the workers."""

    @property
    def label(self) -> str:
        """For messages: ``infer``, ``capture``."""

    def check_versions(self) -> None:
        """Refuse a machine with other packages than the driver's; runs on the worker, before the model is loaded."""

    def start(self, device: str, device_map: str | None) -> tuple[Any, dict[str, Any]]:
        """Load the model and refuse another one than the driver's; returns it, and facts about this machine."""

    def run(self, loaded: Any, task: Any) -> Iterator[Any]:
        """Yield the results of a task."""


@dataclass(frozen=True, slots=True)
class Result:
    """One result; `worker` holds facts about the machine that made it, None for a unit that was given up."""

    value: Any
    worker: Mapping[str, Any] | None


@dataclass(slots=True)
class _Work:
    """A task and its luck: `deaths` of workers since its last result, and how many it is allowed."""

    task: Task
    tries: int
    deaths: int = 0


@dataclass(slots=True, eq=False)
class _Member:
    """A worker of the pool. `facts` is empty until its model is loaded, `work` is None while it is idle."""

    actor: Any
    facts: Mapping[str, Any] = field(default_factory=dict)
    work: _Work | None = None


def run_on_ray(job: Job, tasks: Sequence[Task], execution: Execution) -> Iterator[Result]:
    """Yield the results of all tasks as they come in, in any order.

    Parameters
    ----------
    job : Job
    tasks : sequence of Task
    execution : Execution
        With options for Ray. Which GPUs of its machine a worker sees is Ray's choice.

    Raises
    ------
    MissingDependencyError
        Ray is not installed.
    ConfigError
        No such cluster, no node that has what a worker needs, or a worker with another model or other packages.
    CapacityError
        Workers die before they have loaded the model.
    KvtoolError
        Of a task, as in a local run.
    """
    assert execution.ray is not None
    ray = import_ray()
    with _connection(ray, execution.ray):
        pool = _Pool(ray, job, tasks, execution.ray, execution)
        try:
            yield from pool.results()
        finally:
            pool.close()


def import_ray() -> Any:
    """Return the module ray.

    Raises
    ------
    MissingDependencyError
        It is not installed.
    """
    # Ray reports usage figures to its makers unless told not to; a tool of ours does not start that on its own.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "ray":
            raise
        raise MissingDependencyError("--executor ray needs the package ray; run: pip install 'kvtool[ray]'") from error
    return ray


@contextmanager
def _connection(ray: Any, options: RayOptions) -> Iterator[None]:
    """Use the cluster that this process is connected to, or connect to one until the run ends."""
    if ray.is_initialized():
        yield
        return
    where = options.address or os.environ.get("RAY_ADDRESS") or "this machine"
    try:
        _knock(where)
        ray.init(address=options.address, log_to_driver=False, logging_level="ERROR")
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"no Ray cluster at {where}: {_one_line(error)}; start one with: ray start --head") from error
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Raise OSError at once where nobody answers; Ray itself would try for many minutes."""
    host, _, port = address.rpartition(":")
    if host and "/" not in address and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()


class _Pool:
    """The driver's side: which worker does what."""

    def __init__(self, ray: Any, job: Job, tasks: Sequence[Task], options: RayOptions, execution: Execution) -> None:
        self._ray, self._job, self._options = ray, job, options
        self._waiting = deque(_Work(task, options.tries) for task in tasks)
        self._members: dict[Any, _Member] = {}  # by the answer that is awaited
        self._idle: list[_Member] = []
        self._failed_starts, self._looked, self._room = 0, -math.inf, 0
        nodes, device = self._nodes(), execution.device
        wants_gpu = device.startswith("cuda") or (device == "auto" and any(node.get("GPU") for node in nodes))
        self._needs = options.needs(options.gpus if options.gpus is not None else float(wants_gpu))
        # Ray shows a worker its own GPUs only, so numbers of the driver's mean nothing there.
        device = device.partition(":")[0] if device != "auto" else "cuda" if self._needs["GPU"] else "cpu"
        self._place = (device, execution.device_map)
        self._check_room(nodes)
        self._actor_class = ray.remote(Worker)
        self._shared_job = ray.put(job)

    def results(self) -> Iterator[Result]:
        while self._waiting or any(member.work for member in self._members.values()):
            self._give_work()
            ready, _ = self._ray.wait(list(self._members), num_returns=1, timeout=LOOK_S) if self._members else ([], [])
            if not self._members:
                time.sleep(LOOK_S)
            for answer in ready:
                yield from self._take(answer, self._members.pop(answer))

    def close(self) -> None:
        for member in [*self._members.values(), *self._idle]:
            self._ray.kill(member.actor, no_restart=True)
        self._members, self._idle = {}, []

    def _give_work(self) -> None:
        while self._idle and self._waiting:
            self._ask(self._idle.pop(), self._waiting.popleft())
        n_starting = sum(not member.facts for member in self._members.values())
        for _ in range(min(self._free_places(), len(self._waiting) - n_starting)):
            self._hire()

    def _ask(self, member: _Member, work: _Work) -> None:
        """Hand a worker its next task."""
        member.work = work
        self._members[member.actor.step.remote(work.task)] = member

    def _take(self, answer: Any, member: _Member) -> Iterator[Result]:
        """Deal with an answer of a worker, or with its death."""
        try:
            value = self._ray.get(answer)
        except self._ray.exceptions.RayTaskError as error:
            # What a unit or a refused worker raised is raised here as if it had happened here.
            raise (error.cause if isinstance(error.cause, KvtoolError) else error) from None
        except self._ray.exceptions.RayError as error:
            yield from self._bury(member, error)
            return
        if member.work is None:
            member.facts, self._failed_starts = value, 0
            self._idle.append(member)
            return
        work, rest = member.work, member.work.task.after(value)
        work.deaths = 0
        if rest is None:
            member.work = None
            self._idle.append(member)
            self._give_work()
        else:
            # The worker goes on while the result is written.
            work.task = rest
            self._members[member.actor.step.remote(None)] = member
        yield Result(value, member.facts)

    def _bury(self, member: _Member, error: BaseException) -> Iterator[Result]:
        """Put the work of a dead worker back; give its unit up if it has cost too many of them."""
        self._ray.kill(member.actor, no_restart=True)
        self._looked = -math.inf
        reason, work = _reason(error), member.work
        if work is None:
            self._failed_starts += 1
            say(f"{self._job.label}: a worker died before it had loaded the model ({reason})")
            if self._failed_starts >= self._options.tries * max(1, self._room):
                raise CapacityError(
                    f"{self._failed_starts} workers in a row died before they had loaded the model ({reason}); what is "
                    "finished is kept. Give each more, for example --ray-resources cpu=4,memory=32e9"
                )
            return
        work.deaths += 1
        place = f"{member.facts.get('host')}, process {member.facts.get('process')}"
        say(f"{self._job.label}: the worker of {work.task.name} died ({place}; {reason}), {work.deaths} of {work.tries}")
        if work.deaths < work.tries:
            self._waiting.appendleft(work)
            return
        times = f"its worker died {work.deaths} times" if work.deaths > 1 else "its worker died"
        values, rest = work.task.give_up(f"{times} ({reason})")
        if rest is not None:
            # The prompt itself may be what kills: until a result comes, each further unit of it may cost one worker.
            self._waiting.appendleft(_Work(rest, 1))
        for value in values:
            yield Result(value, None)

    def _hire(self) -> None:
        needs = self._needs
        actor = self._actor_class.options(
            num_cpus=needs["CPU"], num_gpus=needs["GPU"], resources=_own(needs), memory=needs.get("memory"), max_restarts=0
        ).remote(self._shared_job, self._place, os.getcwd())
        self._members[actor.ready.remote()] = _Member(actor)

    def _free_places(self) -> int:
        if time.monotonic() - self._looked > LOOK_S:
            self._room, self._looked = room(self._nodes(), self._needs), time.monotonic()
            if not self._room and not self._options.workers:
                say(f"{self._job.label}: no node of the cluster has room for a worker now; waiting for one")
        most = self._options.workers or self._room
        return most - len(self._members) - len(self._idle)

    def _nodes(self) -> list[Mapping[str, float]]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def _check_room(self, nodes: Sequence[Mapping[str, float]]) -> None:
        """Refuse to wait for ever; with a number of workers given, the cluster may grow."""
        if room(nodes, self._needs) or self._options.workers:
            return
        asked = ", ".join(f"{name} {amount:g}" for name, amount in self._needs.items() if amount)
        names = [name for name, amount in self._needs.items() if amount]
        there = "; ".join(", ".join(f"{name} {node.get(name, 0):g}" for name in names) for node in nodes) or "no node"
        raise ConfigError(
            f"a worker needs {asked}, but the nodes of the cluster have: {there}; change --ray-resources, "
            "or give --ray-workers for a cluster that grows"
        )


def room(nodes: Sequence[Mapping[str, float]], needs: Mapping[str, float]) -> int:
    """Return how many workers fit onto the nodes, whether or not others use them now."""
    wanted = {name: amount for name, amount in needs.items() if amount}
    return sum(min(int(node.get(name, 0) / amount + 1e-9) for name, amount in wanted.items()) for node in nodes)


def _own(needs: Mapping[str, float]) -> dict[str, float]:
    return {name: amount for name, amount in needs.items() if name not in ("CPU", "GPU", "memory") and amount}


def _reason(error: BaseException) -> str:
    """Return the part of Ray's long message that says what happened."""
    text = _one_line(error, 10_000)
    _, found, detail = text.partition("Worker exit detail: ")
    return (detail if found else text).partition(". ")[0][:160]


def _one_line(error: BaseException, most: int = 200) -> str:
    return " ".join(str(error).split())[:most] or type(error).__name__
