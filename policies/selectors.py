"""Selectors beyond plain top-k."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtool.policies.base import Selector

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class TwoStage(Selector):
    """The share `first` of a budget goes to the best by one score, the rest to the best of what is left by another.

    CriticalKV (arXiv 2502.03805). Protected entries come first and count as part of the first stage. Kept sets of
    growing budgets are nested: the first stage never shrinks, nor does the second.

    Attributes
    ----------
    first : float
        Share of the budget that the first score decides.
    """

    first: float = 0.5

    def order(self, scores: Tensor) -> Tensor:
        """Return the positions in the order in which they are kept, int64 ``[H, T]``, of scores ``[2, H, T]``."""
        import torch

        orders = [Selector.order(self, stage).tolist() for stage in scores]
        merged = [_merge(base, other, self.first) for base, other in zip(*orders, strict=True)]
        return torch.tensor(merged, dtype=torch.int64, device=scores.device)

    def keep(self, scores: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """Return the ascending positions that each head keeps; no loop over positions, unlike `order`."""
        import torch

        base, other = (Selector.order(self, stage) for stage in scores)
        kept = []
        for h, n in enumerate(counts):
            safe = base[h, : int(n * self.first)]
            taken = torch.zeros(base.shape[1], dtype=torch.bool, device=base.device)
            taken[safe] = True
            rest = other[h][~taken[other[h]]]
            kept.append(torch.cat([safe, rest[: n - len(safe)]]).sort().values)
        return kept


def _merge(base: Sequence[int], other: Sequence[int], first: float) -> list[int]:
    """Return the order whose first n elements are both stages' choice at budget n, for every n."""
    order: list[int] = []
    taken = bytearray(len(base))
    n_safe = other_next = 0
    for n in range(1, len(base) + 1):
        if int(n * first) > n_safe:
            position = base[n_safe]
            n_safe += 1
            if not taken[position]:
                taken[position] = 1
                order.append(position)
                continue
        # What the first stage chooses may be there already; then the second stage's list moves on instead.
        while taken[other[other_next]]:
            other_next += 1
        position = other[other_next]
        taken[position] = 1
        order.append(position)
    return order
