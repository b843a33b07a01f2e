"""Inference units on the workers of a cluster: what travels there, and what comes back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvtool.errors import ConfigError
from kvtool.executors.records import GIVEN_UP
from kvtool.executors.worker import ModelOrigin
from kvtool.infer.measure import Unit
from kvtool.infer.runner import PACKAGES, machine, provenance, warm_up
from kvtool.infer.units import run_sample
from kvtool.policies.base import Policy
from kvtool.policies.headfile import check_heads

if TYPE_CHECKING:
    from kvtool.models import LoadedModel


@dataclass(frozen=True, slots=True)
class InferTask:
    """The missing units of one sample; they share its prefill, and its full cache is their yardstick.

    Attributes
    ----------
    units : tuple of Unit
        In the order of a local run.
    baseline : dict or None
        The record of the full cache, once there is one.
    """

    units: tuple[Unit, ...]
    baseline: dict[str, Any] | None = None

    @classmethod
    def missing(cls, row: Sequence[Unit], found: Mapping[str, dict[str, Any]]) -> InferTask:
        """Return what is left of the units of one sample, the full cache first."""
        return cls(tuple(unit for unit in row if unit.key not in found), found.get(row[0].key))

    @property
    def name(self) -> str:
        return f"sample {self.units[0].encoded.sample.id}, {self.units[0].policy}"

    def after(self, record: dict[str, Any]) -> InferTask | None:
        """Return what is left once this record has come."""
        rest = tuple(unit for unit in self.units if unit.key != record["unit"])
        is_yardstick = self.baseline is None and any(unit.key == record["unit"] and unit.policy.lossless for unit in self.units)
        return dataclasses.replace(self, units=rest, baseline=record if is_yardstick else self.baseline) if rest else None

    def give_up(self, message: str) -> tuple[list[dict[str, Any]], InferTask | None]:
        """Return a record without results for the next unit, and what is left."""
        record = self.units[0].blank(GIVEN_UP, message)
        return [record], self.after(record)


@dataclass(frozen=True, slots=True)
class InferJob:
    """What all tasks of a run share.

    Attributes
    ----------
    origin : ModelOrigin
    policies : tuple of Policy
        Some read files, which every worker must find and find equal.
    heads : mapping
        Hashes of those files, from `kvtool.policies.headfile.check_heads`.
    """

    origin: ModelOrigin
    policies: tuple[Policy, ...]
    heads: Mapping[str, Any]

    @classmethod
    def of(cls, loaded: LoadedModel, policies: Sequence[Policy]) -> InferJob:
        """Describe the driver's run."""
        origin = ModelOrigin.of(loaded, ("kvtool", *PACKAGES))
        return cls(origin, tuple(policies), check_heads(policies, loaded.info))

    @property
    def label(self) -> str:
        return "infer"

    def check_versions(self) -> None:
        self.origin.check_versions()

    def start(self, device: str, device_map: str | None) -> tuple[LoadedModel, dict[str, Any]]:
        """Load the model, check the files that policies read, and run a few tokens.

        Raises
        ------
        ConfigError
            The model or a file is not the driver's.
        """
        loaded = self.origin.load(device, device_map)
        if (heads := check_heads(self.policies, loaded.info)) != self.heads:
            names = ", ".join(sorted(name for name in heads if heads[name] != self.heads.get(name)))
            raise ConfigError(f"a worker finds another content in {names}; give policies files that are the same on every node")
        warm_up(loaded)
        return loaded, machine(provenance(loaded))

    def run(self, loaded: LoadedModel, task: InferTask) -> Iterator[dict[str, Any]]:
        """Yield the records of the task's units."""
        return run_sample(loaded, task.units, task.baseline)
