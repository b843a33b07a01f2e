"""Allocators: total budget -> budget per (layer, KV head)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvtool.policies.base import Allocator, LayerView


@dataclass(frozen=True, slots=True)
class Uniform(Allocator):
    """The same number of entries for every head of every layer."""

    layer_local: ClassVar[bool] = True

    def allocate(self, views: Sequence[LayerView], budget: int, minimum: int) -> list[list[int]]:
        return [[budget] * view.n_kv_heads for view in views]
