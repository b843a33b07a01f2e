"""Merging and representatives against outputs of the official code, where a folder of them is given by KVTOOL_GOLDENS."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvtool.policies.merging import (
    cam_probability,
    cam_step,
    d2o_taken,
    d2o_threshold,
    merge_nearest,
    most_similar,
    nearest_kept,
)
from kvtool.policies.representatives import evicted_positions, represent

FOLDER = Path(os.environ.get("KVTOOL_GOLDENS", "/nonexistent"))
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="set KVTOOL_GOLDENS to the folder of official outputs")

#: Cases of merge.npz that this module covers, all of them.
CASES = {
    "factory_merge_pivot",
    "factory_merge_weighted",
    "kvpress_merge_t0.0_f1.0",
    "kvpress_merge_t0.3_f0.5",
    "cam_step",
    "compensation_math",
}


@cache
def load(name: str) -> dict[str, Any]:
    with np.load(FOLDER / f"{name}.npz") as file:
        return {k: json.loads(str(file[k])) if k.endswith("/params") else file[k] for k in file}


def case(name: str, file: str = "merge") -> dict[str, Any]:
    return {k.removeprefix(f"{name}/"): v for k, v in load(file).items() if k.startswith(f"{name}/")}


def inputs(name: str) -> list[Tensor]:
    return [torch.from_numpy(load(name)[x][0]) for x in "qkv"]


def close(found: Tensor, expected: np.ndarray, atol: float = 2e-6) -> None:
    np.testing.assert_allclose(found.double().numpy(), expected.astype(np.float64), rtol=1e-5, atol=atol)


def test_every_case_is_covered() -> None:
    assert {k.removesuffix("/params") for k in load("merge") if k.endswith("/params")} <= CASES


@pytest.mark.parametrize("rule", ["pivot", "weighted"])
def test_kvcache_factory(rule: Any) -> None:
    golden = case(f"factory_merge_{rule}")
    _, keys, values = inputs(golden["params"]["inputs"])
    seq_len = keys.shape[1]
    window = torch.arange(seq_len - golden["params"]["window"], seq_len)
    for h, selected in enumerate(golden["selected"]):
        kept = torch.cat([torch.from_numpy(selected).long(), window])
        merged = merge_nearest(keys[h], values[h], kept, nearest_kept(keys[h], kept), rule)
        close(merged.keys, golden["k"][h])
        close(merged.values, golden["v"][h])


@pytest.mark.parametrize("name", [c for c in sorted(CASES) if c.startswith("kvpress")])
def test_kvpress(name: str) -> None:
    golden = case(name)
    _, keys, values = inputs(golden["params"]["inputs"])
    threshold, fraction = golden["params"]["similarity_threshold"], golden["params"]["merge_fraction"]
    for h, rows in enumerate(golden["kept"]):
        kept = torch.from_numpy(rows).long()
        nearest = nearest_kept(keys[h], kept)
        taken = most_similar(nearest, threshold, fraction)
        merged = merge_nearest(keys[h], values[h], kept, nearest, "values", taken=taken)
        assert torch.equal(merged.keys, keys[h][kept])
        # The official code adds 1e-6 to a divisor.
        close(merged.values, golden["v"][h], atol=1e-5)
        if (threshold, fraction) == (0.0, 1.0):  # what compensate=merge,merge=values does
            plain = merge_nearest(keys[h], values[h], kept, nearest, "values")
            close(plain.values, golden["v"][h], atol=1e-5)


def test_cam() -> None:
    golden = case("cam_step")
    queries, keys, values = inputs(golden["params"]["inputs"])
    attention = torch.softmax(queries[:, -1:] @ keys.transpose(1, 2) * keys.shape[-1] ** -0.5, dim=-1)[:, 0]
    recent = golden["params"]["recent_budget"]
    found = cam_probability(attention, attention.shape[1] - recent + 1)
    np.testing.assert_allclose(found.numpy(), golden["merge_prob"], rtol=1e-3)
    drawn = torch.from_numpy(golden["merge_mask"]) > 0
    close(cam_step(values, recent, drawn, golden["params"]["merge_budget"]), golden["v_out"])


def test_d2o() -> None:
    golden = case("d2o_step", "d2o")
    params = golden["params"]
    keys, values = (torch.from_numpy(golden[x][0]).float() for x in "kv")
    scores = torch.from_numpy(golden["hh_score"]).clone()
    scores[:, :4] = float("inf")
    past = params["T"] - params["recent_size"]
    recent = torch.arange(past, params["T"])
    heavy = scores[:, :past].topk(params["hh_size"]).indices.sort().values
    kept = [torch.cat([head, recent]) for head in heavy]
    nearest = [nearest_kept(k, positions) for k, positions in zip(keys, kept, strict=True)]
    taken, limit = d2o_taken(nearest)
    assert d2o_threshold(None, limit) == pytest.approx(float(golden["threshold"]), rel=1e-5)
    assert 0 < int(taken[0].sum()) < len(taken[0])
    for h in range(len(keys)):
        merged = merge_nearest(keys[h], values[h], kept[h], nearest[h], "d2o", taken=taken[h])
        # Stored in float16.
        close(merged.keys, golden["k_out"][h], atol=2e-3)
        close(merged.values, golden["v_out"][h], atol=2e-3)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    logits = q @ k.T * q.shape[-1] ** -0.5
    return torch.softmax(logits if bias is None else logits + bias, dim=-1) @ v


def compensated(golden: dict[str, Tensor], keys: Tensor, bias: Any, observed: Tensor | None) -> Tensor:
    kept, values = golden["keep"], golden["v"]
    found = represent(keys, values, evicted_positions(kept, len(keys)), 8, observed, bias)
    zeros = keys.new_zeros(len(kept))
    all_bias = torch.cat([zeros.new_zeros(len(found.keys)) if found.bias is None else found.bias, zeros])
    return attend(golden["q"], torch.cat([found.keys, keys[kept]]), torch.cat([found.values, values[kept]]), all_bias)


@pytest.mark.parametrize(
    ("expected", "bias", "weighted"),
    [
        ("out_mean", "none", False),
        ("out_mean_logn", "count", False),
        ("out_weighted", "none", True),
        ("out_weighted_logn", "count", True),
        ("out_weighted_entropy", "entropy", True),
    ],
)
def test_compensation_math(expected: str, bias: Any, weighted: bool) -> None:
    golden = {k: torch.from_numpy(v) for k, v in case("compensation_math").items() if k != "params"}
    assert case("compensation_math")["params"]["block"] == 8
    found = compensated(golden, golden["k"], bias, golden["weights"] if weighted else None)
    close(found, golden[expected].numpy(), atol=1e-12)
    if expected == "out_weighted_entropy":
        close(found[0], golden["out_full"][0].numpy(), atol=1e-12)


def test_compensation_math_of_identical_keys_is_exact() -> None:
    golden = {k: torch.from_numpy(v) for k, v in case("compensation_math").items() if k != "params"}
    found = compensated(golden, golden["k_exact"], "count", None)
    close(found, golden["out_exact_logn"].numpy(), atol=1e-12)
    close(found, golden["out_exact_full"].numpy(), atol=1e-12)
    close(attend(golden["q"], golden["k"], golden["v"]), golden["out_full"].numpy(), atol=1e-12)
    kept = golden["keep"]
    close(attend(golden["q"], golden["k"][kept], golden["v"][kept]), golden["out_evict"].numpy(), atol=1e-12)
