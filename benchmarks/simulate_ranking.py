"""How long it takes to rank 1,000 configurations on a capture of 16 prompts of 2048 tokens, on one core.

    python benchmarks/simulate_ranking.py [CAPTURE]

Without a capture one of the embedded model is made first. Timed: reading the arrays, scoring, sorting, curves, ranking with 1000
bootstrap draws and the shortlist; not timed: making the capture and importing torch.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch

from kvtool.capture.reader import open_capture
from kvtool.capture.runner import CaptureConfig, run_capture
from kvtool.data.tasks import load_task
from kvtool.models import load_model
from kvtool.policies import expand_policies
from kvtool.simulate.evaluate import evaluate_sample
from kvtool.simulate.rank import rank_rows, resample_weights
from kvtool.simulate.shortlist import make_shortlist

RESULT = Path(__file__).parent / "results" / "simulate_ranking.json"
REPEATS = 3


def configurations() -> list[str]:
    """50 different orders: windows, kernels, pools and groups of SnapKV, H2O, StreamingLLM, random seeds."""
    snapkv = [
        f"snapkv:window={w},kernel={k},pool={p},group={g}"
        for w in (16, 32)
        for k in (3, 7, 15)
        for p in ("max", "avg")
        for g in ("mean", "max", "sum")
    ]
    h2o = [f"h2o:window={w},group={g}" for w in (8, 32) for g in ("mean", "max")]
    return [*snapkv, *h2o, *(f"streaming:sink={s}" for s in (0, 1, 4, 8)), *(f"random:seed={s}" for s in range(6))]


def budgets() -> list[str]:
    return [f"{p}%" for p in (2, 2.5, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 18, 20, 25, 30, 35, 40, 50)]


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else folder / "capture.h5"
    if not path.exists():
        loaded = load_model("tiny", device="cpu")
        config = CaptureConfig(task="niah", model="tiny", n=16, length=2048)
        run_capture(config, loaded, load_task("niah", loaded.tokenizer, 16, 2048), path)
    policies = expand_policies(configurations(), budgets())
    seconds = []
    for _ in range(REPEATS):
        with open_capture(path) as capture:
            started = time.perf_counter()
            predictions = [evaluate_sample(sample, policies) for sample in capture.samples]
            weights = resample_weights(len(capture.samples), 1000, 0)
            rows = rank_rows(policies, predictions, capture.model, [sum(s.compressible) for s in capture.samples], weights)
            make_shortlist(rows, weights)
            seconds.append(time.perf_counter() - started)
            n_samples, lengths = len(capture.samples), sorted({s.seq_len for s in capture.samples})
    result = {
        "command": "python benchmarks/simulate_ranking.py",
        "configurations": len(policies),
        "prompts": n_samples,
        "tokens": lengths,
        "seconds": [round(s, 3) for s in seconds],
        "median_s": round(statistics.median(seconds), 3),
        "threads": 1,
        "processor": platform.machine(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("torch", "numpy", "h5py")}},
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
