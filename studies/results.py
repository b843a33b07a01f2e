"""What finished nodes measured, as rows: one per policy, budget and cell, with intervals, whatever stage they are of."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtool.executors.records import read_units
from kvtool.files import read_records
from kvtool.studies.graph import Node, labels
from kvtool.studies.naming import budget_text, named_as, without_heads
from kvtool.studies.noise import floors_of_runs, floors_of_stress, times_of_points
from kvtool.studies.paired import Value, by_sample, by_segment, documents_of, intervals
from kvtool.studies.schema import Choice, Study
from kvtool.studies.state import STRESS, folder_of

if TYPE_CHECKING:
    from kvtool.analysis.statistics import Interval as Bounds
    from kvtool.infer.stress_table import EndlessRow, PointRow
    from kvtool.infer.summary import Interval, PolicyRow


Look = Callable[[Node, list[dict[str, Any]], list[dict[str, Any]]], None]


@dataclass(frozen=True, slots=True)
class Metric:
    """How a figure is shown.

    Attributes
    ----------
    title : str
    digits : int
    more : bool or None
        More is better; None: neither is.
    factor : float
        From the stored unit to the shown one.
    """

    title: str
    digits: int
    more: bool | None
    factor: float = 1.0


METRICS: dict[str, Metric] = {
    "score": Metric("score", 2, True),
    "score_change": Metric("score - full", 2, True),
    "accuracy": Metric("answer accuracy", 2, True),
    "accuracy_change": Metric("accuracy - full", 2, True),
    "nll": Metric("answer loss", 3, False),
    "perplexity": Metric("perplexity", 2, False),
    "perplexity_ratio": Metric("perplexity / full", 3, False),
    "next_token_accuracy": Metric("next-token accuracy", 2, True),
    "effective_context": Metric("effective context", 1, None),
    "efficiency": Metric("score % / retention %", 2, True),
    "kept": Metric("kept %", 2, None, 100.0),
    "kv_mb": Metric("KV MB", 3, False, 1e-6),
    "peak_mb": Metric("peak MB", 1, False, 1e-6),
    "ttft_s": Metric("TTFT s", 3, False),
    "tpot_ms": Metric("TPOT ms", 2, False, 1000.0),
    "tokens_per_s": Metric("tokens/s", 1, True),
    "attention_ms": Metric("attention ms", 3, False, 1000.0),
    "compress_s": Metric("compress s", 4, False),
    "total_s": Metric("total s", 2, False),
    "speedup": Metric("speed-up", 2, True),
}


#: Times of a real run -> field of its summary.
SUMMED = {
    "ttft_s": "ttft_s",
    "tpot_ms": "tpot_s",
    "tokens_per_s": "tokens_per_s",
    "compress_s": "compress_s",
    "speedup": "speedup",
}


@dataclass(frozen=True, slots=True)
class ResultRow:
    """What was measured of one policy at one point.

    Attributes
    ----------
    stage, series : str
        Name of the stage; of a stress test, ``length``, ``batch`` or ``endless``, else ``""``.
    model : str
        Label.
    task, compress_at : str or None
    length, batch : int or None
    choice : Choice
        Label, group and text of the study.
    others : tuple of str
        Further labels of the study that mean the same policy.
    policy : str
        Text form without its heads file.
    budget : str or None
        As it was asked for; None: the method's own.
    n : int
        Samples, or timed runs.
    note : str
    values : dict of str to Value
        By key of `METRICS`.
    samples : dict of str to dict of str to float
        For paired comparisons, by metric: ``score``, ``accuracy`` and times of each prompt by its id; ``perplexity`` as nats per token
        of each segment; times of a stress test by repeat. In the unit that tables show. Empty where there are none.
    documents : dict of str to str
        Prompt -> document, of those that are shared.
    noise : dict of str to float
        Metric of times -> what a relative difference must exceed: how far the same configuration, measured again, is from itself.
    """

    stage: str
    series: str
    model: str
    task: str | None
    length: int | None
    batch: int | None
    compress_at: str | None
    choice: Choice
    others: tuple[str, ...]
    policy: str
    budget: str | None
    n: int
    note: str
    values: dict[str, Value]
    samples: dict[str, dict[str, float]] = field(default_factory=dict)
    documents: dict[str, str] = field(default_factory=dict)
    noise: dict[str, float] = field(default_factory=dict)


def collect(study: Study, nodes: Sequence[Node], out: Path, look: Look | None = None) -> list[ResultRow]:
    """Return the rows of all finished nodes, in the order of the study; runs that were repeated become one row.

    `look` is shown the records of every real run, of repeated ones the first, and those that were added where its curves fall: they are
    large, and read once.
    """
    named, rows = labels(study), list[ResultRow]()
    for node in nodes:
        if node.stage.kind == "infer" and node.work["repeat"] == 0:
            again = [n for n in nodes if n.stage.kind == "infer" and n.stage.name == node.stage.name and n.cell == node.cell]
            finer = [folder_of(out, n) for n in nodes if n.stage.kind == "cliffs" and n.inputs["infer"].key == node.key]
            rows += _infer_rows(node, [folder_of(out, n) for n in again], named, finer, look)
        elif node.stage.kind == "cliffs":
            rows += _refined_rows(node, folder_of(out, node), named)
        elif node.stage.kind == "no_cache":
            rows += _no_cache_rows(node, folder_of(out, node))
        elif node.stage.kind == "perplexity":
            rows += _perplexity_rows(node, folder_of(out, node), named)
        elif node.stage.kind == "stress":
            rows += _stress_rows(node, folder_of(out, node) / STRESS, named)
    return rows


def _infer_rows(
    node: Node,
    folders: Sequence[Path],
    named: Mapping[str, list[Choice]],
    finer: Sequence[Path] = (),
    look: Look | None = None,
) -> list[ResultRow]:
    """Scores are of the first run, times the median of all runs' medians, with the smallest and the largest.

    `finer`: folders with retentions that were added on the same prompts, which `look` is shown, too.
    """
    from kvtool.infer.summary import summarize
    from kvtool.studies.work_cliffs import refined_records

    runs = []
    for number, folder in enumerate(folders):
        records = read_units(folder)
        runs.append({row.policy: row for row in summarize(records)})
        if number == 0:
            each, documents = by_sample(records), documents_of(records)
            if look is not None:
                look(node, records, [r for path in finer for r in refined_records(path)])
    medians = [{text: {key: getattr(row, name) for key, name in SUMMED.items()} for text, row in run.items()} for run in runs]
    noise, rows = floors_of_runs(medians), []
    for text, row in runs[0].items():
        policy, values = without_heads(text, node), {**_measured(row), **intervals(each, text, documents)}
        for key, name in SUMMED.items():
            values[key] = _spread(key, [getattr(run[text], name) for run in runs if text in run])
        made = _row(node, policy, row.budget, row.n, _note(row), values, named)
        rows.append(replace(made, samples=each.get(text, {}), documents=documents, noise=noise))
    return rows


def _measured(row: PolicyRow) -> dict[str, Value | None]:
    """Return a policy's scores and sizes."""
    values = {key: _of_interval(getattr(row, key)) for key in ("score", "score_change", "accuracy", "accuracy_change", "nll")}
    values |= {"kept": _plain("kept", row.retention), "kv_mb": _plain("kv_mb", row.kv_bytes)}
    if row.score.mean is not None and row.retention:
        values["efficiency"] = Value(row.score.mean / row.retention)
    return values


def _refined_rows(node: Node, folder: Path, named: Mapping[str, list[Choice]]) -> list[ResultRow]:
    """Rows of the retentions that were added where curves fall; times are left out, as those of the grid were taken earlier."""
    from kvtool.infer.summary import summarize
    from kvtool.studies.work_cliffs import refined_records

    rows = []
    for path in sorted(folder.glob("round-*")):
        mine = {record["policy"] for record in refined_records(folder)}
        records = read_units(path)
        each, documents = by_sample(records), documents_of(records)
        for row in summarize(records):
            if row.policy in mine:
                policy = without_heads(row.policy, node)
                own = {policy: named_as(policy, named)}
                values = {**_measured(row), **intervals(each, row.policy, documents)}
                rows.append(_row(node, policy, row.budget, row.n, _note(row), values, own))
    return rows


def _no_cache_rows(node: Node, folder: Path) -> list[ResultRow]:
    """Rows without a cache: no policy, and nothing kept."""
    from kvtool.infer.nocache import NAME, read_no_cache

    named = {NAME: [Choice(NAME, NAME)]}
    return [_point_row(node, row, named) for row in read_no_cache(folder)]


def _row(
    node: Node,
    policy: str,
    budget: str | None,
    n: int,
    note: str,
    values: Mapping[str, Value | None],
    named: Mapping[str, list[Choice]],
) -> ResultRow:
    found = named.get(policy) or [Choice(policy, policy)]
    cell = node.cell
    return ResultRow(
        stage=node.stage.name,
        series="",
        model=cell.model.label,
        task=cell.task,
        length=cell.length,
        batch=None,
        compress_at=cell.compress_at,
        choice=found[0],
        others=tuple(choice.label for choice in found[1:]),
        policy=policy,
        budget=budget,
        n=n,
        note=note,
        values={key: value for key, value in values.items() if value is not None},
    )


def _perplexity_rows(node: Node, folder: Path, named: Mapping[str, list[Choice]]) -> list[ResultRow]:
    from kvtool.analysis.perplexity import read_perplexity

    rows, each = list[ResultRow](), by_segment(read_units(folder))
    for row in read_perplexity(folder).rows:
        held = row.entries
        values = {
            "perplexity": _of_bounds(row.perplexity),
            "perplexity_ratio": _of_bounds(row.ratio),
            "next_token_accuracy": _of_bounds(row.accuracy),
            "effective_context": _plain("effective_context", held),
            "kept": _plain("kept", None if held is None else held / node.work["length"]),
        }
        notes = [] if row.status == "ok" else [row.status]
        notes += ["never evicts" if row.drops_nothing and row.method != "full" else "", "degenerate" if row.degenerate else ""]
        policy = without_heads(row.policy, node)
        made = _row(node, policy, budget_text(row.policy), row.n_tokens, ", ".join(filter(None, notes)), values, named)
        rows.append(replace(made, samples=each.get(row.policy, {})))
    return rows


def _stress_rows(node: Node, folder: Path, named: Mapping[str, list[Choice]]) -> list[ResultRow]:
    from kvtool.infer.stress_table import endless_rows, points

    records = read_records(folder / "records.jsonl")
    noise, times = floors_of_stress(records), times_of_points(records)
    rows = []
    for row in points(records):
        own = times.get((row.series == "batch", row.policy, row.length, row.batch), {})
        shown = {key: {name: value * METRICS[key].factor for name, value in found.items()} for key, found in own.items()}
        floors = noise.get((row.series == "batch", row.length, row.batch), {})
        rows += [] if row.again else [replace(_point_row(node, row, named), samples=shown, noise=floors)]
    return rows + [_endless_row(node, row, named) for row in endless_rows(records)]


def _point_row(node: Node, row: PointRow, named: Mapping[str, list[Choice]]) -> ResultRow:
    from kvtool.infer.stress_report import point_note

    values = {
        "kept": _plain("kept", row.retention),
        "kv_mb": _plain("kv_mb", row.kv_bytes_generation_end),
        "peak_mb": _plain(
            "peak_mb", max((b for b in (row.prefill_peak_bytes, row.decode_peak_bytes) if b is not None), default=None)
        ),
        "ttft_s": _quartiles("ttft_s", row.ttft_s),
        "tpot_ms": _quartiles("tpot_ms", row.tpot_s),
        "tokens_per_s": _plain("tokens_per_s", row.tokens_per_s),
        "attention_ms": _plain("attention_ms", row.attention_s),
        "compress_s": _plain("compress_s", row.compress_s),
        "speedup": _plain("speedup", row.speedup),
        "total_s": _plain("total_s", _total_s(row, int(node.work["n_new"]))),
    }
    made = _row(node, *_named_point(row.policy, node), row.n, point_note(row), values, named)
    return replace(made, series=row.series, length=row.length, batch=row.batch)


def _named_point(policy: str, node: Node) -> tuple[str, str | None]:
    """A policy as the study names it, and its budget; what is no policy has none."""
    from kvtool.infer.nocache import NAME

    return (policy, None) if policy == NAME else (without_heads(policy, node), budget_text(policy))


def _total_s(row: PointRow, n_new: int) -> float | None:
    """Seconds from the prompt to the last of the timed tokens, of every sequence of the batch together."""
    if row.ttft_s is None or not row.tokens_per_s:
        return None
    return row.ttft_s[1] + n_new * row.batch / row.tokens_per_s


def _endless_row(node: Node, row: EndlessRow, named: Mapping[str, list[Choice]]) -> ResultRow:
    values = {
        "perplexity": _plain("perplexity", row.perplexity),
        "kv_mb": _plain("kv_mb", row.kv_bytes_high),
        "tpot_ms": _plain("tpot_ms", row.tpot_last_s),
    }
    notes = [f"{row.tokens} tokens of {'the model' if row.source == 'own' else 'a text'}"]
    notes += [row.status] if row.status != "ok" else []
    notes += ["cache steady"] if row.kv_bytes_low is not None and row.kv_bytes_low == row.kv_bytes_high else []
    notes += ["beyond the model's context"] if row.beyond_context else []
    made = _row(node, without_heads(row.policy, node), budget_text(row.policy), row.tokens, ", ".join(notes), values, named)
    return replace(made, series="endless", task=row.source, length=node.work["length"], batch=1)


def _note(row: PolicyRow) -> str:
    notes = ["degenerate"] if row.degenerate else []
    notes += ["drops nothing"] if row.method != "full" and row.retention is not None and row.retention >= 1 else []
    counts: Iterable[tuple[int, str]] = ((row.n_oom, "oom"), (row.n_impossible, "impossible"), (row.n_failed, "given up"))
    return ", ".join(notes + [f"{count} {what}" for count, what in counts if count])


def _of_interval(found: Interval) -> Value | None:
    return None if found.mean is None else Value(found.mean, found.low, found.high)


def _of_bounds(found: Bounds | None) -> Value | None:
    """An interval of `kvtool.analysis.statistics`, whose bounds are not numbers where there is one cluster only."""
    if found is None:
        return None
    return Value(found.mean) if math.isnan(found.low) else Value(found.mean, found.low, found.high)


def _plain(key: str, value: float | None) -> Value | None:
    return None if value is None else Value(value * METRICS[key].factor)


def _quartiles(key: str, found: tuple[float, float, float] | None) -> Value | None:
    if found is None:
        return None
    low, middle, high = (value * METRICS[key].factor for value in found)
    return Value(middle, low, high)


def _spread(key: str, found: Iterable[float | None]) -> Value | None:
    values = [value * METRICS[key].factor for value in found if value is not None]
    if not values:
        return None
    return Value(statistics.median(values), *((min(values), max(values)) if len(values) > 1 else ()))


def to_records(rows: Sequence[ResultRow]) -> list[dict[str, Any]]:
    """Return one flat record per row, every metric with its bounds, for CSV."""
    read: Callable[[Value | None], list[float | None]] = lambda v: [None] * 3 if v is None else [v.mean, v.low, v.high]  # noqa: E731
    flat = []
    for row in rows:
        facts: dict[str, Any] = {
            **{key: getattr(row, key) for key in ("stage", "series", "model", "task", "length", "batch", "compress_at")},
            "group": row.choice.group,
            "label": row.choice.label,
            "also": " ".join(row.others),
            **{key: getattr(row, key) for key in ("policy", "budget", "n", "note")},
        }
        for key in METRICS:
            facts |= dict(zip((key, f"{key}_low", f"{key}_high"), read(row.values.get(key)), strict=True))
        flat.append(facts)
    return flat
