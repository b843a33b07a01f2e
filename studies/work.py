"""Run one node: the same functions of the stages that the command line calls, on the node's settings and the results it works on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtool.errors import CapacityError, DataError, KvtoolError, NothingFitsError
from kvtool.executors.execution import Execution
from kvtool.studies.content import is_fixed, longest_allowed
from kvtool.studies.graph import ImpossibleCell, Node
from kvtool.studies.stages import PerplexityStage
from kvtool.studies.state import CAPTURE, HEADS, REPORT, STRESS, folder_of
from kvtool.studies.twins import Twins

if TYPE_CHECKING:
    from kvtool.data.tasks import Encoded
    from kvtool.models import LoadedModel
    from kvtool.studies.schema import Choice

#: Stages that measure time where this process runs: not for the driver of a cluster.
LOCAL_ONLY = ("stress", "no_cache")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run of a node left.

    Attributes
    ----------
    missing : int
        Pieces that other shards have to do; 0: the result is complete.
    notes : list of str
    """

    missing: int = 0
    notes: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Models:
    """The one model that is loaded at a time; one that could not be loaded is not tried again by the same run.

    Attributes
    ----------
    device : str
    device_map : str or None
    """

    device: str = "auto"
    device_map: str | None = None
    _name: tuple[str, str] | None = None
    _loaded: LoadedModel | None = None
    _failed: dict[tuple[str, str], KvtoolError] = field(default_factory=dict)

    def get(self, name: str, dtype: str) -> LoadedModel:
        """Load a model, in the place of the one before.

        Raises
        ------
        KvtoolError
            It cannot be loaded.
        """
        from kvtool.models import load_model, set_threads
        from kvtool.progress import say

        asked = (name, dtype)
        if asked in self._failed:
            raise self._failed[asked]
        if self._loaded is None or self._name != asked:
            self._release()
            say(f"loading {name}")
            try:
                _refuse_too_large(name, self.device)
                self._name, self._loaded = asked, load_model(name, self.device, dtype, self.device_map)
                set_threads(self._loaded)
            except KvtoolError as error:
                self._failed[asked] = error
                raise
        return self._loaded

    def _release(self) -> None:
        from kvtool.infer.stress_memory import release_memory

        self._name = self._loaded = None
        release_memory()


def _refuse_too_large(name: str, device: str) -> None:
    """Refuse weights that main memory cannot hold: the system would end the process, and the run with it."""
    import torch

    from kvtool.infer.stress_memory import free_bytes
    from kvtool.studies.estimate import model_shape

    shape = model_shape(name)
    if (
        shape is None
        or torch.device("cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu")).type
        != "cpu"
    ):
        return
    free, needed = free_bytes([torch.device("cpu")]), 2 * shape.n_parameters
    if free is not None and needed > free:
        raise CapacityError(
            f"{name}: its weights need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; run it where they fit"
        )


@dataclass(frozen=True, slots=True)
class Bench:
    """Where and how nodes run.

    Attributes
    ----------
    out : Path
        Absolute.
    models : Models
    execution : Execution
    named : dict of str to list of Choice
        See `kvtool.studies.graph.labels`.
    twins : Twins
    """

    out: Path
    models: Models
    execution: Execution
    named: Mapping[str, list[Choice]]
    twins: Twins

    def loaded(self, node: Node) -> LoadedModel:
        """Return the node's model."""
        return self.models.get(node.work["model"], node.work["dtype"])

    def file(self, node: Node, name: str) -> Path:
        """Return a file of a node's result."""
        return folder_of(self.out, node) / name

    def heads(self, node: Node) -> str:
        """Return the heads file that a node's policies use, or ``""``."""
        return str(self.file(node.inputs["heads"], HEADS)) if "heads" in node.inputs else ""


def run_node(node: Node, bench: Bench) -> Outcome:
    """Run a node whose inputs are complete; stopped at any moment, the same call continues.

    Raises
    ------
    KvtoolError
        What its stage says.
    """
    return _RUN[node.stage.kind](node, bench)


def samples_of(node: Node, loaded: LoadedModel, notes: list[str], twins: Twins | None = None) -> list[Encoded]:
    """Build the prompts of a node.

    Raises
    ------
    ImpossibleCell
        They are longer than the model's context.
    TwinCell
        They are those of another node, whose result stands for both; with `twins` only.
    """
    from kvtool.data.tasks import load_task

    work, most = node.work, loaded.info.max_positions
    if (allowed := longest_allowed(work)) is not None and allowed >= most:
        raise _too_long(allowed, loaded)

    def load(n: int) -> list[Encoded]:
        return load_task(work["task"], loaded.tokenizer, n, work["length"] or 1024, work["seed"], fits=_fits(work, loaded))

    try:
        samples = of_fixed_set(work, load, notes) if is_fixed(work["task"]) else load(work["n"])
    except NothingFitsError as error:
        raise ImpossibleCell(str(error)) from error
    if (longest := max(sample.n_tokens for sample in samples)) > most:
        raise _too_long(longest, loaded)
    if len(samples) < work["n"]:
        notes.append(f"{len(samples)} samples, {work['n']} were asked for")
    if twins is not None:
        twins.note(node, samples, notes)
    return samples


def of_fixed_set(work: Mapping[str, Any], load: Callable[[int], list[Encoded]], notes: list[str]) -> list[Encoded]:
    """Draw from a task with a fixed set, for the real run the first of the draw, for captures the ones after them.

    Parameters
    ----------
    load : callable
        Returns the first n samples.

    Raises
    ------
    DataError
        The real run takes all there are.
    """
    from kvtool.data.subsets import drawn

    others, n = work.get("beside", 0), work["n"]
    found = drawn(load, work["task"], others + n, work["seed"])
    if skipped := len(getattr(found, "skipped", ())):
        notes.append(f"{skipped} samples are left out: the model cannot run them")
    if others:
        real = {encoded.sample.id for encoded in drawn(load, work["task"], others, work["seed"])}
        if not (left := [encoded for encoded in found if encoded.sample.id not in real]):
            raise DataError(
                f"task {work['task']} has {len(found)} samples and the real run takes {others}: none is left to capture; "
                "lower n, or that of stage infer"
            )
        return left
    return found


def _fits(work: Mapping[str, Any], loaded: LoadedModel) -> Callable[[Encoded], str | None]:
    """Return what says that a prompt and its answer are longer than the model's context: the rule of the single commands."""
    asked, most = work.get("max_new_tokens"), loaded.info.max_positions

    def why(encoded: Encoded) -> str | None:
        answer = max(asked or encoded.sample.max_new_tokens, min(len(encoded.answer_ids), work.get("answer_tokens") or 64))
        if len(encoded.prompt_ids) + answer <= most:
            return None
        return f"{len(encoded.prompt_ids)} tokens and {answer} of the answer, the model's context is {most}"

    return why


def _too_long(n_tokens: int, loaded: LoadedModel) -> ImpossibleCell:
    return ImpossibleCell(
        f"prompts need {n_tokens} tokens with their answers, {loaded.info.model_id} has a context of {loaded.info.max_positions}"
    )


def _capture(node: Node, bench: Bench) -> Outcome:
    from kvtool.capture.runner import CaptureConfig, run_capture

    work, notes, loaded = node.work, list[str](), bench.loaded(node)
    samples = samples_of(node, loaded, notes, bench.twins)
    config = CaptureConfig(
        **{key: work[key] for key in ("task", "model", "n", "length", "seed", "compress_at", "answer_tokens", "permute")},
        windows=tuple(work["windows"]),
        statistics=None if work["statistics"] is None else tuple(work["statistics"]),
    )
    summary = run_capture(config, loaded, samples, bench.file(node, CAPTURE), bench.execution)
    notes.append(f"{summary.n_samples} prompts, {summary.size_bytes / 1e6:.1f} MB")
    if more := [str(n) for n in work["windows"] if n not in getattr(node.stage.parameters, "windows", ())]:
        notes.append(f"windows of {', '.join(more)} added, which stage compensation asks for")
    return Outcome(summary.n_missing, notes)


def _classify(node: Node, bench: Bench) -> Outcome:
    from kvtool.classify.runner import run_classify

    captured = bench.file(node.inputs["capture"], CAPTURE)
    summary = run_classify(captured, bench.file(node, HEADS), seed=node.work["seed"], importance=node.work["importance"])
    kinds = ", ".join(f"{count} {kind}" for kind, count in summary.counts.items() if count)
    return Outcome(notes=[f"{kinds}; importance is {summary.importance}"])


def _simulate(node: Node, bench: Bench) -> Outcome:
    from kvtool.capture.reader import open_capture
    from kvtool.simulate.runner import SimulateConfig, run_simulate

    work, captured = node.work, node.inputs["capture"]
    config = SimulateConfig(
        capture=str(bench.file(captured, CAPTURE)),
        policies=node.policies,
        heads=bench.heads(node),
        draws=work["draws"],
        seed=work["seed"],
        shortlist_cap=work["shortlist_cap"],
        refine=work["refine"],
        jobs=0,
    )
    loaded = None
    if work["refine"]:
        _take_over(bench.file(node.inputs["simulate"], "predictions.jsonl"), bench.file(node, "predictions.jsonl"))
        loaded = bench.loaded(captured)
        with open_capture(bench.file(captured, CAPTURE)) as capture:
            capture.check_model(loaded.info)
    summary = run_simulate(config, folder_of(bench.out, node), loaded)
    notes = [f"{summary.n_configurations} configurations, {summary.n_shortlisted} shortlisted"]
    notes += [f"{summary.n_refined} refined"] if work["refine"] else []
    notes += [f"{summary.n_impossible} impossible"] if summary.n_impossible else []
    return Outcome(notes=notes)


def _take_over(source: Path, target: Path) -> None:
    """Begin with a copy of finished work of the same policies on the same capture; nothing if the target has begun already."""
    if source.exists() and not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        copy = target.with_name(f".{target.name}.tmp")
        shutil.copyfile(source, copy)
        os.replace(copy, target)


def _infer(node: Node, bench: Bench) -> Outcome:
    from kvtool.infer.runner import InferConfig, run_infer
    from kvtool.policies import expand_policies
    from kvtool.simulate.shortlist import read_shortlist
    from kvtool.studies.reuse import take_over_units

    work, notes, loaded = node.work, list[str](), bench.loaded(node)
    samples = samples_of(node, loaded, notes, bench.twins)
    if "shortlist" in node.inputs:
        policies = [
            p for p in read_shortlist(bench.file(node.inputs["shortlist"], "shortlist.yaml")) if not p.method.simulate_only
        ]
    else:
        policies = expand_policies(node.policies, (), real=True, heads=bench.heads(node))
    fields = [name for name in InferConfig.__dataclass_fields__ if name in work]
    config = InferConfig(**{name: work[name] for name in fields})
    if bench.execution.shard is None:
        notes += take_over_units(node, bench.out, config, loaded, samples, policies)
    summary = run_infer(config, loaded, samples, policies, folder_of(bench.out, node), bench.execution)
    notes.insert(0, f"{summary.n_samples} prompts x {len(summary.rows)} policies")
    for count, what in ((summary.n_oom, "out of memory"), (summary.n_impossible, "impossible"), (summary.n_failed, "given up")):
        notes += [f"{count} units {what}"] if count else []
    return Outcome(summary.n_missing, notes)


def _perplexity(node: Node, bench: Bench) -> Outcome:
    from kvtool.analysis.perplexity import read_perplexity, write_perplexity
    from kvtool.data.texts import load_documents
    from kvtool.infer.perplexity import run_perplexity
    from kvtool.infer.perplexity_plan import PerplexityConfig
    from kvtool.policies import expand_policies

    work, settings, folder = node.work, node.stage.parameters, folder_of(bench.out, node)
    assert isinstance(settings, PerplexityStage)
    names = [name for name in PerplexityConfig.__dataclass_fields__ if name in work and name != "text"]
    config = PerplexityConfig(text=(work["text"],), **{name: work[name] for name in names})
    policies = expand_policies(node.policies, (), real=True, heads=bench.heads(node))
    run = run_perplexity(config, bench.loaded(node), load_documents(config.text), policies, folder, bench.execution)
    if not run.n_missing:
        write_perplexity(read_perplexity(folder, within=settings.within))
    return Outcome(run.n_missing, [f"{run.n_segments} segments, {run.n_units} units", *run.notes])


def _stress(node: Node, bench: Bench) -> Outcome:
    from kvtool.infer.stress import run_stress
    from kvtool.infer.stress_plan import UNTIL_OOM, StressConfig
    from kvtool.policies import expand_policies

    work = node.work
    names = [name for name in StressConfig.__dataclass_fields__ if name in work]
    values: dict[str, Any] = {name: UNTIL_OOM if work[name] == "oom" else work[name] for name in names}
    policies = expand_policies(node.policies, (), real=True, heads=bench.heads(node))
    summary = run_stress(StressConfig(**values), bench.loaded(node), policies, bench.file(node, STRESS))
    bad = [row for row in summary.rows if row.status != "ok"]
    notes = [f"{len(summary.rows)} points"] + [f"{row.policy} at {row.length} x {row.batch}: {row.status}" for row in bad[:3]]
    return Outcome(notes=notes + ([f"{len(bad) - 3} more without figures"] if len(bad) > 3 else []))


def _analyze(node: Node, bench: Bench) -> Outcome:
    from kvtool.analysis.runner import run_analyze

    simulated = folder_of(bench.out, node.inputs["simulate"]) if "simulate" in node.inputs else None
    summary = run_analyze(
        simulated, folder_of(bench.out, node.inputs["infer"]), bench.file(node, REPORT), node.work["draws"], node.work["seed"]
    )
    return Outcome(notes=[f"report: {summary.report}", *summary.warnings[:2]])


def _cliffs(node: Node, bench: Bench) -> Outcome:
    from kvtool.studies.work_cliffs import refine_cliffs

    return Outcome(*refine_cliffs(node, bench))


def _noted(module: str, name: str) -> Callable[[Node, Bench], Outcome]:
    """Return a stage of another module of this package that leaves notes; the module is loaded when the stage runs."""

    def run(node: Node, bench: Bench) -> Outcome:
        from importlib import import_module

        return Outcome(notes=getattr(import_module(f"kvtool.studies.{module}"), name)(node, bench))

    return run


_RUN: dict[str, Callable[[Node, Bench], Outcome]] = {
    "capture": _capture,
    "classify": _classify,
    "simulate": _simulate,
    "refine": _simulate,
    **{name: _noted("work_capture", name) for name in ("search", "compensation", "importance")},
    **{name: _noted("work_looks", name) for name in ("gaps", "hiv", "compare", "consistency", "no_cache")},
    "infer": _infer,
    "cliffs": _cliffs,
    "perplexity": _perplexity,
    "stress": _stress,
    "analyze": _analyze,
}
