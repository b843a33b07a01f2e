"""Read simulate and infer folders, and refuse to put together what does not belong together."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtool.errors import ConfigError, DataError
from kvtool.files import read_records, read_run

Float = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Simulation:
    """A simulate folder.

    Attributes
    ----------
    folder : Path
    config, provenance : dict
    rows : list of dict
        One per configuration, see ``docs/metrics.md``.
    """

    folder: Path
    config: dict[str, Any]
    provenance: dict[str, Any]
    rows: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Reality:
    """An infer folder.

    Attributes
    ----------
    folder : Path
    config, provenance : dict
    records : list of dict
        One per (sample, policy).
    """

    folder: Path
    config: dict[str, Any]
    provenance: dict[str, Any]
    records: list[dict[str, Any]]

    @property
    def samples(self) -> list[str]:
        """Sample ids, in order of appearance."""
        return list(dict.fromkeys(record["sample"] for record in self.records))

    @property
    def policies(self) -> list[str]:
        """Policies, in order of appearance."""
        return list(dict.fromkeys(record["policy"] for record in self.records))

    def of(self, policy: str) -> list[dict[str, Any]]:
        """Return the records of one policy, in the order of `samples`."""
        return [record for record in self.records if record["policy"] == policy]

    def values(self, policy: str, key: str) -> Float | None:
        """Return one figure of a policy for all samples, shape (S,); None unless every sample has it."""
        found = {r["sample"]: r.get(key) for r in self.of(policy) if r["status"] == "ok"}
        values = [found.get(sample) for sample in self.samples]
        return None if any(v is None for v in values) else np.asarray(values, dtype=np.float64)


def load_simulation(folder: Path) -> Simulation:
    """Read a simulate folder.

    Raises
    ------
    DataError
        Missing, unfinished or damaged.
    """
    run, path = read_run(folder), folder / "ranking.jsonl"
    if not path.exists():
        raise DataError(f"{folder} holds no ranking.jsonl; run kvtool simulate with the same options, it continues")
    rows = read_records(path)
    if not rows:
        raise DataError(f"{path} is empty; run kvtool simulate again")
    return Simulation(folder, run["config"], run["provenance"], rows)


def load_reality(folder: Path) -> Reality:
    """Read an infer folder; only samples with a record for every policy count, so that all comparisons are paired.

    Raises
    ------
    DataError
        Missing or damaged, or no sample is complete.
    """
    run, records = read_run(folder), read_records(folder / "records.jsonl")
    wanted = run["config"].get("policies", [])
    seen: dict[str, set[str]] = {}
    for record in records:
        seen.setdefault(record["sample"], set()).add(record["policy"])
    complete = {sample for sample, policies in seen.items() if policies >= set(wanted)}
    if not complete:
        raise DataError(f"{folder} holds no sample with all its policies; run kvtool infer with the same options, it continues")
    return Reality(folder, run["config"], run["provenance"], [r for r in records if r["sample"] in complete])


def check_belongs(simulation: Simulation, reality: Reality) -> None:
    """Refuse a simulation and a run of different models, tasks, lengths or views of the question.

    Raises
    ------
    ConfigError
        With the differing facts. Other prompts of the same task are fine: a ranking should hold on fresh ones.
    """
    there = {
        "model": simulation.config["model"]["fingerprint"],
        "task": simulation.config.get("task"),
        "length": simulation.config.get("length"),
        "compress_at": simulation.config.get("compress_at"),
    }
    here = {
        "model": reality.config.get("fingerprint"),
        "task": reality.config.get("task"),
        "length": reality.config.get("length"),
        "compress_at": reality.config.get("compress_at"),
    }
    differing = [f"{k}: {json.dumps(there[k])} simulated, {json.dumps(here[k])} run" for k in there if there[k] != here[k]]
    if differing:
        raise ConfigError(f"{simulation.folder} and {reality.folder} do not belong together ({'; '.join(differing)})")
