"""kvtool beside NVIDIA kvpress, on the same weights, prompt, policy and budget, in one run.

    OMP_NUM_THREADS=1 python benchmarks/against_kvpress.py

The defaults suit a busy machine; on a quiet one `--model shape:llama-0.3b --length 8192 --entries 1024` says more.

kvpress needs an older transformers than kvtool: at its first run this makes an environment of its own (`--venv`, with pip) and installs
kvpress there. Each side is one process that holds the model and its caches; orders go to one of them at a time, in an order that is
drawn anew for every round, so that what else the machine does hits both alike.

1. Kept sets. The embedded model on real text, and the shape with random weights: what each side keeps of every head.
2. Speed. Prompt and compression; within it, filling the cache and compressing it; decode steps. A ratio is the median over rounds of
   kvtool's time by kvpress's of the same round, with quartiles; wall time, and the processes' own processor time, which other
   processes disturb less. SnapKV runs twice on each side: the ratio of the two is the noise. The full cache of plain transformers runs
   on both sides too: its ratio is what the two releases of transformers differ by, and a third ratio has it taken out.
3. Bytes of all tensors that hang on the caches, counted by the same function on both sides.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Mask = NDArray[np.bool_]

HERE = Path(__file__).parent
RESULT = HERE / "results" / "against_kvpress"
VENV = HERE.parent / "build" / "kvpress-venv"
PINS = ("kvpress==0.5.5", "torch==2.13.0")
SIDES = ("kvtool", "kvpress")
PLAIN, AGAIN = "plain", "SnapKV (again)"

_SNAPKV: dict[str, float] = {"window_size": 64, "kernel_size": 5}
_PYRAMID: dict[str, float] = {"window_size": 16, "kernel_size": 5, "beta": 8}

#: what -> (kvtool's policy without the budget, kvpress's press, its options): the same definition on both sides
SAME: dict[str, tuple[str, str, dict[str, float]]] = {
    "SnapKV": ("snapkv:window=64,kernel=5,pool=avg", "snapkv", _SNAPKV),
    "StreamingLLM": ("streaming:sink=4", "streaming", {"n_sink": 4}),
    "key norm": ("keynorm", "knorm", {}),
    "PyramidKV": ("pyramidkv:window=16,kernel=5,pool=avg,beta=8,rule=kvpress", "pyramidkv", _PYRAMID),
    "AdaKV": (
        "adakv:window=64,kernel=5,pool=avg,floor=0.2,rule=kvpress",
        "adakv",
        {**_SNAPKV, "alpha_safeguard": 0.2},
    ),
}
#: For the kept sets alone: settings at which kvpress falls back to SnapKV, and kvtool's defaults where they are another rule.
OTHER: dict[str, tuple[str, str, dict[str, float]]] = {
    "PyramidKV, window 64, beta 20": (
        "pyramidkv:window=64,kernel=5,pool=avg,beta=20,rule=kvpress",
        "pyramidkv",
        {**_SNAPKV, "beta": 20},
    ),
    "PyramidKV, kvtool's exact line": ("pyramidkv:window=16,kernel=5,pool=avg,beta=8", "pyramidkv", _PYRAMID),
    "AdaKV, the paper's mix": ("adakv:window=64,kernel=5,pool=avg,floor=0.2", "adakv", {**_SNAPKV, "alpha_safeguard": 0.2}),
}


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far two kept sets agree.

    Attributes
    ----------
    heads, equal_heads : int
        KV heads of all layers; those with the very same set.
    entries : tuple of int
        Kept by the one and by the other.
    shared : int
        Kept by both.
    budgets : str
        What has other numbers of entries on the two sides: ``""`` (nothing), ``"heads"`` or ``"layers"``.
    spread : float or None
        How far the scores of the exchanged entries of a head lie apart at most, relative to the largest: 0 where nothing differs, or
        only exact ties; tiny where rounding broke a tie. None where budgets differ.
    """

    heads: int
    equal_heads: int
    entries: tuple[int, int]
    shared: int
    budgets: str
    spread: float | None

    @property
    def overlap(self) -> float:
        """Share of the smaller set that is in the other one, too."""
        return self.shared / min(self.entries)


def agreement(ours: Mask, theirs: Mask, scores: NDArray[np.floating[Any]]) -> Agreement:
    """Compare kept sets ``[L, H, T]``, by the scores that the second side ranked by."""
    if ours.shape != theirs.shape or ours.shape != scores.shape:
        raise ValueError(f"kept sets {ours.shape} and {theirs.shape} with scores {scores.shape} do not belong together")
    same = (ours == theirs).all(axis=-1)
    budgets = ""
    if (ours.sum(axis=-1) != theirs.sum(axis=-1)).any():
        budgets = "layers" if (ours.sum(axis=(1, 2)) != theirs.sum(axis=(1, 2))).any() else "heads"
    # Within a head both sides keep its best entries: what they exchange must be ties, or the scores are not the same.
    exchanged = [scores[at][ours[at] != theirs[at]] for at in zip(*np.nonzero(~same), strict=True)]
    spread = None if budgets else max((_spread(some) for some in exchanged), default=0.0)
    kept = (int(ours.sum()), int(theirs.sum()))
    return Agreement(same.size, int(same.sum()), kept, int((ours & theirs).sum()), budgets, spread)


def _spread(scores: NDArray[np.floating[Any]]) -> float:
    largest = float(np.abs(scores).max())
    return float(scores.max() - scores.min()) / largest if largest else 0.0


def ratio(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    """Return median and quartiles of the ratios of the same round; of a single round three times the same."""
    found = [a / b for a, b in zip(over, under, strict=True)]
    if len(found) == 1:
        return {"median": found[0], "low": found[0], "high": found[0]}
    low, middle, high = statistics.quantiles(found, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def recipes(policy: str, press: str, options: dict[str, float], entries: int) -> dict[str, dict[str, Any]]:
    """Return what each side is asked for."""
    name, _, rest = policy.partition(":")
    text = f"{name}:budget={entries}entries" + (f",{rest}" if rest else "")
    return {"kvtool": {"policy": text}, "kvpress": {"press": press, "options": options, "entries": entries}}


class Worker:
    """A side's process; `ask` waits for its answer, so that one works at a time."""

    def __init__(self, side: str, python: Path | str, folder: Path) -> None:
        script = HERE / f"against_{side}_worker.py"
        alone = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "HF_HUB_OFFLINE": "1"}
        self.side = side
        self.process = subprocess.Popen(
            [str(python), str(script), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **alone},
        )

    def ask(self, do: str, **more: Any) -> dict[str, Any]:
        """Give an order and return the answer.

        Raises
        ------
        RuntimeError
            The process has ended; what it said is on the error stream.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **more}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"the worker of {self.side} ended during {do!r}; its last words are above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Let the process end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def python_of(venv: Path) -> Path:
    """Return the interpreter of kvpress's environment, which is made if it is not there."""
    python = venv / "bin" / "python"
    if not (venv / "ready").is_file():
        print(f"installing {' '.join(PINS)} into {venv.name} (once)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *PINS], check=True)
        (venv / "ready").write_text("\n".join(PINS) + "\n")
    return python


def save_model(name: str, length: int, folder: Path) -> list[int]:
    """Save a model's float32 weights for both sides and return a prompt of `length` tokens of real text."""
    from kvtool.infer.stress_prompts import Book
    from kvtool.models import load_model

    loaded = load_model(name, device="cpu", dtype="float32")
    loaded.model.save_pretrained(folder)
    return Book.read(loaded).stretch(length, 0)


def compare_sets(
    workers: dict[str, Worker], prompt: Path, budgets: Sequence[int], folder: Path, *, others: bool
) -> list[dict[str, Any]]:
    """Run part 1 on one model, with the settings of `OTHER` or without."""
    rows = []
    for what, recipe in (SAME | (OTHER if others else {})).items():
        for entries in budgets:
            asked, found = recipes(*recipe, entries), {}
            for side, worker in workers.items():
                out = folder / f"{side}.npz"
                worker.ask("kept", recipe=asked[side], ids_file=str(prompt), out=str(out))
                with np.load(out) as file:
                    found[side] = dict(file)
            both = agreement(found["kvtool"]["kept"], found["kvpress"]["kept"], found["kvpress"]["scores"])
            rows.append(
                {
                    "what": what,
                    "same_definition": what in SAME,
                    "asked": asked,
                    "entries": entries,
                    "heads": both.heads,
                    "equal_heads": both.equal_heads,
                    "kept": list(both.entries),
                    "overlap": both.overlap,
                    "budgets": both.budgets,
                    "spread": both.spread,
                    "per_layer": {s: (f["kept"].sum(axis=(1, 2)) / f["kept"].shape[1]).tolist() for s, f in found.items()},
                }
            )
            print(f"{what}, {entries} entries: {both.equal_heads}/{both.heads} heads equal", flush=True)
    return rows


def time_both(workers: dict[str, Worker], prompt: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run part 2 and 3; every list is over rounds."""
    asked: dict[str, dict[str, Any]] = {what: recipes(*recipe, args.entries) for what, recipe in SAME.items()}
    asked |= {AGAIN: asked["SnapKV"], PLAIN: dict.fromkeys(SIDES)}
    rng, labels, started = random.Random(0), list(asked), time.time()
    found: dict[str, Any] = {w: {s: {"total": [], "compress": [], "decode": [], "tokens": []} for s in SIDES} for w in labels}
    for i in range(1 + args.rounds):
        # The first round warms up: fewer of them, nothing noted.
        for what, side in _turns(labels if i else [PLAIN, "SnapKV"], rng):
            answer = workers[side].ask("prompt", label=what, recipe=asked[what][side], ids_file=str(prompt))
            if i:
                cell = found[what][side]
                cell["total"].append(answer["total"])
                cell["compress"].append(answer["compress"])
                cell["bytes"] = answer["bytes"]
        print(f"prompts, round {i} of {args.rounds}", flush=True)
    for i in range(1 + args.decode_rounds):
        for what, side in _turns(labels, rng):
            answer, cell = workers[side].ask("decode", label=what, n=args.steps), found[what][side]
            cell["tokens"] += answer["tokens"]
            cell["bytes_end"] = answer["bytes"]
            if i:
                cell["decode"].append([statistics.fmean(step[kind] for step in answer["steps"]) for kind in (0, 1)])
    settings = {"model": args.model, "length": args.length, "entries": args.entries, "steps": args.steps}
    return {**settings, "minutes": (time.time() - started) / 60, "asked": asked, "cells": found, "ratios": ratios(found)}


def _turns(labels: Sequence[str], rng: random.Random) -> list[tuple[str, str]]:
    """Return the turns of a round: labels in any order, both sides of a label one after the other, any of them first."""
    shuffled = rng.sample(labels, len(labels))
    return [(what, side) for what in shuffled for side in rng.sample(SIDES, 2)]


def ratios(cells: dict[str, Any]) -> dict[str, Any]:
    """Return kvtool by kvpress for each label, and SnapKV again by SnapKV for each side.

    Of wall and of processor time; ``"own"``: of processor time where each side's is first divided by its plain transformers'.
    """
    found: dict[str, Any] = {}
    pairs = {what: ((what, "kvtool"), (what, "kvpress")) for what in cells}
    pairs |= {f"noise of {side}": ((AGAIN, side), ("SnapKV", side)) for side in SIDES}
    for name, (over, under) in pairs.items():
        found[name] = {}
        for kind in ("total", "compress", "decode"):
            if kind == "compress" and name == PLAIN:
                continue
            times = [[[t[clock] for t in cells[what][side][kind]] for what, side in (over, under)] for clock in (0, 1)]
            found[name][kind] = {"wall": ratio(*times[0]), "processor": ratio(*times[1])}
            if name in cells and name != PLAIN and kind != "compress":
                plain = [[t[1] for t in cells[PLAIN][side][kind]] for side in SIDES]
                own = [[a / b for a, b in zip(mine, base, strict=True)] for mine, base in zip(times[1], plain, strict=True)]
                found[name][kind]["own"] = ratio(*own)
    return found


def main() -> None:
    from against_report import markdown
    from decode_speed import processor

    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="shape:llama-0.3b,layers=4")
    parser.add_argument("--length", type=int, default=2048, help="tokens of the prompt; a power of two")
    parser.add_argument("--entries", type=int, default=256, help="per KV head, on average")
    parser.add_argument("--rounds", type=int, default=5, help="of prompts")
    parser.add_argument("--decode-rounds", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4, help="decode steps of a turn")
    parser.add_argument("--venv", type=Path, default=VENV, help="kvpress's environment, made if it is not there")
    parser.add_argument(
        "--part", choices=("all", "sets", "speed"), default="all", help="the other part stays as the result file has it"
    )
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    file = args.out.with_suffix(".json")
    found: dict[str, Any] = json.loads(file.read_text()) if args.part != "all" and file.is_file() else {}
    pythons: dict[str, Path | str] = {"kvtool": sys.executable, "kvpress": python_of(args.venv)}
    found["processor"] = processor()
    models: dict[str, tuple[int, tuple[int, ...]]] = {} if args.part == "speed" else {"tiny": (1024, (128, 256, 512))}
    models[args.model] = (args.length, (args.entries,))
    with tempfile.TemporaryDirectory() as place:
        for name, (length, budgets) in models.items():
            folder = Path(place) / name.replace(":", "-")
            prompt = folder.with_suffix(".json")
            prompt.write_text(json.dumps(save_model(name, length, folder)))
            workers = {side: Worker(side, pythons[side], folder) for side in SIDES}
            found["sides"] = {side: worker.ask("facts") for side, worker in workers.items()}
            if args.part != "speed":
                rows = compare_sets(workers, prompt, budgets, Path(place), others=name != args.model)
                found.setdefault("sets", {})[name] = {"length": length, "rows": rows}
            if name == args.model and args.part != "sets":
                found["speed"] = time_both(workers, prompt, args)
            for worker in workers.values():
                worker.close()
    file.write_text(json.dumps(found, indent=1) + "\n")
    text = "\n".join(markdown(found)) + "\n"
    args.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
