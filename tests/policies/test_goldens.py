"""Kept sets against outputs of the official code, where a folder of them is given by KVTOOL_GOLDENS.

The files hold inputs, kept positions and scores of SnapKV, KVCache-Factory's H2O and StreamingLLM run unchanged. A head
whose cut falls into a plateau of equal scores (`tie`) is only defined up to which of the equal entries stay.
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

from kvtool.policies import select

FOLDER = Path(os.environ.get("KVTOOL_GOLDENS", "/nonexistent"))
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="set KVTOOL_GOLDENS to the folder of official outputs")


def cases(name: str) -> Iterator[Any]:
    if not FOLDER.is_dir():
        return
    with np.load(FOLDER / f"{name}.npz") as file:
        for key in file:
            if key.endswith("/params"):
                case = key.removesuffix("/params")
                arrays = {k.removeprefix(f"{case}/"): file[k] for k in file if k.startswith(f"{case}/") and k != key}
                yield pytest.param(json.loads(str(file[key])), arrays, id=case)


def inputs(params: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys, values of one layer; without a group rule the official code repeats KV heads to query heads."""
    with np.load(FOLDER / f"{params['inputs']}.npz") as file:
        q, k, v = (torch.from_numpy(file[n][0]) for n in ("q", "k", "v"))
    if params.get("group") is None:
        k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
    return q, k, v


def compare(kept: list[torch.Tensor], arrays: dict[str, np.ndarray]) -> None:
    assert len(kept) == len(arrays["kept"])
    for head, positions in enumerate(kept):
        want = arrays["kept"][head][: int(arrays["lens"][head])].tolist()
        if not arrays["tie"][head]:
            assert positions.tolist() == want, head
            continue
        scores = arrays["scores"][head]
        both = [np.sort(scores[[p for p in found if p < len(scores)]]) for found in (positions.tolist(), want)]
        np.testing.assert_allclose(*both, rtol=1e-3)


@pytest.mark.parametrize(("params", "arrays"), list(cases("snapkv")))
def test_snapkv(params: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    q, k, v = inputs(params)
    pool = {"avgpool": "avg", "maxpool": "max"}[params["pooling"]]
    rest = f"window={params['window']},kernel={params['kernel']},pool={pool},group={params.get('group') or 'mean'}"
    compare(select(f"snapkv:budget={params['capacity']}entries,{rest}", [q], [k], [v])[0], arrays)


@pytest.mark.parametrize(("params", "arrays"), list(cases("h2o_prefill")))
def test_h2o(params: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    q, k, v = inputs(params)
    rest = f"window={params['window']},group={params.get('group') or 'mean'}"
    compare(select(f"h2o:budget={params['capacity']}entries,{rest}", [q], [k], [v])[0], arrays)


@pytest.mark.parametrize(("params", "arrays"), [c for c in cases("streamingllm") if "capacity" in c.values[0]])
def test_streaming(params: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    q, k, v = inputs(params)
    text = f"streaming:budget={params['capacity']}entries,sink={params['sinks']}"
    for positions, want in zip(select(text, [q], [k], [v])[0], arrays["kept"], strict=True):
        assert positions.tolist() == [p for p in want.tolist() if p >= 0]
