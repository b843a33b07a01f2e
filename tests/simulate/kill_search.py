"""Script of the kill test of `kvtool search`: searches in forked children that die by SIGKILL at chosen steps, then are finished.

It runs in its own process that never started a thread. Arguments: capture file, output folder. Prints how many children died.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import optuna  # noqa: F401  (imported once, not in every child)
import torch

from kvtool.simulate.search import SearchConfig, run_search

SPACE = "adakv:floor=0..1,window={8,16},kernel=1..9,pool={max,avg}"
#: the n-th write to disk at which a child dies; each is another place within a batch of trials or between two
STEPS = (2, 9, 20, 31)


def search(out: Path) -> None:
    run_search(SearchConfig(sys.argv[1], SPACE, ("20%",), trials=20, draws=50), out)


def kill_at_call(number: int) -> None:
    """Kill this process at its `number`-th fsync or replace."""
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


def run(out: Path, number: int | None = None) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            if number:
                kill_at_call(number)
            search(out)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


if __name__ == "__main__":
    matplotlib.use("Agg")
    torch.set_num_threads(1)
    folder = Path(sys.argv[2])
    # Once in this process: what is imported on first use is then there in every child.
    search(folder / "warm")
    assert run(folder / "undisturbed") == 0
    deaths = 0
    for step in STEPS:
        out = folder / f"step{step:02d}"
        code = run(out, step)
        assert code in (0, -signal.SIGKILL), code
        deaths += code == -signal.SIGKILL
        assert run(out) == 0
    print(deaths)
