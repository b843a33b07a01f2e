"""Policies as people read them: without paths, without what all of them share, and in lines that fit beside a figure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

#: Settings of a policy that are paths.
_PATHS = re.compile(r"(?<=[:,])(heads|plan|file)=([^,]*),?")
#: An absolute path of at least two parts, behind anything but a word or an address.
_ABSOLUTE = re.compile(r"""(?<![\w./:~-])(?:[A-Za-z]:)?(?:[/\\][^\s/\\,;:"'<>|(){}=]+)+""")
#: Parts of a path that its end keeps: a file and its folder.
_END = 2
_BUDGET = re.compile(r"(?<=[:,])budget=[^,]*,?")


def short_name(text: str) -> str:
    """Return one policy's text without the paths of its files."""
    return _PATHS.sub("", text).rstrip(":,")


def short_paths(text: str) -> str:
    """Return a text with the end of each absolute path only: its folder and its file, as a report that is handed on needs no more."""
    return _ABSOLUTE.sub(lambda found: "/".join(re.split(r"[/\\]", found[0])[-_END:]).lstrip("/"), text)


def short_values(value: Any) -> Any:
    """Return what JSON holds with the ends of absolute paths only, keys too."""
    if isinstance(value, str):
        return short_paths(value)
    if isinstance(value, Mapping):
        return {short_paths(str(key)): short_values(item) for key, item in value.items()}
    return [short_values(item) for item in value] if isinstance(value, (list, tuple)) else value


def method_of(text: str) -> str:
    """Return one policy's text without paths and budget: what a line of a figure is of."""
    return _BUDGET.sub("", short_name(text)).rstrip(":,")


def short_names(texts: Sequence[str]) -> dict[str, str]:
    """Return policies as people read them: without the paths of their heads files and plans.

    Where two of them would then read the same, each keeps the shortest end of its path that tells them apart.

    Parameters
    ----------
    texts : sequence of str
        Text forms, with or without budget.
    """
    distinct = list(dict.fromkeys(texts))
    names = {text: short_name(text) for text in distinct}
    for depth in range(1, 32):
        counts = Counter(names.values())
        twice = [text for text in distinct if counts[names[text]] > 1]
        if not twice:
            break
        for text in twice:
            names[text] = _PATHS.sub(partial(_end_of_path, depth), text).rstrip(":,")
    return names


def _end_of_path(depth: int, found: re.Match[str]) -> str:
    comma = "," if found[0].endswith(",") else ""
    return f"{found[1]}={'/'.join(found[2].split('/')[-depth:])}{comma}"


def figure_names(texts: Sequence[str], named: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return policies as a figure shows them: by their name in a study, else shortened, without settings that all of them share.

    What was left out is said by `shared_settings`.

    Parameters
    ----------
    texts : sequence of str
    named : dict of str to str, optional
        Policy text -> name of a study.
    """
    short = short_names(texts)
    shared = set(shared_settings(texts, named))
    names = {}
    for text, name in short.items():
        if named and text in named:
            names[text] = named[text]
            continue
        method, _, rest = name.partition(":")
        kept = [item for item in rest.split(",") if item and item not in shared]
        names[text] = method + (":" + ",".join(kept) if kept else "")
    return names


def shared_settings(texts: Sequence[str], named: Mapping[str, str] | None = None) -> list[str]:
    """Return the settings that every policy but the full cache has alike, those with a name of their own not counted; budgets never are."""
    names = [name for text, name in short_names(texts).items() if name != "full" and not (named and text in named)]
    given = [name.partition(":")[2].split(",") for name in names]
    if len(given) < 2:
        return []
    return [item for item in given[0] if item and not item.startswith("budget=") and all(item in other for other in given[1:])]


def wrapped(name: str, width: int = 34) -> str:
    """Return a name in lines of at most `width` signs where it can be broken: behind commas, colons, underscores and spaces."""
    lines, line = list[str](), ""
    for piece in re.findall(r".+?(?:[,:_ ]+|$)", name):
        if line and len(line) + len(piece.rstrip()) > width:
            lines.append(line.rstrip())
            line = ""
        line += piece
    return "\n".join([*lines, line.rstrip()])
