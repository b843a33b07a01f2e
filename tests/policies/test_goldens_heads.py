"""HeadKV and DuoAttention against outputs of their official code, where KVTOOL_GOLDENS names the folder.

The published head scores lie in ``../heads`` beside that folder; without them those cases are skipped.
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
from kvtool.policies.head_allocators import full_heads, head_capacities
from kvtool.policies.headfile import read_head_file

FOLDER = Path(os.environ.get("KVTOOL_GOLDENS", "/nonexistent"))
HEADS = FOLDER.parent / "heads"
FILES = {"reason": "retrieval_reasoning_heads", "copy": "retrieval_heads"}
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="set KVTOOL_GOLDENS to the folder of official outputs")


def cases(name: str, start: str = "") -> Iterator[Any]:
    if not FOLDER.is_dir():
        return
    with np.load(FOLDER / f"{name}.npz") as file:
        for key in file:
            if key.endswith("/params") and key.startswith(start):
                case = key.removesuffix("/params")
                arrays = {k.removeprefix(f"{case}/"): file[k] for k in file if k.startswith(f"{case}/") and k != key}
                yield pytest.param(json.loads(str(file[key])), arrays, id=case)


def importance(name: str) -> np.ndarray:
    """Mean scores [layer, query head] of a published file, from the file itself or from the list of means."""
    file = HEADS / f"{name}.json"
    if file.is_file():
        return read_head_file(str(file)).query_scores("importance")
    means = HEADS / "head_score_means.json"
    if not means.is_file():
        pytest.skip(f"{file.name} is not there")
    return np.asarray(json.loads(means.read_text())[name])


@pytest.mark.parametrize(("params", "arrays"), list(cases("headkv", "capacity_")))
def test_head_capacities(params: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    scores = importance(params["file"])
    for c, capacity in enumerate(params["capacities"]):
        for b, beta in enumerate(params["betas"]):
            found = head_capacities(scores, capacity - params["window"], beta, params["temp"])
            np.testing.assert_array_equal(found, arrays["head_capacity"][c, b], err_msg=f"{capacity}, {beta}")


@pytest.mark.parametrize(("params", "arrays"), list(cases("headkv", "kept_")))
def test_headkv_kept_sets(params: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    with np.load(FOLDER / f"{params['inputs']}.npz") as file:
        q, k, v = (torch.from_numpy(file[n][0]) for n in ("q", "k", "v"))
    if params.get("group") is None:
        k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
    scores = importance(f"{params['model']}_{FILES[params['heads']]}")
    rule = {"HeadKV": "official", "KVCache-Factory": "factory"}[params["repo"]]
    text = (
        f"headkv:budget={params['capacity']}entries,window={params['window']},kernel={params['kernel']},"
        f"pool={params['pooling'].removesuffix('pool')},beta={params['beta']},temperature={params.get('temp', 1)},"
        f"rule={rule},group={params.get('group') or 'mean'}"
    )
    # The budgets of one layer depend on all: the same tensors stand for each.
    n_layers = len(scores)
    kept = select(text, [q] * n_layers, [k] * n_layers, [v] * n_layers, head_scores=scores)[params["layer"]]
    assert [len(p) for p in kept] == arrays["lens"].tolist()
    for head, positions in enumerate(kept):
        want = arrays["kept"][head][: int(arrays["lens"][head])].tolist()
        if not arrays["tie"][head]:
            assert positions.tolist() == want, head
            continue
        ranked = arrays["scores"][head]
        both = [np.sort(ranked[[p for p in found if p < len(ranked)]]) for found in (positions.tolist(), want)]
        np.testing.assert_allclose(*both, rtol=1e-3)


@pytest.mark.parametrize(("params", "arrays"), list(cases("duoattention")))
def test_duo_heads(params: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    found = full_heads(arrays["alpha"], params["sparsity"])
    sure = arrays["tied"] == 0
    assert sure.any()
    np.testing.assert_array_equal(found[sure], arrays["full_heads"].astype(bool)[sure])
    assert abs((1 - found.mean()) - float(arrays["actual_sparsity"])) <= 1 / found.size + 1e-9
    folder = HEADS / f"duo_{params['model']}"
    if folder.is_dir():
        table = read_head_file(str(folder))
        np.testing.assert_allclose(table.kv_scores["gate"], arrays["alpha"], rtol=1e-6)
        assert table.streaming == (params["sink_size"], params["recent_size"])
