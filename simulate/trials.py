"""Trials of a search: proposed in batches, measured on the searched prompts, recorded one line each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from kvtool.capture.reader import selection_key
from kvtool.errors import ConfigError
from kvtool.files import append_records, read_records
from kvtool.policies import Policy, method_key
from kvtool.progress import track
from kvtool.simulate.evaluate import Prediction, evaluate_sample
from kvtool.simulate.rank import risks
from kvtool.simulate.spaces import Space
from kvtool.simulate.study import BATCH, Journal, Sampler, propose

if TYPE_CHECKING:
    from kvtool.capture.reader import CapturedSample

TRIALS = "trials.jsonl"
#: what is minimised, mean over prompts: the risk that rankings go by, or the harm alone
By = Literal["risk", "harm"]
Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Task:
    """What trials are measured on.

    Attributes
    ----------
    space : Space
    sampler : str
    budgets : tuple of str
        Empty if the space holds the budget.
    searched, held_out : tuple of CapturedSample
    by : str
        What is minimised, ``"risk"`` or ``"harm"``.
    """

    space: Space
    sampler: Sampler
    budgets: tuple[str, ...]
    searched: tuple[CapturedSample, ...]
    held_out: tuple[CapturedSample, ...]
    by: By = "risk"

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names of the values that are minimised."""
        return tuple(f"{self.by} at {b}" for b in self.budgets) or (self.by, "retention")

    def policies(self, params: dict[str, Any]) -> dict[str, Policy]:
        """Return the policies of one setting, by budget.

        Raises
        ------
        ConfigError
            The values do not fit together.
        """
        found = [self.space.policy(params, budget) for budget in self.budgets or ("",)]
        return {str(policy.budget): policy for policy in found}


def run_trials(task: Task, folder: Path, n_trials: int, seed: int) -> list[Record]:
    """Propose, measure and record batches until there are enough trials."""
    total = task.space.n_points if task.sampler == "grid" else n_trials
    assert total is not None
    records, size = read_records(folder / TRIALS), BATCH[task.sampler]
    journal = Journal(folder, task.space, task.objectives, records) if task.sampler != "grid" else None
    done = len(records)
    batches = range(done // size, -(-total // size))
    for batch in track(batches, -(-total // size), "search", done // size):
        # A batch follows from the batches before it: what a kill left of it is proposed again, and what is recorded is kept.
        proposed = propose(task.space, task.sampler, len(task.objectives), records[: batch * size], seed)
        fresh = _measure_batch(task, proposed[len(records) - batch * size : total - batch * size], records)
        append_records(folder / TRIALS, fresh)
        records += fresh
        if journal:
            journal.add(fresh)
    return records[:total]


def _measure_batch(task: Task, proposed: Sequence[dict[str, Any]], records: Sequence[Record]) -> list[Record]:
    """Measure the new ones of the proposed settings, each once."""
    known = {key: record for record in records if (key := record["policy"]) and record["repeats"] is None}
    wanted: dict[str, Policy] = {}
    fresh: list[Record] = []
    first: dict[str, int] = {}
    for number, trial in enumerate(proposed, start=len(records)):
        record: Record = {
            "number": number,
            "params": trial["params"],
            "attrs": trial["attrs"],
            "repeats": None,
            "message": None,
        }
        try:
            policies = task.policies(trial["params"])
        except ConfigError as error:
            fresh.append({**record, "policy": "", "message": str(error), "loss": {}, "retention": {}, "note": None})
            continue
        key = method_key(next(iter(policies.values())))
        key = key if task.budgets else str(next(iter(policies.values())))
        old = known[key]["number"] if key in known else first.setdefault(key, number)
        fresh.append({**record, "policy": key, "repeats": old if old != number else None})
        if old == number:
            wanted |= {str(policy): policy for policy in policies.values()}
    found = measure(task.searched, list(wanted.values()), task.by)
    by_policy = dict(zip(wanted, found, strict=True))
    by_number = {record["number"]: record for record in [*records, *fresh]}
    for record in fresh:
        if record["repeats"] is not None:
            record |= {k: by_number[record["repeats"]][k] for k in ("loss", "retention", "note", "message")}
        elif record["policy"]:
            record |= _figures({b: by_policy[str(p)] for b, p in task.policies(record["params"]).items()})
        record["values"] = _values(task, record)
    return fresh


def _figures(measured: dict[str, Measured]) -> Record:
    """Return the record's figures: loss per prompt and mean retention by budget, None where it cannot run."""
    messages = [m.message for m in measured.values() if m.message]
    return {
        "loss": {budget: None if m.message else m.loss for budget, m in measured.items()},
        "retention": {budget: m.retention for budget, m in measured.items()},
        "note": next((m.note for m in measured.values() if m.note), None),
        "message": messages[0] if messages else None,
    }


def _values(task: Task, record: Record) -> list[float | None]:
    """Return one value per objective; None: impossible."""
    if task.budgets:
        return [None if (x := record["loss"].get(budget)) is None else float(np.mean(x)) for budget in task.budgets]
    loss = next(iter(record["loss"].values()), None)
    if loss is None:
        return [None, None]
    return [float(np.mean(loss)), float(next(iter(record["retention"].values())))]


@dataclass(frozen=True, slots=True)
class Measured:
    """One policy on some prompts.

    Attributes
    ----------
    loss : list of float
        Risk or harm per prompt; empty if `message` says why not.
    retention : float
        Mean of what is kept.
    message, note : str or None
    """

    loss: list[float]
    retention: float
    message: str | None
    note: str | None


def measure(samples: Sequence[CapturedSample], policies: Sequence[Policy], by: By = "risk") -> list[Measured]:
    """Predict the risk or harm of policies on prompts; one that keeps more than its budget is refused: it would win by its bytes.

    Parameters
    ----------
    samples : sequence of S CapturedSample
    policies : sequence of N Policy
    by : str
        ``"risk"`` or ``"harm"``.

    Returns
    -------
    list of N Measured
    """
    if not policies:
        return []
    names = captured_statistics(samples[0])
    lacking = [next((name for name in policy.needs() if selection_key(name) not in names), None) for policy in policies]
    able = [policy for policy, name in zip(policies, lacking, strict=True) if name is None]
    columns = [evaluate_sample(sample, able) for sample in samples]
    rows = iter(range(len(able)))
    found = []
    for policy, name in zip(policies, lacking, strict=True):
        if name is not None:
            found.append(Measured([], 0.0, f"policy {policy}: the capture has no statistic {name}", None))
            continue
        row = next(rows)
        found.append(_measured(policy, samples, [column[row] for column in columns], by))
    return found


def _measured(policy: Policy, samples: Sequence[CapturedSample], predictions: Sequence[Prediction], by: By) -> Measured:
    message = next((p.message for p in predictions if p.message), None)
    retention = float(np.mean([p.retention for p in predictions]))
    over = [p.entries for s, p in zip(samples, predictions, strict=True) if p.entries > policy.asked(s.seq_len) + 0.5]
    if over and message is None:
        message = f"policy {policy}: keeps {max(over):.1f} entries, more than its budget; it cannot be compared at this budget"
    losses: list[float] = []
    if message is None:
        losses = risks(predictions).tolist() if by == "risk" else [float(p.harm or 0.0) for p in predictions]
    return Measured(losses, retention, message, next((p.note for p in predictions if p.note), None))


def captured_statistics(sample: CapturedSample) -> frozenset[str]:
    """Return the data set names of the selection statistics that a sample has; see `kvtool.capture.reader.selection_key`."""
    return frozenset(sample.capture.group(sample.index)["selection"])


def loss_table(records: Sequence[Record], budget: str, n_prompts: int) -> NDArray[np.float64]:
    """Return the loss of all trials at a budget, (N, S); NaN rows are impossible."""
    blank = [float("nan")] * n_prompts
    return np.asarray([record["loss"].get(budget) or blank for record in records], dtype=np.float64).reshape(-1, n_prompts)
