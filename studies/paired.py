"""Figures of each prompt, and the intervals that every table of a study has for them: one method for one question."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvtool.studies.noise import times_of_prompts

#: Metric -> field of a record.
SCORES = {"score": "score", "accuracy": "answer_accuracy"}
#: Metric -> the same as a difference from the full cache on the same prompts.
CHANGES = {"score": "score_change", "accuracy": "accuracy_change"}
Samples = dict[str, dict[str, float]]


@dataclass(frozen=True, slots=True)
class Value:
    """A figure, with its 95 % interval (or quartiles, of times) where there is one; in the unit that tables show."""

    mean: float
    low: float | None = None
    high: float | None = None


def by_sample(records: Sequence[Mapping[str, Any]]) -> dict[str, Samples]:
    """Return policy -> metric -> prompt -> value, of scores and of times in the unit that tables show."""
    from kvtool.studies.results import METRICS

    found: dict[str, Samples] = {
        policy: {
            metric: {sample: value * METRICS[metric].factor for sample, value in own.items()} for metric, own in times.items()
        }
        for policy, times in times_of_prompts(records).items()
    }
    for record in records:
        for key, name in SCORES.items():
            if record.get(name) is not None:
                found.setdefault(record["policy"], {}).setdefault(key, {})[record["sample"]] = float(record[name])
    return found


def documents_of(records: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return prompt -> document."""
    from kvtool.analysis.consistency import document

    return {record["sample"]: document(dict(record)) for record in records}


def by_segment(records: Iterable[Mapping[str, Any]]) -> dict[str, Samples]:
    """Return policy -> ``perplexity`` -> segment of a text -> nats per token; of policies that read all of it."""
    found: dict[str, Samples] = {}
    bad = set()
    for record in records:
        if record["status"] != "ok" or not record.get("n"):
            bad.add(record["policy"])
            continue
        own = found.setdefault(record["policy"], {}).setdefault("perplexity", {})
        own[record["sample"]] = float(record["nll"]) / int(record["n"])
    return {policy: samples for policy, samples in found.items() if policy not in bad}


def intervals(each: Mapping[str, Samples], policy: str, documents: Mapping[str, str]) -> dict[str, Value | None]:
    """Return a policy's scores and their differences from the full cache, with the intervals of every other table.

    Parameters
    ----------
    each : dict
        See `by_sample`.
    policy : str
    documents : dict of str to str
        Prompt -> document.
    """
    import numpy as np

    from kvtool.analysis.resampling import Documents, mean_interval

    found: dict[str, Value | None] = {}
    for key, name in CHANGES.items():
        own, full = (each.get(text, {}).get(key, {}) for text in (policy, "full"))
        if own:
            grouped = Documents.grouped([documents.get(sample, sample) for sample in own])
            mean = mean_interval(np.asarray(list(own.values()), dtype=np.float64), grouped)
            found[key] = _value(mean.mean, mean.low, mean.high)
        if own and full and policy != "full":
            found[name] = difference(own, full, documents)
    return found


def difference(
    first: Mapping[str, float], second: Mapping[str, float], documents: Mapping[str, str], share: bool = True
) -> Value | None:
    """Return the mean of first - second over the prompts that both have, with its interval; None without any.

    Parameters
    ----------
    first, second : dict of str to float
        By prompt.
    documents : dict of str to str
        Prompt -> document.
    share : bool
        See `kvtool.analysis.resampling.change_interval`.
    """
    import numpy as np

    from kvtool.analysis.resampling import Documents, change_interval

    if not (shared := [sample for sample in first if sample in second]):
        return None
    a, b = (np.asarray([values[sample] for sample in shared], dtype=np.float64) for values in (first, second))
    grouped = Documents.grouped([documents.get(sample, sample) for sample in shared])
    found = change_interval(a, b, grouped, share=share)
    return _value(found.mean, found.low, found.high)


def _value(mean: float, low: float, high: float) -> Value:
    return Value(mean) if low != low else Value(mean, low, high)
