"""What ``kvtool classify`` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvtool.classify.confidence import MIN_CHECKED, MIN_PROMPTS, Reliability

if TYPE_CHECKING:
    from kvtool.classify.runner import ClassifySummary
    from kvtool.classify.stability import Against

#: figures of the printed table: name in heads.json, heading
SHOWN = (
    ("sink", "sink"), ("local", "local"), ("far", "far"), ("content", "content-slot"), ("offset_variance", "by offset"),
    ("activity", "activity"), ("importance", "importance"), ("retrieval", "retrieval"), ("induction", "induction"),
)  # fmt: skip
MARKS = {"unsure": "?", "novel": "!", "mixed": "~"}


def summary_text(summary: ClassifySummary) -> str:
    """Return table, counts, and what the labels are worth."""
    from kvtool.textgrid import figure, grid

    header = ["head (layer.head)", "kind", "confidence", "set", *(title for _, title in SHOWN)]
    rows = [
        [
            f"{h['layer']}.{h['head']}",
            h["kind"] + MARKS.get(h["reading"] or "", ""),
            figure(h["confidence"], 2),
            _set(h["set"]),
            *(figure(h[name], 2) for name, _ in SHOWN),
        ]
        for h in summary.top
    ]
    counts = ", ".join(f"{n} {kind}" for kind, n in summary.counts.items() if n)
    lines = [grid(header, rows), "", f"{counts}; from {summary.n_prompts} prompts", _readings(summary)]
    names = {"reasoning": "HeadKV's retrieval-reasoning score", "gain": "gain (gradient x output)"}
    lines.append(f"importance: {names[summary.importance]}, mean of {summary.n_importance} prompts")
    lines += _worth(summary)
    lines += [_other(item) for item in summary.against]
    reasons = dict.fromkeys(summary.missing.values())
    lines += [f"no {', '.join(n for n, why in summary.missing.items() if why == reason)}: {reason}" for reason in reasons]
    return "\n".join([*lines, " ".join(str(path) for path in (summary.path, *summary.files))])


def _set(kinds: list[str] | None) -> str:
    return "-" if kinds is None else "none" if not kinds else "+".join(kinds)


def _readings(summary: ClassifySummary) -> str:
    if summary.readings is None:
        return f"no confidence: fewer than {MIN_PROMPTS} prompts"
    words = {
        "clear": "clear",
        "mixed": "truly mixed (~)",
        "novel": "novel (!: no kind fits)",
        "unsure": "unsure (?: other prompts may give another kind)",
    }
    return ", ".join(f"{n} {words[name]}" for name, n in summary.readings.items())


def _worth(summary: ClassifySummary) -> list[str]:
    lines = []
    if summary.reliability is None:
        lines.append(f"confidence not checked: fewer than {MIN_CHECKED} prompts")
    else:
        lines.append(_calibration(summary.reliability))
    if summary.halves is not None:
        h = summary.halves
        sure = "" if h.ari_sure is None else f"; {h.ari_sure:.3f} over the {h.sure:.0%} that both halves are sure of"
        lines.append(
            f"labels of disjoint halves ({h.n_half} prompts each): adjusted Rand {h.ari:.3f} ({h.ari_low:.3f} to {h.ari_high:.3f}), "
            f"{h.same:.1%} of the heads the same{sure}"
        )
    if summary.coverage is not None:
        c = summary.coverage
        contested = "" if c.coverage_contested is None else f" ({c.coverage_contested:.1%} for heads with several)"
        lines.append(f"sets hold the kind shown on a new prompt in {c.coverage:.1%}{contested}; {c.size:.2f} kinds on average")
    if summary.clusters is not None:
        k = summary.clusters
        apart = "no clusters: kinds are ranges of a continuum" if k.n_clusters == 1 else f"{k.n_clusters} clusters by BIC"
        lines.append(f"{apart}; they agree with the kinds by an adjusted Rand index of {k.ari:.2f}")
    return lines


def _calibration(r: Reliability) -> str:
    some = "" if r.ece_contested is None else f", {r.ece_contested:.3f} where it is below 0.99"
    now = "calibrated" if r.calibrated else "used as it is"
    return (
        f"confidence against held-out halves: calibration error {r.ece:.3f} ({r.ece_interval[0]:.3f} to {r.ece_interval[1]:.3f}{some}), "
        f"{r.ece_calibrated:.3f} after cross-fitted calibration; {now}"
    )


def _other(item: Against) -> str:
    def pair(values: tuple[Any, Any]) -> str:
        return f"{values[0]} / {values[1]}"

    differs = ", ".join(f"{name} {pair(values)}" for name, values in item.differs.items()) or "captured alike"
    shared = f"; {item.n_shared} prompts are in both: not disjoint" if item.n_shared else ""
    changed = ", ".join(f"{c['layer']}.{c['head']} {c['here']} -> {c['there']}" for c in item.changed[:6])
    more = f" and {len(item.changed) - 6} more" if len(item.changed) > 6 else ""
    return f"against {item.path} ({differs}; {item.n} prompts): adjusted Rand {item.ari:.3f}{shared}" + (
        f"; changed: {changed}{more}" if changed else ""
    )
