"""From runs to points: medians, spread, speed-ups and the noise floor, on numbers worked by hand."""

from __future__ import annotations

from typing import Any

import pytest

from kvtool.infer.stress_table import endless_rows, points


def run(
    policy: str, repeat: int, steps: list[float], *, again: bool = False, status: str = "ok", **more: Any
) -> dict[str, Any]:
    base: dict[str, Any] = {
        "series": "length",
        "policy": policy,
        "again": again,
        "length": 100,
        "batch": 2,
        "repeat": repeat,
        "status": status,
        "message": None if status == "ok" else "why",
        "degenerate": False,
    }
    if status != "ok":
        return {**base, **more}
    figures = {
        "retention": 1.0,
        "ttft_s": 1.0 + repeat,
        "step_s": steps,
        "tpot_s": sorted(steps)[len(steps) // 2],
        "compress_s": 0.1,
        "attention_s": 0.01,
        "tokens_per_s": 2 / steps[0],
        "limit_share": 0.5,
        "kv_bytes_prompt_end": 1000,
        "kv_bytes_generation_end": 1100 + repeat,
        "kv_bytes_read": 3000.0,
        "weight_bytes_read": 1000,
        "prefill_peak_bytes": None,
        "decode_peak_bytes": 5 + repeat,
        "beyond_context": False,
        "kernel": "k",
    }
    return {**base, **figures, **more}


def test_points_by_hand() -> None:
    found = points(
        [
            run("snapkv", 0, [1.0, 1.0, 2.0], kv_bytes_read=500.0),
            run("full", 0, [4.0, 4.0, 5.0]),
            run("full", 0, [4.0, 5.0, 5.0], again=True),
            run("full", 1, [6.0, 6.0, 6.0]),
            run("snapkv", 1, [2.0, 2.0, 3.0], kv_bytes_read=500.0),
            run("full", 1, [6.0, 6.0, 6.0], again=True),
        ]
    )
    assert [(r.policy, r.again, r.n) for r in found] == [("full", False, 2), ("full", True, 2), ("snapkv", False, 2)]
    full, again, snap = found
    assert full.tpot_s == pytest.approx((4.25, 5.5, 6.0))
    assert snap.tpot_s == pytest.approx((1.25, 2.0, 2.0))
    assert full.ttft_s == pytest.approx((1.25, 1.5, 1.75))
    assert (full.speedup, full.possible_speedup) == (None, None)
    assert snap.speedup == pytest.approx((4 / 1 + 6 / 2) / 2)
    assert snap.possible_speedup == pytest.approx(4000 / 1500)
    assert again.speedup == pytest.approx((4 / 5 + 1) / 2)
    assert snap.noise == full.noise == pytest.approx(0.1)
    assert (full.kv_bytes_generation_end, full.decode_peak_bytes, full.prefill_peak_bytes) == (1101, 6, None)


def test_a_failed_repeat_marks_the_point() -> None:
    found = points([run("full", 0, [1.0, 1.0]), run("full", 1, [], status="oom"), run("a", 0, [], status="impossible")])
    assert [(r.policy, r.status, r.n, r.message) for r in found] == [("full", "oom", 1, "why"), ("a", "impossible", 0, "why")]
    assert found[1].tpot_s is None
    assert found[1].noise is None


def window(start: int, stop: int, **more: Any) -> dict[str, Any]:
    base = {"series": "endless", "policy": "p", "source": "text", "status": "ok", "message": None, "beyond_context": False}
    figures = {
        "entries_high": 9,
        "kv_bytes_low": 90,
        "kv_bytes_high": 95,
        "resident_bytes": 10 * stop,
        "tpot_s": stop / 10,
        "nll": 1.0,
    }
    return {**base, "start": start, "stop": stop, **figures, **more}


def test_endless_by_hand() -> None:
    (row,) = endless_rows([window(30, 40, nll=3.0, kv_bytes_high=99), window(0, 30)])
    assert (row.tokens, row.kv_bytes_low, row.kv_bytes_high, row.entries_high) == (40, 90, 99, 9)
    assert (row.tpot_first_s, row.tpot_last_s, row.resident_growth_bytes) == (3.0, 4.0, 100)
    assert row.perplexity == pytest.approx(2.718281828**1.5)
    (row,) = endless_rows([window(0, 30, nll=None), window(30, 30, status="oom")])
    assert (row.perplexity, row.status, row.tokens) == (None, "oom", 30)
