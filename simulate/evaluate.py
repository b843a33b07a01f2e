"""One captured sample under many policies: kept orders once per (scorer, selector), curves at all budgets together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvtool.errors import ConfigError
from kvtool.policies import kept_counts
from kvtool.policies.when import When
from kvtool.simulate.curves import ProbeTable, curves, probe_table
from kvtool.simulate.representatives import Stand, floored_share, representative_sums, stand_of

if TYPE_CHECKING:
    from kvtool.capture.reader import CapturedSample, CapturedView
    from kvtool.policies import Policy
    from kvtool.policies.base import Scorer, Selector


@dataclass(frozen=True, slots=True)
class Prediction:
    """One policy on one sample; `message` tells why there are no figures.

    Attributes
    ----------
    entries : float
        Mean entries per KV head over the compressible layers.
    retention : float
        `entries` / prompt length.
    harm, margin_change, layer_harm, recall : float or None
        See `kvtool.simulate.curves.Curves`.
    degenerate : bool
        Nothing is left to choose.
    message : str or None
    note : str or None
        What the figures leave out or take for granted.
    """

    entries: float
    retention: float
    harm: float | None = None
    margin_change: float | None = None
    layer_harm: float | None = None
    recall: float | None = None
    degenerate: bool = False
    message: str | None = None
    note: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


def sample_table(sample: CapturedSample) -> ProbeTable:
    """Lay out the probes of the sample's compressible layers."""
    probes, layers = sample.probes(), np.flatnonzero(sample.compressible)
    views = sample.views()
    n_kv_heads = views[0].n_kv_heads if views else 1
    return probe_table(
        probes.attention[layers], probes.gain[layers], probes.attention_own[layers], probes.gain_own[layers], n_kv_heads
    )


def evaluate_sample(sample: CapturedSample, policies: Sequence[Policy]) -> list[Prediction]:
    """Predict every policy on one sample.

    Parameters
    ----------
    sample : CapturedSample
    policies : sequence of Policy

    Returns
    -------
    list of Prediction
        In the order of `policies`.
    """
    views = sample.views()
    if not views:
        return [_untouched(sample, policy) for policy in policies]
    table = sample_table(sample)
    groups: dict[tuple[Scorer, Selector], list[int]] = defaultdict(list)
    for index, policy in enumerate(policies):
        parts = policy.method.parts()
        groups[parts.scorer, parts.selector].append(index)
    found: dict[int, Prediction] = {}
    for members in groups.values():
        found |= _evaluate_group(sample, views, table, [(i, policies[i]) for i in members])
    return [found[i] for i in range(len(policies))]


def _untouched(sample: CapturedSample, policy: Policy) -> Prediction:
    """No layer can be compressed at this length: only the full cache has figures, as in a real run."""
    if policy.method.keeps_all:
        return Prediction(sample.seq_len, 1.0, 0.0, 0.0, 0.0, 1.0)
    message = (
        f"policy {policy}: every layer has a sliding window shorter than the {sample.seq_len} tokens; nothing can be compressed"
    )
    return Prediction(sample.seq_len, 1.0, message=message)


def _evaluate_group(
    sample: CapturedSample, views: list[CapturedView], table: ProbeTable, members: list[tuple[int, Policy]]
) -> dict[int, Prediction]:
    seq_len, found, counts, ready = sample.seq_len, {}, [], []
    parts = members[0][1].method.parts()
    scores = [parts.scorer.score(view) for view in views]
    for index, policy in members:
        if policy.when.chunk:
            asked = policy.asked(seq_len)
            found[index] = Prediction(asked, asked / seq_len, message=_NO_CHUNKS.format(policy=policy))
            continue
        try:
            per_head = kept_counts(policy, views, scores)
        except ConfigError as error:
            asked = policy.asked(seq_len)
            found[index] = Prediction(asked, asked / seq_len, degenerate=True, message=str(error))
            continue
        counts.append(np.asarray(per_head, dtype=np.int64))
        ready.append((index, policy))
    if ready:
        orders = np.stack([parts.selector.order(score).numpy() for score in scores])
        stacked = np.stack(counts)
        stands = {k: stand for k, (_, policy) in enumerate(ready) if (stand := stand_of(policy, views)) is not None}
        added = representative_sums(table, orders, stacked, stands) if stands else None
        result = curves(table, orders, stacked, added)
        for k, (index, policy) in enumerate(ready):
            entries = float(stacked[k].mean()) + (_mean_slots(policy, stacked[k], stands[k]) if k in stands else 0.0)
            found[index] = Prediction(
                entries=entries,
                retention=entries / seq_len,
                harm=float(result.harm[k]),
                margin_change=float(result.margin_change[k]),
                layer_harm=float(result.layer_harm[k]),
                recall=float(result.recall[k]),
                degenerate=policy.is_degenerate(seq_len),
                note=_note(policy, table),
            )
    return found


_NO_CHUNKS = (
    "policy {policy}: a capture holds the statistics of the whole prompt, chunk= sees it in parts; run it with kvtool infer, or "
    "remove chunk="
)


def _mean_slots(policy: Policy, counts: NDArray[np.int64], stand: Stand) -> float:
    """Return the representatives per KV head of one configuration, mean over layers and heads."""
    slots = np.vectorize(lambda kept: policy.compensation.slots(int(kept), stand.seq_len))(counts)
    return float(np.where(stand.gated, 0, slots).mean())


def _note(policy: Policy, table: ProbeTable) -> str | None:
    """Say what the first-order figures leave out: of a compensation, and of what happens while decoding."""
    if policy.when != When():
        return "predicted as what it keeps of the prompt: what happens while decoding shows when the configuration is run"
    kind = policy.compensation.compensate
    if kind in ("merge", "refit"):
        return (
            f"predicted as its kept entries alone: what {kind} changes in them shows when the configuration is refined or run"
        )
    if kind in ("mean", "weighted") and (share := floored_share(table)):
        return f"{share:.1%} of the captured attention is below the file's precision and taken as its smallest number"
    return None
