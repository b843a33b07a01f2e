"""Decoding without any cache: every token is a pass over the whole text so far. The other end of the scale that caches are judged on."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtool.errors import ConfigError, is_out_of_memory
from kvtool.files import append_records, open_run, read_records
from kvtool.infer.stress_table import PointRow, points
from kvtool.progress import say

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kvtool.models import LoadedModel

NAME = "no KV cache"
RECORDS = "records.jsonl"


@dataclass(frozen=True, slots=True)
class NoCacheConfig:
    """What is timed.

    Attributes
    ----------
    length, max_length : int
        Prompt tokens: the first, and where doubling ends.
    n_new : int
        Tokens after the first one.
    repeats, seed : int
    """

    length: int = 512
    max_length: int = 512
    n_new: int = 4
    repeats: int = 3
    seed: int = 0


def run_no_cache(config: NoCacheConfig, loaded: LoadedModel, out: Path) -> list[PointRow]:
    """Time decoding without a cache at each length; stopped at any moment, the same call continues.

    Parameters
    ----------
    config : NoCacheConfig
    loaded : LoadedModel
    out : Path
        Output folder: ``records.jsonl``, ``no_cache.csv`` and ``no_cache.json``, with the points of a stress test.

    Returns
    -------
    list of PointRow
        Bytes of keys and values are 0: nothing is kept from one token to the next.

    Raises
    ------
    ConfigError
        The folder holds another run, or a length is beyond the model's context.
    """
    from kvtool.infer.stress_plan import doubling
    from kvtool.infer.stress_prompts import Book

    lengths = list(doubling(config.length, config.max_length))
    if (most := lengths[-1] + config.n_new + 1) > loaded.info.max_positions:
        raise ConfigError(
            f"no_cache: {most} tokens are asked for, {loaded.info.model_id} has a context of {loaded.info.max_positions}; "
            "lower max_length"
        )
    identity = {**asdict(config), "model": loaded.info.model_id, "fingerprint": loaded.info.fingerprint}
    open_run(out, identity, {"device": str(next(loaded.model.parameters()).device)})
    path, book = out / RECORDS, Book.read(loaded)
    done = {(r["length"], r["repeat"]) for r in read_records(path)} if path.exists() else set()
    for length, repeat in _wanted(lengths, config.repeats):
        if (length, repeat) not in done:
            device = next(loaded.model.parameters()).device
            record = _measure(loaded, book.batch(1, length, config.seed + repeat, device), config.n_new, repeat)
            append_records(path, [record])
            say(f"{NAME}, length {length}, run {repeat + 1}: {_line(record)}")
    return _write(out)


def _wanted(lengths: Sequence[int], repeats: int) -> Iterator[tuple[int, int]]:
    for length in lengths:
        for repeat in range(repeats):
            yield length, repeat


def _measure(loaded: LoadedModel, prompt: Tensor, n_new: int, repeat: int) -> dict[str, Any]:
    """Return one run's record; what does not fit is a record too."""
    from kvtool.device_maps import devices_of
    from kvtool.infer.stress_memory import SAFE_SHARE, free_bytes, needed_bytes
    from kvtool.policies import Policy

    length, devices = int(prompt.shape[1]), tuple(devices_of(loaded.model))
    blank: dict[str, Any] = dict.fromkeys(_FIELDS) | {
        "series": "length",
        "policy": NAME,
        "again": False,
        "length": length,
        "batch": 1,
        "repeat": repeat,
        "status": "ok",
        "message": None,
        "beyond_context": False,
        "degenerate": False,
    }
    needed, free = needed_bytes(loaded, Policy.parse("full"), 1, length + n_new, 0), free_bytes(devices)
    if free is not None and needed > SAFE_SHARE * free:
        message = f"needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        return blank | {"status": "would not fit", "message": message, "estimate_bytes": needed}
    try:
        return blank | {"estimate_bytes": needed} | decode_without_cache(loaded.model, devices, prompt, n_new)[1]
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return blank | {"status": "oom", "message": " ".join(str(error).split())[:200], "estimate_bytes": needed}


_FIELDS = (
    *("retention", "ttft_s", "tpot_s", "compress_s", "attention_s", "tokens_per_s", "limit_share", "kv_bytes_prompt_end"),
    *("kv_bytes_generation_end", "kv_bytes_read", "prefill_peak_bytes", "decode_peak_bytes", "kernel"),
)


def decode_without_cache(
    model: Any, devices: Sequence[torch.device], prompt: Tensor, n_new: int
) -> tuple[list[int], dict[str, Any]]:
    """Decode greedily, each token by a pass over everything before it.

    Parameters
    ----------
    model : transformers model
    devices : sequence of torch.device
    prompt : Tensor ``[1, T]``
    n_new : int
        Tokens after the first one.

    Returns
    -------
    list of int, dict
        The ``n_new + 1`` tokens; times in seconds, peaks in bytes above what was held before.
    """
    import torch

    from kvtool.infer.live import clock
    from kvtool.infer.stress_memory import PeakMeter

    def now() -> float:
        return max(clock(device) for device in devices)

    def step(tokens: Tensor) -> Tensor:
        with torch.no_grad():
            logits = model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits
        return torch.cat([tokens, logits[:, -1].argmax(-1, keepdim=True).to(tokens.device)], dim=1)

    meter, started = PeakMeter(devices), now()
    text = step(prompt)
    ttft_s, prefill_peak = now() - started, meter.peak()
    meter.restart()
    step_s = []
    for _ in range(n_new):
        started = now()
        text = step(text)
        step_s.append(now() - started)
    tokens = [int(token) for token in text[0, prompt.shape[1] :]]
    return tokens, {
        "ttft_s": ttft_s,
        "step_s": [round(seconds, 7) for seconds in step_s],
        "tpot_s": statistics.median(step_s),
        "tokens_per_s": n_new / sum(step_s),
        "kv_bytes_prompt_end": 0,
        "kv_bytes_generation_end": 0,
        "kv_bytes_read": 0,
        "prefill_peak_bytes": prefill_peak.used_bytes,
        "decode_peak_bytes": meter.peak().used_bytes,
        "why_no_peak": prefill_peak.why_not,
    }


def _line(record: dict[str, Any]) -> str:
    return (
        f"{1000 * record['tpot_s']:.1f} ms a token" if record["status"] == "ok" else f"{record['status']}: {record['message']}"
    )


def read_no_cache(folder: Path) -> list[PointRow]:
    """Return the points of a finished run."""
    return points(read_records(folder / RECORDS))


def _write(folder: Path) -> list[PointRow]:
    from kvtool.files import write_json, write_text
    from kvtool.infer.stress_report import points_csv

    rows = read_no_cache(folder)
    write_text(folder / "no_cache.csv", points_csv(rows))
    write_json(folder / "no_cache.json", [asdict(row) for row in rows])
    return rows
