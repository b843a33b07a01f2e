"""Selection statistics against the full attention matrix in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvtool.errors import ConfigError
from kvtool.policies import statistics
from kvtool.policies.statistics import AttentionInputs, compute_statistics, default_statistics

Q, H, T, D = 6, 2, 70, 8


def inputs(window: int | None = None, seq_len: int = T) -> AttentionInputs:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(n, seq_len, D, generator=generator) for n in (Q, H, H))
    return AttentionInputs(q * 3, k, v, D**-0.5, window)


def brute_force(x: AttentionInputs) -> np.ndarray:
    keys = x.keys.double().repeat_interleave(Q // H, 0)
    logits = x.queries.double() @ keys.transpose(1, 2) * x.scaling
    i, j = torch.arange(x.seq_len)[:, None], torch.arange(x.seq_len)[None]
    hidden = (j > i) if x.window is None else (j > i) | (j <= i - x.window)
    return logits.masked_fill(hidden, float("-inf")).softmax(-1).numpy()


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
        "key_norm": np.linalg.norm(keys, axis=-1),
        "value_norm": np.linalg.norm(values, axis=-1),
        "key_similarity": (unit * anchor).sum(-1) / np.linalg.norm(anchor, axis=-1),
    }
    assert got.keys() == expected.keys()
    for name, want in expected.items():
        np.testing.assert_allclose(got[name], want, rtol=2e-5, atol=2e-6, err_msg=name)


def test_a_window_longer_than_the_prompt_uses_all_of_it() -> None:
    x = inputs(seq_len=5)
    got = compute_statistics(x, ["window_mean/64"])["window_mean/64"].numpy()
    np.testing.assert_allclose(got, brute_force(x).mean(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["acumulated", "window_mean", "window_mean/0", "window_mean/x", "last/3"])
def test_unknown_name(name: str) -> None:
    with pytest.raises(ConfigError, match="unknown statistic"):
        compute_statistics(inputs(), [name])
