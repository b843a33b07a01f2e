"""One timed run: a batch of prompts, compressed by a policy, and a number of decode steps; and endless decoding.

Shapes: B sequences, T prompt tokens, V vocabulary.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvtool.attention import AttentionCall, Handler, watch_attention
from kvtool.device_maps import devices_of
from kvtool.infer.bandwidth import Bandwidth
from kvtool.infer.cache import CompressedCache
from kvtool.infer.live import clock
from kvtool.infer.measure import MOST_ROOM
from kvtool.infer.ragged import ROOM
from kvtool.infer.stress_graphs import fixed_steps
from kvtool.infer.stress_memory import PeakMeter, last_level_cache_bytes, read_bytes, resident_bytes, weight_bytes
from kvtool.policies.base import Policy
from kvtool.scoring import score_tokens

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kvtool.models import LoadedModel

#: Decode steps that are not timed, at the start of every run.
WARM_STEPS = 3

#: Further decode steps in which every attention call is timed, by waiting for the device before and after it.
ATTENTION_STEPS = 8


@dataclass(frozen=True, slots=True)
class Bench:
    """What all runs of a process share.

    Attributes
    ----------
    loaded : LoadedModel
    devices : tuple of torch.device
        Of the model's parameters.
    n_new : int
        Timed decode steps.
    kernel : str
    bandwidth : Bandwidth
    weight_bytes, read_bytes : int
        Of all parameters; of those that a decode step reads.
    cache_bytes : int or None
        Last-level cache.
    graphs : bool
        Time steps with fixed shapes as well, at the end of a run.
    """

    loaded: LoadedModel
    devices: tuple[torch.device, ...]
    n_new: int
    kernel: str
    bandwidth: Bandwidth
    weight_bytes: int
    read_bytes: int
    cache_bytes: int | None
    graphs: bool = False

    @classmethod
    def of(cls, loaded: LoadedModel, n_new: int, kernel: str, bandwidth: Bandwidth, graphs: bool = False) -> Bench:
        """Read what a loaded model says."""
        model, devices = loaded.model, tuple(devices_of(loaded.model))
        sizes = weight_bytes(model), read_bytes(model)
        return cls(loaded, devices, n_new, kernel, bandwidth, *sizes, last_level_cache_bytes(devices[0]), graphs)

    @property
    def n_tokens(self) -> int:
        """Tokens that a run feeds after the prompt."""
        return WARM_STEPS + self.n_new + ATTENTION_STEPS

    def now(self) -> float:
        """Seconds now, after all queued work of all devices."""
        return max(clock(device) for device in self.devices)

    def new_cache(self, policy: Policy, batch: int, length: int) -> CompressedCache:
        """Return an empty cache with room for the decode steps, as `kvtool infer` makes it."""
        room, chunked = min(MOST_ROOM, max(ROOM, self.n_tokens)), length if policy.when.chunk else None
        return CompressedCache(
            policy, self.loaded.model, seeds=list(range(batch)), kernel=self.kernel, room=room, prompt_length=chunked
        )

    def feed(self, cache: CompressedCache, tokens: Tensor) -> Tensor:
        """Feed tokens ``[B, N]``; return the logits of the last ones, ``[B, V]``."""
        import torch

        with torch.no_grad():
            out = self.loaded.model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1]  # type: ignore[no-any-return]

    def prefill(self, cache: CompressedCache, prompt: Tensor) -> Tensor:
        """Feed prompts ``[B, T]``, in chunks where the policy evicts between them; return the next tokens ``[B, 1]``."""
        size = cache.policy.when.chunk or int(prompt.shape[1])
        for start in range(0, int(prompt.shape[1]), size):
            logits = self.feed(cache, prompt[:, start : start + size])
        return self.greedy(logits)

    def greedy(self, logits: Tensor) -> Tensor:
        """Return the likeliest tokens ``[B, 1]``, where the model wants its input."""
        return logits.argmax(-1, keepdim=True).to(self.devices[0])

    def step(self, cache: CompressedCache, tokens: Tensor) -> Tensor:
        """Decode one token per sequence."""
        return self.greedy(self.feed(cache, tokens))

    def limit_share(self, tpot_s: float, kv_bytes: float) -> float | None:
        """Return which share of the physical limit a decode step reaches: time to read weights and entries / time taken.

        None where they fit into the last-level cache: then memory is not the limit.
        """
        moved = self.read_bytes + kv_bytes
        if self.cache_bytes is not None and moved <= self.cache_bytes:
            return None
        return moved / self.bandwidth.bytes_per_s / tpot_s


def timed_run(bench: Bench, policy: Policy, prompt: Tensor) -> dict[str, Any]:
    """Run a batch once and return the fields of its record.

    Parameters
    ----------
    prompt : Tensor ``[B, T]``
    """
    batch, length = (int(n) for n in prompt.shape)
    meter = PeakMeter(bench.devices)
    cache = bench.new_cache(policy, batch, length)
    started = bench.now()
    tokens = bench.prefill(cache, prompt)
    ttft_s = bench.now() - started
    prefill_peak, at_prompt, compress_s = meter.peak(), cache.count_bytes(), cache.compress_s
    entries = _entries(cache)
    meter.restart()
    for _ in range(WARM_STEPS):
        tokens = bench.step(cache, tokens)
    step_s, used = [], [cache.count_bytes().used]
    for _ in range(bench.n_new):
        started = bench.now()
        tokens = bench.step(cache, tokens)
        step_s.append(bench.now() - started)
    decode_peak, at_end = meter.peak(), cache.count_bytes()
    used.append(at_end.used)
    cache.check_capacities()
    tpot_s, read = statistics.median(step_s), statistics.fmean(used)
    attention_s = _attention_time(bench, cache, tokens)
    return {
        "entries": entries,
        "retention": entries / length,
        "ttft_s": ttft_s,
        "compress_s": compress_s,
        "prefill_s": ttft_s - compress_s,
        "step_s": [round(seconds, 7) for seconds in step_s],
        "tpot_s": tpot_s,
        "tokens_per_s": batch * len(step_s) / sum(step_s),
        "attention_s": attention_s,
        "kv_bytes_prompt_end": at_prompt.allocated,
        "kv_bytes_generation_end": at_end.allocated,
        "slack_bytes": at_prompt.slack,
        "kv_bytes_read": read,
        "prefill_peak_bytes": prefill_peak.used_bytes,
        "decode_peak_bytes": decode_peak.used_bytes,
        "reserved_bytes": prefill_peak.reserved_bytes,
        "why_no_peak": prefill_peak.why_not,
        "limit_share": bench.limit_share(tpot_s, read),
        "kernel": cache.kernel_name,
        **(fixed_steps(bench, cache, tokens) if bench.graphs else {}),
    }


def _entries(cache: CompressedCache) -> float:
    """Mean entries per KV head over all layers and sequences."""
    return statistics.fmean(n for layer in cache.entries() for row in layer for n in row)


def _attention_time(bench: Bench, cache: CompressedCache, tokens: Tensor) -> float:
    """Mean time per decode step inside kvtool's attention: append, attend, evict, all layers; in steps of their own."""
    spent = 0.0

    def watch(handler: Handler, call: AttentionCall) -> Tensor:
        nonlocal spent
        started = clock(call.queries.device)
        out = handler(call)
        spent += clock(call.queries.device) - started
        return out

    with watch_attention(watch):
        for _ in range(ATTENTION_STEPS):
            tokens = bench.step(cache, tokens)
    return spent / ATTENTION_STEPS


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of endless decoding.

    Attributes
    ----------
    start, stop : int
        Tokens decoded before and after it.
    step_s : tuple of float
    kv_bytes_low, kv_bytes_high : int
        Allocated, over the steps.
    entries_high : int
        Most entries that any head held.
    resident_bytes, allocated_bytes : int or None
        Of the process at the end; of CUDA.
    nll : float or None
        Mean negative log-likelihood of the text's tokens.
    """

    start: int
    stop: int
    step_s: tuple[float, ...]
    kv_bytes_low: int
    kv_bytes_high: int
    entries_high: int
    resident_bytes: int | None
    allocated_bytes: int | None
    nll: float | None


def endless(
    bench: Bench, policy: Policy, prompt: Sequence[int], text: Sequence[int] | None, n: int, size: int
) -> Iterator[Window]:
    """Decode `n` tokens over one cache and yield what each `size` of them took.

    Parameters
    ----------
    prompt : sequence of int
    text : sequence of int or None
        Tokens that are fed instead of the model's own, `n` of them and one more to predict; None: greedy, no token ends it.
    """
    import torch

    device = bench.devices[0]
    cache = bench.new_cache(policy, 1, len(prompt))
    tokens = bench.prefill(cache, torch.tensor([list(prompt)], device=device))
    for start in range(0, n, size):
        stop = min(n, start + size)
        steps, held, losses, most = [], [], [], 0
        for i in range(start, stop):
            if text is not None:
                tokens = torch.tensor([[text[i]]], device=device)
            started = bench.now()
            logits = bench.feed(cache, tokens)
            tokens = bench.greedy(logits)
            steps.append(bench.now() - started)
            held.append(cache.count_bytes().allocated)
            most = max(most, max(n for layer in cache.entries() for row in layer for n in row))
            if text is not None:
                losses.append(float(score_tokens(logits, torch.tensor([text[i + 1]], device=logits.device)).nll[0]))
        cuda = [torch.cuda.memory_allocated(d) for d in bench.devices if d.type == "cuda"]
        yield Window(
            start,
            stop,
            tuple(steps),
            min(held),
            max(held),
            most,
            resident_bytes(),
            sum(cuda) if cuda else None,
            statistics.fmean(losses) if losses else None,
        )
