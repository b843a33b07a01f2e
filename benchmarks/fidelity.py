"""How well the offline ranking agrees with reality: three tasks, both query modes, budgets of 1 to 20 %, any model.

    python benchmarks/fidelity.py WORK_FOLDER [MODEL ...]

For every model, task and mode one real run of 100 prompts (answers fed teacher-forced, nothing generated), one capture of the same
prompts and one of other prompts, ranked offline and by masked forwards (refined); a few of the judged prompts are refined as well,
to see that masked forwards are exact. What is made of them is written by ``fidelity_report.py``. Resumes when interrupted.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from kvtool.capture.reader import open_capture
from kvtool.capture.runner import CaptureConfig, run_capture
from kvtool.classify.runner import run_classify
from kvtool.data.tasks import load_task
from kvtool.files import read_records
from kvtool.infer.runner import RECORDS, InferConfig, run_infer
from kvtool.models import LoadedModel, load_model
from kvtool.policies import expand_policies
from kvtool.simulate.refine import refine_sample
from kvtool.simulate.runner import SimulateConfig, run_simulate

BUDGETS = ("1%", "2%", "3%", "5%", "7.5%", "10%", "15%", "20%")
TASKS = {"single": "niah", "multikey": "niah:kind=multikey,keys=8", "text": "text:continue=32,lead=32"}
MODES = ("prompt", "context")
LENGTH, PROMPTS, SEED = 1024, 100, 0
#: captures of other prompts: as a user would make them before prompts are known
OTHER_PROMPTS, OTHER_SEED = 32, 1000
#: head importance comes from needle prompts of a third seed
HEADS_PROMPTS, HEADS_SEED = 16, 500
#: judged prompts on which masked forwards are compared with the real cache
EXACT_PROMPTS = 8
POLICIES = (
    "window",
    "streaming",
    "h2o:window=4",
    "h2o:window=8",
    "observed:window=4",
    "snapkv:window=4,kernel=5",
    "snapkv:window=8,kernel=11",
    "snapkv:window=8,kernel=5,pool=avg",
    "pyramidkv:window=8,kernel=11",
    "cake:window=8,kernel=11",
    "adakv:window=8,kernel=11",
    "lava:window=8,kernel=11",
    "defensive:window=8,kernel=11",
    "critical:window=8,kernel=11",
    "tova",
    "expected:sink=4",
    "keydiff",
    "keynorm",
    "headkv:window=8,kernel=11,heads={heads}",
    "hace:scorer=snapkv,window=8,kernel=11,heads={heads}",
    "random:window=4",
)


def policy_texts(heads: Path) -> list[str]:
    """Return the policies with the heads file put in."""
    return [text.format(heads=heads) for text in POLICIES]


def capture(loaded: LoadedModel, task: str, n: int, seed: int, mode: Any, path: Path, length: int = LENGTH) -> None:
    """Capture a task; what is finished stays."""
    samples = load_task(task, loaded.tokenizer, n, length, seed)
    config = CaptureConfig(task, loaded.info.model_id, n, length, seed, mode, statistics=needed())
    run_capture(config, loaded, samples, path)


def needed() -> tuple[str, ...]:
    """Return the statistics that the policies need."""
    policies = expand_policies([text for text in POLICIES if "{" not in text], BUDGETS)
    return tuple(sorted({"window_mean/8", "window_var/8", *(name for policy in policies for name in policy.needs())}))


def check_exact(loaded: LoadedModel, folder: Path, texts: list[str]) -> None:
    """Refine a few of the judged prompts under every configuration; write the largest difference from the real cache."""
    out = folder / "exact.json"
    if out.exists():
        return
    policies = expand_policies(texts, BUDGETS, real=True)
    real = {(r["sample"], r["policy"]): r for r in read_records(folder / "run" / RECORDS)}
    worst, n = {"nll": 0.0, "margin": 0.0, "accuracy": 0.0}, 0
    with open_capture(folder / "same.h5") as capture:
        for sample in capture.samples[:EXACT_PROMPTS]:
            for policy, found in zip(policies, refine_sample(loaded, sample, policies), strict=True):
                record = real[sample.id, str(policy)]
                if record["status"] == "ok":
                    worst = {name: max(w, abs(getattr(found, name) - record[f"answer_{name}"])) for name, w in worst.items()}
                    n += 1
    out.write_text(json.dumps({"prompts": EXACT_PROMPTS, "units": n, "worst": worst}))


def make_cell(loaded: LoadedModel, work: Path, name: str, mode: Any, texts: list[str]) -> None:
    """Run one task in one mode for real and simulate it twice: on the prompts of the run, and on others."""
    task, folder = TASKS[name], work / f"{name}-{mode}"
    samples = load_task(task, loaded.tokenizer, PROMPTS, LENGTH, SEED)
    config = InferConfig(task, loaded.info.model_id, PROMPTS, LENGTH, SEED, mode, generate=False)
    run_infer(config, loaded, samples, expand_policies(texts, BUDGETS, real=True), folder / "run")
    for label, n, seed in (("same", PROMPTS, SEED), ("other", OTHER_PROMPTS, OTHER_SEED)):
        capture(loaded, task, n, seed, mode, folder / f"{label}.h5")
        run_simulate(SimulateConfig(str(folder / f"{label}.h5"), tuple(texts), BUDGETS), folder / f"sim-{label}")
    refined = SimulateConfig(str(folder / "other.h5"), tuple(texts), BUDGETS, refine=len(texts) * len(BUDGETS))
    run_simulate(refined, folder / "sim-refined", loaded)
    check_exact(loaded, folder, texts)


def main() -> None:
    work = Path(sys.argv[1])
    torch.set_num_threads(1)
    for model in sys.argv[2:] or ["tiny"]:
        loaded = load_model(model, device="cpu")
        here = work / loaded.info.model_id.replace("/", "_")
        here.mkdir(parents=True, exist_ok=True)
        capture(loaded, TASKS["single"], HEADS_PROMPTS, HEADS_SEED, "prompt", here / "heads.h5")
        if not (here / "heads.json").exists():
            run_classify(here / "heads.h5", here / "heads.json", importance="gain")
        for name in TASKS:
            for mode in MODES:
                make_cell(loaded, here, name, mode, policy_texts(here / "heads.json"))
        (here / "done.json").write_text(json.dumps({"model": loaded.info.fingerprint}))


if __name__ == "__main__":
    main()
