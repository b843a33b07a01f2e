"""Digests of a study's real runs and texts, made while their records are in hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kvtool.executors.records import read_units
from kvtool.studies.graph import Node, labels
from kvtool.studies.naming import named_as, of_method, without_heads
from kvtool.studies.schema import Study
from kvtool.studies.state import folder_of

if TYPE_CHECKING:
    from pathlib import Path

    from kvtool.analysis.points import Place

Records = list[dict[str, Any]]


class Look:
    """Digests the records of every real run while `collect` has them in hand."""

    def __init__(self, study: Study) -> None:
        self._named = labels(study)
        self.places: list[tuple[Node, Place]] = []

    def __call__(self, node: Node, records: Records, finer: Records) -> None:
        """Keep what the report needs of one node: its records, and those of retentions that were added where its curves fall.

        What was added to a method with one name is a point like the others. What was added to a family, whose members have names of
        their own, is for its cliff alone.
        """
        from kvtool.analysis.points import make_place

        alone = {text: len(of_method(without_heads(text, node), self._named)) == 1 for text in {r["policy"] for r in finer}}
        named = self._names(node, [*records, *finer])
        cell = node.cell
        place = make_place(
            [*records, *finer], cell.model.label, named, task=cell.task, length=cell.length, stage=node.stage.name
        )
        if place is not None:
            of_family = tuple(p for p in place.points if not alone.get(p.policy, True))
            others = tuple(p for p in place.points if alone.get(p.policy, True))
            self.places.append((node, replace(place, points=others, finer=of_family)))

    def texts(self, nodes: Sequence[Node], out: Path) -> tuple[Place, ...]:
        """Return the texts that were read, with the loss of each segment."""
        from kvtool.analysis.reading import text_place

        found = []
        for node in nodes:
            if node.stage.kind == "perplexity":
                records, cell = read_units(folder_of(out, node)), node.cell
                place = text_place(records, cell.model.label, self._names(node, records), str(cell.task), node.work["length"])
                found += [] if place is None else [place]
        return tuple(found)

    def _names(self, node: Node, records: Records) -> dict[str, tuple[str, str]]:
        """Return policy -> label and group."""
        named = {}
        for text in dict.fromkeys(record["policy"] for record in records):
            own = without_heads(text, node)
            # What was added where a curve falls goes by the name of its method.
            found = self._named.get(own) or named_as(own, self._named)
            if found:
                named[text] = (found[0].label, found[0].group)
        return named
