"""Runs of policies that evict while decoding or between chunks: records, bytes, answer scores, refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvtool.data.tasks import Encoded, sample_seed
from kvtool.errors import ConfigError
from kvtool.files import read_records
from kvtool.infer.cache import CompressedCache
from kvtool.infer.generate import prefill
from kvtool.infer.runner import InferConfig, run_infer
from kvtool.models import LoadedModel
from kvtool.policies import Policy

CONFIG = InferConfig(task="test", model="random", n=2, answer_tokens=4, max_new_tokens=24)
TEXTS = [
    "h2o:budget=20,window=4,decode=evict",
    "h2o:budget=20,window=4,decode=evict,interval=5",
    "streaming:budget=30%,sink=2,decode=evict,positions=cache",
    "snapkv:budget=20,window=4,chunk=16",
    "adakv:budget=20,window=4,decode=evict,chunk=16",
]


@pytest.mark.parametrize("mode", ["prompt", "context"])
def test_records_hold_what_was_in_force_and_bytes_stay_within_the_capacity(
    mode: Any, tmp_path: Path, loaded_model: LoadedModel, encoded: Callable[..., Encoded]
) -> None:
    samples, policies = [encoded(i) for i in range(2)], [Policy.parse(text) for text in TEXTS]
    run_infer(replace(CONFIG, compress_at=mode), loaded_model, samples, policies, tmp_path)
    records = read_records(tmp_path / "records.jsonl")
    assert len(records) == 12
    for record in records:
        policy, sample = Policy.parse(record["policy"]), samples[int(record["sample"].removeprefix("s"))]
        assert record["status"] == "ok"
        when = policy.when
        assert (record["decode"], record["interval"]) == (when.decode, when.interval)
        assert (record["positions"], record["chunk"]) == (when.positions, when.chunk)
        assert record["shared_prefill"] == (when.chunk == 0)
        assert record["n_generated"] == 24
        if when.decode == "evict":
            # One free entry per row (layers x heads x K and V x dim x bytes), and what ranking carries.
            planned = record["kv_bytes_planned"]
            assert record["kv_bytes_generation_end"] <= 1.6 * planned
            assert record["kv_bytes_generation_end"] <= record["kv_bytes_prompt_end"] + 2 * 2 * 2 * 16 * 4
        prompt = sample.context_ids if mode == "context" else sample.prompt_ids
        question = sample.question_ids if mode == "context" else []
        cache = CompressedCache(policy, loaded_model.model, seeds=sample_seed(sample.sample.id))
        assert record["prediction_ids"] == greedy(loaded_model.model, cache, prompt, question)


def greedy(model: Any, cache: CompressedCache, prompt: list[int], question: list[int]) -> list[int]:
    ids: list[int] = []
    with torch.no_grad():
        logits = model(torch.tensor([prompt]), past_key_values=cache, use_cache=True).logits[0, -1]
        if question:
            logits = model(torch.tensor([question]), past_key_values=cache, use_cache=True).logits[0, -1]
        while len(ids) < 24:
            ids.append(int(logits.argmax()))
            logits = model(torch.tensor([ids[-1:]]), past_key_values=cache, use_cache=True).logits[0, -1]
    return ids


def test_policies_that_cannot_run_are_refused_before_the_run(
    tmp_path: Path, loaded_model: LoadedModel, encoded: Callable[..., Encoded]
) -> None:
    for text, why in (
        ("expected:budget=20,decode=evict", "whole prompts only"),
        ("pyramidkv:budget=20,window=4,chunk=8", "one layer only"),
    ):
        with pytest.raises(ConfigError, match=why):
            run_infer(CONFIG, loaded_model, [encoded(0)], [Policy.parse(text)], tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("rule", ["official", "exact"])
def test_the_cascade_lets_go_of_entries_while_the_prompt_runs(rule: str, random_model: Callable[..., Any]) -> None:
    model = random_model("llama", num_hidden_layers=6)
    prompts = [list(range(5, 125)), list(range(40, 112))]
    ids = torch.tensor([prompts[0], [0] * 48 + prompts[1]])
    mask = (torch.arange(120) >= torch.tensor([[0], [48]])).long()
    policy = f"cake:budget=24,window=6,rule={rule},cascade=true"
    cache, peak = CompressedCache(policy, model, keep_positions=True), [0]

    def count(*_: Any) -> None:
        held = [layer.prompt.keys.shape[2] for layer in cache.layers if layer.prompt is not None]
        peak.append(sum(held))

    for layer in model.model.layers:
        layer.mlp.register_forward_hook(count)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
    # Entries per head and sequence, all layers: without the cascade 6 x 120. Stages may lose, but never exceed the total.
    assert max(peak) <= 6 * 24 * 2
    assert max(peak[1:6]) > 0
    for row, prompt in enumerate(prompts):
        state = prefill(model, prompt, Policy.parse(policy).needs(), 0)
        expected = state.choose(Policy.parse(policy))
        for layer in range(6):
            for a, b in zip(cache.kept[layer][row], expected[layer][0], strict=True):
                assert a.tolist() == b.tolist(), layer
        fork = state.fork(Policy.parse(policy), expected)
        own = CompressedCache(policy, model)
        with torch.no_grad():
            model(torch.tensor([prompt]), past_key_values=own, use_cache=True)
            found = [model(torch.tensor([[7]]), past_key_values=c, use_cache=True).logits for c in (own, fork)]
        assert torch.equal(*found)


def test_chunks_run_where_the_whole_prompt_does_not_fit_into_memory(
    tmp_path: Path, loaded_model: LoadedModel, encoded: Callable[..., Encoded]
) -> None:
    """Every forward of more than 20 tokens ends as one that the memory is too small for."""

    def limit(module: Any, args: Any, options: dict[str, Any]) -> None:
        ids = options["input_ids"] if "input_ids" in options else args[0]
        if ids.shape[1] > 20:
            raise MemoryError("20 tokens at most")

    policies = [Policy.parse(text) for text in TEXTS]
    run_infer(CONFIG, loaded_model, [encoded(0)], policies, tmp_path / "all")
    hook = loaded_model.model.register_forward_pre_hook(limit, with_kwargs=True)
    try:
        run_infer(CONFIG, loaded_model, [encoded(0)], policies, tmp_path / "small")
    finally:
        hook.remove()
    expected = {record["policy"]: record for record in read_records(tmp_path / "all" / "records.jsonl")}
    for record in read_records(tmp_path / "small" / "records.jsonl"):
        if not Policy.parse(record["policy"]).when.chunk:
            assert (record["status"], record["message"]) == ("oom", "20 tokens at most")
            continue
        for key in ("status", "prediction_ids", "entries", "kv_bytes_planned", "kv_bytes_generation_end", "answer_nll"):
            assert record[key] == expected[record["policy"]][key], key
