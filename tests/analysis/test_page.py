"""Pages of reports: what stands in them, and, in headless Chromium, how they behave under a reader's hands."""

from __future__ import annotations

import html
import importlib.util
import json
import re
import sys
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import kvtool
from kvtool.analysis.page import FIRST_ROWS, render_page
from kvtool.analysis.study_report import Group
from kvtool.analysis.style import Figure
from kvtool.analysis.tabular import Table, number, words

N = 300
EVIL = '</script><b title="x">&amp;'


def long_table() -> Table:
    """N rows whose figures are a permutation; every third of method ``beta``, one cell with signs that mean something in HTML."""
    rows = tuple(
        (
            words(EVIL if i == N - 1 else "beta" if i % 3 == 0 else "alpha", f"policy {i}"),
            number(float(i * 7 % N), 1),
            words(f"row {i}"),
        )
        for i in range(N)
    )
    return Table("long", "Long", "", ("method", "value", "what"), rows)


def figure(name: str, elements: int) -> Figure:
    parts = "\n".join(f'<path d="M {i} 0\nL {i} 50" stroke="#0072B2"/>' for i in range(elements))
    start = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 300 60" role="img">'
    svg = f'{start}{parts}<text x="5" y="9">100 % \'a\' &amp; b</text></svg>'
    return Figure(name, f"Figure {name}", "How to read it.", svg, "x\n1\n", {})


def page_text() -> str:
    short = Table("short", "Short", "", ("method", "value"), tuple((words(f"m{i}"), number(float(i))) for i in range(7)))
    groups = [
        Group("a", "Tables", [short, long_table()]),
        Group("b", "Figures", [], [figure("small", 10), figure("large", 3000)]),
        Group("d", "Broad", [Table("broad", "Broad", "", ("a", "b", "c", "d"), ((words("x"),) * 4,), wanted=2)]),
        Group("c", "Folded", folded=[Table("fold", "Fold", "", ("what", "value"), short.rows)]),
    ]
    values: dict[str, Any] = {
        "name": "n",
        "scale": "small",
        "headline": "Run it.",
        "details": ["why"],
        "facts": [("Models", "m")],
    }
    return render_page(
        "study.html.j2", groups=groups, sections=[("a", "Tables")], warnings=["beware"], provenance="{}", **values
    )


def test_long_tables_stand_partly_in_the_page_and_wholly_in_its_data() -> None:
    page = page_text()
    inside = re.search(r'<table id="t-long".*?</table>', page, re.S)
    assert inside is not None
    assert inside[0].count("<tr>") == FIRST_ROWS + 1
    data = re.search(r'<script type="application/json" id="t-long-rows">(.*?)</script>', page, re.S)
    assert data is not None
    rest = json.loads(data[1])
    assert [[cell.text for cell in row] for row in long_table().rows[FIRST_ROWS:]] == [
        [cell if isinstance(cell, str) else cell[0] for cell in row] for row in rest
    ]
    assert f"The first <span>{FIRST_ROWS}</span> of <span>{N}</span> rows" in page


def test_large_figures_are_pictures_that_hold_the_same_drawing() -> None:
    page = page_text()
    assert page.count("<svg xmlns") == 2  # the small one, and within the picture of the large one
    found = re.search(r"<img [^>]*? src='data:image/svg\+xml;charset=utf-8,(.*?)'>", page, re.S)
    assert found is not None
    assert urllib.parse.unquote(html.unescape(found[1])) == figure("large", 3000).svg.replace("\n", " ")


def browser() -> ModuleType:
    path = Path(kvtool.__file__).parent / "benchmarks" / "chromium.py"
    spec = importlib.util.spec_from_file_location("kvtool_chromium", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tab() -> Iterator[Any]:
    made = browser()
    if made.find_chromium() is None:
        pytest.skip("no Chromium here")
    with made.chromium() as page:
        yield page


@pytest.fixture
def opened(tab: Any, tmp_path: Path) -> Any:
    path = tmp_path / "report.html"
    path.write_text(page_text(), encoding="utf-8")
    tab.scripting(True)
    tab.errors.clear()
    tab.requests.clear()
    tab.open(path)
    return tab


TEXTS = "Array.from(document.querySelectorAll('#t-long tbody tr'), r => r.cells[{}].textContent.trim())"
CHOOSE = (
    "(() => {{ const box = document.querySelector('[data-for=t-long] {}'); box.value = '{}'; "
    "box.dispatchEvent(new Event('input')); }})()"
)
BUTTON = "document.querySelectorAll('#t-long th button')[{}]"


def test_nothing_is_asked_for_and_nothing_goes_wrong(opened: Any) -> None:
    opened.run("document.querySelector('#large img').scrollIntoView()")
    opened.run("document.querySelector('#large img').decode()")
    assert opened.run("document.querySelector('#large img').naturalWidth") > 0
    assert opened.errors == []
    assert len(opened.requests) == 1
    assert opened.requests[0].startswith("file:")


def test_sorting_covers_rows_that_are_not_shown(opened: Any) -> None:
    opened.run(BUTTON.format(1) + ".click()")
    up = [float(text) for text in opened.run(TEXTS.format(1))]
    assert up == [float(i) for i in range(len(up))]
    opened.run(BUTTON.format(1) + ".click()")
    down = [float(text) for text in opened.run(TEXTS.format(1))]
    assert down == [float(N - 1 - i) for i in range(len(down))]
    assert opened.run("document.querySelectorAll('#t-long th')[1].getAttribute('aria-sort')") == "descending"


def test_scrolling_shows_the_other_rows(opened: Any) -> None:
    for _ in range(5):
        opened.run(
            "new Promise(done => { const box = document.querySelector('#t-long').closest('.scroll'); box.scrollTop = box.scrollHeight;"
            " requestAnimationFrame(() => requestAnimationFrame(() => done(1))); })"
        )
    assert opened.run(TEXTS.format(2)) == [f"row {i}" for i in range(N)]
    assert opened.run(TEXTS.format(0))[-1] == EVIL


def test_filters_by_word_and_by_value(opened: Any) -> None:
    opened.run(CHOOSE.format("input", "ROW 29"))
    assert opened.run(TEXTS.format(2)) == ["row 29", *(f"row {i}" for i in range(290, 300))]
    opened.run(CHOOSE.format("select", "beta"))
    assert opened.run(TEXTS.format(2)) == ["row 291", "row 294", "row 297"]
    assert opened.run("document.querySelector('[data-for=t-long] output').value") == f"3 of {N} rows"


@pytest.mark.parametrize("key", ["Enter", " "])
def test_the_keyboard_reaches_sorts_and_shows_where_it_is(opened: Any, key: str) -> None:
    for _ in range(40):
        opened.press("Tab")
        if opened.run(f"document.activeElement === {BUTTON.format(1)}"):
            break
    assert opened.run(f"document.activeElement === {BUTTON.format(1)}")
    assert opened.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    opened.press(key)
    assert opened.run(TEXTS.format(1))[:3] == ["0.0", "1.0", "2.0"]


@pytest.mark.parametrize("key", ["Enter", " "])
def test_further_columns_are_a_key_away(opened: Any, key: str) -> None:
    seen = "Array.from(document.querySelectorAll('#t-broad thead th')).filter(t => t.offsetWidth > 0).length"
    assert opened.run(seen) == 2
    opened.run("document.querySelector('[data-for=t-broad] button').focus()")
    opened.press(key)
    assert opened.run(seen) == 4
    opened.press(key)
    assert opened.run(seen) == 2


def test_without_scripts_the_first_rows_are_there(opened: Any, tmp_path: Path) -> None:
    opened.scripting(False)
    opened.open(tmp_path / "report.html")
    tree = opened.call("DOM.getDocument", depth=-1)["root"]["nodeId"]
    rows = opened.call("DOM.querySelectorAll", nodeId=tree, selector="#t-long tbody tr")["nodeIds"]
    opened.scripting(True)
    assert len(rows) == FIRST_ROWS


@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_is_as_wide_as_the_window(opened: Any, tmp_path: Path, width: int) -> None:
    opened.open(tmp_path / "report.html", width)
    assert opened.run("document.documentElement.scrollWidth") == width


def test_nothing_lies_beyond_the_paper(opened: Any, tmp_path: Path) -> None:
    opened.media(kind="print")
    opened.size(720)  # of A4, in CSS pixels, less margins
    boxes = "Array.from(document.querySelectorAll('table, svg, img'), e => e.getBoundingClientRect())"
    beyond = f"{boxes}.filter(b => b.width && b.right > 720)"
    assert opened.run(f"{beyond}.length") == 0
    assert opened.run("document.documentElement.scrollWidth") == 720


def test_light_dark_and_printed(opened: Any, tmp_path: Path) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    assert opened.run(paper) == "rgb(255, 255, 255)"
    opened.run("document.getElementById('theme').click()")
    assert opened.run(paper) == "rgb(20, 23, 29)"
    opened.open(tmp_path / "report.html", dark=True)
    assert opened.run(paper) == "rgb(20, 23, 29)"
    opened.media(dark=True, kind="print")
    assert opened.run(paper) == "rgb(255, 255, 255)"
    assert opened.run("getComputedStyle(document.querySelector('.tools')).display") == "none"
    opened.pdf(tmp_path / "printed.pdf")
    assert (tmp_path / "printed.pdf").read_bytes().startswith(b"%PDF")
