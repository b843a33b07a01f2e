"""Expected Attention: entries that future queries are expected to attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvtool.policies.allocators import Uniform
from kvtool.policies.base import Method, Parts, Selector
from kvtool.policies.scorers import Expected
from kvtool.policies.statistics import EXPECTED_FUTURE, EXPECTED_SINK
from kvtool.policies.text import check_range


@dataclass(frozen=True, slots=True)
class ExpectedAttention(Method):
    """Keep the entries with the largest expected attention from future queries, times the norm of their value.

    Expected Attention, arXiv 2510.00636, as in NVIDIA kvpress: future queries are taken to be normal with the mean and
    covariance of the prompt's unrotated queries, turned by the average rotation of the next `future` positions. Needs to
    know how the model rotates. The first `sink` positions are always kept and their queries left out.
    """

    future: int = EXPECTED_FUTURE
    sink: int = EXPECTED_SINK
    covariance: bool = True
    value_norm: bool = True
    epsilon: float = 0.0
    window: int = 0

    name: ClassVar[str] = "expected"
    source: ClassVar[str] = "Expected Attention, arXiv 2510.00636"
    summary: ClassVar[str] = "keeps entries that the next positions' queries are expected to attend to"
    formula: ClassVar[str] = (
        "score_j = (group-mean of softmax_j(mu k_j / sqrt(d) + k_j C k_j / 2d) + epsilon) |v_j|_2, mu and C of rotated queries"
    )

    def __post_init__(self) -> None:
        check_range(self.name, "future", self.future, 1)
        check_range(self.name, "epsilon", self.epsilon, 0)
        for key in ("window", "sink"):
            check_range(self.name, key, getattr(self, key), 0)

    def parts(self) -> Parts:
        scorer = Expected(self.future, self.sink, self.covariance, self.value_norm, self.epsilon)
        return Parts(scorer, Uniform(), Selector(self.sink, self.window))
