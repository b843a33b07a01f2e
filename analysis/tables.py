"""One table: what was predicted beside what happened, per configuration."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvtool.analysis.load import Reality, Simulation
from kvtool.analysis.plain import short_names
from kvtool.analysis.resampling import change_interval, mean_interval
from kvtool.analysis.statistics import TIE, Interval
from kvtool.textgrid import Lines, csv_text, figure, grid

CONTROL = "random"
FULL = "full"


@dataclass(frozen=True, slots=True)
class TableRow:
    """One configuration.

    Attributes
    ----------
    policy, method : str
        Text form, with and without budget.
    name, label : str
        Method and policy as they are shown: without paths of files.
    budget : str or None
    status : str
        ``"ok"``, ``"oom"``, ``"impossible"`` or ``"failed"``.
    message : str or None
    degenerate : bool
    retention : float or None
        Kept share of the prompt, measured.
    simulated_rank : int or None
        Within the budget, of the configurations that were run, by what the simulation ranked by.
    real_rank : int or None
        Within the budget, by teacher-forced answer accuracy; equal ones share a rank.
    harm, risk, loss : float or None
    score, accuracy, change : Interval or None
        Task score; answer accuracy; score minus the full cache's on the same samples.
    kv_bytes : float or None
        Bytes that hold kept entries at the end of the prompt; reserved room is not counted here.
    saved : float or None
        Share of the full cache's bytes that is saved.
    ttft_s, tpot_s : float or None
        Medians.
    beats_control : bool or None
        Answer accuracy above the random control of the same budget with an interval that excludes 0; None for the control.
    """

    policy: str
    method: str
    budget: str | None
    status: str
    message: str | None
    degenerate: bool
    retention: float | None = None
    simulated_rank: int | None = None
    real_rank: int | None = None
    harm: float | None = None
    risk: float | None = None
    loss: float | None = None
    score: Interval | None = None
    accuracy: Interval | None = None
    change: Interval | None = None
    kv_bytes: float | None = None
    saved: float | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    beats_control: bool | None = None
    name: str = ""
    label: str = ""

    @property
    def note(self) -> str:
        """Return warnings in a few words."""
        notes = [self.status] if self.status != "ok" else []
        notes += ["degenerate"] if self.degenerate else []
        notes += ["≤ random"] if self.beats_control is False else []
        return ", ".join(notes)


def build_table(simulation: Simulation | None, reality: Reality) -> list[TableRow]:
    """Return one row per configuration that was run, the full cache first, then by budget and real rank."""
    predicted = {row["policy"]: row for row in simulation.rows} if simulation else {}
    drafts = _shortened([_row(reality, policy, predicted.get(policy)) for policy in reality.policies])
    ranked = _ranks(drafts)
    return sorted(ranked, key=lambda r: (r.budget is not None, r.retention or 0.0, r.budget or "", r.real_rank or 99, r.policy))


def _shortened(rows: list[TableRow]) -> list[TableRow]:
    """Name the rows as people read them."""
    methods, labels = short_names([r.method for r in rows]), short_names([r.policy for r in rows])
    return [dataclasses.replace(r, name=methods[r.method], label=labels[r.policy]) for r in rows]


def _row(reality: Reality, policy: str, predicted: dict[str, Any] | None) -> TableRow:
    records = reality.of(policy)
    first = records[0]
    bad = [r for r in records if r["status"] != "ok"]
    base = {"policy": policy, "method": first["method"], "budget": first["budget"]}
    degenerate = any(r["degenerate"] for r in records)
    if bad:
        return TableRow(**base, status=bad[0]["status"], message=bad[0]["message"], degenerate=degenerate)
    score, accuracy, full = (reality.values(p, k) for p, k in ((policy, "score"), (policy, "answer_accuracy"), (FULL, "score")))
    by_score, by_accuracy = reality.documents("score"), reality.documents("answer_accuracy")
    control = _control(reality, first)
    held = np.asarray([r["kv_bytes_prompt_end"] - r["slack_bytes"] for r in records], dtype=np.float64)
    whole = np.asarray([r["kv_bytes_full"] for r in records], dtype=np.float64)
    return TableRow(
        **base,
        status="ok",
        message=None,
        degenerate=degenerate,
        retention=float(np.mean([r["retention"] for r in records])),
        harm=predicted["harm"] if predicted else None,
        risk=predicted["risk"] if predicted else None,
        loss=_loss(predicted) if predicted else None,
        score=None if score is None else mean_interval(score, by_score),
        accuracy=None if accuracy is None else mean_interval(accuracy, by_accuracy),
        change=None if score is None or full is None or policy == FULL else change_interval(score, full, by_score),
        kv_bytes=float(held.mean()),
        saved=float(1 - held.sum() / whole.sum()),
        ttft_s=float(np.median([r["ttft_s"] for r in records])),
        tpot_s=_median([r["tpot_s"] for r in records]),
        beats_control=None if accuracy is None or control is None else change_interval(accuracy, control, by_accuracy).low > 0,
    )


def _loss(predicted: dict[str, Any]) -> float | None:
    """Return what the simulation ranked by, smaller is better."""
    found: float | None = predicted["risk"] if predicted.get("predicted") is None else 1.0 - float(predicted["predicted"])
    return found


def _control(reality: Reality, record: dict[str, Any]) -> Any:
    """Answer accuracy of the random control of the same budget, if this is not the control itself.

    The control with default parameters if it was run, else the first one at this budget.
    """
    if record["budget"] is None or _is_control(record["method"]):
        return None
    plain = f"{CONTROL}:budget={record['budget']}"
    others = [p for p in reality.policies if _is_control(p) and reality.of(p)[0]["budget"] == record["budget"]]
    for policy in [plain, *others]:
        if (values := reality.values(policy, "answer_accuracy")) is not None:
            return values
    return None


def _is_control(method: str) -> bool:
    return method.split(":")[0] == CONTROL


def _median(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.median(known)) if known else None


def _ranks(rows: list[TableRow]) -> list[TableRow]:
    ranked = []
    for row in rows:
        peers = [r for r in rows if r.budget == row.budget and r.status == "ok"]
        if row.status != "ok" or row.budget is None or row.accuracy is None:
            ranked.append(row)
            continue
        better = sum(r.accuracy is not None and r.accuracy.mean > row.accuracy.mean + TIE for r in peers)
        less = sum(r.loss < row.loss - TIE for r in peers if r.loss is not None) if row.loss is not None else None
        ranked.append(dataclasses.replace(row, real_rank=better + 1, simulated_rank=None if less is None else less + 1))
    return ranked


def text_table(rows: list[TableRow]) -> str:
    """Return an aligned table for the terminal."""
    return grid(*table_lines(rows))


def table_lines(rows: list[TableRow]) -> Lines:
    """Return header and lines, as shown."""
    header = ["policy", "kept", "KV saved", "rank sim", "rank real", "risk", "accuracy (95 %)", "score (95 %)", "note"]
    return header, [_cells(row) for row in rows]


def _cells(row: TableRow) -> list[str]:
    return [
        row.label or row.policy,
        "-" if row.retention is None else f"{100 * row.retention:.1f}%",
        "-" if row.saved is None else f"{100 * row.saved:.1f}%",
        "-" if row.simulated_rank is None else str(row.simulated_rank),
        "-" if row.real_rank is None else str(row.real_rank),
        figure(row.risk, 2),
        "-" if row.accuracy is None else row.accuracy.text(),
        "-" if row.score is None else row.score.text(),
        row.note,
    ]


def csv_table(rows: list[TableRow]) -> str:
    """Return the table as CSV with unrounded figures."""
    lines = []
    plain = ["policy", "method", "budget", "status", "degenerate", "retention", "saved", "kv_bytes"]
    plain += ["simulated_rank", "real_rank", "risk", "harm", "ttft_s", "tpot_s", "beats_control", "message"]
    spread = ["score", "accuracy", "change"]
    for row in rows:
        cells = [getattr(row, name) for name in plain]
        for name in spread:
            value: Interval | None = getattr(row, name)
            cells += ["", "", ""] if value is None else [value.mean, value.low, value.high]
        lines.append(cells)
    return csv_text([*plain, *(f"{name}{part}" for name in spread for part in ("", "_low", "_high"))], lines)
