"""``kvtool analyze cliffs``: tables and figure of performance cliffs, and what to run to see them closer."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtool.analysis.cliffs import LOSS, Cliff, between, fewest_lost, figure_name, find_cliffs, percent
from kvtool.analysis.load import Simulation, load_simulation
from kvtool.analysis.points import FIGURES, NLL, make_place
from kvtool.analysis.style import GREY, Figure, apart, figure_legend, line_style, log_axis, make_figure, span_of
from kvtool.analysis.tabular import Cell, Table, number, spread, words
from kvtool.errors import ConfigError, DataError
from kvtool.executors.records import read_units
from kvtool.files import read_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

Rows = Mapping[str, Mapping[str, Any]]
#: Settings that must be the same for two runs to be one curve.
SAME = ("model", "fingerprint", "task", "length", "seed", "n", "compress_at", "prompts", "generate", "dtype")
HOW = (
    "Loss: what is missing of the full cache's score on the same prompts, in % of it; of texts, by how much perplexity is above the "
    f"full cache's. Critical: the first retention, from high to low, that loses more than {LOSS:.0%} with an interval above 0."
)
READ = (
    "No clear loss at: the lowest retention tried above the critical one, or the lowest at all. The prompts did not show a loss there, "
    "which does not say that there is none: beside it stands what the loss may be, by its 95 % interval, and the smallest loss that so "
    f"many prompts would have shown. Bracket of {LOSS:.0%}: from the highest retention whose whole interval is above it to the lowest "
    "from which on all intervals are below it; an end that is not shown is left out. Largest drop: the steepest fall between two "
    "neighbouring retentions. In brackets: entries per head, of policies with a number of their own."
)
#: A smallest visible loss of so many times the tolerance is worth a warning.
FAR = 2.0
#: Panels of the figure, at most.
MOST_PANELS = 12


@dataclass(frozen=True, slots=True)
class CliffSummary:
    """What the command found.

    Attributes
    ----------
    cliffs : tuple of Cliff
    table : Table
    commands : tuple of str
        To look closer where the curves fall.
    notes : tuple of str
    files : Path
    """

    cliffs: tuple[Cliff, ...]
    table: Table
    commands: tuple[str, ...]
    notes: tuple[str, ...]
    files: Path

    def text(self) -> str:
        """Return what the command prints."""
        parts = [self.table.text(), *self.notes]
        parts += ["look closer where the curves fall:", *(f"  {line}" for line in self.commands)] if self.commands else []
        return "\n".join([*parts, f"written: {self.files}"])

    def facts(self) -> list[dict[str, Any]]:
        """Return one record per cliff, for JSON."""
        return [cliff_facts(cliff) for cliff in self.cliffs]


def cliff_facts(cliff: Cliff) -> dict[str, Any]:
    """Return a cliff as plain values."""
    place, drop = cliff.place, cliff.drop
    return {
        **{key: getattr(place, key) for key in ("model", "task", "length", "compress_at")},
        **{key: getattr(cliff, key) for key in ("label", "method", "figure", "critical", "safe", "back", "shows")},
        "n": len(place.samples),
        "held": None if cliff.held is None else dataclasses.asdict(cliff.held),
        "surely": {"more": cliff.surely[0], "within": cliff.surely[1], "words": cliff.between_words()},
        "curve": [
            {"policy": p.policy, "retention": p.retention, "entries": p.entries, "loss": i.mean, "low": i.low, "high": i.high}
            for p, i in cliff.curve
        ],
        "drop": None if drop is None else {"above": drop.above, "below": drop.below, "loss": drop.loss.mean},
        "reason": None if cliff.reason is None else cliff.reason.text(),
        "between": between(cliff),
    }


def run_cliffs(folders: Sequence[Path], simulations: Sequence[Path], out: Path, refine: int = 0) -> CliffSummary:
    """Find the cliffs of runs; runs of the same prompts are one curve.

    Parameters
    ----------
    folders, simulations : sequence of Path
        Of ``kvtool infer`` and ``kvtool simulate``.
    out : Path
    refine : int
        Further retentions to propose per fall.

    Raises
    ------
    DataError
        Damaged folders, or nothing that has a curve.
    ConfigError
        A simulation of other cells than the runs'.
    """
    groups: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
    for folder in folders:
        config = read_run(folder)["config"]
        groups.setdefault(str([config.get(key) for key in SAME]), []).append((folder, config))
    predicted = [load_simulation(folder) for folder in simulations]
    cliffs, commands, used = list[Cliff](), list[str](), set[int]()
    for group in groups.values():
        config = group[0][1]
        records = {(r["sample"], r["policy"]): r for folder, _ in group for r in read_units(folder)}
        place = make_place(
            list(records.values()), str(config.get("model")), task=config.get("task"), length=config.get("length")
        )
        if place is not None:
            mine = [i for i, s in enumerate(predicted) if _belongs(s, config)]
            used |= set(mine)
            found = find_cliffs(place, {row["policy"]: row for i in mine for row in predicted[i].rows})
            cliffs += found
            commands += [command] if refine and (command := infer_command(found, config, group[0][0], refine)) else []
    other = [str(s.folder) for i, s in enumerate(predicted) if i not in used]
    if other:
        raise ConfigError(f"{', '.join(other)}: of another model, task, length or view of the question than the runs")
    if not cliffs:
        raise DataError(
            f"no method in {', '.join(map(str, folders))} was run at two retentions beside a full cache that scores above 0: no curve"
        )
    return write_cliffs(cliffs, commands, out)


def _belongs(simulation: Simulation, config: Mapping[str, Any]) -> bool:
    there = simulation.config
    same = all(there.get(key) == config.get(key) for key in ("task", "length", "compress_at"))
    return same and there.get("model", {}).get("fingerprint") == config.get("fingerprint")


def write_cliffs(cliffs: Sequence[Cliff], commands: Iterable[str], out: Path) -> CliffSummary:
    """Write table and figures into a folder."""
    table = cliff_table(cliffs)
    table.save(out)
    for figure in cliff_figures(cliffs):
        figure.save(out)
    return CliffSummary(tuple(cliffs), table, tuple(commands), tuple(too_few(cliffs)), out)


def too_few(cliffs: Sequence[Cliff]) -> list[str]:
    """Return a line if the prompts of some cliffs cannot show a loss of the size that counts, by far."""
    found = []
    for figure, (_, name) in FIGURES.items():
        mine = [c for c in cliffs if c.figure == figure and c.shows is not None and c.shows > FAR * LOSS]
        if not mine:
            continue
        seen = sorted(c.shows for c in mine if c.shows is not None)
        counts = sorted({len(c.place.samples) for c in mine})
        what = "segments" if figure == NLL else "prompts"
        n = " to ".join(dict.fromkeys(str(count) for count in (counts[0], counts[-1])))
        size = " to ".join(dict.fromkeys(f"{100 * loss:.0f}" for loss in (seen[0], seen[-1])))
        found.append(
            f"cliffs by {name}: {n} {what} show no loss below {size} %, and {LOSS:.0%} is what counts: where a curve has no clear loss, "
            f"much may be lost; showing {LOSS:.0%} takes about {enough(mine)} {what}"
        )
    return found


def enough(cliffs: Sequence[Cliff], least: float = LOSS) -> int:
    """Return about how many prompts would show a loss of `least`.

    Counted, of scores that are 0 or 1; the reach of other intervals shrinks with the root of their number.
    """
    return max(
        counted_enough(max(0.01, c.right), least)
        if c.right is not None
        else math.ceil(len(c.place.samples) * ((c.shows or 0.0) / least) ** 2)
        for c in cliffs
    )


@lru_cache(maxsize=256)
def counted_enough(right: float, least: float) -> int:
    """Return the fewest prompts of which the full cache answers the share `right` that show a loss of `least` in scores of 0 or 1."""
    n = 1
    while (shown := fewest_lost(n, round(n * right))) is None or shown > least:
        n = max(n + 1, int(1.02 * n))
    return n


def cliff_table(cliffs: Sequence[Cliff]) -> Table:
    """Return one row per method and cell."""
    several = {key: len({getattr(c.place, key) for c in cliffs}) > 1 for key in ("model", "task", "length", "compress_at")}
    keys = [key for key, shown in several.items() if shown]
    by = len({c.figure for c in cliffs}) > 1
    header = (
        "method",
        *(key.replace("compress_at", "compressed at") for key in keys),
        *(["loss of"] if by else []),
        "critical retention",
        "no clear loss at",
        "loss there, % (95 %)",
        "smallest loss that shows, %",
        f"bracket of {LOSS:.0%}",
        "largest drop",
        "loss in it, %",
    )
    reasons = any(c.reason for c in cliffs)
    rows = [_cells(cliff, keys, by, reasons) for cliff in cliffs]
    figures = ", ".join(dict.fromkeys(figure_name(c) for c in cliffs))
    how = f"{HOW} {READ} Figure: {figures}."
    return Table("cliffs", "Where each method begins to lose", how, (*header, "reason") if reasons else header, tuple(rows))


def _cells(cliff: Cliff, keys: Sequence[str], by: bool, reasons: bool) -> tuple[Cell, ...]:
    facts = [getattr(cliff.place, key) for key in keys]
    drop, n = cliff.drop, len(cliff.place.samples)
    what = "segments" if cliff.figure == NLL else "prompts"
    cells = [
        words(cliff.label, cliff.method),
        *(number(fact, 0) if isinstance(fact, int) else words(fact) for fact in facts),
        *([words(figure_name(cliff))] if by else []),
        Cell(cliff.where(), cliff.critical if cliff.critical is not None else 0.0),
        Cell("–", None) if cliff.safe is None else Cell(cliff.at(cliff.safe), cliff.safe),
        spread(cliff.held, 1 if cliff.figure == NLL else 0, 100.0),
        Cell("–", None) if cliff.shows is None else Cell(f"{100 * cliff.shows:.2g} ({n} {what})", cliff.shows),
        words(cliff.between_words()),
        Cell("–", None) if drop is None else Cell(f"{percent(drop.above)} → {percent(drop.below)}", drop.below),
        spread(None if drop is None else drop.loss, 1 if cliff.figure == NLL else 0, 100.0),
    ]
    return (*cells, words(cliff.reason.text() if cliff.reason else None)) if reasons else tuple(cells)


def infer_command(cliffs: Sequence[Cliff], config: Mapping[str, Any], folder: Path, n: int) -> str:
    """Return the command line that runs the proposed retentions on the same prompts; empty where nothing falls."""
    policies = [at_retention(cliff.method, value) for cliff in cliffs for value in between(cliff, n)]
    if not policies:
        return ""
    parts = ["kvtool", "infer", "-m", str(config.get("model")), "-t", str(config.get("task")), "-n", str(config.get("n"))]
    parts += ["--length", str(config["length"])] if config.get("length") else []
    parts += ["--seed", str(config.get("seed", 0)), "--compress-at", str(config.get("compress_at"))]
    parts += [] if config.get("generate", True) else ["--no-generate"]
    parts += [item for policy in policies for item in ("-p", policy)]
    target = folder.with_name(f"{folder.name}-refined")
    again = shlex.join(["kvtool", "analyze", "cliffs", str(folder), str(target)])
    return f"{shlex.join([*parts, '-o', str(target)])} && {again}"


def at_retention(method: str, retention: float) -> str:
    """Return a policy's text form at a retention."""
    return f"{method}{',' if ':' in method else ':'}budget={percent(retention)}"


def cliff_figures(cliffs: Sequence[Cliff]) -> list[Figure]:
    """Draw the cliffs of scores, and those of texts, as far as there are any."""
    scores, texts = ([c for c in cliffs if (c.figure == NLL) is reading] for reading in (False, True))
    return [figure for group in (scores, texts) if (figure := cliff_figure(group)) is not None]


def cliff_figure(cliffs: Sequence[Cliff], most: int = MOST_PANELS) -> Figure | None:
    """Loss against retention, one panel per cell, the critical retention ringed; the cells with the largest drops, if there are many.

    All of one figure: losses of scores and of perplexities have no common scale.
    """
    places: dict[int, list[Cliff]] = {}
    for cliff in cliffs:
        places.setdefault(id(cliff.place), []).append(cliff)
    if not places:
        return None
    texts = cliffs[0].figure == NLL
    order = sorted(places.values(), key=lambda group: -max(c.drop.loss.mean if c.drop else 0.0 for c in group))
    shown = [group for group in places.values() if any(group is one for one in order[:most])]
    labels = list(dict.fromkeys(cliff.label for cliff in cliffs))
    columns = min(3, len(shown))
    lines = -(-len(shown) // columns)

    def draw(canvas: Canvas) -> None:
        grid = canvas.subplots(lines, columns, squeeze=False, sharey=True).ravel()
        for axes, group in zip(grid, shown, strict=False):
            _panel(axes, group, labels)
        for axes in grid[len(shown) :]:
            axes.set_axis_off()
        for axes in grid[::columns]:
            axes.set_ylabel("perplexity above full (%)" if texts else "loss against full (%)")
        figure_legend(canvas, list(grid))

    caption = f"{HOW} Rings: critical retentions; dashes: {LOSS:.0%}; bars: 95 % intervals over {_counts(shown, texts)}."
    caption += f" {len(shown)} of {len(places)} cells, those with the largest drops." if len(shown) < len(places) else ""
    size = (max(6.0, 3.6 * columns), 2.6 * lines + 0.9)
    name, title = (
        ("cliff_texts", "Where methods begin to lose, texts") if texts else ("cliff_curves", "Where methods begin to lose")
    )
    return make_figure(name, title, caption, _data(cliffs), draw, size, font_size=9)


def _counts(shown: Sequence[Sequence[Cliff]], texts: bool) -> str:
    """Say over how many prompts, or pieces of a text, a loss is a mean."""
    counts = sorted({len(group[0].place.samples) for group in shown})
    what = "pieces of a text" if texts else "prompts"
    return f"{counts[0]} {what}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} {what}"


def _panel(axes: Axes, group: Sequence[Cliff], labels: Sequence[str]) -> None:
    from kvtool.analysis.cliffs import asked

    span = span_of(asked(point) for cliff in group for point, _ in cliff.curve)
    for cliff in group:
        # Curves that coincide are moved apart a little, so that all of them can be seen.
        x = apart([100 * asked(point) for point, _ in cliff.curve], labels.index(cliff.label), len(labels), span)
        y = [100 * loss.mean for _, loss in cliff.curve]
        style = line_style(cliff.label, labels)
        axes.plot(x, y, label=cliff.label, linewidth=1.2, **style)
        sides = [(100 * i.low, 100 * i.high) for _, i in cliff.curve]
        axes.vlines(x, [low for low, _ in sides], [high for _, high in sides], color=style["color"], linewidth=0.7, alpha=0.45)
        if cliff.critical is not None:
            at = next(i for i, (point, _) in enumerate(cliff.curve) if asked(point) == cliff.critical)
            axes.plot(x[at], y[at], marker="o", markersize=10, markerfacecolor="none", color=style["color"])
    axes.axhline(100 * LOSS, color=GREY, linestyle="--", linewidth=0.8)
    log_axis(axes, [100 * asked(point) for cliff in group for point, _ in cliff.curve], 6)
    place = group[0].place
    axes.set_title(f"{place.model}, {place.task}, {place.length}", fontsize=8)
    axes.set_xlabel("retention (%)")


def _data(cliffs: Sequence[Cliff]) -> tuple[list[str], list[list[Any]]]:
    header = [
        "model",
        "task",
        "length",
        "compress_at",
        "method",
        "policy",
        "retention",
        "loss",
        "loss_low",
        "loss_high",
        "critical",
    ]
    lines = [
        [
            c.place.model,
            c.place.task,
            c.place.length,
            c.place.compress_at,
            c.label,
            p.policy,
            p.retention,
            i.mean,
            i.low,
            i.high,
            c.critical,
        ]
        for c in cliffs
        for p, i in c.curve
    ]
    return header, lines
