"""Read the findings that a study wants judged."""

from __future__ import annotations

from kvtool.errors import near_matches
from kvtool.studies.located import Located, build
from kvtool.studies.schema import Direction, Study


def read_direction(found: Located, study: Study) -> Direction:
    """Read one direction.

    Raises
    ------
    ConfigError
        An unknown metric or policy, or a row of the study's own numbers that there is not.
    """
    from kvtool.studies.results import METRICS

    direction = build(Direction, found, "a direction")
    if direction.metric not in METRICS:
        near = near_matches(direction.metric, METRICS)
        raise found.error(f"a direction's metric is {direction.metric!r}.{near} Known: {', '.join(METRICS)}")
    labels = [choice.label for choice in study.policies]
    for label in (direction.better, direction.worse):
        if label not in labels:
            raise found.error(f"a direction names {label!r}, which is no policy of the study.{near_matches(label, labels)}")
    if direction.study is not None:
        _check_stands_for(found, direction, study.reference)
    return direction


def _check_stands_for(found: Located, direction: Direction, reference: str | None) -> None:
    """Refuse a direction that stands for anything but two labels of the study's own numbers."""
    from kvtool.studies.reference import read_reference

    if len(direction.study or ()) != 2:
        raise found.error(
            f"'study' of a direction has {len(direction.study or ())} labels; give two, of the better and of the worse"
        )
    if reference is None:
        raise found.error("'study' of a direction names labels of the study's own numbers; the study has no 'reference'")
    known = list(dict.fromkeys(r.label for r in read_reference(reference)[0]))
    for label in direction.study or ():
        if label not in known:
            raise found.error(
                f"'study' of a direction names {label!r}, which is no label of {reference}.{near_matches(label, known)}"
            )
