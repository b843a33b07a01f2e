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
