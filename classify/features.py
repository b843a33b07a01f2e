"""Head features per prompt, from a capture.

Shapes: S prompts, L layers, Q query heads, H KV heads.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvtool.classify.importance import answered_right, reasoning_importance
from kvtool.errors import DataError

if TYPE_CHECKING:
    from kvtool.capture.reader import Capture, CapturedSample, Features

Float = NDArray[np.float64]

#: a key less than this far behind the query is local, in tokens
LOCAL = 32


@dataclass(frozen=True, slots=True)
class HeadTable:
    """Features of all heads on all prompts, each of shape (S, L, Q), the profile (S, L, Q, bins).

    Attributes
    ----------
    sink : ndarray
        Attention to the first 4 positions.
    local : ndarray
        Attention to the last `LOCAL` positions.
    far : ndarray
        The rest.
    entropy : ndarray
        Entropy over the logarithm of the visible keys, 0 ... 1.
    profile : ndarray
        Attention by distance; the bins' lower edges stand in the capture and in ``heads.json``.
    importance : ndarray
        Gain: mean over probe tokens of abs(sum over entries of the gain), how much the answer's margin hangs on the head.
    retrieval : ndarray or None
        Attention of the probe tokens to the evidence; None if no prompt names its evidence.
    far_entropy, offset_variance : ndarray or None
        Entropy of the far part over the logarithm of its keys; share of the variance that the distance alone explains.
    output, activity : ndarray or None
        Mean norm of the head's output; the same divided by the mean over the heads of its layer.
    content : ndarray or None
        Content-versus-slot score, -2 ... 2: above 0 the head follows tokens to other places, below 0 it stays with the places.
    induction, echo, copy : ndarray or None
        Scores on repeated random tokens: of the model, the same for every prompt.

    reasoning : ndarray or None
        HeadKV's retrieval-reasoning score, of prompts that name their evidence and are answered right; NaN for the others.

    The last ten are None where the capture does not hold them, NaN where they are undefined for a head on a prompt.
    """

    sink: Float
    local: Float
    far: Float
    entropy: Float
    profile: Float
    importance: Float
    retrieval: Float | None
    far_entropy: Float | None = None
    offset_variance: Float | None = None
    output: Float | None = None
    activity: Float | None = None
    content: Float | None = None
    induction: Float | None = None
    echo: Float | None = None
    copy: Float | None = None
    reasoning: Float | None = None

    @property
    def n_prompts(self) -> int:
        return len(self.sink)

    def grouped(self, n_kv_heads: int) -> HeadTable:
        """Return the features of the KV heads, ``(S, L, H)``: means over the query heads that share one."""

        def mean(values: Float | None) -> Float | None:
            if values is None:
                return None
            groups = values.reshape(*values.shape[:2], n_kv_heads, -1, *values.shape[3:])
            return nanmean(groups, 3)

        return HeadTable(**{f.name: mean(getattr(self, f.name)) for f in fields(self)})  # type: ignore[arg-type]

    def take(self, prompts: NDArray[np.int64]) -> HeadTable:
        """Return the same of some prompts only."""
        found: dict[str, Any] = {f.name: None if (v := getattr(self, f.name)) is None else v[prompts] for f in fields(self)}
        return HeadTable(**found)


def nanmean(values: Float, axis: int) -> Float:
    """Return the mean of what is defined; NaN where nothing is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.asarray(np.nanmean(values, axis=axis), dtype=np.float64)


def distance_edges(samples: list[CapturedSample]) -> list[int]:
    """Return the lower edges of the distance bins, in tokens.

    Raises
    ------
    DataError
        The prompts do not share them: their profiles cannot be averaged.
    """
    edges = {tuple(sample.features().edges.tolist()) for sample in samples}
    if len(edges) != 1:
        raise DataError(f"the capture's prompts have {len(edges)} different sets of distance bins; capture them with one set")
    return list(edges.pop())


@dataclass(slots=True)
class _Lists:
    """Features as they are read, one entry per prompt; a feature that any prompt lacks is left out."""

    found: dict[str, list[Float]] = field(default_factory=dict)

    def add(self, **values: NDArray[np.floating] | None) -> None:
        for name, value in values.items():
            if value is not None:
                self.found.setdefault(name, []).append(np.asarray(value, dtype=np.float64))

    def table(self, n_prompts: int) -> dict[str, Float | None]:
        whole = {name: np.stack(values) for name, values in self.found.items() if len(values) == n_prompts}
        return {f.name: whole.get(f.name) for f in fields(HeadTable)}


def head_table(samples: list[CapturedSample]) -> HeadTable:
    """Read the features of all prompts; their distance bins must be the same, see `distance_edges`."""
    lists, some_permuted = _Lists(), any(sample.features().content_follow is not None for sample in samples)
    for sample in samples:
        features, probes = sample.features(), sample.probes()
        sink, local, far = _masses(features)
        gains = np.abs(probes.gain.sum(-1) + probes.gain_own)
        gain = gains.mean(-1) if gains.shape[-1] else np.zeros(gains.shape[:-1])
        content, reasoning = np.full(sink.shape, np.nan), np.full(sink.shape, np.nan)
        if features.content_follow is not None and features.slot_follow is not None:
            content = np.asarray(features.content_follow - features.slot_follow, dtype=np.float64)
        output = features.head_output
        lists.add(
            sink=sink,
            local=local,
            far=far,
            entropy=features.entropy,
            profile=features.distance_profile,
            importance=gain,
            far_entropy=features.far_entropy,
            offset_variance=features.offset_variance,
            output=output,
            # All zero in a layer: nobody is more active than another.
            activity=None if output is None else output / np.maximum(output.mean(-1, keepdims=True), 1e-30),
            content=content if some_permuted else None,
        )
        spans = sample.evidence_spans
        if spans and probes.attention.shape[2]:
            lists.add(retrieval=probes.attention[..., sample.evidence_positions].sum(-1).mean(-1))
            if answered_right(probes):
                reasoning = reasoning_importance(probes, spans)
        lists.add(reasoning=reasoning)
    scores = samples[0].capture.repeats()
    for name in ("induction", "echo", "copy"):
        value = getattr(scores, name)
        if value is not None:
            lists.found[name] = [np.asarray(value, dtype=np.float64)] * len(samples)
    return HeadTable(**lists.table(len(samples)))  # type: ignore[arg-type]


def _masses(features: Features) -> tuple[Float, Float, Float]:
    """Return sink, local and far attention of one prompt, each ``(L, Q)``."""
    if features.masses is not None and np.isfinite(features.masses).all():
        sink, far, local = (features.masses[..., k].astype(np.float64) for k in range(3))
        return sink, local, far
    sink = features.sink_mass.astype(np.float64)
    local = features.distance_profile[..., np.asarray(features.edges) < LOCAL].sum(-1, dtype=np.float64)
    # Early rows can count one key as sink and as local: far is then 0, not negative.
    return sink, local, np.clip(1 - sink - local, 0, 1)


def missing_features(capture: Capture) -> dict[str, str]:
    """Return which features a capture cannot give, and why."""
    all_features = [sample.features() for sample in capture.samples]
    older = "the capture is of an older kvtool; capture again"
    missing = {
        name: older for name in ("far_entropy", "offset_variance", "output") if any(_lacks(f, name) for f in all_features)
    }
    if any(f.masses is None for f in all_features):
        missing["masses"] = f"{older}; until then keys near the beginning count as sink and as local"
    elif any(not np.isfinite(f.masses).all() for f in all_features if f.masses is not None):
        missing["masses"] = "some prompts are too short to tell sink, local and far keys apart; keys may count twice"
    asked = capture.config.get("permute")
    # The first ones were run permuted, all of them in captures of older versions.
    n_asked = len(all_features) if isinstance(asked, bool) or not asked else min(int(asked), len(all_features))
    without = sum(f.content_follow is None for f in all_features[:n_asked])
    if without:
        reason = older if asked is None else "captured with --permute 0" if not asked else "too short to permute"
        missing["content"] = f"{without} of {n_asked} prompts lack it ({reason})"
    if not any(sample.evidence_spans for sample in capture.samples):
        missing["retrieval"] = "the prompts name no evidence"
    return {**missing, **capture.repeats().skipped}


def _lacks(features: Features, name: str) -> bool:
    return getattr(features, {"output": "head_output"}.get(name, name)) is None
