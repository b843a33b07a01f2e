"""Every built-in method against a literal, slow reference: float64 loops over the full attention matrix."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kvtool.policies import select

Q, H, T, D = 4, 2, 48, 8


@pytest.fixture(scope="module")
def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(n, T, D, generator=generator) for n in (Q, H, H))
    return q * 2, k, v


def attention_matrix(q: torch.Tensor, k: torch.Tensor) -> np.ndarray:
    """A[h, i, j] by the definition, float64."""
    queries, keys = q.double().numpy(), k.double().numpy()
    result = np.zeros((Q, T, T))
    for h in range(Q):
        for i in range(T):
            logits = [float(queries[h, i] @ keys[h // (Q // H), j]) / math.sqrt(D) for j in range(i + 1)]
            top = max(logits)
            weights = [math.exp(s - top) for s in logits]
            result[h, i, : i + 1] = np.asarray(weights) / sum(weights)
    return result


def top(scores: list[float], n: int) -> set[int]:
    """Indices of the n largest; the earlier one first among equals."""
    return set(sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:n])


def run(policy: str, tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> list[set[int]]:
    q, k, v = tensors
    return [set(p.tolist()) for p in select(policy, [q], [k], [v])[0]]


def test_window(tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    assert run("window:budget=7", tensors) == [set(range(T - 7, T))] * H


def test_streaming(tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    assert run("streaming:budget=9,sink=3", tensors) == [{0, 1, 2} | set(range(T - 6, T))] * H


def test_h2o(tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    attention = attention_matrix(tensors[0], tensors[1])
    for h, result in enumerate(run("h2o:budget=20,window=6", tensors)):
        group = attention[h * 2 : h * 2 + 2]
        scores = [float(sum(group[g, i, j] for g in range(2) for i in range(T))) for j in range(T - 6)]
        assert result == top(scores, 14) | set(range(T - 6, T))


@pytest.mark.parametrize("pool", ["max", "avg", "none"])
@pytest.mark.parametrize("group", ["mean", "max", "sum"])
def test_snapkv(tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor], pool: str, group: str) -> None:
    attention = attention_matrix(tensors[0], tensors[1])
    window, kernel, n_past = 8, 5, T - 8
    merge = {"mean": lambda x: sum(x) / len(x), "max": max, "sum": sum}[group]
    for h, result in enumerate(run(f"snapkv:budget=20,window={window},kernel={kernel},pool={pool},group={group}", tensors)):
        raw = [
            merge([float(np.mean([attention[g, i, j] for i in range(T - window, T)])) for g in (h * 2, h * 2 + 1)])
            for j in range(n_past)
        ]
        scores = []
        for j in range(n_past):
            near = [raw[x] for x in range(j - kernel // 2, j + kernel // 2 + 1) if 0 <= x < n_past]
            scores.append({"max": max(near), "avg": sum(near) / kernel, "none": raw[j]}[pool])
        expected = top(scores, 20 - window)
        # Plateaus of max pooling are equal to the last bit in float32; the reference's float64 means are, too.
        assert result == expected | set(range(n_past, T))


def pooled(raw: list[float], kernel: int, how: str) -> list[float]:
    near = [[raw[x] for x in range(j - kernel // 2, j + kernel // 2 + 1) if 0 <= x < len(raw)] for j in range(len(raw))]
    return [max(values) if how == "max" else sum(values) / kernel for values in near]


def test_defensive(tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    """Worst case over window and group, at least its mean; half by that, half by that times the projected value."""
    q, k, v = tensors
    attention, window, kernel, budget = attention_matrix(q, k), 8, 5, 20
    weight = torch.randn(12, Q * D, generator=torch.Generator().manual_seed(9))
    text = f"defensive:budget={budget},window={window},kernel={kernel},adaptive=false"
    kept = select(text, [q], [k], [v], output_weights=[weight])[0]
    n_past = T - window
    for h in range(H):
        worst = [max(attention[g, i, j] for g in (2 * h, 2 * h + 1) for i in range(n_past, T)) for j in range(n_past)]
        floor = sum(worst) / n_past
        first = pooled([max(x, floor) for x in worst], kernel, "avg")
        norms = []
        for j in range(n_past):
            value = v[h, j].double().numpy()
            heads = [weight[:, g * D : (g + 1) * D].double().numpy() @ value for g in (2 * h, 2 * h + 1)]
            norms.append(sum(float(np.abs(x).sum()) for x in heads) / 2)
        safe = top(first, budget // 2 - window)
        second = [(s + 1e-4) * n if j not in safe else -1.0 for j, (s, n) in enumerate(zip(first, norms, strict=True))]
        assert set(kept[h].tolist()) == safe | top(second, budget // 2) | set(range(n_past, T))


def test_lava(tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    """Two layers, the second with sharper attention: layer totals by entropy, heads by one top-k."""
    q, k, v = tensors
    layers = [(q, k, v), (q * 3, k, v.flip(0) * 2)]
    window, kernel, budget, n_past = 8, 7, 20, T - 8
    scores = []
    for queries, keys, values in layers:
        attention, heads = attention_matrix(queries, keys), []
        for h in range(H):
            mean = [
                [float(np.mean([attention[g, i, j] for i in range(n_past, T)])) for j in range(n_past)]
                for g in (2 * h, 2 * h + 1)
            ]
            largest = max(float(values[h, j].abs().sum()) for j in range(n_past))
            both = [pooled(row, kernel, "max") for row in mean]
            heads.append([max(a, b) * largest for a, b in zip(*both, strict=True)])
        scores.append(heads)
    weights = []
    for heads in scores:
        flat = [x / sum(sum(row) for row in heads) for row in heads for x in row]
        weights.append(-sum(x * math.log(x) for x in flat) / math.log(len(flat)))
    kept = select(f"lava:budget={budget},window={window},kernel={kernel}", *(list(x) for x in zip(*layers, strict=True)))
    free = 2 * H * (budget - window)
    totals = [free * w / sum(weights) for w in weights]
    for layer, heads in enumerate(kept):
        n_won = sum(len(p) for p in heads) - H * window
        assert abs(n_won - totals[layer]) <= 1
        ranked = sorted(((-s, h, j) for h, row in enumerate(scores[layer]) for j, s in enumerate(row)))[:n_won]
        for h, positions in enumerate(heads):
            won = sum(1 for _, head, _ in ranked if head == h)
            assert len(positions) == won + window
            want = top(scores[layer][h], won) | set(range(n_past, T))
            # Plateaus of max pooling: compare the scores of what is kept.
            both = [sorted(scores[layer][h][j] for j in s if j < n_past) for s in (set(positions.tolist()), want)]
            np.testing.assert_allclose(*both, rtol=1e-5)


def test_pyramid_is_a_line_with_the_exact_total() -> None:
    zeros = torch.zeros(1, 200, D)
    kept = select("pyramidkv:budget=50,window=8,beta=10", [zeros] * 5, [zeros] * 5, [zeros] * 5)
    lengths = [len(heads[0]) for heads in kept]
    # 42 free entries a layer: weights 1.9, 1.45, 1, 0.55, 0.1 of them, and the window of 8.
    assert lengths == [88, 69, 50, 31, 12]


def test_cake_shares_by_preference(tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    """Dispersion times shift, from the definition in float64; shares of the free entries."""
    q, k, v = tensors
    layers, window, n_past = [(q, k, v), (q * 2, k, v), (q * 0.5, k, v)], 8, T - 8
    preferences = []
    for queries, keys, _ in layers:
        past = attention_matrix(queries, keys)[:, n_past:, :n_past]
        entropy = -sum(x * math.log(x) for x in past.flatten())
        preferences.append(entropy**0.5 * float(past.var(axis=1, ddof=1).sum()) ** 2)
    kept = select(f"cake:budget=20,window={window},tau1=2,tau2=0.5", *(list(x) for x in zip(*layers, strict=True)))
    quotas = [3 * 12 * p / sum(preferences) for p in preferences]
    assert max(quotas) < n_past
    for heads, quota in zip(kept, quotas, strict=True):
        assert all(abs(len(positions) - window - quota) < 1 for positions in heads)
    assert sum(len(heads[0]) for heads in kept) == 60


def test_random_is_uniform_over_the_free_positions() -> None:
    """Each free position is kept with the same probability: chi-square over 400 samples, far below rejection at 1e-4."""
    from scipy.stats import chi2

    zeros = torch.zeros(1, T, D)
    counts = np.zeros(T)
    for seed in range(400):
        for p in select("random:budget=16,sink=2,window=4", [zeros], [zeros], [zeros], seed=seed)[0]:
            counts[p.numpy()] += 1
    assert (counts[:2] == 400).all()
    assert (counts[-4:] == 400).all()
    free, expected = counts[2:-4], 400 * 10 / (T - 6)
    statistic = float((((free - expected) ** 2) / (expected * (1 - 10 / (T - 6)))).sum()) * (len(free) - 1) / len(free)
    assert statistic < chi2.ppf(1 - 1e-4, len(free) - 1)


def test_ties_keep_the_earlier_position() -> None:
    zeros = torch.zeros(1, 12, D)
    # All attention is uniform over the past, so accumulated attention falls with the position; the window queries see
    # everything equally up to their own causal edge: SnapKV's scores tie for all earlier positions.
    assert select("snapkv:budget=5,window=2", [zeros], [zeros], [zeros])[0][0].tolist() == [0, 1, 2, 10, 11]
