"""What a study's report warns of, and how policies and pictures are named in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvtool.analysis.plain import short_names
from kvtool.analysis.points import make_place
from kvtool.analysis.study import StudyData
from kvtool.analysis.study_pictures import links, pictures
from kvtool.analysis.study_tables import own_tables
from kvtool.analysis.study_warnings import full_twice, warnings
from kvtool.analysis.style import inline
from kvtool.files import append_records, write_json, write_text

SAMPLES = [f"s{i}" for i in range(12)]


def record(sample: str, policy: str, right: int, **changes: Any) -> dict[str, Any]:
    method, _, budget = policy.partition(":budget=")
    hit = float(SAMPLES.index(sample) < right)
    return {
        "sample": sample, "policy": policy, "method": method, "budget": budget or None, "retention": 0.1, "entries": 10.0,
        "seq_len": 100, "compress_at": "prompt", "status": "ok", "message": None, "degenerate": False, "metric": "exact",
        "score": hit, "answer_accuracy": hit, "kv_bytes_prompt_end": 10, "kv_bytes_full": 100, "slack_bytes": 0,
        "tpot_s": 0.01, "meta": {}, **changes,
    }  # fmt: skip


def study(policies: dict[str, int], rows: list[dict[str, Any]] | None = None, **more: Any) -> StudyData:
    changes = more.pop("changes", {})
    records = [record(s, p, right, **changes.get(p, {})) for s in SAMPLES for p, right in policies.items()]
    place = make_place(records, "m")
    assert place is not None
    return StudyData("s", "small", "", (place,), ({},), rows or [], [], **more)


GOOD = {"full": 12, "snapkv:budget=10%": 12, "random:budget=10%": 1}


def said(data: StudyData, start: str) -> list[str]:
    return [line for line in warnings(data) if line.startswith(start)]


def test_a_clean_study_has_no_warnings() -> None:
    assert warnings(study(GOOD)) == []


def test_control_that_is_not_beaten_and_degenerate_points() -> None:
    assert said(study({**GOOD, "random:budget=10%": 11}), "not clearly above the random control")
    assert not said(study(GOOD), "not clearly above the random control")
    degenerate = study(GOOD, changes={"snapkv:budget=10%": {"degenerate": True}})
    assert said(degenerate, "1 degenerate points")
    row = {"label": "A_window_8", "note": "degenerate", "series": ""}
    assert said(study(GOOD, [row]), "degenerate over texts") == [
        "degenerate over texts or in stress tests (nothing left to choose): A_window_8"
    ]


def test_control_is_judged_by_the_figure_of_the_tables() -> None:
    better = {"answer_accuracy": 1.0}
    by_accuracy = study(GOOD, changes={"random:budget=10%": better})
    assert not said(by_accuracy, "not clearly above")
    by_score = study({**GOOD, "snapkv:budget=10%": 1}, changes={"snapkv:budget=10%": better})
    assert said(by_score, "not clearly above")[0].endswith("in task score (points, paired 95 % intervals): snapkv 1 of 1")
    unscored = study(GOOD, changes={policy: {"score": None, **better} for policy in GOOD})
    assert "in answer accuracy" in said(unscored, "not clearly above")[0]


def test_lazy_eviction_that_leaves_nothing_chosen_is_named() -> None:
    some, none = (f"h2o:budget=40,sink=4,window=16,decode=evict,interval={n}" for n in (20, 21))
    changes = {policy: {"method": policy, "budget": "40"} for policy in (some, none)}
    found = said(study({**GOOD, some: 12, none: 12}, changes=changes), "drops so many")
    assert len(found) == 1
    assert "interval=21" in found[0]
    assert "interval=20" not in found[0]


def test_cut_prompts_and_answers() -> None:
    cut = study(GOOD, changes={"full": {"meta": {"answer_truncated": True, "truncated": True}}})
    assert said(cut, "12 prompts have longer answers")
    assert said(cut, "12 prompts are longer than the limit")


def test_beyond_the_native_context_by_the_models_own_figure() -> None:
    def with_context(tokens: int) -> StudyData:
        return study(GOOD, provenance={"runs": {"infer m": {"provenance": {"model": {"max_positions": tokens}}}}})

    assert said(with_context(64), "beyond the model's native context")[0].endswith("m at 100 (its own 64)")
    assert said(with_context(100), "beyond") == []


def again(length: int, repeat: int, seconds: float, second: bool) -> dict[str, Any]:
    return {
        "series": "length", "policy": "full", "length": length, "batch": 1, "repeat": repeat, "again": second, "status": "ok",
        "tpot_s": seconds,
    }  # fmt: skip


def test_noise_floor_of_stress_tests_repeats_and_comparisons(tmp_path: Path) -> None:
    records = [again(64, r, 0.010 + 0.001 * r, False) for r in range(3)] + [again(64, r, 0.008, True) for r in range(3)]
    records += [again(128, 0, 0.02, False), {**again(128, 0, 0.05, True), "policy": "snapkv"}]
    assert full_twice(records) == [pytest.approx(0.011 / 0.008 - 1)]
    assert full_twice(records, pairs=True) == [pytest.approx(0.012 / 0.008 - 1)]
    slow_first = [again(64, 0, 0.02, False), again(64, 0, 0.01, True)]
    slow_last = [again(64, 0, 0.01, False), again(64, 0, 0.02, True)]
    assert full_twice(slow_first, pairs=True) == full_twice(slow_last, pairs=True) == [pytest.approx(1.0)]
    append_records(tmp_path / "stress" / "records.jsonl", records)
    write_json(tmp_path / "compare" / "compare.json", {"noise": [{"policy": "full", "identical": 0.75}]})
    rows = [{"label": "x", "series": "", "note": "", "tpot_ms": 11.0, "tpot_ms_low": 10.0, "tpot_ms_high": 12.0}]
    folders = {"stress": [("a", tmp_path / "stress")], "compare": [("c", tmp_path / "compare")]}
    line = said(study(GOOD, rows, folders=folders), "noise floor (A/A)")[0]
    assert "up to 20.0 % in time per token" in line
    assert (
        "measured twice at 1 points, differs by up to 50.0 % from itself (the largest pair; medians over its repeats by 37.5 %)"
        in line
    )
    assert "75 % of the records" in line
    single = [{"label": "x", "series": "", "note": "", "tpot_ms": 11.0}]
    assert said(study(GOOD, single), "nothing was measured twice")


def test_pictures_of_stages_come_with_their_files(tmp_path: Path) -> None:
    svg = '<?xml version="1.0"?><svg width="9pt" height="9pt" viewBox="0 0 72 36" xmlns="http://www.w3.org/2000/svg"><g id="a"/></svg>'
    write_text(tmp_path / "g" / "gaps.svg", svg)
    write_text(tmp_path / "g" / "gaps.csv", "policy,harm\nsnapkv,1.5\n")
    (tmp_path / "g" / "gaps.png").write_bytes(b"\x89PNG")
    write_text(tmp_path / "c" / "heads_reliability.svg", svg)
    write_text(tmp_path / "k" / "review.html", "<p>")
    folders = {
        "gaps": [("cell", tmp_path / "g")],
        "classify": [("heads", tmp_path / "c")],
        "consistency": [("k", tmp_path / "k")],
    }
    data = study(GOOD, folders=folders)
    gaps, labels = pictures(data, "gaps", "classify")
    assert gaps.title == "Gap decomposition: cell"
    assert gaps.endings == ["png", "svg", "csv"]
    assert (gaps.width, gaps.height) == (96, 48)
    gaps.save(tmp_path / "out")
    assert (tmp_path / "out" / "gaps_0_gaps.csv").read_text() == "policy,harm\nsnapkv,1.5\n"
    assert labels.name == "classify_0_heads_reliability"
    assert labels.endings == ["svg"]
    assert links(data, tmp_path / "report", "consistency") == [("k", "../k/review.html")]


def test_tables_of_stages_are_taken_by_their_titles() -> None:
    tables = [
        ("Why policies fall short of the oracle (predicted)", ["policy", "harm"], [["snapkv", "1.50"]]),
        ("other", ["x"], [["1"]]),
    ]
    found = own_tables(study(GOOD, tables=tables))
    assert [table.name for table in found] == ["gap_parts"]
    assert found[0].rows[0][1].value == 1.5


def test_policies_are_shown_without_paths_unless_they_differ_by_them() -> None:
    one = "hace:window=8,heads=/a/long/path/heads.json"
    assert short_names([one, "full", "snapkv:window=8"]) == {
        one: "hace:window=8",
        "full": "full",
        "snapkv:window=8": "snapkv:window=8",
    }
    two = "hace:heads=/b/x/heads.json,window=8"
    assert short_names([two])[two] == "hace:window=8"
    other = "hace:window=8,heads=/b/other/heads.json"
    assert short_names([one, other]) == {
        one: "hace:window=8,heads=path/heads.json",
        other: "hace:window=8,heads=other/heads.json",
    }
    assert short_names(["headkv:heads=/x/y.json"]) == {"headkv:heads=/x/y.json": "headkv"}
    point = make_place([record(s, "hace:heads=/x/heads.json:budget=10%", 3) for s in SAMPLES], "m")
    assert point is not None
    assert point.points[0].label == "hace"


def test_inlined_pictures_keep_what_is_drawn_and_drop_the_rest() -> None:
    svg = (
        '<?xml version="1.0"?>\n<svg width="9pt" height="9pt" viewBox="0 0 9 9">\n<metadata>x</metadata>\n<g id="axes_1">\n<g id="l1">\n'
        '<path d="M 10.123456 1.98765 L 2 2" clip-path="url(#p1)" style="fill: none; stroke: #0072b2; stroke-width: 0.7"/>\n'
        '<path d="M 3 3 L 4 4" clip-path="url(#p1)" style="fill: none; stroke: #0072b2; stroke-width: 0.7"/>\n'
        '<path d="M 5 5 L 6 6" clip-path="url(#p1)" style="fill: none; stroke: #d55e00; stroke-width: 0.7"/>\n</g>\n</g>\n'
        '<g id="t">\n<text style="font-size: 7px; font-family: Arial, sans-serif" transform="rotate(-0 1 1)">a</text>\n</g>\n'
        '<clipPath id="p1"><rect/></clipPath></svg>'
    )
    found = inline(svg, "f", 'T "x"')
    assert found.count("<path") == 2
    assert 'd="M 10.1 1.98 L 2 2 M 3 3 L 4 4"' in found
    assert 'id="f-0"' in found
    assert found.count("id=") == 1
    assert found.count("url(#f-0)") == 2
    assert found.count("Arial") == 1
    assert 'aria-label="T &quot;x&quot;"' in found
    assert "width=" not in found.split(">")[0]
