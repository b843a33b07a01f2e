"""Parameters of the stages that work on captures; see `kvtool.studies.stages`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvtool.errors import ConfigError


@dataclass(frozen=True, slots=True)
class CaptureStage:
    """Statistics of real prompts; see `kvtool.capture.runner.CaptureConfig`.

    Attributes
    ----------
    n : int or None
        Prompts; None: the study's.
    windows : tuple of int
    statistics : tuple of str or None
    answer_tokens, permute : int
    """

    n: int | None = None
    windows: tuple[int, ...] = (8, 16, 32, 64)
    statistics: tuple[str, ...] | None = None
    answer_tokens: int = 64
    permute: int = 8

    def __post_init__(self) -> None:
        from kvtool.policies.statistics import parse_statistic

        for name in self.statistics or ():
            parse_statistic(name)


@dataclass(frozen=True, slots=True)
class ClassifyStage:
    """Kinds and importance of heads, for policies that share by them.

    Attributes
    ----------
    task : str or None
        Prompts that the heads are judged on; None: those of the cell. One task and length for all cells is captured once.
    length, n : int or None
        Of those prompts; None: of the cell, of the capture.
    importance : str
        See `kvtool.classify.runner.run_classify`.
    seed : int
    """

    task: str | None = None
    length: int | None = None
    n: int | None = None
    importance: Literal["auto", "reasoning", "gain"] = "auto"
    seed: int = 0


@dataclass(frozen=True, slots=True)
class SimulateStage:
    """Offline ranking; see `kvtool.simulate.runner.SimulateConfig`.

    Attributes
    ----------
    draws, seed : int
    shortlist_cap : int or None
    """

    draws: int = 1000
    seed: int = 0
    shortlist_cap: int | None = None


@dataclass(frozen=True, slots=True)
class RefineStage:
    """Masked teacher-forced forwards of the best configurations.

    Attributes
    ----------
    top : int
        Configurations.
    """

    top: int = 12

    def __post_init__(self) -> None:
        if self.top < 1:
            raise ConfigError(f"refine: top={self.top} must be at least 1")


@dataclass(frozen=True, slots=True)
class SearchStage:
    """A method's settings, searched on half of the captured prompts, judged on the others; see `kvtool.simulate.search.SearchConfig`.

    Attributes
    ----------
    space : str
        Empty: the automatic choice of SnapKV's window, kernel, pooling and compensation block.
    sampler : str
        Other than ``"auto"``: with a `space` only.
    by : str
        What is minimised.
    trials, draws, seed : int
    """

    space: str = ""
    sampler: Literal["auto", "grid", "random", "tpe", "nsga2"] = "auto"
    by: Literal["risk", "harm"] = "risk"
    trials: int = 200
    draws: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.space and self.sampler not in ("auto", "grid"):
            raise ConfigError(f"search: sampler={self.sampler} needs a space; without one every setting is tried")


@dataclass(frozen=True, slots=True)
class CompensationStage:
    """Why representatives of evicted blocks lose against evicting alone; see `kvtool.simulate.attribution_runner`.

    Attributes
    ----------
    blocks : tuple of str
    measure : str
    refine : bool
        Also run every counterfactual for real.
    draws, seed : int
    """

    blocks: tuple[str, ...] = ("16", "32", "64", "full")
    measure: Literal["margin", "harm"] = "margin"
    refine: bool = False
    draws: int = 1000
    seed: int = 0


@dataclass(frozen=True, slots=True)
class ImportanceStage:
    """Which heads matter, before and after compression (HIV); see ``kvtool analyze importance``.

    Attributes
    ----------
    ablate : bool
        Also cut every head in turn.
    sink, window : int
        What a cut head keeps at the prompt's two ends.
    draws, seed : int
    """

    ablate: bool = False
    sink: int = 4
    window: int = 32
    draws: int = 1000
    seed: int = 0


@dataclass(frozen=True, slots=True)
class GapsStage:
    """How far each policy is from the oracle, and why; see `kvtool.simulate.gap_runner`.

    Attributes
    ----------
    shapes : bool
        Also the best budgets of every shape.
    draws, seed : int
    """

    shapes: bool = False
    draws: int = 1000
    seed: int = 0


@dataclass(frozen=True, slots=True)
class HivStage:
    """Head importance before and after compression, and whether the tasks of one length favour other heads; see ``kvtool analyze hiv``.

    Attributes
    ----------
    ablate : bool
        Also cut every KV head under every policy.
    sink, window : int
        Entries at the prompt's two ends, attention to which does not count.
    draws, seed : int
    """

    ablate: bool = False
    sink: int = 4
    window: int = 32
    draws: int = 1000
    seed: int = 0
