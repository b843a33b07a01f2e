"""Tables from records: means, paired differences, intervals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvtool.errors import DataError
from kvtool.infer.measure import RESULTS
from kvtool.infer.summary import interval, summarize, text_table


def record(sample: str, policy: str, **values: Any) -> dict[str, Any]:
    base = dict.fromkeys(RESULTS)
    base |= {"sample": sample, "policy": policy, "method": policy, "budget": None, "status": "ok", "message": None}
    return base | {"compress_at": "prompt", "degenerate": False, **values}


def test_rows_by_hand() -> None:
    records = [
        record("a", "full", score=1.0, tpot_s=0.2, answer_accuracy=1.0),
        record("a", "small", score=0.5, tpot_s=0.1, answer_accuracy=0.5),
        record("b", "full", score=0.0, tpot_s=0.4, answer_accuracy=None),
        record("b", "small", score=0.0, tpot_s=0.1, answer_accuracy=None),
        record("c", "full", score=1.0, tpot_s=0.3, answer_accuracy=1.0),
        record("c", "small", status="oom", message="not enough memory"),
    ]
    full, small = summarize(records)
    assert (full.score.mean, full.score.n) == (pytest.approx(2 / 3), 3)
    assert (small.score.mean, small.n, small.n_oom, small.message) == (0.25, 2, 1, "not enough memory")
    assert small.score_change.mean == -0.25  # only the samples that both have
    assert (small.accuracy_change.mean, small.accuracy_change.n) == (-0.5, 1)
    assert small.speedup == 3.0
    assert small.tokens_per_s == 10.0
    assert full.speedup == 1.0
    assert small.nll.mean is None


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for i in range(200):
        found = interval(rng.normal(1.0, 2.0, size=40).tolist(), seed=i)
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 1.0 <= found.high
    assert 180 <= covered <= 198


def test_what_is_left_unquantized_is_said() -> None:
    found = {"layers": 1, "left_alone": 3, "share": 0.2}
    rows = summarize([record("a", "full"), record("a", "full:quant=int8", quantized=found)])
    assert [row.left_alone for row in rows] == [0, 3]
    assert "3 sliding layers not quantized" in text_table(rows).splitlines()[-1]


def test_no_table_mixes_both_modes() -> None:
    with pytest.raises(DataError, match="context and prompt"):
        summarize([record("a", "full"), record("a", "full", compress_at="context")])
