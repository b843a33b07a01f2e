"""Quantized caches inside real models: logits against a float64 model that is told what the codes stand for, batches, runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvtool.attention import AttentionCall, attention_handler
from kvtool.data.tasks import Encoded
from kvtool.errors import ConfigError
from kvtool.files import read_records
from kvtool.infer.cache import CompressedCache
from kvtool.infer.chunks import prefill_in_chunks
from kvtool.infer.generate import prefill
from kvtool.infer.quantized import QuantizedStore
from kvtool.infer.ragged import RaggedStore
from kvtool.infer.runner import InferConfig, run_infer
from kvtool.models import LoadedModel
from kvtool.policies import Policy
from kvtool.policies.quant import LEAST

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-gqa": ("llama", {}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "qwen2-gqa": ("qwen2", {}),
    "opt-mha": ("opt", {}),
    "gpt_neox-mha": ("gpt_neox", {}),
}


def tokens(row: int, n: int) -> list[int]:
    return torch.randint(3, 250, (n,), generator=torch.Generator().manual_seed(200 + row)).tolist()


def through_codes(x: np.ndarray, axis: int, bits: int) -> np.ndarray:
    """Numbers of one group, quantized and back, in numpy."""
    top = 2**bits - 1
    low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
    centre = torch.from_numpy((low + high) / 2).bfloat16().double().numpy()
    scale = torch.from_numpy(np.maximum(high - centre, centre - low) * 2 / top).bfloat16().double().numpy()
    return centre + (np.clip(np.rint((x - centre) / scale + top / 2), 0, top) - top / 2) * scale  # type: ignore[no-any-return]


def stored(keys: torch.Tensor, values: torch.Tensor, n_coded: int, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What stands for the kept entries ``[n, D]`` of one head; a value's channels (16 or fewer) are one group."""
    k, v = keys.numpy().copy(), values.numpy().copy()
    for first in range(0, n_coded, group):
        part = slice(first, min(first + group, n_coded))
        k[part] = through_codes(k[part], 0, bits)
    v[:n_coded] = through_codes(v[:n_coded], 1, bits) if n_coded else v[:n_coded]
    return torch.from_numpy(k), torch.from_numpy(v)


def reference(model: Any, prompt: list[int], fed: list[int], kept: list[list[torch.Tensor]], policy: Policy) -> torch.Tensor:
    """Logits ``[N, V]`` of the fed tokens: float64, one pass over the whole sequence, one head after the other."""
    quant, n_prompt = policy.quant, len(prompt)

    def handler(call: AttentionCall) -> torch.Tensor:
        out = torch.empty_like(call.queries)
        group = call.queries.shape[1] // call.keys.shape[1]
        for q in range(call.queries.shape[1]):
            keys, values, mine = call.keys[0, q // group], call.values[0, q // group], kept[call.layer][q // group]
            held = keys[mine], values[mine]
            if quant.active:
                held = stored(*held, quant.coded(len(mine)), quant.bits, quant.quant_group)
            for i in range(len(prompt) + len(fed)):
                k, v = keys[: i + 1], values[: i + 1]
                if i >= n_prompt:
                    k, v = torch.cat([held[0], keys[n_prompt : i + 1]]), torch.cat([held[1], values[n_prompt : i + 1]])
                out[0, q, i] = torch.softmax(k @ call.queries[0, q, i] * call.scaling, 0) @ v
        return out

    double = copy.deepcopy(model).double()
    with torch.no_grad(), attention_handler(double, handler):
        return double(torch.tensor([prompt + fed]), use_cache=False).logits[0, n_prompt:]  # type: ignore[no-any-return]


def feed(model: Any, cache: CompressedCache, fed: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([[t]]), past_key_values=cache).logits[0] for t in fed])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ["snapkv:budget=60%,window=4", "uneven:budget=50%"])
def test_logits_are_those_of_the_entries_that_the_codes_stand_for(
    name: str, method: str, random_model: Callable[..., Any], uneven: Any
) -> None:
    architecture, changes = MODELS[name]
    model, prompt, fed = random_model(architecture, **changes), tokens(0, 60), tokens(1, 4)
    options = "quant=int8,quant_group=16,quant_residual=3"
    if method.startswith("uneven"):
        plain = Policy(uneven(), Policy.parse("window:budget=50%").budget)
        policy = Policy(plain.method, plain.budget, quant=Policy.parse(f"full:{options}").quant)
    else:
        plain, policy = Policy.parse(method), Policy.parse(f"{method},{options}")
    state = prefill(model, prompt, policy.needs(), 0)
    kept = state.choose(policy)
    found = feed(model, state.fork(policy, kept), fed).double()
    rows = [heads[0] for heads in kept]
    expected, exact = (reference(model, prompt, fed, rows, p) for p in (policy, plain))
    # Rounding in float32 and in float64 differs for few codes; what quantization changes is far more than that.
    assert float((found - expected).norm()) < 0.05 * float((exact - expected).norm())
    assert float((exact - expected).norm()) < 2e-2 * float(exact.norm())


def test_a_padded_batch_says_what_its_rows_say_alone(random_model: Callable[..., Any]) -> None:
    model, lengths, steps = random_model("llama"), [70, 41, 57], 40
    policy = Policy.parse("snapkv:budget=60%,window=4,quant=int8,quant_group=16")
    prompts, fed = [tokens(i, n) for i, n in enumerate(lengths)], torch.tensor([tokens(10 + i, steps) for i in range(3)])

    def run(rows: list[int]) -> tuple[torch.Tensor, CompressedCache]:
        longest = max(lengths[r] for r in rows)
        ids = torch.tensor([[0] * (longest - lengths[r]) + prompts[r] for r in rows])
        mask = torch.tensor([[0] * (longest - lengths[r]) + [1] * lengths[r] for r in rows])
        cache, logits = CompressedCache(policy, model), []
        with torch.no_grad():
            # Codes depend on the rotation of the keys: padding must not shift the positions.
            places = (mask.cumsum(1) - 1).clamp(min=0)
            model(input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=cache)
            for i in range(steps):
                mask = torch.cat([mask, torch.ones(len(rows), 1, dtype=torch.long)], dim=1)
                places = mask.sum(1, keepdim=True) - 1
                new = fed[rows, i : i + 1]
                out = model(input_ids=new, attention_mask=mask, position_ids=places, past_key_values=cache)
                logits.append(out.logits[:, 0])
        return torch.stack(logits, 1), cache

    together, cache = run([0, 1, 2])
    assert all(isinstance(store, QuantizedStore) and store.n_later >= 32 for store in cache.stores)
    for row in range(3):
        alone = run([row])[0][0]
        # Until the first group of new tokens is full (at least 8 steps on), a row's groups do not depend on the others.
        torch.testing.assert_close(together[row, :LEAST], alone[:LEAST], rtol=1e-3, atol=2e-3)
        assert float((together[row] - alone).norm()) < 2e-2 * float(alone.norm())


@pytest.mark.parametrize("text", ["full:quant=int8", "full:quant=int4,quant_group=16"])
def test_generate_takes_it_as_it_is(text: str, random_model: Callable[..., Any]) -> None:
    model, ids = random_model("llama"), torch.tensor([tokens(0, 50)])
    cache = CompressedCache(text, model)
    model.generate(ids, past_key_values=cache, max_new_tokens=80, min_new_tokens=80, do_sample=False, pad_token_id=0)
    assert cache.entries() == [[[50 + 79] * 2]] * 2
    assert cache.quantized is not None
    assert cache.quantized["share"] > 0.7
    assert cache.kernel_name == "dequant-chunks"


@pytest.mark.parametrize(
    "text",
    ["streaming:budget=40%,chunk=16", "snapkv:budget=60%,window=4,compensate=mean,block=4", "keynorm:budget=50%"],
)
def test_chunks_and_compensations_go_with_it(text: str, random_model: Callable[..., Any]) -> None:
    model, prompt, fed = random_model("llama"), tokens(0, 90), tokens(1, 30)

    def run(policy: str) -> tuple[torch.Tensor, CompressedCache]:
        cache = CompressedCache(policy, model)
        if cache.policy.when.chunk:
            prefill_in_chunks(model, prompt, cache)
        else:
            with torch.no_grad():
                model(input_ids=torch.tensor([prompt]), past_key_values=cache)
        return feed(model, cache, fed), cache

    (plain, before), (coded, after) = run(text), run(text + ",quant=int8,quant_group=16")
    assert before.entries() == after.entries()
    assert float((plain - coded).norm()) < 3e-2 * float(plain.norm())
    assert after.count_bytes().used < 0.5 * before.count_bytes().used
    assert any(isinstance(s, RaggedStore) and s.bias is not None for s in before.stores) == ("compensate" in text)
    assert any(isinstance(s, QuantizedStore) and s.has_bias for s in after.stores) == ("compensate" in text)


def test_sliding_layers_are_left_alone_and_a_model_of_nothing_else_is_refused(random_model: Callable[..., Any]) -> None:
    from kvtool.infer.measure import plan

    model = random_model("mistral", sliding_window=64)
    state = prefill(model, tokens(0, 50), (), 0)
    policy = Policy.parse("full:quant=int8")
    cache = state.fork(policy, state.choose(policy))
    assert cache.quantized == {"layers": 0, "left_alone": 2, "share": 0.0}
    with pytest.raises(ConfigError, match="every layer has a sliding window, and those are not quantized"):
        plan(policy, state)


TEXTS = [
    "full:quant=int8",
    "full:quant=int4,quant_residual=16",
    "snapkv:budget=30%,window=4,quant=int8,quant_group=16",
    "adakv:budget=30%,window=4,quant=int4,quant_group=16",
    "window:budget=50%,chunk=16,quant=int4",
]


def test_records_count_scales_and_meet_the_plan(
    loaded_model: LoadedModel, encoded: Callable[..., Encoded], tmp_path: Path
) -> None:
    policies = [Policy.parse(text) for text in TEXTS]
    samples = [encoded(i, gold=i > 0) for i in range(2)]
    run_infer(InferConfig("test", "random", 2, answer_tokens=4), loaded_model, samples, policies, tmp_path)
    records = read_records(tmp_path / "records.jsonl")
    assert [r["status"] for r in records] == ["ok"] * (2 * (1 + len(TEXTS)))
    for record in records:
        policy = Policy.parse(record["policy"])
        held = record["kv_bytes_prompt_end"] - record["slack_bytes"]
        assert held == record["kv_bytes_planned"]
        assert {name: record[name] for name in ("quant", "quant_group", "quant_residual")} == {
            "quant": policy.quant.quant,
            "quant_group": policy.quant.quant_group,
            "quant_residual": policy.quant.quant_residual,
        }
        if policy.quant.active:
            assert record["quantized"]["layers"] == 2
            assert 0 < record["quantized"]["share"] <= 1
            assert record["kernel"] == "dequant-chunks"
            # float32: int8 needs a quarter and the scales.
            most = 0.47 if policy.quant.quant == "int8" else 0.6 if policy.quant.quant_residual else 0.35
            assert held < most * record["retention"] * record["kv_bytes_full"]
        else:
            assert record["quantized"] is None
    # Without a gold answer the full cache's own one counts, not the one of a quantized full cache.
    first = {r["policy"]: r for r in records if r["sample"] == "s0"}
    assert first["full:quant=int4,quant_residual=16"]["meta"]["answer_source"] == "full-cache"
    assert len({tuple(r["prediction_ids"]) for r in first.values()}) > 1
    assert first["full"]["score"] == 1.0
