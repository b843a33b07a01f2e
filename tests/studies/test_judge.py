"""How findings of a study are judged: beyond noise and intervals, on the same prompts, with the study's own numbers beside ours."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvtool.errors import ConfigError
from kvtool.studies.judge import is_same, judge, verdict
from kvtool.studies.noise import floors_of_runs, floors_of_stress, times_of_points
from kvtool.studies.paired import Value, by_segment, intervals
from kvtool.studies.parse import parse_study
from kvtool.studies.reference import Finding, Reference, findings
from kvtool.studies.results import ResultRow
from kvtool.studies.sayings import amount, sentence
from kvtool.studies.schema import Choice, Direction, Study
from kvtool.studies.tables import reference_lines


def row(label: str, values: dict[str, float], samples: dict[str, list[float]] | None = None, **more: Any) -> ResultRow:
    found = {key: {f"s{i}": value for i, value in enumerate(numbers)} for key, numbers in (samples or {}).items()}
    start: dict[str, Any] = {
        "stage": "infer",
        "series": "",
        "model": "m",
        "task": "t",
        "length": 8,
        "batch": 1,
        "compress_at": "prompt",
    }
    shown = {key: Value(value) for key, value in values.items()}
    facts = {**start, "others": (), "policy": label, "budget": None, "n": 4, "note": "", **more}
    return ResultRow(choice=Choice(label, label), values=shown, samples=found, **facts)


def timed(label: str, times: list[float], floor: float | None = None, **more: Any) -> ResultRow:
    noise = {} if floor is None else {"tpot_ms": floor}
    return row(label, {"tpot_ms": float(np.median(times))}, {"tpot_ms": times}, noise=noise, **more)


def study(*directions: Direction, scale: str = "small") -> Study:
    empty: dict[str, Any] = {"models": (), "tasks": (), "lengths": (), "compress_at": (), "retentions": (), "policies": ()}
    return Study("x", "", scale, **empty, n=1, seed=0, stages=(), directions=directions)


FASTER = Direction("a is faster", "tpot_ms", "a", "b")


def only(direction: Direction, rows: list[ResultRow], reference: list[Reference] | None = None) -> Finding:
    (found,) = findings(study(direction), rows, reference or [])
    return found


@pytest.mark.parametrize(
    ("times", "floor", "want"),
    [
        ([9.0, 9.1, 9.0], 0.05, "agrees"),  # 10 % with 9.9 % at the least
        ([9.0, 9.1, 9.0], 0.12, "not clear"),  # below the floor
        ([9.0, 9.6, 9.0], 0.05, "not clear"),  # one repeat of three touches it
        ([11.0, 11.1, 11.2], 0.05, "differs"),
        ([9.0, 9.1, 9.0], None, "not clear"),  # nothing was measured twice
    ],
)
def test_times_must_differ_by_more_than_the_noise(times: list[float], floor: float | None, want: str) -> None:
    found = only(FASTER, [timed("a", times, floor), timed("b", [10.0, 10.0, 10.0], floor)])
    assert found.verdict == want
    text = sentence(found)
    opening = {"agrees": "Holds here", "differs": "Does not hold here", "not clear": "Not clear here"}[want]
    assert text.startswith(opening)
    if floor is None:
        assert "nothing was measured twice" in text
    else:
        by = 100 * (10.0 / float(np.median(times)) - 1)
        assert f"{by:+.1f} %" in text  # the difference and the floor, both in words
        assert f"A/A floor {100 * floor:.1f} %" in text


def test_most_differences_of_times_must_be_beyond_the_noise() -> None:
    def rows(n_clear: int) -> list[ResultRow]:
        return [
            one
            for i in range(5)
            for one in (
                timed("a", [5.0] * 3 if i < n_clear else [9.9] * 3, 0.1, length=i),
                timed("b", [10.0] * 3, 0.1, length=i),
            )
        ]

    assert only(FASTER, rows(3)).verdict == "agrees"
    assert only(FASTER, rows(2)).verdict == "not clear"
    assert "3 of 5 differences are not beyond it" in sentence(only(FASTER, rows(2)))


def test_a_stage_without_repeats_is_judged_by_the_noisiest_other() -> None:
    other = [timed("c", [1.0], 0.3, stage="stress"), timed("c", [1.0], 0.2, stage="stress", length=9)]
    assert only(FASTER, [timed("a", [8.0]), timed("b", [10.0]), *other]).verdict == "not clear"
    assert only(FASTER, [timed("a", [7.0]), timed("b", [10.0]), *other]).verdict == "agrees"


def stress(policy: str, length: int, seconds: list[float], again: bool = False) -> list[dict[str, Any]]:
    return [
        {"series": "length", "policy": policy, "length": length, "batch": 1, "again": again, "status": "ok", "repeat": i,
         "tpot_s": s, "ttft_s": 1.0}
        for i, s in enumerate(seconds)
    ]  # fmt: skip


def test_floors_are_of_the_point_and_at_least_the_typical_one() -> None:
    twice = {256: 1.1, 512: 1.3, 1024: 3.0}
    records = [
        r for n, by in twice.items() for r in (*stress("full", n, [0.010]), *stress("full", n, [0.010 * by], again=True))
    ]
    floors = {key[1]: found["tpot_ms"] for key, found in floors_of_stress(records).items()}
    assert floors == {256: pytest.approx(1 - 1 / 1.3), 512: pytest.approx(1 - 1 / 1.3), 1024: pytest.approx(2 / 3)}
    assert floors_of_stress(records)[False, 256, 1]["speedup"] == floors[256]
    assert floors_of_stress(stress("full", 256, [0.01])) == {(False, 256, 1): {}}
    times = times_of_points([*stress("a", 256, [0.01, 0.02]), *stress("full", 256, [0.01], again=True)])
    assert times == {(False, "a", 256, 1): {"tpot_ms": {"0": 0.01, "1": 0.02}, "ttft_s": {"0": 1.0, "1": 1.0}}}


def test_floors_of_runs_are_of_the_noisiest_policy() -> None:
    runs = [{"full": {"tpot_ms": 10.0}, "a": {"tpot_ms": 5.0}}, {"full": {"tpot_ms": 10.5}, "a": {"tpot_ms": 6.0}}]
    assert floors_of_runs(runs) == {"tpot_ms": pytest.approx(0.2), "speedup": pytest.approx(0.2)}
    assert floors_of_runs(runs[:1]) == {}


def test_perplexities_are_compared_segment_by_segment() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(2.5, 0.5, 8)  # texts differ much, policies little
    better = row("a", {"perplexity": 12.0}, {"perplexity": list(base)})
    worse = row("b", {"perplexity": 12.2}, {"perplexity": list(base + 0.01 + 0.001 * rng.normal(size=8))})
    found = judge("perplexity", better, worse)
    assert found.size == 2
    assert found.difference is not None
    gaps = [worse.samples["perplexity"][s] - better.samples["perplexity"][s] for s in better.samples["perplexity"]]
    assert found.difference.mean == pytest.approx(math.expm1(np.mean(gaps)))
    assert judge("perplexity", worse, better).size == -2
    assert "on the same segments" in sentence(only(Direction("a reads better", "perplexity", "a", "b"), [better, worse]))


def test_segments_are_nats_per_token() -> None:
    lines = [
        {"policy": "a", "sample": "x", "status": "ok", "n": 4, "nll": 8.0},
        {"policy": "b", "sample": "x", "status": "oom"},
    ]
    assert by_segment(lines) == {"a": {"perplexity": {"x": 2.0}}}


def test_two_names_of_one_policy_cannot_be_decided() -> None:
    figures = {"nll": 1.2345678901, "accuracy": 0.25, "effective_context": 68.0, "tpot_ms": 3.0}
    a, b = row("K_64", figures, {"accuracy": [0.5, 0.0]}), row("B_64", {**figures, "tpot_ms": 9.0}, {"accuracy": [0.5, 0.0]})
    finding = only(Direction("K wins", "accuracy", "K_64", "B_64"), [a, b])
    assert finding.verdict == "same policy"
    text = sentence(finding)
    assert text.startswith(
        "Cannot be decided here: K wins. K_64 and B_64 are the same policy when counted alike: both keep 68 entries"
    )
    near = row("B_64", {**figures, "nll": 1.2345678902}, {"accuracy": [0.5, 0.0]})
    assert not is_same(a, near)
    assert only(Direction("K wins", "accuracy", "K_64", "B_64"), [a, near]).verdict == "not clear"
    # Equal scores at the floor are no proof: nothing that tells policies apart was measured.
    assert not is_same(row("a", {"accuracy": 0.0, "kept": 5.0}), row("b", {"accuracy": 0.0, "kept": 5.0}))
    assert verdict("accuracy", []) == "not measured"


def test_unequal_memory_is_said_over_all_pairs() -> None:
    def pair(length: int, kept: float) -> list[ResultRow]:
        return [
            row("a", {"accuracy": 0.9, "kept": kept}, length=length),
            row("b", {"accuracy": 0.8, "kept": 10.0}, length=length),
        ]

    direction = Direction("a beats b", "accuracy", "a", "b")
    text = sentence(only(direction, [*pair(1, 10.0), *pair(2, 30.0), *pair(3, 15.0)]))
    assert "unequal memory in 2 of 3 pairs, at most: 30 against 10 % kept" in text
    assert "unequal memory: 30 against 10 % kept" in sentence(only(direction, pair(2, 30.0)))
    assert "unequal" not in sentence(only(direction, [*pair(1, 10.0), *pair(2, 10.0), *pair(3, 10.0)]))
    assert "unequal" not in sentence(only(Direction("a holds less", "kept", "a", "b"), pair(2, 30.0)))


NUMBERS = [
    Reference("c4096", "score", "longbench", 0.34, ""),
    Reference("c1024", "score", "longbench", 0.30, "whole run"),
    Reference("c512", "score", "longbench", 0.28, ""),
    Reference("full", "peak_mb", "", 20685.0, ""),
    Reference("c2048", "score", "longbench", 0.32, ""),
]


def test_the_studys_numbers_stand_beside_ours_at_any_scale() -> None:
    direction = Direction("more is better", "accuracy", "c128", "c48", study=("c4096", "c1024"))
    rows = [
        row("c128", {"accuracy": 0.5}, {"accuracy": [0.4, 0.6]}),
        row("c48", {"accuracy": 0.4, "score": 0.1}, {"accuracy": [0.3, 0.5]}),
        row("full", {"peak_mb": 29.0}),
    ]
    finding = only(direction, rows, NUMBERS)
    assert finding.theirs is not None
    assert finding.theirs.gap == pytest.approx(0.04)
    assert "in the study score 0.34 with c4096, 0.3 with c1024 on longbench" in sentence(finding)
    lines = reference_lines(study(direction), NUMBERS, rows)
    assert [line[0] for line in lines] == ["c4096", "c1024", "full", "2 further numbers"]
    assert lines[0][3:5] == ["0.34", "0.50"]
    assert lines[0][6] == "here c128, answer accuracy"
    assert lines[1][4] == "0.10"  # the same metric goes first
    assert lines[1][6] == "theirs: whole run; here c48"
    assert "--scale full" in lines[-1][6]
    assert "--scale full" not in reference_lines(study(direction, scale="full"), NUMBERS, rows)[-1][6]
    assert only(Direction("x", "accuracy", "c128", "c48"), rows, NUMBERS).theirs is None


def test_intervals_of_rows_are_those_of_every_table() -> None:
    from kvtool.analysis.resampling import change_interval

    each = {"full": {"score": {f"s{i}": 1.0 for i in range(12)}}, "a": {"score": {f"s{i}": float(i > 2) for i in range(12)}}}
    found = intervals(each, "a", {})
    want = change_interval(np.asarray([float(i > 2) for i in range(12)]), np.ones(12))
    assert found["score_change"] == Value(want.mean, want.low, want.high)
    assert found["score"] is not None
    assert found["score"].low is not None
    assert found["score"].low > 0.4
    whole = intervals(each, "full", {})["score"]
    assert whole is not None
    assert whole.low is not None
    assert whole.low < 0.8  # twelve right answers are no certainty


YAML = """\
study: s
models: {embedded: tiny}
tasks: [niah]
lengths: [64]
retentions: [20%]
policies: {A: snapkv, B: h2o}
stages: [capture, infer]
reference: numbers.csv
directions:
  - {say: A wins, metric: accuracy, better: A, worse: B, study: [c4096, c1024]}
"""


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("[c4096, c1024]", "[c4096]", "1 labels; give two"),
        ("[c4096, c1024]", "[c4096, c102]", "names 'c102'.*Did you mean 'c1024'"),
        ("reference: numbers.csv\n", "", "has no 'reference'"),
    ],
)
def test_what_a_direction_stands_for_is_checked(tmp_path: Path, old: str, new: str, words: str) -> None:
    (tmp_path / "numbers.csv").write_text("label,metric,text,value,note\nc4096,score,,0.34,\nc1024,score,,0.3,\n")
    assert parse_study(YAML, "full", str(tmp_path / "s.yaml")).directions[0].study == ("c4096", "c1024")
    with pytest.raises(ConfigError, match=words):
        parse_study(YAML.replace(old, new), "full", str(tmp_path / "s.yaml"))


@pytest.mark.parametrize(
    ("value", "metric", "said"),
    [
        (Value(0.013, 0.0004, 0.03), "accuracy", "+0.0130 (+0.0004 to +0.0300)"),
        (Value(0.13, 0.04, 0.23), "accuracy", "+0.13 (+0.04 to +0.23)"),
        (Value(0.0, 0.0, 0.1), "accuracy", "+0.00 (+0.00 to +0.10)"),
        (Value(0.0012, -0.00003, 0.0023), "perplexity", "+0.120 % (-0.003 to +0.230 %)"),
        (Value(0.5), "tpot_ms", "+50.0 %"),
    ],
)
def test_an_end_that_decides_does_not_read_as_zero(value: Value, metric: str, said: str) -> None:
    assert amount(value, metric) == said
