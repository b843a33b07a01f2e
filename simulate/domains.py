"""What one parameter of a search may be: a value, a list, or a range of whole or real numbers, and how that is written."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvtool.errors import ConfigError

Value = str | int | float | bool

NUMBER = r"[-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?%?"
RANGE = re.compile(rf"(?P<low>{NUMBER})\.\.(?P<high>{NUMBER})(?:\s+step\s+(?P<step>{NUMBER}))?")
GRAMMAR = "write a value, a list {a,b}, or a range: 1..9, 1..9 step 2, log(1..1000)"


@dataclass(frozen=True, slots=True)
class Domain:
    """What one parameter may be.

    Attributes
    ----------
    values : tuple
        The list, in order; empty for a range.
    low, high : float
        Ends of a range, both included.
    step : float or None
        None: real numbers.
    log : bool
        Drawn evenly in the logarithm.
    whole : bool
        Whole numbers.
    """

    values: tuple[Value, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    log: bool = False
    whole: bool = False

    @property
    def points(self) -> tuple[Value, ...] | None:
        """All values in order; None if there are infinitely many."""
        if self.values:
            return self.values
        if self.step is None:
            return None
        n = int((self.high - self.low) / self.step + 1e-9) + 1
        found = [self.low + i * self.step for i in range(n)]
        return tuple(int(v) if self.whole else _rounded(v) for v in found)

    @property
    def fixed(self) -> bool:
        """True if there is nothing to search."""
        return len(self.values) == 1

    def clean(self, value: Value) -> Value:
        """Return a proposed value as it is used: real numbers with four digits, so that the policy's text is the whole truth."""
        if self.values or self.whole:
            return value
        return min(max(_rounded(float(value)), self.low), self.high)

    def nearest(self, value: Value) -> Value:
        """Return the value of the domain that is closest to `value`; of a list of words its first one."""
        points = self.points
        if points is not None and value in points:
            return value
        if isinstance(value, str | bool) or (points is not None and isinstance(points[0], str | bool)):
            return points[0] if points else self.low
        if points is None:
            return min(max(float(value), self.low), self.high)
        return min(points, key=lambda p: abs(float(p) - float(value)))

    def __str__(self) -> str:
        if self.fixed:
            return value_text(self.values[0])
        if self.values:
            return "{" + ",".join(map(value_text, self.values)) + "}"
        ends = f"{value_text(self.low)}..{value_text(self.high)}"
        if self.log:
            return f"log({ends})"
        return ends if self.step is None or (self.whole and self.step == 1) else f"{ends} step {value_text(self.step)}"


def read_domain(text: str, key: str, value: str, hint: Any) -> Domain:
    """Read one domain.

    Parameters
    ----------
    text : str
        The whole space, for messages.
    key, value : str
    hint : type
        Of the parameter.

    Raises
    ------
    ConfigError
        It is not understood, or does not fit the type.
    """

    def wrong(why: str) -> ConfigError:
        return ConfigError(f"space {text!r}: {key}={value}: {why}; {GRAMMAR}")

    if value.startswith("{") != value.endswith("}") or value in ("{}", ""):
        raise wrong("the list is not closed or empty")
    if value.startswith("{"):
        return Domain(values=tuple(dict.fromkeys(_scalar(v.strip(), hint, wrong) for v in value[1:-1].split(","))))
    log = re.fullmatch(r"log\((.*)\)", value)
    match = RANGE.fullmatch(log[1].strip() if log else value)
    if match is None:
        if log or ".." in value:
            raise wrong("the range is not understood")
        return Domain(values=(_scalar(value, hint, wrong),))
    if hint not in (int, float):
        raise wrong("this parameter has no range, only a list of values")
    low, high = (_number(match[end]) for end in ("low", "high"))
    step = _number(match["step"]) if match["step"] else 1.0 if hint is int else None
    if not low < high or (log and low <= 0) or (step is not None and step <= 0):
        raise wrong("a range goes upwards, a logarithmic one from above 0, in steps above 0")
    if hint is int and any(v != int(v) for v in (low, high, step or 1.0)):
        raise wrong("whole numbers are needed")
    if log and match["step"]:
        raise wrong("a logarithmic range has no steps")
    if step is not None:
        high = low + step * int((high - low) / step + 1e-9)
    return Domain(low=low, high=high, step=step, log=bool(log), whole=hint is int)


def _scalar(text: str, hint: Any, wrong: Callable[[str], ConfigError]) -> Value:
    try:
        if hint is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if hint in (int, float):
            return int(text) if hint is int else _number(text)
    except ValueError as error:
        raise wrong(f"{text!r} is not a {'whole ' if hint is int else ''}number") from error
    return text


def _number(text: str) -> float:
    return float(text.removesuffix("%"))


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def value_text(value: Any) -> str:
    """Return a value as it is written in a space's text."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def domain_of(values: Sequence[Value], old: Domain) -> Domain:
    """Return a domain of these values: a range if they came from one and are evenly spaced."""
    gaps = {float(b) - float(a) for a, b in itertools.pairwise(values)} if old.whole and not old.log else set()
    if not old.values and len(values) > 2 and len(gaps) == 1:
        return dataclasses.replace(old, low=float(values[0]), high=float(values[-1]), step=gaps.pop())
    return Domain(values=tuple(values))
