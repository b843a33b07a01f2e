"""Names of policies for readers, and every table in three forms."""

from __future__ import annotations

import csv
import re
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from kvtool.naming import figure_names, method_of, shared_settings, short_name, wrapped
from kvtool.textgrid import latex_grid, markdown_grid, save_tables

LONG = "head_windows:budget=own,heads=/a/b/heads.json,positional=512,mixed=128,confidence=0.0,decode=evict"
OTHER = LONG.replace("positional=512", "positional=256")


def test_paths_and_budgets_are_left_out() -> None:
    assert short_name("headkv:heads=/x/y.json,budget=5%") == "headkv:budget=5%"
    assert method_of("headkv:heads=/x/y.json,budget=5%") == "headkv"
    assert method_of("snapkv:budget=5%,window=8") == "snapkv:window=8"


def test_what_all_share_is_said_once() -> None:
    assert shared_settings([LONG, OTHER, "full"]) == ["mixed=128", "confidence=0.0", "decode=evict"]
    assert figure_names([LONG, OTHER, "full"]) == {
        LONG: "head_windows:budget=own,positional=512",
        OTHER: "head_windows:budget=own,positional=256",
        "full": "full",
    }
    # One that lacks the setting: it tells them apart, and stays.
    assert shared_settings(["snapkv:window=8", "hace:window=8", "headkv"]) == []
    # Those with a name of their own do not count.
    assert figure_names([LONG, OTHER], {LONG: "I"})[LONG] == "I"


@st.composite
def policies(draw: st.DrawFn) -> list[str]:
    """Distinct policies, their settings in one order, as text forms have them."""
    values = st.dictionaries(
        st.sampled_from(["window", "sink", "budget", "heads"]), st.sampled_from(["8", "16", "/a/h", "/b/h"])
    )
    found = draw(st.lists(st.tuples(st.sampled_from(["snapkv", "h2o"]), values), max_size=6))
    return [name + (":" + ",".join(f"{k}={v[k]}" for k in sorted(v)) if v else "") for name, v in found]


@given(policies())
def test_names_never_make_two_policies_one(texts: list[str]) -> None:
    names = figure_names(texts)
    assert len(set(names.values())) == len(set(texts))


@given(st.text("ab_,: ", max_size=60), st.integers(4, 30))
def test_wrapping_changes_nothing_but_line_ends(name: str, width: int) -> None:
    found = wrapped(name, width)
    assert re.sub(r"\s", "", found) == re.sub(r"\s", "", name)
    assert all(len(line) <= width or not re.search(r"[ab][,:_ ]+[ab]", line) for line in found.split("\n"))


HEADER, ROWS = ["policy", "score", "note"], [["a_b|c", "0.5 (0.1 to 0.9)", "50 % & more"], ["d", "-", "{x} → y"]]


def test_markdown_and_latex_escape_what_they_read_as_signs() -> None:
    assert markdown_grid(HEADER, ROWS).splitlines()[2] == r"| a_b\|c | 0.5 (0.1 to 0.9) | 50 % & more |"
    tex = latex_grid(HEADER, ROWS, "T")
    assert r"\begin{tabular}{lrl}" in tex  # figures to the right
    assert r"a\_b\textbar{}c & 0.5 (0.1 to 0.9) & 50 \% \& more \\" in tex
    assert r"\{x\} $\rightarrow$ y" in tex
    for line in tex.splitlines():
        if line.endswith(r"\\"):
            assert len(re.findall(r"(?<!\\)&", line)) == len(HEADER) - 1


def test_every_table_comes_in_three_forms(tmp_path: Path) -> None:
    files = save_tables(tmp_path, "t", "Title", [("First", (HEADER, ROWS)), ("Second", (HEADER, ROWS))], None, ["read so"])
    assert [f.name for f in files] == ["t.md", "t.csv", "t.tex"]
    assert "## Second" in (tmp_path / "t.md").read_text()
    assert list(csv.reader((tmp_path / "t.csv").read_text().splitlines())) == [HEADER, *ROWS]
    tex = (tmp_path / "t.tex").read_text()
    assert tex.count(r"\begin{tabular}") == tex.count(r"\end{tabular}") == 2
    assert "% read so" in tex


def test_of_absolute_paths_the_end_stays() -> None:
    from kvtool.naming import short_paths, short_values

    heads = "head_windows:budget=own,heads=/tmp/out/study/nodes/classify-1/heads.json,decode=evict"
    assert short_paths(heads) == "head_windows:budget=own,heads=classify-1/heads.json,decode=evict"
    assert short_paths("report: /a/b/report/report.html; at 2%") == "report: report/report.html; at 2%"
    assert (
        short_paths("kvtool infer --shortlist /a/b/auto.yaml -o confirmed")
        == "kvtool infer --shortlist b/auto.yaml -o confirmed"
    )
    for same in ("10.57 / 38.72", "ms/token / full", "https://a.org/b/c", "nodes/a/b.json", "score % / kept %", "1/2/3"):
        assert short_paths(same) == same
    assert short_values({"/a/b/c": ["/x/y/z", 1, None]}) == {"b/c": ["y/z", 1, None]}
