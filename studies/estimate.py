"""What a study will take, before it runs: time and memory of each node, from a stated model, corrected by what was measured.

Time. A prompt of T tokens costs 2 P T + 2 L W T^2 floating-point operations (P parameters without tables that are looked up,
L layers, W width of all query heads: scores and outputs over the causal half), a decode step reads all weights and the cache
once; each pass through a layer costs a fixed time on top. The rates are measured on this device. Every stage has a factor for
what else it does, found on the embedded model; where nodes of the stage are done in the output folder, the median of measured
over estimated takes its place.

Memory. Weights, keys and values of the prompt in all layers, the activations of one layer, and the statistics that are captured.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtool.errors import ConfigError
from kvtool.infer.stress_plan import doubling
from kvtool.studies.content import longest_allowed, n_prompts

if TYPE_CHECKING:
    from kvtool.shapes import Shape
    from kvtool.studies.graph import Node

#: Seconds that one pass through one layer takes beside its arithmetic: launching its operations.
LAYER_S = {"cpu": 0.0006, "cuda": 0.0004}
#: Measured over modelled time, on the embedded model and two cores; see docs/studies.md.
FACTORS = {
    "capture": 2.0,
    "classify": 2.0,
    "simulate": 1.7,
    "refine": 0.9,
    "gaps": 0.7,
    "search": 0.5,
    "compensation": 1.0,
    "importance": 1.0,
    "hiv": 0.4,
    "infer": 1.25,
    "cliffs": 1.7,
    "compare": 1.0,
    "consistency": 1.0,
    "perplexity": 1.0,
    "stress": 2.0,
    "no_cache": 1.0,
    "analyze": 1.0,
}
#: Tokens of an answer where the task does not say more.
NEW_TOKENS = 32
#: Bytes that a stage moves per number that it looks at (prompt, policy, head, entry), found on the embedded model.
MOVED = {"simulate": 100, "gaps": 24_000, "search": 4_200, "compensation": 32_000}
#: Masked forwards per policy and block size, of a compensation that is refined.
STATES = 16
#: What the process itself takes in main memory: interpreter, torch and the other libraries, figures.
PROCESS_BYTES = 760_000_000
#: Copies of the logits of a text: as they come, as 32-bit numbers, as probabilities.
LOGITS = 3
#: A step that evicts, over one that does not.
STEPPED = 2.4
#: Seconds that the first forwards of a stage take more than later ones.
COLD_S = 2.5
#: Seconds of one paired comparison with 9,999 draws.
COMPARISON_S = 0.05


@dataclass(frozen=True, slots=True)
class Rates:
    """What a device does in a second.

    Attributes
    ----------
    device : str
    flops : float
        Floating-point operations, of a matrix product of the size that prompts have.
    bytes_per_s : float
    measured : bool
        False: they were given, as the device is not here.
    """

    device: str
    flops: float
    bytes_per_s: float
    measured: bool = True


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a node will take.

    Attributes
    ----------
    units : int
        (sample, policy) pairs, prompts, configurations or timed points; 1 for a node that is one piece of work.
    seconds : float or None
        None: the model's size is not known here.
    bytes_ : int or None
        Of memory.
    """

    units: int
    seconds: float | None
    bytes_: int | None


def assumed_rates(text: str) -> Rates:
    """Read ``60000,1000``: GFLOP/s and GB/s of a device that is not here, taken for a GPU.

    Raises
    ------
    ConfigError
        Other text.
    """
    try:
        flops, moved = (float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"--assume {text!r}: give GFLOP/s and GB/s, such as 60000,1000") from error
    if not (0 < flops < float("inf") and 0 < moved < float("inf")):
        raise ConfigError(f"--assume {text!r}: both must be above 0")
    return Rates("cuda", flops * 1e9, moved * 1e9, measured=False)


def measure_rates(device: str) -> Rates:
    """Measure the device's matrix products and memory; a second or two."""
    import time

    import torch

    from kvtool.infer.bandwidth import measure_bandwidth

    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    place = torch.device(name)
    size, kind = (4096, torch.bfloat16) if place.type == "cuda" else (768, torch.float32)
    left = torch.ones(size, size, device=place, dtype=kind)
    times = []
    for _ in range(4):
        started = time.perf_counter()
        (left @ left).sum().item()
        times.append(time.perf_counter() - started)
    bandwidth = measure_bandwidth(place, 64 << 20)
    return Rates(place.type, 2 * size**3 / min(times), bandwidth.bytes_per_s)


def model_shape(name: str) -> Shape | None:
    """Return the architecture of a model without loading it: a shape, a local folder, or a hub id whose shape is known."""
    from kvtool.models import EMBEDDED, embedded_folder
    from kvtool.shapes import SHAPES, is_shape, parse_shape

    if is_shape(name):
        return parse_shape(name)
    folder = embedded_folder() if name == EMBEDDED else Path(name)
    if (folder / "config.json").is_file():
        return _local_shape(folder / "config.json")
    return next((shape for shape in SHAPES.values() if shape.source.lower() == name.lower()), None)


def _local_shape(file: Path) -> Shape | None:
    from kvtool.shapes import Shape

    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        shape = Shape(file.parent.name, str(config["model_type"]), config, str(file))
        return shape if shape.n_parameters > 0 and shape.context > 0 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # of a family that the arithmetic does not know: no estimate, and nothing else hangs on it


def beyond_context(node: Node) -> str | None:
    """Return why a node's prompts cannot be run by a model whose context is known without loading it, or None."""
    if node.stage.kind not in ("capture", "infer") or (length := longest_allowed(node.work)) is None:
        return None
    shape = model_shape(node.work["model"])
    if shape is None or length < shape.context:
        return None
    return f"prompts of {length} tokens, {node.work['model']} has a context of {shape.context}"


def estimate(node: Node, rates: Rates, factors: Mapping[str, float]) -> Estimate:
    """Estimate a node.

    Parameters
    ----------
    factors : mapping of str to float
        Stage kind -> factor; see `measured_factors`.
    """
    shape, units = model_shape(node.cell.model.text), n_units(node)
    kind = node.stage.kind
    process = PROCESS_BYTES if rates.device == "cpu" else 0
    if kind in ("classify", "analyze", "consistency"):
        return Estimate(units, 3.0 * factors[kind], process)
    if kind == "compare":
        return Estimate(units, (2.0 + COMPARISON_S * _comparisons(node) * node.work["draws"] / 9999) * factors[kind], process)
    if shape is None:
        return Estimate(units, None, None)
    cost = _Cost(shape, rates)
    seconds = cost.seconds(node) * factors[kind]
    return Estimate(units, seconds, cost.memory(node))


def n_units(node: Node) -> int:
    """Return how many pieces of work a node has; of a shortlist, the policies are counted once it is there."""
    work, n_policies = node.work, max(1, len(node.policies))
    if node.stage.kind == "capture":
        return n_prompts(work)
    if node.stage.kind == "infer":
        return n_prompts(work) * (n_policies + 1)
    if node.stage.kind in ("simulate", "gaps", "compensation", "importance", "hiv"):
        return len(node.policies)
    if node.stage.kind == "cliffs":
        return n_prompts(node.inputs["infer"].work) * _finer(node)
    if node.stage.kind == "no_cache":
        return len(list(doubling(work["length"], work["max_length"]))) * int(work["repeats"])
    if node.stage.kind == "refine":
        return int(work["refine"])
    if node.stage.kind == "perplexity":
        return int(work["segments"] or 1) * (n_policies + 1)
    if node.stage.kind == "stress":
        return sum(1 for _ in _stress_points(node)) * (n_policies + 2) * int(work["repeats"])
    return 1


def _comparisons(node: Node) -> int:
    """Policies against the baseline, and pairs within a budget; of two figures each."""
    texts = node.inputs["infer"].policies
    budgets = [text.partition("budget=")[2].partition(",")[0] for text in texts]
    counts = [budgets.count(budget) for budget in set(budgets)]
    return 2 * (len(texts) + sum(count * (count - 1) // 2 for count in counts))


def _finer(node: Node) -> int:
    """Configurations that a refinement adds at most: of each method with several retentions, some per round."""
    from kvtool.studies.naming import method_text

    methods = [method_text(text) for text in node.inputs["infer"].policies]
    falling = sum(methods.count(method) > 1 for method in set(methods))
    return falling * int(node.work["points"]) * int(node.work["rounds"])


def _stress_points(node: Node) -> Iterable[tuple[int, int]]:
    """Yield the (length, batch) of both series; until memory is out: to 32 times the first one."""
    work = node.work
    for length in doubling(work["length"], _last(work["max_length"], work["length"])):
        yield length, work["batch"]
    for batch in doubling(work["batch"], _last(work["max_batch"], work["batch"])):
        yield work["length"], batch


def _last(bound: int | str | None, first: int) -> int:
    return 0 if bound is None else 32 * first if isinstance(bound, str) else int(bound)


@dataclass(frozen=True, slots=True)
class _Cost:
    """Arithmetic of one model on one device."""

    shape: Shape
    rates: Rates

    @property
    def _itemsize(self) -> int:
        return 2 if self.rates.device == "cuda" else 4

    def prompt_s(self, length: int, batch: int = 1) -> float:
        shape = self.shape
        width = shape.n_heads * shape.head_dim
        flops = 2 * (shape.n_parameters - shape.n_lookup) * length + 2 * shape.n_layers * width * length**2
        return batch * flops / self.rates.flops + shape.n_layers * LAYER_S[self.rates.device]

    def step_s(self, entries: float, batch: int = 1) -> float:
        shape, size = self.shape, self._itemsize
        moved = (shape.n_parameters - shape.n_lookup) * size + batch * entries * shape.kv_bytes_per_token(size)
        return moved / self.rates.bytes_per_s + shape.n_layers * LAYER_S[self.rates.device]

    def seconds(self, node: Node) -> float:
        """Seconds of the arithmetic; the stage's factor comes on top."""
        work, kind = node.work, node.stage.kind
        captured = node.inputs["capture"].work if "capture" in node.inputs else work
        length, n = int(captured.get("length") or NEW_TOKENS * 64), n_prompts(captured) if "n" in captured else 1
        if kind == "capture":
            return COLD_S + (n + min(n, int(work["permute"]))) * (self.prompt_s(length) + self.prompt_s(NEW_TOKENS))
        if kind in ("simulate", "gaps", "search", "compensation"):
            points = {
                "search": work.get("trials", 1) * len(work.get("budgets", ())),
                "compensation": len(work.get("blocks", ())),
            }
            each = max(1, len(node.policies)) * points.get(kind, 1)
            numbers = n * each * length * self.shape.n_layers * self.shape.n_heads
            forwards = STATES * each if kind == "compensation" and work["refine"] else 0
            refined = n * (self.prompt_s(length) + forwards * self.prompt_s(NEW_TOKENS)) if forwards else 0.0
            return 2.0 + float(MOVED[kind] * numbers / self.rates.bytes_per_s) + refined
        if kind in ("importance", "hiv"):
            heads = self.shape.n_layers * self.shape.n_heads if work["ablate"] else 0
            tasks = sum(role.startswith("capture") for role in node.inputs)
            return 2.0 + tasks * n * (len(node.policies) + 1) * (
                self.prompt_s(length) + (3 + heads) * self.prompt_s(NEW_TOKENS)
            )
        if kind == "refine":
            return 2.0 + n * (self.prompt_s(length) + int(work["refine"]) * self.prompt_s(NEW_TOKENS))
        if kind == "infer":
            kept = sum(entries(text, length) for text in node.policies) + length
            return COLD_S + self._infer_s(work, len(node.policies) + 1, kept)
        if kind == "cliffs":
            real = node.inputs["infer"].work
            return self._infer_s(real, _finer(node), _finer(node) * int(real["length"] or length) / 4)
        if kind == "no_cache":
            per_run = (int(work["n_new"]) + 1) * int(work["repeats"])
            return per_run * sum(self.prompt_s(t) for t in doubling(work["length"], work["max_length"]))
        if kind == "perplexity":
            return COLD_S + float(sum(self._reading_s(text, work) for text in ("full", *node.policies)))
        runs = (len(node.policies) + 2) * (work["repeats"] + work["warm_ups"])
        timed = sum(runs * (self.prompt_s(t, b) + work["n_new"] * self.step_s(t, b)) for t, b in _stress_points(node))
        return COLD_S + float(timed + work["endless"] * 2 * len(node.policies) * STEPPED * self.step_s(work["length"]))

    def _infer_s(self, work: Mapping[str, Any], n_policies: int, kept: float) -> float:
        """Seconds of real runs: a prompt per sample, and an answer per policy; `kept`: entries of all policies together."""
        length = int(work["length"] or NEW_TOKENS * 64)
        steps = int(work["max_new_tokens"] or NEW_TOKENS) if work["generate"] else 1
        each = 0.0 if not n_policies else n_policies * self.step_s(kept / n_policies)
        return n_prompts(work) * (self.prompt_s(length) + steps * each)

    def _reading_s(self, text: str, work: Mapping[str, Any]) -> float:
        """A policy that goes by position alone reads many tokens at once, any other one by one."""
        from kvtool.policies import parse_policy
        from kvtool.policies.scorers import Position

        length, n = int(work["length"]), int(work["segments"] or 64)
        method = parse_policy(text).method
        if method.keeps_all or isinstance(method.parts().scorer, Position):
            return n * self.prompt_s(length)
        return STEPPED * -(-n // int(work["batch"])) * length * self.step_s(entries(text, length), int(work["batch"]))

    def memory(self, node: Node) -> int:
        """Bytes: weights, cache of the longest prompt, activations of one layer, statistics; on a CPU the process' own, too."""
        from kvtool.infer.perplexity_score import CHUNK, MOST_LOGITS

        shape, size, kind = self.shape, self._itemsize, node.stage.kind
        if kind in ("simulate", "gaps", "search"):
            return self._process
        captured = node.inputs["capture"].work if "capture" in node.inputs else node.work
        captured = node.inputs["infer"].work if kind == "cliffs" else captured
        length, batch = captured.get("length") or NEW_TOKENS * 64, 1
        if kind == "stress":
            length, batch = max(_stress_points(node), key=lambda at: at[0] * at[1], default=(length, 1))
        elif kind == "no_cache":
            length = node.work["max_length"]
        elif kind == "perplexity":
            batch = node.work["batch"]
        hidden = int(shape.config["hidden_size"])
        wide = int(shape.config.get("intermediate_size") or shape.config.get("ffn_dim") or 4 * hidden)
        active = batch * length * size * (4 * hidden + 3 * wide + 4 * shape.n_heads * shape.head_dim)
        if kind == "perplexity":
            active += LOGITS * min(batch * min(length, CHUNK) * int(shape.config.get("vocab_size", 0)), MOST_LOGITS) * 4
        total = 2 * batch * length * shape.kv_bytes_per_token(size) + active
        if kind == "capture":
            total += 12 * 4 * shape.n_heads * length * shape.n_layers
        if kind == "stress":
            total = max(total, 2 * self._probe())
        return int(total) + shape.n_parameters * size + self._process

    @property
    def _process(self) -> int:
        return PROCESS_BYTES if self.rates.device == "cpu" else 0

    def _probe(self) -> int:
        """Bytes of each of the two tensors that the memory bandwidth is measured with; of a device that is not here: unknown."""
        import torch

        from kvtool.infer.bandwidth import probe_bytes

        return probe_bytes(torch.device(self.rates.device)) if self.rates.measured else 0


def entries(text: str, length: int) -> float:
    """Return how many entries of a prompt a policy keeps; all of it where only its heads file says."""
    from kvtool.errors import KvtoolError
    from kvtool.policies import parse_policy

    policy = parse_policy(text)
    try:
        return float(length if policy.method.keeps_all else min(length, policy.asked(length)))
    except KvtoolError:
        return float(length)


def measured_factors(nodes: Iterable[tuple[Node, float | None]], rates: Rates) -> dict[str, float]:
    """Return the factor of each stage: of the nodes that were measured where there are any, else `FACTORS`.

    Parameters
    ----------
    nodes : iterable of (Node, seconds or None)
        Seconds that a finished node took; None: not finished, or not in one go.
    """
    ratios: dict[str, list[float]] = {}
    plain = dict.fromkeys(FACTORS, 1.0)
    for node, seconds in nodes:
        guess = None if seconds is None else estimate(node, rates, plain).seconds
        if seconds and guess:
            ratios.setdefault(node.stage.kind, []).append(seconds / guess)
    return {**FACTORS, **{kind: statistics.median(found) for kind, found in ratios.items()}}


def facts(estimates: Iterable[Estimate]) -> dict[str, Any]:
    """Return the sum of all seconds that are known, how many nodes are not, and the largest memory."""
    found = list(estimates)
    known = [e.seconds for e in found if e.seconds is not None]
    return {
        "seconds": sum(known),
        "unknown": len(found) - len(known),
        "bytes": max((e.bytes_ for e in found if e.bytes_ is not None), default=None),
    }
