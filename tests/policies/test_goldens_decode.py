"""Decoding against outputs of the official code, where a folder of them is given by KVTOOL_GOLDENS.

The sequences of queries, keys and values in the files go through the very layer that `CompressedCache` holds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvtool.attention import AttentionCall
from kvtool.infer.evict import HeldLayer
from kvtool.infer.hold import Holding, hold
from kvtool.infer.live import choose, observe
from kvtool.infer.present import window_queries
from kvtool.policies import Policy
from kvtool.policies.official import cake_decode_order, evict_for_space, h2o_mask_simulation

FOLDER = Path(os.environ.get("KVTOOL_GOLDENS", "/nonexistent"))
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="set KVTOOL_GOLDENS to the folder of official outputs")


def cases(name: str, part: str = "") -> Iterator[Any]:
    if not FOLDER.is_dir():
        return
    with np.load(FOLDER / f"{name}.npz") as file:
        for key in file:
            case = key.removesuffix("/params")
            if key.endswith("/params") and part in case:
                arrays = {k.removeprefix(f"{case}/"): file[k] for k in file if k.startswith(f"{case}/") and k != key}
                yield pytest.param(json.loads(str(file[key])), arrays, id=case)


def inputs(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with np.load(FOLDER / f"{name}.npz") as file:
        q, k, v = (torch.from_numpy(file[n]) for n in ("q", "k", "v"))
    return q, k, v


def layer_call(tensors: tuple[torch.Tensor, ...], start: int, stop: int) -> AttentionCall:
    q, k, v = (t[:, :, start:stop] for t in tensors)
    return AttentionCall(0, q, k, v, None, q.shape[-1] ** -0.5, None)


def decode(text: str, tensors: tuple[torch.Tensor, ...], prefill: int) -> Iterator[HeldLayer]:
    """The layer after the prompt and after every decoded token."""
    policy = Policy.parse(text)
    names = policy.method.parts().needs()
    prompt = observe(layer_call(tensors, 0, prefill), names, n_recent=window_queries(names))
    held = hold(prompt, choose(policy, [prompt], 1, [0])[0], Holding(policy, 1, (0,), track=True))
    yield held
    for step in range(prefill, tensors[0].shape[2]):
        held.feed(layer_call(tensors, step, step + 1), "sdpa-buckets")
        yield held


def positions(held: HeldLayer) -> list[list[int]]:
    return [p.tolist() for p in held.positions()[0]]


@pytest.mark.parametrize(("params", "arrays"), list(cases("h2o_decode", "realdrop")))
def test_h2o_real_eviction(params: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    heavy, recent = params["hh_size"], params["recent_size"]
    text = f"h2o:budget={heavy + recent}entries,window={recent},decode=evict"
    for step, held in enumerate(decode(text, inputs(params["inputs"]), params["prefill"])):
        assert positions(held) == arrays["kept"][step].tolist(), step
    assert step == len(arrays["kept"]) - 1
    scores = held.store.scores
    assert scores is not None
    found = torch.stack([scores[start : start + heavy + recent, 0] for start in held.store.starts])
    np.testing.assert_allclose(found.numpy(), arrays["final_scores"], rtol=1e-3)


@pytest.mark.parametrize(("params", "arrays"), list(cases("h2o_decode", "masksim")))
def test_h2o_mask_simulation_with_its_off_by_one(params: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    q, k, v = (t[0] for t in inputs(params["inputs"]))
    found = h2o_mask_simulation(q, k, v, params["prefill"], params["heavy_ratio"], params["recent_ratio"])
    shape = tuple(arrays["visible_shape"])
    expected = np.unpackbits(arrays["visible"], axis=-1)[..., : shape[-1]].astype(bool)
    assert expected.shape == shape == tuple(found.visible.shape)
    assert np.array_equal(found.visible.numpy(), expected)
    np.testing.assert_allclose(found.outputs.flatten(1).numpy(), arrays["outputs"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("params", "arrays"), list(cases("tova")))
def test_tova(params: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    text = f"tova:budget={params['cache_size']}entries,decode=evict"
    for step, held in enumerate(decode(text, inputs(params["inputs"]), params["prefill"])):
        assert all(head == arrays["kept"][step].tolist() for head in positions(held)), step
    assert step == len(arrays["kept"]) - 1


@pytest.mark.parametrize(("params", "arrays"), list(cases("streamingllm", "stream_")))
def test_streaming_at_every_step(params: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    sink, recent, prefill = params["start_size"], params["recent_size"], params["prefill"]
    tensors = tuple(torch.randn(1, 2, prefill + params["steps"], 8) for _ in range(3))
    text = f"streaming:budget={sink + recent}entries,sink={sink},decode=evict"
    ahead = list(range(prefill))
    for step, held in enumerate(decode(text, tensors, prefill)):
        want = [p for p in arrays["kept"][step].tolist() if p >= 0]
        if "evict_for_space" in params["function"]:
            if step:
                ahead = [*evict_for_space(ahead, 1, sink, recent), prefill + step - 1]
            assert ahead == want, step
        if step or "evict_for_space" not in params["function"]:
            assert positions(held) == [want] * 2, step
    assert step == params["steps"] == len(arrays["kept"]) - 1


@pytest.mark.parametrize(("params", "arrays"), list(cases("cake", "_decode")))
def test_cake_decodes_over_its_stored_order(params: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    _, keys, _ = inputs(params["inputs"])
    dq, dk = (torch.from_numpy(arrays[name]) for name in ("dq", "dk"))
    for layer in range(keys.shape[0]):
        stored = torch.from_numpy(arrays[f"order_prefill_layer{layer}"]).long()
        known = keys[layer, 0]
        for step in range(params["steps"]):
            newest = torch.full((stored.shape[0], 1), known.shape[1])
            known = torch.cat([known, dk[step, layer, 0]], dim=1)
            stored = cake_decode_order(torch.cat([stored, newest], 1), dq[step, layer, 0, :, 0], known, params["window"])
            assert stored.tolist() == arrays[f"kept_layer{layer}"][step].tolist(), (layer, step)
