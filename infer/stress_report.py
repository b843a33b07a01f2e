"""What a stress test says: tables as text, Markdown and CSV, notes, and the files beside the records."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtool.files import write_json, write_text
from kvtool.infer.stress_plots import draw_endless, draw_series
from kvtool.infer.stress_table import EndlessRow, PointRow, StressSummary, endless_rows, points
from kvtool.textgrid import Lines, figure, save_tables

if TYPE_CHECKING:
    from kvtool.models import ModelInfo


def write_summary(folder: Path, records: Sequence[dict[str, Any]], info: ModelInfo, seconds: float) -> StressSummary:
    """Aggregate the records, and write tables, their data and figures beside them."""
    rows, lasting = tuple(points(records)), tuple(endless_rows(records))
    summary = StressSummary(folder, rows, lasting, tuple(_notes(records, rows, info)), seconds)
    write_json(folder / "stress.json", dataclasses.asdict(summary) | {"folder": str(folder), "model": dataclasses.asdict(info)})
    data = points_csv(rows) if rows else _table([dataclasses.asdict(row) for row in lasting]) if lasting else None
    save_tables(folder, "stress", f"Stress test of {info.model_id}", headed_tables(summary), data, summary.notes)
    for series in ("length", "batch"):
        mine = [row for row in rows if row.series == series]
        if mine:
            write_text(folder / f"{series}.csv", points_csv(mine))
            draw_series(folder, series, mine)
    windows = [record for record in records if record["series"] == "endless" and record["status"] == "ok"]
    if windows:
        keep = (
            "policy",
            "source",
            "start",
            "stop",
            "tpot_s",
            "kv_bytes_low",
            "kv_bytes_high",
            "entries_high",
            "resident_bytes",
            "nll",
        )
        write_text(folder / "endless.csv", _table([{key: record.get(key) for key in keep} for record in windows]))
        draw_endless(folder, windows)
    return summary


_HEADER = (
    *("policy", "length", "batch", "kept", "TTFT s", "compress s", "TPOT ms", "quartiles", "attention ms", "tokens/s"),
    *("speed-up", "possible", "of limit", "KV MB", "at end", "prefill peak MB", "decode peak MB"),
)
_FIXED_HEADER = ("TPOT ms fixed", "of limit, fixed")
_ENDLESS_HEADER = (
    *(
        "policy",
        "tokens from",
        "tokens",
        "entries",
        "KV MB",
        "steady",
        "RSS growth MB",
        "TPOT ms first",
        "last",
        "perplexity",
        "note",
    ),
)


def _by_series(rows: Sequence[PointRow]) -> list[list[PointRow]]:
    """Lengths and batches apart, where there are any."""
    found = [[row for row in rows if row.series == series] for series in ("length", "batch")]
    return [part for part in found if part]


def _cells(row: PointRow, fixed: bool) -> list[str]:
    def mega(value: int | None) -> str:
        return "-" if value is None else f"{value / 1e6:.1f}"

    def milli(value: float | None) -> str:
        return "-" if value is None else f"{1000 * value:.2f}"

    def share(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.0f}%"

    return [
        row.policy + (" (again)" if row.again else ""),
        str(row.length),
        str(row.batch),
        "-" if row.retention is None else f"{100 * row.retention:.1f}%",
        figure(row.ttft_s[1] if row.ttft_s else None),
        figure(row.compress_s),
        milli(row.tpot_s[1] if row.tpot_s else None),
        f"{1000 * row.tpot_s[0]:.2f}-{1000 * row.tpot_s[2]:.2f}" if row.tpot_s else "-",
        milli(row.attention_s),
        "-" if row.tokens_per_s is None else f"{row.tokens_per_s:.1f}",
        figure(row.speedup, 2),
        figure(row.possible_speedup, 2),
        share(row.limit_share),
        mega(row.kv_bytes_prompt_end),
        mega(row.kv_bytes_generation_end),
        mega(row.prefill_peak_bytes),
        mega(row.decode_peak_bytes),
        *((milli(row.fixed_tpot_s), share(row.fixed_limit_share)) if fixed else ()),
        point_note(row),
    ]


def point_note(row: PointRow) -> str:
    """Return what a reader of a point must know: status, degenerate, beyond the context, and what its speed-up is worth."""
    notes = [] if row.status == "ok" else [row.status]
    notes += ["degenerate"] if row.degenerate else []
    notes += ["beyond the model's context"] if row.beyond_context else []
    if not row.again and row.speedup is not None and row.noise is not None and abs(row.speedup - 1) <= row.noise:
        notes.append("speed-up within noise")
    elif (
        row.speedup is not None
        and row.possible_speedup is not None
        and row.speedup > row.possible_speedup * (1 + (row.noise or 0))
    ):
        notes.append("above possible: not bound by memory")
    if max(row.limit_share or 0, row.fixed_limit_share or 0) > 1:
        notes.append("above the limit: the bandwidth was measured too low")
    return ", ".join(notes)


def _endless_cells(row: EndlessRow) -> list[str]:
    def mega(value: int | None, digits: int = 2) -> str:
        return "-" if value is None else f"{value / 1e6:.{digits}f}"

    steady = "-" if row.kv_bytes_high is None else "yes" if row.kv_bytes_low == row.kv_bytes_high else "no"
    notes = [] if row.status == "ok" else [row.status]
    notes += ["beyond the model's context"] if row.beyond_context else []
    return [
        row.policy,
        row.source,
        str(row.tokens),
        "-" if row.entries_high is None else str(row.entries_high),
        mega(row.kv_bytes_high),
        steady,
        mega(row.resident_growth_bytes),
        *("-" if v is None else f"{1000 * v:.2f}" for v in (row.tpot_first_s, row.tpot_last_s)),
        "-" if row.perplexity is None else f"{row.perplexity:.2f}",
        ", ".join(notes),
    ]


def _notes(records: Sequence[dict[str, Any]], rows: Sequence[PointRow], info: ModelInfo) -> list[str]:
    """Say what a reader of the table must know."""
    notes = [f"weights are {info.weights}: times and bytes are real, scores and choices mean nothing"] if info.weights else []
    floors = [row.noise for row in rows if row.noise is not None]
    if floors:
        notes.append(f"noise floor (full cache measured twice): TPOT ratios differ from 1 by up to {100 * max(floors):.1f}%")
    speeds = sorted({r["bandwidth_bytes_per_s"] for r in records if r.get("bandwidth_bytes_per_s")})
    if speeds:
        shown = " to ".join(f"{speed / 1e9:.1f}" for speed in dict.fromkeys((speeds[0], speeds[-1])))
        notes.append(f"of limit: time to read weights and entries at the measured {shown} GB/s, over the time per token")
    done = [r for r in records if r["status"] == "ok" and r["series"] != "endless"]
    if any(r["policy"] == "full" for r in done):
        notes.append("TTFT of full: with kvtool's copy of the prompt's entries into its store, which is under `compress s`")
    if done and all(r["limit_share"] is None for r in done):
        notes.append("no share of the limit: weights and entries fit into the last-level cache")
    notes += sorted({f"no peak memory: {r['why_no_peak']}" for r in done if r["why_no_peak"]})
    without: dict[str, list[str]] = {}
    for row in rows:
        if row.fixed_why_not:
            without.setdefault(row.fixed_why_not, []).append(row.policy)
    notes += [f"fixed: {why} ({'; '.join(dict.fromkeys(which))})" for why, which in without.items()]
    failed: dict[tuple[str, str, str | None], list[str]] = {}
    for row in rows:
        if row.status != "ok":
            failed.setdefault((row.policy, row.status, row.message), []).append(f"{row.length} x {row.batch}")
    for (policy, status, message), where in failed.items():
        notes.append(f"{policy} at {', '.join(dict.fromkeys(where))} (length x batch): {status}: {message}")
    notes += [
        f"endless {r['policy']}: {r['status']}: {r['message']}"
        for r in records
        if r["series"] == "endless" and r["status"] != "ok"
    ]
    return list(dict.fromkeys(notes))


def tables(summary: StressSummary, lay_out: Callable[[Sequence[str], Sequence[Sequence[str]]], str]) -> list[str]:
    """Return the tables of lengths, batches and endless decoding, as far as there are any."""
    return [lay_out(*lines) for _, lines in headed_tables(summary)]


def headed_tables(summary: StressSummary) -> list[tuple[str, Lines]]:
    """Return heading and table of lengths, batches and endless decoding, as far as there are any."""
    fixed = any(row.fixed_tpot_s is not None for row in summary.rows)
    header = [*_HEADER, *(_FIXED_HEADER if fixed else ()), "note"]
    found: list[tuple[str, Lines]] = [
        (f"By {rows[0].series}", (header, [_cells(row, fixed) for row in rows])) for rows in _by_series(summary.rows)
    ]
    if summary.endless:
        found.append(("Endless decoding", (_ENDLESS_HEADER, [_endless_cells(row) for row in summary.endless])))
    return found


def points_csv(rows: Sequence[PointRow]) -> str:
    """Return points as CSV, quartiles in columns of their own."""
    flat = []
    for row in rows:
        fields = dataclasses.asdict(row)
        for name in ("ttft_s", "tpot_s"):
            spread = fields.pop(name) or (None, None, None)
            fields |= dict(zip((f"{name}_q1", f"{name}_median", f"{name}_q3"), spread, strict=True))
        flat.append(fields)
    return _table(flat)


def _table(rows: Sequence[dict[str, Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
