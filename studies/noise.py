"""Times of a study: each run's own, and how far the same configuration, measured again, is from itself (A/A)."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

#: Metrics that another process on the machine changes -> field of a record; None: made of others.
TIMES: dict[str, str | None] = {
    "ttft_s": "ttft_s",
    "tpot_ms": "tpot_s",
    "tokens_per_s": "tokens_per_s",
    "attention_ms": "attention_s",
    "compress_s": "compress_s",
    "total_s": None,
    "speedup": None,
}
#: What the others are made of.
MADE_OF = {"total_s": ("ttft_s", "tpot_ms"), "speedup": ("tpot_ms",)}
Record = Mapping[str, Any]


def floors_of_stress(records: Sequence[Record]) -> dict[tuple[Any, ...], dict[str, float]]:
    """Return what a difference of times at each point of a stress test must exceed.

    That is the relative distance of the full cache from itself, measured again at the same length and batch; at least the
    median over all points, as one distance may be small by luck.

    Parameters
    ----------
    records : sequence of dict
        As ``kvtool stress`` writes them.

    Returns
    -------
    dict
        (is it of the batches, length, batch) -> metric -> distance; nothing for metrics that were not measured twice.
    """
    from kvtool.analysis.study_warnings import full_twice

    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        if record.get("series") != "endless" and record.get("policy") == "full":
            groups.setdefault((record["series"] == "batch", record["length"], record["batch"]), []).append(record)
    found: dict[tuple[Any, ...], dict[str, float]] = {key: {} for key in groups}
    for metric, name in TIMES.items():
        own = {} if name is None else {key: full_twice(group, name) for key, group in groups.items()}
        if known := [distance for distances in own.values() for distance in distances]:
            typical = statistics.median(known)
            for key in groups:
                found[key][metric] = max(typical, *own[key]) if own[key] else max(known)
    return {key: with_made(floors) for key, floors in found.items()}


def floors_of_runs(runs: Sequence[Mapping[str, Mapping[str, float | None]]]) -> dict[str, float]:
    """Return, per metric, the largest relative distance of any policy's median from that of another run of the same configuration.

    Parameters
    ----------
    runs : sequence of dict
        Of each run: policy -> metric -> median over its prompts.
    """
    found: dict[str, float] = {}
    for policy, first in (runs[0] if len(runs) > 1 else {}).items():
        for metric in first:
            values = [value for run in runs if (value := run.get(policy, {}).get(metric))]
            if len(values) > 1:
                found[metric] = max(found.get(metric, 0.0), max(values) / min(values) - 1)
    return with_made(found)


def with_made(floors: Mapping[str, float]) -> dict[str, float]:
    """Add the floors of metrics that are made of others: the largest of theirs."""
    more = {
        metric: max(floors[part] for part in parts)
        for metric, parts in MADE_OF.items()
        if all(part in floors for part in parts)
    }
    return {**more, **floors}


def times_of_points(records: Iterable[Record]) -> dict[tuple[Any, ...], dict[str, dict[str, float]]]:
    """Return the times of each point of a stress test by repeat, in the records' units.

    Returns
    -------
    dict
        (is it of the batches, policy, length, batch) -> metric -> repeat -> time.
    """
    found: dict[tuple[Any, ...], dict[str, dict[str, float]]] = {}
    for record in records:
        if record.get("series") == "endless" or record.get("again") or record.get("status") != "ok":
            continue
        key = (record["series"] == "batch", record["policy"], record["length"], record["batch"])
        _add(found.setdefault(key, {}), record, str(record["repeat"]))
    return found


def times_of_prompts(records: Iterable[Record]) -> dict[str, dict[str, dict[str, float]]]:
    """Return policy -> metric -> prompt -> time of a real run."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for record in records:
        _add(found.setdefault(record["policy"], {}), record, record["sample"])
    return found


def _add(times: dict[str, dict[str, float]], record: Record, name: str) -> None:
    for metric, key in TIMES.items():
        if key is not None and record.get(key):
            times.setdefault(metric, {})[name] = float(record[key])
