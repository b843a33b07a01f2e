"""A capture equals whole attention matrices in float64 and autograd, on five architectures."""

from __future__ import annotations

import math

import capture_toy as toy
import numpy as np
import pytest
import torch

from kvtool.capture.features import DISTANCE_EDGES, LOCAL, SINK, feature_rows
from kvtool.capture.probe_pass import probe_tokens, run_probes
from kvtool.capture.prompt_pass import run_prompt
from kvtool.capture.reader import open_capture
from kvtool.capture.runner import CaptureConfig, run_capture
from kvtool.policies.statistics import default_statistics


def _window(kind):
    return toy.WINDOW if kind == "mistral" else None


def _literal_statistic(name, layer, found, n, model):
    """Statistic `name` of the first `n` tokens, from whole matrices."""
    kind, _, number = name.partition("/")
    attention, keys, values = (x[layer][:, :n] for x in (found.attention, found.keys, found.values))
    attention = attention[:, :, :n]
    number = n if number == "full" else int(number.rpartition("+")[2] or 1)
    rows = attention[:, -number:]
    unit = keys / keys.norm(dim=-1, keepdim=True)
    mean = unit.mean(dim=1, keepdim=True)
    past = rows[:, :, : max(0, n - number)]
    return {
        "accumulated": lambda: attention.sum(1),
        "window_mean": lambda: rows.mean(1),
        "window_var": lambda: ((rows - rows.mean(1, keepdim=True)) ** 2).mean(1),
        "window_max": lambda: rows.max(1).values,
        "window_entropy": lambda: -torch.xlogy(past, past).sum(-1).mean(1, keepdim=True),
        "block_variance": lambda: _literal_block_variance(found.queries[layer][:, :n], keys, number, found.scaling),
        "last": lambda: attention[:, -1],
        "key_norm": lambda: keys.pow(2).sum(-1).sqrt(),
        "value_norm": lambda: values.pow(2).sum(-1).sqrt(),
        "value_norm1": lambda: values.abs().sum(-1),
        "key_similarity": lambda: (keys * mean).sum(-1) / (keys.norm(dim=-1) * mean.norm(dim=-1)),
        "expected_logit": lambda: _literal_expected(found, layer, n, model, number)[0],
        "expected_spread": lambda: _literal_expected(found, layer, n, model, number)[1],
        "output_norm": lambda: _literal_output_norm(values, layer, model),
    }[kind]()


def _literal_block_variance(queries, keys, block, scaling):
    """Median over blocks of the variance over a block's positions of the logits, mean over the last 32 queries."""
    n_past = keys.shape[1] - 32
    logits = queries[:, -32:] @ keys.repeat_interleave(len(queries) // len(keys), 0).transpose(1, 2) * scaling
    size = min(block, n_past)
    blocks = [logits[:, :, i : i + size].var(dim=2, correction=0).mean(1) for i in range(0, n_past - size + 1, size)]
    return torch.stack(blocks, 1).quantile(0.5, dim=1, keepdim=True)


def _literal_expected(found, layer, n, model, n_future):
    """Mean and half the variance of the logits, from one rotation matrix per position of the model's own rotary embedding."""
    queries, keys = found.queries[layer][:, :n], found.keys[layer][:, :n]
    turn = toy.rotations(model, n + n_future)
    plain = torch.stack([queries[:, i] @ turn[i] for i in range(4, n)], dim=1)
    average = turn[n:].mean(0)
    mean = plain.mean(1) @ average.T
    keys = keys.repeat_interleave(len(queries) // len(keys), 0)
    spread = []
    for head in range(len(queries)):
        covariance = torch.from_numpy(np.cov(plain[head].T.numpy(), bias=True))
        covariance = average @ covariance @ average.T
        spread.append(torch.stack([k @ covariance @ k for k in keys[head]]) * found.scaling**2 / 2)
    return (keys * mean[:, None]).sum(-1) * found.scaling, torch.stack(spread)


def _literal_output_norm(values, layer, model):
    """What one value adds to the residual stream, through the model's own projection."""
    module = [m for m in model.modules() if getattr(m, "layer_idx", None) == layer and hasattr(m, "layer_idx")]
    attention = next(m for m in module if any(hasattr(m, name) for name in ("o_proj", "out_proj", "dense")))
    projection = next(getattr(attention, name) for name in ("o_proj", "out_proj", "dense") if hasattr(attention, name))
    n_heads, (n_kv, n, dim) = 4, values.shape
    group, norms = n_heads // n_kv, torch.zeros(n_kv, n, dtype=torch.float64)
    for head in range(n_heads):
        whole = torch.zeros(n, n_heads * dim)
        whole[:, head * dim : (head + 1) * dim] = values[head // group].float()
        added = projection(whole) - (0 if projection.bias is None else projection.bias)
        norms[head // group] += added.abs().sum(-1).double() / group
    return norms.detach()


@pytest.mark.parametrize("compress_at", ["prompt", "context"])
@pytest.mark.parametrize("kind", toy.ARCHITECTURES)
def test_capture_equals_whole_matrices(kind, compress_at, tmp_path):
    loaded = toy.build_loaded(kind)
    (sample,) = toy.make_samples(1)
    config = CaptureConfig("toy", kind, 1, compress_at=compress_at, windows=(1, 8, 90), feature_rows=11)
    run_capture(config, loaded, [sample], tmp_path / "c.h5")
    ids = sample.prompt_ids + sample.answer_ids
    n_prompt, seq_len = len(sample.prompt_ids), len(sample.prompt_ids if compress_at == "prompt" else sample.context_ids)
    first = n_prompt + (compress_at == "prompt")
    found = toy.full_pass(loaded.model, ids[:-1], _window(kind))
    margins = toy.objective(found, ids, first)
    margins.sum().backward()

    with open_capture(tmp_path / "c.h5") as capture:
        (stored,) = capture.samples
        assert (stored.seq_len, stored.n_prompt, stored.compress_at) == (seq_len, n_prompt, compress_at)
        assert stored.compressible == ((kind != "mistral",) * 2)
        for name in config.names():
            for layer in range(2):
                expected = _literal_statistic(name, layer, found, seq_len, loaded.model)
                near = 1e-4 * float(expected.abs().max()) if name.startswith("expected") else 2e-5
                np.testing.assert_allclose(stored.selection(name, layer), expected, rtol=3e-4, atol=near, err_msg=name)
        probes = stored.probes()
        np.testing.assert_allclose(stored.selection("future", 1), probes.attention[1].sum(1), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(probes.margins, margins.detach(), rtol=1e-4, atol=1e-4)
        assert (probes.rows + seq_len == np.arange(first, len(ids)) - 1).all()
        for layer in range(2):
            attention = found.attention[layer][:, seq_len:]
            gain = found.factors[layer].grad[:, seq_len:]
            own = [attention[..., seq_len:].sum(-1), gain[..., seq_len:].sum(-1)]
            spread = float(gain.abs().max())
            np.testing.assert_allclose(probes.attention[layer], attention[..., :seq_len], rtol=2e-3, atol=1e-6)
            np.testing.assert_allclose(probes.gain[layer], gain[..., :seq_len], rtol=2e-3, atol=2e-5 * spread)
            np.testing.assert_allclose(probes.attention_own[layer], own[0], rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(probes.gain_own[layer], own[1], rtol=1e-3, atol=2e-5 * spread)


@pytest.mark.parametrize("kind", toy.ARCHITECTURES)
def test_probe_pass_in_float64_equals_autograd_closely(kind):
    """In float64 nothing but the formula is left: 1e-6 of the largest gain (the record itself is float32)."""
    model = toy.exact_norms(toy.build_model(kind).double())
    (sample,) = toy.make_samples(1, n_context=70)
    seq_len, ids = len(sample.context_ids), sample.prompt_ids + sample.answer_ids
    prompt = run_prompt(model, sample.context_ids, ["last"], 4)
    record = run_probes(model, prompt.keys, prompt.values, probe_tokens(sample.question_ids, sample.answer_ids))
    found = toy.full_pass(model, ids[:-1], _window(kind))
    margins = toy.objective(found, ids, len(sample.prompt_ids))
    margins.sum().backward()
    np.testing.assert_allclose(record.margins, margins.detach(), rtol=1e-6, atol=1e-6)
    nll = torch.nn.functional.cross_entropy(
        found.logits[-len(sample.answer_ids) :], torch.tensor(sample.answer_ids), reduction="none"
    )
    np.testing.assert_allclose(record.nll, nll.detach(), rtol=1e-6, atol=1e-6)
    for layer in range(2):
        gain = found.factors[layer].grad[:, seq_len:]
        spread = float(gain.abs().max())
        assert spread > 1e-3
        np.testing.assert_allclose(record.gain[layer], gain[..., :seq_len], rtol=1e-6, atol=1e-6 * spread)
        np.testing.assert_allclose(record.attention[layer], found.attention[layer][:, seq_len:, :seq_len], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_features_equal_a_loop_over_entries(kind):
    loaded = toy.build_loaded(kind)
    (sample,) = toy.make_samples(1, n_context=90)
    ids, window = sample.context_ids, _window(kind)
    record = run_prompt(loaded.model, ids, ["last"], 7)
    found = toy.full_pass(loaded.model, ids, window)
    rows = feature_rows(len(ids), 7)
    assert len(rows) == 7
    assert rows[-1] == 89
    for layer, features in enumerate(record.features):
        sink, entropy, profile = np.zeros(4), np.zeros(4), np.zeros((4, len(DISTANCE_EDGES)))
        for head in range(4):
            for row in rows:
                attention = found.attention[layer][head, row].tolist()
                visible = min(row + 1, window or row + 1)
                for column, a in enumerate(attention[: row + 1]):
                    sink[head] += a * (column < SINK)
                    entropy[head] -= a * math.log(a) / math.log(visible) if a > 0 else 0
                    profile[head, max(k for k, edge in enumerate(DISTANCE_EDGES) if edge <= row - column)] += a
        np.testing.assert_allclose(features.sink_mass, sink / 7, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(features.entropy, entropy / 7, rtol=1e-4)
        np.testing.assert_allclose(features.distance_profile, profile / 7, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(features.distance_profile.sum(-1), 1, rtol=1e-5)


def _literal_parts(attention, rows, window):
    """Masses and far entropy of one head from its attention rows, entry by entry."""
    masses, entropy, weight, n_whole = np.zeros(3), 0.0, 0.0, 0
    for row in rows:
        if row < SINK + LOCAL:
            continue
        n_whole += 1
        far = []
        for column in range(row + 1):
            a = float(attention[row, column])
            part = 0 if column < SINK else 2 if row - column < LOCAL else 1
            masses[part] += a
            if part == 1 and (window is None or row - column < window):
                far.append(a)
        if len(far) >= 2:
            mass = sum(far)
            entropy += mass * -sum(a / mass * math.log(a / mass) for a in far if a > 0) / math.log(len(far))
            weight += mass
    return masses / n_whole, entropy / weight if weight else math.nan


def _literal_offset_variance(attention, rows, window):
    """Adjusted share of variance between distances, from a list of all pairs behind the sink."""
    pairs = [
        (row - column, float(attention[row, column]))
        for row in rows
        for column in range(SINK, row + 1)
        if window is None or row - column < window
    ]
    values = np.asarray([a for _, a in pairs])
    groups = [np.asarray([a for o, a in pairs if o == offset]) for offset in {o for o, _ in pairs}]
    within = sum(((g - g.mean()) ** 2).sum() for g in groups)
    total = ((values - values.mean()) ** 2).sum()
    return 1 - (within / (len(values) - len(groups))) / (total / (len(values) - 1))


@pytest.mark.parametrize("kind", ["llama", "mistral", "opt"])
def test_parts_offsets_and_outputs_equal_loops(kind):
    loaded = toy.build_loaded(kind)
    (sample,) = toy.make_samples(1, n_context=110)
    ids, window = sample.context_ids, _window(kind)
    record = run_prompt(loaded.model, ids, ["last"], 19)
    found = toy.full_pass(loaded.model, ids, window)
    rows = feature_rows(len(ids), 19)
    modules = [
        m for m in loaded.model.modules() if hasattr(m, "layer_idx") and (hasattr(m, "o_proj") or hasattr(m, "out_proj"))
    ]
    for layer, features in enumerate(record.features):
        weight = (getattr(modules[layer], "o_proj", None) or modules[layer].out_proj).weight.double()
        values = found.values[layer].repeat_interleave(4 // len(found.values[layer]), 0)
        for head in range(4):
            attention = found.attention[layer][head]
            masses, entropy = _literal_parts(attention, rows, window)
            np.testing.assert_allclose(features.masses[head], masses, rtol=1e-4, atol=2e-6)
            np.testing.assert_allclose(features.far_entropy[head], entropy, rtol=1e-4, atol=1e-5)
            share = _literal_offset_variance(attention, rows, window)
            np.testing.assert_allclose(features.offset_variance[head], share, rtol=1e-4, atol=1e-5)
            outputs = attention[rows] @ values[head]
            added = outputs @ weight[:, head * 8 : head * 8 + 8].T
            np.testing.assert_allclose(features.head_output[head], added.norm(dim=-1).mean().item(), rtol=1e-4)


def test_short_prompts_say_that_they_cannot_tell():
    loaded = toy.build_loaded("llama")
    record = run_prompt(loaded.model, list(range(1, 1 + SINK + LOCAL)), ["last"], 256)
    for features in record.features:
        assert features.masses.isnan().all()
        assert features.far_entropy.isnan().all()
        assert features.offset_variance.isfinite().all()
    assert run_prompt(loaded.model, [1], ["last"], 256).features[0].offset_variance.isnan().all()


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_prompts_longer_than_one_block(kind):
    """600 tokens: several query blocks, and the blocked sliding window."""
    model = toy.build_model(kind)
    (sample,) = toy.make_samples(1, n_context=600)
    record = run_prompt(model, sample.context_ids, default_statistics((32,)), 64)
    found = toy.full_pass(model, sample.context_ids, _window(kind))
    for layer in range(2):
        for name, value in record.selection[layer].items():
            expected = _literal_statistic(name, layer, found, 600, model)
            near = 1e-4 * float(expected.abs().max()) if name.startswith("expected") else 2e-5
            np.testing.assert_allclose(value, expected, rtol=5e-4, atol=near, err_msg=f"{name} of layer {layer}")
        np.testing.assert_allclose(record.keys[layer], found.keys[layer], rtol=1e-3, atol=1e-4)


def test_frozen_parameters_give_the_same_probes():
    model = toy.build_model("llama")
    (sample,) = toy.make_samples(1)
    prompt = run_prompt(model, sample.context_ids, ["last"], 4)
    tokens = probe_tokens(sample.question_ids, sample.answer_ids)
    free = run_probes(model, prompt.keys, prompt.values, tokens)
    frozen = run_probes(model.requires_grad_(False), prompt.keys, prompt.values, tokens)
    for a, b in zip(free.gain, frozen.gain, strict=True):
        assert torch.equal(a, b)
    assert all(p.grad is None for p in model.parameters())
