"""Performance cliffs: where a method begins to lose, what its prompts could have shown, where to look closer, and why it falls."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from kvtool.analysis.families import family_name, family_of
from kvtool.analysis.points import FIGURES, NLL, Place, Point
from kvtool.analysis.resampling import change_interval
from kvtool.analysis.statistics import Interval

#: A loss against the full cache, relative to its score, that counts.
LOSS = 0.03


@dataclass(frozen=True, slots=True)
class Drop:
    """The fall of a curve between two neighbouring retentions.

    Attributes
    ----------
    above, below : float
        Retentions.
    loss : Interval
        Relative loss at `below` minus that at `above`, on the same prompts; of texts perplexity below / above - 1.
    """

    above: float
    below: float
    loss: Interval


@dataclass(frozen=True, slots=True)
class Reason:
    """What a capture says of the kept sets on either side of a fall.

    Attributes
    ----------
    evidence : tuple of float or None
        Share of the attention to the evidence that is kept, above and below; None where prompts name none.
    recall : tuple of float
        Share of the attention mass that is kept.
    missing : tuple of float
        The same mass, missing, weighted by how much the answer hangs on the head.
    """

    evidence: tuple[float, float] | None
    recall: tuple[float, float]
    missing: tuple[float, float]

    def text(self) -> str:
        """Return the figures in one line, that of the larger fall first."""
        parts = [(self.recall[0] - self.recall[1], f"attention mass kept {_pair(self.recall)}")]
        if self.evidence is not None:
            parts.append((self.evidence[0] - self.evidence[1], f"attention to the evidence kept {_pair(self.evidence)}"))
        parts.append((self.missing[1] - self.missing[0], f"mass missing where it matters {_pair(self.missing)}"))
        return "; ".join(text for _, text in sorted(parts, key=lambda part: -part[0]))


@dataclass(frozen=True, slots=True)
class Cliff:
    """What the retentions of one method, or of a family with entries of its own, in one cell say of its cliff.

    Attributes
    ----------
    place : Place
    label, group, method : str
    figure : str
        Key of `kvtool.analysis.points.FIGURES`.
    curve : tuple of (Point, Interval)
        From high to low retention, with the relative loss.
    critical : float or None
        The first retention, from high to low, whose loss exceeds `LOSS` with an interval above 0; None: none does.
    safe : float or None
        The lowest retention tried above it, None if there is none; without a critical one, the lowest tried. Its loss did not
        show, which says no more than that it is below `shows`.
    shows : float or None
        The smallest loss that the prompts would have shown at `safe`, else at the highest retention; see `smallest_visible`.
    surely : tuple of (float or None, float or None)
        The bracket of `LOSS`: the highest retention whose whole interval is above it, and the lowest from which on all
        intervals are below it. None: no retention shows that.
    back : bool
        Some retention below the critical one does not lose: the curve is no cliff, or the figures are noisy.
    drop : Drop or None
        The largest fall between neighbours; None with fewer than two retentions, or where none falls.
    reason : Reason or None
        Of the fall between `safe` and `critical`, else of the largest drop.
    """

    place: Place
    label: str
    group: str
    method: str
    figure: str
    curve: tuple[tuple[Point, Interval], ...]
    critical: float | None
    safe: float | None
    back: bool
    drop: Drop | None
    shows: float | None = None
    surely: tuple[float | None, float | None] = (None, None)
    reason: Reason | None = None

    @property
    def held(self) -> Interval | None:
        """The loss at `safe`, with what it may be at the most."""
        return next((loss for point, loss in self.curve if asked(point) == self.safe), None)

    @property
    def right(self) -> float | None:
        """The share of prompts that the full cache answers, rounded, if scores are 0 or 1: losses are then counted in prompts."""
        shown = [p.values[self.figure] for p in (self.place.full, *(p for p, _ in self.curve)) if p is not None]
        known = [values[~np.isnan(values)] for values in shown]
        return round(float(known[0].mean()), 2) if all(np.isin(values, (0.0, 1.0)).all() for values in known) else None

    @property
    def bracket(self) -> tuple[float, float] | None:
        """Between which two retentions to look closer: (low, high); None where nothing falls."""
        if self.critical is not None:
            return self.critical, self.safe or 1.0
        return (self.drop.below, self.drop.above) if self.drop is not None and self.drop.loss.low > 0 else None

    def where(self) -> str:
        """Return the critical retention in words."""
        if self.critical is None:
            return "none seen" + ("" if self.safe is None else f" down to {self.at(self.safe)}")
        found = self.at(self.critical) if self.safe else f"at or above {self.at(self.critical)}"
        return found + (", no clear loss again below" if self.back else "")

    def at(self, retention: float | None) -> str:
        """Return a retention of the curve as it was asked for: a number of entries has its own number beside it."""
        point = next((point for point, _ in self.curve if asked(point) == retention), None)
        own = point is not None and point.entries and not (point.budget or "").endswith("%")
        return percent(retention) + (f" ({point.entries:.0f})" if own and point is not None else "")

    def between_words(self) -> str:
        """Return the bracket of `LOSS` in words."""
        lost, held = self.surely
        if lost is None and held is None:
            return "not shown"
        if held is None:
            return f"above {self.at(lost)}"
        return f"at or below {self.at(held)}" if lost is None else f"{self.at(lost)} to {self.at(held)}"


def percent(value: float | None) -> str:
    """Return a retention as policies take it."""
    return "-" if value is None else f"{100 * value:.4g}%"


def find_cliffs(place: Place, predicted: Mapping[str, Mapping[str, Any]] | None = None, least: float = LOSS) -> list[Cliff]:
    """Return one cliff per method that was run at several shares of the prompt, or with several numbers of entries of its own.

    Parameters
    ----------
    place : Place
    predicted : dict of str to dict, optional
        Policy text -> row of a simulation of the same cell, for the reason.
    least : float
        Relative loss that counts.
    """
    figure = place.figure()
    if figure is None:
        return []
    families: dict[str, list[Point]] = {}
    for point in (*place.points, *place.finer):
        if point.policy != "full" and point.retention is not None and not point.degenerate and point.status == "ok":
            families.setdefault(family_of(point), []).append(point)
    found = [_cliff(place, figure, points, predicted or {}, least) for points in families.values() if len(points) > 1]
    return [cliff for cliff in found if cliff is not None]


def _cliff(
    place: Place, figure: str, points: Sequence[Point], predicted: Mapping[str, Mapping[str, Any]], least: float
) -> Cliff | None:
    losses = [(point, place.loss(point, figure)) for point in sorted(points, key=asked, reverse=True)]
    curve = tuple((point, loss) for point, loss in losses if loss is not None)
    if len({asked(point) for point, _ in curve}) < 2:
        return None
    hit = next((i for i, (_, loss) in enumerate(curve) if counts(loss, least)), None)
    drop = _largest_drop(place, figure, [point for point, _ in curve])
    first, last = curve[0][0], curve[-1 if hit is None else max(0, hit - 1)][0]
    cliff = Cliff(
        place=place,
        label=family_name([point for point, _ in curve]),
        group=first.group,
        method=first.method,
        figure=figure,
        curve=curve,
        critical=None if hit is None else asked(curve[hit][0]),
        safe=None if hit == 0 else asked(last),
        back=hit is not None and any(not counts(loss, least) for _, loss in curve[hit + 1 :]),
        drop=drop,
        shows=smallest_visible(place, figure, last),
        surely=_surely(curve, least),
    )
    return _with_reason(cliff, predicted)


def _surely(curve: Sequence[tuple[Point, Interval]], least: float) -> tuple[float | None, float | None]:
    """Return the highest retention that surely loses more than `least`, and the lowest from which on all surely lose no more."""
    lost = next((asked(point) for point, loss in curve if loss.low > least), None)
    held = [asked(point) for point, _ in itertools.takewhile(lambda pair: pair[1].high <= least, curve)]
    return lost, held[-1] if held else None


def smallest_visible(place: Place, figure: str, point: Point) -> float | None:
    """Return the smallest loss that a place's prompts would have shown at a point: one whose interval lies above 0.

    Of scores that are 0 or 1: the fewest prompts that the full cache answers and the point does not, if it answers all others, over
    those that the full cache answers. Else what the interval of the paired difference reaches below the loss itself: with the
    same spread a larger one would have shown.

    Returns
    -------
    float or None
        A relative loss; None where there is no interval, or where losing everything would not have shown.
    """
    change, pair, full = place.versus(place.full, point, figure), place.pair(place.full, point, figure), place.full
    whole = None if full is None else place.mean(full, figure)
    if change is None or pair is None or whole is None or math.isnan(change.low):
        return None
    reach = change.mean - change.low
    if figure == NLL:
        return math.expm1(reach)
    if not whole.mean > 0:
        return None
    if all(np.isin(values, (0.0, 1.0)).all() for values in pair):
        return fewest_lost(len(pair[0]), int(pair[0].sum()))
    return reach / whole.mean


@lru_cache(maxsize=4096)
def fewest_lost(n: int, right: int) -> float | None:
    """Return the smallest share of the `right` of n prompts whose loss, with nothing else changed, has an interval above 0."""
    full = np.zeros(n)
    full[:right] = 1.0
    for lost in range(1, right + 1):
        values = full.copy()
        values[:lost] = 0.0
        if change_interval(full, values).low > 0:
            return lost / right
    return None


def counts(loss: Interval, least: float = LOSS) -> bool:
    """Return whether a loss exceeds `least` with an interval that excludes 0."""
    return loss.mean > least and loss.low > 0


def asked(point: Point) -> float:
    """Return the retention that was asked for; what was measured where entries were asked for."""
    if point.budget is not None and point.budget.endswith("%"):
        return float(point.budget.rstrip("%")) / 100
    return point.retention or 0.0


def _largest_drop(place: Place, figure: str, points: Sequence[Point]) -> Drop | None:
    found = []
    for above, below in itertools.pairwise(points):
        loss = place.fall(above, below, figure)
        if loss is not None and asked(above) > asked(below):
            found.append(Drop(asked(above), asked(below), loss))
    largest = max(found, key=lambda drop: drop.loss.mean, default=None)
    return largest if largest is not None and largest.loss.mean > 0 else None


def _with_reason(cliff: Cliff, predicted: Mapping[str, Mapping[str, Any]]) -> Cliff:
    if cliff.critical is not None and cliff.safe is not None:
        bracket = (cliff.critical, cliff.safe)
    elif cliff.drop is not None:
        bracket = (cliff.drop.below, cliff.drop.above)
    else:
        return cliff
    rows = [predicted.get(point.policy) for want in reversed(bracket) for point, _ in cliff.curve if asked(point) == want]
    known = [row for row in rows if row is not None and row.get("status") == "ok" and row.get("recall") is not None]
    if len(known) != 2:
        return cliff
    above, below = known
    lost = [row.get("evidence") for row in (above, below)]
    kept = None if lost[0] is None or lost[1] is None else (1 - float(lost[0]), 1 - float(lost[1]))
    recall, missing = ((float(above[key]), float(below[key])) for key in ("recall", "missing"))
    return dataclasses.replace(cliff, reason=Reason(kept, recall, missing))


def between(cliff: Cliff, n: int = 3) -> list[float]:
    """Return up to `n` retentions between the two where the curve falls, evenly on a logarithmic scale.

    Two that differ by less than one entry per head are one; none where the grid cannot be made finer, or where the policies take no share.
    """
    bracket = cliff.bracket
    if bracket is None or n < 1 or any(point.budget is None for point, _ in cliff.curve):
        return []
    low, high = bracket
    found: list[float] = []
    for step in range(1, n + 1):
        value = low * (high / low) ** (step / (n + 1))
        digits = max(0, 2 - math.floor(math.log10(100 * value)) - 1)
        rounded = round(100 * value, digits) / 100
        entries = {round(v * cliff.place.length) for v in (low, high, *found)}
        if low < rounded < high and round(rounded * cliff.place.length) not in entries:
            found.append(rounded)
    return found


def figure_name(cliff: Cliff) -> str:
    """Return what the losses are of, in words."""
    return FIGURES[cliff.figure][1]


def _pair(values: tuple[float, float]) -> str:
    return f"{values[0]:.2f} → {values[1]:.2f}"
