"""Which importance of heads gives the best budgets: attention, HeadKV's score, gain or ablation, in headkv and hace.

    python benchmarks/importance.py [WORK_FOLDER]

The embedded model, needle prompts of 1024 tokens. Importances are measured on 16 prompts and judged on 16 others: predicted harm,
and beside it the answer's accuracy in exact masked forwards. All rows have SnapKV's scores and the same protected window; only the
budgets of the heads differ. Intervals and differences by bootstrap over prompts, paired. Resumes when interrupted.
"""

from __future__ import annotations

import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvtool.analysis.importance_report import ImportanceSummary, pair_table, write_importance
from kvtool.capture.runner import CaptureConfig, run_capture
from kvtool.classify.importance import CAPTURED, MEASURES, measure_captured, write_heads
from kvtool.data.tasks import load_task
from kvtool.models import LoadedModel, load_model
from kvtool.policies import expand_policies
from kvtool.simulate.importance import ABLATION, RECORDS, CutConfig, run_ablation
from kvtool.simulate.plan import export_plan
from kvtool.simulate.rank import Row
from kvtool.simulate.runner import SimulateConfig, run_simulate
from kvtool.textgrid import markdown_grid
from policies import interval

RESULT = Path(__file__).parent / "results" / "importance"
LENGTH, PROMPTS, SEED, JUDGED_SEED = 1024, 16, 500, 0
BUDGETS = ("5%", "10%")
SCORER = "window=8,kernel=11"
SINK, WINDOW = 4, 32
#: what the others are compared with: the importance that kvtool classify writes
REFERENCE = "gain"


def make_captures(loaded: LoadedModel, work: Path) -> tuple[Path, Path]:
    """Capture the prompts to measure on and those to judge on."""
    paths = []
    for name, seed in (("measured", SEED), ("judged", JUDGED_SEED)):
        samples = load_task("niah", loaded.tokenizer, PROMPTS, LENGTH, seed)
        paths.append(work / f"{name}.h5")
        run_capture(CaptureConfig("niah", "tiny", PROMPTS, LENGTH, seed, "prompt"), loaded, samples, paths[-1])
    return paths[0], paths[1]


def make_heads(loaded: LoadedModel, capture: Path, work: Path) -> ImportanceSummary:
    """Measure all importances and write a heads file with each."""
    out = work / "importance"
    facts = measure_captured(capture, out, SINK, WINDOW)
    run_ablation(CutConfig(str(capture), SINK, WINDOW), loaded, out)
    summary = write_importance(out, [out / CAPTURED, out / ABLATION / RECORDS], None, facts)
    for measure in MEASURES:
        write_heads(capture, out / "importance.json", measure, work / f"{measure}.json")
    return summary


def texts(work: Path) -> dict[str, str]:
    """Return what is compared: label -> policy without a budget."""
    found = {}
    for measure in MEASURES:
        heads = work / f"{measure}.json"
        found[f"headkv, {measure}"] = f"headkv:{SCORER},heads={heads}"
        found[f"hace, {measure}"] = f"hace:scorer=snapkv,{SCORER},heads={heads}"
    return found | {
        "uniform (snapkv)": f"snapkv:{SCORER}",
        "optimal": f"optimal:plan={work / 'plan.json'}",
        "random": "random:sink=0,window=8",
    }


def judge(loaded: LoadedModel, capture: Path, work: Path) -> list[dict[str, Any]]:
    """Return one row per label and budget: harm and accuracy with intervals, and the difference from the reference."""
    labels = texts(work)
    config = SimulateConfig(str(capture), tuple(labels.values()), BUDGETS, refine=len(labels) * len(BUDGETS))
    rows: dict[tuple[str, str], Row] = {}
    by_policy = {str(policy): label for label, text in labels.items() for policy in expand_policies((text,), BUDGETS)}
    for row in run_simulate(config, work / "simulate", loaded).rows:
        rows[by_policy[row.policy], str(row.budget)] = row
    draws = np.random.default_rng(0).integers(0, PROMPTS, (2000, PROMPTS))
    judged = []
    for (label, budget), row in rows.items():
        assert row.refined is not None
        harm, accuracy = np.asarray(row.per_sample["harm"]), np.asarray(row.refined["per_sample"]["accuracy"])
        method, _, measure = label.partition(", ")
        cell: dict[str, Any] = {"method": method, "measure": measure, "budget": budget, "kept": row.retention}
        cell |= {"harm": interval(harm, draws), "accuracy": interval(accuracy, draws)}
        if measure and measure != REFERENCE:
            base = rows[f"{method}, {REFERENCE}", budget]
            assert base.refined is not None
            cell["harm_below_reference"] = interval(np.asarray(base.per_sample["harm"]) - harm, draws)
            cell["accuracy_over_reference"] = interval(accuracy - np.asarray(base.refined["per_sample"]["accuracy"]), draws)
        judged.append(cell)
    return judged


def table(rows: list[dict[str, Any]], budget: str) -> str:
    """Return one Markdown table, least harm first."""
    head = ["method", "importance", "predicted harm", f"less harm than {REFERENCE}", "answer accuracy", f"over {REFERENCE}"]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for row in sorted((r for r in rows if r["budget"] == budget), key=lambda r: r["harm"][0]):
        cells = [f"`{row['method']}`", row["measure"], "{:.2f} ({:.2f}-{:.2f})".format(*row["harm"])]
        cells.append(
            "{:+.2f} ({:+.2f} to {:+.2f})".format(*row["harm_below_reference"]) if "harm_below_reference" in row else ""
        )
        cells.append("{:.2f} ({:.2f}-{:.2f})".format(*row["accuracy"]))
        cells.append(
            "{:+.2f} ({:+.2f} to {:+.2f})".format(*row["accuracy_over_reference"]) if "harm_below_reference" in row else ""
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    work = Path(sys.argv[1] if len(sys.argv) > 1 else "build/importance")
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    loaded = load_model("tiny", device="cpu")
    measured, judged = make_captures(loaded, work)
    summary = make_heads(loaded, measured, work)
    export_plan(measured, f"snapkv:{SCORER}", work / "plan.json")
    rows = judge(loaded, judged, work)
    agreement = pair_table(summary.pairs["kv_heads"], summary.n_top["kv_heads"])
    value = {
        "command": "python benchmarks/importance.py",
        "model": loaded.info.fingerprint,
        "task": f"niah, {LENGTH} tokens; {PROMPTS} prompts of seed {SEED} to measure on, {PROMPTS} of seed {JUDGED_SEED} to judge on",
        "scorer": f"snapkv:{SCORER}",
        "cut": {"sink": SINK, "window": WINDOW},
        "versions": {"python": platform.python_version(), "torch": version("torch"), "transformers": version("transformers")},
        "budgets": rows,
        "agreement": {"header": agreement[0], "rows": agreement[1]},
    }
    RESULT.with_suffix(".json").write_text(json.dumps(value, indent=1) + "\n")
    text = f"`{value['command']}`: embedded model, {value['task']}. All rows have the scores of `{value['scorer']}`; an ablated head\n"
    text += f"keeps the first {SINK} and the last {WINDOW} entries. Accuracy: answer tokens right in exact masked forwards.\n"
    for budget in BUDGETS:
        text += f"\n## {budget} of the entries kept\n\n{table(rows, budget)}\n"
    text += f"\n## Agreement over KV heads\n\n{markdown_grid(*agreement)}\n"
    RESULT.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
