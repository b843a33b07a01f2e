"""What runs on a worker of a cluster, and how a machine is told from the driver's. No Ray in here."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtool.errors import ConfigError, KvtoolError

if TYPE_CHECKING:
    from kvtool.executors.ray_pool import Job
    from kvtool.models import LoadedModel


class Worker:
    """Holds a loaded model and does one task after another, one result per call."""

    def __init__(self, job: Job, place: tuple[str, str | None], folder: str) -> None:
        self._job, self._place, self._folder = job, place, folder
        self._loaded: Any = None
        self._results: Iterator[Any] = iter(())

    def ready(self) -> dict[str, Any]:
        """Check this machine and load the model; returns facts about both."""
        # Relative paths of models and head files mean what they mean for the driver, where both see the same folders.
        with contextlib.suppress(OSError):
            os.chdir(self._folder)
        self._job.check_versions()
        self._loaded, facts = self._job.start(*self._place)
        return {"host": platform.node(), "process": os.getpid(), **facts}

    def step(self, task: Any | None) -> Any:
        """Begin a task, or go on with the last one; returns its next result."""
        if task is not None:
            self._results = iter(())  # lets go of the last prompt before the next one comes
            self._results = iter(self._job.run(self._loaded, task))
        try:
            return next(self._results)
        except StopIteration:
            raise KvtoolError(f"{self._job.label}: a task ended without its last result; please report this") from None


@dataclass(frozen=True, slots=True)
class ModelOrigin:
    """How a worker gets the driver's model: never the weights, only where they are, and how to know them.

    Attributes
    ----------
    name : str
        Folder or hub id, as in `kvtool.models.load_model`.
    dtype : str
    fingerprint, tokenizer : str
        Hashes.
    versions : mapping of str to str
        Of the packages that decide results.
    """

    name: str
    dtype: str
    fingerprint: str
    tokenizer: str
    versions: Mapping[str, str]

    @classmethod
    def of(cls, loaded: LoadedModel, packages: tuple[str, ...]) -> ModelOrigin:
        """Describe the driver's model."""
        from kvtool.models import tokenizer_hash

        name = loaded.info.model_id
        if Path(name).is_dir():
            name = str(Path(name).resolve())
        dtype = str(next(loaded.model.parameters()).dtype).removeprefix("torch.")
        return cls(name, dtype, loaded.info.fingerprint, tokenizer_hash(loaded.tokenizer), public_versions(packages))

    def check_versions(self) -> None:
        """Refuse a machine with other packages.

        Raises
        ------
        ConfigError
            With what differs.
        """
        _refuse(self.versions, public_versions(tuple(self.versions)))

    def load(self, device: str, device_map: str | None) -> LoadedModel:
        """Load the model on this machine.

        Raises
        ------
        ConfigError
            It is not the driver's.
        DataError
            It is not here.
        """
        from kvtool.models import load_model, set_threads, tokenizer_hash

        loaded = load_model(self.name, device, self.dtype, device_map)
        set_threads(loaded)
        here = {"weights": loaded.info.fingerprint, "tokenizer": tokenizer_hash(loaded.tokenizer)}
        _refuse({"weights": self.fingerprint, "tokenizer": self.tokenizer}, here)
        return loaded


def public_versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Return versions without the builds behind ``+``, which differ between machines with and without a GPU."""
    from importlib.metadata import version

    from kvtool import __version__

    return {name: __version__ if name == "kvtool" else version(name).partition("+")[0] for name in packages}


def _refuse(wanted: Mapping[str, str], here: Mapping[str, str]) -> None:
    differing = [f"{name} {here[name]} there, {wanted[name]} here" for name in wanted if here[name] != wanted[name]]
    if differing:
        raise ConfigError(
            f"a worker on {platform.node()} differs from this machine ({'; '.join(differing)}): its results would too. Install "
            "the same versions and give a model that is the same on every node; what is finished is kept"
        )
