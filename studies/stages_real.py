"""Parameters of the stages that run compressed caches, and of those that look at such runs; see `kvtool.studies.stages`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvtool.errors import ConfigError, near_matches


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
    figures : tuple of str
        Of `kvtool.analysis.compare.FIGURES`; empty: task score and answer accuracy.
    interval : str
        Kind of bootstrap interval.
    draws, seed : int
    """

    baseline: str = "full"
    figures: tuple[str, ...] = ()
    interval: Literal["expanded", "bca", "percentile"] = "expanded"
    draws: int = 9999
    seed: int = 0

    def __post_init__(self) -> None:
        from kvtool.analysis.compare import FIGURES

        if odd := [name for name in self.figures if name not in FIGURES]:
            raise ConfigError(f"compare: unknown figure {odd[0]!r}.{near_matches(odd[0], FIGURES)} Known: {', '.join(FIGURES)}")


@dataclass(frozen=True, slots=True)
class ConsistencyStage:
    """Whether answers are the full cache's, and a sheet for human review; see ``kvtool analyze consistency``.

    Attributes
    ----------
    baseline : str
        Whose answers the others are compared with: label, or text form.
    right_from : float
        Score from which on an answer is right.
    review : int
        Most answers on the sheet.
    draws, seed : int
    """

    baseline: str = "full"
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
    graphs : bool
        Time decode steps with fixed shapes, too: CUDA graphs, where there is CUDA.
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
    graphs: bool = False

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
