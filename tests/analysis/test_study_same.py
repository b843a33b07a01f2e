"""Lines that coincide, entries that are one policy, titles that are one of a kind, and labels that are not cut."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kvtool.analysis.look_figures import redraw
from kvtool.analysis.points import make_place
from kvtool.analysis.study import StudyData
from kvtool.analysis.study_figures import study_figures
from kvtool.analysis.study_report import Group, _distinct
from kvtool.analysis.study_same import same_entries, same_words
from kvtool.analysis.study_series import series_figures
from kvtool.analysis.style import Figure, alike_words, apart, coinciding

N = 6


def record(policy: str, index: int, accuracy: float, heads: list[list[int]]) -> dict[str, Any]:
    method, _, budget = policy.partition(":budget=")
    return {
        "sample": f"s{index}", "policy": policy, "method": method, "budget": budget or None, "retention": 0.1, "entries": 10.0,
        "seq_len": 100, "compress_at": "prompt", "status": "ok", "message": None, "degenerate": False, "metric": "exact",
        "score": float(accuracy > 0.5), "answer_accuracy": accuracy, "kv_bytes_prompt_end": 10, "kv_bytes_full": 100,
        "slack_bytes": 0, "tpot_s": 0.01, "head_entries": heads, "meta": {},
    }  # fmt: skip


def data(curves: dict[str, dict[str, float]], heads: dict[str, list[list[int]]] | None = None) -> StudyData:
    """A study of one workload; accuracy of prompt i is the given one, less i percent."""
    records = [record("full", i, 1.0, [[100, 100]]) for i in range(N)]
    for method, points in curves.items():
        kept = (heads or {}).get(method, [[10, 10]])
        records += [record(f"{method}:budget={b}", i, a - i / 100, kept) for b, a in points.items() for i in range(N)]
    place = make_place(records, "m", task="t", length=100)
    assert place is not None
    return StudyData("s", "small", "", (place,), ({},), [], [])


def of_rows(rows: list[dict[str, Any]], nodes: list[dict[str, Any]] | None = None) -> StudyData:
    return StudyData("s", "small", "", (), (), rows, nodes or [])


ALIKE = {"hace": {"5%": 0.5, "10%": 0.8}, "hace-head": {"5%": 0.5, "10%": 0.8}, "cake": {"5%": 0.3, "10%": 0.4}}


def test_entries_that_are_one_policy_are_named() -> None:
    assert same_entries(data(ALIKE)) == {("hace", "hace-head"): ["m, t, 100 tokens"]}
    assert "hace = hace-head (m, t, 100 tokens)" in same_words(data(ALIKE))[0]
    # Equal figures with other entries kept, or equal at one budget only, are not one policy.
    assert same_entries(data(ALIKE, {"hace-head": [[5, 15]]})) == {}
    assert same_entries(data({**ALIKE, "hace-head": {"5%": 0.5, "10%": 0.7}})) == {}


def test_all_right_or_all_wrong_tells_nothing() -> None:
    records = [record(p, i, 1.0, [[10, 10]]) for p in ("full", "a:budget=5%", "b:budget=5%") for i in range(N)]
    place = make_place(records, "m")
    assert place is not None
    assert same_entries(StudyData("s", "small", "", (place,), ({},), [], [])) == {}


def row(label: str, perplexity: float, context: float = 64.0) -> dict[str, Any]:
    return {
        "stage": "perplexity", "series": "", "model": "m", "task": "text", "length": 1000, "group": "G", "label": label, "also": "",
        "policy": label, "note": "", "n": 4000, "perplexity": perplexity, "perplexity_low": perplexity - 1,
        "perplexity_high": perplexity + 1, "next_token_accuracy": 0.5, "effective_context": context,
    }  # fmt: skip


FLAT = [row(f"G_conf{c}_base64", 16.0) for c in (0.3, 0.5, 0.7)]


def test_thresholds_that_change_nothing_are_said_in_warning_and_figure() -> None:
    assert list(same_entries(of_rows(FLAT))) == [tuple(r["label"] for r in FLAT)]
    caption = next(f.caption for f in series_figures(of_rows(FLAT)) if f.name == "confidence_0")
    assert "All thresholds of base 64 are the same policy here" in caption
    other = [*FLAT[:2], row("G_conf0.7_base64", 15.0)]
    caption = next(f.caption for f in series_figures(of_rows(other)) if f.name == "confidence_0")
    assert "All thresholds" not in caption
    assert "G_conf0.3_base64 = G_conf0.5_base64" in caption


def test_coinciding_lines_are_seen_and_named() -> None:
    caption = next(f for f in study_figures(data(ALIKE)) if f.name == "score_retention_0").caption
    assert "The same at every point: hace = hace-head" in caption
    assert "over 6 prompts" in caption
    assert coinciding({"a": {1: 0.5, 2: 0.6}, "b": {1: 0.5, 2: 0.6, 3: 1.0}, "c": {1: 0.5}, "d": {1: 0.5, 2: 0.7}}) == [
        ["a", "b"]
    ]
    assert alike_words({"x": [["a", "b"]], "y": []}) == " The same at every point: a = b (x)."
    assert alike_words({"x": []}) == ""
    moved = np.array([apart([1.0, 10.0, 100.0], i, 5, 100.0) for i in range(5)])
    assert (np.diff(moved, axis=0) > 0).all()
    assert moved[2].tolist() == [1.0, 10.0, 100.0]
    assert np.log(moved[-1] / moved[0]) == pytest.approx(0.05 * np.log(100))


def stress(stage: str, label: str, length: int) -> dict[str, Any]:
    return {
        "stage": stage, "series": "length", "model": "m", "task": None, "length": length, "batch": 1, "label": label, "policy": label,
        "note": "", "n": 2, "kv_mb": 0.0 if label == "no KV cache" else length / 100, "tpot_ms": 3.0,
    }  # fmt: skip


def test_titles_say_what_is_shown() -> None:
    rows = [stress(s, p, n) for s, p in (("stress", "full"), ("no_cache", "no KV cache"), ("again", "full")) for n in (64, 128)]
    nodes = [{"stage": s, "kind": k} for s, k in (("stress", "stress"), ("no_cache", "no_cache"), ("again", "stress"))]
    drawn = series_figures(of_rows(rows, nodes))
    assert [f.title for f in drawn] == [
        "Memory and speed: m, by length of the prompt, stage stress",
        "Without a KV cache: m, by length of the prompt",
        "Memory and speed: m, by length of the prompt, stage again",
    ]
    assert "KV cache (MB)" in drawn[0].svg
    assert "KV cache (MB)" not in drawn[1].svg  # nothing in it: no panel


def test_two_stages_on_one_cell_have_two_titles() -> None:
    one = data(ALIKE)
    twice = replace(one, places=tuple(replace(one.places[0], stage=s) for s in ("infer", "quantised")), predicted=({}, {}))
    titles = [f.title for f in study_figures(twice)]
    assert len(titles) == len(set(titles)) == 4
    same = Group("g", "G", [], [Figure("a", "T", "", "", "", {}), Figure("b", "T", "", "", "", {})])
    _distinct([same])
    assert [f.title for f in same.figures] == ["T", "T (2)"]


LONG = "head_windows:budget=own,positional={},mixed=128,gathering=128,base=128,confidence=0.0,decode=evict,extra_{}=1"


def changes() -> str:
    lines = [[LONG.format(n, "x" * n), 0.1 * n, -0.1 * n, -0.2 * n, 0.0, 0.01, "full"] for n in (1, 2, 3)]
    buffer = io.StringIO()
    header = ["policy", "retention", "score", "score_low", "score_high", "score_p_holm", "baseline"]
    csv.writer(buffer, lineterminator="\n").writerows([header, *lines])
    return buffer.getvalue()


def test_long_labels_are_whole() -> None:
    from matplotlib.image import imread

    figure = redraw("changes", changes())
    assert figure is not None
    picture = imread(io.BytesIO(figure.files["png"]))[..., :3]
    for edge in (picture[:, :3], picture[:, -3:], picture[:3], picture[-3:]):
        assert edge.min() > 0.99  # nothing touches the edges, so nothing is cut there
    named = redraw("changes", changes(), {LONG.format(1, "x"): ("Short one", "group")})
    assert named is not None
    assert ">Short one (10 %)<" in named.svg
    assert "All of them: mixed=128" in figure.caption


def test_figures_are_the_same_again_from_their_own_data() -> None:
    figure = redraw("changes", changes())
    assert figure is not None
    again = redraw("changes", figure.data)
    assert again is not None
    assert (again.data, again.files["png"]) == (figure.data, figure.files["png"])
