from __future__ import annotations

import pytest

from kvtool.data.metrics import score
from kvtool.errors import ConfigError


@pytest.mark.parametrize(
    ("metric", "prediction", "answers", "expected"),
    [
        ("exact", " 48213.", ("48213",), 1.0),
        ("exact", "The  Calm Wizard", ("calm wizard",), 1.0),
        ("exact", "48214", ("48213",), 0.0),
        ("starts", " 48213. And then", (" 48213.",), 1.0),
        ("starts", " 482131", ("48213",), 0.0),
        ("starts", "", ("48213",), 0.0),
        ("contains", "it is 48213!", ("48213",), 1.0),
        # precision 2/3, recall 2/2
        ("f1", "red blue green", ("red blue",), 0.8),
        ("f1", "red", ("blue", "red"), 1.0),
        ("f1", "", ("blue",), 0.0),
        # the word twice in both counts twice: precision 2/2, recall 2/3
        ("f1", "go go", ("go go gone",), 0.8),
    ],
)
def test_by_hand(metric: str, prediction: str, answers: tuple[str, ...], expected: float) -> None:
    assert score(metric, prediction, answers) == pytest.approx(expected, abs=1e-12)


def test_unknown_metric() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'exact'"):
        score("exacct", "a", ("a",))
