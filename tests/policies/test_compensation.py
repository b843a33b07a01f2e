"""What stands for evicted entries: options, slot arithmetic, and the mathematics against loops and exact cases in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvtool.errors import ConfigError
from kvtool.policies import Policy, kept_positions, policy_from_dict, policy_to_dict
from kvtool.policies.compensation import Compensation
from kvtool.policies.leftovers import LayerTensors, compensate_layer
from kvtool.policies.merging import cam_probability, cam_spread, d2o_taken, merge_nearest, merged_bias, nearest_kept
from kvtool.policies.refit import observed_attention, refit_values
from kvtool.policies.representatives import evicted_positions, represent
from kvtool.policies.select import TensorView
from kvtool.policies.statistics import AttentionInputs

D = 8


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    logits = q @ k.T * D**-0.5
    return torch.softmax(logits if bias is None else logits + bias, dim=-1) @ v


def with_representatives(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, block: int | None, weights: Any, bias: Any) -> Tensor:
    found = represent(k, v, evicted_positions(kept, len(k)), block, weights, bias)
    added = torch.cat([torch.zeros(len(found.keys)) if found.bias is None else found.bias, torch.zeros(len(kept))])
    return attend(q, torch.cat([found.keys, k[kept]]), torch.cat([found.values, v[kept]]), added)


@st.composite
def kept_sets(draw_: Any) -> tuple[int, Tensor, int | None, int]:
    seq_len = draw_(st.integers(2, 60))
    kept = draw_(st.sets(st.integers(0, seq_len - 1), min_size=1, max_size=seq_len - 1))
    return seq_len, torch.tensor(sorted(kept)), draw_(st.sampled_from([None, 1, 2, 3, 7, 100])), draw_(st.integers(0, 99))


# ---- options


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("compensate=average", "choose one of none, slots, mean"),
        ("compensate=mean,block=0", "from 1 on, or 'full'"),
        ("block=32", "add compensate="),
        ("compensate=refit,block=32", "says nothing about compensate=refit"),
        ("compensate=slots,bias=count", "says nothing about compensate=slots"),
        ("compensate=mean,merge=d2o", "says nothing about compensate=mean"),
        ("compensate=merge,ridge=0.1", "says nothing about compensate=merge"),
        ("compensate=refit,ridge=0", "above 0"),
        ("compensate=mean,gate=-1", "from 0 on"),
        ("compensate=mean,gate=nan", "from 0 on"),
        ("compensate=merge,merge=cam,bias=count", "does not fit merge=cam"),
        ("compensate=mean,positions=cache", "leave one of both out"),
        ("compensate=mean,decode=evict", "leave one of both out"),
        ("compensate=mean,chunk=64", "leave one of both out"),
    ],
)
def test_options_that_make_no_sense_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Policy.parse(f"snapkv:budget=10%,{text}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "snapkv:budget=10%,compensate=mean,block=32,gate=0.5",
        "snapkv:budget=10%,compensate=weighted,block=full,bias=count",
        "streaming:budget=10%,compensate=merge,merge=d2o",
        "h2o:budget=10%,compensate=refit,ridge=0.1",
    ],
)
def test_text_and_dict_forms_round_trip(text: str) -> None:
    policy = Policy.parse(text)
    assert policy_from_dict(policy_to_dict(policy)) == policy
    assert Policy.parse(str(policy)) == policy


def test_the_right_bias_is_the_default() -> None:
    kinds = {"mean": "count", "weighted": "entropy", "merge": "none"}
    assert {k: Compensation(k).chosen_bias for k in kinds} == kinds  # type: ignore[arg-type]


@given(
    seq_len=st.integers(1, 300),
    entries=st.integers(1, 300),
    block=st.sampled_from(["1", "2", "7", "64", "full"]),
    kind=st.sampled_from(["mean", "weighted", "slots", "merge", "refit", "none"]),
)
def test_slots_are_counted_exactly(seq_len: int, entries: int, block: str, kind: Any) -> None:
    compensation = Compensation(kind, block if kind in ("mean", "weighted", "slots") else "64")
    entries = min(entries, seq_len)
    if entries < compensation.minimum(0, seq_len):
        return
    kept = compensation.kept(entries, seq_len)
    assert kept + compensation.slots(kept, seq_len) == entries
    assert kept == seq_len or kept + 1 + compensation.slots(kept + 1, seq_len) > entries
    if kind in ("merge", "refit", "none"):
        assert kept == entries


# ---- representatives


@settings(deadline=None)
@given(kept_sets(), st.booleans())
def test_with_identical_keys_in_each_block_the_mean_with_log_n_is_exact(
    case: tuple[int, Tensor, int | None, int], large: bool
) -> None:
    seq_len, kept, block, seed = case
    q, k, v = draw(3, D, seed=seed) * (30 if large else 1), draw(seq_len, D, seed=seed + 1), draw(seq_len, D, seed=seed + 2)
    evicted = evicted_positions(kept, seq_len)
    size = block or len(evicted)
    for start in range(0, len(evicted), size):
        k[evicted[start : start + size]] = k[evicted[start]].clone()
    found = with_representatives(q, k, v, kept, block, None, "count")
    torch.testing.assert_close(found, attend(q, k, v), rtol=1e-9, atol=1e-9)
    # Any weights are right where all keys of a block are equal, as far as mass goes; equal values make it exact.
    v[:] = v[0].clone()
    weights = draw(seq_len, seed=seed + 3).abs()
    found = with_representatives(q, k, v, kept, block, weights, "count")
    torch.testing.assert_close(found, attend(q, k, v), rtol=1e-9, atol=1e-9)


@settings(deadline=None)
@given(kept_sets())
def test_attention_weights_with_their_entropy_are_exact_at_the_reference_query(
    case: tuple[int, Tensor, int | None, int],
) -> None:
    seq_len, kept, block, seed = case
    q, k, v = 3 * draw(2, D, seed=seed), draw(seq_len, D, seed=seed + 1), draw(seq_len, D, seed=seed + 2)
    attention = torch.softmax(q @ k.T * D**-0.5, dim=-1)
    found = with_representatives(q, k, v, kept, block, attention[0], "entropy")
    torch.testing.assert_close(found[0], attend(q, k, v)[0], rtol=1e-9, atol=1e-9)


@settings(deadline=None)
@given(kept_sets())
def test_the_default_biases_never_give_a_block_too_much_mass(case: tuple[int, Tensor, int | None, int]) -> None:
    seq_len, kept, block, seed = case
    q, k, v = 5 * draw(4, D, seed=seed), draw(seq_len, D, seed=seed + 1), draw(seq_len, D, seed=seed + 2)
    evicted = evicted_positions(kept, seq_len)
    size = block or len(evicted)
    for weights, bias in ((None, "count"), (draw(seq_len, seed=seed + 3).abs(), "entropy")):
        found = represent(k, v, evicted, block, weights, bias)
        assert found.bias is not None
        for m in range(len(found.keys)):
            inside = evicted[m * size : (m + 1) * size]
            mass = torch.logsumexp(q @ k[inside].T * D**-0.5, dim=-1)
            assert (q @ found.keys[m] * D**-0.5 + found.bias[m] <= mass + 1e-9).all()
            assert int(found.positions[m]) == int(inside[-1])


def test_weights_are_normalised_within_blocks_and_blocks_without_any_get_equal_ones() -> None:
    k, v = draw(10, D), draw(10, D, seed=1)
    weights = torch.tensor([9.0, 0, 0, 0, 1e-300, 3e-300, 5, 2, 2, 9], dtype=torch.float64)
    evicted = torch.arange(1, 9)  # blocks [1 2 3], [4 5 6], [7 8]
    found = represent(k, v, evicted, 3, weights, "entropy")
    assert found.n_equal == 1
    torch.testing.assert_close(found.keys[0], k[1:4].mean(0))
    torch.testing.assert_close(found.keys[1], k[6])
    torch.testing.assert_close(found.values[2], v[7:9].mean(0))
    assert found.bias is not None
    torch.testing.assert_close(found.bias, torch.tensor([math.log(3), 0, math.log(2)], dtype=torch.float64))
    tiny = represent(k, v, torch.arange(4, 6), None, weights, "entropy")
    torch.testing.assert_close(tiny.keys[0], 0.25 * k[4] + 0.75 * k[5])


def test_representatives_of_half_precision_are_averaged_in_float32() -> None:
    k = torch.full((4096, 4), 3.14, dtype=torch.bfloat16)
    found = represent(k, k, torch.arange(4096), None, None, "count")
    assert found.keys.dtype == torch.bfloat16
    assert torch.equal(found.keys[0], k[0])


# ---- merging


def literal_merge(k: np.ndarray, v: np.ndarray, kept: list[int], rule: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loops over evicted entries; D2O's joint decision is left to its own test."""
    new_k, new_v, count = k[kept].copy(), v[kept].copy(), np.zeros(len(kept))
    parts: list[list[tuple[float, int]]] = [[] for _ in kept]
    for j in sorted(set(range(len(k))) - set(kept)):
        cosines = [k[j] @ k[s] / (np.linalg.norm(k[j]) * np.linalg.norm(k[s])) for s in kept]
        target = int(np.argmax(cosines))
        parts[target].append((cosines[target], j))
    for t, s in enumerate(kept):
        count[t] = len(parts[t])
        if rule == "pivot":
            for new, x in ((new_k, k), (new_v, v)):
                new[t] = np.mean([x[s], *((x[j] + x[s]) / 2 for _, j in parts[t])], axis=0)
            continue
        weights = {
            "weighted": [(1 + c) / 2 for c, _ in parts[t]],
            "values": [max(c, 0) * np.linalg.norm(v[j]) / (np.linalg.norm(v[j]) + np.linalg.norm(v[s])) for c, j in parts[t]],
            "d2o": [c for c, _ in parts[t]],
        }[rule]
        divisor = 1 + (len(parts[t]) if rule == "d2o" else sum(weights))
        for new, x in ((new_k, k), (new_v, v)):
            if rule == "values" and x is k:
                continue
            new[t] = (x[s] + sum(w * x[j] for w, (_, j) in zip(weights, parts[t], strict=True))) / divisor
    return new_k, new_v, count


@settings(deadline=None, max_examples=40)
@given(kept_sets(), st.sampled_from(["pivot", "weighted", "values", "d2o"]))
def test_merging_equals_loops(case: tuple[int, Tensor, int | None, int], rule: Any) -> None:
    seq_len, kept, _, seed = case
    k, v = draw(seq_len, D, seed=seed), draw(seq_len, D, seed=seed + 1)
    merged = merge_nearest(k, v, kept, nearest_kept(k, kept), rule)
    want_k, want_v, count = literal_merge(k.numpy(), v.numpy(), kept.tolist(), rule)
    np.testing.assert_allclose(merged.keys.numpy(), want_k, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(merged.values.numpy(), want_v, rtol=1e-9, atol=1e-12)
    assert merged.counts.tolist() == count.tolist()
    bias = merged_bias(merged, "count")
    assert bias is not None
    np.testing.assert_allclose(bias.numpy(), np.log(1 + count))


def test_similarities_are_taken_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    k, kept = draw(50, D), torch.arange(0, 50, 5)
    whole = nearest_kept(k, kept)
    monkeypatch.setattr("kvtool.policies.merging.SIMILARITY_ELEMENTS", 33)
    parts = nearest_kept(k, kept)
    assert torch.equal(whole.target, parts.target)
    torch.testing.assert_close(whole.similarity, parts.similarity)


@settings(deadline=None, max_examples=40)
@given(kept_sets(), st.sampled_from(["pivot", "weighted"]))
def test_merging_equal_keys_with_log_count_keeps_the_mass(case: tuple[int, Tensor, int | None, int], rule: Any) -> None:
    """The bias that no official code adds: copies of kept keys with the kept values merge without a trace."""
    seq_len, kept, _, seed = case
    q, k, v = draw(3, D, seed=seed), draw(seq_len, D, seed=seed + 1), draw(seq_len, D, seed=seed + 2)
    for j in evicted_positions(kept, seq_len).tolist():
        k[j], v[j] = k[kept[j % len(kept)]], v[kept[j % len(kept)]]
    for bias in ("count", "entropy"):
        merged = merge_nearest(k, v, kept, nearest_kept(k, kept), rule)
        found = attend(q, merged.keys, merged.values, merged_bias(merged, bias))  # type: ignore[arg-type]
        if bias == "count" or rule == "weighted":
            torch.testing.assert_close(found, attend(q, k, v), rtol=1e-8, atol=1e-8)


def test_d2o_decides_for_all_heads_together_only_where_they_evict_equally_many() -> None:
    k = draw(2, 20, D)
    equal = [nearest_kept(k[h], torch.arange(h, 20, 2)) for h in range(2)]
    together, limit = d2o_taken(equal)
    assert limit == pytest.approx(float(torch.stack([n.similarity for n in equal]).mean()))
    assert torch.equal(together[0], together[1])
    assert torch.equal(together[0], (equal[0].similarity + equal[1].similarity) / 2 >= limit)
    ragged = [equal[0], nearest_kept(k[1], torch.arange(0, 20, 3))]
    alone, limit = d2o_taken(ragged)
    assert limit == pytest.approx(float(torch.cat([n.similarity for n in ragged]).mean()))
    assert all(torch.equal(taken, n.similarity >= limit) for taken, n in zip(alone, ragged, strict=True))


@settings(deadline=None, max_examples=40)
@given(kept_sets(), st.integers(1, 40))
def test_cam_equals_loops(case: tuple[int, Tensor, int | None, int], spread: int) -> None:
    seq_len, kept, _, seed = case
    v, attention = draw(seq_len, D, seed=seed), draw(seq_len, seed=seed + 1).clamp(min=0)
    draws = torch.from_numpy(np.random.default_rng(seed).random(seq_len))
    want, n_merged = v[kept].clone(), 0
    for j in evicted_positions(kept, seq_len).tolist():
        if float(draws[j]) < float(cam_probability(attention, j)):
            heirs = [i for i, s in enumerate(kept.tolist()) if s > j][:spread]
            n_merged += len(heirs) > 0
            for index in heirs:
                want[index] += v[j] / spread
    found, n_found = cam_spread(v, kept, attention, draws, spread)
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)
    assert n_found == n_merged


# ---- refit


@settings(deadline=None, max_examples=40)
@given(kept_sets(), st.sampled_from([1e-6, 0.01, 1.0, 100.0]), st.integers(1, 4), st.integers(1, 12))
def test_a_refit_is_the_ridge_solution_and_never_worse(
    case: tuple[int, Tensor, int | None, int], ridge: float, group: int, width: int
) -> None:
    seq_len, kept, _, seed = case
    width = min(width, seq_len)
    q, k, v = 2 * draw(group, width, D, seed=seed), draw(seq_len, D, seed=seed + 1), draw(seq_len, D, seed=seed + 2)
    found = refit_values(q, k, v, kept, D**-0.5, ridge)
    full, some = [], []
    for g in range(group):
        for i in range(width):
            row = seq_len - width + i
            full.append(attend(q[g, i], k[: row + 1], v[: row + 1]))
            seen = kept[kept <= row]
            weights = torch.zeros(len(kept), dtype=torch.float64)
            if len(seen):
                weights[: len(seen)] = torch.softmax(k[seen] @ q[g, i] * D**-0.5, dim=0)
            some.append(weights)
    target, a = torch.stack(full), torch.stack(some)
    torch.testing.assert_close(observed_attention(q, k[kept], kept, seq_len, D**-0.5), a, rtol=1e-9, atol=1e-12)
    before = float((target - a @ v[kept]).square().sum())
    after = float((target - a @ found.values).square().sum())
    assert after <= before * (1 + 1e-12)
    assert (found.error_before, found.error_after) == pytest.approx((before, after), rel=1e-6, abs=1e-12)
    if found.undone:
        assert torch.equal(found.values, v[kept])
        return
    strength = ridge * float((a @ a.T).diagonal().mean())
    # The normal equations, N x N: what the code never forms.
    delta = found.values - v[kept]
    left = (a.T @ a) @ delta + strength * delta
    torch.testing.assert_close(left, a.T @ (target - a @ v[kept]), rtol=1e-6, atol=1e-8)


def test_a_refit_that_rounding_makes_worse_is_undone() -> None:
    # Nothing is missing but rounding noise: bfloat16 cannot say anything better.
    k = torch.zeros(9, D, dtype=torch.bfloat16)
    v = draw(1, D).expand(9, D).to(torch.bfloat16).contiguous()
    found = refit_values(torch.zeros(1, 2, D, dtype=torch.bfloat16), k, v, torch.arange(4, 9), 1.0, 0.01)
    assert found.error_after <= found.error_before
    assert torch.equal(found.values, v[4:])


# ---- a whole layer


def view_of(
    seq_len: int, n_heads: int = 4, n_kv: int = 2, seed: int = 0, scale: float = 1.0
) -> tuple[TensorView, LayerTensors]:
    q, k, v = (draw(n, seq_len, D, seed=seed + i) for i, n in enumerate((n_heads, n_kv, n_kv)))
    inputs = AttentionInputs(scale * q, k, v, D**-0.5)
    return TensorView(inputs, 0, 1, seed), LayerTensors.of_prompt(inputs.queries, k, v, D**-0.5)


@settings(deadline=None, max_examples=60)
@given(
    seq_len=st.integers(1, 90),
    retention=st.integers(1, 100),
    method=st.sampled_from(["window", "adakv", "random:sink=1,window=2"]),
    options=st.sampled_from(
        [
            "mean",
            "mean,block=5",
            "weighted,block=full",
            "weighted,block=9,gate=0.4",
            "merge",
            "merge,merge=cam",
            "merge,merge=d2o,bias=count",
            "refit",
        ]
    ),
)
def test_a_compensated_layer_holds_as_much_as_an_uncompensated_one(
    seq_len: int, retention: int, method: str, options: str
) -> None:
    name, _, rest = method.partition(":")
    small = rest or ("window=4" if name == "adakv" else "")
    head = f"{name}:budget={retention}%" + (f",{small}" if small else "")
    policy, plain = Policy.parse(f"{head},compensate={options}"), Policy.parse(head)
    view, tensors = view_of(seq_len)
    assert policy.budget is not None
    if policy.budget.resolve(seq_len) < policy.minimum(seq_len):
        with pytest.raises(ConfigError, match="smaller than its"):
            kept_positions(policy, [view])
        return
    kept = kept_positions(policy, [view])[0]
    entries, left = compensate_layer(policy.compensation, view, tensors, kept)
    uncompensated = kept_positions(plain, [view])[0]
    assert sum(len(e.keys) for e in entries) == sum(len(p) for p in uncompensated)
    assert left.representatives == sum(e.n_representatives for e in entries)
    for h, (found, positions) in enumerate(zip(entries, kept, strict=True)):
        m = found.n_representatives
        assert found.keys.shape == found.values.shape == (m + len(positions), D)
        assert torch.equal(found.positions[m:], positions)
        if not found.changed:
            assert torch.equal(found.keys[m:], tensors.keys[h, positions])
            assert torch.equal(found.values[m:], tensors.values[h, positions])
        if len(positions) == seq_len:
            assert m == 0
            assert torch.equal(found.keys, tensors.keys[h])
            assert torch.equal(found.values, tensors.values[h])
            assert found.bias is None
        if found.bias is not None and m:
            assert bool((found.bias[m:] == 0).all())


def test_the_gate_gives_slots_back_head_by_head() -> None:
    view, tensors = view_of(90)
    tensors.keys[1] *= 0.01  # logits of the second head hardly differ
    view = TensorView(AttentionInputs(view.inputs.queries, tensors.keys, tensors.values, D**-0.5), 0, 1)
    policy = Policy.parse("window:budget=40,compensate=mean,block=10,gate=0.05")
    assert policy.compensation.gated(view) == [True, False]
    kept = kept_positions(policy, [view])[0]
    assert [len(p) for p in kept] == [40, policy.compensation.kept(40, 90)]
    entries, left = compensate_layer(policy.compensation, view, tensors, kept)
    assert [e.n_representatives for e in entries] == [0, 40 - len(kept[1])]
    assert [len(e.keys) for e in entries] == [40, 40]
    assert (left.gated_heads, left.representatives) == (1, 40 - len(kept[1]))
    # What it compares: the variance of the logits within blocks, mean over last queries and group, median over blocks.
    variances = []
    for h in range(2):
        logits = view.inputs.queries[2 * h : 2 * h + 2, -32:] @ tensors.keys[h].T * D**-0.5
        blocks = [logits[:, :, i : i + 10].var(dim=2, correction=0).mean(dim=1) for i in range(0, 50, 10)]
        variances.append(float(torch.stack(blocks).quantile(0.5, dim=0).mean()))
    assert variances[0] > 0.05 > variances[1]
    edge = Policy.parse(f"window:budget=40,compensate=mean,block=10,gate={variances[1] * 1.001:.12f}")
    assert edge.compensation.gated(view) == [True, False]
    edge = Policy.parse(f"window:budget=40,compensate=mean,block=10,gate={variances[1] * 0.999:.12f}")
    assert edge.compensation.gated(view) == [True, True]


def test_the_control_gives_up_the_slots_and_nothing_else() -> None:
    view, tensors = view_of(80)
    mean, slots = (Policy.parse(f"window:budget=20,compensate={kind},block=8") for kind in ("mean", "slots"))
    kept = kept_positions(slots, [view])[0]
    assert [p.tolist() for p in kept] == [p.tolist() for p in kept_positions(mean, [view])[0]]
    entries, left = compensate_layer(slots.compensation, view, tensors, kept)
    assert [len(e.keys) for e in entries] == [mean.compensation.kept(20, 80)] * 2
    assert left.representatives == 0
    assert not slots.exact
    assert mean.exact
