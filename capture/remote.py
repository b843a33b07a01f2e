"""Samples to capture on the workers of a cluster: what travels there, and what comes back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvtool.capture.produce import made
from kvtool.executors.worker import ModelOrigin

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvtool.capture.runner import CaptureConfig
    from kvtool.data.tasks import Encoded
    from kvtool.models import LoadedModel


@dataclass(frozen=True, slots=True)
class CaptureTask:
    """One sample, with its number; its result is the number and the file of the sample as bytes."""

    index: int
    encoded: Encoded

    @property
    def name(self) -> str:
        return f"sample {self.encoded.sample.id}"

    def after(self, result: tuple[int, NDArray[np.uint8]]) -> None:
        """Return None: one result is all."""

    def give_up(self, message: str) -> tuple[list[str], None]:
        """Return why the sample cannot be captured."""
        return [f"{self.name}: {message}"], None


@dataclass(frozen=True, slots=True)
class CaptureJob:
    """What all samples of a capture share.

    Attributes
    ----------
    config : CaptureConfig
    origin : ModelOrigin
    run_hash : str
        Hash of the capture's identity.
    """

    config: CaptureConfig
    origin: ModelOrigin
    run_hash: str

    @classmethod
    def of(cls, config: CaptureConfig, loaded: LoadedModel, run: str) -> CaptureJob:
        """Describe the driver's capture."""
        return cls(config, ModelOrigin.of(loaded, ("kvtool", "torch", "transformers", "numpy", "h5py")), run)

    @property
    def label(self) -> str:
        return "capture"

    def check_versions(self) -> None:
        self.origin.check_versions()

    def start(self, device: str, device_map: str | None) -> tuple[LoadedModel, dict[str, Any]]:
        """Load the model."""
        return self.origin.load(device, device_map), {}

    def run(self, loaded: LoadedModel, task: CaptureTask) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Yield the sample as a file; an array travels without being copied."""
        image = made(self.config, loaded, task.encoded, task.index, self.run_hash)
        yield task.index, np.frombuffer(image, dtype=np.uint8)
