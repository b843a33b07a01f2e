"""One sample: prompt pass, probe pass, and the arrays and attributes that go to disk.

Shapes: L layers, Q query heads, H KV heads, T prompt positions, P probe tokens, M margins.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np

from kvtool.capture.features import DISTANCE_EDGES, LOCAL, SINK, HeadFeatures, feature_rows
from kvtool.capture.permuted import BLOCK, TAIL, Permutation, permutation, run_permuted
from kvtool.capture.probe_pass import ProbeRecord, ProbeTokens, probe_tokens, run_probes
from kvtool.capture.prompt_pass import PromptRecord, greedy_answer, run_prompt
from kvtool.capture.reader import selection_key
from kvtool.capture.store import StoredArray, StoredSample, to_half, to_json
from kvtool.data.tasks import sample_seed
from kvtool.errors import DataError
from kvtool.models import unknown_statistics

if TYPE_CHECKING:
    from torch import Tensor

    from kvtool.capture.runner import CaptureConfig
    from kvtool.data.tasks import Encoded
    from kvtool.models import LoadedModel


def capture_sample(config: CaptureConfig, loaded: LoadedModel, encoded: Encoded, permuted: bool = True) -> StoredSample:
    """Run one sample through the model, and with its blocks permuted if it is among those for which that was asked.

    Raises
    ------
    DataError
        The model gave values that are not finite.
    """
    model, sample = loaded.model, encoded.sample
    whole = list(encoded.answer_ids) or greedy_answer(
        model, encoded.prompt_ids, min(sample.max_new_tokens, config.answer_tokens)
    )
    answer = whole[: config.answer_tokens]
    question = encoded.question_ids if config.compress_at == "context" else []
    compressed = encoded.context_ids if config.compress_at == "context" else encoded.prompt_ids
    tokens = probe_tokens(question, answer)
    prompt = run_prompt(model, compressed, config.names(unknown_statistics(model)), config.feature_rows)
    seed = sample_seed(sample.id)
    moves = permutation(len(compressed), seed) if permuted else None
    following = {} if moves is None else _following_arrays(model, compressed, prompt, moves)
    arrays = {
        "prompt_ids": StoredArray(np.asarray(encoded.prompt_ids, dtype=np.int32)),
        "answer_ids": StoredArray(np.asarray(answer, dtype=np.int32)),
        **_selection_arrays(prompt, sample.id),
        **_feature_arrays(prompt),
        **following,
        **_probe_arrays(loaded, prompt, tokens, sample.id),
    }
    attrs: dict[str, Any] = {
        "id": sample.id,
        "seq_len": len(compressed),
        "n_prompt": len(encoded.prompt_ids),
        "n_probe": len(tokens.fed),
        "seed": seed,
        "meta": to_json(sample.meta),
        "answers": to_json(list(sample.answers)),
        "metric": sample.metric,
        "max_new_tokens": sample.max_new_tokens,
        "compress_at": config.compress_at,
        "compressible": np.asarray(loaded.info.compressible(len(compressed)), dtype=bool),
        "answer_source": "gold" if encoded.answer_ids else "model",
        "answer_truncated": len(whole) > len(answer),
    }
    n_rows = len(feature_rows(len(compressed), config.feature_rows))
    projected = "output_norm" not in unknown_statistics(model)
    facts = {"n_rows": n_rows, "sink": SINK, "local": LOCAL, "projected": projected}
    if moves is not None:
        facts |= {"block": BLOCK, "tail": TAIL, "n_blocks": (moves.stop - moves.start) // BLOCK}
    return StoredSample(attrs, arrays, {"features": facts})


def _selection_arrays(prompt: PromptRecord, sample_id: str) -> dict[str, StoredArray]:
    arrays = {}
    for name in prompt.selection[0]:
        array = _stack([layer[name] for layer in prompt.selection])
        if not np.isfinite(array).all():
            raise DataError(f"sample {sample_id}: the model gave values that are not finite; load it with --dtype float32")
        arrays[f"selection/{selection_key(name)}"] = StoredArray(array, by_layer=True)
    return arrays


def _feature_arrays(prompt: PromptRecord) -> dict[str, StoredArray]:
    edges = {"edges": np.asarray(DISTANCE_EDGES, dtype=np.int64)}
    return {
        f"features/{f.name}": StoredArray(
            _stack([getattr(layer, f.name) for layer in prompt.features]), attrs=edges if f.name == "distance_profile" else {}
        )
        for f in fields(HeadFeatures)
    }


def _following_arrays(model: Any, token_ids: list[int], prompt: PromptRecord, moves: Permutation) -> dict[str, StoredArray]:
    found = run_permuted(model, token_ids, prompt, moves)
    return {
        "features/content_follow": StoredArray(found.content.numpy()),
        "features/slot_follow": StoredArray(found.slot.numpy()),
    }


def _probe_arrays(loaded: LoadedModel, prompt: PromptRecord, tokens: ProbeTokens, sample_id: str) -> dict[str, StoredArray]:
    if not tokens.rows:
        return _no_probes(loaded, int(prompt.keys[0].shape[1]))
    record: ProbeRecord = run_probes(loaded.model, prompt.keys, prompt.values, tokens)
    return {
        "probes/attention": to_half([a.numpy() for a in record.attention], f"sample {sample_id}: attention"),
        "probes/gain": to_half([b.numpy() for b in record.gain], f"sample {sample_id}: gain"),
        "probes/attention_own": StoredArray(_stack(record.attention_own)),
        "probes/gain_own": StoredArray(_stack(record.gain_own)),
        "probes/margins": StoredArray(record.margins.numpy()),
        "probes/nll": StoredArray(record.nll.numpy()),
        "probes/rows": StoredArray(np.asarray(tokens.rows, dtype=np.int32)),
    }


def _no_probes(loaded: LoadedModel, seq_len: int) -> dict[str, StoredArray]:
    """Empty probes: an answer of one token is predicted by the prompt itself, which no policy changes."""
    info = loaded.info
    empty = [np.zeros((info.n_heads, 0, seq_len), dtype=np.float32)] * info.n_layers
    own, none = np.zeros((info.n_layers, info.n_heads, 0), dtype=np.float32), np.zeros(0, dtype=np.float32)
    return {
        "probes/attention": to_half(empty, "attention"),
        "probes/gain": to_half(empty, "gain"),
        "probes/attention_own": StoredArray(own),
        "probes/gain_own": StoredArray(own),
        "probes/margins": StoredArray(none),
        "probes/nll": StoredArray(none),
        "probes/rows": StoredArray(none.astype(np.int32)),
    }


def _stack(layers: list[Tensor]) -> Any:
    return np.stack([layer.numpy() for layer in layers])
