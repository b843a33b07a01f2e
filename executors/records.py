"""The store of finished units of a run folder: one JSON record per unit, named by a hash of its content.

``records.jsonl`` is written by the run that does everything (in this process, or the driver of a Ray cluster). Each shard
appends to a file of its own, ``parts/<shard>.<random>.jsonl``, so no file ever has two writers, and folders of several
machines can be copied together. Readers take both. When every unit is there, all become ``records.jsonl`` in the order of a
local run, by one rename.

The first line of a part says to which run it belongs and what made it; ``workers.jsonl`` keeps that for units that were made
elsewhere, as times of different machines cannot be compared.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvtool.errors import DataError
from kvtool.executors.execution import Shard
from kvtool.files import append_records, read_records, read_run, write_text

RECORDS, PARTS, WORKERS = "records.jsonl", "parts", "workers.jsonl"
PART_SCHEMA = "kvtool.part/1"
GIVEN_UP = "failed"


def read_units(folder: Path) -> list[dict[str, Any]]:
    """Return all finished units of a run folder, merged or not; of a unit that was done twice, one record.

    Raises
    ------
    DataError
        Damaged, or a part of another run.
    """
    return list(best(_all_records(folder)).values())


def best(records: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return one record per unit: the first one that is a result, else the first one."""
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        unit = record.get("unit") or json.dumps([record["sample"], record["policy"]])  # other tools' records have no hash
        old = found.get(unit)
        if old is None or old["status"] == GIVEN_UP != record["status"]:
            found[unit] = record
    return found


@dataclass(slots=True)
class RecordStore:
    """The unit store of one run, as one writer sees it.

    Attributes
    ----------
    folder : Path
    order : sequence of str
        Units of the whole run in the order of a local run.
    shard : Shard or None
        None: the writer of ``records.jsonl``.
    facts : mapping
        What makes the records: machine and versions.
    """

    folder: Path
    order: Sequence[str]
    shard: Shard | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    _part: Path | None = field(default=None, init=False)

    def found(self, *, retry_failed: bool = False) -> dict[str, dict[str, Any]]:
        """Return the finished units; with `retry_failed`, without those that were given up."""
        found = best(_all_records(self.folder))
        return {k: r for k, r in found.items() if not (retry_failed and r["status"] == GIVEN_UP)}

    def note(self, units: Sequence[str], worker: Mapping[str, Any]) -> None:
        """Note down that another process made these units."""
        append_records(self.folder / WORKERS, [{**worker, "units": list(units)}])

    def target(self) -> Path:
        """Return the file that this writer appends to; no other process does."""
        if self.shard is None:
            return self.folder / RECORDS
        if self._part is None:
            self._part = self.folder / PARTS / f"{self.shard.name}.{secrets.token_hex(4)}.jsonl"
            header = {"schema": PART_SCHEMA, "run": _run_hash(self.folder), "shard": str(self.shard), **self.facts}
            append_records(self._part, [header])
        return self._part

    @property
    def is_over(self) -> bool:
        """Whether others have put everything together and removed this writer's part: nothing is left to do."""
        return self._part is not None and not self._part.exists()

    def finish(self, alone: bool) -> list[str]:
        """Put all units together if every one is there; returns those that are missing.

        To be called while nobody else can (`kvtool.executors.claims.Claim.finish`). Parts are removed if no one else is at work.
        """
        found = best(_all_records(self.folder))
        if missing := [unit for unit in self.order if unit not in found]:
            return missing
        place = {unit: i for i, unit in enumerate(self.order)}
        wanted = sorted(found.values(), key=lambda record: place.get(record["unit"], len(place)))
        path = self.folder / RECORDS
        self._keep_workers(found)
        if not path.exists() or path.read_text(encoding="utf-8") != _lines(wanted):
            write_text(path, _lines(wanted))
        if alone:
            shutil.rmtree(self.folder / PARTS, ignore_errors=True)
        return []

    def _keep_workers(self, found: Mapping[str, dict[str, Any]]) -> None:
        """Note down what made the records of each part, one line per process.

        Records that lost to the same unit of another part do not count.
        """
        path = self.folder / WORKERS
        lines = read_records(path)
        known = {line.get("part") for line in lines}
        for part in _parts(self.folder):
            header, *records = read_records(part) or [{}]
            # As text: a figure that is not a number does not equal itself.
            units = [record["unit"] for record in records if _lines([found[record["unit"]]]) == _lines([record])]
            if units and part.name not in known:
                lines.append({"part": part.name, **header, "units": units})
        processes: dict[str, dict[str, Any]] = {}
        for line in lines:
            facts = {key: value for key, value in line.items() if key != "units"}
            kept = processes.setdefault(json.dumps(facts, sort_keys=True), {**facts, "units": []})
            kept["units"] = list(dict.fromkeys([*kept["units"], *line["units"]]))
        if _lines(processes.values()) != _lines(read_records(path)):
            write_text(path, _lines(processes.values()))


def _parts(folder: Path) -> list[Path]:
    return sorted((folder / PARTS).glob("*.jsonl"))


def _all_records(folder: Path) -> list[dict[str, Any]]:
    parts = _parts(folder)
    run = _run_hash(folder) if parts else ""
    # Parts are read first: where another process puts them together at this moment, records.jsonl has them afterwards.
    inside = [record for path in parts for record in _part_records(path, run)]
    return read_records(folder / RECORDS) + inside


def _part_records(path: Path, run: str) -> list[dict[str, Any]]:
    header, *records = read_records(path) or [{"schema": PART_SCHEMA, "run": run}]
    if header.get("schema") != PART_SCHEMA:
        raise DataError(f"{path} does not begin with the line of a part ({PART_SCHEMA}); remove that file and run again")
    if header.get("run") != run:
        raise DataError(f"{path} is of another run ({header.get('run')}, this one is {run}); move it to its own folder")
    return records


def _lines(records: Iterable[Mapping[str, Any]]) -> str:
    """Return JSON lines as `kvtool.files.append_records` writes them."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _run_hash(folder: Path) -> str:
    return str(read_run(folder)["config_hash"])
