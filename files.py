"""Files that survive a kill: atomic writes, append-only records, run folders bound to one configuration."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from kvtool.errors import CapacityError, ConfigError, DataError

RUN_SCHEMA = "kvtool.run/1"


def config_hash(config: Mapping[str, Any]) -> str:
    """Return 16 hex digits that identify `config` (JSON with sorted keys)."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, a missing folder or missing rights into one clear line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise CapacityError(
                f"cannot write {path}: no space left on the device; what was written before is intact. "
                "Free some space and run the same command again: it continues"
            ) from error
        raise DataError(f"cannot write {path}: {error.strerror or error}; choose another output path") from error


def write_atomic(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file through a temporary one in the same folder: readers see the old file or the whole new one.

    Parameters
    ----------
    path : Path
        Target; its folder is made.
    write : callable
        Called with the open binary file.

    Raises
    ------
    CapacityError
        The disk is full; the old file is intact.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomic(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def append_records(path: Path, records: list[dict[str, Any]]) -> None:
    """Append JSON lines in one write and force them to disk.

    A kill in the middle leaves at most one torn last line, which `read_records` drops and the next append removes.
    """
    payload = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            end = _end_of_whole_lines(file)
            file.truncate(end)
            try:
                file.write(payload)
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines; a torn last line (an interrupted write) is left out, any other bad line is an error.

    Raises
    ------
    DataError
        A line that is not a JSON object, with its number.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error}); mend or remove that line") from error
        if not isinstance(value, dict):
            raise DataError(f"{path}, line {number}: found {type(value).__name__}, a JSON object is needed")
        records.append(value)
    return records


def _end_of_whole_lines(file: IO[bytes]) -> int:
    size = file.seek(0, os.SEEK_END)
    while size > 0:
        start = max(0, size - 65536)
        file.seek(start)
        block = file.read(size - start)
        cut = block.rfind(b"\n")
        if cut >= 0:
            return start + cut + 1
        size = start
    return 0


def open_run(folder: Path, config: Mapping[str, Any], provenance: Mapping[str, Any], *, clean: bool = True) -> bool:
    """Claim `folder` for a run with this configuration.

    Parameters
    ----------
    folder : Path
        Output folder; made if missing.
    config : mapping
        Everything that decides the result; JSON values.
    provenance : mapping
        Everything else worth keeping (versions, machine, start time).
    clean : bool
        Remove temporary files that a killed run left; not while other processes write into the folder.

    Returns
    -------
    bool
        True if an earlier run with the same configuration is being continued.

    Raises
    ------
    ConfigError
        The folder holds a run of another configuration; the message names the differing keys.
    """
    file = folder / "run.json"
    config = json.loads(json.dumps(config, default=str))
    if file.exists():
        old = read_run(folder)["config"]
        refuse_other(folder, old, config)
        for leftover in folder.glob(".*.tmp") if clean else ():  # of atomic writes that a kill cut short
            leftover.unlink(missing_ok=True)
        return True
    record = {"schema": RUN_SCHEMA, "config_hash": config_hash(config), "config": config, "provenance": dict(provenance)}
    write_json(file, record)
    return False


def refuse_other(place: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Refuse to continue in `place` with another configuration.

    Raises
    ------
    ConfigError
        They differ; the message names the differing keys.
    """
    new = json.loads(json.dumps(new, default=str))
    if old != new:
        names = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
        shown = "; ".join(f"{k}: {_short(old.get(k))} there, {_short(new.get(k))} now" for k in names)
        raise ConfigError(f"{place} holds a run of another configuration ({shown}); choose another --out or remove it")


def read_run(folder: Path) -> dict[str, Any]:
    """Read ``run.json`` of a run folder.

    Raises
    ------
    DataError
        Missing or damaged.
    """
    file = folder / "run.json"
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{folder} holds no run (run.json is missing); give the folder of a finished or started run") from error
    except ValueError as error:
        raise DataError(f"{file} is damaged ({error}); remove the folder and run again") from error
    if not isinstance(run, dict) or run.get("schema") != RUN_SCHEMA:
        raise DataError(f"{file} has schema {run.get('schema') if isinstance(run, dict) else None!r}, {RUN_SCHEMA!r} is needed")
    return run


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
