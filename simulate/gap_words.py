"""What `kvtool analyze gaps` says: tables and sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import numpy as np

from kvtool.policies.shapes import SHAPES
from kvtool.simulate.gap_rows import NOTHING, GapRow, ShapeRow
from kvtool.simulate.gaps import PARTS, Part
from kvtool.textgrid import Lines, grid

WORDS: dict[Part, str] = {
    "allocation": "how the budget is shared",
    "price": "what the shape of the budgets costs",
    "selection": "which entries are kept",
    "protection": "what is protected",
}
assert set(WORDS) == set(get_args(Part))


def number(value: float) -> str:
    """Return three significant digits without an exponent."""
    if abs(value) < 5e-4:
        return "0"
    return f"{value:.{max(0, 2 - int(np.floor(np.log10(abs(value)))))}f}"


def table(rows: Sequence[GapRow]) -> str:
    """Return the table of all configurations, for the terminal."""
    return grid(*table_lines(rows))


def table_lines(rows: Sequence[GapRow]) -> Lines:
    """Return header and lines of the table of all configurations."""
    header = ["policy", "kept", "shape", "harm", "oracle", *PARTS, "explained by"]
    lines = []
    for row in rows:
        if row.harm is None or row.oracle is None:
            lines.append([row.policy, f"{100 * row.retention:.2f}%", row.shape, *["-"] * (2 + len(PARTS)), row.status])
            continue
        parts = [number(row.parts[name].mean) for name in PARTS]
        said = " + ".join(f"{name} {100 * row.share(name):.0f}%" for name in row.explains) or "nothing is lost"
        said += ", adapts" if row.adapts else ""
        said += ", degenerate" if row.degenerate else ""
        said += ", yardstick" if row.yardstick else ""
        figures = [number(row.harm.mean), number(row.oracle.mean), *parts, said]
        lines.append([row.policy, f"{100 * row.retention:.2f}%", row.shape, *figures])
    return header, lines


def shape_table(rows: Sequence[ShapeRow]) -> str:
    """Return the least harm of every shape, by ranking and budget, for the terminal."""
    return grid(*shape_lines(rows))


def shape_lines(rows: Sequence[ShapeRow]) -> Lines:
    """Return header and lines of the table of shapes."""
    shapes = [shape for shape in SHAPES if any(shape in row.harm for row in rows)]
    lines = [
        [row.scorer, row.budget, *(number(row.harm[shape]) if shape in row.harm else "-" for shape in shapes)] for row in rows
    ]
    return ["ranking", "budget", *shapes], lines


def budgets_of(rows: Sequence[GapRow]) -> dict[str, list[GapRow]]:
    """Return the real policies with figures by budget, in the order of the rows."""
    found: dict[str, list[GapRow]] = {}
    for row in rows:
        if row.loss is not None and not row.yardstick:
            name = row.budget or f"own budget of {100 * row.retention:.2f}%"
            found.setdefault(f"{name} entries" if name.isdigit() else name, []).append(row)
    return found


def sentences(rows: Sequence[GapRow]) -> list[str]:
    """Say per budget what explains most of the loss, and whatever the figures need to be read with."""
    said = [_of_budget(budget, members) for budget, members in budgets_of(rows).items()]
    able = [row for row in rows if row.loss is not None and not row.yardstick]
    if lucky := [row for row in able if row.loss and row.loss.high < -NOTHING]:
        said.append(
            f"{len(lucky)} of {len(able)} do less harm than the oracle ({lucky[0].policy}, ...): future attention is the best ranking of "
            "what is attended to, not of what the answer hangs on"
        )
    negative = [row for row in able if any(part.high < -NOTHING for part in row.parts.values())]
    if negative:
        names = sorted({name for row in negative for name, part in row.parts.items() if part.high < -NOTHING})
        adapting = sum(row.parts["allocation"].high < -NOTHING for row in negative)
        said.append(
            f"{len(negative)} of {len(able)} have a part below zero ({', '.join(names)})"
            + (f"; {adapting} fit their budgets to each prompt, better than the best common ones" if adapting else "")
        )
    if any(row.scaled for row in able):
        said.append("prompts or totals differ: best budgets are those of the longest prompt, scaled")
    if loose := [row for row in able if row.slack > NOTHING]:
        worst = max(loose, key=lambda row: row.slack)
        said.append(
            f"{len(loose)} of {len(able)} have best budgets that are not proved to be the best; they could do up to "
            f"{number(worst.slack)} less harm ({worst.policy})"
        )
    return said


def _of_budget(budget: str, rows: Sequence[GapRow]) -> str:
    losses = sum(row.loss.mean for row in rows if row.loss)
    if losses <= NOTHING:
        return f"{budget}: nothing is lost against the oracle"
    shares = {name: sum(row.parts[name].mean for row in rows) / losses for name in PARTS}
    first, second = sorted(PARTS, key=lambda name: -shares[name])[:2]
    largest = sum(max(PARTS, key=lambda name: row.parts[name].mean) == first for row in rows)
    most = "explains most of the loss" if shares[first] > 0.5 else "explains the largest part of the loss"
    among = f", the largest part in {largest} of {len(rows)} policies" if len(rows) > 1 else ""
    return (
        f"{budget}: {first} ({WORDS[first]}) {most}, {100 * shares[first]:.0f} %{among}; "
        f"then {second} ({WORDS[second]}), {100 * shares[second]:.0f} %"
    )
