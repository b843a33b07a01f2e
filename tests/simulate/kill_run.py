"""Script of the kill test: simulations in forked children that are killed with SIGKILL, then finished.

It runs in its own process, in which no thread works while it forks: those of autograd, started by the capture, wait.
Arguments: folder of the root conftest, output folder. Prints JSON: how often a child died at a chosen step, and at a random
moment.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch

from kvtool import models, pictures
from kvtool.capture.runner import CaptureConfig, run_capture
from kvtool.data.tasks import load_task
from kvtool.models import LoadedModel
from kvtool.simulate.runner import SimulateConfig, run_simulate


def prepare(tests: Path, path: Path) -> LoadedModel:
    spec = importlib.util.spec_from_file_location("root_conftest", tests / "conftest.py")
    shared = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shared)
    tokenizer, model = shared.byte_tokenizer.__wrapped__(), shared.build_random_model("llama")
    loaded = LoadedModel(model, tokenizer, models.describe(model, "llama"))
    run_capture(CaptureConfig(task="niah", model="llama", n=2, length=220), loaded, load_task("niah", tokenizer, 2, 220), path)
    return loaded


def simulate(out: Path) -> None:
    policies = ("window", "streaming", "h2o", "snapkv", "random")
    config = SimulateConfig(str(CAPTURE), policies=policies, budgets=("20%", "50%"), refine=3, draws=50)
    run_simulate(config, out, LOADED)


def kill_at_call(number: int) -> None:
    """Kill this process at its `number`-th fsync or replace: between any two steps that matter on disk."""
    calls = 0

    def counted(function: Callable) -> Callable:
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    os.fsync, os.replace = counted(os.fsync), counted(os.replace)


def child(work: Callable[[], object]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    return pid


def outcome(pid: int) -> int:
    _, status = os.waitpid(pid, 0)
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def kill_everywhere(folder: Path) -> int:
    """For every n: one run dies at its n-th call, the next one finishes. Returns the deaths."""
    for number in range(1, 1000):
        out = folder / f"step{number:03d}"

        def dying(out: Path = out, number: int = number) -> None:
            kill_at_call(number)
            simulate(out)

        code = outcome(child(dying))
        finish(out)
        if code == 0:
            return number - 1
        assert code == -signal.SIGKILL, code
    raise RuntimeError("a simulation never ended")


def kill_at_random(folder: Path, n: int, duration: float) -> int:
    """One run dies at a random moment, the next one too (or ends), the last one finishes. Returns the deaths."""
    rng, deaths = random.Random(0), 0
    for number in range(n):
        out = folder / f"random{number:03d}"
        for _ in range(2):
            pid = child(lambda out=out: simulate(out))
            time.sleep(rng.random() * duration)
            os.kill(pid, signal.SIGKILL)
            deaths += outcome(pid) == -signal.SIGKILL
        finish(out)
    return deaths


def finish(out: Path) -> None:
    code = outcome(child(lambda: simulate(out)))
    assert code == 0, (out, code)


if __name__ == "__main__":
    matplotlib.use("Agg")
    torch.set_num_threads(1)
    main_folder = Path(sys.argv[2])
    CAPTURE = main_folder / "c.h5"
    # All formats of a figure are written by the same call: one of them stands for the others, and saves most of the time.
    pictures.FORMATS = {"png": pictures.FORMATS["png"]}
    LOADED = prepare(Path(sys.argv[1]), CAPTURE)
    # Once in this process: what is imported on first use is then there in every child.
    simulate(main_folder / "warm")
    started = time.perf_counter()
    finish(main_folder / "undisturbed")
    took = time.perf_counter() - started
    print(json.dumps({"everywhere": kill_everywhere(main_folder), "random": kill_at_random(main_folder, 4, took)}))
