"""Tables once, in every form: Markdown, CSV with unrounded figures, LaTeX with booktabs, aligned text, and for the report."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kvtool.analysis.statistics import Interval
from kvtool.naming import short_paths
from kvtool.textgrid import csv_text, grid, latex_grid, markdown_grid, save_tables

_NUMBER = r"([+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?)"
_UNIT = r"(%|×|ms/token|tokens/s|ms|s|KB|MB|GB|nats)?"
#: A figure and nothing else: with a unit, an interval, or both.
_FIGURE = re.compile(rf"{_NUMBER}\s?{_UNIT}(?:\s?\({_NUMBER}(?: to |-|–){_NUMBER}\))?\s?{_UNIT}")


@dataclass(frozen=True, slots=True)
class Measure:
    """A figure in the unit in which it is shown.

    Attributes
    ----------
    mean : float
    unit : str
        As it stands behind the figure; empty where the heading says it.
    low, high : float or None
        Ends of its interval.
    """

    mean: float
    unit: str = ""
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell.

    Attributes
    ----------
    text : str
        As shown.
    value : float, str or None
        Unrounded; text for cells of text, None for nothing.
    title : str
        The whole of what `text` shortens, or ``""``.
    exact : Measure, optional
        The figure unrounded, in the unit in which it is shown; default: as read from the text, if that is a figure and nothing else.
    """

    text: str
    value: float | str | None
    title: str = ""
    exact: Measure | None = None

    @property
    def number(self) -> bool:
        """Whether this is a figure, which stands to the right."""
        return not isinstance(self.value, str)

    def short(self) -> Cell:
        """Return the cell with the ends of paths only."""
        if "/" not in f"{self.text}{self.title}{self.value}":
            return self
        value = short_paths(self.value) if isinstance(self.value, str) else self.value
        return replace(self, text=short_paths(self.text), value=value, title=short_paths(self.title))

    @property
    def measure(self) -> Measure | None:
        """The figure for CSV; None for text and for nothing."""
        return self.exact if self.exact is not None or not self.number else _measure(self.text)


@dataclass(frozen=True, slots=True)
class Table:
    """A table.

    Attributes
    ----------
    name, title, how : str
        File name without ending; heading; how to read it.
    header : tuple of str
    rows : tuple of tuple of Cell
    wanted : int
        Columns that a page shows at first, counted from the left; 0: all.
    """

    name: str
    title: str
    how: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    wanted: int = 0

    def text(self) -> str:
        """Return the table aligned, for the terminal."""
        return grid(self.header, self._shown())

    def markdown(self) -> str:
        """Return the table as Markdown."""
        return markdown_grid(self.header, self._shown())

    def csv(self) -> str:
        """Return the table as CSV: figures unrounded in the unit of their heading, ends of intervals beside them, else the text."""
        columns = [_column(head, [row[i] for row in self.rows]) for i, head in enumerate(self.header)]
        header = [head for heads, _ in columns for head in heads]
        return csv_text(header, [[cell for _, lines in columns for cell in lines[i]] for i in range(len(self.rows))])

    def latex(self) -> str:
        """Return a tabular for booktabs; figures stand to the right."""
        numbers = [bool(self.rows) and all(row[i].number for row in self.rows) for i in range(len(self.header))]
        return latex_grid(self.header, self._shown(), self.title, numbers)

    def short(self) -> Table:
        """Return the table with the ends of paths only."""
        return replace(self, rows=tuple(tuple(cell.short() for cell in row) for row in self.rows))

    def save(self, folder: Path) -> None:
        """Write NAME.md, NAME.csv and NAME.tex."""
        page = f"# {self.title}\n\n{self.how}\n\n{self.markdown()}\n"
        save_tables(folder, self.name, self.title, [("", (self.header, self._shown()))], self.csv(), markdown=page)

    def _shown(self) -> list[list[str]]:
        return [[cell.text for cell in row] for row in self.rows]


def words(text: str | None, title: str = "") -> Cell:
    """Return a cell of text."""
    return Cell(text or "–", text or "", title)


def number(value: float | None, digits: int = 2, factor: float = 1.0, sign: bool = False, unit: str = "") -> Cell:
    """Return a cell of a figure, shown in another unit by `factor`."""
    if value is None or value != value:
        return Cell("–", None)
    shown = value if factor == 1.0 else value * factor
    return Cell(_figure(shown, digits, sign) + unit, value, exact=Measure(shown, unit.strip()))


def spread(value: Interval | None, digits: int = 2, factor: float = 1.0, sign: bool = False) -> Cell:
    """Return a cell of a figure with its interval."""
    if value is None or value.mean != value.mean:
        return Cell("–", None)
    mean, low, high = value.mean * factor, value.low * factor, value.high * factor
    known = low == low and high == high
    ends = f" ({_figure(low, digits, sign)} to {_figure(high, digits, sign)})" if known else ""
    exact = Measure(mean, low=low if known else None, high=high if known else None)
    return Cell(_figure(mean, digits, sign) + ends, value.mean, exact=exact)


def plain_table(name: str, title: str, how: str, header: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    """Return a table of texts; a cell that is a figure, and nothing else, is read as one."""
    return Table(name, title, how, tuple(header), tuple(tuple(_read(text) for text in line) for line in lines))


def _read(text: str) -> Cell:
    if text in ("-", "–", ""):
        return Cell("–", None)
    found = _measure(text)
    return Cell(text, text) if found is None else Cell(text, found.mean, exact=found)


def _measure(text: str) -> Measure | None:
    """Read a text that is a figure and nothing else."""
    found = _FIGURE.fullmatch(text.strip().replace("−", "-"))
    if found is None:
        return None
    mean, unit, low, high, after = found.groups()
    ends = (None, None) if low is None else (float(low), float(high))
    return Measure(float(mean), unit or after or "", *ends)


def _column(head: str, cells: Sequence[Cell]) -> tuple[list[str], list[list[float | str | None]]]:
    """Return headings and lines of a column as CSV.

    One unit for all figures goes into the heading, if it is not there already; where units differ, cells with one stay text. Nothing
    but a figure is made into one.
    """
    units = {found.unit for cell in cells if (found := cell.measure) is not None}
    unit = units.pop() if len(units) == 1 else ""
    name = f"{head} ({unit})" if unit and unit not in head else head
    read = [found if (found := cell.measure) is not None and found.unit == unit else None for cell in cells]
    mean = [_text(cell) if found is None else found.mean for cell, found in zip(cells, read, strict=True)]
    if all(found is None or found.low is None for found in read):
        return [name], [[value] for value in mean]
    ends = [(None, None) if found is None else (found.low, found.high) for found in read]
    return [name, f"{name} low", f"{name} high"], [[value, *pair] for value, pair in zip(mean, ends, strict=True)]


def _text(cell: Cell) -> str | None:
    """Return a cell that is no figure as CSV has it."""
    if isinstance(cell.value, str):
        return cell.value
    return None if cell.text == "–" else cell.text


def _figure(value: float, digits: int, sign: bool) -> str:
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")
