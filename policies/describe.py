"""What every registered method needs and can: facts for listings, and their text."""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kvtool.policies.base import Method
from kvtool.policies.names import FORMS, METHODS
from kvtool.policies.registry import method_class, method_classes
from kvtool.policies.text import OF_ALL, OPTIONS, policy_from_dict, text_values

#: Columns of a terminal that the texts fit into.
WIDTH = 100

#: Statistics that exist for whatever entries are left while decoding; the others are of whole prompts.
WHILE_DECODING = (
    "accumulated",
    "last",
    "window_mean",
    "window_var",
    "window_max",
    "key_norm",
    "value_norm",
    "value_norm1",
    "key_similarity",
)

#: option of every policy -> what it does
OPTION_TEXTS: dict[str, str] = {
    "compensate": "what stands for evicted entries: none, slots, mean, weighted, merge, refit",
    "block": "evicted entries per representative, or full",
    "bias": "logit bias of representatives: auto, none, count, entropy",
    "gate": "no representatives for heads whose logits vary more than this within blocks; 0: no gate",
    "merge": "how entries are merged: pivot, weighted, values, d2o, cam",
    "ridge": "relative strength of the refit's regularisation",
    "decode": "while decoding: grow (keep every new token) or evict (hold the capacity)",
    "interval": "with decode=evict: drop that many entries at once",
    "positions": "rotation of kept keys: true positions, or cache (their index in the cache)",
    "chunk": "feed the prompt in chunks of that many tokens and evict between them; 0: at once",
    "quant": "how entries are stored: none (as the model made them), int8, int4",
    "quant_group": "entries that share a scale per key channel, and channels of a value that share one, at most",
    "quant_residual": "last entries of every head that stay as the model made them",
}


def policy_facts(name: str) -> dict[str, Any]:
    """Return what a method keeps, needs and can, as JSON values.

    Parameters
    ----------
    name : str
        Of a registered method.

    Returns
    -------
    dict
        ``budget`` is ``"needed"``, ``"optional"`` (it brings its own number of entries) or ``"none"``; ``heads_file`` says that it
        shares the budget by a file of facts about the model's heads; ``exact`` that the kept entries sum to the budget at
        its defaults; ``layer_local`` that a layer's budgets depend on that layer only; ``decode`` that ``decode=evict`` is possible.

    Raises
    ------
    ConfigError
        Unknown name, with near matches.
    """
    cls = method_class(name)
    method = cls()
    parts = method.parts()
    return {
        "name": cls.name,
        "summary": cls.summary,
        "formula": cls.formula,
        "source": cls.source,
        "parameters": method.parameters(),
        "needs": list(parts.needs()),
        "protected": parts.selector.protected,
        "budget": "none" if cls.keeps_all else "optional" if cls.implies_budget else "needed",
        "heads_file": any(name in method.parameters() for name in ("heads", "plan", "file")),
        "decode": not cls.keeps_all and can_decode(method),
        "exact": method.exact and not cls.keeps_all,
        "layer_local": parts.allocator.layer_local,
        "simulate_only": cls.simulate_only,
        "study_names": [FORMS[form] for form, owner in METHODS.items() if owner == cls.name],
        "doc": inspect.getdoc(cls) or "",
    }


def named_policy(name: str) -> tuple[str, str | None]:
    """Return the method behind a name, and the policy in full where the name is a study's or a file's.

    Raises
    ------
    ConfigError
        Neither, with near matches.
    """
    values = text_values(name)
    method = str(values.pop("name"))
    if method == name or not values:
        return method, None
    return method, str(policy_from_dict({"name": method, **values}))


def can_decode(method: Method) -> bool:
    """Return True if ``decode=evict`` is possible: the method ranks by what is known of the entries that are left."""
    scorer = method.parts().scorer
    return scorer.decodes and all(need.partition("/")[0] in WHILE_DECODING for need in scorer.needs())


def policy_options(*, keeps_all: bool = False) -> dict[str, dict[str, Any]]:
    """Return the options that every policy takes (or those of one that keeps every entry): name -> default and what it does."""
    fields = [f for owner in (OF_ALL if keeps_all else OPTIONS) for f in dataclasses.fields(owner)]
    return {f.name: {"default": f.default, "text": OPTION_TEXTS[f.name]} for f in fields}


def listing() -> str:
    """Return the table of all methods: what each needs and can, and the names of the studies."""
    rows = [policy_facts(name) for name in method_classes()]
    header = ("policy", "budget", "heads", "decode", "exact", "local", "keeps")
    cells = [
        (
            r["name"],
            r["budget"],
            "file" if r["heads_file"] else "-",
            *(_yes(r, key) for key in ("decode", "exact", "layer_local")),
        )
        for r in rows
    ]
    lines = _columns(header, cells, [r["summary"] for r in rows])
    legend = (
        "budget: needed, optional (brings its own number of entries; budget=own asks for it) or none. "
        "heads: needs a file of what is known of the model's heads (--heads, made by kvtool classify). "
        "decode: can hold its capacity while decoding (decode=evict). exact: the kept entries sum to the budget. "
        "local: a layer's budgets depend on that layer alone, so entries are dropped layer by layer during the prompt pass."
    )
    names = f"Names of studies that are policies too: {', '.join(FORMS.values())}. So are JSON and YAML files of a policy."
    return "\n".join([*lines, "", *_wrap(legend), "", *_wrap(names), "", "kvtool policies show NAME tells one in full."])


def _yes(facts: Mapping[str, Any], key: str) -> str:
    return "-" if facts["budget"] == "none" else "yes" if facts[key] else "no"


def _columns(header: Sequence[str], cells: Sequence[Sequence[str]], texts: Sequence[str]) -> list[str]:
    """Return aligned lines; the last column is wrapped."""
    table = [header[:-1], *cells]
    widths = [max(len(row[i]) for row in table) for i in range(len(header) - 1)]
    left = sum(widths) + 2 * len(widths)
    lines = []
    for row, text in zip(table, [header[-1], *texts], strict=True):
        start = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + "  "
        first, *more = textwrap.wrap(text, WIDTH - left) or [""]
        lines += [(start + first).rstrip(), *(" " * left + line for line in more)]
    rule = "  ".join("-" * width for width in (*widths, WIDTH - left))
    return [lines[0], rule, *lines[1:]]


def _wrap(text: str, start: str = "", indent: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=start, subsequent_indent=indent, break_on_hyphens=False) or [
        start.rstrip()
    ]


def show(facts: Mapping[str, Any]) -> str:
    """Return everything about one method, from `policy_facts`."""
    budget = {
        "needed": "needed",
        "optional": "optional: without one (budget=own) it keeps its own number of entries",
        "none": "none: it keeps every entry",
    }[facts["budget"]]
    can = [
        "evicts while decoding (decode=evict)" if facts["decode"] else "no eviction while decoding",
        "exact in total" if facts["exact"] else "not exact in total",
        "a layer's budgets depend on that layer alone" if facts["layer_local"] else "budgets depend on all layers",
        "simulate only" if facts["simulate_only"] else "",
    ]
    heads = "heads=FILE or --heads FILE; kvtool classify makes one"
    heads += ", HeadKV's and DuoAttention's are read too" if "score" in facts["parameters"] else ""
    heads = "plan=FILE; kvtool plan export makes one" if "plan" in facts["parameters"] else heads
    heads = "file=FILE; kvtool plan export and plan import make one" if "file" in facts["parameters"] else heads
    fields = {
        "formula": facts["formula"],
        "parameters": ", ".join(_parameter(k, v) for k, v in facts["parameters"].items()) or "none",
        "source": facts["source"],
        "budget": budget,
        "heads file": heads if facts["heads_file"] else "",
        "needs": ", ".join(facts["needs"]) or "no statistics",
        "protects": f"{facts['protected']} entries at its defaults" if facts["protected"] else "nothing at its defaults",
        "can": "; ".join(filter(None, can)) if facts["budget"] != "none" else "",
        "studies": ", ".join(facts["study_names"]),
    }
    lines = _wrap(f"{facts['name']}: {facts['summary']}", indent="  ")
    for label, text in fields.items():
        lines += _wrap(text, f"  {label:<11} ", " " * 14) if text else []
    for paragraph in facts["doc"].split("\n\n"):
        lines += ["", *_wrap(" ".join(paragraph.split()))]
    keeps_all = facts["budget"] == "none"
    title = "Options:" if keeps_all else "Options of every policy:"
    lines += ["", title, *_option_lines(policy_options(keeps_all=keeps_all).items())]
    return "\n".join(lines)


def _option_lines(options: Iterable[tuple[str, Mapping[str, Any]]]) -> list[str]:
    lines: list[str] = []
    for name, option in options:
        lines += _wrap(option["text"], f"  {_parameter(name, option['default']):<18}", " " * 20)
    return lines


def _parameter(name: str, value: Any) -> str:
    return f"{name}={str(value).lower() if isinstance(value, bool) else value}"
