"""The attribution in words and tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from kvtool.simulate.attribution import CAUSES
from kvtool.simulate.attribution_rows import MEASURES, REMEDIES, Estimate, Row
from kvtool.textgrid import Lines, figure

#: What each flaw is called in a sentence.
NAMES = {
    "slots": "the entries given up for slots",
    "count": "the missing count term ln n",
    "variance": "the missing variance term",
    "value": "the plain instead of the attention-weighted mean of values",
}
REMEDY_NAMES = {"count": "mean with ln n", "weighted": "weighted mean"}
#: Heads that a sentence names, and the share of what evicting alone costs that is worth it.
NAMED, WORTH = 6, 0.01


def table(rows: Sequence[Row]) -> Lines:
    """Return what the plain mean costs and why: the four causes add up to its harm."""
    lines = []
    for row in rows:
        if row.message is not None:
            lines.append([row.policy, row.block, "impossible", *["-"] * (4 + len(CAUSES))])
            continue
        costs = [figure(row.cost[name], 2) for name in ("evict", "fewer", "mean")]
        causes = [figure(row.causes[cause].mean, 2) for cause in CAUSES]
        slots = f"{row.entries - row.slots:.0f}+{row.slots:.0f}"
        lines.append([row.policy, row.block, slots, *costs, row.loss["mean"].text(), *causes])
    head = [
        "policy",
        "block",
        "real+repr",
        "evict",
        "fewer",
        "mean",
        "mean - evict (95 %)",
        "= slots",
        "count",
        "variance",
        "value",
    ]
    return head, lines


def help_table(rows: Sequence[Row]) -> Lines:
    """Return what ln n and weights would change against evicting alone, in how many heads, and which gate to set."""
    lines = []
    for row in rows:
        for name in REMEDIES if row.message is None else ():
            helped = sum(name in head["helps"] for head in row.heads)
            hurt = sum(name in head["hurts"] for head in row.heads)
            gate = row.gates.get(name)
            option, judged = ("-", "-") if gate is None else (_gate_text(gate), _judged(gate))
            lines.append(
                [row.policy, row.block, name, row.loss[name].text(), f"{helped}/{hurt}/{len(row.heads)}", option, judged]
            )
    head = ["policy", "block", "bias", "- evict (95 %)", "helps/hurts/heads", "gate", "with it, other prompts"]
    return head, lines


def real_table(rows: Sequence[Row]) -> Lines:
    """Return the answer's real nll and what causes it, by masked forwards."""
    lines = []
    for row in rows:
        if row.real is None:
            continue
        nll = [figure(row.real["nll"][name], 3) for name in ("full", "evict", "fewer", "mean", *REMEDIES)]
        causes = [figure(row.real["causes"][cause].mean, 3) for cause in CAUSES]
        agreed = f"{row.real['as_predicted']} of {row.real['sure']}"
        lines.append([row.policy, row.block, *nll, *causes, agreed])
    head = [
        "policy",
        "block",
        "full",
        "evict",
        "fewer",
        "mean",
        "count",
        "weighted",
        "= slots",
        "count",
        "variance",
        "value",
        "as predicted",
    ]
    return head, lines


def accuracy_table(rows: Sequence[Row]) -> Lines:
    """Return the answer's real accuracy by masked forwards, and its difference from evicting alone."""
    lines = []
    for row in rows:
        if row.real is not None:
            levels = [figure(row.real["accuracy"][name], 3) for name in ("full", "evict")]
            points = [row.real["points"][name].text(3) for name in ("fewer", "mean", *REMEDIES)]
            lines.append([row.policy, row.block, *levels, *points])
    head = ["policy", "block", "full", "evict", "fewer - evict", "mean - evict", "count - evict", "weighted - evict"]
    return head, lines


def _gate_text(gate: dict[str, Any]) -> str:
    option = gate["option"]
    return "none: leave all alone" if option is None else f"{option or 'all heads'} ({100 * gate['open']:.0f}% of heads)"


def _judged(gate: dict[str, Any]) -> str:
    held_out: Estimate | None = gate["held_out"]
    return "one prompt: not judged" if held_out is None else held_out.text()


def paragraph(row: Row) -> str:
    """Say in plain words what compensation costs here, why, and where it helps; one point a line."""
    if row.message is not None:
        return f"{row.label}: impossible, {row.message.partition(': ')[2]}"
    lines = [row.label, _price(row), _causes(row), *(_remedy(row, name) for name in REMEDIES)]
    if row.real is not None:
        lines.append(_real(row))
    if row.moved >= 0.5:
        lines.append(
            f"room: the budget rule moved {row.moved:.0f} entries between heads to make room for slots, in all figures"
        )
    return "\n  ".join(lines)


def _price(row: Row) -> str:
    """Say what the plain mean loses: slots that cost more than what stands in them gives."""
    loss, cost = row.loss["mean"], row.cost
    verdict = "loses" if loss.low > 0 else "gains" if loss.high < 0 else "makes no sure difference"
    text = f"plain mean: {verdict}, {loss.text()} of {MEASURES[row.measure]} against evicting alone; "
    text += f"its slots ({row.slots:.0f} per head) cost {cost['fewer'] - cost['evict']:.2f}, "
    text += f"what stands in them gives {row.given['mean'].text()} back"
    if row.held_plain >= 1:
        return text
    return f"{text}, as it weighs exp({_log(row.held_plain)}) of what it stands for (with ln n exp({_log(row.held_counted)}))"


def _log(share: float) -> str:
    return f"{math.log(share):.1f}" if share > 0 else "-inf"


def _causes(row: Row) -> str:
    """Say what the cost is made of that perfect representatives, which take no slot, would not have."""
    total = row.cost["mean"]
    order = sorted(CAUSES, key=lambda cause: -row.causes[cause].mean)

    def share(cause: str) -> str:
        # Signed parts of a sum that is near 0 have no meaningful shares.
        parts = sum(abs(estimate.mean) for estimate in row.causes.values())
        return f" ({100 * row.causes[cause].mean / total:.0f} %)" if total > 0.5 * parts else ""

    shares = ", ".join(f"{row.causes[cause].mean:.2f}{share(cause)} {NAMES[cause]}" for cause in order)
    if total <= 0:
        return f"why: nothing is lost against the full cache ({total:+.2f} of {MEASURES[row.measure]}): {shares}"
    return f"why: of the {total:.2f} of {MEASURES[row.measure]} that it costs against the full cache, {shares}"


def _remedy(row: Row, name: str) -> str:
    loss, title = row.loss[name], REMEDY_NAMES[name]
    verdict = "helps" if loss.high < 0 else "hurts" if loss.low > 0 else "makes no sure difference"
    text = f"{title}: {verdict}, {loss.text()} against evicting alone"
    least = WORTH * abs(row.cost["evict"])
    helped = sorted((head for head in row.heads if name in head["helps"]), key=lambda head: float(head["loss"][name].mean))
    named = [head for head in helped if head["loss"][name].mean <= -least][:NAMED]
    if helped:
        text += f"; it helps in {len(helped)} of {len(row.heads)} heads"
    if named:
        shown = ", ".join(
            f"{h['layer']}.{h['head']} ({h['loss'][name].mean:+.2f}, gap after ln n {h['gap']:.1f})" for h in named
        )
        text += f", by 1 % of what evicting costs or more in {shown}"
    gate = row.gates.get(name)
    if gate is not None and gate["option"]:
        text += f"; {gate['option']} keeps it to {100 * gate['open']:.0f} % of the heads: {_judged(gate)} on other prompts"
    return text


def _real(row: Row) -> str:
    assert row.real is not None
    real, causes = row.real, row.real["causes"]
    titles = {"fewer": "empty slots", "mean": "the plain mean", **REMEDY_NAMES}
    changes = ", ".join(f"{title} by {real['loss'][name].text(3)}" for name, title in titles.items())
    text = f"for real: nll {real['nll']['evict']:.3f} after evicting alone, which is raised by {changes}; accuracy "
    text += f"{real['accuracy']['evict']:.3f}, by the plain mean {real['points']['mean'].text(3)}; what stands in its slots "
    text += f"gives {real['given']['mean'].text(3)} of nll back; "
    sure = sorted((cause for cause in CAUSES if causes[cause].low > 0), key=lambda cause: -causes[cause].mean)
    if sure:
        text += "sure causes of the plain mean's nll: " + ", ".join(f"{causes[c].mean:.3f} {NAMES[c]}" for c in sure)
    else:
        text += "no cause of the plain mean's nll is sure"
    return f"{text}; {real['as_predicted']} of {real['sure']} sure differences lie as predicted"
