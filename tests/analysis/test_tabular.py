"""Tables as CSV: a figure in the unit of its heading with the ends of its interval, and every other text as it stands."""

from __future__ import annotations

import csv
import io

import pytest

from kvtool.analysis.statistics import Interval
from kvtool.analysis.tabular import Cell, Table, number, plain_table, spread, words


def read(table: Table) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(table.csv())))


@pytest.mark.parametrize(
    "text",
    [
        "256 entries of StreamingLLM beat the inverse",
        "10.57 / 38.72",
        "at or above 51.2 %",
        "10% -> 7.9%",
        "10% → 7.9%",
        "21 (24 prompts)",
        "21 % (24 prompts)",
        "above 80%",
        "13.99 (12.55-15.27) / 31.68 (28.60-34.07)",
        "clear in 5, holds in 5 of 5",
        "512 tokens",
        "1e",
    ],
)
def test_text_stays_text(text: str) -> None:
    assert read(plain_table("t", "T", "", ["a"], [[text]])) == [{"a": text}]
    table = Table("t", "T", "", ("a",), ((Cell(text, 0.512),),))
    assert read(table) == [{"a": text}]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("17.23 (15.52-18.60)", {"a": "17.23", "a low": "15.52", "a high": "18.6"}),
        ("-1.00 (-1.00 to -0.78)", {"a": "-1.0", "a low": "-1.0", "a high": "-0.78"}),
        ("+0.03 (−0.01 to +0.07)", {"a": "0.03", "a low": "-0.01", "a high": "0.07"}),
        ("17 (-2 to 33) %", {"a (%)": "17.0", "a (%) low": "-2.0", "a (%) high": "33.0"}),
        ("+141.2 %", {"a (%)": "141.2"}),
        ("7.9%", {"a (%)": "7.9"}),
        ("0.00", {"a": "0.0"}),
        ("-", {"a": ""}),
    ],
)
def test_figures_of_texts(text: str, expected: dict[str, str]) -> None:
    assert read(plain_table("t", "T", "", ["a"], [[text]])) == [expected]


def test_units_that_differ_stay_beside_their_figures() -> None:
    rows = read(plain_table("t", "T", "", ["by"], [["+141.2 %"], ["+0.03 (-0.01 to +0.07)"], ["–"], ["1 % or so"]]))
    assert [row["by"] for row in rows] == ["+141.2 %", "0.03", "", "1 % or so"]
    assert [row["by low"] for row in rows] == ["", "-0.01", "", ""]
    same = read(plain_table("t", "T", "", ["kept %"], [["50.78%"], ["at or above 51.2 %"]]))
    assert [row["kept %"] for row in same] == ["50.78", "at or above 51.2 %"]


def test_figures_are_unrounded_in_the_unit_of_the_heading() -> None:
    row = (number(0.01953125, 2, 100.0), number(0.0078912, 2, 1000.0), spread(Interval(1 / 3, 0.25, 0.5), 0, 100.0), words(""))
    (line,) = read(Table("t", "T", "", ("kept %", "ms/token", "loss, % (95 %)", "note"), (row,)))
    assert float(line["kept %"]) == pytest.approx(1.953125)
    assert float(line["ms/token"]) == pytest.approx(7.8912)
    found = [float(line[f"loss, % (95 %){end}"]) for end in ("", " low", " high")]
    assert found == pytest.approx([100 / 3, 25.0, 50.0])
    assert line["note"] == ""


def test_no_interval_no_columns_of_ends() -> None:
    nan = float("nan")
    (line,) = read(Table("t", "T", "", ("score",), ((spread(Interval(0.5, nan, nan)),),)))
    assert line == {"score": "0.5"}
