"""Read simulate and infer folders, and refuse to put together what does not belong together."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtool.analysis.resampling import Documents
from kvtool.calibration import risk
from kvtool.errors import ConfigError, DataError
from kvtool.executors.records import read_units
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

    _by_policy: dict[str, dict[str, dict[str, Any]]] = field(init=False, repr=False, compare=False, default_factory=dict)
    _measured: dict[str, tuple[str, ...]] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        # Once, so that a table of hundreds of policies does not walk through all records for every figure.
        for record in self.records:
            self._by_policy.setdefault(record["policy"], {})[record["sample"]] = record

    @property
    def samples(self) -> list[str]:
        """Sample ids, in order of appearance."""
        return list(dict.fromkeys(record["sample"] for record in self.records))

    @property
    def policies(self) -> list[str]:
        """Policies, in order of appearance."""
        return list(self._by_policy)

    @property
    def mean_length(self) -> float:
        """Mean tokens of the prompts; what was asked for where records do not say it."""
        lengths = {record["sample"]: record.get("seq_len") for record in self.records}
        known = [length for length in lengths.values() if length]
        return float(np.mean(known)) if known else float(self.config["length"])

    def of(self, policy: str) -> list[dict[str, Any]]:
        """Return the records of one policy, in the order of `samples`; empty for a policy that was not run."""
        return list(self._by_policy.get(policy, {}).values())

    def measured(self, key: str) -> tuple[str, ...]:
        """Return the samples that have the figure `key` under every policy that ran on them.

        A prompt with an answer of one token has no answer accuracy, whatever the policy; it must not take the figure from
        all other prompts, and every policy is averaged over the same ones.
        """
        if key not in self._measured:
            without = {r["sample"] for r in self.records if r["status"] == "ok" and r.get(key) is None}
            self._measured[key] = tuple(sample for sample in self.samples if sample not in without)
        return self._measured[key]

    def documents(self, key: str) -> Documents:
        """Return which document each of the samples `measured` is of: those of one err together."""
        first: dict[str, dict[str, Any]] = {}
        for record in self.records:
            first.setdefault(record["sample"], record)
        found = [first[sample] for sample in self.measured(key)]
        return Documents.grouped(
            [str(r.get("document") or (r.get("meta") or {}).get("document") or r["sample"]) for r in found]
        )

    def values(self, policy: str, key: str) -> Float | None:
        """Return one figure of a policy for the samples `measured`, shape (S,).

        None if the policy was not run, did not finish on every sample (out of memory, impossible), or nothing was measured.
        """
        records, samples = self._by_policy.get(policy, {}), self.measured(key)
        if not records or not samples or any(r["status"] != "ok" for r in records.values()):
            return None
        return np.asarray([records[sample][key] for sample in samples], dtype=np.float64)


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
    for row in rows:
        _complete(row)
    return Simulation(folder, run["config"], run["provenance"], rows)


def _complete(row: dict[str, Any]) -> None:
    """Add the risk to a row of an older version, which holds what it is made of."""
    row.setdefault("risk", None)
    figures = row.get("per_sample", {})
    if "harm" in figures and "risk" not in figures:
        values = risk({name: np.asarray(value, dtype=np.float64) for name, value in figures.items()})
        figures["risk"], row["risk"] = values.tolist(), float(values.mean())


def load_reality(folder: Path) -> Reality:
    """Read an infer folder; only samples with a record for every policy count, so that all comparisons are paired.

    Raises
    ------
    DataError
        Missing or damaged, or no sample is complete.
    """
    run, records = read_run(folder), read_units(folder)
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
