"""Scores of a prediction against the gold answers, by rule: no model judges another."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from kvtool.errors import ConfigError, near_matches


def normalize(text: str) -> str:
    """Lower case, without punctuation, articles and repeated white space (SQuAD's rule)."""
    text = "".join(ch for ch in text.lower() if ch not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact(prediction: str, answer: str) -> float:
    """1 if both are equal after `normalize`, else 0."""
    return float(normalize(prediction) == normalize(answer))


def starts(prediction: str, answer: str) -> float:
    """1 if the normalised prediction begins with the words of the answer: free continuations may go on after it."""
    words, gold = normalize(prediction).split(), normalize(answer).split()
    return float(bool(gold) and words[: len(gold)] == gold)


def contains(prediction: str, answer: str) -> float:
    """1 if the answer occurs in the prediction, both lower-cased (RULER's rule)."""
    return float(answer.strip().lower() in prediction.lower())


def f1(prediction: str, answer: str) -> float:
    """Harmonic mean of token precision and recall after `normalize` (SQuAD)."""
    words, gold = normalize(prediction).split(), normalize(answer).split()
    common = sum((Counter(words) & Counter(gold)).values())
    if not words or not gold:
        return float(words == gold)
    if not common:
        return 0.0
    precision, recall = common / len(words), common / len(gold)
    return 2 * precision * recall / (precision + recall)


METRICS: dict[str, Callable[[str, str], float]] = {"exact": exact, "starts": starts, "contains": contains, "f1": f1}


def metric_function(name: str) -> Callable[[str, str], float]:
    """Return the metric registered as `name`.

    Raises
    ------
    ConfigError
        Unknown, with near matches.
    """
    if name not in METRICS:
        raise ConfigError(f"unknown metric {name!r}.{near_matches(name, METRICS)} Known: {', '.join(METRICS)}")
    return METRICS[name]


def score(metric: str, prediction: str, answers: Sequence[str]) -> float:
    """Return the best score of `prediction` over the gold `answers`, in 0 ... 1."""
    function = metric_function(metric)
    return max(function(prediction, answer) for answer in answers)
