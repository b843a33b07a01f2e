"""What a reader of a study's report must know before believing its figures."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from kvtool.analysis.points import FIGURES, Place, Point, nothing_chosen
from kvtool.analysis.study import StudyData
from kvtool.analysis.study_same import same_words
from kvtool.files import read_records


def warnings(data: StudyData) -> list[str]:
    """Return what a reader must know before believing the figures."""
    points = [(place, point) for place in data.places for point in place.points]
    found = []
    for status, text in (
        ("impossible", "cannot run: the budget is below the protected entries, or a setting does not fit"),
        ("oom", "ran out of memory"),
        ("failed", "were given up: every worker that ran them died"),
    ):
        hit = [(place, point) for place, point in points if point.status == status]
        found += [f"{len(hit)} points {text}: {_some(hit)}"] if hit else []
    degenerate = [(place, point) for place, point in points if point.degenerate and point.status == "ok"]
    found += (
        [f"{len(degenerate)} degenerate points (nothing left to choose), not judged: {_some(degenerate)}"] if degenerate else []
    )
    found += _control(data.places) + _bare(data) + _weak(data.places) + _cut(data.places)
    found += same_words(data) + _apart(data.rows) + _beyond(data) + _noise(data)
    idle = {
        row["label"]
        for row in data.rows
        if any(word in str(row.get("note") or "") for word in ("never evicts", "drops nothing"))
    }
    found += (
        [f"never evicted anything, so that equality with the full cache shows nothing: {', '.join(sorted(idle))}"]
        if idle
        else []
    )
    states = Counter(node["state"] for node in data.nodes if node["state"] not in ("done", "same"))
    found += [f"the study is not complete: {', '.join(f'{n} nodes {state}' for state, n in states.items())}"] if states else []
    return found


def _some(hit: Sequence[tuple[Place, Point]], most: int = 4) -> str:
    return _few(list(dict.fromkeys(f"{point.label} at {point.budget}" for _, point in hit)), most)


def _control(places: Sequence[Place]) -> list[str]:
    """Methods that do not beat the random control of the same budget, counted over points: in the figure that the tables of scores show."""
    lost: Counter[tuple[str, str]] = Counter()
    tried: Counter[tuple[str, str]] = Counter()
    for place in places:
        controls = {p.budget: p for p in place.points if p.control}
        figure = place.figure() or "score"
        for point in place.points:
            gain = place.versus(point, controls.get(point.budget), figure) if point.budget and not point.control else None
            if gain is not None and not point.degenerate:
                tried[figure, point.label] += 1
                lost[figure, point.label] += not gain.low > 0
    if not tried and places:
        return ["no random control was run: nothing says that choosing entries is worth it here"]
    named: dict[str, list[str]] = {}
    for (figure, label), n in tried.items():
        if lost[figure, label]:
            named.setdefault(figure, []).append(f"{label} {lost[figure, label]} of {n}")
    return [
        f"not clearly above the random control in {FIGURES[figure][1]} (points, paired 95 % intervals): {', '.join(labels)}"
        for figure, labels in named.items()
    ]


def _bare(data: StudyData) -> list[str]:
    """Lazy evictions whose cuts leave nothing that was chosen: they come close to a window whatever scores the entries."""
    hit = {p.label for place in (*data.places, *data.texts) for p in place.points if nothing_chosen(p.policy, place.length)}
    if not hit:
        return []
    return [
        "drops so many entries at once that a cut leaves sink and window only, no heavy hitter (interval > capacity - sink - window), "
        f"never recommended: {', '.join(sorted(hit))}"
    ]


def _weak(places: Sequence[Place]) -> list[str]:
    low = []
    for place in places:
        figure, full = place.figure(), place.full
        mean = place.mean(full, figure) if full and figure else None
        if mean and mean.mean < 0.5:
            low.append(f"{place.model} {place.task} {place.length}: {mean.mean:.2f}")
    more = f" and {len(low) - 4} more" if len(low) > 4 else ""
    return [f"the full cache itself scores low, so that losses are hard to see: {'; '.join(low[:4])}{more}"] if low else []


def _cut(places: Sequence[Place]) -> list[str]:
    words = {
        "answer_cut": "prompts have longer answers than were scored: their first tokens only",
        "prompt_cut": "prompts are longer than the limit and lost their middle",
        "own_answer": "prompts have no gold answer: the full cache's own answer is the reference",
    }
    counts = Counter[str]()
    for place in places:
        counts.update(place.facts)
    return [f"{counts[key]} {text}" for key, text in words.items() if counts[key]]


def _apart(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Degenerate rows of stages without prompts: texts and times."""
    hit = {str(row["label"]) for row in rows if "degenerate" in str(row.get("note") or "") and row.get("score") is None}
    return [f"degenerate over texts or in stress tests (nothing left to choose): {_few(sorted(hit))}"] if hit else []


def _beyond(data: StudyData) -> list[str]:
    """Prompts longer than a model was trained for: by what stress tests noted, and by the model's own figure."""
    found = {
        f"{row['label']} at {row['length']}" for row in data.rows if "beyond the model's context" in str(row.get("note") or "")
    }
    native = native_lengths(data.provenance)
    found |= {
        f"{place.model} at {place.length} (its own {native[place.model]})"
        for place in data.places
        if place.length > native.get(place.model, place.length)
    }
    return [f"beyond the model's native context, where it was not trained: {_few(sorted(found))}"] if found else []


def native_lengths(provenance: dict[str, Any]) -> dict[str, int]:
    """Return a model's label -> tokens that it was made for, as the runs of a study wrote it down."""
    found = {}
    for name, run in (provenance.get("runs") or {}).items():
        length = ((run.get("provenance") or {}).get("model") or {}).get("max_positions")
        if length is not None:
            found[name.partition(" ")[2]] = int(length)
    return found


def _noise(data: StudyData) -> list[str]:
    """A/A: how far the same configuration, measured again, differs from itself; no smaller difference of times shows anything."""
    again = [
        row["tpot_ms_high"] / row["tpot_ms_low"] - 1
        for row in data.rows
        if row.get("series") == "" and row.get("tpot_ms_low") and row.get("tpot_ms_high")
    ]
    stress = [read_records(folder / "records.jsonl") for _, folder in data.folders.get("stress", [])]
    twice = [ratio for records in stress for ratio in full_twice(records)]
    pairs = [ratio for records in stress for ratio in full_twice(records, pairs=True)]
    found = []
    if again:
        found.append(f"runs of the same configuration differ by up to {100 * max(again):.1f} % in time per token")
    if twice:
        found.append(
            f"the full cache, measured twice at {len(twice)} points, differs by up to {100 * max(pairs):.1f} % from itself "
            f"(the largest pair; medians over its repeats by {100 * max(twice):.1f} %)"
        )
    found += _compared(data)
    if not found:
        timed = any(row.get("tpot_ms") is not None for row in data.rows)
        return (
            ["nothing was measured twice: how noisy its times are is not known (infer: repeats, or a stress test)"]
            if timed
            else []
        )
    return [f"noise floor (A/A): {'; '.join(found)}. No smaller difference of medians shows anything"]


def full_twice(records: Sequence[Mapping[str, Any]], key: str = "tpot_s", pairs: bool = False) -> list[float]:
    """Return, for each length and batch of a stress test, how far a time of the full cache is from itself measured again.

    Parameters
    ----------
    records : sequence of dict
        As ``kvtool stress`` writes them: the full cache once with ``again``, in as many repeats.
    key : str
        Field of the time; default: per token.
    pairs : bool
        Of each point the largest distance of a pair instead of the median's, whichever of both is the slower one.

    Returns
    -------
    list of float
        Distance from 1 of the median over repeats of first / second, as the stress test's own table has it.
    """
    times: dict[str, dict[bool, dict[int, float]]] = {}
    for record in records:
        if record.get("policy") == "full" and record.get("status") == "ok" and record.get(key):
            point = json.dumps([record.get("series"), record.get("length"), record.get("batch")])
            own = times.setdefault(point, {}).setdefault(bool(record.get("again")), {})
            own[int(record.get("repeat", 0))] = float(record[key])
    found = []
    for group in times.values():
        first, second = group.get(False, {}), group.get(True, {})
        ratios = [first[n] / second[n] for n in first if n in second]
        if ratios:
            found.append(max(max(ratio, 1 / ratio) for ratio in ratios) - 1 if pairs else abs(statistics.median(ratios) - 1))
    return found


def _compared(data: StudyData) -> list[str]:
    """What comparisons of repeated runs say of scores: the share of prompts whose records were the same again."""
    found = []
    for title, folder in data.folders.get("compare", []):
        path = folder / "compare.json"
        rows = json.loads(path.read_text(encoding="utf-8")).get("noise") or [] if path.exists() else []
        shares = [row["identical"] for row in rows if row.get("identical") is not None]
        if shares:
            found.append(f"{title}: {100 * min(shares):.0f} % of the records at least were the same again")
    return found


def _few(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
