"""Predicted harm of representatives against a first-order computation with the model's real keys, values and gradients."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvtool import models
from kvtool.attention import AttentionCall, attention_handler
from kvtool.capture.reader import open_capture
from kvtool.capture.runner import CaptureConfig, run_capture
from kvtool.data.tasks import load_task
from kvtool.models import LoadedModel
from kvtool.policies import Policy, kept_positions
from kvtool.scoring import score_tokens
from kvtool.simulate.curves import curves, probe_table
from kvtool.simulate.evaluate import evaluate_sample, sample_table
from kvtool.simulate.refine import refine_sample
from kvtool.simulate.representatives import Stand, attention_floor, representative_sums
from kvtool.simulate.runner import SimulateConfig, run_simulate

POLICIES = [
    "snapkv:budget=40%,window=16,compensate=mean,block=16",
    "snapkv:budget=40%,window=16,compensate=mean,block=16,bias=none",
    "snapkv:budget=40%,window=16,compensate=mean,block=full",
    "adakv:budget=40%,window=16,compensate=weighted,block=16",
    "adakv:budget=40%,window=16,compensate=weighted,block=16,bias=count",
    "streaming:budget=40%,compensate=weighted,block=32,gate=GATE",
]


@dataclass(frozen=True, slots=True)
class Layer:
    """Float64 tensors of one layer of the whole pass; gradients of the answer's margins with respect to the outputs."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    scaling: float
    gradient: Tensor


def whole_pass(loaded: LoadedModel, sample: Any) -> list[Layer]:
    """One float64 forward over prompt and answer, and the gradient of the summed margins for every head's output."""
    model = copy.deepcopy(loaded.model).double()
    ids = sample.prompt_ids + sample.answer_ids
    calls: list[AttentionCall] = []
    outputs: list[Tensor] = []

    def handler(call: AttentionCall) -> Tensor:
        group = call.queries.shape[1] // call.keys.shape[1]
        keys, values = (x.repeat_interleave(group, 1) for x in (call.keys, call.values))
        n = call.queries.shape[2]
        logits = (call.queries @ keys.transpose(2, 3) * call.scaling).masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf)
        calls.append(call)
        outputs.append(logits.softmax(-1) @ values)
        return outputs[-1]

    with attention_handler(model, handler):
        logits = model(torch.tensor([ids[:-1]]), use_cache=False).logits[0]
    first = max(sample.seq_len, len(sample.prompt_ids) - 1)
    margins = score_tokens(logits[first:], torch.tensor(ids[first + 1 :])).margin
    gradients = torch.autograd.grad(margins.sum(), outputs)
    return [
        Layer(c.queries[0].detach(), c.keys[0].detach(), c.values[0].detach(), c.scaling, g[0])
        for c, g in zip(calls, gradients, strict=True)
    ]


def literal_change(layer: Layer, q: int, i: int, entries: tuple[Tensor, Tensor, Tensor], own: range) -> float:
    """First-order margin change of one head and token when the prompt is `entries` (keys, values, factors of the mass)."""
    h = q // (layer.queries.shape[0] // layer.keys.shape[0])
    query, keys, values = layer.queries[q, i], layer.keys[h], layer.values[h]

    def output(prompt_keys: Tensor, prompt_values: Tensor, factors: Tensor) -> Tensor:
        logits = torch.cat([prompt_keys, keys[own.start : own.stop]]) @ query * layer.scaling
        weights = logits.exp() * torch.cat([factors, torch.ones(len(own), dtype=torch.float64)])
        return weights @ torch.cat([prompt_values, values[own.start : own.stop]]) / weights.sum()

    full = output(keys[: own.start], values[: own.start], torch.ones(own.start, dtype=torch.float64))
    return float(layer.gradient[q, i] @ (output(*entries) - full))


def literal_harm(layers: list[Layer], sample: Any, policy: Policy) -> tuple[float, float]:
    """Harm and signed change, block by block and token by token."""
    views, c, seq_len = sample.views(), policy.compensation, sample.seq_len
    harm = change = 0.0
    for view, kept in zip(views, kept_positions(policy, views), strict=True):
        layer, gated = layers[view.layer], c.gated(view)
        group, n_all = view.n_heads // view.n_kv_heads, layers[0].queries.shape[1]
        observed = view.statistic("window_mean/32").double().view(view.n_kv_heads, group, -1).mean(1)
        for h, positions in enumerate(kept):
            entries = [(layer.keys[h, j], layer.values[h, j], 1.0) for j in positions.tolist()]
            gone = [j for j in range(seq_len) if j not in set(positions.tolist())]
            size = len(gone) if c.block == "full" else int(c.block)
            for block in [] if gated[h] else [gone[s : s + size] for s in range(0, len(gone), size)]:
                w = torch.full((len(block),), 1 / len(block), dtype=torch.float64)
                if c.compensate == "weighted":
                    w = observed[h, block] / observed[h, block].sum()
                factor = {"none": 1.0, "count": len(block), "entropy": float((-(w * w.log())).sum().exp())}[c.chosen_bias]
                entries.append((w @ layer.keys[h, block], w @ layer.values[h, block], factor))
            keys, values, factors = zip(*entries, strict=True)
            prompt = torch.stack(keys), torch.stack(values), torch.tensor(factors, dtype=torch.float64)
            for q in range(h * group, (h + 1) * group):
                for i in range(seq_len, n_all):
                    delta = literal_change(layer, q, i, prompt, range(seq_len, i + 1))
                    change += delta
                    harm -= min(0.0, delta)
    return harm, change


@pytest.mark.parametrize("compress_at", ["prompt", "context"])
def test_prediction_equals_first_order_with_real_keys(
    compress_at: Any, tmp_path: Path, random_model: Callable[..., Any], byte_tokenizer: Any
) -> None:
    model = random_model("llama")
    for layer in model.model.layers:  # logits that differ by a few, as a trained model's do
        layer.self_attn.q_proj.weight.data *= 0.25
    loaded = LoadedModel(model, byte_tokenizer, models.describe(model, "toy"))
    samples = load_task("niah", byte_tokenizer, 1, 170, seed=0)
    run_capture(
        CaptureConfig(task="niah", model="toy", n=1, length=170, compress_at=compress_at), loaded, samples, tmp_path / "c.h5"
    )
    with open_capture(tmp_path / "c.h5") as capture:
        sample = capture.samples[0]
        variances = [v for view in sample.views() for v in view.statistic("block_variance/32").view(2, -1).mean(1).tolist()]
        policies = [Policy.parse(text.replace("GATE", str(np.median(variances)))) for text in POLICIES]
        layers = whole_pass(loaded, sample)
        gates = [gated for view in sample.views() for gated in policies[-1].compensation.gated(view)]
        assert len(set(gates)) == 2, "the gate must let some heads pass and stop others"
        plain = evaluate_sample(sample, [Policy.parse(t.partition(",compensate")[0]) for t in POLICIES])
        for policy, found, without in zip(policies, evaluate_sample(sample, policies), plain, strict=True):
            harm, change = literal_harm(layers, sample, policy)
            # The capture holds attention and gain in float16: 11 bits each.
            assert found.harm == pytest.approx(harm, rel=2e-3), str(policy)
            assert found.margin_change == pytest.approx(change, rel=2e-2, abs=2e-3 * harm), str(policy)
            assert found.harm != pytest.approx(without.harm, rel=4e-3)
            assert found.entries == without.entries
            assert found.recall is not None
            assert without.recall is not None
            assert found.recall < without.recall + 1e-12


def test_merge_and_refit_are_predicted_as_their_kept_entries_with_a_note(llama_capture: tuple[Path, LoadedModel]) -> None:
    texts = ["snapkv:budget=50%", "snapkv:budget=50%,compensate=merge", "snapkv:budget=50%,compensate=refit"]
    with open_capture(llama_capture[0]) as capture:
        plain, *others = evaluate_sample(capture.samples[0], [Policy.parse(t) for t in texts])
    assert plain.note is None
    for found in others:
        assert (found.harm, found.entries, found.message) == (plain.harm, plain.entries, None)
        assert found.note is not None
        assert "kept entries alone" in found.note


def test_full_budget_has_no_representatives(llama_capture: tuple[Path, LoadedModel]) -> None:
    policies = [Policy.parse(f"snapkv:budget=100%,compensate={k}") for k in ("mean", "weighted,block=full")]
    with open_capture(llama_capture[0]) as capture:
        for found in evaluate_sample(capture.samples[0], policies):
            assert found.harm == pytest.approx(0, abs=1e-9)
            assert found.retention == 1


def test_underflow_is_floored_at_the_smallest_number_of_the_file_and_said(llama_capture: tuple[Path, LoadedModel]) -> None:
    attention = np.full((1, 1, 1, 8), 1e-3, dtype=np.float32)
    attention[0, 0, 0, 0] = 0.9
    attention[0, 0, 0, 4:6] = 0.0
    table = probe_table(attention, 0.5 * attention, np.zeros((1, 1, 1)), np.zeros((1, 1, 1)), 1)
    floor = attention_floor(attention[0])
    assert floor == 2.0 ** (-15 - 24)  # 0.9 is stored as 0.9 * 2**15, next to it float16 ends at 2**-24
    stand = Stand(2, "count", None, np.zeros((1, 1), bool), 8)
    order = np.arange(8)[None, None]
    sums = representative_sums(table, order, np.full((2, 1, 1), 2), {1: stand})
    assert not sums[0].any()
    blocks = [[2, 3], [4, 5], [6, 7]]
    want = sum(2 * math.exp(np.mean([math.log(max(float(attention[0, 0, 0, j]), floor)) for j in b])) for b in blocks)
    np.testing.assert_allclose(sums[1, 0, 0], [want, 0.5 * (want - 2 * floor)], rtol=1e-6)
    with open_capture(llama_capture[0]) as capture:
        sample = capture.samples[0]
        zeros = sample_table(sample).rows[..., : sample_table(sample).rows.shape[-1] // 2] == 0
        (found,) = evaluate_sample(sample, [Policy.parse(POLICIES[0])])
        assert (found.note is not None) == bool(zeros.any())


def test_what_is_added_counts_for_margins_and_not_for_recall() -> None:
    rng = np.random.default_rng(0)
    attention = rng.random((1, 2, 3, 9), dtype=np.float32)
    gain = rng.normal(size=attention.shape).astype(np.float32)
    table = probe_table(attention, gain, np.ones((1, 2, 3)), np.ones((1, 2, 3)), 1)
    order, counts = np.arange(9)[None, None], np.full((1, 1, 1), 4)
    plain = curves(table, order, counts)
    rest = table.rows[:, :, 4:].sum(axis=2)[None]
    whole = curves(table, order, counts, rest.astype(np.float64))
    assert whole.harm[0] == pytest.approx(0, abs=1e-6)
    assert plain.harm[0] > 1e-3
    assert whole.recall[0] == plain.recall[0]


def test_compensated_policies_run_through_ranking_and_refinement(
    tmp_path: Path, llama_capture: tuple[Path, LoadedModel]
) -> None:
    path, loaded = llama_capture
    texts = (
        "snapkv",
        "snapkv:compensate=mean",
        "snapkv:compensate=merge",
        "snapkv:compensate=refit",
        "streaming:compensate=slots",
    )
    config = SimulateConfig(str(path), texts, ("40%",), refine=5, draws=10)
    summary = run_simulate(config, tmp_path / "run", loaded)
    rows = {row.method: row for row in summary.rows}
    assert all(row.refined is not None and row.status == "ok" for row in rows.values())
    assert rows["snapkv:compensate=merge"].note
    assert rows["snapkv:compensate=mean"].entries == rows["snapkv"].entries > rows["streaming:compensate=slots"].entries
    with open_capture(path) as capture:
        policies = [Policy.parse(row.policy) for row in rows.values()]
        for sample in capture.samples[:1]:
            # One by one or all together: batches do not matter.
            together = refine_sample(loaded, sample, policies)
            for policy, found in zip(policies, together, strict=True):
                assert refine_sample(loaded, sample, [policy])[0].nll == pytest.approx(found.nll, abs=1e-5)
