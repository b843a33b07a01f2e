"""How long the report of a full HACE grid takes, and how large it gets: SYNTHETIC records, made up from a formula, through the real report.

    python benchmarks/synthetic_study.py OUT [--prompts 100] [--models 4 --lengths 5 --retentions 6 --methods 7 --tasks 5] [--json FILE]

Writes a study's folder as ``kvtool run`` leaves it, but with made-up records (``"synthetic": true`` in every run.json and in the study's
sentence), then times ``kvtool analyze study``, and how long a headless Chromium takes to open the report, where there is one. No figure in
it says anything of any model or method.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

MODELS = {"A": (32, 32), "B": (32, 8), "C": (40, 40), "D": (48, 8)}  # layers, KV heads
LENGTHS = (4000, 16000, 64000, 96000, 128000)
RETENTIONS = ("0.5%", "0.8%", "1%", "2%", "3%", "5%")
METHODS = ("hace", "hace-layer", "hace-head", "cake", "pyramidkv", "headkv", "snapkv")
TASKS = ("niah", "niah:kind=multikey,keys=2", "niah:kind=multikey,keys=4", "niah:kind=multikey,keys=8", "niah:kind=multivalue")


def study_text(models: int, lengths: int, retentions: int, methods: int, tasks: int, prompts: int) -> str:
    """Return the study's YAML: as many of each axis as asked for."""
    study = {
        "study": "synthetic",
        "about": "SYNTHETIC records from a formula; no figure here says anything of any model or method.",
        "models": {f"synthetic-{name}": f"synthetic/{name}" for name in list(MODELS)[:models]},
        "lengths": LENGTHS[:lengths],
        "retentions": RETENTIONS[-retentions:],
        "tasks": TASKS[:tasks],
        "n": prompts,
        "policies": {name.upper(): f"{name}:window=8" if name != "headkv" else name for name in METHODS[:methods]},
        "stages": [
            {"capture": {"n": 1, "tasks": [TASKS[0]], "lengths": [LENGTHS[0]]}},
            {"classify": {"task": TASKS[0], "length": LENGTHS[0]}},
            "infer",
        ],
    }
    return json.dumps(study, indent=1)  # JSON is YAML


def write_study(out: Path, text: str) -> int:
    """Write a finished study of made-up records; returns how many records."""
    from kvtool.files import write_json, write_text
    from kvtool.studies.graph import build_graph
    from kvtool.studies.parse import parse_study
    from kvtool.studies.runner import SOURCE, STUDY_SCHEMA
    from kvtool.studies.runner import STUDY as FACTS
    from kvtool.studies.state import begin, finish, folder_of

    write_text(out / SOURCE, text)
    study = parse_study(text, "full", str(out / SOURCE))
    facts = {"schema": STUDY_SCHEMA, "study": study.name, "scale": "full", "dtype": "auto", "source": str(out / SOURCE)}
    write_json(out / FACTS, facts)
    count = 0
    for number, node in enumerate(build_graph(study)):
        begin(out, node)
        folder = folder_of(out, node)
        if node.stage.kind != "infer":
            finish(out, node, ["synthetic: nothing in it"], 1.0, True)
            continue
        shape = MODELS[node.cell.model.label.removeprefix("synthetic-")]
        config = {"synthetic": True, "model": node.cell.model.text, "task": node.cell.task, "length": node.cell.length}
        config["compress_at"] = node.cell.compress_at
        write_json(folder / "run.json", {"schema": "kvtool.run/1", "config": config, "provenance": {}})
        rng = np.random.default_rng(number)
        with (folder / "records.jsonl").open("w", encoding="utf-8") as file:
            for sample in range(study.n):
                for record in _records(node.policies, sample, node.cell, shape, rng):
                    file.write(json.dumps(record) + "\n")
                    count += 1
        finish(out, node, ["synthetic"], 1.0, True)
    return count


def _records(
    policies: tuple[str, ...], sample: int, cell: Any, shape: tuple[int, int], rng: np.random.Generator
) -> list[dict[str, Any]]:
    """One prompt under every policy; the chance to be right falls around a retention of the method's own."""
    hard = rng.random()
    found = [_record("full", "full", None, 1.0, sample, cell, shape, float(hard < 0.95))]
    for text in policies:
        method, _, rest = text.partition(":")
        share = float(rest.split("budget=")[1].split("%")[0]) / 100
        own = 0.004 * (1 + METHODS.index(method))
        chance = 0.95 / (1 + (own / share) ** 3)
        plain = text.replace(f"budget={100 * share:g}%", "").replace(":,", ":").rstrip(":,")
        found.append(_record(text, plain, f"{100 * share:g}%", share, sample, cell, shape, float(hard < chance)))
    return found


def _record(
    policy: str, method: str, budget: str | None, share: float, sample: int, cell: Any, shape: tuple[int, int], score: float
) -> dict[str, Any]:
    layers, heads = shape
    whole = cell.length * layers * heads * 512
    entries = np.full(shape, round(share * cell.length))
    if budget is not None and not method.startswith("snapkv"):
        entries = np.round(entries * np.linspace(1.5, 0.5, layers)[:, None]).astype(int) + np.zeros(shape, dtype=int)
    return {
        "synthetic": True, "unit": f"{sample}-{policy}", "sample": f"s{sample}", "subset": "", "document": f"s{sample}",
        "policy": policy, "method": method, "budget": budget, "seq_len": cell.length, "n_prompt": cell.length,
        "compress_at": cell.compress_at, "status": "ok", "message": None, "degenerate": False, "metric": "exact",
        "shared_prefill": True, "decoding": {"strategy": "greedy"},
        "meta": {"task": cell.task, "length": cell.length, "depth": (sample % 10 + 0.5) / 10},
        "retention": share, "planned_entries": share * cell.length, "entries": share * cell.length,
        "head_entries": entries.tolist(), "prediction": " 64345.",
        "prediction_ids": [222, 23, 21, 20, 21, 22, 15], "n_generated": 7, "score": score, "scores": {"exact": score},
        "answer_accuracy": 0.3 + 0.7 * score, "answer_exact": score, "answer_nll": 1.6 - score, "answer_margin": score,
        "kv_bytes_prompt_end": round(share * whole), "kv_bytes_generation_end": round(share * whole), "kv_bytes_full": whole,
        "slack_bytes": 0, "ttft_s": 0.3, "compress_s": 0.01, "tpot_s": 0.03 + 0.02 * share, "total_s": 0.8, "kernel": "none",
    }  # fmt: skip


def processor_time() -> float:
    """Return the processor time of this process and of those that it started and that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def main() -> None:
    """Write, time, and print size and seconds."""
    from kvtool.studies.report import report_of_folder

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    for name, value in (("models", 4), ("lengths", 5), ("retentions", 6), ("methods", 7), ("tasks", 5), ("prompts", 100)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", type=Path, help="Write the figures there.")
    args = parser.parse_args()
    text = study_text(args.models, args.lengths, args.retentions, args.methods, args.tasks, args.prompts)
    started = time.perf_counter()
    count = write_study(args.out, text)
    size = sum(path.stat().st_size for path in args.out.glob("nodes/*/records.jsonl"))
    print(f"{count} synthetic records, {size / 1e6:.0f} MB, written in {time.perf_counter() - started:.1f} s")
    started, busy = time.perf_counter(), processor_time()
    summary = report_of_folder(args.out, args.out / "report")
    wall, busy = time.perf_counter() - started, processor_time() - busy
    found = {
        "records": count,
        "prompts": args.prompts,
        "record_bytes": size,
        "analysis_wall_s": round(wall, 1),
        "analysis_processor_s": round(busy, 1),
        "report_bytes": summary.report.stat().st_size,
        **opening(summary.report),
    }
    print(f"analyzed in {wall:.1f} s ({busy:.1f} s of processor time); report.html {found['report_bytes'] / 1e6:.2f} MB")
    print(
        f"opened in {found['opening_s']} s, {found['elements']} elements" if "opening_s" in found else "no Chromium: not opened"
    )
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def opening(report: Path) -> dict[str, Any]:
    """Return the seconds that a headless Chromium takes from asking for the page until it is painted, thrice; empty without one."""
    sys.path.insert(0, str(Path(__file__).parent))
    from chromium import chromium, find_chromium

    if find_chromium() is None:
        return {}
    with chromium() as page:
        times = [round(page.open(report), 2) for _ in range(3)]
        load = page.run("performance.timing.loadEventEnd - performance.timing.navigationStart") / 1000
        n = page.run("document.getElementsByTagName('*').length")
        return {"opening_s": times, "load_event_s": load, "elements": n, "errors": page.errors}


if __name__ == "__main__":
    main()
