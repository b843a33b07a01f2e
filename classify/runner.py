"""The classify stage: a capture in, heads.json out."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvtool.classify.confidence import (
    MIN_CHECKED,
    MIN_PROMPTS,
    SPLIT_DRAWS,
    SPLITS,
    SURE_FROM,
    Reliability,
    bootstrap_confidence,
    calibrate,
    reliability,
    split_pairs,
)
from kvtool.classify.conformal import ALPHA, Coverage, KindSets, set_coverage, split_sets
from kvtool.classify.features import HeadTable, distance_edges, head_table, missing_features, nanmean
from kvtool.classify.kinds import (
    DECIDING,
    GATHERING_TO,
    INACTIVE_BELOW,
    KINDS,
    POSITIONAL_FROM,
    RETRIEVAL_FROM,
    SINK_FROM,
    Float,
    Int,
    kinds_of_all,
    weighted_means,
)
from kvtool.classify.stability import Against, Clusters, Halves, against, clusters, halves
from kvtool.errors import ConfigError, DataError
from kvtool.files import write_json

if TYPE_CHECKING:
    from kvtool.capture.reader import Capture

SCHEMA = "kvtool.heads/1"
FIGURES = (
    "sink", "local", "far", "entropy", "far_entropy", "offset_variance", "output", "activity", "content", "induction", "echo", "copy",
    "importance", "gain", "retrieval", "reasoning",
)  # fmt: skip
#: what the importance of a head can be
IMPORTANCES = ("auto", "reasoning", "gain")


@dataclass(frozen=True, slots=True)
class HeadLabels:
    """Labels of one kind of heads (query or KV) and what they are worth.

    Attributes
    ----------
    kinds : ndarray of shape (L, Q)
        Index into `KINDS`.
    raw, confidence : ndarray of shape (L, Q) or None
        Share of the bootstrap; the same calibrated, where calibration was needed. None with too few prompts.
    sets : KindSets or None
    reliability : Reliability or None
    coverage : Coverage or None
    halves : Halves or None
    """

    kinds: Int
    raw: Float | None
    confidence: Float | None
    sets: KindSets | None
    reliability: Reliability | None
    coverage: Coverage | None
    halves: Halves | None

    def reading(self, layer: int, head: int) -> str | None:
        """Return how to take a label: ``clear``, ``unsure``, ``mixed`` or ``novel``; None without a confidence.

        ``unsure``: other prompts of the same sort may well give another kind. ``mixed``: surely in between, or positional on some prompts
        and gathering on others. ``novel``: no kind is shown often enough for the head's prediction set.
        """
        if self.confidence is None:
            return None
        if self.confidence[layer, head] < SURE_FROM:
            return "unsure"
        members = None if self.sets is None else self.sets.names(layer, head)
        if members == []:
            return "novel"
        if KINDS[self.kinds[layer, head]] == "mixed" or {"positional", "gathering"} <= set(members or ()):
            return "mixed"
        return "clear"


@dataclass(frozen=True, slots=True)
class ClassifySummary:
    """What a classification found.

    Attributes
    ----------
    path : Path
    n_prompts : int
    counts : dict of str to int
        Heads per kind.
    readings : dict of str to int or None
        Heads per reading; None with too few prompts for a confidence.
    top : tuple of dict
        The most important heads.
    reliability : Reliability or None
    coverage : Coverage or None
    halves : Halves or None
    against : tuple of Against
    clusters : Clusters or None
    missing : dict of str to str
        Features that the capture does not give, and why.
    files : tuple of Path
        Reliability diagram and its figures, where there is one.
    importance : str
        What the heads' importance is, ``"reasoning"`` or ``"gain"``.
    n_importance : int
        Prompts that it is a mean of.
    """

    path: Path
    n_prompts: int
    counts: dict[str, int]
    readings: dict[str, int] | None
    top: tuple[dict[str, Any], ...]
    reliability: Reliability | None
    coverage: Coverage | None
    halves: Halves | None
    against: tuple[Against, ...]
    clusters: Clusters | None
    missing: dict[str, str]
    files: tuple[Path, ...]
    importance: str
    n_importance: int

    def text(self) -> str:
        """Return what the command prints."""
        from kvtool.classify.describe import summary_text

        return summary_text(self)


def run_classify(
    capture_path: str | Path,
    out: str | Path,
    seed: int = 0,
    draws: int = 500,
    others: Sequence[str | Path] = (),
    importance: str = "auto",
) -> ClassifySummary:
    """Classify the heads of a captured model and write ``heads.json``: query heads, and KV heads from their group's means.

    Parameters
    ----------
    capture_path, out : path
    seed : int
        Of the bootstrap and of the splits of prompts.
    draws : int
        Of the bootstrap.
    others : sequence of path
        Captures of the same model on other prompts, whose labels are compared.
    importance : str
        What ``importance`` in the file is: ``"reasoning"`` (HeadKV's score), ``"gain"``, or ``"auto"``: the first where the
        capture can give it.

    Raises
    ------
    ConfigError
        `draws` below 1, or an unknown importance.
    DataError
        Missing, damaged or empty capture, or captures of different models.
    """
    from kvtool.capture.reader import open_capture

    _check_options(draws, importance)
    with open_capture(capture_path) as capture:
        samples = list(capture.samples)
        edges, table = distance_edges(samples), head_table(samples)
        grouped = table.grouped(capture.model.n_kv_heads)
        labels, kv_labels = (label_heads(t, seed, draws) for t in (table, grouped))
        compared = tuple(_against(capture, labels.kinds, path) for path in others)
        missing = missing_features(capture)
        found = clusters(table, labels.kinds, seed)
        measure, n_measured = choose_importance(table, importance, capture_path)
        heads = describe_heads(table, labels, measure)
        value = {
            "schema": SCHEMA,
            **_provenance(capture, seed, draws),
            **{name: getattr(capture.model, name) for name in ("n_layers", "n_heads", "n_kv_heads")},
            "distance_edges": edges,
            "missing": missing,
            "quality": {"heads": _quality(labels), "kv_heads": _quality(kv_labels)},
            "clusters": None if found is None else asdict(found),
            "against": [asdict(a) for a in compared],
            "importance_measure": {"measure": measure, "prompts": n_measured},
            "heads": heads,
            "kv_heads": describe_heads(grouped, kv_labels, measure),
        }
    path = Path(out)
    write_json(path, value)
    judged = {"query heads": labels.reliability, "KV heads": kv_labels.reliability}
    return ClassifySummary(
        path=path,
        n_prompts=table.n_prompts,
        counts={kind: sum(h["kind"] == kind for h in heads) for kind in KINDS},
        readings=None if labels.confidence is None else _count([str(h["reading"]) for h in heads]),
        top=tuple(sorted(heads, key=lambda h: -h["importance"])[:10]),
        reliability=labels.reliability,
        coverage=labels.coverage,
        halves=labels.halves,
        against=compared,
        clusters=found,
        missing=missing,
        files=_diagram(path, {name: r for name, r in judged.items() if r is not None}),
        importance=measure,
        n_importance=n_measured,
    )


def _check_options(draws: int, importance: str) -> None:
    if draws < 1:
        raise ConfigError(f"classify: draws={draws} must be at least 1")
    if importance not in IMPORTANCES:
        raise ConfigError(f"classify: no importance {importance!r}; choose {', '.join(IMPORTANCES)}")


def label_heads(table: HeadTable, seed: int, draws: int = 500, splits: int = SPLITS) -> HeadLabels:
    """Classify heads and judge the labels; every random choice follows from `seed`, the same for query and KV heads."""
    kinds, raw = kinds_of_all(table), bootstrap_confidence(table, np.random.default_rng([seed, 0]), draws)
    confidence, judged = raw, None
    pairs = split_pairs(table, np.random.default_rng([seed, 1]), splits, SPLIT_DRAWS)
    if pairs is not None and raw is not None:
        judged, _ = reliability(pairs, table.n_prompts // 2, np.random.default_rng([seed, 2]))
        confidence = calibrate(pairs, raw) if judged.calibrated else raw
    return HeadLabels(
        kinds,
        raw,
        confidence,
        split_sets(table, np.random.default_rng([seed, 3])),
        judged,
        set_coverage(table, np.random.default_rng([seed, 4]), splits),
        halves(table, np.random.default_rng([seed, 5]), splits),
    )


def _against(capture: Capture, kinds: Int, path: str | Path) -> Against:
    from kvtool.capture.reader import open_capture

    with open_capture(path) as other:
        if other.model.fingerprint != capture.model.fingerprint:
            raise DataError(
                f"capture {path} is of {other.model.model_id} ({other.model.fingerprint}), {capture.path} of "
                f"{capture.model.model_id} ({capture.model.fingerprint}); compare captures of one model"
            )
        there = kinds_of_all(head_table(list(other.samples)))
        ids = tuple([tuple(sample.prompt_ids) for sample in c.samples] for c in (capture, other))
        return against(str(path), kinds, there, (capture.config, other.config), (ids[0], ids[1]))


def _provenance(capture: Capture, seed: int, draws: int) -> dict[str, Any]:
    """Return model, data, seed and versions: what the labels hang on."""
    from importlib.metadata import version

    config = capture.config
    keys = ("task", "length", "seed", "compress_at", "prompts", "permute")
    names = ("kvtool", "numpy", "scikit-learn")
    return {
        "model": asdict(capture.model),
        "data": {"n": len(capture.samples), **{key: config.get(key) for key in keys}},
        "bootstrap": {"seed": seed, "draws": draws, "splits": SPLITS, "split_draws": SPLIT_DRAWS},
        "thresholds": {
            "sink_from": SINK_FROM,
            "positional_from": POSITIONAL_FROM,
            "gathering_to": GATHERING_TO,
            "retrieval_from": RETRIEVAL_FROM,
            "inactive_below": INACTIVE_BELOW,
            "sure_from": SURE_FROM,
            "alpha": ALPHA,
        },
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in names},
            "capture": capture.versions,
        },
    }


def _quality(labels: HeadLabels) -> dict[str, Any]:
    """Return what is known of the labels' worth; None where there are too few prompts to tell."""
    parts = {"reliability": labels.reliability, "coverage": labels.coverage, "halves": labels.halves}
    return {name: None if part is None else asdict(part) for name, part in parts.items()} | {
        "min_prompts": {"confidence": MIN_PROMPTS, "reliability": MIN_CHECKED, "coverage": 12}
    }


def choose_importance(table: HeadTable, asked: str, path: str | Path) -> tuple[str, int]:
    """Return the measure of importance, and the prompts that it is a mean of.

    HeadKV's score comes first: budgets shared by it keep more answers than by gain (``benchmarks/results/optimal.md``). It needs prompts
    that name their evidence and that the model answers right.

    Raises
    ------
    DataError
        HeadKV's score was asked for and no prompt gives it.
    """
    scored = np.zeros(table.n_prompts, dtype=bool) if table.reasoning is None else np.isfinite(table.reasoning).all((1, 2))
    if table.reasoning is not None and scored.any() and table.reasoning[scored].any() and asked != "gain":
        return "reasoning", int(scored.sum())
    if asked == "reasoning":
        raise DataError(
            f"capture {path} cannot give HeadKV's score: no prompt names its evidence and is answered right; capture needle prompts "
            "(-t niah), or take --importance gain"
        )
    return "gain", table.n_prompts


def describe_heads(table: HeadTable, labels: HeadLabels, measure: str = "gain") -> list[dict[str, Any]]:
    """Return one record per head, as in ``heads.json``; `measure` is what its importance is."""
    names = {**{name: name for name in FIGURES}, "gain": "importance"}
    means = {name: None if (v := getattr(table, field)) is None else nanmean(v, 0) for name, field in names.items()}
    if measure == "reasoning":
        means["importance"] = means["reasoning"]
    share = weighted_means(table, np.full(table.n_prompts, 1 / table.n_prompts)).positional_share
    profile = table.profile.mean(0)

    def figure(values: Float | None, layer: int, head: int) -> float | None:
        return None if values is None or math.isnan(values[layer, head]) else float(values[layer, head])

    heads = []
    for layer, head in np.ndindex(labels.kinds.shape):
        reading = labels.reading(layer, head)
        heads.append(
            {
                "layer": layer,
                "head": head,
                "kind": KINDS[int(labels.kinds[layer, head])],
                "confidence": figure(labels.confidence, layer, head),
                "confidence_raw": figure(labels.raw, layer, head),
                "unsure": None if reading is None else reading == "unsure",
                "reading": reading,
                "set": None if labels.sets is None else labels.sets.names(layer, head),
                **{name: figure(values, layer, head) for name, values in means.items()},
                "positional_share": float(share[layer, head]),
                "distance_profile": [round(float(x), 6) for x in profile[layer, head]],
            }
        )
    return heads


def _count(names: list[str]) -> dict[str, int]:
    return {name: names.count(name) for name in ("clear", "mixed", "novel", "unsure") if name in names}


def _diagram(path: Path, judged: dict[str, Reliability]) -> tuple[Path, ...]:
    """Write the reliability diagram and its figures beside ``heads.json``; nothing where there were too few prompts."""
    from kvtool.classify.plots import plot_reliability, write_reliability

    picture, figures = (path.with_name(f"{path.stem}_reliability.{end}") for end in ("png", "csv"))
    if not judged:
        # Of an earlier run with more prompts: they would be taken for this one's.
        for old in (picture, figures, picture.with_suffix(".svg"), picture.with_suffix(".pdf")):
            old.unlink(missing_ok=True)
        return ()
    plot_reliability(judged, picture)
    write_reliability(judged, figures)
    return picture, figures


__all__ = ["DECIDING", "FIGURES", "SCHEMA", "ClassifySummary", "HeadLabels", "describe_heads", "label_heads", "run_classify"]
