"""Do labels stay: between halves of the prompts, between captures; and do heads form clusters at all?

Shapes: S prompts, L layers, Q heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvtool.classify.confidence import SPLIT_DRAWS, SURE_FROM, bootstrap_confidence
from kvtool.classify.features import HeadTable
from kvtool.classify.kinds import KINDS, Int, kinds_of_all, weighted_means

#: most components of the mixture
MOST_CLUSTERS = 6


@dataclass(frozen=True, slots=True)
class Halves:
    """Agreement of the labels of two disjoint halves of the prompts, over random splits.

    Attributes
    ----------
    n_splits, n_half : int
    ari, ari_low, ari_high : float
        Adjusted Rand index: mean, and the range of the middle 95 % of the splits.
    same : float
        Share of heads with the same label.
    sure : float or None
        Share of heads that both sets are sure of, each from its own prompts; None where sets are too small for a confidence.
    ari_sure : float or None
        Mean adjusted Rand index over those heads alone: what the labels are worth where the tool says that it knows.
    """

    n_splits: int
    n_half: int
    ari: float
    ari_low: float
    ari_high: float
    same: float
    sure: float | None
    ari_sure: float | None


def halves(
    table: HeadTable, rng: np.random.Generator, splits: int, size: int | None = None, draws: int = SPLIT_DRAWS
) -> Halves | None:
    """Compare the labels of two disjoint random sets of prompts, halves unless `size` says less; None with too few prompts."""
    n = table.n_prompts
    size = n // 2 if size is None else size
    if size < 1 or 2 * size > n:
        return None
    scores, same, sure, of_sure = [], [], [], []
    for _ in range(splits):
        order = rng.permutation(n)
        sets = [table.take(part) for part in (order[:size], order[size : 2 * size])]
        first, second = (kinds_of_all(each) for each in sets)
        scores.append(rand_index(first, second))
        same.append((first == second).mean())
        shares = [share for each in sets if (share := bootstrap_confidence(each, rng, draws)) is not None]
        if len(shares) == len(sets):
            known = np.min(shares, axis=0) >= SURE_FROM
            sure.append(known.mean())
            # Without a head that both know there is nothing to compare.
            of_sure += [rand_index(first[known], second[known])] if known.any() else []
    low, high = np.quantile(scores, [0.025, 0.975])
    return Halves(
        splits,
        size,
        float(np.mean(scores)),
        float(low),
        float(high),
        float(np.mean(same)),
        float(np.mean(sure)) if sure else None,
        float(np.mean(of_sure)) if of_sure else None,
    )


def rand_index(first: Int, second: Int) -> float:
    """Return the adjusted Rand index of two labelings of the same heads: 1 equal, 0 chance; two single clusters are equal."""
    from sklearn.metrics import adjusted_rand_score

    return float(adjusted_rand_score(first.flatten(), second.flatten()))


@dataclass(frozen=True, slots=True)
class Against:
    """Labels of another capture of the same model beside this one's.

    Attributes
    ----------
    path, task : str
    n : int
        Its prompts.
    differs : dict of str to tuple
        What was captured differently: name -> (here, there).
    n_shared : int
        Prompts that both hold; with any, the sets are not disjoint.
    ari, same : float
        Adjusted Rand index and share of heads with the same label.
    changed : tuple of dict
        Heads with another label: ``layer``, ``head``, ``here``, ``there``.
    """

    path: str
    task: str
    n: int
    differs: dict[str, tuple[Any, Any]]
    n_shared: int
    ari: float
    same: float
    changed: tuple[dict[str, Any], ...]


#: what makes two sets of prompts different in kind
DATA_KEYS = ("task", "length", "seed", "compress_at")


def against(
    path: str, here: Int, there: Int, configs: tuple[Mapping[str, Any], Mapping[str, Any]], ids: tuple[Any, Any]
) -> Against:
    """Compare the labels ``(L, Q)`` of two captures; `ids` are the prompts' token sequences of both."""
    changed = tuple(
        {"layer": layer, "head": head, "here": KINDS[here[layer, head]], "there": KINDS[there[layer, head]]}
        for layer, head in np.argwhere(here != there).tolist()
    )
    differs = {
        key: (configs[0].get(key), configs[1].get(key)) for key in DATA_KEYS if configs[0].get(key) != configs[1].get(key)
    }
    shared = len(set(ids[0]) & set(ids[1]))
    share = float((here == there).mean())
    return Against(path, str(configs[1].get("task")), len(ids[1]), differs, shared, rand_index(here, there), share, changed)


@dataclass(frozen=True, slots=True)
class Clusters:
    """Whether heads form clusters: Gaussian mixtures of their mean features, the number of components by BIC.

    Attributes
    ----------
    features : tuple of str
        Features of the mixture; shares are logit-transformed, all standardised.
    bic : tuple of float
        For 1, 2, ... components; the lowest is best.
    n_clusters : int
    ari : float
        Adjusted Rand index of the clusters and the kinds.
    """

    features: tuple[str, ...]
    bic: tuple[float, ...]
    n_clusters: int
    ari: float


def clusters(table: HeadTable, kinds: Int, seed: int) -> Clusters | None:
    """Fit mixtures to sink mass, positional share and, where they are known, activity and content score; None with few heads."""
    from sklearn.mixture import GaussianMixture
    from sklearn.preprocessing import StandardScaler

    means = weighted_means(table, np.full(table.n_prompts, 1 / table.n_prompts))
    columns = {"sink": _logit(means.sink), "positional share": _logit(means.positional_share)}
    if means.activity is not None:
        columns["log activity"] = np.log(np.maximum(means.activity, 1e-3))
    if means.content is not None and np.isfinite(means.content).all():
        columns["content"] = means.content
    points = StandardScaler().fit_transform(np.stack([c.flatten() for c in columns.values()], axis=1))
    most = min(MOST_CLUSTERS, len(points) // 5)
    if most < 1:
        return None
    fits = [
        GaussianMixture(k, covariance_type="diag", n_init=5, reg_covar=1e-3, random_state=seed).fit(points)
        for k in range(1, most + 1)
    ]
    bic = [float(fit.bic(points)) for fit in fits]
    best = int(np.argmin(bic))
    return Clusters(tuple(columns), tuple(bic), best + 1, rand_index(fits[best].predict(points), kinds))


def _logit(share: np.ndarray) -> np.ndarray:
    inside = np.clip(share, 0.001, 0.999)
    return np.asarray(np.log(inside / (1 - inside)))
