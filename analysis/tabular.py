"""Tables once, in every form: Markdown, CSV with unrounded figures, LaTeX with booktabs, aligned text, and for the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvtool.analysis.statistics import Interval
from kvtool.textgrid import csv_text, grid, latex_grid, markdown_grid, save_tables


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell.

    Attributes
    ----------
    text : str
        As shown.
    value : float, str or None
        Unrounded, for CSV and for sorting; None sorts last.
    title : str
        The whole of what `text` shortens, or ``""``.
    """

    text: str
    value: float | str | None
    title: str = ""

    @property
    def order(self) -> str:
        """What the report sorts by, as an attribute: empty for nothing."""
        return "" if self.value is None or self.value != self.value else str(self.value)

    @property
    def number(self) -> bool:
        """Whether this is a figure, which stands to the right."""
        return not isinstance(self.value, str)


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
        """Return the table as CSV, figures unrounded."""
        return csv_text(self.header, [[cell.value for cell in row] for row in self.rows])

    def latex(self) -> str:
        """Return a tabular for booktabs; figures stand to the right."""
        numbers = [bool(self.rows) and all(row[i].number for row in self.rows) for i in range(len(self.header))]
        return latex_grid(self.header, self._shown(), self.title, numbers)

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
    return Cell(_figure(value * factor, digits, sign) + unit, value)


def spread(value: Interval | None, digits: int = 2, factor: float = 1.0, sign: bool = False) -> Cell:
    """Return a cell of a figure with its interval."""
    if value is None or value.mean != value.mean:
        return Cell("–", None)
    low, high = value.low * factor, value.high * factor
    ends = "" if low != low else f" ({_figure(low, digits, sign)} to {_figure(high, digits, sign)})"
    return Cell(_figure(value.mean * factor, digits, sign) + ends, value.mean)


def plain_table(name: str, title: str, how: str, header: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    """Return a table of texts; a cell that begins with a number is sorted by it."""
    return Table(name, title, how, tuple(header), tuple(tuple(_read(text) for text in line) for line in lines))


def _read(text: str) -> Cell:
    start = text.replace("−", "-").split(" ")[0].rstrip("%")
    try:
        return Cell(text, float(start))
    except ValueError:
        return Cell("–", None) if text in ("-", "") else Cell(text, text)


def _figure(value: float, digits: int, sign: bool) -> str:
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")
