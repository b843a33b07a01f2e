"""kvtool: which KV-cache compression to run for your model and workload, at which budget - simulated, then proved.

The public names are imported when first used, so ``import kvtool`` is fast and needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvtool.attention import prepare
    from kvtool.capture.reader import open_capture
    from kvtool.infer.cache import CompressedCache
    from kvtool.models import load_model
    from kvtool.policies import Policy, select

__version__ = "0.1.0"

_PUBLIC = {
    "CompressedCache": "kvtool.infer.cache",
    "Policy": "kvtool.policies",
    "load_model": "kvtool.models",
    "open_capture": "kvtool.capture.reader",
    "prepare": "kvtool.attention",
    "select": "kvtool.policies",
}

__all__ = ["CompressedCache", "Policy", "__version__", "load_model", "open_capture", "prepare", "select"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'kvtool' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
