"""A study -> nodes: one per stage and cell, each named by what decides its result.

A node's hash covers its own settings, the content of model and prompt files, and the nodes it works on. What several cells share (the
capture that the heads are classified on) is one node; what a change of the study does not touch keeps its name, and so its result.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from kvtool.errors import KvtoolError
from kvtool.files import config_hash
from kvtool.studies.content import has_own_lengths, is_fixed, model_content, n_points, task_files
from kvtool.studies.parse import expand
from kvtool.studies.schema import FRESH, Choice, Stage, Study
from kvtool.studies.stages import (
    ON_CAPTURE,
    ON_INFER,
    WITH_POLICIES,
    CaptureStage,
    ClassifyStage,
    InferStage,
    NoCacheStage,
    PerplexityStage,
    RefineStage,
    SimulateStage,
    StressStage,
    settings_of,
)

GRAPH_SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Cell:
    """One point of the grid.

    Attributes
    ----------
    model : Choice
        Label, and what is loaded.
    task : str or None
    length : int or None
        None: the task's prompts are as long as they are.
    compress_at : str or None
    """

    model: Choice
    task: str | None = None
    length: int | None = None
    compress_at: str | None = None

    def __str__(self) -> str:
        parts = (self.model.label, self.task, self.length, self.compress_at)
        return " ".join(str(part) for part in parts if part is not None)


@dataclass(frozen=True)
class Node:
    """One unit of a study's graph.

    Attributes
    ----------
    stage : Stage
    cell : Cell
    work : dict
        Everything that decides the result, inputs apart; JSON values.
    inputs : dict of str to Node
        Role -> the node whose result is used.
    policies : tuple of str
        Text forms with budgets, without heads files, in the order of the study.
    """

    stage: Stage
    cell: Cell
    work: dict[str, Any]
    inputs: Mapping[str, Node] = field(default_factory=dict)
    policies: tuple[str, ...] = ()

    @cached_property
    def key(self) -> str:
        """Hash of everything that decides the result."""
        inputs = {role: node.key for role, node in self.inputs.items()}
        return config_hash(
            {"graph": GRAPH_SCHEMA, "kind": self.stage.kind, **self.work, "policies": self.policies, "inputs": inputs}
        )

    @property
    def name(self) -> str:
        """Folder name: readable, and 10 digits of the hash."""
        cell = re.sub(r"[^A-Za-z0-9.]+", "-", str(self.cell)).strip("-.")[:70]
        return f"{self.stage.name}-{cell}-{self.key[:10]}"

    @property
    def title(self) -> str:
        """As tables name it."""
        repeat = self.work.get("repeat", 0)
        return f"{self.stage.name} {self.cell}" + (f" run {repeat + 1}" if repeat else "")


def build_graph(study: Study, dtype: str = "auto") -> list[Node]:
    """Return the nodes of a study in an order in which they can run, the cells of one model together.

    Parameters
    ----------
    dtype : str
        See `kvtool.models.load_model`.
    """
    found: dict[str, Node] = {}
    for model in study.models:
        for node in _Builder(study, model, dtype).nodes():
            for each in _with_inputs(node):
                found.setdefault(each.key, each)
    return list(found.values())


def _with_inputs(node: Node) -> Iterator[Node]:
    for below in node.inputs.values():
        yield from _with_inputs(below)
    yield node


@dataclass(frozen=True, slots=True)
class _Builder:
    """Builds the nodes of one model."""

    study: Study
    model: Choice
    dtype: str

    @property
    def _base(self) -> dict[str, Any]:
        return {"model": self.model.text, "content": model_content(self.model.text), "dtype": self.dtype}

    @property
    def _lengths(self) -> tuple[int, ...]:
        return self.model.lengths or self.study.lengths

    def nodes(self) -> Iterator[Node]:
        for cell in self._cells():
            yield from self._of_cell(cell)
        for stage in self.study.stages:
            if stage.kind == "hiv":
                yield from self._over_tasks(stage)
            elif isinstance(stage.parameters, StressStage | NoCacheStage) and self._has(stage, Cell(self.model)):
                yield self._on_model(stage, Cell(self.model), settings_of(stage.parameters))
            elif isinstance(stage.parameters, PerplexityStage):
                yield from self._reading(stage, stage.parameters)

    def _cells(self) -> Iterator[Cell]:
        study, seen = self.study, set()
        for task in study.tasks:
            for length in self._lengths:
                for mode in study.compress_at:
                    cell = Cell(self.model, task, None if has_own_lengths(task) else length, mode)
                    if cell not in seen:
                        seen.add(cell)
                        yield cell

    def _has(self, stage: Stage, cell: Cell) -> bool:
        """Whether a stage works on a cell."""
        subset = stage.subset
        for wanted, value in (
            (subset.models, cell.model.label),
            (subset.tasks, cell.task),
            (subset.lengths, cell.length),
            (subset.compress_at, cell.compress_at),
        ):
            if wanted is not None and value is not None and value not in wanted:
                return False
        return True

    def _of_cell(self, cell: Cell) -> Iterator[Node]:
        captured = heads = ranked = None
        for stage in self.study.stages:
            if not self._has(stage, cell):
                continue
            settings = stage.parameters
            if isinstance(settings, CaptureStage):
                yield (captured := self._capture(stage, settings, cell))
            elif isinstance(settings, ClassifyStage):
                heads = self._heads(cell)
                if heads is not None:
                    yield heads
            elif isinstance(settings, SimulateStage | RefineStage) and captured is not None:
                yield (ranked := self._simulate(stage, cell, captured, heads, ranked))
            elif stage.kind in ON_CAPTURE and captured is not None:
                yield self._on_capture(stage, cell, captured, heads)
            elif isinstance(settings, InferStage):
                runs = [
                    self._infer(stage, settings, cell, heads or self._heads(cell), ranked, r) for r in range(settings.repeats)
                ]
                yield from (run for run in runs if run is not None)
        yield from self._on_infer(cell, captured, heads, ranked)

    def _capture(self, stage: Stage, settings: CaptureStage, cell: Cell, n: int | None = None) -> Node:
        work = {
            **self._base,
            **_prompts(cell, n or settings.n or self.study.n, self.study.seed),
            **self._beside(cell),
            "windows": self._windows(settings),
            "statistics": None if settings.statistics is None else list(settings.statistics),
            "answer_tokens": settings.answer_tokens,
            "permute": settings.permute,
        }
        return Node(stage, cell, work)

    def _windows(self, settings: CaptureStage) -> list[int]:
        """Those of the stage; weighted representatives, which compensation compares, ask for one of their own."""
        from kvtool.policies.compensation import OBSERVED

        more = {OBSERVED} if self.study.stage("compensation") is not None else set()
        return [*settings.windows, *sorted(more - set(settings.windows))]

    def _beside(self, cell: Cell) -> dict[str, Any]:
        """How many samples of a fixed set are left to the real run: what is captured must be others."""
        if not is_fixed(cell.task or ""):
            return {}
        runs = [stage.parameters.n or self.study.n for stage in self.study.stages if isinstance(stage.parameters, InferStage)]
        return {"beside": max(runs, default=0)}

    def _heads(self, cell: Cell) -> Node | None:
        """Return the classification whose heads serve a cell: of its own prompts, of those that the stage names, or of the first cell."""
        stage, capture = self.study.stage("classify"), self.study.stage("capture")
        if stage is None or capture is None:
            return None
        settings, of_capture = stage.parameters, capture.parameters
        assert isinstance(settings, ClassifyStage)
        assert isinstance(of_capture, CaptureStage)
        task = settings.task or cell.task or self.study.tasks[0]
        length = settings.length or cell.length or self._lengths[0]
        if self.model.lengths and length not in self.model.lengths:
            length = self.model.lengths[0]
        mode = cell.compress_at or self.study.compress_at[0]
        place = Cell(self.model, task, None if has_own_lengths(task) else length, mode)
        if not self._has(capture, place) and settings.task is None and settings.length is None:
            place = next((c for c in self._cells() if self._has(capture, c) and c.compress_at == mode), place)
        captured = self._capture(capture, of_capture, place, settings.n)
        return Node(stage, place, {"seed": settings.seed, "importance": settings.importance}, {"capture": captured})

    def _simulate(self, stage: Stage, cell: Cell, captured: Node, heads: Node | None, ranked: Node | None) -> Node:
        settings = stage.parameters
        if isinstance(settings, RefineStage):
            assert ranked is not None
            inputs = {**ranked.inputs, "simulate": ranked}
            return Node(stage, cell, {**ranked.work, "refine": settings.top}, inputs, ranked.policies)
        assert isinstance(settings, SimulateStage)
        texts = self._texts(stage)
        work = {"draws": settings.draws, "seed": settings.seed, "shortlist_cap": settings.shortlist_cap, "refine": 0}
        return Node(stage, cell, work, {"capture": captured, **self._with_heads(texts, heads)}, texts)

    def _on_capture(self, stage: Stage, cell: Cell, captured: Node, heads: Node | None) -> Node:
        work, texts = settings_of(stage.parameters), self._texts(stage) if stage.kind in WITH_POLICIES else ()
        if stage.kind == "search":
            work["budgets"] = list(stage.subset.retentions or self.study.retentions)
        with_heads = self._with_heads(texts, heads) or ({"heads": heads} if work.get("space") and heads else {})
        return Node(stage, cell, work, {"capture": captured, **with_heads}, texts)

    def _infer(
        self, stage: Stage, settings: InferStage, cell: Cell, heads: Node | None, ranked: Node | None, repeat: int
    ) -> Node | None:
        fresh = self.study.seed + (0 if is_fixed(cell.task or "") else FRESH)
        work = {
            **self._base,
            **_prompts(cell, settings.n or self.study.n, fresh if settings.seed is None else settings.seed),
            "generate": settings.generate,
            "answer_tokens": settings.answer_tokens,
            "max_new_tokens": settings.max_new_tokens,
            "kernel": settings.kernel,
            "temperature": settings.temperature,
            "decode_seed": settings.decode_seed,
            "repeat": repeat,
        }
        if settings.take == "shortlist":
            return None if ranked is None else Node(stage, cell, work, {"shortlist": ranked, **_heads_of(ranked)})
        texts = self._texts(stage)
        return Node(stage, cell, work, self._with_heads(texts, heads), texts)

    def _reading(self, stage: Stage, settings: PerplexityStage) -> Iterator[Node]:
        shared = {key: value for key, value in settings_of(settings).items() if key not in ("texts", "within")}
        for text in settings.texts:
            for length in self._lengths:
                cell = Cell(self.model, text, length)
                if self._has(stage, cell):
                    yield self._on_model(
                        stage, cell, {**shared, "text": text, "length": length, "files": task_files(f"file:{text}")}
                    )

    def _on_model(self, stage: Stage, cell: Cell, work: dict[str, Any]) -> Node:
        texts = self._texts(stage)
        return Node(stage, cell, {**self._base, **work}, self._with_heads(texts, self._heads(Cell(self.model))), texts)

    def _on_infer(self, cell: Cell, captured: Node | None, heads: Node | None, ranked: Node | None) -> Iterator[Node]:
        """Yield what looks at the real runs of a cell, the first of repeated ones."""
        for stage in self.study.stages:
            if stage.kind not in ON_INFER or not self._has(stage, cell):
                continue
            for run in self.study.stages:
                if isinstance(run.parameters, InferStage) and self._has(run, cell):
                    real = self._infer(run, run.parameters, cell, heads or self._heads(cell), ranked, 0)
                    if real is not None:
                        yield self._look_at(stage, cell, real, captured, ranked)

    def _look_at(self, stage: Stage, cell: Cell, real: Node, captured: Node | None, ranked: Node | None) -> Node:
        """Return what one stage makes of one real run, with as much of what came before as it uses."""
        inputs, work, texts = {"infer": real}, settings_of(stage.parameters), tuple[str, ...]()
        if "baseline" in work:
            named = {choice.label: choice.text for choice in self.study.policies}
            work["baseline"] = named.get(work["baseline"], work["baseline"])
        if stage.kind == "cliffs":
            inputs |= _heads_of(real) | ({} if captured is None else {"capture": captured})
            work |= {key: real.work[key] for key in ("model", "dtype")}
            texts = () if stage.subset.policies is None else self._texts(stage)
        elif stage.kind == "analyze" and ranked is not None:
            inputs = {"simulate": ranked, **inputs}
        return Node(stage, cell, work, inputs, texts)

    def _over_tasks(self, stage: Stage) -> Iterator[Node]:
        """Yield one node per length and mode on the captures of all tasks: kinds of prompts against each other."""
        capture = self.study.stage("capture")
        if capture is None:
            return
        assert isinstance(capture.parameters, CaptureStage)
        places: dict[Cell, list[Cell]] = {}
        for cell in self._cells():
            if self._has(capture, cell) and self._has(stage, cell):
                places.setdefault(Cell(self.model, None, cell.length, cell.compress_at), []).append(cell)
        texts = self._texts(stage)
        for place, cells in places.items():
            inputs = {"capture": self._capture(capture, capture.parameters, cells[0])}
            inputs |= {f"capture{i}": self._capture(capture, capture.parameters, cell) for i, cell in enumerate(cells[1:], 2)}
            heads = self._with_heads(texts, self._heads(cells[0]))
            yield Node(stage, place, settings_of(stage.parameters), inputs | heads, texts)

    def _texts(self, stage: Stage) -> tuple[str, ...]:
        return tuple(text for choice in chosen(self.study, stage) for text in at_retentions(self.study, stage, choice))

    def _with_heads(self, texts: Sequence[str], heads: Node | None) -> dict[str, Node]:
        return {"heads": heads} if heads is not None and any(wants_heads(text) for text in texts) else {}


def _heads_of(node: Node) -> dict[str, Node]:
    return {"heads": node.inputs["heads"]} if "heads" in node.inputs else {}


def _prompts(cell: Cell, n: int, seed: int) -> dict[str, Any]:
    """What decides the prompts; files by their content."""
    task = cell.task or ""
    if task.startswith("longbench") and "limit=" not in task and cell.length is not None:
        # As in the official protocol: what is longer loses its middle.
        task = f"{task},limit={cell.length}"
    # A grid makes n prompts for each of its points; a study counts prompts.
    each = -(-n // n_points(task))
    facts = {"task": task, "length": cell.length, "n": each, "seed": seed, "compress_at": cell.compress_at}
    return {**facts, "files": task_files(task)}


def chosen(study: Study, stage: Stage) -> list[Choice]:
    """Return the policies of a stage: the study's, or those that the stage names by label, group or text."""
    wanted = stage.subset.policies
    if wanted is None:
        return list(study.policies)
    found = []
    for item in wanted:
        named = [choice for choice in study.policies if item in (choice.label, choice.group)]
        found += named or [Choice(item, item)]
    return found


def at_retentions(study: Study, stage: Stage, choice: Choice) -> list[str]:
    """Return a policy's text forms at the stage's retentions."""
    return list(expand(choice.text, stage.subset.retentions or study.retentions))


def labels(study: Study) -> dict[str, list[Choice]]:
    """Return text form -> the policies of the study that it is; two study names can mean one policy."""
    found: dict[str, list[Choice]] = {}
    for stage in study.stages:
        if stage.kind in WITH_POLICIES:
            for choice in chosen(study, stage):
                for text in at_retentions(study, stage, choice):
                    named = found.setdefault(text, [])
                    named += [] if choice in named else [choice]
    return found


@lru_cache(maxsize=4096)
def wants_heads(text: str) -> bool:
    """Return whether a policy takes a heads file and names none."""
    from kvtool.policies import parse_policy

    return parse_policy(text).method.wants_heads


class ImpossibleCell(KvtoolError):
    """A cell that cannot be measured whatever one does, such as prompts longer than the model's context: a row, no failure."""
