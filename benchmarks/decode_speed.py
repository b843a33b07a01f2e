"""How long a decode step takes under each policy, against what it should take; how long compression takes; and decoding without end.

    OMP_NUM_THREADS=1 python benchmarks/decode_speed.py

Part 1: a model with random weights (`shape:llama-0.3b`, float32), a prompt of 8192 tokens that runs once, caches of 2 % forked
from it. Every round takes one step of every cache, in an order of its own; a ratio is the median over rounds of two steps of the
same round, with its quartiles. `uniform (again)` is the noise floor. The plain caches are transformers' own (`DynamicCache` under
its SDPA). A lazy H2O drops many entries at once and few steps pay for it: both it and StreamingLLM decode whole intervals in
turns, and means are compared. Wall time, and beside it the process's own processor time, which other processes on the machine
disturb less. HeadKV's importance is made up (log-normal): times depend on the shape of the budgets alone. Policies that evict
while decoding hold as many entries, of a shorter prompt.

Part 2, in a process of its own: the embedded model decodes a text of 20,000 tokens over a cache of 256 entries with cache positions.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from kvtool.infer.bandwidth import Bandwidth
from kvtool.infer.generate import PromptState, prefill
from kvtool.infer.stress_prompts import Book
from kvtool.infer.stress_run import Bench, endless
from kvtool.models import LoadedModel, load_model
from kvtool.policies import Policy

RESULT = Path(__file__).parent / "results" / "decode_speed"
ENDLESS = "streaming:budget=256,decode=evict,positions=cache"
WINDOW = 1000
WARM_ROUNDS = 3
LAZY, ROLLING, INTERVAL = "H2O, interval 64", "StreamingLLM", 64

#: (what, numerator, denominator, largest ratio that is wanted)
BARS = (
    ("ragged (AdaKV) / uniform", "ragged (AdaKV)", "uniform", 1.15),
    ("ragged (HeadKV) / uniform", "ragged (HeadKV)", "uniform", 1.15),
    ("uniform / plain cache of the retained length", "uniform", "plain, retained length", 1.10),
    ("ragged (AdaKV) / plain cache of the retained length", "ragged (AdaKV)", "plain, retained length", 1.10),
    ("ragged (HeadKV) / plain cache of the retained length", "ragged (HeadKV)", "plain, retained length", 1.10),
    ("noise: uniform (again) / uniform", "uniform (again)", "uniform", None),
    ("StreamingLLM / uniform", "StreamingLLM", "uniform", None),
    ("StreamingLLM, cache positions / StreamingLLM", "StreamingLLM, cache positions", "StreamingLLM", None),
    ("H2O, interval 1 / StreamingLLM", "H2O, interval 1", "StreamingLLM", None),
    ("uniform / full cache (kvtool)", "uniform", "full cache (kvtool)", None),
    ("full cache: kvtool / plain", "full cache (kvtool)", "plain, full length", None),
)


@dataclass(slots=True)
class Candidate:
    """A cache that is decoded: ``implementation`` is the attention it needs; steps as (wall, processor) seconds."""

    cache: Any
    implementation: str = "kvtool"
    steps: list[tuple[float, float]] = field(default_factory=list)


def heads_file(loaded: LoadedModel, folder: Path) -> Path:
    """Write a heads file with made-up importance."""
    info, rng = loaded.info, random.Random(0)
    importance = {(i, h): rng.lognormvariate(0, 1.5) for i in range(info.n_layers) for h in range(info.n_heads)}
    heads = [{"layer": i, "head": h, "importance": x, "retrieval": x} for (i, h), x in importance.items()]
    group = info.n_heads // info.n_kv_heads
    kv_heads = [
        {
            "layer": i,
            "head": h,
            "kind": "mixed",
            "confidence": 1.0,
            **dict.fromkeys(("importance", "retrieval"), statistics.fmean(importance[i, h * group + g] for g in range(group))),
        }
        for i in range(info.n_layers)
        for h in range(info.n_kv_heads)
    ]
    model = {"fingerprint": info.fingerprint, "model_id": info.model_id}
    sizes = {"n_layers": info.n_layers, "n_heads": info.n_heads, "n_kv_heads": info.n_kv_heads}
    path = folder / "heads.json"
    path.write_text(json.dumps({"schema": "kvtool.heads/1", "model": model, **sizes, "heads": heads, "kv_heads": kv_heads}))
    return path


def run_prompt(loaded: LoadedModel, args: argparse.Namespace, ids: list[int], needs: list[str]) -> PromptState:
    """Run a prompt; with ``--prefill-layers`` through a model of so many layers, whose entries all others repeat."""
    if not args.prefill_layers:
        return prefill(loaded.model, ids, needs, 0)
    fewer = load_model(f"{args.model},layers={args.prefill_layers}", device="cpu", dtype=args.dtype)
    state, n = prefill(fewer.model, ids, needs, 0), loaded.info.n_layers
    layers = tuple(replace(state.layers[i % len(state.layers)], layer=i) for i in range(n))
    times = n / args.prefill_layers
    seconds = {name: s * times for name, s in state.statistic_s.items()}
    return replace(state, layers=layers, forward_s=state.forward_s * times, statistic_s=seconds)


def plain(state: PromptState, n: int) -> Candidate:
    """Return transformers' cache of the prompt's first `n` tokens."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for i, layer in enumerate(state.layers):
        cache.update(layer.keys[:, :, :n].clone(), layer.values[:, :, :n].clone(), i)
    return Candidate(cache, "sdpa")


def forked(state: PromptState, text: str) -> tuple[Candidate, dict[str, Any]]:
    """Compress a prompt; return the cache, and bytes, entries and the time of choosing and of building."""
    policy = Policy.parse(text)
    started = time.perf_counter()
    kept = state.choose(policy)
    chosen = time.perf_counter()
    cache = state.fork(policy, kept)
    built = time.perf_counter()
    held = cache.count_bytes()
    layer = state.layers[0]
    per_entry = layer.keys.element_size() * (layer.keys.shape[-1] + layer.values.shape[-1])
    planned = policy.entries(state.seq_len) * per_entry * layer.keys.shape[1] * len(state.layers)
    fields = {
        "policy": text,
        "choose_s": chosen - started,
        "build_s": built - chosen,
        "kv_bytes_planned": planned,
        "kv_bytes_held": held.used,
        "kv_bytes_allocated": held.allocated,
        "buckets": statistics.fmean(len(store.buckets) for store in cache.stores),
    }
    return Candidate(cache), fields


def step(loaded: LoadedModel, candidate: Candidate, *, timed: bool) -> None:
    """Decode one token."""
    model = loaded.model
    if model.config._attn_implementation != candidate.implementation:
        model.set_attn_implementation(candidate.implementation)
    token = torch.tensor([[5]], device=model.device)
    wall, own = time.perf_counter(), time.process_time()
    with torch.no_grad():
        int(model(input_ids=token, past_key_values=candidate.cache, use_cache=True).logits[0, -1].argmax())
    if timed:
        candidate.steps.append((time.perf_counter() - wall, time.process_time() - own))


def ratio(candidates: dict[str, Candidate], over: str, under: str, kind: int) -> dict[str, float]:
    """Return the median of paired ratios with quartiles; kind 0: wall time, 1: processor time."""
    pairs = zip(candidates[over].steps, candidates[under].steps, strict=True)
    low, middle, high = statistics.quantiles([a[kind] / b[kind] for a, b in pairs], n=4)
    return {"median": middle, "low": low, "high": high}


def decode(args: argparse.Namespace) -> dict[str, Any]:
    """Run part 1."""
    loaded = load_model(args.model, device="cpu", dtype=args.dtype)
    book = Book.read(loaded)
    kept = round(args.retention * args.length)
    with tempfile.TemporaryDirectory() as folder:
        heads = heads_file(loaded, Path(folder))
        texts = {
            "uniform": f"snapkv:budget={kept}",
            "uniform (again)": f"snapkv:budget={kept}",
            "ragged (AdaKV)": f"adakv:budget={kept}",
            "ragged (HeadKV)": f"headkv:budget={kept},heads={heads}",
        }
        evicting = {
            "StreamingLLM": f"streaming:budget={kept},decode=evict",
            "StreamingLLM, cache positions": f"streaming:budget={kept},decode=evict,positions=cache",
            LAZY: f"h2o:budget={kept},decode=evict,interval=64",
            "H2O, interval 1": f"h2o:budget={kept},decode=evict",
        }
        needs = sorted({name for text in texts.values() for name in Policy.parse(text).needs()})
        state = run_prompt(loaded, args, book.stretch(args.length, 0), needs)
        candidates, caches = {}, {}
        for name, text in texts.items():
            candidates[name], caches[name] = forked(state, text)
            caches[name]["policy"] = text.replace(str(heads), "heads.json")
            caches[name]["statistics_s"] = sum(state.statistic_s[need] for need in Policy.parse(text).needs())
        candidates["full cache (kvtool)"], caches["full cache (kvtool)"] = forked(state, "full")
        candidates |= {"plain, retained length": plain(state, kept), "plain, full length": plain(state, args.length)}
        forward_s = state.forward_s
        del state
        short = run_prompt(loaded, args, book.stretch(4 * kept, 0), ["accumulated"])
        for name, text in evicting.items():
            candidates[name], caches[name] = forked(short, text)
        del short
        _rounds(loaded, candidates, args.rounds)
        lazy = whole_intervals(loaded, candidates, args.intervals * INTERVAL)
    uniform = caches["uniform"]
    compress_s = uniform["statistics_s"] + uniform["choose_s"] + uniform["build_s"]
    return {
        "model": args.model,
        "dtype": args.dtype,
        "length": args.length,
        "entries": kept,
        "rounds": args.rounds,
        "prefill_layers": args.prefill_layers or loaded.info.n_layers,
        "prefill_s": forward_s,
        "snapkv_compress_s": compress_s,
        "compress_share": compress_s / forward_s,
        "caches": caches,
        "lazy": lazy,
        "steps": {name: [[round(t, 6) for t in step] for step in c.steps] for name, c in candidates.items()},
        "tpot_ms": {name: _milliseconds(c.steps) for name, c in candidates.items()},
        "bars": [
            {"what": what, "bar": bar, "wall": ratio(candidates, a, b, 0), "processor": ratio(candidates, a, b, 1)}
            for what, a, b, bar in BARS
        ],
    }


def _rounds(loaded: LoadedModel, candidates: dict[str, Candidate], n: int) -> None:
    names, rng = list(candidates), random.Random(0)
    for i in range(WARM_ROUNDS + n):
        rng.shuffle(names)
        for name in names:
            step(loaded, candidates[name], timed=i >= WARM_ROUNDS)


def whole_intervals(loaded: LoadedModel, candidates: dict[str, Candidate], n: int) -> dict[str, Any]:
    """Let a lazy H2O and StreamingLLM decode `n` tokens in turns, some whole intervals; return all steps, and entries per head."""
    pair = {name: Candidate(candidates[name].cache) for name in (ROLLING, LAZY)}
    held: dict[str, list[float]] = {name: [] for name in pair}
    names, rng = list(pair), random.Random(0)
    for _ in range(n):
        rng.shuffle(names)
        for name in names:
            step(loaded, pair[name], timed=True)
            held[name].append(statistics.fmean(m for layer in pair[name].cache.entries() for row in layer for m in row))
    means = {name: [statistics.fmean(s[kind] for s in c.steps) for kind in (0, 1)] for name, c in pair.items()}
    return {
        "tokens": n,
        "mean_ms": {name: [1e3 * t for t in times] for name, times in means.items()},
        "slowest_ms": {name: 1e3 * max(s[0] for s in c.steps) for name, c in pair.items()},
        "ratio": {kind: means[LAZY][i] / means[ROLLING][i] for i, kind in enumerate(("wall", "processor"))},
        "entries": {name: [statistics.fmean(m), min(m), max(m)] for name, m in held.items()},
        "steps": {name: [[round(t, 6) for t in s] for s in c.steps] for name, c in pair.items()},
    }


def _milliseconds(steps: Sequence[tuple[float, float]]) -> dict[str, float]:
    return {
        "wall": 1e3 * statistics.median(a for a, _ in steps),
        "processor": 1e3 * statistics.median(b for _, b in steps),
        "fastest": 1e3 * min(a for a, _ in steps),
    }


def without_end(n: int) -> dict[str, Any]:
    """Run part 2."""
    loaded = load_model("tiny", device="cpu")
    bench = Bench.of(loaded, 1, "auto", Bandwidth(1.0, {}, 0))
    ids = Book.read(loaded).stretch(512 + n + 1, 0)
    windows = []
    for w in endless(bench, Policy.parse(ENDLESS), ids[:512], ids[512:], n, WINDOW):
        assert w.nll is not None
        windows.append(
            {
                "stop": w.stop,
                "tpot_ms": 1e3 * statistics.median(w.step_s),
                "fastest_ms": 1e3 * min(w.step_s),
                "kv_bytes": [w.kv_bytes_low, w.kv_bytes_high],
                "resident_bytes": w.resident_bytes,
                "nll": w.nll,
            }
        )
    return {"policy": ENDLESS, "n": n, "windows": windows}


def markdown(found: dict[str, Any]) -> list[str]:
    """Return the report."""
    d, facts = found["decode"], found["machine"]
    lines = [
        "# Speed of decoding",
        "",
        f"{d['model']}, {d['dtype']}, prompt of {d['length']} tokens, {d['entries']} entries per KV head; {d['rounds']} rounds. "
        f"{facts['processor']}, {facts['threads']} thread(s), torch {facts['torch']}, transformers {facts['transformers']}.",
        "Made by `python benchmarks/decode_speed.py`. Ratios: median over rounds of steps of the same round, [quartiles].",
        "",
        "| ratio of times per token | wall | processor | bar |",
        "| --- | --- | --- | --- |",
    ]
    show: Callable[[dict[str, float]], str] = lambda r: f"{r['median']:.3f} [{r['low']:.3f}, {r['high']:.3f}]"  # noqa: E731
    for row in d["bars"]:
        bar = "" if row["bar"] is None else f"{row['bar']:.2f}"
        lines.append(f"| {row['what']} | {show(row['wall'])} | {show(row['processor'])} | {bar} |")
    lazy = d["lazy"]
    (mean, least, most), rolling = lazy["entries"][LAZY], lazy["entries"][ROLLING][0]
    lines += [
        "",
        f"Lazy H2O beside StreamingLLM over {lazy['tokens']} tokens, {lazy['tokens'] // INTERVAL} whole intervals of {INTERVAL}: "
        f"ratio of means {lazy['ratio']['wall']:.3f} of wall time, {lazy['ratio']['processor']:.3f} of processor time (bar: 1.10). "
        f"It holds {least:.0f} to {most:.0f} entries per head, {mean:.0f} on average, StreamingLLM {rolling:.0f}; "
        f"slowest steps {lazy['slowest_ms'][LAZY]:.0f} and {lazy['slowest_ms'][ROLLING]:.0f} ms.",
    ]
    lines += ["", "| cache | ms per token, median | of processor | fastest |", "| --- | --- | --- | --- |"]
    lines += [f"| {n} | {t['wall']:.1f} | {t['processor']:.1f} | {t['fastest']:.1f} |" for n, t in d["tpot_ms"].items()]
    lines += [
        "",
        f"SnapKV: scores, selection and copying {d['snapkv_compress_s']:.2f} s, {d['compress_share']:.1%} of the "
        f"prefill's {d['prefill_s']:.1f} s (bar: 5 %), from {d['prefill_layers']} layers.",
        "",
        "| cache | KV bytes planned | held by entries | allocated, with room for new tokens | of the plan | buckets per layer |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, c in d["caches"].items():
        planned, allocated = c["kv_bytes_planned"], c["kv_bytes_allocated"]
        share = f"{allocated / planned:.3f}"
        lines.append(f"| {name} | {planned} | {c['kv_bytes_held']} | {allocated} | {share} | {c['buckets']:.1f} |")
    if "endless" in found:
        lines += ["", *_endless_lines(found["endless"])]
    return lines


def _endless_lines(e: dict[str, Any]) -> list[str]:
    lines = [
        f"Without end: `{e['policy']}`, embedded model, a text of {e['n']} tokens (perplexity {_perplexity(e):.2f}).",
        "",
        "| tokens | ms per token, median | fastest | KV bytes | resident MB | perplexity |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for w in e["windows"]:
        low, high = w["kv_bytes"]
        resident = "" if w["resident_bytes"] is None else f"{w['resident_bytes'] / 1e6:.0f}"
        size = f"{low}" if low == high else f"{low} ... {high}"
        row = (w["stop"], f"{w['tpot_ms']:.2f}", f"{w['fastest_ms']:.2f}", size, resident, f"{math.exp(w['nll']):.2f}")
        lines.append("| " + " | ".join(str(cell) for cell in row) + " |")
    return lines


def _perplexity(e: dict[str, Any]) -> float:
    return math.exp(statistics.fmean(w["nll"] for w in e["windows"]))


def processor() -> str:
    """Return the processor's model in words."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="shape:llama-0.3b")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--retention", type=float, default=0.02)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--intervals", type=int, default=3, help="of the lazy H2O beside StreamingLLM")
    parser.add_argument("--prefill-layers", type=int, help="on a busy machine: run the prompt through fewer layers")
    parser.add_argument("--endless", type=int, default=20000, help="tokens without end; 0: leave part 2 out")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    versions = {name: version(name) for name in ("torch", "transformers")}
    found: dict[str, Any] = {"machine": {"processor": processor(), "threads": torch.get_num_threads(), **versions}}
    found["decode"] = decode(args)
    if args.endless:
        # Not after part 1 in one process: its freed gigabytes would hide any growth of the resident set.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as own:
            found["endless"] = own.submit(without_end, args.endless).result()
    args.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    text = "\n".join(markdown(found)) + "\n"
    args.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
