"""Facts about a registered method, for listings and docs."""

from __future__ import annotations

import inspect
from typing import Any

from kvtool.policies.registry import method_class


def policy_facts(name: str) -> dict[str, Any]:
    """Return name, summary, formula, source, parameters, needed statistics and protected entries of a method."""
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
        "doc": inspect.getdoc(cls) or "",
    }
