"""Families of policies: the same policy at several numbers of entries of its own, which a study names one by one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from kvtool.analysis.points import Point

#: Windows of a policy by head kind; where all are one, that one is its number of entries.
WINDOWS = ("positional", "mixed", "gathering", "base")


def family_of(point: Point) -> str:
    """Return what is the same for all members of a point's family: its policy without the number of entries."""
    return point.method if point.budget is not None else _without_window(point.method)


@lru_cache(maxsize=4096)
def _without_window(text: str) -> str:
    """Return a policy's text form with its windows taken out if they are all the same; else as it is."""
    from kvtool.policies import parse_policy

    policy = parse_policy(text)
    sizes = {getattr(policy.method, name, None) for name in WINDOWS}
    if len(sizes) > 1 or None in sizes:
        return text
    same = replace(policy, method=replace(policy.method, **dict.fromkeys(WINDOWS, 1)))
    return str(same)


def family_name(points: Sequence[Point]) -> str:
    """Return what a family is called: the one name of all its members, or theirs with ``*`` for what differs.

    ``ablation_c256_w16`` and ``ablation_c48_w16`` are ``ablation_c*_w16``. Names with little in common give way to the method.
    """
    labels = list(dict.fromkeys(point.label for point in points))
    # What was added to a family goes by its method's text form.
    named = [label for label in labels if label not in {point.method for point in points}] or labels
    if len(named) == 1:
        return named[0]
    start = _common(named)
    end = _common([label[len(start) :][::-1] for label in named])[::-1]
    # A number is replaced as a whole: 128 and 48 have no 8 in common.
    start, end = start.rstrip("0123456789."), end.lstrip("0123456789.")
    return f"{start}*{end}" if len(start) + len(end) >= 3 else points[0].method


def _common(labels: Sequence[str]) -> str:
    """Return what all begin with."""
    same = itertools.takewhile(lambda signs: len(set(signs)) == 1, zip(*labels, strict=False))
    return "".join(signs[0] for signs in same)
