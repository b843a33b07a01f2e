"""Three importances of every head that a capture can tell, per prompt; the fourth, ablation, needs the model (simulate).

Shapes: L layers, Q query heads, H KV heads, P fed tokens, M scored answer tokens, T prompt positions.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvtool.classify.retrieval import reasoning_score
from kvtool.errors import ConfigError, DataError, near_matches
from kvtool.files import config_hash, open_run, write_json, write_text

if TYPE_CHECKING:
    from kvtool.capture.reader import CapturedSample, Probes

Float = NDArray[np.float64]

#: file of the measures in the folder of an importance run
CAPTURED = "captured.jsonl"
#: names of all measures; the last two need the model
MEASURES = ("attention", "reasoning", "gain", "ablation", "ablation_margin")


def far_attention(attention: NDArray[np.floating], sink: int, window: int) -> Float:
    """Return the attention of the fed tokens to the prompt outside its first `sink` and last `window` positions, (L, Q).

    Every policy keeps those two ends, so attention to them says nothing about the entries that a head needs. On trained models
    they hold most of the attention, and would hide the rest.

    Parameters
    ----------
    attention : ndarray of shape (L, Q, P, T)
    sink, window : int
        Entries, sink + window < T.

    Returns
    -------
    ndarray of shape (L, Q)
        Mean over the fed tokens, 0 ... 1.
    """
    stop = attention.shape[-1] - window
    found: Float = attention[..., sink:stop].sum(-1, dtype=np.float64).mean(-1)
    return found


def gain_importance(gain: NDArray[np.floating], gain_own: NDArray[np.floating]) -> Float:
    """Return abs(gradient x output) of every head, (L, Q): how much the margin hangs on the head, mean over fed tokens.

    The gradient g of the margin with respect to a head's output o = sum_j a_j v_j gives g . o = sum_j a_j (g . v_j): the sum of the
    gains over all entries.

    Parameters
    ----------
    gain : ndarray of shape (L, Q, P, T)
    gain_own : ndarray of shape (L, Q, P)
    """
    found: Float = np.abs(gain.sum(-1, dtype=np.float64) + gain_own).mean(-1)
    return found


def reasoning_importance(probes: Probes, spans: Sequence[tuple[int, int]]) -> Float:
    """Return HeadKV's retrieval-reasoning score from the fed tokens that predict answer tokens, (L, Q).

    The mean over the spans of `kvtool.classify.retrieval.reasoning_score`. A capture holds the attention to the prompt only, so
    the fed tokens' own entries do not compete for the most attended positions as they do in HeadKV's code.

    Parameters
    ----------
    probes : Probes
    spans : sequence of (int, int)
        Token spans of the evidence.
    """
    rows = [probes.attention[:, :, row] for row in probes.rows]
    return np.asarray(np.mean([reasoning_score(rows, span) for span in spans], axis=0), dtype=np.float64)


def answered_right(probes: Probes) -> bool:
    """Return whether the model is right about every scored answer token: all margins positive, each probability above 1/2."""
    return bool((probes.margins > 0).all())


def captured_record(sample: CapturedSample, sink: int, window: int) -> dict[str, Any]:
    """Return the three importances of one prompt, of the layers that can be compressed.

    Returns
    -------
    dict
        ``measures``: name -> ``heads`` (layers x Q) and ``kv_heads`` (layers x H, means over the group); ``missing``: name -> why a
        measure is not there.
    """
    probes, layers = sample.probes(), [int(layer) for layer in np.flatnonzero(sample.compressible)]
    found: dict[str, Float] = {
        "attention": far_attention(probes.attention, sink, window),
        "gain": gain_importance(probes.gain, probes.gain_own),
    }
    missing = {}
    spans = sample.evidence_spans
    if not spans:
        missing["reasoning"] = "names no evidence"
    elif not answered_right(probes):
        missing["reasoning"] = "answered wrong"
    else:
        found["reasoning"] = reasoning_importance(probes, spans)
    n_kv = sample.capture.model.n_kv_heads
    measures = {
        name: {"heads": rows[layers].tolist(), "kv_heads": _grouped(rows[layers], n_kv)} for name, rows in found.items()
    }
    return {"sample": sample.id, "layers": layers, "measures": measures, "missing": missing}


def _grouped(values: Float, n_kv_heads: int) -> list[list[float]]:
    return values.reshape(len(values), n_kv_heads, -1).mean(-1).tolist()  # type: ignore[no-any-return]


def measure_captured(capture_path: str | Path, folder: Path, sink: int, window: int) -> dict[str, Any]:
    """Write the importances of all prompts with scored answer tokens to `folder`.

    Returns
    -------
    dict
        ``model``, ``data`` and ``cut``: what the comparison says of itself.

    Raises
    ------
    ConfigError
        Sink and window leave nothing of a prompt to cut, or the folder holds another run.
    DataError
        No prompt has scored answer tokens.
    """
    from kvtool.capture.reader import open_capture

    if sink < 0 or window < 0:
        raise ConfigError(f"importance: sink={sink} and window={window} must not be negative")
    cut = {"sink": sink, "window": window}
    with open_capture(capture_path) as capture:
        samples = [sample for sample in capture.samples if sample.n_probe and any(sample.compressible)]
        if not samples:
            raise DataError(
                f"capture {capture_path} has no prompt with scored answer tokens in layers that can be compressed; capture prompts "
                "whose answers have several tokens"
            )
        shortest = min(samples, key=lambda sample: sample.seq_len)
        if sink + window >= shortest.seq_len:
            raise ConfigError(
                f"importance: sink + window = {sink + window} leave nothing to cut of prompt {shortest.id} with {shortest.seq_len} "
                "tokens; make --window smaller"
            )
        data = {key: capture.config.get(key) for key in ("task", "n", "length", "seed")}
        data |= {
            "compress_at": samples[0].compress_at,
            "prompts": len(samples),
            "without_probes": len(capture.samples) - len(samples),
        }
        content = config_hash({"config": capture.config, "samples": [[s.id, s.seq_len] for s in capture.samples]})
        open_run(folder, {"capture": content, "model": asdict(capture.model), **cut}, {"capture": str(capture_path)})
        records = [captured_record(sample, sink, window) for sample in samples]
        model = asdict(capture.model)
    write_text(folder / CAPTURED, "".join(json.dumps(record) + "\n" for record in records))
    return {"model": model, "data": data, "cut": cut}


def check_measures(names: Sequence[str], ablated: bool) -> None:
    """Refuse to write a measure that there is not, or that this run does not make.

    Raises
    ------
    ConfigError
    """
    for name in names:
        if name not in MEASURES:
            raise ConfigError(f"no importance {name!r}.{near_matches(name, MEASURES)} Known: {', '.join(MEASURES)}")
        if name.startswith("ablation") and not ablated:
            raise ConfigError(f"importance {name!r} is measured by cutting heads: add --ablate")


def write_heads(capture_path: str | Path, importance_path: Path, measure: str, out: Path) -> int:
    """Classify a capture and write its ``heads.json`` with another importance, for policies that share budgets by it.

    Parameters
    ----------
    capture_path : path
    importance_path : Path
        ``importance.json`` of the comparison.
    measure : str
        One of its measures. Heads that it does not cover, and those that are better off without their entries, get 0.
    out : Path

    Returns
    -------
    int
        Heads (query and KV) whose importance was negative.

    Raises
    ------
    DataError
        The comparison is of another model, damaged, or has no such measure: no prompt counted.
    """
    from kvtool.classify.runner import run_classify

    try:
        value = json.loads(importance_path.read_text(encoding="utf-8"))
        known, tables = list(value["measures"]), value["importance"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{importance_path} is no comparison of importances ({error!r}); run kvtool analyze importance"
        ) from error
    if measure not in known:
        raise DataError(
            f"{importance_path} has no importance {measure!r} but {', '.join(known)}; see the notes in importance.md"
        )
    with tempfile.TemporaryDirectory() as folder:
        run_classify(capture_path, Path(folder) / "heads.json")
        heads = json.loads((Path(folder) / "heads.json").read_text(encoding="utf-8"))
    if heads["model"]["fingerprint"] != value["model"]["fingerprint"]:
        raise DataError(
            f"{importance_path} is of {value['model']['model_id']} ({value['model']['fingerprint']}), the capture of "
            f"{heads['model']['model_id']} ({heads['model']['fingerprint']}); run kvtool analyze importance again"
        )
    negative = 0
    for level in ("heads", "kv_heads"):
        found = {(row["layer"], row["head"]): row["mean"] for row in tables[level] if row["measure"] == measure}
        for head in heads[level]:
            score = found.get((head["layer"], head["head"]), 0.0)
            negative += score < 0
            head["importance"] = max(score, 0.0)
    if not any(head["importance"] for head in heads["kv_heads"]):
        raise DataError(
            f"{importance_path}: no head has a positive {measure}; budgets cannot be shared by it, take another measure"
        )
    heads["importance_measure"] = {
        "measure": measure,
        **value["cut"],
        "prompts": value["measures"][measure]["prompts"],
        "negative": negative,
    }
    write_json(out, heads)
    return negative
