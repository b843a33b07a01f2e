"""Cells whose prompts are the same: they are run once, and the others say whose result is theirs.

Samples of a fixed set are cut to a cell's length. Where no sample is as long as that, the cell's prompts are those of a shorter one, and
so are all results. What decides is the content of the prompts, which only the tokenizer tells: it is written into the node's folder when
they are built. A node is the twin of an earlier one if it does the same with the same prompts and what it works on are twins, too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtool.errors import KvtoolError
from kvtool.files import config_hash, write_json
from kvtool.studies.content import longest_allowed
from kvtool.studies.graph import Node
from kvtool.studies.state import Mark, mark_of, own_folder, same_as

if TYPE_CHECKING:
    from kvtool.data.tasks import Encoded

#: Prompts below this share of the length that was allowed are said to be shorter.
FULL_LENGTH = 0.99
#: What a node's prompts are, in its folder.
PROMPTS = "prompts.json"
#: Of the work of a node, what its prompts replace.
OF_PROMPTS = ("task", "length", "n", "seed", "beside", "files")


class TwinCell(KvtoolError):
    """A node's result is another one's, as its prompts are: a row, no failure."""


def is_cut(node: Node) -> bool:
    """Return whether a node's prompts are samples of a fixed set, cut to the cell's length."""
    return "limit=" in str(node.work.get("task")) and node.cell.length is not None


class Twins:
    """Which nodes of a study are the same.

    Parameters
    ----------
    out : Path
        Output folder of the study.
    nodes : sequence of Node
        All of them, in their order.
    """

    def __init__(self, out: Path, nodes: Sequence[Node]) -> None:
        self._out, self._nodes = out, list(nodes)
        self._found: dict[str, Mapping[str, Any]] = {}

    def note(self, node: Node, samples: Sequence[Encoded], notes: list[str]) -> None:
        """Keep what a node's prompts are.

        Raises
        ------
        TwinCell
            An earlier node has the same.
        """
        if not is_cut(node):
            return
        longest, asked = max(len(each.prompt_ids) for each in samples), int(node.work["length"])
        self._found[node.key] = facts = {"digest": prompts_digest(samples), "n": len(samples), "longest": longest}
        write_json(own_folder(self._out, node) / PROMPTS, facts)
        if longest < FULL_LENGTH * asked:
            notes.append(f"the longest prompt has {longest:,} tokens, {asked:,} were allowed")
        if (twin := self.twin_of(node)) is not None:
            raise TwinCell(self.why(node, twin))

    def foresee(self, node: Node, tokens: Mapping[str, int]) -> None:
        """Take into account which samples a node will have, told by their lengths; writes nothing.

        Parameters
        ----------
        tokens : mapping of str to int
            Sample -> its tokens before it is cut.
        """
        allowed = longest_allowed(node.work)
        assert allowed is not None
        cut = {name: n if n <= allowed else f"cut to {allowed}" for name, n in tokens.items()}
        longest = max(min(n, allowed) for n in tokens.values())
        self._found[node.key] = {"digest": config_hash({"samples": cut}), "longest": longest}

    def why(self, node: Node, twin: Node) -> str:
        """Return the sentence that a twin's row has."""
        facts = self._facts(node)
        tail = "" if facts is None else f": its longest prompt has {facts['longest']:,} tokens"
        return f"the same as {twin.title}{tail}"

    def twin_of(self, node: Node) -> Node | None:
        """Return the first node before this one that is the same; None if there is none, or nothing is known of the prompts yet."""
        if not self._cut_below(node):
            return None
        mine = self._identity(node)
        for other in self._nodes:
            if other.key == node.key:
                return None
            if _alike(other, node) and self._identity(other) == mine:
                return other
        return None

    def _identity(self, node: Node) -> str:
        """Hash of all that decides a node's result, with the content of the prompts in the place of how they were asked for."""
        work = dict(node.work)
        if is_cut(node):
            if (facts := self._facts(node)) is None:
                return node.key
            work = {key: value for key, value in work.items() if key not in OF_PROMPTS} | {"prompts": facts["digest"]}
        inputs = {role: self._identity(below) for role, below in node.inputs.items()}
        return config_hash({"kind": node.stage.kind, **work, "policies": node.policies, "inputs": inputs})

    def _cut_below(self, node: Node) -> bool:
        return is_cut(node) or any(self._cut_below(below) for below in node.inputs.values())

    def _facts(self, node: Node) -> Mapping[str, Any] | None:
        """Return what is known of a node's own prompts."""
        if node.key not in self._found and is_cut(node):
            try:
                self._found[node.key] = json.loads((own_folder(self._out, node) / PROMPTS).read_text(encoding="utf-8"))
            except (OSError, ValueError):
                return None
        return self._found.get(node.key)


class Marks(dict[str, Mark]):
    """What is known of a study's nodes, by their keys.

    Attributes
    ----------
    results : dict of str to Mark
        The same of the nodes whose results they have: of twins, those of the other one.
    """

    def __init__(self, out: Path, twins: Twins) -> None:
        super().__init__()
        self._out, self._twins = out, twins
        self.results: dict[str, Mark] = {}

    def __setitem__(self, key: str, mark: Mark) -> None:
        super().__setitem__(key, mark)
        self.results[key] = mark

    def look(self, node: Node) -> Mark:
        """Read what is known of a node; those that it works on have been looked at."""
        mark = mark_of(self._out, node, self.results)
        twin = None if mark.state == "done" else self._twins.twin_of(node)
        self[node.key] = mark = mark if twin is None else Mark("same", self._twins.why(node, twin))
        if twin is not None:
            self.results[node.key] = self.results[twin.key]
        return mark

    def point(self, node: Node) -> None:
        """Let a node's folder say whose result is its own, if it is another one's."""
        twin = self._twins.twin_of(node)
        same_as(self._out, node, None if self[node.key].state == "done" else twin)
        if twin is not None and self[node.key].state == "same":
            self.results[node.key] = self.results[twin.key]


def _alike(one: Node, other: Node) -> bool:
    """Whether two nodes are those of one stage, model and task at different lengths."""
    there, here = one.cell, other.cell
    same = (there.model.label, there.task, there.compress_at) == (here.model.label, here.task, here.compress_at)
    return same and one.stage.name == other.stage.name and there.length != here.length


def prompts_digest(samples: Sequence[Encoded]) -> str:
    """Return a hash of what is asked and what is right, token by token, sample by sample."""
    digest = hashlib.sha256()
    for each in samples:
        digest.update(
            json.dumps([each.sample.id, each.context_ids, each.question_ids, each.answer_ids, each.stop_ids]).encode()
        )
    return digest.hexdigest()[:16]
