"""What is known of each node: marks in its folder, written whole or not at all. A kill at any moment loses nothing finished.

``node.json`` is written when a node is begun and says what it is; ``done.json`` when its result is complete; ``failed.json`` when it
cannot be had. A node whose result is complete is never run again; one that failed is tried once more by each run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtool.errors import DataError
from kvtool.files import write_json
from kvtool.studies.graph import Node

SCHEMA = "kvtool.node/1"
#: Results of the stages in a node's folder; simulate, refine and infer fill the folder itself.
CAPTURE, HEADS, REPORT, STRESS = "capture.h5", "heads.json", "report", "stress"
NODE, DONE, FAILED, SAME = "node.json", "done.json", "failed.json", "same.json"

#: State -> what it means; those of `BAD` make the run's exit code 1.
STATES = {
    "done": "its result is complete",
    "pending": "not begun",
    "begun": "begun and stopped; the same command continues",
    "partial": "this share is done, other shards have the rest",
    "waiting": "works on a node that is not complete yet, or another process is at it",
    "impossible": "cannot be measured, whatever one does",
    "skipped": "works on a node that is impossible",
    "same": "its prompts are those of another node, whose result is its own",
    "failed": "see its note; tried again by the next run",
    "oom": "out of memory; tried again by the next run",
    "crashed": "a fault of kvtool: see failed.json; tried again by the next run",
    "blocked": "works on a node that failed",
}
BAD = ("failed", "oom", "crashed", "blocked")


@dataclass(frozen=True, slots=True)
class Mark:
    """What is known of a node.

    Attributes
    ----------
    state : str
        Key of `STATES`.
    note : str
    seconds : float or None
        That the finished node took, over all runs that worked on it.
    whole : bool
        It was finished in one go, so that `seconds` is worth something for estimates.
    """

    state: str
    note: str = ""
    seconds: float | None = None
    whole: bool = False


def own_folder(out: Path, node: Node) -> Path:
    """Return a node's folder."""
    return out / "nodes" / node.name


def folder_of(out: Path, node: Node) -> Path:
    """Return where a node's result lies: in its own folder, or in that of the node that it is the same as."""
    own = own_folder(out, node)
    same = _read(own / SAME)
    return own if same is None else out / "nodes" / str(same["of"])


def same_as(out: Path, node: Node, twin: Node | None) -> None:
    """Say that a node's result is another one's; None: that it is its own."""
    place = own_folder(out, node) / SAME
    if twin is None:
        place.unlink(missing_ok=True)
    elif (_read(place) or {}).get("of") != twin.name:
        write_json(place, {"schema": SCHEMA, "of": twin.name})


def begin(out: Path, node: Node) -> bool:
    """Mark a node as begun; True if an earlier run had begun it."""
    from kvtool import __version__

    folder = own_folder(out, node)
    if (folder / NODE).exists():
        return True
    record = {
        "schema": SCHEMA,
        "key": node.key,
        "kind": node.stage.kind,
        "title": node.title,
        "work": node.work,
        "policies": list(node.policies),
        "inputs": {role: below.name for role, below in node.inputs.items()},
        "kvtool": __version__,
    }
    write_json(folder / NODE, record)
    return False


def finish(out: Path, node: Node, notes: list[str], seconds: float, whole: bool) -> Mark:
    """Mark a node as done."""
    mark = Mark("done", "; ".join(notes), seconds, whole)
    folder = own_folder(out, node)
    write_json(folder / DONE, {"schema": SCHEMA, "notes": notes, "seconds": seconds, "whole": whole})
    (folder / FAILED).unlink(missing_ok=True)
    return mark


def fail(out: Path, node: Node, state: str, message: str, trace: str | None = None) -> Mark:
    """Mark a node as failed."""
    write_json(
        own_folder(out, node) / FAILED,
        {"schema": SCHEMA, "state": state, "message": message, **({"trace": trace} if trace else {})},
    )
    return Mark(state, message)


def mark_of(out: Path, node: Node, below: dict[str, Mark]) -> Mark:
    """Return what is known of a node.

    Parameters
    ----------
    below : dict of str to Mark
        Marks of other nodes by key, those that this one works on among them.
    """
    folder = own_folder(out, node)
    if (done := _read(folder / DONE)) is not None:
        return Mark("done", "; ".join(done["notes"]), done["seconds"], done["whole"])
    if (above := unable(node, below)) is not None:
        return above
    if (failed := _read(folder / FAILED)) is not None:
        return Mark(failed["state"], failed["message"])
    return Mark("begun" if (folder / NODE).exists() else "pending")


def unable(node: Node, marks: dict[str, Mark]) -> Mark | None:
    """Return why a node cannot have a result, as what it works on has none; None if that does not stand against it."""
    for state, bad in (("blocked", BAD), ("skipped", ("impossible", "skipped"))):
        for below in node.inputs.values():
            if marks[below.key].state in bad:
                return Mark(state, f"{below.title}: {marks[below.key].state}")
    return None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); remove it and run again") from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise DataError(f"{path} is no mark of {SCHEMA}; remove it and run again")
    return found
