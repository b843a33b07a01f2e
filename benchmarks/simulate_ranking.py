"""How fast configurations are ranked offline: many on a small model, some on a capture with the shape of a 7B model, and against `infer`.

    python benchmarks/simulate_ranking.py search [--capture C]     10,000 configurations, 16 prompts x 2048 tokens, embedded model
    python benchmarks/simulate_ranking.py large [--capture C]      1,000 configurations, 32 layers x 32 heads (8 KV), 8 prompts x 4096
    python benchmarks/simulate_ranking.py ratio [--capture C]      one configuration of the search against one of kvtool infer

Captures are made first where none is given (``synthetic_capture.py`` for `large`). Timed: reading the arrays, scoring, sorting,
sharing budgets out, curves, ranking with 1000 bootstrap draws and the shortlist; not timed: making the capture and importing torch.
Wall time depends on what else the machine does; processor time (of all processes) does not. Peak memory is of the largest process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from kvtool.capture.reader import Capture, open_capture
from kvtool.classify.runner import run_classify
from kvtool.data.tasks import load_task
from kvtool.models import load_model
from kvtool.policies import Policy, expand_policies
from kvtool.simulate.rank import rank_rows, resample_weights
from kvtool.simulate.shortlist import make_shortlist
from kvtool.simulate.workers import evaluate_samples

RESULT = Path(__file__).parent / "results" / "simulate_ranking.json"
LENGTH, PROMPTS = 2048, 16


def search_methods(heads: str) -> list[str]:
    """200 methods of all kinds: per-head, per-layer and global budgets, two-stage ranking, and controls."""
    windows, kernels = (8, 16, 32), (3, 7, 11, 15)
    snapkv = [
        f"snapkv:window={w},kernel={k},pool={p},group={g}"
        for w in windows
        for k in kernels
        for p in ("max", "avg")
        for g in ("mean", "max")
    ]
    adakv = [f"adakv:window={w},kernel={k},floor={f}" for w in windows for k in (3, 7, 11) for f in (0.1, 0.2, 0.4)]
    pyramid = [f"pyramidkv:window={w},kernel={k},beta={b}" for w in windows for k in (7, 11) for b in (5, 10, 20)]
    cake = [
        f"cake:window={w},gamma={g},tau1={t},kernel={k}"
        for w in (8, 32)
        for g in (0, 50, 200)
        for t in (0.6, 1, 1.6)
        for k in (5, 11)
    ]
    powers = [(a, b) for a in (0.5, 1) for b in (0.5, 1, 2)]
    hace = [
        f"hace:heads={heads},window={w},layer_power={a},head_power={b},floor={f}"
        for w in (8, 32)
        for a, b in powers
        for f in (0, 0.2)
    ]
    headkv = [f"headkv:heads={heads},window={w},beta={b}" for w in (8, 32) for b in (1.1, 1.5, 3)]
    lava = [f"lava:window={w},kernel={k}" for w in windows for k in (5, 7, 11)]
    others = [
        "h2o:window=8",
        "h2o:window=32",
        "h2o:group=max",
        "observed",
        "tova",
        "keydiff",
        "keynorm",
        "expected",
        "expected:window=8",
    ]
    others += ["critical:window=8", "defensive:window=8", *(f"streaming:sink={s}" for s in (0, 1, 4, 8))]
    controls = [f"random:seed={s},window={w}" for s in range(4) for w in (8, 32)]
    return [*snapkv, *adakv, *pyramid, *cake, *hace, *headkv, *lava, *others, *controls]


def large_methods(heads: str) -> list[str]:
    """50 methods for the synthetic capture, which has the windows 8 and 32 and no projected values."""
    snapkv = [f"snapkv:window={w},kernel={k},pool={p}" for w in (8, 32) for k in (3, 7, 11) for p in ("max", "avg")]
    adakv = [f"adakv:window={w},floor={f}" for w in (8, 32) for f in (0.1, 0.2, 0.4)]
    cake = [f"cake:window={w},gamma={g}" for w in (8, 32) for g in (0, 50, 200)]
    hace = [f"hace:heads={heads},window={w},layer_power={a}" for w in (8, 32) for a in (0.5, 1)]
    pyramid = [f"pyramidkv:window={w},beta={b}" for w in (8, 32) for b in (5, 20)]
    rest = [f"lava:window={w}" for w in (8, 32)] + [f"headkv:heads={heads},window={w}" for w in (8, 32)]
    rest += ["h2o:window=8", "h2o:window=32", "observed", "tova", "keydiff", "keynorm"]
    rest += [f"streaming:sink={s}" for s in (0, 1, 4, 8)] + [f"random:seed={s}" for s in range(4)]
    return [*snapkv, *adakv, *cake, *hace, *pyramid, *rest]


def budgets(n: int, low: float = 1.8, high: float = 50.0) -> list[str]:
    """Return n budgets between `low` and `high` percent, evenly on a logarithmic scale."""
    return [f"{low * (high / low) ** (i / (n - 1)):.2f}%" for i in range(n)]


def processor_seconds() -> float:
    """Return the processor time of this process and its finished children."""
    return sum(
        usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def peak_bytes() -> int:
    """Return the largest resident set of this process or one of its finished children."""
    return 1024 * max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def rank(capture: Capture, policies: Sequence[Policy], jobs: int) -> int:
    """Rank all configurations; returns how many were shortlisted."""
    predictions = [found for _, found in evaluate_samples(capture, capture.samples, policies, jobs)]
    weights = resample_weights(len(capture.samples), 1000, 0)
    rows = rank_rows(policies, predictions, capture.model, [sum(s.compressible) for s in capture.samples], weights)
    make_shortlist(rows, weights)
    return sum(row.shortlisted for row in rows)


def timed(capture_path: Path, policies: Sequence[Policy], jobs: int) -> dict[str, Any]:
    """Return the figures of one ranking."""
    with open_capture(capture_path) as capture:
        wall, used = time.perf_counter(), processor_seconds()
        shortlisted = rank(capture, policies, jobs)
        wall, used = time.perf_counter() - wall, processor_seconds() - used
        lengths = sorted({sample.seq_len for sample in capture.samples})
        return {
            "configurations": len(policies),
            "prompts": len(capture.samples),
            "tokens": lengths,
            "layers": capture.model.n_layers,
            "kv_heads": capture.model.n_kv_heads,
            "probe_tokens": sorted({sample.n_probe for sample in capture.samples}),
            "file_bytes": capture_path.stat().st_size,
            "jobs": jobs,
            "wall_s": round(wall, 2),
            "processor_s": round(used, 2),
            "load_average_1min": round(os.getloadavg()[0], 1),
            "peak_bytes": peak_bytes(),
            "shortlisted": shortlisted,
            "processor_ms_per_configuration_and_prompt": round(1000 * used / len(policies) / len(capture.samples), 4),
        }


def small_capture(folder: Path, given: Path | None) -> Path:
    """Return a capture of the embedded model."""
    from kvtool.capture.runner import CaptureConfig, run_capture

    path = given or folder / "capture.h5"
    if not path.exists():
        loaded = load_model("tiny", device="cpu")
        config = CaptureConfig(task="niah", model="tiny", n=PROMPTS, length=LENGTH)
        run_capture(config, loaded, load_task("niah", loaded.tokenizer, PROMPTS, LENGTH), path)
    return path


def search(folder: Path, given: Path | None, jobs: int) -> dict[str, Any]:
    """10,000 configurations on the embedded model."""
    path, heads = small_capture(folder, given), folder / "heads.json"
    run_classify(path, heads)
    policies = expand_policies(search_methods(str(heads)), budgets(53))[:10_000]
    return timed(path, policies, jobs)


def large(folder: Path, given: Path | None, jobs: int) -> dict[str, Any]:
    """1,000 configurations on a capture with the shape of a 7B model."""
    from synthetic_capture import parse_shape, write_capture  # the benchmark beside this one

    path = given or folder / "synthetic.h5"
    if not path.exists():
        write_capture(path, parse_shape([str(path)]))
    heads = folder / "heads.json"
    with open_capture(path) as capture:
        write_heads(heads, capture)
    return timed(path, expand_policies(large_methods(str(heads)), budgets(20)), jobs)


def write_heads(path: Path, capture: Capture) -> None:
    """Write made-up head importance in HeadKV's form."""
    import numpy as np

    draw = np.random.default_rng(1).random((capture.model.n_layers, capture.model.n_heads))
    path.write_text(json.dumps({f"{i}-{h}": [float(x)] for i, row in enumerate(draw) for h, x in enumerate(row)}))


def ratio(folder: Path, given: Path | None, jobs: int) -> dict[str, Any]:
    """Compare one configuration of a search with one of real inference, on the same prompts, in one run and one process."""
    from kvtool.infer.runner import InferConfig, run_infer

    path, heads = small_capture(folder, given), folder / "heads.json"
    run_classify(path, heads)
    policies = expand_policies(search_methods(str(heads)), budgets(53))[:10_000]
    offline = timed(path, policies, 1)
    loaded = load_model("tiny", device="cpu")
    with open_capture(path) as capture:
        n, facts = 4, capture.config
        task, length, seed = str(facts["task"]), int(facts["length"]), int(facts["seed"])
    chosen = policies[:: len(policies) // 12][:12]
    samples = load_task(task, loaded.tokenizer, n, length, seed)
    config = InferConfig(task=task, model="tiny", n=n, length=length, seed=seed)

    def real(policies: Sequence[Policy], out: Path) -> dict[str, Any]:
        wall, used = time.perf_counter(), processor_seconds()
        run_infer(config, loaded, samples, policies, out)
        wall, used = time.perf_counter() - wall, processor_seconds() - used
        each = 1000 * used / n / len(policies)
        return {
            "configurations": len(policies),
            "prompts": n,
            "wall_s": round(wall, 2),
            "processor_s": round(used, 2),
            "processor_ms_per_configuration_and_prompt": round(each, 2),
            "times_as_expensive": round(each / offline["processor_ms_per_configuration_and_prompt"]),
        }

    # A grid prefills a prompt once for all its policies; a run of one configuration pays for it alone, full-cache baseline included.
    return {"offline": offline, "infer_grid": real(chosen, folder / "grid"), "infer_alone": real(chosen[:1], folder / "alone")}


PARTS: dict[str, Callable[[Path, Path | None, int], dict[str, Any]]] = {"search": search, "large": large, "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--capture", type=Path, default=None)
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = PARTS[options.part](Path(folder), options.capture, options.jobs)
    results = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    results = {key: value for key, value in results.items() if key.split(" ")[0] in PARTS}
    results[options.part if options.jobs < 2 or options.part == "ratio" else f"{options.part} {options.jobs} jobs"] = {
        "command": f"python benchmarks/simulate_ranking.py {options.part}"
        + (f" --jobs {options.jobs}" if options.jobs > 1 else ""),
        **found,
        "processor": platform.machine(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("torch", "numpy", "h5py")}},
    }
    RESULT.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(found, indent=2), file=sys.stdout)


if __name__ == "__main__":
    main()
