"""What stands for evicted entries: representatives of blocks, merges into survivors, refitted values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvtool.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from kvtool.policies.base import LayerView
    from kvtool.policies.merging import Rule
    from kvtool.policies.representatives import Bias

Kind = Literal["none", "slots", "mean", "weighted", "merge", "refit"]

#: Last prompt queries whose attention and outputs a compensation may look at.
OBSERVED = 32

#: option -> the kinds that it says something about
USES: dict[str, tuple[str, ...]] = {
    "block": ("slots", "mean", "weighted"),
    "bias": ("mean", "weighted", "merge"),
    "gate": ("slots", "mean", "weighted"),
    "merge": ("merge",),
    "ridge": ("refit",),
}


@dataclass(frozen=True, slots=True)
class Compensation:
    """What a policy leaves behind for the entries it evicts; part of every policy, whatever its method.

    Attributes
    ----------
    compensate : str
        ``"none"``; ``"mean"`` / ``"weighted"``: each block of `block` consecutive evicted entries becomes one entry with
        the mean (attention-weighted mean) key and value; ``"slots"``: the slots of those entries are given up and stay
        empty (the control); ``"merge"``: evicted entries are averaged into the most similar survivor; ``"refit"``: the
        values of the survivors are refitted by ridge regression. The last two need no slots.
    block : str
        Evicted entries per representative, or ``"full"``: one for all.
    bias : str
        Added to the logit of a representative or merged entry: ``"none"``, ``"count"`` (log of the entries it stands for),
        ``"entropy"`` (of the weights), ``"auto"``: count for means, entropy for weighted ones, none for merges (as published).
    gate : float
        Heads whose statistic ``block_variance`` (of the logits within blocks, over the last queries) exceeds this get no
        representatives: their slots go back to real entries. 0: no gate.
    merge : str
        How entries are merged, see `kvtool.policies.merging`: ``"pivot"`` (LOOK-M), ``"weighted"`` (KVMerger-like),
        ``"values"`` (kvpress), ``"d2o"``, ``"cam"``.
    ridge : float
        Relative strength of the refit's regularisation, see `kvtool.policies.refit`.
    """

    compensate: Kind = "none"
    block: str = "64"
    bias: Literal["auto", "none", "count", "entropy"] = "auto"
    gate: float = 0.0
    merge: Literal["pivot", "weighted", "values", "d2o", "cam"] = "pivot"
    ridge: float = 0.01

    def __post_init__(self) -> None:
        if self.block != "full" and not (self.block.isdigit() and int(self.block) >= 1):
            raise ConfigError(f"block={self.block!r} must be a whole number of entries from 1 on, or 'full'")
        if not 0 <= self.gate < float("inf"):
            raise ConfigError(f"gate={self.gate} must be a number from 0 on")
        if not 0 < self.ridge < float("inf"):
            raise ConfigError(f"ridge={self.ridge} must be a number above 0")
        default = Compensation.__dataclass_fields__
        for name, kinds in USES.items():
            value = getattr(self, name)
            if value == default[name].default or self.compensate in kinds:
                continue
            if not self.active:
                raise ConfigError(f"{name}={value} needs a compensation; add compensate={kinds[-1]}, say")
            raise ConfigError(f"{name}={value} says nothing about compensate={self.compensate}; it is for {', '.join(kinds)}")
        if self.compensate == "merge" and self.merge == "cam" and self.bias in ("count", "entropy"):
            raise ConfigError(f"bias={self.bias} does not fit merge=cam: a spread value is not merged into one entry")

    @property
    def active(self) -> bool:
        """True if evicted entries leave anything behind."""
        return self.compensate != "none"

    @property
    def exact(self) -> bool:
        """True if the budget is used up: the control leaves its slots empty."""
        return self.compensate != "slots"

    @property
    def takes_slots(self) -> bool:
        """True if representatives take entries out of the budget."""
        return self.compensate in ("mean", "weighted", "slots")

    @property
    def rule(self) -> Rule:
        """Rule of ``compensate=merge``."""
        return self.merge

    @property
    def chosen_bias(self) -> Bias:
        """The bias, ``auto`` resolved."""
        if self.bias != "auto":
            return self.bias
        return {"mean": "count", "weighted": "entropy"}.get(self.compensate, "none")  # type: ignore[return-value]

    @property
    def block_size(self) -> int | None:
        """Entries per representative; None for ``full``."""
        return None if self.block == "full" else int(self.block)

    @property
    def gate_statistic(self) -> str:
        """Name of the statistic that the gate compares."""
        return f"block_variance/{self.block}"

    @property
    def weight_statistic(self) -> str | None:
        """Name of the statistic that weighs entries, if any."""
        weighs = self.compensate == "weighted" or (self.compensate == "merge" and self.merge == "cam")
        return f"window_mean/{OBSERVED}" if weighs else None

    @property
    def n_queries(self) -> int:
        """Last prompt queries to be held, for the refit."""
        return OBSERVED if self.compensate == "refit" else 0

    def needs(self) -> tuple[str, ...]:
        """Return the names of the statistics that are asked for beside those of the method."""
        gate = (self.gate_statistic,) if self.gate else ()
        return gate + ((self.weight_statistic,) if self.weight_statistic else ())

    def slots(self, n_kept: int, seq_len: int) -> int:
        """Return how many representatives stand for the entries that are evicted when `n_kept` of `seq_len` stay."""
        n_evicted = seq_len - n_kept
        if not self.takes_slots or n_evicted <= 0:
            return 0
        return 1 if self.block_size is None else -(-n_evicted // self.block_size)

    def minimum(self, protected: int, seq_len: int) -> int:
        """Return the smallest budget of a head that holds `protected` entries and the slots."""
        return protected + self.slots(protected, seq_len)

    def kept(self, entries: int, seq_len: int) -> int:
        """Return how many real entries a head with a budget of `entries` keeps: the most for which the slots fit.

        Kept entries and slots together then are exactly `entries`: one more kept entry frees at most one slot.
        """
        if entries >= seq_len:
            return seq_len
        low, high = 0, entries
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if middle + self.slots(middle, seq_len) <= entries else (low, middle - 1)
        return low

    def gated(self, view: LayerView) -> list[bool]:
        """Return per KV head whether the gate takes its representatives away; decided before any entry is selected."""
        if not self.gate:
            return [False] * view.n_kv_heads
        variance = self._per_head(view, self.gate_statistic)[:, 0]
        return [bool(v > self.gate) for v in variance.tolist()]

    def weights(self, view: LayerView) -> Tensor | None:
        """Return the observed attention to each position, mean over the group, ``[H, T]``; None if it is not needed."""
        return self._per_head(view, self.weight_statistic) if self.weight_statistic else None

    @staticmethod
    def _per_head(view: LayerView, name: str) -> Tensor:
        found = view.statistic(name)
        return found.view(view.n_kv_heads, -1, found.shape[-1]).mean(dim=1)
