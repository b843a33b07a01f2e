"""Head importance from what heads attend to while the model answers correctly: retrieval and retrieval-reasoning scores.

Pure functions of attention rows, as the code of HeadKV (arXiv 2410.19258) computes them. The mean over samples that the model
answered correctly is the importance that the policies ``headkv`` and ``hace`` share budgets by.

Shapes: L layers, Q query heads, T_t entries that the query of generated token t can see.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvtool.errors import ConfigError

Float = NDArray[np.float64]


def retrieval_score(
    rows: Sequence[NDArray[np.floating]], prompt_ids: Sequence[int], generated_ids: Sequence[int], needle: tuple[int, int]
) -> Float:
    """Return how often a head copies the needle: the share of its tokens that it attends to most as they are generated.

    A generated token counts 1 / N, N tokens in the needle, if the head's most attended position lies in the needle and holds
    that very token (Retrieval Head, arXiv 2404.15574, as in HeadKV's ``retrieval_head_detection.py``).

    Parameters
    ----------
    rows : sequence of ndarray of shape (L, Q, T_t)
        Attention of the query that generates token t.
    prompt_ids : sequence of int
    generated_ids : sequence of int
        One per row.
    needle : tuple of int
        First position of the needle, and the one after its last.

    Returns
    -------
    ndarray of shape (L, Q)

    Raises
    ------
    ConfigError
        Rows and tokens do not fit together, or the needle is not in the prompt.
    """
    start, end = _checked(rows, needle, len(prompt_ids))
    if len(rows) != len(generated_ids):
        raise ConfigError(f"{len(generated_ids)} generated tokens need as many attention rows, found {len(rows)}")
    score = np.zeros(rows[0].shape[:2])
    ids = np.asarray(prompt_ids)
    for row, token in zip(rows, generated_ids, strict=True):
        top = row.argmax(axis=-1)
        inside = (top >= start) & (top < end)
        score += inside & (ids[np.where(inside, top, start)] == token)
    return score / (end - start)


def reasoning_score(rows: Sequence[NDArray[np.floating]], needle: tuple[int, int], prompt_length: int | None = None) -> Float:
    """Return the attention that a head pays to the needle, where the needle is among what it attends to most.

    Per generated token the N most attended positions are taken, N tokens in the needle; the weights of those in the needle are
    summed and divided by N. No token has to match, so heads that reason over the needle count too (HeadKV's
    ``retrieval_head_detection_r2.py``, which gives the needle that answers the question and leaves distractors out).

    Parameters
    ----------
    rows : sequence of ndarray of shape (L, Q, T_t)
        Attention of the query that generates token t.
    needle : tuple of int
        First position of the needle, and the one after its last.
    prompt_length : int, optional
        To check the needle by; default: what the first row can see.

    Returns
    -------
    ndarray of shape (L, Q)

    Raises
    ------
    ConfigError
        No rows, rows of different heads, or the needle is not in the prompt.
    """
    start, end = _checked(rows, needle, prompt_length)
    n = end - start
    score = np.zeros(rows[0].shape[:2])
    for row in rows:
        # Equal weights at the cut: the earlier position.
        top = np.argsort(-row, axis=-1, kind="stable")[..., :n]
        weights = np.take_along_axis(row, top, axis=-1).astype(np.float64)
        score += np.where((top >= start) & (top < end), weights, 0.0).sum(axis=-1)
    return score / n


def _checked(rows: Sequence[NDArray[np.floating]], needle: tuple[int, int], prompt_length: int | None) -> tuple[int, int]:
    if not rows or len({row.shape[:2] for row in rows}) != 1 or rows[0].ndim != 3:
        raise ConfigError(
            f"attention rows (layers, heads, entries) of the same heads are needed, found {[r.shape for r in rows]}"
        )
    length = rows[0].shape[2] if prompt_length is None else prompt_length
    if not 0 <= needle[0] < needle[1] <= length:
        raise ConfigError(f"the needle {needle[0]} ... {needle[1]} is not in the prompt of {length} tokens")
    return needle
