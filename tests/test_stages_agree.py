"""Simulate and infer must decide and measure the same: kept sets to the last entry, refined loss to 1e-4."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvtool import models
from kvtool.capture.reader import open_capture
from kvtool.capture.runner import CaptureConfig, run_capture
from kvtool.data.tasks import Encoded, load_task, sample_seed
from kvtool.infer.cache import CompressedCache
from kvtool.infer.generate import prefill
from kvtool.infer.runner import InferConfig, run_infer
from kvtool.models import LoadedModel
from kvtool.policies import Policy, expand_policies, kept_positions
from kvtool.simulate.refine import refine_sample

#: Every compensation, on methods with uniform budgets and with budgets per head.
COMPENSATED = [
    "snapkv:budget={},compensate=slots,block=16",
    "snapkv:budget={},compensate=mean,block=16",
    "snapkv:budget={},compensate=mean,bias=none,block=16",
    "snapkv:budget={},compensate=mean,block=full",
    "adakv:budget={},compensate=weighted,block=32",
    "adakv:budget={},compensate=weighted,block=16,bias=count,gate=28",
    "streaming:budget={},compensate=mean,block=16,gate=28",
    "window:budget={},compensate=merge",
    "adakv:budget={},compensate=merge,merge=weighted,bias=entropy",
    "snapkv:budget={},compensate=merge,merge=values",
    "snapkv:budget={},compensate=merge,merge=d2o,bias=count",
    "adakv:budget={},compensate=merge,merge=d2o",
    "streaming:budget={},compensate=merge,merge=cam",
    "adakv:budget={},compensate=refit",
    "streaming:budget={},compensate=refit,ridge=0.5",
]
ARCHITECTURES = ("llama", "mistral", "qwen2", "opt", "gpt_neox")
BUDGETS = ["40%", "65%"]


#: Methods that share by what a file knows of heads; without a budget too.
BY_HEADS = ["headkv", "hace", "hace-head", "hace:scorer=snapkv,layer_power=0.5", "duo:sink=4,recent=16", "head_windows"]
BY_HEADS += ["duo:budget=own,sink=4,recent=16", "G_conf0.7_base64", "J_pos64_mix64_g128"]


def by_heads(toy_heads: Callable[..., Path], info: models.ModelInfo) -> list[Policy]:
    heads = toy_heads(info.n_layers, info.n_heads, info.n_kv_heads, info.fingerprint)
    return expand_policies(BY_HEADS, BUDGETS, real=True, heads=str(heads))


def compensated() -> list[Policy]:
    return [Policy.parse(text.format("40%")) for text in COMPENSATED]


def captured(
    tmp_path: Path, model: Any, tokenizer: Any, compress_at: Any, length: int = 240, n: int = 2
) -> tuple[Path, LoadedModel, list[Encoded]]:
    loaded = LoadedModel(model, tokenizer, models.describe(model, "toy"))
    samples = load_task("niah", tokenizer, n, length, seed=4)
    config = CaptureConfig(task="niah", model="toy", n=n, length=length, seed=4, compress_at=compress_at)
    run_capture(config, loaded, samples, tmp_path / "c.h5")
    return tmp_path / "c.h5", loaded, samples


@pytest.mark.parametrize(
    ("architecture", "compress_at"),
    [*((name, "prompt") for name in ARCHITECTURES), ("llama", "context"), ("mistral", "context")],
)
def test_kept_sets_are_equal(
    architecture: str,
    compress_at: str,
    tmp_path: Path,
    random_model: Callable[..., Any],
    byte_tokenizer: Any,
    toy_heads: Callable[..., Path],
) -> None:
    # A Mistral window wider than the prompt, so that its layers are compressed too.
    changes = {"sliding_window": 400} if architecture == "mistral" else {}
    n = 2 if architecture == "llama" else 1
    path, loaded, samples = captured(tmp_path, random_model(architecture, **changes), byte_tokenizer, compress_at, n=n)
    policies = [*expand_policies((), BUDGETS, real=True), *compensated(), *by_heads(toy_heads, loaded.info)]
    names = sorted({name for policy in policies for name in policy.needs()})
    compared = 0
    with open_capture(path) as capture:
        for sample, encoded in zip(capture.samples, samples, strict=True):
            ids = encoded.prompt_ids if compress_at == "prompt" else encoded.context_ids
            assert sample.seed == sample_seed(encoded.sample.id)
            state = prefill(loaded.model, ids, names, sample.seed)
            for policy in policies:
                offline = kept_positions(policy, sample.views())
                live = state.choose(policy)
                cache = CompressedCache(policy, loaded.model, seeds=sample.seed, keep_positions=True)
                with torch.no_grad():
                    loaded.model(torch.tensor([ids]), past_key_values=cache)
                for layer, heads in enumerate(offline):
                    for head, positions in enumerate(heads):
                        assert torch.equal(positions, live[layer][0][head]), (str(policy), layer, head)
                        assert torch.equal(positions, cache.kept[layer][0][head]), (str(policy), layer, head)
                        compared += 1
    assert compared == n * len(policies) * loaded.info.n_layers * loaded.info.n_kv_heads


@pytest.mark.parametrize("compress_at", ["prompt", "context"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "opt"])
def test_refined_loss_is_the_loss_of_real_inference(
    architecture: str, compress_at: Any, tmp_path: Path, random_model: Callable[..., Any], byte_tokenizer: Any
) -> None:
    # Nothing would be compressible with the fixture's window of 16; at 245 it hides the prompt's first entries from answers.
    changes = {"sliding_window": 245} if architecture == "mistral" else {}
    path, loaded, samples = captured(tmp_path, random_model(architecture, **changes), byte_tokenizer, compress_at)
    policies = [*expand_policies((), BUDGETS, real=True), *compensated()]
    config = InferConfig(task="niah", model="toy", n=2, length=240, seed=4, compress_at=compress_at, generate=False)
    run_infer(config, loaded, samples, policies, tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run/records.jsonl").read_text().splitlines()]
    real = {(r["sample"], r["policy"]): r for r in records}
    with open_capture(path) as capture:
        for sample in capture.samples:
            for policy, refined in zip(policies, refine_sample(loaded, sample, policies), strict=True):
                record = real[sample.id, str(policy)]
                assert refined.nll == pytest.approx(record["answer_nll"], abs=1e-4), str(policy)
                assert refined.margin == pytest.approx(record["answer_margin"], abs=1e-4), str(policy)
                assert refined.accuracy == pytest.approx(record["answer_accuracy"], abs=1e-6), str(policy)
