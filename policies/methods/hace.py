"""HACE: CAKE's layer preference times HeadKV's head importance, and its two ablations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from kvtool.policies.base import Method, Parts, Scorer, Selector
from kvtool.policies.head_allocators import HeadScores, LayerTimesHead
from kvtool.policies.headfile import check_path
from kvtool.policies.scorers import Group, MeanVariance, WindowAttention
from kvtool.policies.text import check_kernel, check_range

Ranking = Literal["cake", "snapkv"]
FORMULA = "budget_lh = floor + pool P_l^layer_power S_lh^head_power / sum; score: mean_i A[i, j] + gamma var_i A[i, j], pooled"
SOURCE = "HACE, the users' own; CAKE, arXiv 2503.12491, and HeadKV, arXiv 2410.19258"


@dataclass(frozen=True, slots=True)
class HACELayer(Method):
    """HACE with layer budgets only (head_power 0): every head of a layer gets the same. See ``docs/hace.md``."""

    layer_power: float = 1.0
    floor: float = 0.2
    window: int = 32
    tau1: float = 1.0
    tau2: float = 1.0
    gamma: float = 200.0
    kernel: int = 5
    scorer: Ranking = "cake"
    sink: int = 0
    group: Group = "mean"

    name: ClassVar[str] = "hace-layer"
    source: ClassVar[str] = SOURCE
    summary: ClassVar[str] = "HACE's ablation: layers share by CAKE's preference, heads of a layer alike"
    formula: ClassVar[str] = FORMULA.replace(" S_lh^head_power", "")

    def __post_init__(self) -> None:
        for key in ("layer_power", "gamma", "sink"):
            check_range(self.name, key, getattr(self, key), 0)
        check_range(self.name, "floor", self.floor, 0, 1)
        check_range(self.name, "window", self.window, 1)
        check_kernel(self.name, self.kernel)
        for key in ("tau1", "tau2"):
            check_range(self.name, key, getattr(self, key), 1e-3)

    def allocator(self) -> LayerTimesHead:
        """Return how the budget is shared."""
        return LayerTimesHead(None, self.window, self.layer_power, 0.0, self.floor, self.tau1, self.tau2)

    def parts(self) -> Parts:
        scorer: Scorer = MeanVariance(self.window, self.gamma, self.kernel, "avg", self.group)
        if self.scorer == "snapkv":
            scorer = WindowAttention(self.window, self.kernel, "max", self.group)
        return Parts(scorer, self.allocator(), Selector(self.sink, self.window))


@dataclass(frozen=True, slots=True)
class HACE(HACELayer):
    """Budgets of layers and heads together: CAKE's layer preference times HeadKV's head importance, above a floor.

    The users' own method, defined in ``docs/hace.md``. Exact in total; what a full head cannot use goes to the others.
    """

    heads: str = ""
    score: Literal["importance", "retrieval"] = "importance"
    head_power: float = 1.0

    name: ClassVar[str] = "hace"
    summary: ClassVar[str] = "layers share by CAKE's preference times heads by HeadKV's importance, above a floor"
    formula: ClassVar[str] = FORMULA

    def __post_init__(self) -> None:
        HACELayer.__post_init__(self)
        check_path(self.name, self.heads)
        check_range(self.name, "head_power", self.head_power, 0)

    def allocator(self) -> LayerTimesHead:
        importance, powers = HeadScores(self.heads, self.score), (self.layer_power, self.head_power)
        return LayerTimesHead(importance, self.window, *powers, self.floor, self.tau1, self.tau2)


@dataclass(frozen=True, slots=True)
class HACEHead(HACE):
    """HACE with head budgets only (layer_power 0): CAKE's preference plays no part. See ``docs/hace.md``."""

    layer_power: float = 0.0

    name: ClassVar[str] = "hace-head"
    summary: ClassVar[str] = "HACE's ablation: heads share by HeadKV's importance, whatever their layer"
    formula: ClassVar[str] = FORMULA.replace(" P_l^layer_power", "")

    def __post_init__(self) -> None:
        HACE.__post_init__(self)
        check_range(self.name, "layer_power", self.layer_power, 0, 0)
