"""Stages of a study: their parameters with good defaults. The YAML's keys are the fields; ``docs/studies.md`` has them as a table."""

from __future__ import annotations

import dataclasses
from typing import Any

from kvtool.studies.stages_offline import (
    CaptureStage,
    ClassifyStage,
    CompensationStage,
    GapsStage,
    HivStage,
    ImportanceStage,
    RefineStage,
    SearchStage,
    SimulateStage,
)
from kvtool.studies.stages_real import (
    AnalyzeStage,
    CliffsStage,
    CompareStage,
    ConsistencyStage,
    InferStage,
    NoCacheStage,
    PerplexityStage,
    StressStage,
)

__all__ = [
    "KINDS",
    "ON_CAPTURE",
    "ON_INFER",
    "WITH_POLICIES",
    "AnalyzeStage",
    "CaptureStage",
    "ClassifyStage",
    "CliffsStage",
    "CompareStage",
    "CompensationStage",
    "ConsistencyStage",
    "GapsStage",
    "HivStage",
    "ImportanceStage",
    "InferStage",
    "NoCacheStage",
    "Parameters",
    "PerplexityStage",
    "RefineStage",
    "SearchStage",
    "SimulateStage",
    "StressStage",
    "settings_of",
]

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

#: Keys that came after results were kept: at its default such a key does not count, so that those results stand.
LATER: dict[type[Parameters], tuple[str, ...]] = {
    SearchStage: ("sampler", "by"),
    CompareStage: ("figures", "interval"),
    ConsistencyStage: ("baseline",),
    StressStage: ("graphs",),
}


def settings_of(parameters: Parameters) -> dict[str, Any]:
    """Return what decides a stage's result, as JSON values."""
    later = LATER.get(type(parameters), ())
    absent = {f.name for f in dataclasses.fields(parameters) if f.name in later and getattr(parameters, f.name) == f.default}
    return {key: value for key, value in dataclasses.asdict(parameters).items() if key not in absent}
