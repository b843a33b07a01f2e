"""What the executor tests and their scripts share: a tiny model on disk, a run of it, and its outcome without times."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from kvtool.capture.runner import CaptureConfig, CaptureSummary, run_capture
from kvtool.data.tasks import Encoded, Sample
from kvtool.data.texts import Document
from kvtool.executors.execution import LOCAL, Execution
from kvtool.files import read_records
from kvtool.infer.perplexity import PerplexityRun, run_perplexity
from kvtool.infer.perplexity_plan import PerplexityConfig
from kvtool.infer.runner import InferConfig, InferSummary, run_infer
from kvtool.models import LoadedModel, load_model
from kvtool.policies import Policy

N_SAMPLES = 7
POLICIES = ("snapkv:budget=20,window=4", "random:budget=20,window=4,sink=2")
N_UNITS = N_SAMPLES * (1 + len(POLICIES))
TIMES = ("ttft_s", "compress_s", "tpot_s", "total_s", "prefill_peak_bytes", "seconds")


def save_model(folder: Path) -> None:
    """Write a random 2-layer model and a tokenizer of single words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=67,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=512,
        initializer_range=0.3,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(67)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


def load(folder: Path) -> LoadedModel:
    return load_model(str(folder), "cpu")


def samples(n: int = N_SAMPLES) -> list[Encoded]:
    """Every second sample has no gold answer: its yardstick is the full cache's own one. Two are long enough to be permuted."""
    generator, made = torch.Generator().manual_seed(1), []
    for index in range(n):
        ids = torch.randint(3, 67, ((60 if index > 1 else 260) + index,), generator=generator).tolist()
        sample = Sample(f"toy-{index}", "c", "q", () if index % 2 else ("w5 w6",), "f1", 4, {"index": index})
        made.append(Encoded(sample, ids[:-10], ids[-10:-4], [] if index % 2 else ids[-4:]))
    return made


def infer(loaded: LoadedModel, out: Path, execution: Execution = LOCAL, policies: list[Policy] | None = None) -> InferSummary:
    config = InferConfig("toy", "toy", N_SAMPLES, answer_tokens=4)
    return run_infer(config, loaded, samples(), policies or [Policy.parse(text) for text in POLICIES], out, execution)


def capture(loaded: LoadedModel, out: Path, execution: Execution = LOCAL) -> CaptureSummary:
    config = CaptureConfig("toy", "toy", N_SAMPLES, windows=(8,), permute=2)
    return run_capture(config, loaded, samples(), out, execution)


def perplexity(loaded: LoadedModel, out: Path, execution: Execution = LOCAL) -> PerplexityRun:
    text = " ".join(f"w{(3 + i * i) % 67}" for i in range(300))
    config = PerplexityConfig(text=("toy",), model="toy", length=60, segments=4, batch=2)
    policies = [Policy.parse(policy) for policy in ("streaming:budget=20", "h2o:budget=20")]
    return run_perplexity(config, loaded, [Document("toy", text)], policies, out, execution)


def records(folder: Path) -> list[dict[str, Any]]:
    """The records in their order, without times."""
    return [{k: v for k, v in r.items() if k not in TIMES} for r in read_records(folder / "records.jsonl")]


def content(path: Path) -> dict[str, Any]:
    """Everything in a capture but the moment at which it was made."""
    found: dict[str, Any] = {}

    def visit(name: str, item: Any) -> None:
        found[name] = {k: np.asarray(v).tolist() for k, v in item.attrs.items()}
        if isinstance(item, h5py.Dataset):
            found[name]["data"] = (str(item.dtype), item.shape, item[()].tobytes())

    with h5py.File(path, "r") as file:
        file.visititems(visit)
        found["/"] = {k: v for k, v in file.attrs.items() if k != "created"}
    return found


def facts(summary: InferSummary | CaptureSummary) -> dict[str, int]:
    """The counts of a summary."""
    return {f.name: v for f in dataclasses.fields(summary) if isinstance(v := getattr(summary, f.name), int)}
