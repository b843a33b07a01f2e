"""What stands for evicted entries: representatives of blocks, merges into survivors, refitted values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvtool.errors import ConfigError

Kind = Literal["none", "slots", "mean", "weighted", "merge", "refit"]


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
        Added to a representative's logit: ``"none"``, ``"count"`` (log of the entries it stands for), ``"entropy"`` (of the
        weights), ``"auto"``: count for means, entropy for weighted ones.
    gate : float
        Blocks of a head whose logit variance over the last queries exceeds this get no representative: their slots
        go back to real entries. 0: no gate.
    """

    compensate: Kind = "none"
    block: str = "64"
    bias: Literal["auto", "none", "count", "entropy"] = "auto"
    gate: float = 0.0

    def __post_init__(self) -> None:
        if self.block != "full" and not (self.block.isdigit() and int(self.block) >= 1):
            raise ConfigError(f"block={self.block!r} must be a whole number of entries from 1 on, or 'full'")
        if self.gate < 0:
            raise ConfigError(f"gate={self.gate} must be at least 0")
        default = Compensation.__dataclass_fields__
        for name in ("block", "bias", "gate"):
            if not self.active and getattr(self, name) != default[name].default:
                raise ConfigError(f"{name}={getattr(self, name)} needs a compensation; add compensate=mean, say")

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

    def slots(self, n_kept: int, seq_len: int) -> int:
        """Return how many representatives stand for the entries that are evicted when `n_kept` of `seq_len` stay."""
        n_evicted = seq_len - n_kept
        if not self.takes_slots or n_evicted <= 0:
            return 0
        return 1 if self.block == "full" else -(-n_evicted // int(self.block))

    def minimum(self, protected: int, seq_len: int) -> int:
        """Return the smallest budget of a head that holds `protected` entries and the slots."""
        return protected + self.slots(protected, seq_len)

    def kept(self, entries: int, seq_len: int) -> int:
        """Return how many real entries a head with a budget of `entries` keeps: the most for which the slots fit."""
        if entries >= seq_len:
            return seq_len
        low, high = 0, entries
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if middle + self.slots(middle, seq_len) <= entries else (low, middle - 1)
        return low
