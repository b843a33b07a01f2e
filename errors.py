"""Errors that a user can mend. Each message says what was asked, what was found and what to do.

The command line prints them as one line; any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KvtoolError(Exception):
    """Base of all errors that the user can mend; the command line exits with `exit_code`."""

    exit_code = 1


class ConfigError(KvtoolError):
    """The request itself is wrong (unknown name, value out of range, contradicting options)."""

    exit_code = 2


class BusyError(ConfigError):
    """Another living process does the same work in the same place."""


class DataError(KvtoolError):
    """A file is missing, damaged, incomplete or does not belong to what was asked."""


class NothingFitsError(DataError):
    """Every sample of a task is too long for the model."""


class MissingDependencyError(KvtoolError):
    """An optional package is needed; the message holds the command that installs it."""


class UnsupportedModelError(KvtoolError):
    """The model cannot be served (no attention hook, unknown layer kind, context too short)."""


class CapacityError(KvtoolError):
    """Out of memory or disk."""


def near_matches(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'a' or 'b'?"`` for the known names closest to `name`, or an empty string."""
    found = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(f) for f in found)}?" if found else ""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return True for out-of-memory errors of Python, CUDA and torch's CPU allocator (a plain RuntimeError)."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(s in str(error) for s in ("not enough memory", "can't allocate memory"))
