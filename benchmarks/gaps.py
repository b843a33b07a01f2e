"""Where the loss of the policies comes from, and what fitted layer and head factors are worth; embedded model, needle prompts.

    python benchmarks/gaps.py [WORK_FOLDER]

16 prompts of 1024 tokens, question-aware and question-agnostic. Gaps as `kvtool analyze gaps` finds them; plans and kinds of heads come
from 16 prompts of another seed. Captures that lie in the folder already are used.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvtool.capture.reader import open_capture
from kvtool.capture.runner import CaptureConfig, run_capture
from kvtool.classify.runner import run_classify
from kvtool.data.tasks import load_task
from kvtool.models import load_model
from kvtool.policies import Policy
from kvtool.policies.hull import rank_one
from kvtool.policies.planfile import read_plan
from kvtool.policies.rankone import CurveTable
from kvtool.policies.shapes import SHAPES, shaped_budgets
from kvtool.policies.shares import share
from kvtool.simulate.gap_curves import PromptCurves, prompt_curves, ranking_of
from kvtool.simulate.gap_rows import GapRow
from kvtool.simulate.gap_runner import GapConfig, run_gaps
from kvtool.simulate.gaps import PARTS, Yardstick
from kvtool.simulate.plan import export_plan
from kvtool.simulate.prompts import usable_prompts

RESULT = Path(__file__).parent / "results" / "gaps"
BUDGETS = ("2%", "3%", "5%", "7.5%", "10%", "15%", "20%", "30%")
SHOWN = ("2%", "5%", "10%", "20%")
MODES: tuple[Any, ...] = ("prompt", "context")
PROMPTS, LENGTH, SEED, PLAN_SEED = 16, 1024, 0, 1
SCORER = "window=8,kernel=11"
POLICIES = (
    f"snapkv:{SCORER}",
    "h2o:window=8",
    f"pyramidkv:{SCORER}",
    "cake:window=8",
    f"adakv:{SCORER}",
    f"headkv:{SCORER}",
    f"hace:scorer=snapkv,{SCORER}",
    "duo:sink=4,recent=8",
    "keydiff",
    "random:window=8",
)


def captured(work: Path, mode: Any, seed: int) -> Path:
    """Capture needle prompts, if they are not there yet."""
    path = work / f"{mode}{seed}.h5"
    if not path.exists():
        loaded = load_model("tiny", device="cpu")
        samples = load_task("niah", loaded.tokenizer, PROMPTS, LENGTH, seed)
        run_capture(CaptureConfig("niah", "tiny", PROMPTS, LENGTH, seed, mode), loaded, samples, path)
    return path


def gap_rows(path: Path, heads: Path, work: Path) -> tuple[list[GapRow], list[str], float]:
    """Return the rows, what the command says, and the CPU seconds that it took."""
    start = time.process_time()
    summary = run_gaps(GapConfig(str(path), POLICIES, BUDGETS, str(heads)), work / f"gaps_{path.stem}")
    return list(summary.rows), list(summary.sentences), time.process_time() - start


def read_curves(path: Path, policy: Policy) -> list[PromptCurves]:
    with open_capture(path) as capture:
        return [prompt_curves(sample, [policy]) for sample in usable_prompts(capture, "gaps")]


def shape_harms(work: Path, mode: Any) -> dict[str, dict[str, dict[str, float]]]:
    """Return budget -> shape -> harm that a plan of other prompts expects (``plan``) and that comes true on these (``held_out``).

    ``marginals`` is the rank-one form that kvtool had before: the product of the optimum's margins.
    """
    path = work / f"plan_{mode}.json"
    export_plan(captured(work, mode, PLAN_SEED), f"snapkv:{SCORER}", path)
    plan, policy = read_plan(str(path)), Policy.parse(f"snapkv:budget=100%,{SCORER}")
    sides = {"plan": PLAN_SEED, "held_out": SEED}
    curves = {
        side: [p.harm[ranking_of(policy)] for p in read_curves(captured(work, mode, seed), policy)]
        for side, seed in sides.items()
    }
    yardsticks = {side: Yardstick(each, plan.protected) for side, each in curves.items()}
    found: dict[str, dict[str, dict[str, float]]] = {}
    for budget in BUDGETS:
        percent = float(budget.rstrip("%")) / 100
        rows: dict[str, dict[str, float]] = {}
        for side, yardstick in yardsticks.items():
            entries, heads = round(percent * yardstick.length), plan.harm[0].size
            totals = [heads * round(percent * (len(curve) - 1)) for curve in curves[side]]
            budgets = {s: plan.budgets(entries, yardstick.length, plan.protected, s) for s in SHAPES if s != "kinds"}
            margins = rank_one(budgets["free"].astype(np.float64), plan.protected) - plan.protected
            flat = share(heads * entries, margins.ravel().tolist(), plan.protected, yardstick.length)
            every = {**budgets, "marginals": np.asarray(flat).reshape(margins.shape)}
            for shape, each in every.items():
                harm = float(yardstick.harms(yardstick.scaled(each, totals)).mean())
                rows.setdefault(shape, {})[side] = harm
        found[budget] = rows
    return found


def hull_misses(path: Path) -> dict[str, float]:
    """Return how much more harm, as a share, water-filling on hulls does than the proved optimum, on the very curves that it was given."""
    misses = []
    for text in ("snapkv:window=8,kernel=11", "h2o:window=8", "keydiff", "random:window=8"):
        policy = Policy.parse(f"{text}{',' if ':' in text else ':'}budget=100%")
        yardstick = Yardstick([p.harm[ranking_of(policy)] for p in read_curves(path, policy)], policy.minimum(LENGTH))
        entries = np.arange(yardstick.least, yardstick.length + 1)
        for budget in BUDGETS:
            mean = round(float(budget.rstrip("%")) / 100 * yardstick.length)
            best = yardstick.best(mean * yardstick.mean[0].size, "free")
            table = CurveTable(entries, yardstick.mean.transpose(1, 2, 0))
            followed = shaped_budgets(entries, yardstick.mean, int(best.budgets.sum()), "free")
            misses.append(float(table.sum(followed)) / best.harm - 1)
    return {"configurations": len(misses), "median": float(np.median(misses)), "largest": max(misses)}


def gap_table(rows: list[GapRow]) -> str:
    """Return a Markdown table of the parts with their intervals."""
    lines = ["| budget | policy | shape | harm | oracle | " + " | ".join(PARTS) + " |", "| --- " * (5 + len(PARTS)) + "|"]
    for row in rows:
        if row.budget not in SHOWN or row.harm is None or row.oracle is None:
            continue
        cells = " | ".join(f"{p.mean:.2f} ({p.low:.2f} to {p.high:.2f})" for p in (row.parts[name] for name in PARTS))
        name = row.policy.partition(":")[0]
        lines.append(f"| {row.budget} | {name} | {row.shape} | {row.harm.mean:.2f} | {row.oracle.mean:.2f} | {cells} |")
    return "\n".join(lines)


def facts(rows: list[GapRow]) -> dict[str, Any]:
    """Return how often parts are negative, how exactly they add up, and how often one or two parts explain most."""
    able = [row for row in rows if row.loss is not None]
    sums = [abs(sum(row.parts[name].mean for name in PARTS) - row.loss.mean) for row in able if row.loss]
    return {
        "configurations": len(able),
        "largest_miss_of_the_sum": max(sums),
        "negative_parts": {name: sum(row.parts[name].mean < -1e-9 for row in able) for name in PARTS},
        "less_harm_than_the_oracle": sum(row.loss.mean < -1e-9 for row in able if row.loss),
        "not_proved": sum(row.slack > 1e-9 for row in able),
        "explained_to_80_percent_by_parts": {str(n): sum(len(row.explains) == n for row in able) for n in (1, 2, 3, 4)},
    }


def shape_text(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """Return Markdown: harm on prompts that the plan has not seen, by shape and budget."""
    order = ("uniform", "layer", "head", "within", "marginals", "rank1", "free")
    lines = [
        "| shape | " + " | ".join(BUDGETS) + " | mean | mean on the plan's own prompts |",
        "| --- " * (len(BUDGETS) + 3) + "|",
    ]
    for shape in order:
        held, own = ([found[b][shape][side] for b in BUDGETS] for side in ("held_out", "plan"))
        cells = " | ".join(f"{x:.2f}" for x in held)
        name = {"marginals": "rank1, product of the margins (before)", "rank1": "rank1, fitted factors"}.get(shape, shape)
        lines.append(f"| {name} | {cells} | {np.mean(held):.2f} | {np.mean(own):.2f} |")
    return "\n".join(lines)


def main() -> None:
    work = Path(sys.argv[1] if len(sys.argv) > 1 else "build/gaps")
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    heads = work / "heads.json"
    run_classify(captured(work, "prompt", PLAN_SEED), heads, importance="gain")
    results: dict[str, Any] = {}
    text = (
        f"`python benchmarks/gaps.py`: embedded model, niah, {PROMPTS} prompts of {LENGTH} tokens (seed {SEED}); plans and heads from "
        f"{PROMPTS} of another seed. Predicted harm (lost margin), mean over prompts with 95 % intervals; best budgets fitted on the same "
        "prompts, oracle = future attention with the best free budgets.\n"
    )
    for mode in MODES:
        rows, said, seconds = gap_rows(captured(work, mode, SEED), heads, work)
        shapes = shape_harms(work, mode)
        results[mode] = {"rows": [row.to_json() for row in rows], "sentences": said, "facts": facts(rows), "shapes": shapes}
        results[mode]["cpu_seconds"] = seconds
        results[mode]["facts"]["hulls_above_the_optimum"] = hull_misses(captured(work, mode, SEED))
        for row in results[mode]["rows"]:
            del row["per_sample"]
        text += f"\n## compress_at {mode}\n\n{gap_table(rows)}\n\n" + "".join(f"- {each}\n" for each in said)
        text += f"- {json.dumps(results[mode]['facts'])}\n"
        text += f"- {len(POLICIES)} policies x {len(BUDGETS)} budgets: {seconds:.1f} s of one core\n"
        text += f"\nSnapKV's ranking under plans of other prompts, harm by the shape of the budgets:\n\n{shape_text(shapes)}\n"
    value = {
        "command": "python benchmarks/gaps.py",
        "policies": list(POLICIES),
        "versions": {"python": platform.python_version(), "numpy": version("numpy"), "torch": version("torch")},
        "results": results,
    }
    RESULT.with_suffix(".json").write_text(json.dumps(value, indent=1) + "\n")
    RESULT.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
