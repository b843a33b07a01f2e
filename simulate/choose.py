"""From trials to a choice: the best setting of each budget, or the simplest one that cannot be told from it, judged on held-out prompts.

Shapes: N trials, S prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log1p
from typing import Any

import numpy as np

from kvtool.errors import ConfigError
from kvtool.policies import Policy
from kvtool.policies.budget import Budget
from kvtool.simulate.domains import Value
from kvtool.simulate.pareto import pareto_front
from kvtool.simulate.trials import By, Measured, Record, Task, loss_table, measure
from kvtool.simulate.verdict import Float, Verdict, compare, tied_with_best, words

#: A simpler setting is chosen if its harm is also at most this share above the best one's: few prompts tie nearly everything. And a
#: compensation has to save more than this: in real runs gains of 4 % were none (benchmarks/results/search.md), and it costs time.
#: Risk counts harm by its logarithm: there the same step is a difference, log(1 + MARGIN).
MARGIN = 0.05
#: points of a front of loss against retention that are judged
MOST_POINTS = 12


@dataclass(frozen=True, slots=True)
class Chosen:
    """The choice.

    Attributes
    ----------
    verdicts : tuple of Verdict
        One per budget, or per point of the front.
    together : str or None
        Setting, without a budget.
    marginals : dict
        Budget -> parameter -> value -> least risk or harm on the searched prompts.
    notes : tuple of str
    """

    verdicts: tuple[Verdict, ...]
    together: str | None
    marginals: dict[str, dict[str, dict[str, float]]]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Pick:
    """A trial that is to be judged: its number, its policy, and why it."""

    number: int
    budget: str
    best: int
    tied: tuple[int, ...]
    reason: str


def conclude(task: Task, records: Sequence[Record], searched: Float, held_out: Float, *, simplest: bool) -> Chosen:
    """Choose for every budget and judge on the held-out prompts.

    Parameters
    ----------
    task : Task
    records : sequence of N Record
    searched, held_out : ndarray of shape (draws, S)
        Bootstrap weights over the prompts of either half.
    simplest : bool
        Choose the simplest setting among those that cannot be told from the best.

    Raises
    ------
    ConfigError
        No setting can run at any budget.
    """
    notes: list[str] = []
    if task.budgets:
        picks = []
        for budget in task.budgets:
            if (pick := _pick(task, records, budget, searched, simplest=simplest)) is not None:
                picks.append(pick)
            else:
                why = next((r["message"] for r in records if r["message"]), "nothing was tried")
                notes.append(f"{budget}: no setting can run ({why})")
    else:
        picks = _front(task, records)
    if not picks:
        raise ConfigError(
            f"search: no setting of {task.space} can run: {next((r['message'] for r in records if r['message']), '')}"
        )
    verdicts = _judge(task, records, picks, held_out)
    for name, values in zip(task.objectives, zip(*(r["values"] for r in records), strict=True), strict=True):
        if len({value for value in values if value is not None}) == 1 and len(records) > 1:
            notes.append(f"{name}: all settings have the same value; this capture cannot tell them apart")
    marginals = {budget: _marginals(task, records, budget) for budget in task.budgets} if simplest else {}
    return Chosen(tuple(verdicts), _together(task, records), marginals, tuple(notes))


def _pick(task: Task, records: Sequence[Record], budget: str, weights: Float, *, simplest: bool) -> Pick | None:
    """Choose the trial of one budget."""
    distinct = [r["number"] for r in records if r["repeats"] is None and r["loss"].get(budget)]
    if not distinct:
        return None
    loss = loss_table([records[i] for i in distinct], budget, len(task.searched))
    by_number = dict(zip(distinct, loss.mean(axis=1).tolist(), strict=True))
    tied = [distinct[i] for i in tied_with_best(loss, weights)]
    best = chosen = tied[0]
    reason = f"smallest mean {task.by} on the {len(task.searched)} prompts of the search"
    if simplest:
        near = [i for i in distinct if _near(task.by, by_number[i], by_number[best])]
        close = [i for i in near if i in tied or not _compensated(task, records[i])]
        chosen = min(close, key=lambda i: _effort(task, records[i]["params"]))
        reason = _reason(task, records, chosen, best, close, by_number)
    return Pick(chosen, budget, best, tuple(i for i in tied if i != chosen), reason)


def _near(by: By, loss: float, best: float) -> bool:
    """Return whether a mean loss counts as good as the best one's, see `MARGIN`."""
    return loss <= (best * (1 + MARGIN) if by == "harm" else best + log1p(MARGIN))


def _compensated(task: Task, record: Record) -> bool:
    return task.space.policy(record["params"], "50%").compensation.active


def _effort(task: Task, params: dict[str, Value]) -> tuple[Any, ...]:
    """Return what makes a setting less simple, most important first: a compensation, changes from the defaults, a larger window."""
    default = task.space.default()
    policy = task.space.policy(params, "50%")
    compensation = policy.compensation
    changed = [k for k, v in params.items() if v != default[k] and (compensation.active or k not in ("block", "bias", "gate"))]
    block = -(compensation.block_size or 1 << 30) if compensation.active else 0
    numbers = [float(v) for v in params.values() if isinstance(v, int | float) and not isinstance(v, bool)]
    return compensation.active, len(changed), block, numbers, str(policy)


def _reason(
    task: Task, records: Sequence[Record], chosen: int, best: int, close: Sequence[int], loss: Mapping[int, float]
) -> str:
    """Say why it is the choice, in plain words."""
    where = f"on the {len(task.searched)} prompts of the search"
    if chosen == best and len(close) == 1:
        return f"smallest mean {task.by} {where}"
    if task.by == "risk":
        saved, least = f"{loss[chosen] - loss[best]:.3f}", f"{log1p(MARGIN):.3f}"
    else:
        share = 1 - loss[best] / loss[chosen] if loss[chosen] else 0.0
        saved, least = f"{share:.1%}", f"{MARGIN:.0%}"
    if _compensated(task, records[best]) and not _compensated(task, records[chosen]):
        return f"{where} the best compensation would save {saved} of its {task.by}, not the {least} that one has to be worth"
    order = "the simplest by compensation, changes from the defaults, window and kernel"
    if chosen == best:
        return f"smallest mean {task.by} {where}, and {order} of the {len(close)} settings that are as good"
    return f"{order} of the {len(close)} settings that are as good as the best {where} (its {task.by} is {saved} higher)"


def _front(task: Task, records: Sequence[Record]) -> list[Pick]:
    """Choose the trials that no other one beats in loss and retention, thinned evenly."""
    able = [r for r in records if r["repeats"] is None and r["values"][0] is not None]
    values = np.asarray([r["values"] for r in able], dtype=np.float64).reshape(-1, 2)
    front = np.flatnonzero(pareto_front(values[:, 1], values[:, 0]))
    front = front[np.argsort(values[front, 1])]
    shown: Any = (
        np.unique(np.linspace(0, len(front) - 1, min(len(front), MOST_POINTS)).round().astype(int)) if len(front) else []
    )
    reason = f"no other of the {len(able)} settings keeps at most as much at no more {task.by}"
    return [Pick(able[i]["number"], next(iter(able[i]["loss"])), able[i]["number"], (), reason) for i in front[shown]]


def _judge(task: Task, records: Sequence[Record], picks: Sequence[Pick], weights: Float) -> list[Verdict]:
    """Measure what was chosen, and the defaults at the same budgets, on both halves."""
    chosen = [task.policies(records[pick.number]["params"])[pick.budget] for pick in picks]
    defaults = [_default(task, pick.budget) for pick in picks]
    wanted = list({str(p): p for p in (*chosen, *(d for d in defaults if d is not None))}.values())
    names = [str(policy) for policy in wanted]
    before = dict(zip(names, measure(task.searched, wanted, task.by), strict=True))
    after = dict(zip(names, measure(task.held_out, wanted, task.by), strict=True))
    found = []
    for pick, policy, default in zip(picks, chosen, defaults, strict=True):
        here, there = before[str(policy)], after[str(policy)]
        base, base_there = (None, None) if default is None else (before[str(default)], after[str(default)])
        ok = base is not None and base_there is not None and not (base.message or base_there.message or there.message)
        interval = compare(there.loss, base_there.loss, weights) if ok and base_there else (None, None, None)
        tied = [str(task.policies(records[i]["params"])[pick.budget]) for i in pick.tied]
        found.append(
            Verdict(
                budget=pick.budget,
                policy=str(policy),
                default=str(default) if base and not base.message else None,
                searched=float(np.mean(here.loss)),
                default_searched=_mean(base) if ok else None,
                held_out=_mean(there),
                default_held_out=_mean(base_there) if ok else None,
                difference=interval[0],
                low=interval[1],
                high=interval[2],
                verdict=there.message or words(interval, len(there.loss), same=policy == default),
                tied=tuple(tied[:20]),
                n_tied=len(tied),
                best=str(task.policies(records[pick.best]["params"])[pick.budget]),
                reason=pick.reason,
                retention=here.retention,
                note=here.note,
            )
        )
    return found


def _mean(measured: Measured | None) -> float | None:
    return float(np.mean(measured.loss)) if measured and measured.loss else None


def _default(task: Task, budget: str) -> Policy | None:
    """Return the defaults at a budget; where their window does not fit in, with the largest one that does."""
    default = task.space.default()
    domain = task.space.domains.get("window")
    smaller = [v for v in (domain.points or () if domain else ()) if float(v) < float(default["window"])]
    for window in (None, *sorted(smaller, reverse=True, key=float)):
        params = {**default, **({} if window is None else {"window": window})}
        try:
            policy = task.space.policy(
                {**params, **({} if task.budgets else {"budget": float(Budget.parse(budget).retention or 0) * 100})}, budget
            )
            for sample in (*task.searched, *task.held_out):
                policy.entries(sample.seq_len)
        except ConfigError:
            continue
        return policy
    return None


def _together(task: Task, records: Sequence[Record]) -> str | None:
    """Return the setting with the least loss beside the best of each budget, mean over budgets: ratios of harms, differences of risks."""
    able = [r for r in records if all(v is not None for v in r["values"])]
    if len(task.budgets) < 2 or not able:
        return None
    values = np.asarray([r["values"] for r in able], dtype=np.float64)
    best = values.min(axis=0)
    excess = values - best
    if task.by == "harm":
        excess = np.divide(values, best, out=np.ones_like(values), where=best > 0)
    return str(able[int(np.argmin(excess.mean(axis=1)))]["policy"])


def _marginals(task: Task, records: Sequence[Record], budget: str) -> dict[str, dict[str, float]]:
    """Return per searched parameter the least loss with each of its values; a block only counts with its compensation."""
    place = task.budgets.index(budget)
    found: dict[str, dict[str, float]] = {}
    for record in records:
        loss = record["values"][place]
        if loss is None:
            continue
        params = dict(record["params"])
        pairs = {k: str(v) for k, v in params.items() if k in task.space.searched}
        if "compensate" in params:
            kind, window = params["compensate"], params.get("window")
            label = "none" if kind == "none" else f"{kind} {params.get('block', 64)}"
            pairs = {k: v for k, v in pairs.items() if k not in ("block", "bias", "compensate")} | {"compensation": label}
            pairs |= {"window and compensation": f"{window}, {label}"} if "window" in task.space.searched else {}
        for key, value in pairs.items():
            least = found.setdefault(key, {})
            least[value] = min(loss, least.get(value, loss))
    return found


def confirmation(verdicts: Sequence[Verdict]) -> list[dict[str, str]]:
    """Return what to run for real, as entries of a shortlist: what was chosen, the defaults, and the control protected alike."""
    found: dict[str, str] = {}
    for verdict in verdicts:
        found.setdefault(verdict.policy, verdict.reason)
        if verdict.default:
            found.setdefault(verdict.default, "the defaults")
        selector = Policy.parse(verdict.policy).method.parts().selector
        control = Policy.parse(f"random:budget={verdict.budget},window={selector.window},sink={selector.sink}")
        found.setdefault(str(control), "control: random entries with the same protection")
    return [{"policy": policy, "why": why} for policy, why in found.items()]
