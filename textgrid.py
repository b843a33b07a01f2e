"""Tables as text: aligned for the terminal, as Markdown, as LaTeX and as CSV; and every table of a stage as files."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvtool.files import write_text

#: Header and rows, as shown.
Lines = tuple[Sequence[str], Sequence[Sequence[str]]]
#: What LaTeX reads as a command, and how it is written instead.
_TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "→": r"$\rightarrow$",
    "±": r"$\pm$",
    "≤": r"$\leq$",
    "×": r"$\times$",
    "−": "$-$",
    "–": "--",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}


def grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an aligned table: the first column to the left, numbers to the right."""
    table = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    lines = []
    for row in table:
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def markdown_grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return the table as Markdown; a bar within a cell stays one."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in [header, *rows]]
    return "\n".join("| " + " | ".join(row) + " |" for row in [cells[0], ["---"] * len(header), *cells[1:]])


def latex_grid(
    header: Sequence[str], rows: Sequence[Sequence[str]], title: str = "", numbers: Sequence[bool] | None = None
) -> str:
    """Return the table as a tabular for booktabs.

    Parameters
    ----------
    header, rows : sequences of str
    title : str
        As a comment above it.
    numbers : sequence of bool, optional
        Columns that stand to the right; default: all whose cells begin with a figure.
    """
    if numbers is None:
        numbers = [bool(rows) and all(_begins_with_figure(row[i]) for row in rows) for i in range(len(header))]
    columns = "".join("r" if number else "l" for number in numbers)
    lines = [f"% {title}; needs \\usepackage{{booktabs}}", f"\\begin{{tabular}}{{{columns}}}", "\\toprule"]
    lines += [_tex_line(header), "\\midrule", *(_tex_line(row) for row in rows)]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def csv_text(header: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """Return a table as CSV; None and NaN are empty cells."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerows([header, *(["" if cell is None or cell != cell else cell for cell in line] for line in lines)])
    return buffer.getvalue()


def save_tables(
    folder: Path,
    name: str,
    title: str,
    tables: Sequence[tuple[str, Lines]],
    data: str | None = None,
    notes: Sequence[str] = (),
    markdown: str | None = None,
) -> list[Path]:
    """Write the tables of a stage: ``NAME.md`` and ``NAME.tex`` as shown, ``NAME.csv`` with unrounded figures; returns the files.

    Parameters
    ----------
    folder : Path
    name : str
        Of the files, without ending.
    title : str
    tables : sequence of (str, (header, rows))
        Heading, or ``""``, and the table as shown.
    data : str, optional
        Unrounded, as CSV; default: the first table as shown.
    notes : sequence of str
        How to read them; in the LaTeX file as comments.
    markdown : str, optional
        A page that says more than tables and notes.
    """
    parts = [f"# {title}"] + ["\n".join(f"- {note}" for note in notes)] * bool(notes)
    for heading, (header, rows) in tables:
        parts += [f"## {heading}"] * bool(heading) + [markdown_grid(header, rows)]
    remarks = "".join(f"% {line}\n" for note in (title, *notes) for line in note.splitlines())
    tex = [latex_grid(header, rows, heading or title) for heading, (header, rows) in tables]
    if data is None:
        data = csv_text(*tables[0][1]) if tables else ""
    texts = {"md": markdown or "\n\n".join(parts) + "\n", "csv": data, "tex": remarks + "\n" + "\n".join(tex)}
    for ending, text in texts.items():
        write_text(folder / f"{name}.{ending}", text)
    return [folder / f"{name}.{ending}" for ending in texts]


def _begins_with_figure(cell: str) -> bool:
    """Whether a cell is a figure, or says that there is none."""
    start = cell.strip().lstrip("+-−<")
    return cell.strip() in ("", "-", "–") or start[:1].isdigit()


def _tex_line(cells: Sequence[str]) -> str:
    return " & ".join("".join(_TEX.get(sign, sign) for sign in cell) for cell in cells) + r" \\"


def figure(value: float | None, digits: int = 3) -> str:
    """Return a number with `digits` decimals, or ``-`` where nothing was measured (None or NaN)."""
    return "-" if value is None or value != value else f"{value:.{digits}f}"
