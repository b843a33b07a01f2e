"""What a stress test measures: lengths and batches that double, policies, repeats; in an order that a later run finds again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvtool.errors import ConfigError
from kvtool.files import config_hash
from kvtool.policies.base import Policy
from kvtool.policies.text import method_key

if TYPE_CHECKING:
    from kvtool.models import ModelInfo

#: A bound that is never reached: doubling ends when memory does.
UNTIL_OOM = 1 << 40

#: Statuses after which a series of a policy ends.
FATAL = ("oom", "would not fit", "too long")


@dataclass(frozen=True, slots=True)
class StressConfig:
    """What a stress test does; with model, policies and device it decides its points.

    Attributes
    ----------
    model : str
        As the user named it.
    length : int
        Shortest prompt of the length series; the prompt of the batch series and of endless decoding.
    max_length, max_batch : int or None
        Where doubling ends at the latest; None: no such series.
    batch : int
        Sequences of the length series.
    n_new : int
        Timed decode steps of a run.
    repeats, warm_ups : int
        Timed runs of each point; untimed ones before them.
    endless, window : int
        Tokens of endless decoding, 0 for none; tokens per record of it.
    kernel : str
        See `kvtool.infer.kernels.KERNELS`.
    seed : int
        Of the prompts.
    graphs : bool
        Time decode steps with fixed shapes as well, replayed as CUDA graphs where there is CUDA.
    """

    model: str
    length: int = 512
    max_length: int | None = None
    batch: int = 1
    max_batch: int | None = None
    n_new: int = 32
    repeats: int = 3
    warm_ups: int = 1
    endless: int = 0
    window: int = 1000
    kernel: str = "auto"
    seed: int = 0
    graphs: bool = False

    def __post_init__(self) -> None:
        lows = {"length": 2, "batch": 1, "n_new": 2, "repeats": 1, "warm_ups": 0, "endless": 0, "window": 1, "seed": 0}
        for name, low in lows.items():
            if getattr(self, name) < low:
                raise ConfigError(f"stress: {name}={getattr(self, name)} must be at least {low}")
        for name, least in (("max_length", self.length), ("max_batch", self.batch)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"stress: {name}={value} is below the {least} that the series begins with")


@dataclass(frozen=True, slots=True)
class Run:
    """One timed run of one point.

    Attributes
    ----------
    series : str
        ``"length"`` or ``"batch"``: what doubles.
    policy : Policy
    again : bool
        The full cache measured once more, as the noise floor.
    length, batch, repeat : int
    """

    series: str
    policy: Policy
    again: bool
    length: int
    batch: int
    repeat: int

    @property
    def key(self) -> str:
        """Hash that names the record."""
        return config_hash({**self.point, "repeat": self.repeat})

    @property
    def point(self) -> dict[str, Any]:
        """What all repeats share."""
        facts = {"series": self.series, "policy": str(self.policy), "again": self.again}
        return {**facts, "length": self.length, "batch": self.batch}

    def blank(self, status: str, message: str | None) -> dict[str, Any]:
        """Return the record of a run without figures."""
        policy, length = self.policy, self.length
        return {
            "unit": self.key,
            **self.point,
            "repeat": self.repeat,
            "method": method_key(policy),
            "budget": None if policy.budget is None else str(policy.budget),
            "planned_entries": min(length, policy.asked(length)),
            "degenerate": policy.is_degenerate(length),
            "status": status,
            "message": message,
        }


def doubling(first: int, last: int) -> Iterator[int]:
    """Yield `first`, twice that, and so on up to `last`."""
    while first <= last:
        yield first
        first *= 2


def rounds(config: StressConfig, policies: Sequence[Policy]) -> Iterator[list[Run]]:
    """Yield the runs of each (series, length, batch, repeat), one per policy.

    The policies of a repeat follow each other closely, and each repeat begins with another one: drifts of the machine fall
    on all alike. A point that both series share is measured in the first one only.
    """
    measured = [(policy, False) for policy in policies] + [(policies[0], True)]
    points = [] if config.max_length is None else [("length", config.length, config.batch, config.max_length)]
    points += [] if config.max_batch is None else [("batch", config.length, config.batch, config.max_batch)]
    for series, length, batch, last in points:
        for size in doubling(length if series == "length" else batch, last):
            for repeat in range(config.repeats):
                turn = repeat % len(measured)
                at = (size, batch) if series == "length" else (length, size)
                yield [Run(series, policy, again, *at, repeat) for policy, again in measured[turn:] + measured[:turn]]


def with_full(policies: Sequence[Policy]) -> list[Policy]:
    """Return the policies without repetition, the full cache first."""
    return list(dict.fromkeys([Policy.parse("full"), *policies]))


def endless_policies(policies: Sequence[Policy]) -> list[Policy]:
    """Return the policies that can decode for ever: those that evict while decoding.

    Raises
    ------
    ConfigError
        None does.
    """
    able = [policy for policy in policies if policy.when.decode == "evict"]
    if not able:
        raise ConfigError(
            "endless decoding needs a policy that evicts while decoding; give one with decode=evict, such as "
            "-p streaming:budget=256,decode=evict,positions=cache"
        )
    return able


def too_long(info: ModelInfo, learned_positions: bool, n_tokens: int) -> str | None:
    """Return why a model cannot see that many tokens, or None. Rotary positions have no end; a learned table has."""
    if not learned_positions or n_tokens <= info.max_positions:
        return None
    more = " (shape:NAME,context=N makes its table longer)" if info.weights else ""
    return f"{n_tokens} tokens, and the model has learned positions for {info.max_positions}{more}"
