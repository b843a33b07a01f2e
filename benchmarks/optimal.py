"""Optimal budgets for real: the same scorer under every way to share a budget, at equal bytes.

    python benchmarks/optimal.py [WORK_FOLDER]

Plans and head scores come from needle prompts of 1024 tokens of another seed, judged are prompts of 1024 tokens and, with the same
plan, of 2048. Resumes when interrupted. Accuracy as in ``policies.py``; differences from `optimal` paired, by bootstrap over prompts.
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

from kvtool.data.tasks import load_task
from kvtool.files import read_records
from kvtool.infer.runner import RECORDS, InferConfig, run_infer
from kvtool.models import LoadedModel, load_model
from kvtool.policies import expand_policies, method_key
from kvtool.simulate.plan import export_plan
from policies import interval, make_heads

RESULT = Path(__file__).parent / "results" / "optimal"
BUDGETS = ("2%", "3%", "5%", "7.5%", "10%", "15%", "20%")
PROMPTS, SEED = 48, 0
SCORER = "window=8,kernel=11"
LENGTHS = (1024, 2048)


def texts(plan: Path, heads: Path) -> dict[str, str]:
    """Return what is compared: label -> policy, all with SnapKV's scores and the same protected window."""
    return {
        "optimal": f"optimal:plan={plan}",
        "optimal, rank 1": f"optimal:plan={plan},shape=rank1",
        "optimal, by layer": f"optimal:plan={plan},shape=layer",
        "HACE": f"hace:scorer=snapkv,{SCORER},heads={heads}",
        "HACE, heads only": f"hace-head:scorer=snapkv,{SCORER},heads={heads}",
        "HACE, layers only": f"hace-layer:scorer=snapkv,{SCORER}",
        "HeadKV": f"headkv:{SCORER},heads={heads}",
        "PyramidKV": f"pyramidkv:{SCORER}",
        "AdaKV": f"adakv:{SCORER}",
        "uniform (SnapKV)": f"snapkv:{SCORER}",
    }


def measure(loaded: LoadedModel, work: Path, heads: Path, mode: Any, length: int) -> dict[str, dict[str, list[float]]]:
    """Return label -> budget -> accuracy per prompt."""
    plan = work / f"plan_{mode}.json"
    if not plan.exists():
        export_plan(work / f"{mode}.h5", f"snapkv:{SCORER}", plan)
    labels = texts(plan, heads)
    samples = load_task("niah", loaded.tokenizer, PROMPTS, length, SEED)
    folder = work / f"{mode}{length}"
    config = InferConfig("niah", "tiny", PROMPTS, length, SEED, mode)
    run_infer(config, loaded, samples, expand_policies(list(labels.values()), BUDGETS, real=True), folder)
    first = expand_policies(list(labels.values()), BUDGETS[:1], real=True)
    by_method = {method_key(policy): label for policy, label in zip(first, labels, strict=True)}
    found: dict[str, dict[str, list[float]]] = {}
    for record in read_records(folder / RECORDS):
        if record["method"] in by_method:
            found.setdefault(by_method[record["method"]], {}).setdefault(record["budget"], []).append(record["answer_accuracy"])
    return found


def rows_of(found: dict[str, dict[str, list[float]]], rng: np.random.Generator) -> list[dict[str, Any]]:
    """Return mean per budget, mean over budgets, and its paired difference from `optimal`."""
    draws = rng.integers(0, PROMPTS, (2000, PROMPTS))
    best = np.mean([found["optimal"][b] for b in BUDGETS], axis=0)
    rows = []
    for label, by_budget in found.items():
        table = np.asarray([by_budget[b] for b in BUDGETS])
        rows.append(
            {
                "label": label,
                "accuracy": {b: float(x) for b, x in zip(BUDGETS, table.mean(1), strict=True)},
                "mean": interval(table.mean(0), draws),
                "below_optimal": interval(best - table.mean(0), draws),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return one Markdown table, best first."""
    lines = ["| budgets | " + " | ".join(BUDGETS) + " | mean | optimal is ahead by |", "| --- " * (len(BUDGETS) + 3) + "|"]
    for row in sorted(rows, key=lambda r: -r["mean"][0]):
        cells = " | ".join(f"{row['accuracy'][b]:.2f}" for b in BUDGETS)
        ahead = "" if row["label"] == "optimal" else "{:+.3f} ({:+.3f} to {:+.3f})".format(*row["below_optimal"])
        lines.append(f"| {row['label']} | {cells} | {row['mean'][0]:.3f} | {ahead} |")
    return "\n".join(lines)


def main() -> None:
    work = Path(sys.argv[1] if len(sys.argv) > 1 else "build/optimal")
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    loaded, rng = load_model("tiny", device="cpu"), np.random.default_rng(0)
    heads = make_heads(loaded, work)
    results = {
        f"{mode}, {length} tokens": rows_of(measure(loaded, work, heads, mode, length), rng)
        for length in LENGTHS
        for mode in ("prompt", "context")
    }
    value = {
        "command": "python benchmarks/optimal.py",
        "model": loaded.info.fingerprint,
        "task": f"niah, {PROMPTS} prompts, seed {SEED}; plans and heads from 16 prompts of 1024 tokens of another seed",
        "scorer": f"snapkv:{SCORER}",
        "versions": {"python": platform.python_version(), "torch": version("torch"), "transformers": version("transformers")},
        "results": results,
    }
    RESULT.with_suffix(".json").write_text(json.dumps(value, indent=1) + "\n")
    head = f"`{value['command']}`: embedded model, {value['task']}. Accuracy of the answer's tokens, all with "
    head += f"the scores of `{value['scorer']}`.\n"
    text = head + "".join(f"\n## compress_at {name}\n\n{table(rows)}\n" for name, rows in results.items())
    RESULT.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
