"""report.html of a whole study: one self-contained file, the answer first, then the evidence; tables and figures beside it."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from kvtool.analysis.cliffs import Cliff, between, find_cliffs
from kvtool.analysis.cliffs_report import cliff_figures, cliff_table, too_few
from kvtool.analysis.page import render_page
from kvtool.analysis.reading import reading_answer
from kvtool.analysis.study import Choice, StudyData, choose, details, headline
from kvtool.analysis.study_figures import study_figures
from kvtool.analysis.study_heads import head_figures
from kvtool.analysis.study_pictures import left_out, links, pictures
from kvtool.analysis.study_series import series_figures
from kvtool.analysis.study_tables import answer_table, node_table, own_tables, point_table, score_table, series_table
from kvtool.analysis.study_warnings import warnings
from kvtool.analysis.style import Figure
from kvtool.analysis.tabular import Table
from kvtool.files import write_text
from kvtool.naming import short_paths, short_values

#: Sections by what the names of their figures begin with.
HEADS = ("heads_", "layers_")
TEXTS = ("perplexity_", "sinks_", "confidence_", "inverse_", "best_")

#: Results from which on a second process draws: below, starting it takes longer than the drawing.
MANY_POINTS = 400


@dataclass(frozen=True, slots=True)
class Group:
    """One section.

    Attributes
    ----------
    id, title : str
    tables, folded : list of Table
        Shown, and behind a fold.
    figures : list of Figure
    links : list of (str, str)
    """

    id: str
    title: str
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    folded: list[Table] = field(default_factory=list)
    links: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class StudyReport:
    """What the report says.

    Attributes
    ----------
    report : Path
    answer : str
    details, warnings, refine : tuple of str
        ``refine``: retentions worth adding.
    tables, figures : tuple of str
        Names of the files beside it.
    """

    report: Path
    answer: str
    details: tuple[str, ...]
    warnings: tuple[str, ...]
    refine: tuple[str, ...]
    tables: tuple[str, ...]
    figures: tuple[str, ...]

    def text(self) -> str:
        """Return what the command prints."""
        lines = [self.answer, *(f"  {line}" for line in self.details), *(f"warning: {line}" for line in self.warnings)]
        lines += [f"look closer: {line}" for line in self.refine]
        return "\n".join([*lines, f"report: {self.report.resolve()}"])


def write_report(data: StudyData, out: Path) -> StudyReport:
    """Write ``report.html``, ``tables/`` and ``figures/`` of a study into a folder."""
    choices = [choose(place) for place in data.places]
    cliffs = [
        cliff for place, predicted in zip(data.places, data.predicted, strict=True) for cliff in find_cliffs(place, predicted)
    ]
    cliffs += [cliff for place in data.texts for cliff in find_cliffs(place)]
    groups = [
        group for group in _groups(data, choices, cliffs, out) if group.tables or group.figures or group.folded or group.links
    ]
    notes = [*warnings(data), *too_few(cliffs)]
    _distinct(groups)
    for group in groups:
        group.tables[:], group.folded[:] = ([table.short() for table in tables] for tables in (group.tables, group.folded))
    for group in groups:
        for table in (*group.tables, *group.folded):
            table.save(out / "tables")
        for figure in group.figures:
            replace(figure, data=short_paths(figure.data)).save(out / "figures")
    answer, lines = _answer(data, choices)
    # Where the study ran says nothing to a reader of the report: of paths, their ends.
    render = _render(replace(data, provenance=short_values(data.provenance)), groups, answer, lines, notes)
    write_text(out / "report.html", render)
    return StudyReport(
        out / "report.html",
        answer,
        tuple(lines),
        tuple(notes),
        tuple(refinements(cliffs)),
        tuple(table.name for group in groups for table in (*group.tables, *group.folded)),
        tuple(figure.name for group in groups for figure in group.figures),
    )


def _answer(data: StudyData, choices: Sequence[Choice]) -> tuple[str, list[str]]:
    """Answer by what the study asks: by perplexity if its findings are about that, or if nothing was generated; and name the other."""
    read = reading_answer(data)
    answer, lines = headline(choices), details(choices)
    if read is None or (choices and data.asks != "perplexity"):
        return answer, lines + ([] if read is None else [f"by perplexity: {read[0]}"])
    return read[0], [*read[1], *([f"by the scores of answers: {answer}"] if choices else [])]


def _distinct(groups: Sequence[Group]) -> None:
    """Number figures that would go by the same title: nobody could say which of them is meant."""
    seen: Counter[str] = Counter()
    for group in groups:
        for place, figure in enumerate(group.figures):
            seen[figure.title] += 1
            if seen[figure.title] > 1:
                group.figures[place] = replace(figure, title=f"{figure.title} ({seen[figure.title]})")


def refinements(cliffs: Sequence[Cliff], n: int = 3) -> list[str]:
    """Return what to add to a study's retentions where curves fall; most wanted first, one line."""
    wanted: dict[float, int] = {}
    for cliff in cliffs:
        for value in between(cliff, n):
            digits = float(f"{value:.2g}")
            wanted[digits] = wanted.get(digits, 0) + 1
    best = sorted(sorted(wanted, key=lambda value: -wanted[value])[:6])
    if not best:
        return []
    values = ", ".join(f"{100 * value:.3g}%" for value in best)
    return [f"curves fall between grid values; add to the study's retentions: {values} (only what is new is run)"]


def _figures(data: StudyData) -> list[Figure]:
    """Draw all figures of results; those of heads beside the others, in a second process, where there are many points."""
    if sum(len(place.points) for place in data.places) < MANY_POINTS or (os.cpu_count() or 1) < 2:
        return [*study_figures(data), *head_figures(data), *series_figures(data)]
    # A fresh process: a fork of one that has threads (BLAS, torch) may hang.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as beside:
        heads = beside.submit(head_figures, data)
        curves, series = study_figures(data), series_figures(data)
        return [*curves, *heads.result(), *series]


def _groups(data: StudyData, choices: Sequence[Choice], cliffs: Sequence[Cliff], out: Path) -> list[Group]:
    figures = _figures(data)

    def named(*starts: str) -> list[Figure]:
        return [figure for figure in figures if figure.name.startswith(starts)]

    stages = {
        kind: list(dict.fromkeys(n["stage"] for n in data.nodes if n["kind"] == kind)) for kind in ("perplexity", "stress")
    }
    tables = {
        kind: series_table(data, names, kind, words)
        for (kind, names), words in zip(stages.items(), ("Perplexity", "Time and memory"), strict=True)
    }
    scores, own = score_table(data.places), {table.name: table for table in own_tables(data)}

    def mine(*names: str) -> list[Table]:
        return [own[name] for name in names if name in own]

    return [
        Group("answers", "What to run, by workload", [answer_table(choices)] if choices else []),
        Group("findings", "The study's findings, here", mine("findings"), folded=mine("reference")),
        Group(
            "scores",
            "Scores",
            [scores] if len(scores.header) > 6 else [point_table(data.places)] if data.places else [],
            named("score_"),
            [point_table(data.places)] if len(scores.header) > 6 else [],
        ),
        Group(
            "cliffs",
            "Performance cliffs",
            [*([cliff_table(cliffs)] if cliffs else []), *mine("refined")],
            cliff_figures(cliffs),
        ),
        Group("heads", "Heads", mine("hiv"), [*named(*HEADS), *pictures(data, "classify", "importance", "hiv")]),
        Group(
            "gaps", "Where the loss comes from", mine("gap_parts"), pictures(data, "gaps"), links=left_out(data, out, "gaps")
        ),
        Group("blocks", "Compensation", [], [*named("blocks_"), *pictures(data, "compensation")]),
        Group("texts", "Reading texts", [t for t in [tables["perplexity"]] if t], named(*TEXTS)),
        Group(
            "speed",
            "Memory and speed",
            [t for t in [tables["stress"]] if t],
            [*named("stress_"), *pictures(data, "stress")],
        ),
        Group("prediction", "Prediction beside reality", [], named("simulated_real"), links=links(data, out, "analyze")),
        Group("search", "Searched settings", [], pictures(data, "search")),
        Group(
            "compared",
            "Compared, and the answers' consistency",
            mine("metrics"),
            pictures(data, "compare", "consistency"),
            links=[*links(data, out, "consistency"), *left_out(data, out, "compare", "consistency")],
        ),
        Group("needles", "Needles by depth", [], pictures(data, "needles")),
        Group("run", "What was run", [], folded=[node_table(data)]),
    ]


def _render(data: StudyData, groups: Sequence[Group], answer: str, lines: Sequence[str], notes: Sequence[str]) -> str:
    sections = [
        *([("warnings", "Before you believe it")] if notes else []),
        *((g.id, g.title) for g in groups),
        ("provenance", "Provenance"),
    ]
    return render_page(
        "study.html.j2",
        name=data.name,
        scale=data.scale,
        headline=answer,
        details=lines,
        facts=_facts(data),
        sections=sections,
        warnings=notes,
        groups=groups,
        provenance=json.dumps(data.provenance, indent=1, ensure_ascii=False),
    )


def _facts(data: StudyData) -> list[tuple[str, str]]:
    places = data.places
    facts = [("Study", data.about)] if data.about else []
    models = list(dict.fromkeys([*(p.model for p in places), *(str(r["model"]) for r in data.rows)]))
    facts += [("Models", ", ".join(models))] if models else []
    for title, key in (("Tasks", "task"), ("Lengths", "length"), ("Compressed at", "compress_at")):
        values = list(dict.fromkeys(str(getattr(p, key)) for p in places))
        facts += [(title, ", ".join(values))] if values else []
    if places:
        counts = sorted({len(p.samples) for p in places})
        points = sum(len(p.points) for p in places)
        each = " to ".join(map(str, {counts[0]: 0, counts[-1]: 0}))
        facts.append(("Prompts", f"{each} a workload; {len(places)} workload{'s' * (len(places) > 1)}, {points} points"))
        facts.append(("Scored by", ", ".join(dict.fromkeys(p.metric for p in places))))
    done = sum(n["state"] == "done" for n in data.nodes)
    facts.append(("Nodes", f"{done} of {len(data.nodes)} done"))
    return facts
