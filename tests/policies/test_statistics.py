"""Selection statistics against the full attention matrix in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kvtool.errors import ConfigError
from kvtool.policies import statistics
from kvtool.policies.statistics import AttentionInputs, Rope, compute_statistics, default_statistics

Q, H, T, D = 6, 2, 70, 8


def inputs(window: int | None = None, seq_len: int = T) -> AttentionInputs:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(n, seq_len, D, generator=generator) for n in (Q, H, H))
    rope = Rope(torch.tensor([1.0, 0.2, 0.05]))
    return AttentionInputs(q * 3, k, v, D**-0.5, window, rope, torch.randn(12, Q * D, generator=generator))


def brute_force(x: AttentionInputs) -> np.ndarray:
    keys = x.keys.double().repeat_interleave(Q // H, 0)
    logits = x.queries.double() @ keys.transpose(1, 2) * x.scaling
    i, j = torch.arange(x.seq_len)[:, None], torch.arange(x.seq_len)[None]
    hidden = (j > i) if x.window is None else (j > i) | (j <= i - x.window)
    return logits.masked_fill(hidden, float("-inf")).softmax(-1).numpy()


def entropy(rows: np.ndarray) -> np.ndarray:
    """Mean over the queries of what the past columns add to the entropy, ``[Q, 1]``."""
    return -np.where(rows > 0, rows * np.log(np.where(rows > 0, rows, 1)), 0).sum(-1).mean(1, keepdims=True)


def rotation(position: int, frequencies: list[float]) -> np.ndarray:
    """Rotation matrix of a position: dimension i pairs with i + 3, the last two of eight are left alone."""
    matrix = np.eye(D)
    for i, f in enumerate(frequencies):
        a = position * f
        matrix[i, i] = matrix[i + 3, i + 3] = np.cos(a)
        matrix[i, i + 3], matrix[i + 3, i] = -np.sin(a), np.sin(a)
    return matrix


def expected_attention(x: AttentionInputs) -> tuple[np.ndarray, np.ndarray]:
    """Mean logit and half its variance, a matrix per position."""
    assert x.rope is not None
    frequencies = x.rope.inv_freq.double().tolist()
    average = np.mean([rotation(T + i, frequencies) for i in range(512)], axis=0)
    logit, spread = np.zeros((Q, T)), np.zeros((Q, T))
    for head in range(Q):
        plain = np.array([rotation(i, frequencies).T @ x.queries[head, i].double().numpy() for i in range(4, T)])
        keys = x.keys[head // (Q // H)].double().numpy()
        logit[head] = keys @ (average @ plain.mean(0)) / D**0.5
        covariance = average @ np.cov(plain.T, bias=True) @ average.T
        spread[head] = [k @ covariance @ k / (2 * D) for k in keys]
    return logit, spread


def block_variance(x: AttentionInputs, block: int) -> np.ndarray:
    """Median over whole blocks before the last 32 queries of the mean over those queries of the variance, ``[Q, 1]``."""
    n_past, found = T - 32, np.zeros((Q, 1))
    for head in range(Q):
        logits = (x.queries[head].double() @ x.keys[head // (Q // H)].double().T / D**0.5).numpy()
        size = min(block, n_past)
        blocks = [logits[-32:, i : i + size].var(axis=1).mean() for i in range(0, n_past - size + 1, size)]
        found[head] = np.median(blocks)
    return found


def output_norm(x: AttentionInputs) -> np.ndarray:
    """Mean over the group of the L1 norm of what a value adds to the output."""
    assert x.output_weight is not None
    weight, values, found = x.output_weight.double().numpy(), x.values.double().numpy(), np.zeros((H, T))
    for head in range(Q):
        group = Q // H
        found[head // group] += np.abs(weight[:, head * D : (head + 1) * D] @ values[head // group].T).sum(0) / group
    return found


@pytest.mark.parametrize("name", ["expected_logit/4+512", "output_norm"])
def test_what_the_tensors_do_not_tell_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="not known here"):
        compute_statistics(replace(inputs(), rope=None, output_weight=None), [name])


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("block_elements", [1 << 21, 700])
def test_equal_brute_force(window: int | None, block_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "BLOCK_ELEMENTS", block_elements)
    x = inputs(window)
    attention = brute_force(x)
    got = {name: t.numpy() for name, t in compute_statistics(x, default_statistics((4, 16))).items()}
    keys, values = x.keys.double().numpy(), x.values.double().numpy()
    unit = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    anchor = unit.mean(1, keepdims=True)
    expected = {
        "accumulated": attention.sum(1),
        "last": attention[:, -1],
        "window_mean/4": attention[:, -4:].mean(1),
        "window_mean/16": attention[:, -16:].mean(1),
        "window_var/4": attention[:, -4:].var(1),
        "window_var/16": attention[:, -16:].var(1),
        **{f"window_max/{w}": attention[:, -w:].max(1) for w in (4, 16)},
        **{f"window_entropy/{w}": entropy(attention[:, -w:, : T - w]) for w in (4, 16)},
        **dict(zip(("expected_logit/4+512", "expected_spread/4+512"), expected_attention(x), strict=True)),
        **{f"block_variance/{n}": block_variance(x, 99 if n == "full" else int(n)) for n in statistics.VARIANCE_BLOCKS},
        "output_norm": output_norm(x),
        "value_norm1": np.abs(values).sum(-1),
        "key_norm": np.linalg.norm(keys, axis=-1),
        "value_norm": np.linalg.norm(values, axis=-1),
        "key_similarity": (unit * anchor).sum(-1) / np.linalg.norm(anchor, axis=-1),
    }
    assert got.keys() == expected.keys()
    for name, want in expected.items():
        np.testing.assert_allclose(got[name], want, rtol=2e-5, atol=2e-6, err_msg=name)


def test_block_variance_of_prompts_within_the_last_queries_is_nothing() -> None:
    assert compute_statistics(inputs(seq_len=32), ["block_variance/4"])["block_variance/4"].tolist() == [[0.0]] * Q
    some = compute_statistics(inputs(seq_len=35), ["block_variance/2"])["block_variance/2"]
    assert (some > 0).all()


def test_a_window_longer_than_the_prompt_uses_all_of_it() -> None:
    x = inputs(seq_len=5)
    got = compute_statistics(x, ["window_mean/64"])["window_mean/64"].numpy()
    np.testing.assert_allclose(got, brute_force(x).mean(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["acumulated", "window_mean", "window_mean/0", "window_mean/x", "last/3"])
def test_unknown_name(name: str) -> None:
    with pytest.raises(ConfigError, match="unknown statistic"):
        compute_statistics(inputs(), [name])
