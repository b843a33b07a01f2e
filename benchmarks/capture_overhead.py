"""What a capture costs: time against a plain SDPA prefill, and peak memory against prompt length.

Time: in one process, interleaved, medians of the repeats and of the ratios of each round. Capture means all statistics,
features, the probe pass with 6 answer tokens, and writing the sample. The first prompts of a capture also run with their blocks
permuted: both sorts are measured, and the ratio of a capture of 32 prompts with its default of 8 such ones follows. Memory: the
high-water mark of the resident set above what the loaded model holds, each length in a process of its own.

    python benchmarks/capture_overhead.py                       # both shapes, 4096 tokens; memory at 4096 and 8192
    python benchmarks/capture_overhead.py --shapes embedded --repeats 5
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "capture_overhead.json"
SHAPES: dict[str, dict[str, Any]] = {
    "embedded": {
        "config": {
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "vocab_size": 512,
        },
        "limit": 4.0,
    },
    "0.3b": {
        "config": {
            "hidden_size": 1024,
            "intermediate_size": 2816,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "vocab_size": 32000,
        },
        "limit": 2.0,
    },
}
MEMORY_LIMIT = 2.3
#: glibc gives freed blocks back at once, so the resident set follows what is really held; without, the peak varies by a fifth.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}


def build(shape: str, layers: int | None) -> Any:
    """Build a random-weight Llama of a shape, optionally with fewer layers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(max_position_embeddings=16384, **SHAPES[shape]["config"])
    config.num_hidden_layers = layers or config.num_hidden_layers
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def sample_of(model: Any, length: int) -> Any:
    import torch

    from kvtool.data.tasks import Encoded, Sample

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, model.config.vocab_size, (length + 6,), generator=generator).tolist()
    sample = Sample("bench", "", "", ("x",), "exact", 6, {})
    return Encoded(sample, ids[: length - 20], ids[length - 20 : length], ids[length:])


#: prompts of the capture whose ratio is reported, and how many of them run permuted by default
N_PROMPTS, N_PERMUTED = 32, 8


def capture_once(model: Any, sample: Any, permuted: bool = True) -> Callable[[], object]:
    from kvtool.capture.runner import CaptureConfig
    from kvtool.capture.sample import capture_sample
    from kvtool.capture.store import part_image, write_part
    from kvtool.models import LoadedModel, describe

    loaded = LoadedModel(model, None, describe(model, "bench"))
    config = CaptureConfig("bench", "bench", 1)

    def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            write_part(Path(folder) / "00000.h5", part_image(capture_sample(config, loaded, sample, permuted), "bench"))

    return run


def prefill_once(model: Any, sample: Any) -> Callable[[], object]:
    import torch

    ids = torch.tensor([sample.prompt_ids])

    def run() -> None:
        with torch.no_grad():
            model(input_ids=ids, use_cache=True, logits_to_keep=1)

    return run


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def measure_time(shape: str, length: int, repeats: int, layers: int | None) -> dict[str, Any]:
    """Return medians of prefill and capture, and their ratio: of a prompt without and with the permuted pass, and of 32 prompts."""
    model = build(shape, layers)
    sample = sample_of(model, length)
    plain, capture, permuted = prefill_once(model, sample), capture_once(model, sample, False), capture_once(model, sample)
    small = sample_of(model, 256)
    for warm_up in (prefill_once(model, small), capture_once(model, small), plain):
        warm_up()
    rounds = [(seconds(plain), seconds(capture), seconds(permuted)) for _ in range(repeats)]
    share = N_PERMUTED / N_PROMPTS
    ratios = sorted((c + share * (q - c)) / p for p, c, q in rounds)
    return {
        "shape": shape,
        "n_layers": model.config.num_hidden_layers,
        "length": length,
        "repeats": repeats,
        "prefill_s": round(statistics.median(p for p, *_ in rounds), 3),
        "capture_s": round(statistics.median(c for _, c, _ in rounds), 3),
        "ratio_unpermuted": round(statistics.median(c / p for p, c, _ in rounds), 3),
        "ratio_permuted": round(statistics.median(q / p for p, _, q in rounds), 3),
        "prompts": N_PROMPTS,
        "permuted": N_PERMUTED,
        "ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(ratios[0], 3), round(ratios[-1], 3)],
        "limit": SHAPES[shape]["limit"],
    }


def peak_above_model(shape: str, length: int, layers: int | None) -> int:
    """Return the peak resident bytes above the loaded model of one capture, in this process."""
    model = build(shape, layers)
    capture_once(model, sample_of(model, 256))()
    before = _status("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # start the high-water mark anew
    except OSError:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    capture_once(model, sample_of(model, length))()
    return max(_status("VmHWM"), before) - before


def _status(key: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024


def measure_memory(shape: str, lengths: list[int], layers: int | None) -> dict[str, Any]:
    """Return the peaks at each length, each from a process of its own."""
    peaks = {}
    for length in lengths:
        command = [sys.executable, __file__, "--peak", shape, str(length)]
        command += ["--layers", str(layers)] if layers else []
        done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **ALLOCATOR})
        peaks[length] = int(done.stdout)
    return {
        "shape": shape,
        "n_layers": layers or SHAPES[shape]["config"]["num_hidden_layers"],
        "allocator": ALLOCATOR,
        "peak_above_model_bytes": peaks,
        "ratio": round(peaks[lengths[1]] / peaks[lengths[0]], 3),
        "limit": MEMORY_LIMIT,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--memory-shapes", nargs="*", default=["embedded"], choices=list(SHAPES))
    parser.add_argument("--length", type=int, default=4096, help="tokens; memory is measured here and at twice that")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None, help="default: torch's")
    parser.add_argument("--layers", type=int, default=None, help="fewer layers than the shape has, for a quick look")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--peak", nargs=2, metavar=("SHAPE", "LENGTH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    import torch

    from kvtool.capture.runner import versions
    from kvtool.files import write_json

    if options.threads:
        torch.set_num_threads(options.threads)
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
    if options.peak:
        print(peak_above_model(options.peak[0], int(options.peak[1]), options.layers))
        return
    result: dict[str, Any] = {"versions": versions(), "threads": torch.get_num_threads(), "time": [], "memory": []}
    for shape in options.shapes:
        row = measure_time(shape, options.length, options.repeats, options.layers)
        result["time"].append(row)
        print(f"{shape}, {row['n_layers']} layers, {row['length']} tokens: prefill {row['prefill_s']} s, capture "
              f"{row['capture_s']} s; ratio {row['ratio_unpermuted']}, {row['ratio_permuted']} with the permuted pass, "
              f"{row['ratio']} over 32 prompts (limit {row['limit']})")  # fmt: skip
    for shape in options.memory_shapes:
        row = measure_memory(shape, [options.length, 2 * options.length], options.layers)
        result["memory"].append(row)
        mib = {length: round(peak / 2**20) for length, peak in row["peak_above_model_bytes"].items()}
        print(f"{shape}: peak above the model {mib} MiB, ratio {row['ratio']} (limit {row['limit']})")
    write_json(options.out, result)


if __name__ == "__main__":
    main()
