"""Findings of a study in words, with the figures that they rest on: the study's own and ours."""

from __future__ import annotations

from kvtool.studies.judge import RELATIVE, SIZES, TINY, Judged
from kvtool.studies.noise import TIMES
from kvtool.studies.paired import Value
from kvtool.studies.reference import Finding, Reference, Theirs
from kvtool.studies.results import METRICS

#: Pairs of a finding whose figures are said one by one.
MOST_SAID = 4
OPENINGS = {"agrees": "Holds here", "differs": "Does not hold here", "same policy": "Cannot be decided here"}


def sentence(item: Finding) -> str:
    """Return a finding in words, with the figures that were measured here and the study's own."""
    direction, pairs = item.direction, item.pairs
    if not pairs:
        return f"Not measured here: {direction.say}{_study(item)}."
    opening = next((words for start, words in OPENINGS.items() if item.verdict.startswith(start)), "Not clear here")
    if item.verdict == "same policy":
        return f"{opening}: {direction.say}. {same_words(pairs[0], direction.better, direction.worse)}{_study(item)}."
    said = [_one(item) if len(pairs) == 1 else _several(item), *_unequal(item), *_noise(item)]
    said += ["one measurement each, without intervals"] if item.verdict.endswith("(no intervals)") else []
    return f"{opening}: {direction.say} ({METRICS[direction.metric].title} {'; '.join(said)}){_study(item)}."


def same_words(pair: Judged, better: str, worse: str) -> str:
    """Say that two names mean one policy."""
    kept = next((pair.better.values[key] for key in ("effective_context",) if key in pair.better.values), None)
    both = "" if kept is None else f"both keep {kept.mean:.0f} entries, and "
    return f"{better} and {worse} are the same policy when counted alike: {both}every figure is the same to the last digit"


def amount(value: Value, metric: str, ends: bool = True) -> str:
    """Return a difference, in the metric's unit or in per cent, with its interval."""
    relative = metric in RELATIVE
    digits = (1 if abs(value.mean) >= 0.01 else 2) if relative else METRICS[metric].digits
    values = [v * (100 if relative else 1) for v in (value.mean, value.low, value.high) if v is not None]
    # An end that decides must not read as zero.
    nonzero = [abs(v) for v in values if abs(v) > TINY]
    digits += next((more for more in range(3) if all(round(v, digits + more) for v in nonzero)), 3)
    figures, unit = [f"{v:+.{digits}f}" for v in values], " %" if relative else ""
    return f"{figures[0]}{unit}" + (f" ({figures[1]} to {figures[2]}{unit})" if ends and len(figures) == 3 else "")


def _basis(metric: str) -> str:
    if metric in TIMES:
        return " by the same prompts or repeats"
    return " on the same segments" if metric == "perplexity" else " on the same prompts"


def _figures(item: Finding, pair: Judged) -> str:
    direction = item.direction
    digits = METRICS[direction.metric].digits
    better, worse = (row.values[direction.metric].mean for row in (pair.better, pair.worse))
    return f"{better:.{digits}f} with {direction.better}, {worse:.{digits}f} with {direction.worse}"


def _one(item: Finding) -> str:
    (pair,) = item.pairs
    text = _figures(item, pair)
    if pair.difference is not None:
        text += f"; better by {amount(pair.difference, item.direction.metric)}{_basis(item.direction.metric)}"
    return text


def _several(item: Finding) -> str:
    direction, pairs, metric = item.direction, item.pairs, item.direction.metric
    if len(pairs) <= MOST_SAID:
        figures = [
            _figures(item, pair) + ("" if pair.difference is None else f", better by {amount(pair.difference, metric)}")
            for pair in pairs
        ]
        return "; ".join(figures)
    equal = item.count(0)
    text = f"is better with {direction.better} in {item.count(1, 2)} of {len(pairs)} pairs of rows, clearly in {item.count(2)}"
    text += f", clearly worse in {item.count(-2)}" if item.count(-2) else ""
    text += f", equal in {equal}" if equal else ""
    return text + ("" if item.difference is None else f"; {amount(item.difference, metric, False)} on average")


def _unequal(item: Finding) -> list[str]:
    """Say how much the two sides keep, where that is not about the same, over all pairs."""
    found = [] if item.direction.metric in SIZES else [pair.unequal for pair in item.pairs]
    odd = [each for each in found if each is not None]
    if not odd:
        return []
    a, b, unit = max(odd, key=lambda each: abs(each[0] - each[1]) / max(each[0], each[1]))
    where = "" if len(item.pairs) == 1 else f" in {len(odd)} of {len(item.pairs)} pairs, at most"
    return [f"unequal memory{where}: {a:.0f} against {b:.0f}{unit} kept"]


def _noise(item: Finding) -> list[str]:
    """Say what differences of times are worth: the A/A floor beside them."""
    if item.direction.metric not in TIMES:
        return []
    if not item.floors:
        return ["nothing was measured twice, so that the noise of times is unknown and no difference counts"]
    inside = item.count(-1, 0, 1)
    text = f"A/A floor {item.floors}, by which the same configuration differs when measured again"
    if not inside:
        return [f"{text}: all beyond it" if len(item.pairs) > 1 else f"{text}: beyond it"]
    if len(item.pairs) == 1:
        return [f"{text}: not beyond it"]
    return [f"{text}: {inside} of {len(item.pairs)} differences are not beyond it"]


def _study(item: Finding) -> str:
    return "" if item.theirs is None else f"; in the study {theirs_words(item.theirs)}"


def theirs_words(found: Theirs) -> str:
    """Return the study's two numbers in words."""
    a, b = found.better, found.worse
    text = f"{METRICS[a.metric].title} {shown_number(a)} with {a.label}, {shown_number(b)} with {b.label}"
    return text + (f" on {a.text}" if a.text else "")


def shown_number(found: Reference) -> str:
    """Return a number of the study as it gave it."""
    return "-" if found.value is None else f"{found.value:g}"
