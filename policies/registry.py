"""Registry: name -> class, found lazily in ``policies/methods`` and through entry points; never a shared instance."""

from __future__ import annotations

import importlib
import pkgutil
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points

from kvtool.errors import ConfigError, near_matches
from kvtool.policies.base import Method
from kvtool.progress import say

ENTRY_POINT_GROUP = "kvtool.policies"


@lru_cache(maxsize=1)
def method_classes() -> dict[str, type[Method]]:
    """Return every known method class by name, built-in ones first, then those of other packages' entry points.

    Raises
    ------
    ConfigError
        Two classes claim one name.
    """
    package = importlib.import_module("kvtool.policies.methods")
    found: dict[str, type[Method]] = {}
    for module_info in sorted(pkgutil.iter_modules(package.__path__), key=lambda m: m.name):
        module = importlib.import_module(f"{package.__name__}.{module_info.name}")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, Method) and value.__module__ == module.__name__:
                _add(found, value)
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        if (cls := _load(entry)) is not None:
            _add(found, cls)
    return found


def _load(entry: EntryPoint) -> type[Method] | None:
    """Load another package's method; a broken one is left out, and it is said whose it is."""
    owner = entry.dist.name if entry.dist else "an unknown package"
    try:
        cls = entry.load()
        if not (isinstance(cls, type) and issubclass(cls, Method) and isinstance(getattr(cls, "name", None), str)):
            raise TypeError("it is no subclass of kvtool.policies.base.Method with a name")
        cls().parts()
    except Exception as error:
        line = " ".join(str(error).split())[:200]
        say(f"policies: entry point {entry.name!r} of {owner} is left out ({type(error).__name__}: {line})")
        return None
    return cls


def _add(found: dict[str, type[Method]], cls: type[Method]) -> None:
    if cls.name in found:
        raise ConfigError(f"policy name {cls.name!r} is claimed by {found[cls.name].__module__} and {cls.__module__}")
    found[cls.name] = cls


def method_class(name: str) -> type[Method]:
    """Return the class registered as `name`.

    Raises
    ------
    ConfigError
        Unknown name, with near matches.
    """
    classes = method_classes()
    if name not in classes:
        raise ConfigError(f"unknown policy {name!r}.{near_matches(name, classes)} Known: {', '.join(classes)}")
    return classes[name]
