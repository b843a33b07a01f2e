"""Where the first-order prediction breaks, and what repairs it; embedded model, needle and text prompts.

    python benchmarks/first_order.py [WORK_FOLDER]

A path leads from the full cache (t = 0) to the compressed one (t = 1): in every layer the heads' output is (1 - t) times that over all
entries plus t times that over the kept ones. The slope of the answer's margin at t = 0 is the first-order prediction (``margin
change`` of ``docs/metrics.md``, by autograd instead of stored gains), its value at t = 1 is real. Slopes at two points are averaged
(second order), at three points Simpson's rule. One layer's t alone tells layers apart: what each costs exactly, and what is missed by
adding them. Means over the prompts and budgets of one retention.
"""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import kendalltau
from torch import Tensor

from kvtool.attention import AttentionCall, attention_handler, seen_cache
from kvtool.capture.reader import CapturedSample, open_capture
from kvtool.capture.runner import CaptureConfig, run_capture
from kvtool.data.tasks import load_task
from kvtool.models import LoadedModel, load_model
from kvtool.policies import Policy, expand_policies
from kvtool.scoring import score_tokens
from kvtool.simulate.refine import attend, fed_tokens, prefill, shown_by
from kvtool.simulate.runner import SimulateConfig, run_simulate
from kvtool.textgrid import markdown_grid

RESULT = Path(__file__).parent / "results" / "first_order"
TASKS = {"single needle": "niah", "eight keys": "niah:kind=multikey,keys=8", "text": "text:continue=32,lead=32"}
BUDGETS = ("2%", "5%", "10%", "20%", "50%")
PROMPTS, LENGTH, SEED = 16, 1024, 0
SCORER = "window=8,kernel=11"
POLICIES = (
    "window", "streaming", "h2o:window=8", f"snapkv:{SCORER}", f"pyramidkv:{SCORER}", f"cake:{SCORER}", f"adakv:{SCORER}",
    f"lava:{SCORER}", "tova", "keydiff", "keynorm", "random:sink=0,window=8",
)  # fmt: skip
#: label -> how the change of the summed margins is predicted
WAYS = {
    "first": "slope at the full cache (first order)",
    "losses": "the same without gains (minus harm)",
    "two": "slopes at both ends (second order)",
    "three": "slopes at three points",
    "layers": "each layer exactly, added",
}
Float = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Paths:
    """What C configurations do to one prompt, summed over its answer tokens; L layers.

    Attributes
    ----------
    real : ndarray of shape (C,)
        Change of the margins.
    slopes : dict of float to ndarray of shape (C, L)
        At t = 0, 0.5 and 1.
    alone : ndarray of shape (C, L)
        Change with one layer compressed.
    """

    real: Float
    slopes: dict[float, Float]
    alone: Float


def follow(loaded: LoadedModel, sample: CapturedSample, policies: list[Policy]) -> Paths:
    """Walk from the full cache to every configuration's."""
    layers = prefill(loaded, sample.prompt_ids[: sample.seq_len])
    fed, gold_ids = fed_tokens(sample)
    gold, n = torch.tensor(gold_ids), len(policies)
    full = shown_by(sample, [Policy.parse("full")] * n, layers)
    kept = shown_by(sample, policies, layers)

    def margins(t: Tensor) -> tuple[Tensor, Tensor]:
        def handler(call: AttentionCall) -> Tensor:
            whole, part = (attend(call, layers[call.layer], shown[call.layer]) for shown in (full, kept))
            return whole + t[:, call.layer, None, None, None] * (part - whole)

        t = t.requires_grad_()
        with torch.enable_grad(), attention_handler(loaded.model, handler):
            cache: Any = seen_cache(int(layers[0].keys.shape[1]), len(layers))
            ids = torch.tensor([fed]).expand(n, -1)
            logits = loaded.model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -len(gold) :]
        total = score_tokens(logits, gold).margin.sum(-1)
        (slope,) = torch.autograd.grad(total.sum(), t)
        return total.detach().double(), slope.double()

    shape = (n, len(layers))
    at = {t: margins(torch.full(shape, t)) for t in (0.0, 0.5, 1.0)}
    base = at[0.0][0]
    alone = [margins(torch.eye(len(layers))[layer].expand(shape).clone())[0] - base for layer in range(len(layers))]
    return Paths((at[1.0][0] - base).numpy(), {t: s.numpy() for t, (_, s) in at.items()}, torch.stack(alone, 1).numpy())


def predictions(found: Paths) -> dict[str, Float]:
    """Return the predicted changes, shape (C,) each; the harm is of a capture and added later."""
    first, middle, last = (found.slopes[t].sum(1) for t in (0.0, 0.5, 1.0))
    return {
        "first": first,
        "two": (first + last) / 2,
        "three": (first + 4 * middle + last) / 6,
        "layers": found.alone.sum(1),
    }


def task_rows(loaded: LoadedModel, task: str, work: Path) -> list[dict[str, Any]]:
    """Return one row per budget and way."""
    path = work / "c.h5"
    run_capture(
        CaptureConfig(task, "tiny", PROMPTS, LENGTH, SEED),
        loaded,
        load_task(task, loaded.tokenizer, PROMPTS, LENGTH, SEED),
        path,
    )
    ranked = {row.policy: row for row in run_simulate(SimulateConfig(str(path), POLICIES, BUDGETS), work / "sim").rows}
    policies = expand_policies(POLICIES, BUDGETS)
    with open_capture(path) as capture:
        paths = [follow(loaded, sample, policies) for sample in capture.samples]
        n_answer = np.asarray([len(fed_tokens(sample)[1]) for sample in capture.samples])
    real = np.stack([p.real for p in paths], 1)
    ways = {name: np.stack([predictions(p)[name] for p in paths], 1) for name in WAYS if name != "losses"}
    ways["losses"] = -np.asarray([ranked[str(policy)].per_sample["harm"] for policy in policies])
    one = {"alone": np.stack([p.alone for p in paths], 1), "slope": np.stack([p.slopes[0.0] for p in paths], 1)}
    rows = []
    for budget in BUDGETS:
        here = np.asarray([str(policy.budget) == budget for policy in policies])
        size, tokens = np.abs(real[here]).mean(), n_answer.mean()
        lone = np.abs(one["slope"][here] - one["alone"][here]).mean() / np.abs(one["alone"][here]).mean()
        for name in WAYS:
            predicted = ways[name][here]
            rows.append(
                {
                    "budget": budget,
                    "way": name,
                    "real": float(size / tokens),
                    "error": float(np.abs(predicted - real[here]).mean() / size),
                    "sign": float((np.sign(predicted) == np.sign(real[here]))[np.abs(real[here]) > 0.1 * n_answer].mean()),
                    "tau": float(kendalltau(predicted.mean(1), real[here].mean(1)).statistic),
                    "one_layer_error": float(lone),
                }
            )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return one Markdown table: error, sign and tau of every way, per retention."""
    head = [
        "retention",
        "real change a token",
        *(f"{words}: error, sign right, tau" for words in WAYS.values()),
        "first order, one layer cut: error",
    ]
    cells = []
    for budget in BUDGETS:
        here = {row["way"]: row for row in rows if row["budget"] == budget}
        ways = [f"{here[name]['error']:.0%}, {here[name]['sign']:.0%}, {here[name]['tau']:.2f}" for name in WAYS]
        cells.append([budget, f"{here['first']['real']:.2f}", *ways, f"{here['first']['one_layer_error']:.0%}"])
    return markdown_grid(head, cells)


def main() -> None:
    work = Path(sys.argv[1] if len(sys.argv) > 1 else "build/first_order")
    torch.set_num_threads(1)
    loaded = load_model("tiny", device="cpu")
    results = {}
    for label, task in TASKS.items():
        folder = work / label.replace(" ", "_")
        folder.mkdir(parents=True, exist_ok=True)
        results[label] = task_rows(loaded, task, folder)
    value = {
        "command": "python benchmarks/first_order.py",
        "model": loaded.info.fingerprint,
        "data": f"{PROMPTS} prompts of {LENGTH} tokens a task, seed {SEED}, compress_at prompt, {len(POLICIES)} policies",
        "versions": {"python": platform.python_version(), "torch": version("torch"), "transformers": version("transformers")},
        "results": results,
    }
    RESULT.with_suffix(".json").write_text(json.dumps(value, indent=1) + "\n")
    text = f"`{value['command']}`: embedded model, {value['data']}.\n\nError: mean absolute error over mean absolute real change. Sign: "
    text += "where the real change is above 0.1 a token. Tau: over the policies of a retention, means over prompts.\n"
    text += "".join(f"\n## {label}\n\n{table(rows)}\n" for label, rows in results.items())
    RESULT.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
