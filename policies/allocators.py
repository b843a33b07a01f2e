"""Allocators: total budget -> budget per (layer, KV head)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvtool.policies.base import Allocator, LayerView, Request

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Uniform(Allocator):
    """The same number of entries for every head of every layer."""

    layer_local: ClassVar[bool] = True

    def allocate(self, views: Sequence[LayerView], scores: Sequence[Tensor], request: Request) -> list[list[int]]:
        return [[request.budget] * view.n_kv_heads for view in views]
