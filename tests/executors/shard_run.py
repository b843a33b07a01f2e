"""Script of the shard tests: runs and captures in processes of their own, some of them killed with SIGKILL.

It never started a thread, so that forking is safe. Arguments: model folder, output folder. Prints JSON: the counts that each
process reported, or the signal that ended it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import shard_toy as toy
import torch

import kvtool.capture.store as store
import kvtool.infer.runner as runner
from kvtool.executors.execution import LOCAL, Execution, Shard

Work = Callable[[], Any]


def start(work: Work) -> tuple[int, int]:
    """Run `work` in a child; returns its number and where its answer comes out."""
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(into, json.dumps(work()).encode())
            os._exit(0)
        except BaseException as error:
            os.write(into, json.dumps(f"{type(error).__name__}: {error}").encode())
            os._exit(1)
    os.close(into)
    return pid, out


def outcome(child: tuple[int, int]) -> Any:
    pid, out = child
    with os.fdopen(out, "rb") as file:
        answer = file.read()
    _, status = os.waitpid(pid, 0)
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else json.loads(answer)


def do(*works: Work) -> list[Any]:
    """Run in children at the same time; return their answers."""
    return [outcome(child) for child in [start(work) for work in works]]


def import_what_a_run_imports() -> None:
    """Import here what runs and captures import on first use, so that not every child does so; a capture here would start threads."""

    def names() -> list[str]:
        known = set(sys.modules)
        with tempfile.TemporaryDirectory() as folder:
            infer(Path(folder) / "run")()
            capture(Path(folder) / "c.h5")()
        return sorted(set(sys.modules) - known)

    for name in do(names)[0]:
        with contextlib.suppress(ImportError):  # some are attributes of a package, not modules
            importlib.import_module(name)


def share(text: str | None) -> Execution:
    return Execution(Shard.parse(text)) if text else LOCAL


def dying(module: Any, name: str, number: int) -> None:
    """Kill this process when it has called a function of a module so often: for records, with half a line after them."""
    whole, calls = getattr(module, name), 0

    def counted(path: Path, payload: Any) -> None:
        nonlocal calls
        whole(path, payload)
        calls += 1
        if calls == number:
            if name == "append_records":
                with path.open("ab") as file:
                    file.write(b'{"unit": "torn')
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(module, name, counted)


def infer(folder: Path, shard: str | None = None, dies_after: int = 0) -> Work:
    def work() -> dict[str, int]:
        if dies_after:
            dying(runner, "append_records", dies_after)
        return toy.facts(toy.infer(LOADED, folder, share(shard)))

    return work


def capture(path: Path, shard: str | None = None, dies_after: int = 0) -> Work:
    def work() -> dict[str, int]:
        if dies_after:
            dying(store, "write_part", dies_after)
        return toy.facts(toy.capture(LOADED, path, share(shard)))

    return work


def scenarios(make: Callable[..., Work], name: Callable[[str], Path], parts: Callable[[Path], Path]) -> dict[str, Any]:
    """The same story for records and for captures; `parts` says where shards leave their work."""
    told = {"whole": do(make(name("whole")))}
    # Two at the same time; one after the other; and two counts of shards at the same time, which overlap.
    told["together"] = do(make(name("together"), "0/2"), make(name("together"), "1/2"))
    told["apart"] = do(make(name("apart"), "1/2")) + do(make(name("apart"), "0/2"))
    told["overlap"] = do(*(make(name("overlap"), shard) for shard in ("0/2", "0/3", "1/2")))
    # Half a local run, a shard that is killed, a shard of another count, the killed one again, the rest locally.
    mixed = name("mixed")
    told["mixed"] = do(make(mixed, None, 2)) + do(make(mixed, "0/2", 1)) + do(make(mixed, "1/3"))
    told["mixed"] += do(make(mixed, "0/2")) + do(make(mixed)) + do(make(mixed, "1/2"))
    # Machines without a common folder: what each one has is copied together.
    for shard in ("0/2", "1/2"):
        do(make(name(shard[0]), shard))
    parts(name("copied")).mkdir(parents=True)
    for shard in ("0", "1"):
        shutil.copytree(parts(name(shard)), parts(name("copied")), dirs_exist_ok=True)
    if (description := name("0") / "run.json").exists():
        shutil.copy(description, name("copied"))
    told["copied"] = do(make(name("copied")))
    return told


if __name__ == "__main__":
    torch.set_num_threads(1)
    LOADED, main_folder = toy.load(Path(sys.argv[1])), Path(sys.argv[2])
    import_what_a_run_imports()
    print(
        json.dumps(
            {
                "infer": scenarios(infer, lambda name: main_folder / name, lambda path: path / "parts"),
                "capture": scenarios(
                    capture, lambda name: main_folder / f"{name}.h5", lambda path: path.with_name(f"{path.name}.parts")
                ),
            }
        )
    )
