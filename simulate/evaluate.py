"""One captured sample under many policies: kept orders once per (scorer, selector), curves at all budgets together.

Shapes: N configurations, L layers, H KV heads, T positions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvtool.errors import ConfigError
from kvtool.policies import kept_counts
from kvtool.policies.base import Memo
from kvtool.policies.when import When
from kvtool.simulate.curves import CurveParts, ProbeTable, curve_parts, evidence_lost, join_parts, probe_table
from kvtool.simulate.representatives import Stand, floored_share, representative_sums, stand_of

if TYPE_CHECKING:
    from torch import Tensor

    from kvtool.capture.reader import CapturedSample
    from kvtool.policies import Policy
    from kvtool.policies.base import LayerView, Scorer, Selector

#: Statistics of one sample that are held at once, and orders that wait for its probes.
KNOWN_BYTES = 1 << 29
ORDER_BYTES = 1 << 28


@dataclass(frozen=True, slots=True)
class Prediction:
    """One policy on one sample; `message` tells why there are no figures.

    Attributes
    ----------
    entries : float
        Mean entries per KV head over the compressible layers.
    retention : float
        `entries` / prompt length.
    harm, margin_change, layer_harm, recall, head_harm, missing : float or None
        See `kvtool.simulate.curves.Curves`.
    evidence : float or None
        Share of the attention to the evidence that is lost, weighted by importance; None where the prompt names no evidence. An answer of
        one token loses none, as it has no harm: it is predicted before anything is dropped.
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
    head_harm: float | None = None
    missing: float | None = None
    evidence: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        # Flat: `dataclasses.asdict` would copy every number, for a hundred thousand predictions of a large search.
        return {f.name: getattr(self, f.name) for f in fields(self)}


def sample_table(sample: CapturedSample) -> ProbeTable:
    """Lay out the probes of the sample's compressible layers."""
    probes, layers = sample.probes(), np.flatnonzero(sample.compressible)
    views = sample.views()
    n_kv_heads = views[0].n_kv_heads if views else 1
    return probe_table(
        probes.attention[layers], probes.gain[layers], probes.attention_own[layers], probes.gain_own[layers], n_kv_heads
    )


def layer_table(sample: CapturedSample, view: LayerView) -> ProbeTable:
    """Lay out the probes of one layer; nothing of the others is read."""
    attention, gain, attention_own, gain_own = (array[None] for array in sample.layer_probes(view.layer))
    return probe_table(attention, gain, attention_own, gain_own, view.n_kv_heads)


@dataclass(frozen=True, slots=True)
class KnownView:
    """A view whose statistics are read once per sample, as long as `KNOWN_BYTES` of them have room.

    Attributes
    ----------
    view : LayerView
    known : dict
        Shared by the sample's views: (layer, statistic) -> tensor, oldest first. Nobody writes into these tensors.
    """

    view: LayerView
    known: dict[tuple[int, str], Tensor] = field(repr=False, compare=False)

    @property
    def layer(self) -> int:
        return self.view.layer

    @property
    def n_layers(self) -> int:
        return self.view.n_layers

    @property
    def n_heads(self) -> int:
        return self.view.n_heads

    @property
    def n_kv_heads(self) -> int:
        return self.view.n_kv_heads

    @property
    def seq_len(self) -> int:
        return self.view.seq_len

    @property
    def seed(self) -> int:
        return self.view.seed

    def statistic(self, name: str) -> Tensor:
        """Return a selection statistic, see `kvtool.capture.reader.CapturedView.statistic`."""
        found = self.known.get((self.layer, name))
        if found is None:
            found = self.known[self.layer, name] = self.view.statistic(name)
            while len(self.known) > 1 and sum(t.nbytes for t in self.known.values()) > KNOWN_BYTES:
                del self.known[next(iter(self.known))]
        return found


@dataclass(slots=True)
class _Group:
    """Configurations that share one order per head.

    Attributes
    ----------
    members : list of (int, Policy)
    counts : ndarray of shape (N, L, H)
    orders : ndarray of shape (L, H, T)
        In the smallest type that holds a position.
    stands : dict of int to Stand
    parts : list of CurveParts
        Of the layers so far.
    lost : ndarray of shape (N,)
        Attention to the evidence that is lost in the layers so far.
    """

    members: list[tuple[int, Policy]]
    counts: NDArray[np.int64]
    orders: NDArray[np.integer[Any]]
    stands: dict[int, Stand]
    parts: list[CurveParts] = field(default_factory=list)
    lost: NDArray[np.float64] | float = 0.0


def evaluate_sample(sample: CapturedSample, policies: Sequence[Policy]) -> list[Prediction]:
    """Predict every policy on one sample.

    Orders and budgets come first, as some allocators look at all layers; then the probes pass layer by layer, and only one layer's
    are ever held.

    Parameters
    ----------
    sample : CapturedSample
    policies : sequence of Policy

    Returns
    -------
    list of Prediction
        In the order of `policies`.
    """
    known: dict[tuple[int, str], Tensor] = {}
    views = [KnownView(view, known) for view in sample.views()]
    if not views:
        return [_untouched(sample, policy) for policy in policies]
    groups: dict[tuple[Scorer, Selector], list[int]] = defaultdict(list)
    for index, policy in enumerate(policies):
        parts = policy.method.parts()
        groups[parts.scorer, parts.selector].append(index)
    found: dict[int, Prediction] = {}
    waiting: list[_Group] = []
    # Facts of the views alone serve all groups.
    facts: dict[Any, Any] = {}
    for members in groups.values():
        group, impossible = _prepare(sample, views, [(i, policies[i]) for i in members], facts)
        found |= impossible
        waiting += [group] if group is not None else []
        if sum(each.orders.nbytes for each in waiting) > ORDER_BYTES:
            found |= _predict(sample, views, waiting)
            waiting = []
    found |= _predict(sample, views, waiting)
    return [found[i] for i in range(len(policies))]


def _untouched(sample: CapturedSample, policy: Policy) -> Prediction:
    """No layer can be compressed at this length: only the full cache has figures, as in a real run."""
    if policy.method.keeps_all:
        return Prediction(sample.seq_len, 1.0, 0.0, 0.0, 0.0, 1.0, head_harm=0.0, missing=0.0, note=_quantized_note(policy))
    message = (
        f"policy {policy}: every layer has a sliding window shorter than the {sample.seq_len} tokens; nothing can be compressed"
    )
    return Prediction(sample.seq_len, 1.0, message=message)


def _prepare(
    sample: CapturedSample, views: Sequence[LayerView], members: list[tuple[int, Policy]], facts: dict[Any, Any]
) -> tuple[_Group | None, dict[int, Prediction]]:
    """Score and rank once, and share out every budget; what is impossible is predicted already."""
    seq_len, found, counts, ready = sample.seq_len, {}, [], []
    parts = members[0][1].method.parts()
    scores, memo = [parts.scorer.score(view) for view in views], Memo(facts)
    for index, policy in members:
        if policy.when.chunk:
            asked = policy.asked(seq_len)
            found[index] = Prediction(asked, asked / seq_len, message=_NO_CHUNKS.format(policy=policy))
            continue
        try:
            counts.append(kept_counts(policy, views, scores, memo))
        except ConfigError as error:
            asked = policy.asked(seq_len)
            found[index] = Prediction(asked, asked / seq_len, degenerate=True, message=str(error))
            continue
        ready.append((index, policy))
    if not ready:
        return None, found
    small = np.uint16 if seq_len <= 1 << 16 else np.int32
    orders = np.stack([parts.selector.order(score).numpy().astype(small) for score in scores])
    stands = {k: stand for k, (_, policy) in enumerate(ready) if (stand := stand_of(policy, views)) is not None}
    return _Group(ready, np.asarray(counts, dtype=np.int64), orders, stands), found


def _predict(sample: CapturedSample, views: Sequence[LayerView], groups: list[_Group]) -> dict[int, Prediction]:
    """Let the probes of one layer after the other pass by all groups."""
    if not groups:
        return {}
    floored, evidence, attended = [], sample.evidence_positions, 0.0
    for row, view in enumerate(views):
        table = layer_table(sample, view)
        floored.append(floored_share(table))
        for group in groups:
            orders, counts = group.orders[row : row + 1].astype(np.int64), group.counts[:, row : row + 1]
            stands = {k: stand.layer(row) for k, stand in group.stands.items()}
            added = representative_sums(table, orders, counts, stands) if stands else None
            group.parts.append(curve_parts(table, orders, counts, added))
            lost, whole = evidence_lost(table, evidence, orders, counts)
            group.lost = group.lost + lost
        attended += whole
    share = float(np.mean(floored))
    found: dict[int, Prediction] = {}
    for group in groups:
        found |= _figures(sample, group, share, attended)
    return found


def _figures(sample: CapturedSample, group: _Group, floored: float, attended: float) -> dict[int, Prediction]:
    result, means, found, seq_len = join_parts(group.parts), group.counts.mean(axis=(1, 2)), {}, sample.seq_len
    # Without a figure of one prompt the evidence of all would not count.
    untouched = 0.0 if len(sample.evidence_positions) and not sample.n_probe else None
    for k, (index, policy) in enumerate(group.members):
        entries = float(means[k]) + (_mean_slots(policy, group.counts[k], group.stands[k]) if k in group.stands else 0.0)
        found[index] = Prediction(
            entries=entries,
            retention=entries / seq_len,
            harm=float(result.harm[k]),
            margin_change=float(result.margin_change[k]),
            layer_harm=float(result.layer_harm[k]),
            recall=float(result.recall[k]),
            head_harm=float(result.head_harm[k]),
            missing=float(result.missing[k]),
            evidence=float(np.asarray(group.lost)[k]) / attended if attended > 0 else untouched,
            degenerate=policy.is_degenerate(seq_len),
            note=_note(policy, floored),
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


def _note(policy: Policy, floored: float) -> str | None:
    """Say what the figures leave out: of quantization, of a compensation, and of what happens while decoding."""
    notes = [_quantized_note(policy), _left_out(policy, floored)]
    return "; ".join(filter(None, notes)) or None


def _quantized_note(policy: Policy) -> str | None:
    if not policy.quant.active:
        return None
    return f"predicted as if nothing were quantized: what {policy.quant.quant} costs shows when the configuration is run"


def _left_out(policy: Policy, floored: float) -> str | None:
    if policy.when != When():
        return "predicted as what it keeps of the prompt: what happens while decoding shows when the configuration is run"
    kind = policy.compensation.compensate
    if kind in ("merge", "refit"):
        return (
            f"predicted as its kept entries alone: what {kind} changes in them shows when the configuration is refined or run"
        )
    if kind in ("mean", "weighted") and floored:
        return f"{floored:.1%} of the captured attention is below the file's precision and taken as its smallest number"
    return None
