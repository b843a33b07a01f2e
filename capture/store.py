"""Write captures so that a kill at any moment loses at most the sample in progress.

HDF5 is not crash-safe: a process that dies with an open file can leave all of it unreadable, and libhdf5 itself can crash
when the disk is full. So no sample is ever written into a file that holds another one: each becomes a small HDF5 image in
memory, written to ``<out>.parts/00007.h5`` by plain atomic writes, and the parts are put together into the one final file,
atomically, at the end. The price is the disk space of the samples twice while they are put together.

Shapes: L layers.
"""

from __future__ import annotations

import io
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from kvtool.capture.reader import SCHEMA
from kvtool.errors import DataError
from kvtool.files import disk_errors, write_atomic

_GROUP = "sample"


@dataclass(frozen=True, slots=True)
class StoredArray:
    """An array with its attributes; `by_layer` makes one chunk per layer."""

    array: NDArray[Any]
    by_layer: bool = False
    attrs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StoredSample:
    """One sample as it goes to disk: attributes of its group, data sets by path, attributes of sub-groups by path."""

    attrs: Mapping[str, Any]
    arrays: Mapping[str, StoredArray]
    group_attrs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def to_half(layers: list[NDArray[np.float32]], what: str) -> StoredArray:
    """Store arrays of all layers as float16 with one power-of-two scale per layer: value = stored * scale.

    The largest magnitude of a layer lands in 2**14 ... 2**15: nothing overflows, all entries down to 2**-29 of it keep the 11
    bits of float16, and smaller ones lose at most 2**-39 of it each (with plain float16, an even attention to 20,000 tokens
    would already fall out of the precise range).

    Parameters
    ----------
    layers : list of float32 array
        L arrays of one shape.
    what : str
        For messages.

    Raises
    ------
    DataError
        A value is not finite.
    """
    half = np.empty((len(layers), *layers[0].shape), dtype=np.float16)
    scales = np.ones(len(layers), dtype=np.float32)
    for layer, array in enumerate(layers):
        peak = float(np.abs(array).max(initial=0.0))
        if not np.isfinite(peak):
            raise DataError(f"{what} of layer {layer} is not finite; load the model with --dtype float32 or bfloat16")
        if peak > 0:
            # Below 2**-126 + 15 the scale itself would leave float32; such a layer is zero for every purpose.
            scales[layer] = 2.0 ** max(int(np.ceil(np.log2(peak))) - 15, -126)
        half[layer] = array / scales[layer]
    return StoredArray(half, True, {"scale": scales})


def part_image(sample: StoredSample, run: str) -> memoryview:
    """Return the file of one sample as bytes; the mark ``complete`` is written last.

    Parameters
    ----------
    sample : StoredSample
    run : str
        Hash of the capture's identity: parts that were copied together must be of one capture.
    """
    image = io.BytesIO()
    with h5py.File(image, "w", libver="v110") as file:
        file.attrs["run"] = run
        group = file.create_group(_GROUP)
        _write_group(group, sample)
        file.flush()
        group.attrs["complete"] = True
    return image.getbuffer()


def write_part(path: Path, image: Any) -> None:
    """Write one sample to its own file, atomically.

    Parameters
    ----------
    path : Path
    image : buffer
        Of `part_image`, made here or on another machine.

    Raises
    ------
    CapacityError
        The disk is full; earlier samples are intact.
    """
    write_atomic(path, lambda target: target.write(image))


def _write_group(group: Any, sample: StoredSample) -> None:
    for key, value in sample.attrs.items():
        group.attrs[key] = value
    for key, stored in sample.arrays.items():
        _write_array(group, key, stored)
    for key, attrs in sample.group_attrs.items():
        group[key].attrs.update(attrs)


def _write_array(group: Any, key: str, stored: StoredArray) -> None:
    array = stored.array
    # A checksum per chunk: damage in the middle of a file is seen instead of believed. Empty arrays cannot be chunked.
    chunks = (1, *array.shape[1:]) if stored.by_layer else array.shape
    layout = {"chunks": chunks, "fletcher32": True} if array.size else {}
    dataset = group.create_dataset(key, data=array, track_times=False, **layout)
    for name, value in stored.attrs.items():
        dataset.attrs[name] = value


def part_run(path: Path) -> str | None:
    """Return which capture a part is of, or None if it cannot be opened or lacks the mark ``complete``."""
    try:
        with h5py.File(path, "r") as file:
            return str(file.attrs["run"]) if bool(file[_GROUP].attrs.get("complete", False)) else None
    except (OSError, KeyError, RuntimeError):
        return None


def clean_parts(folder: Path, run: str, *, temporary: bool = True) -> None:
    """Remove parts that a killed run or copy left half-written and, unless others are at work, temporary files.

    Raises
    ------
    DataError
        A part is of another capture; nothing is removed then.
    """
    found = {path: part_run(path) for path in folder.glob("[0-9]*.h5")}
    if foreign := [path for path, its_run in found.items() if its_run not in (None, run)]:
        raise DataError(f"captured sample {foreign[0]} is of another capture; move it to that capture's folder")
    for path, its_run in found.items():
        if its_run is None:
            path.unlink(missing_ok=True)
    for path in folder.glob(".*.tmp") if temporary else ():
        path.unlink(missing_ok=True)


def assemble(parts: list[Path], out: Path, attrs: Mapping[str, Any], shared: Mapping[str, StoredSample] | None = None) -> None:
    """Put the parts together into one file, atomically.

    Parameters
    ----------
    parts : list of Path
        In the order of their numbers; each complete.
    out : Path
        Final file; a temporary one lies beside the parts.
    attrs : mapping
        Root attributes; the schema is added.
    shared : mapping, optional
        Groups beside the samples: what is of the model and not of a prompt.

    Raises
    ------
    CapacityError
        The disk is full; parts are intact.
    DataError
        A part is damaged.
    """
    # Two shards may both be the last where the file system has no locks: the same content under two names, then one rename.
    temporary = parts[0].parent / f".capture.{secrets.token_hex(4)}.tmp"
    with disk_errors(out):
        try:
            # All space is claimed before HDF5 starts: libhdf5 may crash the process when a write fails.
            claim = sum(part.stat().st_size + (1 << 16) for part in parts) + (1 << 20)
            claim += sum(stored.array.nbytes for group in (shared or {}).values() for stored in group.arrays.values())
            with temporary.open("wb+", buffering=0) as target:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(target.fileno(), 0, claim)
                _copy_parts(parts, _ClaimedFile(target), attrs, shared or {})
                os.fsync(target.fileno())
            os.replace(temporary, out)
            _sync_folder(out.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


class _ClaimedFile(io.RawIOBase):
    """A file whose space is claimed already but that looks empty at first, as HDF5 wants a new file to be."""

    def __init__(self, file: io.FileIO) -> None:
        super().__init__()
        self._file, self._end = file, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._file.tell(), os.SEEK_END: self._end}[whence]
        return self._file.seek(start + offset)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        return self._file.readinto(view[: max(0, self._end - self._file.tell())]) or 0

    def write(self, data: Any) -> int:
        done, view = 0, memoryview(data).cast("B")
        while done < len(view):
            done += self._file.write(view[done:])
        self._end = max(self._end, self._file.tell())
        return done

    def truncate(self, size: int | None = None) -> int:
        self._end = self._file.truncate(size)
        return self._end


def _copy_parts(parts: list[Path], target: Any, attrs: Mapping[str, Any], shared: Mapping[str, StoredSample]) -> None:
    with h5py.File(target, "w", libver="v110") as file:
        file.attrs["schema"] = SCHEMA
        for key, value in attrs.items():
            file.attrs[key] = value
        for name, stored in shared.items():
            _write_group(file.create_group(name), stored)
        samples = file.create_group("samples")
        for index, part in enumerate(parts):
            try:
                with h5py.File(part, "r") as source:
                    source.copy(source[_GROUP], samples, name=f"{index:05d}")
            except (OSError, KeyError, RuntimeError) as error:
                what = " ".join(str(error).split())[:160]
                raise DataError(
                    f"captured sample {part} is damaged ({what}); remove that file and run the same command"
                ) from error


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_parts(folder: Path) -> None:
    """Remove the parts after the final file is in place."""
    shutil.rmtree(folder, ignore_errors=True)


def to_json(value: Any) -> str:
    """Return JSON with sorted keys: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
