"""Records of a stress test -> one row per point, with medians and spread, what was possible, and the noise floor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvtool.textgrid import grid

FULL = "full"


@dataclass(frozen=True, slots=True)
class PointRow:
    """One point: a policy at a length and batch, all repeats.

    Attributes
    ----------
    series, policy : str
    again : bool
        The second measurement of the full cache.
    length, batch : int
    status : str
        ``ok``, ``oom``, ``would not fit``, ``too long`` or ``impossible``; the first that is not ``ok``.
    message : str or None
    n : int
        Runs with figures.
    retention : float or None
        Entries per KV head / prompt length.
    ttft_s, tpot_s : tuple of three float or None
        Quartile, median, quartile: of the runs; of all timed decode steps of all runs.
    compress_s, attention_s, tokens_per_s, limit_share : float or None
        Medians of the runs.
    kv_bytes_prompt_end, kv_bytes_generation_end, prefill_peak_bytes, decode_peak_bytes, estimate_bytes : int or None
        Largest of the runs; peaks above the model.
    speedup, noise : float or None
        Full cache's TPOT / this one's, median of the ratios of each repeat; the same of the full cache measured twice, off 1.
    possible_speedup : float or None
        What reading fewer entries allows at best: (weights + full cache) / (weights + this one's), in bytes read per step.
    fixed_tpot_s, fixed_limit_share : float or None
        Of the steps with fixed shapes.
    fixed_why_not : str or None
        Why there are none, or no CUDA graphs.
    beyond_context, degenerate : bool
    kernel : str or None
    """

    series: str
    policy: str
    again: bool
    length: int
    batch: int
    status: str
    message: str | None
    n: int
    retention: float | None
    ttft_s: tuple[float, float, float] | None
    tpot_s: tuple[float, float, float] | None
    compress_s: float | None
    attention_s: float | None
    tokens_per_s: float | None
    limit_share: float | None
    kv_bytes_prompt_end: int | None
    kv_bytes_generation_end: int | None
    prefill_peak_bytes: int | None
    decode_peak_bytes: int | None
    estimate_bytes: int | None
    speedup: float | None
    possible_speedup: float | None
    noise: float | None
    fixed_tpot_s: float | None
    fixed_limit_share: float | None
    fixed_why_not: str | None
    beyond_context: bool
    degenerate: bool
    kernel: str | None


@dataclass(frozen=True, slots=True)
class EndlessRow:
    """Endless decoding under one policy.

    Attributes
    ----------
    policy, source : str
        ``own`` tokens or a ``text``.
    status : str
    message : str or None
    tokens : int
    entries_high, kv_bytes_low, kv_bytes_high : int or None
        Most entries of a head; allocated bytes over all steps.
    resident_growth_bytes : int or None
        Resident set at the end minus at the end of the first window.
    tpot_first_s, tpot_last_s : float or None
        Of the first and the last window.
    perplexity : float or None
        Of the text.
    beyond_context : bool
    """

    policy: str
    source: str
    status: str
    message: str | None
    tokens: int
    entries_high: int | None
    kv_bytes_low: int | None
    kv_bytes_high: int | None
    resident_growth_bytes: int | None
    tpot_first_s: float | None
    tpot_last_s: float | None
    perplexity: float | None
    beyond_context: bool


@dataclass(frozen=True, slots=True)
class StressSummary:
    """What a stress test left.

    Attributes
    ----------
    folder : Path
    rows : tuple of PointRow
    endless : tuple of EndlessRow
    notes : tuple of str
    seconds : float
        Wall time of this call.
    """

    folder: Path
    rows: tuple[PointRow, ...]
    endless: tuple[EndlessRow, ...]
    notes: tuple[str, ...]
    seconds: float

    def text(self) -> str:
        """Return the tables that the command prints."""
        from kvtool.infer.stress_report import tables

        return "\n\n".join([*tables(self, grid), "\n".join([*self.notes, str(self.folder)])])


def points(records: Sequence[dict[str, Any]]) -> list[PointRow]:
    """Aggregate runs to points, in the order of first appearance by length and batch, the full cache first."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    order: dict[str, int] = {}
    for record in records:
        if record["series"] != "endless":
            order.setdefault(record["policy"], 0 if record["policy"] == FULL else len(order) + 1)
            key = (record["series"] == "batch", record["length"], record["batch"], order[record["policy"]], record["again"])
            groups.setdefault(key, []).append(record)
    full = {key[:3]: group for key, group in groups.items() if group[0]["policy"] == FULL and not key[4]}
    again = {key[:3]: group for key, group in groups.items() if key[4]}
    rows = []
    for key in sorted(groups):
        floor = _speedup(again.get(key[:3], []), full.get(key[:3], []))
        rows.append(_point(groups[key], full.get(key[:3], []), None if floor is None else abs(floor - 1)))
    return rows


def _point(group: Sequence[dict[str, Any]], full: Sequence[dict[str, Any]], noise: float | None) -> PointRow:
    first, done = group[0], [r for r in group if r["status"] == "ok"]
    bad = next((r for r in group if r["status"] != "ok"), None)
    is_full = first["policy"] == FULL and not first["again"]
    return PointRow(
        series=first["series"],
        policy=first["policy"],
        again=first["again"],
        length=first["length"],
        batch=first["batch"],
        status="ok" if bad is None else bad["status"],
        message=None if bad is None else bad["message"],
        n=len(done),
        retention=_median(r["retention"] for r in done),
        ttft_s=_quartiles([r["ttft_s"] for r in done]),
        tpot_s=_quartiles([s for r in done for s in r["step_s"]]),
        compress_s=_median(r["compress_s"] for r in done),
        attention_s=_median(r["attention_s"] for r in done),
        tokens_per_s=_median(r["tokens_per_s"] for r in done),
        limit_share=_median(r["limit_share"] for r in done),
        kv_bytes_prompt_end=_largest(r["kv_bytes_prompt_end"] for r in done),
        kv_bytes_generation_end=_largest(r["kv_bytes_generation_end"] for r in done),
        prefill_peak_bytes=_largest(r["prefill_peak_bytes"] for r in done),
        decode_peak_bytes=_largest(r["decode_peak_bytes"] for r in done),
        estimate_bytes=_largest(r.get("estimate_bytes") for r in group),
        speedup=None if is_full else _speedup(done, full),
        possible_speedup=None if is_full else _possible(done, full),
        noise=noise,
        fixed_tpot_s=_median(s for r in done for s in r.get("fixed_step_s") or ()),
        fixed_limit_share=_median(r.get("fixed_limit_share") for r in done),
        fixed_why_not=next((r["fixed_why_not"] for r in done if r.get("fixed_why_not")), None),
        beyond_context=any(r["beyond_context"] for r in done),
        degenerate=any(r["degenerate"] for r in group),
        kernel=done[0]["kernel"] if done else None,
    )


def _speedup(group: Sequence[dict[str, Any]], full: Sequence[dict[str, Any]]) -> float | None:
    """Median over the repeats of full cache's median step / this one's."""
    base = {r["repeat"]: r["tpot_s"] for r in full if r["status"] == "ok"}
    return _median(base[r["repeat"]] / r["tpot_s"] for r in group if r["status"] == "ok" and r["repeat"] in base)


def _possible(group: Sequence[dict[str, Any]], full: Sequence[dict[str, Any]]) -> float | None:
    mine, base = (_median(r["kv_bytes_read"] for r in runs if r["status"] == "ok") for runs in (group, full))
    if mine is None or base is None:
        return None
    weights = float(group[0]["weight_bytes_read"])
    return (weights + base) / (weights + mine)


def endless_rows(records: Sequence[dict[str, Any]]) -> list[EndlessRow]:
    """Aggregate the windows of endless decoding."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        if record["series"] == "endless":
            groups.setdefault((record["policy"], record["source"]), []).append(record)
    rows = []
    for (policy, source), group in groups.items():
        done = sorted((r for r in group if r["status"] == "ok"), key=lambda r: r["start"])
        bad = next((r for r in group if r["status"] != "ok"), None)
        sizes = [r["stop"] - r["start"] for r in done]
        losses = [r["nll"] * n for r, n in zip(done, sizes, strict=True) if r["nll"] is not None]
        held = [r["resident_bytes"] for r in done]
        rows.append(
            EndlessRow(
                policy=policy,
                source=source,
                status="ok" if bad is None else bad["status"],
                message=None if bad is None else bad["message"],
                tokens=done[-1]["stop"] if done else 0,
                entries_high=_largest(r["entries_high"] for r in done),
                kv_bytes_low=min((r["kv_bytes_low"] for r in done), default=None),
                kv_bytes_high=_largest(r["kv_bytes_high"] for r in done),
                resident_growth_bytes=held[-1] - held[0] if held and None not in held else None,
                tpot_first_s=done[0]["tpot_s"] if done else None,
                tpot_last_s=done[-1]["tpot_s"] if done else None,
                perplexity=_perplexity(sum(losses) / sum(sizes)) if losses else None,
                beyond_context=any(r["beyond_context"] for r in done),
            )
        )
    return rows


def _perplexity(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf


def _quartiles(values: Sequence[float]) -> tuple[float, float, float] | None:
    if not values:
        return None
    low, middle, high = np.quantile(np.asarray(values), [0.25, 0.5, 0.75])
    return float(low), float(middle), float(high)


def _median(values: Iterable[float | None]) -> float | None:
    data = [v for v in values if v is not None]
    return float(np.median(data)) if data else None


def _largest(values: Iterable[int | None]) -> int | None:
    return max((v for v in values if v is not None), default=None)
