"""Does what a search finds hold in real runs on fresh prompts?

    python benchmarks/search.py [WORK_FOLDER]

A capture of 32 needle prompts of 1024 tokens; `kvtool search --auto` (SnapKV's window, kernel, pooling and compensation block at 5 and
10 %) and 96 trials of TPE over CAKE's parameters at 5 %, searched on 16 of them, once by risk and once by harm. What was chosen, the
best setting where a simpler one was chosen, the defaults, and the control then generate for real on 32 prompts of another seed. Resumes
when interrupted.
Accuracy: share of the answer's tokens that compression can change; differences from the defaults paired, by bootstrap over prompts.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvtool.capture.runner import CaptureConfig, run_capture
from kvtool.data.tasks import load_task
from kvtool.files import read_records
from kvtool.infer.runner import RECORDS, InferConfig, run_infer
from kvtool.models import load_model
from kvtool.policies import Policy
from kvtool.simulate.choose import confirmation
from kvtool.simulate.search import SearchConfig, SearchSummary, run_search
from kvtool.simulate.trials import By

RESULT = Path(__file__).parent / "results" / "search"
PROMPTS, LENGTH, FRESH = 32, 1024, 1000


BYS: tuple[By, ...] = ("risk", "harm")


def searches(capture: Path) -> dict[str, SearchConfig]:
    found = {}
    for by in BYS:
        found[f"auto, by {by}"] = SearchConfig(str(capture), "", ("5%", "10%"), auto=True, by=by)
        found[f"cake, by {by}"] = SearchConfig(str(capture), "cake", ("5%",), trials=96, by=by)
    return found


def rows_of(summary: SearchSummary, accuracy: dict[str, np.ndarray], draws: np.ndarray) -> list[dict[str, Any]]:
    """Return one row per policy that ran; the difference is from the defaults of the same budget."""
    rows = []
    for verdict in summary.verdicts:
        default = accuracy[str(verdict.default)]
        control = next(e["policy"] for e in confirmation([verdict]) if e["why"].startswith("control"))
        named = {
            "chosen": (verdict.policy, verdict.searched, verdict.held_out),
            "the best": (verdict.best if verdict.best != verdict.policy else None, None, None),
            "defaults": (verdict.default, verdict.default_searched, verdict.default_held_out),
            "control": (control, None, None),
        }
        for label, (policy, searched, held_out) in named.items():
            if policy is None:
                continue
            difference = accuracy[policy] - default
            rows.append(
                {
                    "budget": verdict.budget,
                    "what": label,
                    "policy": policy,
                    "searched": searched,
                    "held_out": held_out,
                    "accuracy": float(accuracy[policy].mean()),
                    "difference": float(difference.mean()),
                    "interval": np.quantile(difference[draws].mean(axis=1), [0.025, 0.975]).tolist(),
                }
            )
    return rows


def table(rows: list[dict[str, Any]], by: str) -> str:
    lines = [
        f"| budget | | policy | {by}, searched | {by}, held out | accuracy, fresh prompts | against the defaults (95 %) |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        losses = ["" if row[key] is None else f"{row[key]:.2f}" for key in ("searched", "held_out")]
        low, high = row["interval"]
        gap = "" if row["what"] == "defaults" else f"{row['difference']:+.2f} ({low:+.2f} to {high:+.2f})"
        lines.append(
            f"| {row['budget']} | {row['what']} | `{row['policy']}` | {losses[0]} | {losses[1]} | {row['accuracy']:.2f} | {gap} |"
        )
    return "\n".join(lines)


def main() -> None:
    torch.set_num_threads(1)
    work = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp())
    loaded, capture = load_model("tiny", device="cpu"), work / "c1024.h5"
    if not capture.exists():
        samples = load_task("niah", loaded.tokenizer, PROMPTS, LENGTH, 0)
        run_capture(CaptureConfig("niah", "tiny", PROMPTS, LENGTH, 0), loaded, samples, capture)
    found = {name: run_search(config, work / name.replace(", by ", "-")) for name, config in searches(capture).items()}
    wanted = {e["policy"] for s in found.values() for e in confirmation(s.verdicts)}
    wanted |= {v.best for s in found.values() for v in s.verdicts}
    fresh = load_task("niah", loaded.tokenizer, PROMPTS, LENGTH, FRESH)
    policies = [Policy.parse(text) for text in sorted(wanted)]
    run_infer(InferConfig("niah", "tiny", PROMPTS, LENGTH, FRESH), loaded, fresh, policies, work / "fresh")
    scores: dict[str, list[float]] = {}
    for record in read_records(work / "fresh" / RECORDS):
        scores.setdefault(record["policy"], []).append(record["answer_accuracy"])
    accuracy = {policy: np.asarray(values) for policy, values in scores.items()}
    draws = np.random.default_rng(0).integers(PROMPTS, size=(2000, PROMPTS))
    result: dict[str, Any] = {
        "command": "python benchmarks/search.py",
        "prompts": {"searched": 16, "held_out": 16, "fresh": PROMPTS},
        "full_accuracy": float(accuracy["full"].mean()),
        "versions": {"python": platform.python_version(), **{n: version(n) for n in ("torch", "numpy", "optuna")}},
    }
    pages = [
        "# What a search finds, in real runs",
        "",
        "`python benchmarks/search.py`; embedded model, needle prompts of 1024 tokens.",
        "",
    ]
    for name, summary in found.items():
        rows = rows_of(summary, accuracy, draws)
        result[name] = {"space": summary.space, "trials": summary.n_trials, "rows": rows, "least": summary.marginals}
        pages += [f"## {name}: {summary.n_trials} trials of `{summary.space}`", "", table(rows, summary.by), ""]
    RESULT.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    RESULT.with_suffix(".md").write_text("\n".join(pages))
    print("\n".join(pages))


if __name__ == "__main__":
    main()
