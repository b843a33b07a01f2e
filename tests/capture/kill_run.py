"""Script of the kill test: captures in forked children that are killed with SIGKILL, then finishes.

It runs in its own process that never started a thread, so that forking is safe. Arguments: output folder.
Prints JSON: how often a child died at a chosen step, and at a random moment.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import capture_toy as toy
import torch

from kvtool.capture.runner import CaptureConfig, run_capture

N_SAMPLES = 3


def capture(out: Path) -> int:
    config = CaptureConfig("toy", "llama", N_SAMPLES, windows=(8,))
    return run_capture(config, LOADED, SAMPLES, out).n_reused


def kill_at_call(number: int) -> None:
    """Kill this process at its `number`-th fsync, replace or unlink: between any two steps that matter on disk."""
    calls = 0

    def counted(function: Callable) -> Callable:
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    os.fsync, os.replace, os.unlink = counted(os.fsync), counted(os.replace), counted(os.unlink)


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


def import_what_a_capture_imports() -> None:
    """Import here what a capture imports on first use, so that not every child does so; a capture here would start threads."""
    out, into = os.pipe()

    def report() -> None:
        known = set(sys.modules)
        with tempfile.TemporaryDirectory() as folder:
            capture(Path(folder) / "warm.h5")
        os.write(into, "\n".join(sorted(set(sys.modules) - known)).encode())

    pid = child(report)
    os.close(into)
    with os.fdopen(out) as file:
        names = file.read().split()
    assert outcome(pid) == 0
    for name in names:
        with contextlib.suppress(ImportError):  # some are attributes of a package, not modules
            importlib.import_module(name)


def kill_everywhere(folder: Path) -> int:
    """For every n: one run dies at its n-th call, the next one finishes. Returns the deaths."""
    for number in range(1, 1000):
        out = folder / f"step{number:03d}.h5"

        def dying(out: Path = out, number: int = number) -> None:
            kill_at_call(number)
            capture(out)

        code = outcome(child(dying))
        finish(out)
        if code == 0:
            return number - 1
        assert code == -signal.SIGKILL, code
    raise RuntimeError("a capture never ended")


def kill_at_random(folder: Path, n: int, duration: float) -> int:
    """One run dies at a random moment, the next one too (or ends), the last one finishes. Returns the deaths."""
    rng, deaths = random.Random(0), 0
    for number in range(n):
        out = folder / f"random{number:03d}.h5"
        for _ in range(2):
            pid = child(lambda out=out: capture(out))
            time.sleep(rng.random() * duration)
            os.kill(pid, signal.SIGKILL)
            deaths += outcome(pid) == -signal.SIGKILL
        finish(out)
    return deaths


def finish(out: Path) -> None:
    code = outcome(child(lambda: capture(out)))
    assert code == 0, (out, code)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main_folder = Path(sys.argv[1])
    LOADED, SAMPLES = toy.build_loaded("llama"), toy.make_samples(N_SAMPLES)
    import_what_a_capture_imports()
    started = time.perf_counter()
    finish(main_folder / "undisturbed.h5")
    took = time.perf_counter() - started
    print(json.dumps({"everywhere": kill_everywhere(main_folder), "random": kill_at_random(main_folder, 12, took)}))
