"""What a study calls a policy: its text without heads files and budgets, and the labels that it goes by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from kvtool.studies.graph import Node
from kvtool.studies.schema import Choice
from kvtool.studies.state import HEADS


def without_heads(text: str, node: Node) -> str:
    """Return a policy's text form as the study names it: without the heads file that its node was given, wherever that lay."""
    given = node.inputs.get("heads")
    return _without_heads(text, given.name if given else "")


@lru_cache(maxsize=65536)
def _without_heads(text: str, name: str) -> str:
    """Of a heads file in a folder `name`; a study asks for the same few texts once per cell and table."""
    from kvtool.policies import parse_policy

    policy = parse_policy(text)
    path = Path(getattr(policy.method, "heads", ""))
    if not name or path.parts[-2:] != (name, HEADS):
        return str(policy)
    return str(replace(policy, method=replace(policy.method, heads="")))  # type: ignore[call-arg]


def budget_text(text: str) -> str | None:
    """Return the budget of a policy as it was asked for; None: the method's own."""
    from kvtool.policies import parse_policy

    budget = parse_policy(text).budget
    return None if budget is None else str(budget)


def named_as(policy: str, named: Mapping[str, list[Choice]]) -> list[Choice]:
    """Return what a study calls a policy at any budget; the method's own text where it has several names for it.

    Parameters
    ----------
    policy : str
        Text form without a heads file.
    named : dict of str to list of Choice
        See `kvtool.studies.graph.labels`.
    """
    if policy == "full":
        return named.get(policy, [])
    found = of_method(policy, named)
    return found if len(found) == 1 else [Choice(method_text(policy), method_text(policy), found[0].group if found else "")]


def of_method(policy: str, named: Mapping[str, list[Choice]]) -> list[Choice]:
    """Return every name of a study for a policy at any budget."""
    method = method_text(policy)
    return list(dict.fromkeys(choice for text, choices in named.items() if method_text(text) == method for choice in choices))


@lru_cache(maxsize=65536)
def method_text(policy: str) -> str:
    """Return a policy's text form without its budget."""
    from kvtool.policies import parse_policy
    from kvtool.policies.text import method_key

    return method_key(parse_policy(policy))
