"""Retrieval and retrieval-reasoning scores: by hand, and against outputs of HeadKV's code (KVTOOL_GOLDENS)."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from kvtool.classify.retrieval import reasoning_score, retrieval_score
from kvtool.errors import ConfigError

FILE = Path(os.environ.get("KVTOOL_GOLDENS", "/nonexistent")) / "importance.npz"


def rows_by_hand() -> list[np.ndarray]:
    """Two steps, one layer, three heads, a prompt of 6 tokens whose needle is 2 ... 4."""
    first = [[0.1, 0.1, 0.5, 0.1, 0.1, 0.1, 0.0], [0.5, 0.0, 0.2, 0.1, 0.1, 0.1, 0.0], [0.1, 0.1, 0.1, 0.5, 0.1, 0.1, 0.0]]
    second = [
        [0.1, 0.0, 0.1, 0.5, 0.1, 0.1, 0.1, 0.0],
        [0.0, 0.1, 0.3, 0.4, 0.1, 0.1, 0.0, 0.0],
        [0.6, 0.1, 0.1, 0.1, 0.1, 0.0, 0, 0],
    ]
    return [np.asarray([first]), np.asarray([second])]


def test_retrieval_by_hand() -> None:
    prompt = [10, 11, 12, 13, 14, 15]
    # Head 0 looks at 12 and 13 as they come; head 1 at 13 only; head 2 looks at 13 when 12 comes.
    assert retrieval_score(rows_by_hand(), prompt, [12, 13], (2, 4)).tolist() == [[1.0, 0.5, 0.0]]
    # The right place, but another token is generated.
    assert retrieval_score(rows_by_hand(), prompt, [99, 13], (2, 4)).tolist() == [[0.5, 0.5, 0.0]]
    # The same token elsewhere in the prompt does not count.
    assert retrieval_score(rows_by_hand(), [12, 11, 12, 13, 14, 15], [12, 13], (3, 5)).tolist() == [[0.5, 0.5, 0.0]]


def test_reasoning_by_hand() -> None:
    # Top two of each row: head 0: {2, 0} and {3, 0}; head 1: {0, 2} and {3, 2}; head 2: {3, 0} and {0, 1}.
    found = reasoning_score(rows_by_hand(), (2, 4))
    np.testing.assert_allclose(found, [[(0.5 + 0.5) / 2, (0.2 + 0.7) / 2, 0.5 / 2]])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="not in the prompt of 6 tokens"):
        retrieval_score(rows_by_hand(), [0] * 6, [0, 0], (4, 7))
    with pytest.raises(ConfigError, match="3 generated tokens need as many"):
        retrieval_score(rows_by_hand(), [0] * 6, [0, 0, 0], (2, 4))
    with pytest.raises(ConfigError, match="not in the prompt"):
        reasoning_score(rows_by_hand(), (3, 3))
    with pytest.raises(ConfigError, match="attention rows"):
        reasoning_score([], (2, 4))


@pytest.mark.skipif(not FILE.is_file(), reason="set KVTOOL_GOLDENS to the folder of official outputs")
@pytest.mark.parametrize("case", ["retrieval", "reasoning"])
def test_scores_of_the_official_code(case: str) -> None:
    with np.load(FILE) as file:
        params = json.loads(str(file[f"{case}/params"]))
        attention, prompt, generated, want = (
            file[f"{case}/{key}"] for key in ("attention", "prompt_ids", "generated_ids", "score")
        )
    needle = (params["needle_start"], params["needle_end"])
    rows = [attention[t, :, :, : params["prompt_len"] + t + 1] for t in range(params["steps"])]
    if case == "retrieval":
        found = retrieval_score(rows, prompt.tolist(), generated.tolist(), needle)
    else:
        found = reasoning_score(rows, needle, params["prompt_len"])
    assert want.max() > 0
    np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-12)
