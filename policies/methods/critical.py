"""CriticalKV: attention weighted by what the value does to the layer's output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvtool.policies.allocators import Joint, Uniform
from kvtool.policies.base import Method, Parts
from kvtool.policies.scorers import ByOutput, Group, Pool, WindowAttention
from kvtool.policies.selectors import TwoStage
from kvtool.policies.text import check_kernel, check_range


@dataclass(frozen=True, slots=True)
class CriticalKV(Method):
    """Half of the budget by SnapKV's score; the rest by that score times the norm of the projected value.

    CriticalKV, arXiv 2502.03805, as in NVIDIA kvpress. With ``adaptive=true`` heads of a layer compete as in AdaKV first
    (AdaCriticalKV). Needs the output projection of each layer.
    """

    window: int = 32
    kernel: int = 5
    pool: Pool = "avg"
    sink: int = 0
    group: Group = "mean"
    first: float = 0.5
    epsilon: float = 1e-4
    adaptive: bool = False
    floor: float = 0.2

    name: ClassVar[str] = "critical"
    source: ClassVar[str] = "CriticalKV, arXiv 2502.03805"
    summary: ClassVar[str] = "half by SnapKV's score, the rest by that score times the norm of the projected value"
    formula: ClassVar[str] = "stage 1: s_j as snapkv; stage 2: (s_j + epsilon) group-mean of |W_o v_j|_1"

    def __post_init__(self) -> None:
        check_range(self.name, "window", self.window, 1)
        check_range(self.name, "sink", self.sink, 0)
        check_range(self.name, "first", self.first, 0, 1)
        check_range(self.name, "floor", self.floor, 0, 1)
        check_range(self.name, "epsilon", self.epsilon, 0)
        check_kernel(self.name, self.kernel)

    def parts(self) -> Parts:
        base = WindowAttention(self.window, self.kernel, self.pool, self.group)
        allocator = Joint(self.floor, "kvpress") if self.adaptive else Uniform()
        return Parts(ByOutput(base, self.epsilon), allocator, TwoStage(self.sink, self.window, self.first))
