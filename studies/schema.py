"""What a study holds. The YAML's keys are the fields; ``docs/studies.md`` has them as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvtool.studies.stages import Parameters

Scale = Literal["small", "full"]
SCALES = ("small", "full")

#: Prompts that are run for real are others than those captured: their seed is the study's, and this on top.
FRESH = 1000


@dataclass(frozen=True, slots=True)
class Choice:
    """A policy or a model of a study.

    Attributes
    ----------
    label : str
        Name in tables.
    text : str
        Text form, without a heads file.
    group : str
        Heading that it stands under, or ``""``.
    lengths : tuple of int or None
        Of a model: prompt tokens in the place of the study's.
    """

    label: str
    text: str
    group: str = ""
    lengths: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Subset:
    """Which part of the study's grid a stage works on; None: all of it.

    Attributes
    ----------
    policies : tuple of str or None
        Labels, groups or text forms.
    retentions, tasks, compress_at : tuple of str or None
    lengths : tuple of int or None
    models : tuple of str or None
        Labels.
    """

    policies: tuple[str, ...] | None = None
    retentions: tuple[str, ...] | None = None
    tasks: tuple[str, ...] | None = None
    lengths: tuple[int, ...] | None = None
    compress_at: tuple[str, ...] | None = None
    models: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of a study.

    Attributes
    ----------
    kind : str
        Key of `kvtool.studies.stages.KINDS`.
    name : str
        The kind, or what ``name:`` says where a study has several of a kind.
    parameters : Parameters
    subset : Subset
    """

    kind: str
    name: str
    parameters: Parameters
    subset: Subset = Subset()


@dataclass(frozen=True, slots=True)
class Direction:
    """A finding of the study that a run can confirm: under one metric, one policy is better than another.

    Attributes
    ----------
    say : str
        The finding in words.
    metric : str
        Key of `kvtool.studies.results.METRICS`; it knows whether more or less is better.
    better, worse : str
        Labels.
    retention : str or None
        Both at this retention only; None: at each retention that both have.
    study : tuple of str or None
        The two labels of the reference, better and worse, that they stand for at this scale; None: their own.
    """

    say: str
    metric: str
    better: str
    worse: str
    retention: str | None = None
    study: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Study:
    """One study at one scale.

    Attributes
    ----------
    name, about : str
    scale : str
    models : tuple of Choice
        Labels and what `kvtool.models.load_model` takes.
    tasks : tuple of str
        See ``kvtool tasks``.
    lengths : tuple of int
        Prompt tokens, for tasks that build their prompts; perplexity reads so much text.
    compress_at : tuple of str
    retentions : tuple of str
        Budgets for policies without one.
    policies : tuple of Choice
    n, seed : int
        Prompts a task, and their seed.
    stages : tuple of Stage
    reference : str or None
        Path of the study's own numbers.
    directions : tuple of Direction
    """

    name: str
    about: str
    scale: str
    models: tuple[Choice, ...]
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    compress_at: tuple[str, ...]
    retentions: tuple[str, ...]
    policies: tuple[Choice, ...]
    n: int
    seed: int
    stages: tuple[Stage, ...]
    reference: str | None = None
    directions: tuple[Direction, ...] = ()

    def stage(self, kind: str) -> Stage | None:
        """Return the first stage of a kind."""
        return next((stage for stage in self.stages if stage.kind == kind), None)


def all_lengths(study: Study) -> tuple[int, ...]:
    """Return the study's lengths, and those that its models bring along."""
    return tuple(dict.fromkeys([*study.lengths, *(length for model in study.models for length in model.lengths or ())]))
