"""Why compensation loses: the attribution from captures beside the same counterfactuals as masked forwards of the answer.

    python benchmarks/compensation.py [WORK_FOLDER]

Embedded model, SnapKV with a window of 8. Gates are fitted on a capture of other prompts, and judged for real. Resumes when
interrupted.
"""

from __future__ import annotations

import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvtool.analysis.statistics import tau_b
from kvtool.capture.reader import open_capture
from kvtool.capture.runner import CaptureConfig, run_capture
from kvtool.data.tasks import load_task
from kvtool.files import write_json, write_text
from kvtool.infer.cache import CompressedCache
from kvtool.models import LoadedModel, load_model
from kvtool.policies import Policy
from kvtool.progress import track
from kvtool.simulate.attribution import CAUSES
from kvtool.simulate.attribution_rows import MEASURES, REAL, REMEDIES, Estimate, Row, estimate, real_figures
from kvtool.simulate.attribution_runner import AttributionConfig, run_attribution, run_states
from kvtool.simulate.evaluate import evaluate_sample
from kvtool.simulate.rank import resample_weights
from kvtool.simulate.refine import refine_sample

RESULT = Path(__file__).parent / "results" / "compensation"
LENGTH, BLOCKS, BUDGETS = 1024, ("32", "64", "full"), ("5%", "10%")
#: task -> prompts; a text has many more scored tokens than a needle's answer
PROMPTS, FIT_PROMPTS = {"niah": 32, "text": 16}, 16
METHOD, FIT_SEED, SEED = "snapkv:window=8", 1, 0
KINDS = {"evict": "", "fewer": ",compensate=slots", "mean": ",compensate=mean,bias=none", "count": ",compensate=mean"}
KINDS |= {"weighted": ",compensate=weighted"}
CALLED = {"evict": "evict", "fewer": "slots empty", "mean": "mean", "count": "mean + ln n", "weighted": "weighted"}
Measured = dict[str, Any]


def capture(loaded: LoadedModel, work: Path, task: str, seed: int) -> Path:
    path, n = work / f"{task}{seed}.h5", PROMPTS[task] if seed == SEED else FIT_PROMPTS
    if not path.exists():
        samples = load_task(task, loaded.tokenizer, n, LENGTH, seed)
        run_capture(CaptureConfig(task, "tiny", n, LENGTH, seed), loaded, samples, path)
    return path


def text_of(row: Row, kind: str, option: str = "") -> str:
    """Return the policy that a row's figure is about."""
    block = f",block={row.block}" if kind != "evict" else ""
    return f"{row.policy}{KINDS[kind]}{block}{',' if option else ''}{option}"


def real_rows(loaded: LoadedModel, path: Path, rows: dict[str, tuple[Row, ...]]) -> dict[str, list[Measured]]:
    """Run all states of all possible rows once; return what each measure's prediction is worth, per row."""
    able = [row for row in rows["margin"] if row.message is None]
    kept = path.with_suffix(".npz")
    if not kept.exists():
        with open_capture(path) as held:
            cells = [(Policy.parse(row.policy), row.block) for row in able]
            nll, accuracy = run_states(loaded, held.samples, cells)
        np.savez(kept, nll=nll, accuracy=accuracy)
    held_figures = np.load(kept)
    nll, accuracy = held_figures["nll"], held_figures["accuracy"]
    weights = resample_weights(len(nll), 2000, 0)
    return {
        measure: [
            real_figures(nll[:, n], accuracy[:, n], row.cost, weights)
            for n, row in enumerate(row for row in found if row.message is None)
        ]
        for measure, found in rows.items()
    }


def gated(loaded: LoadedModel, path: Path, rows: tuple[Row, ...], fitted: tuple[Row, ...]) -> list[Measured]:
    """Run remedies behind the gates that other prompts suggest: lost margin, nll and accuracy above evicting alone."""
    asked = []
    for row, other in zip(rows, fitted, strict=True):
        for name in REMEDIES if row.message is None else ():
            option = other.gates[name]["option"]
            asked.append((row.block, name, option, text_of(row, "evict" if option is None else name, option or ""), row.policy))
    policies = [Policy.parse(text) for text in dict.fromkeys(text for *_, text, plain in asked for text in (text, plain))]
    place = {str(policy): i for i, policy in enumerate(policies)}
    with open_capture(path) as held:
        figures = []
        for sample in track(held.samples, len(held.samples), "gates"):
            real = refine_sample(loaded, sample, policies)
            predicted = evaluate_sample(sample, policies)
            figures.append([(-(p.margin_change or 0.0), r.nll, r.accuracy) for p, r in zip(predicted, real, strict=True)])
    table, weights = np.asarray(figures), resample_weights(len(figures), 2000, 0)
    found = []
    for block, name, option, text, plain in asked:
        above = table[:, place[str(Policy.parse(text))]] - table[:, place[str(Policy.parse(plain))]]
        parts = {key: estimate(above[:, i], weights) for i, key in enumerate(("margin", "nll", "accuracy"))}
        found.append({"policy": text, "block": block, "remedy": name, "gate": option, **parts})
    return found


def agreement(rows: dict[str, tuple[Row, ...]], real: dict[str, list[Measured]]) -> dict[str, Measured]:
    """Return how each prediction orders the five things that can be run: mean tau-b with the real nll, and pairs that are sure."""
    found: dict[str, Measured] = {}
    for measure in MEASURES:
        able = [row for row in rows[measure] if row.message is None]
        taus = []
        for row, figures in zip(able, real[measure], strict=True):
            sides = ([[side[name]] for name in REAL] for side in (row.cost, figures["nll"]))
            taus.append(float(tau_b(*(np.array(side) for side in sides))[0]))
        sure, agreed = (sum(figures[key] for figures in real[measure]) for key in ("sure", "as_predicted"))
        found[measure] = {
            "tau": float(np.mean(taus)),
            "least": min(taus),
            "most": max(taus),
            "sure": sure,
            "as_predicted": agreed,
        }
    return found


def held_bytes(loaded: LoadedModel, work: Path) -> dict[str, dict[str, int]]:
    """Return entries' bytes and what comes on top of what evicting alone holds, of one prompt."""
    found = {}
    with open_capture(capture(loaded, work, "niah", SEED)) as held:
        prompt = torch.tensor([held.samples[0].prompt_ids])
    row, plain_slack = Row(f"{METHOD},budget=10%", "64"), 0
    for kind in KINDS:
        cache = CompressedCache(Policy.parse(text_of(row, kind)), loaded.model)
        with torch.no_grad():
            loaded.model(prompt, past_key_values=cache, logits_to_keep=1)
        counted = cache.count_bytes()
        plain_slack = counted.slack if kind == "evict" else plain_slack
        found[kind] = {"entries": counted.allocated - counted.slack, "more_slack": counted.slack - plain_slack}
    return found


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def short(row: Row) -> str:
    return f"{row.policy.partition('budget=')[2].partition(',')[0]}, {row.block}"


def section(task: str, found: Measured) -> str:
    """Return the tables of one task."""
    parts = [f"## {task}, {PROMPTS[task]} prompts"]
    for measure, name in MEASURES.items():
        rows = [row for row in found["rows"][measure] if row.message is None]
        cells = [
            [short(r), *(f"{r.cost[n]:.2f}" for n in REAL), *(f"{r.causes[c].mean:.2f}" for c in CAUSES), r.loss["mean"].text()]
            for r in rows
        ]
        head = ["budget, block", *CALLED.values(), *(f"= {c}" for c in CAUSES), "mean above evict"]
        parts += [f"Predicted {name}; the causes add up to that of the plain mean:", table(head, cells)]
    rows, real = [row for row in found["rows"]["margin"] if row.message is None], found["real"]["margin"]
    nll = [
        [short(r), *(f"{f['nll'][n]:.3f}" for n in ("full", *REAL)), *(f["causes"][c].text(3) for c in CAUSES)]
        for r, f in zip(rows, real, strict=True)
    ]
    points = [
        [
            short(r),
            *(f"{f['accuracy'][n]:.3f}" for n in ("full", *REAL)),
            *(f["points"][n].text(3) for n in ("fewer", "mean", *REMEDIES)),
        ]
        for r, f in zip(rows, real, strict=True)
    ]
    orders = [
        [name, f"{a['tau']:+.2f} ({a['least']:+.2f} to {a['most']:+.2f})", f"{a['as_predicted']} of {a['sure']}"]
        for name, a in ((MEASURES[measure], found["order"][measure]) for measure in MEASURES)
    ]
    gates = [[f"`{g['policy']}`", g["margin"].text(), g["nll"].text(3), g["accuracy"].text(3)] for g in found["gated"]]
    return "\n\n".join(
        [
            *parts,
            "Real nll of the answer, all layers and heads together; the causes add up to what the plain mean is above the full cache:",
            table(["budget, block", "full", *CALLED.values(), *(f"= {c}" for c in CAUSES)], nll),
            "Real accuracy of the answer's tokens, and its difference from evicting alone:",
            table(
                [
                    "budget, block",
                    "full",
                    *CALLED.values(),
                    *(f"{CALLED[n]} above evict" for n in ("fewer", "mean", *REMEDIES)),
                ],
                points,
            ),
            "Predicted order of the five against the real nll: Kendall's tau-b, mean over the rows (least to largest), and how many of the "
            "differences between two of them that are sure have the predicted direction:",
            table(["predicted", "tau-b", "as predicted"], orders),
            "Behind the gates that prompts of another seed suggest by lost margin (evicting alone where they let no head through), above "
            "evicting alone:",
            table(["policy", "predicted lost margin", "real nll", "real accuracy"], gates),
        ]
    )


def measure_task(loaded: LoadedModel, work: Path, task: str) -> Measured:
    """Return everything about one task."""
    path, other = (capture(loaded, work, task, seed) for seed in (SEED, FIT_SEED))

    def rows_of(file: Path, measure: str) -> tuple[Row, ...]:
        config = AttributionConfig(str(file), (METHOD,), BUDGETS, BLOCKS, measure=measure)
        return run_attribution(config, work / f"{file.stem}_{measure}").rows

    rows = {measure: rows_of(path, measure) for measure in MEASURES}
    real = real_rows(loaded, path, rows)
    return {
        "rows": rows,
        "real": real,
        "order": agreement(rows, real),
        "gated": gated(loaded, path, rows["margin"], rows_of(other, "margin")),
    }


def main() -> None:
    work = Path(sys.argv[1] if len(sys.argv) > 1 else "build/compensation")
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    loaded = load_model("tiny", device="cpu")
    results = {task: measure_task(loaded, work, task) for task in PROMPTS}
    value = {
        "command": "python benchmarks/compensation.py",
        "model": loaded.info.fingerprint,
        "prompts": f"prompts of {LENGTH} tokens, seed {SEED}; gates from {FIT_PROMPTS} of seed {FIT_SEED}",
        "method": METHOD,
        "versions": {"python": platform.python_version(), "torch": version("torch"), "transformers": version("transformers")},
        "bytes": held_bytes(loaded, work),
        "results": results,
    }
    write_json(RESULT.with_suffix(".json"), plain(value))
    held = ", ".join(f"{CALLED[kind]} {b['entries']} + {b['more_slack']}" for kind, b in value["bytes"].items())
    head = f"`{value['command']}`: embedded model, {value['prompts']}, `{METHOD}`. How to read it: `docs/compensation.md`.\n"
    head += (
        f"\nBytes of the entries of one prompt at 10 %, block 64, and what comes on top of evicting alone (the bias): {held}.\n"
    )
    write_text(RESULT.with_suffix(".md"), head + "".join(f"\n{section(task, found)}\n" for task, found in results.items()))
    print(RESULT.with_suffix(".md").read_text())


def plain(value: Any) -> Any:
    """Return JSON values with six significant digits, without the figures per head (``heads.csv`` of the command has them)."""
    if isinstance(value, Row):
        return plain({key: each for key, each in value.to_json().items() if key != "heads"})
    if isinstance(value, Estimate):
        return plain({"mean": value.mean, "low": value.low, "high": value.high})
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
