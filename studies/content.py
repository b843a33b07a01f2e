"""What the content of files decides: prompts by their file's hash, models by their configuration and samples of their weights."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

#: Bytes of each of the samples that stand for the content of a large file, and how many.
BLOCK, BLOCKS = 4096, 16


def has_own_lengths(task: str) -> bool:
    """Return whether a task's prompts are as long as they are, whatever length is asked for."""
    return task.startswith(("file:", "ruler:"))


def longest_allowed(work: Mapping[str, Any]) -> int | None:
    """Return how long a node's prompts may be; None: as long as they are.

    Parameters
    ----------
    work : mapping
        With ``task``, which may set a limit of its own, and ``length``.
    """
    limits = re.findall(r"[:,]limit=(\d+)", str(work["task"]))
    return int(limits[-1]) if limits else work["length"]


def is_fixed(task: str) -> bool:
    """Return whether a task has a fixed set of samples, from which a seed draws; others make as many as they are asked for."""
    from kvtool.data.subsets import ENDLESS

    return task.partition(":")[0] not in ENDLESS


def n_points(task: str) -> int:
    """Return how many prompts a task makes of each one that it is asked for: the points of a grid of depths and lengths, else 1."""
    from kvtool.data.niah import grid_points
    from kvtool.data.requests import TaskRequest
    from kvtool.data.tasks import TASKS

    name, _, rest = task.partition(":")
    return grid_points(TaskRequest(1, 1, 0, TASKS[name].read_options(name, rest))) if name == "niah" else 1


def n_prompts(work: Mapping[str, Any]) -> int:
    """Return how many prompts a node has."""
    return int(work["n"]) * n_points(str(work["task"]))


def task_files(task: str) -> dict[str, str]:
    """Return the files that a task's spec names, by the hash of their content; one that is missing by its name alone."""
    name, _, rest = task.partition(":")
    paths = [rest] if name == "file" else [item.partition("=")[2] or item for item in rest.split(",")]
    return {path: hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16] for path in paths if path and Path(path).is_file()}


@lru_cache(maxsize=64)
def model_content(name: str) -> str | None:
    """Return a hash of a local model's configuration and of samples of its weights; None for a hub id, a shape or nothing."""
    from kvtool.models import EMBEDDED, embedded_folder

    folder = embedded_folder() if name == EMBEDDED else Path(name)
    if not (folder / "config.json").is_file():
        return None
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin")):
        size = file.stat().st_size
        digest.update(json.dumps([file.name, size]).encode())
        with file.open("rb") as weights:
            for index in range(BLOCKS):
                weights.seek(index * max(0, size - BLOCK) // max(1, BLOCKS - 1))
                digest.update(weights.read(BLOCK))
    return digest.hexdigest()[:16]
