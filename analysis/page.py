"""What the pages of reports share: style, theme, tables that sort and filter, charts. One file each, no network.

Large tables and figures would keep a browser busy for seconds: of long tables the first rows stand in the page and the others beside them
as data, from which the page's script builds what is looked at; figures of thousands of lines are pictures, drawn when they come in sight.
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from kvtool.analysis.style import Figure
from kvtool.analysis.tabular import Cell, Table

DARK = (
    "color-scheme: dark; --ink: #e6e9ef; --soft: #a3acbd; --paper: #14171d; --card: #1d222b; --line: #343b48; --accent: #7cc0f5; "
    "--warn: #ffc978; --warnbg: #33270f; --good: #9be3b6; --bad: #ffb3ab; --mark: #1b3347;"
)
#: A cell of text that is longer may be broken over lines; `tables.js.j2` has the same figure.
LONG = 30
#: Longer tables show no policy texts under the pointer: they would be a tenth of the file.
MOST_TITLES = 500
#: Rows that stand in the page itself; a few more are not worth a second place.
FIRST_ROWS, FEW_MORE = 60, 20
#: Elements of a figure from which on it is a picture of its own, which the page does not hold as elements.
MANY_ELEMENTS = 300
#: Cells that begin with one of these words stand out.
MARKED = ("agrees", "differs", "recommended")
#: Columns that get a list of their values to choose from.
FACETS = ("method", "model", "task", "length", "compressed at", "stage", "state", "verdict", "metric", "run", "series", "batch")
TEMPLATES = ("study.html.j2", "report.html.j2", "parts.html.j2")
_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;"})


def render_page(template: str, **values: Any) -> str:
    """Return a page as HTML text.

    Parameters
    ----------
    template : str
        Of `TEMPLATES`.
    **values
        What it shows; everything is escaped but what is marked as safe.
    """
    from jinja2 import DictLoader, Environment

    folder = files("kvtool.analysis").joinpath("templates")
    read = {name: folder.joinpath(name).read_text(encoding="utf-8") for name in (*TEMPLATES, "study.css.j2", "tables.js.j2")}
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, loader=DictLoader(read))
    environment.globals.update(
        left=left,
        body=body,
        rest=rest,
        picture=picture,
        shown=shown,
        facets=FACETS,
        css=read["study.css.j2"].replace("{{ dark }}", DARK),
        js=read["tables.js.j2"],
    )
    environment.filters["percent"] = lambda v: "–" if v is None else f"{100 * v:.1f} %"
    environment.filters["figure"] = lambda v, digits=2: "–" if v is None or v != v else f"{v:.{digits}f}"
    return environment.get_template(template).render(**values).lstrip()


def left(table: Table) -> list[int]:
    """Columns of text, counted from 1."""
    rows = table.rows
    return [i + 1 for i in range(len(table.header)) if rows and all(isinstance(row[i].value, str) for row in rows)]


def shown(table: Table) -> int:
    """Return how many rows of a table stand in the page itself."""
    return len(table.rows) if len(table.rows) <= FIRST_ROWS + FEW_MORE else FIRST_ROWS


def body(table: Table) -> object:
    """Return the rows that stand in the page as HTML, escaped cell by cell, without what browsers fill in themselves."""
    from markupsafe import Markup

    titles = len(table.rows) <= MOST_TITLES
    lines = ["<tr>" + "".join(_cell(cell, titles) for cell in row) for row in table.rows[: shown(table)]]
    return Markup("\n".join(lines))


def rest(table: Table) -> object:
    """Return the other rows as JSON that is safe within a page: lists of texts, of (text, title) where there is more to say."""
    from markupsafe import Markup

    titles = len(table.rows) <= MOST_TITLES
    rows = [[[cell.text, found] if (found := _title(cell, titles)) else cell.text for cell in row] for row in table.rows]
    text = json.dumps(rows[shown(table) :], ensure_ascii=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace("],[", "],\n["))


def _title(cell: Cell, titles: bool) -> str:
    return cell.title if titles and cell.title != cell.text and len(cell.title) < 80 else ""


def _cell(cell: Cell, titles: bool) -> str:
    text = cell.text.translate(_ENTITIES)
    classes = [word for word in MARKED if cell.text.startswith(word)] + (["w"] if len(cell.text) > LONG else [])
    mark = f' class="{" ".join(classes)}"' if classes else ""
    found = _title(cell, titles)
    title = f' title="{found.translate(_ENTITIES)}"' if found else ""
    return f"<td{mark}{title}>{text}"


def picture(figure: Figure) -> object:
    """Return a figure as SVG in the page; one of many elements as a picture that is made when it comes in sight."""
    from markupsafe import Markup

    if figure.svg.count("<") // 2 < MANY_ELEMENTS:
        return Markup(figure.svg)
    # Within single quotes; an address takes neither line ends nor the two signs that mean something in it.
    address = figure.svg.replace("\n", " ").replace("%", "%25").replace("#", "%23").replace("&", "&amp;").replace("'", "&#39;")
    title = figure.title.translate(_ENTITIES)
    size = f'width="{figure.width}" height="{figure.height}"'
    return Markup(
        f'<img loading="lazy" decoding="async" {size} alt="{title}" src=\'data:image/svg+xml;charset=utf-8,{address}\'>'
    )
