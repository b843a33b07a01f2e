"""Are head labels worth their confidence: calibration on held-out prompts, and stability over prompts, tasks, texts and lengths.

    python benchmarks/heads.py [WORK_FOLDER]

Embedded model. Sets of 16 prompts are drawn at random from each capture's prompts, two disjoint ones at a time; half of the prompts
were run with their blocks permuted, as in a capture of 16 prompts by default. Resumes when interrupted.
"""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvtool.capture.reader import open_capture
from kvtool.capture.runner import CaptureConfig, run_capture
from kvtool.classify.confidence import SURE_FROM, Pairs, calibration_error, reliability, split_pairs
from kvtool.classify.conformal import set_coverage
from kvtool.classify.features import HeadTable, head_table
from kvtool.classify.kinds import KINDS, kinds_of_all
from kvtool.classify.plots import plot_reliability
from kvtool.classify.stability import clusters, halves, rand_index
from kvtool.data.tasks import load_task
from kvtool.models import LoadedModel, load_model

RESULT = Path(__file__).parent / "results" / "heads"
SET, SPLITS, DRAWS = 16, 200, 200
#: set sizes for the stability
SIZES = (8, 16, 32, 64)
#: label -> task, prompts, length in tokens, seed
DATA: dict[str, tuple[str, int, int, int]] = {
    "niah": ("niah", 64, 1024, 0),
    "multikey": ("niah:kind=multikey,keys=8", 128, 1024, 1),
    "text": ("text", 32, 1024, 2),
    "niah, 512 tokens": ("niah", 32, 512, 3),
}


def table_of(loaded: LoadedModel, work: Path, label: str) -> HeadTable:
    """Capture one row of `DATA`, with a single selection statistic: the head features are what is asked for here."""
    task, n, length, seed = DATA[label]
    path = work / f"{label.replace(', ', '_').replace(' ', '_')}.h5"
    config = CaptureConfig(task, "tiny", n, length, seed, statistics=("last",), permute=n // 2)
    run_capture(config, loaded, load_task(task, loaded.tokenizer, n, length, seed), path)
    with open_capture(path) as capture:
        return head_table(list(capture.samples))


def calibration(table: HeadTable, rng: np.random.Generator) -> tuple[dict[str, Any], Pairs, Any]:
    """Return errors of calibration of the confidence in use and of the plain bootstrap, which draws whole sets."""
    pairs = split_pairs(table, rng, SPLITS, DRAWS, SET)
    plain = split_pairs(table, rng, SPLITS, DRAWS, SET, draw_size=SET)
    assert pairs is not None
    assert plain is not None
    judged, _ = reliability(pairs, SET, rng)
    sure = pairs.confidence >= SURE_FROM
    found = {**asdict(judged), "ece_whole_draws": calibration_error(plain.confidence, plain.agrees)}
    found |= {"sure": float(sure.mean()), "same_if_sure": float(pairs.agrees[sure].mean())}
    return found, pairs, judged


def across(tables: dict[str, HeadTable], rng: np.random.Generator) -> list[dict[str, Any]]:
    """Return the adjusted Rand index of labels between sets of 16 prompts of two captures, and whose labels differ."""
    rows, names = [], list(tables)
    for index, here in enumerate(names):
        for there in names[index + 1 :]:
            first, second = tables[here], tables[there]
            scores = []
            for _ in range(SPLITS):
                one, two = (kinds_of_all(t.take(rng.permutation(t.n_prompts)[:SET])) for t in (first, second))
                scores.append(rand_index(one, two))
            one, two = kinds_of_all(first), kinds_of_all(second)
            low, high = np.quantile(scores, [0.025, 0.975])
            changed = [f"{a}.{b} {KINDS[one[a, b]]} -> {KINDS[two[a, b]]}" for a, b in np.argwhere(one != two).tolist()]
            rows.append(
                {"here": here, "there": there, "ari": float(np.mean(scores)), "low": low, "high": high, "changed": changed}
            )
    return rows


def measure(tables: dict[str, HeadTable]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return all figures, and the reliability of each row for the picture."""
    rng, rows, judged, pooled = np.random.default_rng(0), {}, {}, []
    for label, table in tables.items():
        kinds = kinds_of_all(table)
        figures, pairs, judged[label] = calibration(table, rng)
        pooled.append(pairs)
        stable, cover, found = halves(table, rng, SPLITS, SET), set_coverage(table, rng, 50), clusters(table, kinds, 0)
        assert stable is not None
        assert cover is not None
        assert found is not None
        rows[label] = {
            "n": table.n_prompts,
            "counts": {kind: int((kinds == k).sum()) for k, kind in enumerate(KINDS)},
            "reliability": figures,
            "stability": asdict(stable),
            "ari_by_size": {
                size: asdict(half)
                for size in SIZES
                if 2 * size <= table.n_prompts and (half := halves(table, rng, SPLITS, size)) is not None
            },
            "coverage": asdict(cover),
            "clusters": asdict(found),
        }
    together = Pairs(np.hstack([p.confidence for p in pooled]), np.hstack([p.agrees for p in pooled]))
    judged["all"], _ = reliability(together, SET, rng)
    return {"rows": rows, "pooled": asdict(judged["all"]), "across": across(tables, rng)}, judged


def by_size(half: dict[str, Any] | None) -> str:
    """Return the agreement of sets of one size, empty where there were too few prompts."""
    return "" if half is None else "{ari:.3f} ({ari_low:.3f} to {ari_high:.3f}), {ari_sure:.3f} ({sure:.0%})".format(**half)


def markdown(found: dict[str, Any]) -> str:
    """Return the tables."""
    lines = [
        "| prompts | kinds | ECE | confidence < 0.99 | drawing whole sets | cross-fitted | same label | of sure heads (share) "
        "| adjusted Rand | sets cover | several kinds |",
        "| --- " * 11 + "|",
    ]
    for label, row in found["rows"].items():
        r, s, c = row["reliability"], row["stability"], row["coverage"]
        kinds = ", ".join(f"{n} {kind}" for kind, n in row["counts"].items() if n)
        contested = "" if c["coverage_contested"] is None else f"{c['coverage_contested']:.1%}"
        some = "" if r["ece_contested"] is None else f"{r['ece_contested']:.3f}"
        lines.append(
            f"| {label} ({row['n']}) | {kinds} | {r['ece']:.3f} ({r['ece_interval'][0]:.3f} to {r['ece_interval'][1]:.3f}) | {some} "
            f"| {r['ece_whole_draws']:.3f} | {r['ece_calibrated']:.3f} | {s['same']:.1%} "
            f"| {r['same_if_sure']:.1%} ({r['sure']:.1%}) "
            f"| {s['ari']:.3f} ({s['ari_low']:.3f} to {s['ari_high']:.3f}) | {c['coverage']:.1%} | {contested} |"
        )
    p = found["pooled"]
    lines += [
        "",
        f"All together: ECE {p['ece']:.3f} ({p['ece_interval'][0]:.3f} to {p['ece_interval'][1]:.3f}), "
        f"{p['accuracy']:.1%} of the labels the same.",
        "",
        "| between | adjusted Rand | heads whose label differs, on all prompts |",
        "| --- | --- | --- |",
    ]
    for a in found["across"]:
        lines.append(
            f"| {a['here']} / {a['there']} | {a['ari']:.3f} ({a['low']:.3f} to {a['high']:.3f}) | {', '.join(a['changed']) or 'none'} |"
        )
    lines += [
        "",
        "Adjusted Rand by the size of the sets; behind the comma, over the heads that both sets are sure of, and their share:",
        "",
        "| prompts | " + " | ".join(f"sets of {size}" for size in SIZES) + " |",
        "| --- " * (len(SIZES) + 1) + "|",
    ]
    for label, row in found["rows"].items():
        lines.append(f"| {label} | {' | '.join(by_size(row['ari_by_size'].get(size)) for size in SIZES)} |")
    lines += ["", "| prompts | clusters by BIC | their adjusted Rand with the kinds |", "| --- | --- | --- |"]
    for label, row in found["rows"].items():
        lines.append(f"| {label} | {row['clusters']['n_clusters']} | {row['clusters']['ari']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    work = Path(sys.argv[1] if len(sys.argv) > 1 else "build/heads")
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    loaded = load_model("tiny", device="cpu")
    found, judged = measure({label: table_of(loaded, work, label) for label in DATA})
    names = ("torch", "transformers", "numpy", "scikit-learn")
    value = {
        "command": "python benchmarks/heads.py",
        "model": loaded.info.fingerprint,
        "data": {label: dict(zip(("task", "n", "length", "seed"), row, strict=True)) for label, row in DATA.items()},
        "sets": {"prompts": SET, "splits": SPLITS, "draws": DRAWS, "seed": 0},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in names}},
        **found,
    }
    RESULT.with_suffix(".json").write_text(json.dumps(value, indent=1) + "\n")
    plot_reliability({name: judged[name] for name in ("niah", "text", "all")}, RESULT.with_suffix(".png"))
    head = f"`{value['command']}`: embedded model, sets of {SET} prompts, two disjoint ones at a time, {SPLITS} times.\n"
    head += "Head labels of one set and their confidence against the labels of the other; definitions: docs/metrics.md.\n"
    text = f"{head}\n{markdown(found)}\n"
    RESULT.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
