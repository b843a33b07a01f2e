"""Stages of a study: their parameters with good defaults. The YAML's keys are the fields; ``docs/studies.md`` has them as a table."""

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
    trials, draws, seed : int
    """

    space: str = ""
    trials: int = 200
    draws: int = 1000
    seed: int = 0


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


@dataclass(frozen=True, slots=True)
class InferStage:
    """Real runs; see `kvtool.infer.runner.InferConfig`.

    Attributes
    ----------
    take : str
        ``"grid"``: all policies at all retentions. ``"shortlist"``: what simulate, or refine where there is one, put on its shortlist.
    n : int or None
        Prompts; None: the study's.
    seed : int or None
        Of the prompts; None: the study's + 1000, so that they are fresh.
    repeats : int
        The whole is run so many times, for the spread of times.
    generate : bool
        False: the gold answer is fed only.
    answer_tokens : int
    max_new_tokens : int or None
    kernel : str
    temperature : float
        0: greedy.
    decode_seed : int
        Of the draws, with a temperature.
    """

    take: Literal["grid", "shortlist"] = "grid"
    n: int | None = None
    seed: int | None = None
    repeats: int = 1
    generate: bool = True
    answer_tokens: int = 64
    max_new_tokens: int | None = None
    kernel: str = "auto"
    temperature: float = 0.0
    decode_seed: int = 0

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ConfigError(f"infer: repeats={self.repeats} must be at least 1")


@dataclass(frozen=True, slots=True)
class CliffsStage:
    """Retentions between those of the grid where a curve falls, run for real on the same prompts; see `kvtool.analysis.cliffs`.

    Attributes
    ----------
    points : int
        Per fall and round, evenly on a logarithmic scale.
    rounds : int
        Each one looks again between the closest two.
    """

    points: int = 3
    rounds: int = 1

    def __post_init__(self) -> None:
        for name in ("points", "rounds"):
            if not 1 <= getattr(self, name) <= 16:
                raise ConfigError(f"cliffs: {name}={getattr(self, name)} must be 1 to 16")


@dataclass(frozen=True, slots=True)
class CompareStage:
    """Policies against a baseline and each other, paired on the same samples, with tests; see ``kvtool analyze compare``.

    Attributes
    ----------
    baseline : str
        Label, or text form.
    draws, seed : int
    """

    baseline: str = "full"
    draws: int = 9999
    seed: int = 0


@dataclass(frozen=True, slots=True)
class ConsistencyStage:
    """Whether answers are the full cache's, and a sheet for human review; see ``kvtool analyze consistency``.

    Attributes
    ----------
    right_from : float
        Score from which on an answer is right.
    review : int
        Most answers on the sheet.
    draws, seed : int
    """

    right_from: float = 0.5
    review: int = 300
    draws: int = 9999
    seed: int = 0


@dataclass(frozen=True, slots=True)
class PerplexityStage:
    """Texts, read through the cache of each policy; see `kvtool.infer.perplexity_plan.PerplexityConfig`.

    The segments are as long as the study's lengths.

    Attributes
    ----------
    texts : tuple of str
        See `kvtool.data.texts.load_documents`; each has its own row.
    segments, prompt, skip, batch : int
    stride : int or None
    positions, kernel : str
    within : float
        Nats per token above the full cache that count as no loss.
    """

    texts: tuple[str, ...] = ("walden",)
    segments: int = 8
    stride: int | None = None
    prompt: int = 1
    skip: int = 1
    positions: Literal["true", "cache"] = "true"
    batch: int = 4
    kernel: str = "auto"
    within: float = 0.05


@dataclass(frozen=True, slots=True)
class StressStage:
    """Time and memory over length, batch and endless decoding; see `kvtool.infer.stress_plan.StressConfig`.

    Attributes
    ----------
    length, batch : int
        Where the series begin.
    max_length, max_batch : int, "oom" or None
        Where doubling ends; ``oom``: when memory does. None: no such series.
    n_new, repeats, warm_ups, endless, window, seed : int
    kernel : str
    """

    length: int = 512
    max_length: int | Literal["oom"] | None = None
    batch: int = 1
    max_batch: int | Literal["oom"] | None = None
    n_new: int = 32
    repeats: int = 3
    warm_ups: int = 1
    endless: int = 0
    window: int = 1000
    kernel: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_length is None and self.max_batch is None and not self.endless:
            raise ConfigError("stress: nothing to measure; give max_length, max_batch or endless")


@dataclass(frozen=True, slots=True)
class NoCacheStage:
    """The row without a cache: every token costs a whole prompt; see `kvtool.infer.nocache`.

    Attributes
    ----------
    length : int
        Where the series begins.
    max_length : int
        Where doubling ends.
    n_new, repeats, seed : int
    """

    length: int = 512
    max_length: int = 512
    n_new: int = 4
    repeats: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("length", "n_new", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"no_cache: {name}={getattr(self, name)} must be at least 1")
        if self.max_length < self.length:
            raise ConfigError(f"no_cache: max_length={self.max_length} is below length={self.length}")


@dataclass(frozen=True, slots=True)
class AnalyzeStage:
    """Tables, figures and report of each cell that has real runs.

    Attributes
    ----------
    draws, seed : int
        Of the bootstrap.
    """

    draws: int = 1000
    seed: int = 0


Parameters = (
    CaptureStage
    | ClassifyStage
    | SimulateStage
    | RefineStage
    | SearchStage
    | CompensationStage
    | ImportanceStage
    | GapsStage
    | HivStage
    | InferStage
    | CliffsStage
    | CompareStage
    | ConsistencyStage
    | PerplexityStage
    | StressStage
    | NoCacheStage
    | AnalyzeStage
)

#: In the order in which they run.
KINDS: dict[str, type[Parameters]] = {
    "capture": CaptureStage,
    "classify": ClassifyStage,
    "simulate": SimulateStage,
    "refine": RefineStage,
    "gaps": GapsStage,
    "search": SearchStage,
    "compensation": CompensationStage,
    "importance": ImportanceStage,
    "hiv": HivStage,
    "infer": InferStage,
    "cliffs": CliffsStage,
    "compare": CompareStage,
    "consistency": ConsistencyStage,
    "perplexity": PerplexityStage,
    "stress": StressStage,
    "no_cache": NoCacheStage,
    "analyze": AnalyzeStage,
}


#: Stages that ask a capture further questions, those that look at a real run, and those that take policies.
ON_CAPTURE = ("gaps", "search", "compensation", "importance")
ON_INFER = ("cliffs", "compare", "consistency", "analyze")
WITH_POLICIES = ("simulate", "gaps", "compensation", "importance", "hiv", "infer", "perplexity", "stress")
