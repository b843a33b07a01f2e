"""What a run of a study would do, before it runs: the state of every node, and which cells are the same or cannot be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtool.errors import KvtoolError
from kvtool.studies.estimate import beyond_context
from kvtool.studies.graph import Node
from kvtool.studies.state import Mark
from kvtool.studies.twins import Marks, Twins, is_cut

if TYPE_CHECKING:
    from kvtool.data.tasks import Encoded

#: States of nodes that the run will not spend time on; the first two are known from the model's context.
IDLE = ("impossible", "skipped", "done", "same")


def plan_nodes(nodes: Sequence[Node], out: Path) -> tuple[list[Mark], list[str]]:
    """Return what is known of every node, and sentences; runs and writes nothing.

    Returns
    -------
    list of Mark
        States of `kvtool.studies.state.STATES`; ``impossible`` where a context cannot hold it.
    list of str
        Which cells are run once as their prompts are the same, and of which it is not known.
    """
    twins = Twins(out, nodes)
    notes = _foresee(nodes, twins)
    marks = Marks(out, twins)
    without: set[str] = set()
    for node in nodes:
        if beyond_context(node) is not None:
            marks[node.key] = Mark("impossible")
        elif any(below.key in without for below in node.inputs.values()):
            marks[node.key] = Mark("skipped")
        else:
            marks.look(node)
        without |= {node.key} if marks[node.key].state in ("impossible", "skipped") else set()
    same = [f"{node.title}: {marks[node.key].note}" for node in nodes if marks[node.key].state == "same" and is_cut(node)]
    return [marks[node.key] for node in nodes], [*same, *notes]


def _foresee(nodes: Sequence[Node], twins: Twins) -> list[str]:
    """Tell from the samples' lengths which cells have the same prompts, where tokenizer and data are here."""
    groups: dict[tuple[str, str], list[Node]] = {}
    for node in nodes:
        if is_cut(node) and beyond_context(node) is None:
            groups.setdefault((node.cell.model.text, str(node.cell.task)), []).append(node)
    notes = []
    for (model, task), mine in groups.items():
        if len({node.cell.length for node in mine}) < 2:
            continue
        try:
            samples = _samples(model, max((str(node.work["task"]) for node in mine), key=len))
        except (KvtoolError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:120]
            notes.append(
                f"{mine[0].cell.model.label}, {task}: lengths that no sample reaches are found by the run; here: {reason}"
            )
            continue
        for node in mine:
            twins.foresee(node, _drawn(node.work, samples))
    return notes


def _samples(model: str, task: str) -> list[Encoded]:
    """Return all samples of a task, encoded by a model's tokenizer; nothing is downloaded."""
    from transformers import AutoTokenizer

    from kvtool.data.subsets import ENDLESS_AFTER
    from kvtool.data.tasks import load_task
    from kvtool.models import EMBEDDED, embedded_folder

    folder = str(embedded_folder()) if model == EMBEDDED else model
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise OSError(f"the tokenizer of {model} is not here") from error
    return load_task(task, tokenizer, ENDLESS_AFTER + 1)


def _drawn(work: Mapping[str, Any], samples: list[Encoded]) -> dict[str, int]:
    """Return the samples of a node and their tokens before they are cut."""
    from kvtool.studies.work import of_fixed_set

    found = of_fixed_set(work, lambda n: samples[:n], [])
    return {each.sample.id: int(each.sample.meta.get("prompt_tokens", len(each.prompt_ids))) for each in found}
