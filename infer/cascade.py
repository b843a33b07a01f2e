"""CAKE's cascade while a prompt runs: after every layer the layers so far are cut to what is known of them by then.

The kept sets at the end are those that the policy chooses from all layers at once, because its budgets are the smallest of all
stages (`kvtool.policies.allocators.Cake`); the cascade only lets go of entries as soon as a stage has lost them, so that the
prompt is never held whole for all layers.

Shapes: B sequences, H KV heads, T prompt positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvtool.policies.base import Request

if TYPE_CHECKING:
    from torch import Tensor

    from kvtool.infer.live import PromptLayer
    from kvtool.policies.base import Policy


def cascades(policy: Policy, model: Any) -> bool:
    """Return True if a policy's stages can be followed: none of the model's layers has a sliding window of its own.

    With sliding windows it is not known in advance how many layers share the budget; the kept sets are the same, but the
    layers then wait for the last one.
    """
    allocator, config = policy.method.parts().allocator, model.config.get_text_config()
    has_windows = getattr(config, "sliding_window", None) is not None
    return bool(getattr(allocator, "cascade", False)) and not policy.compensation.active and not has_windows


class Cascade:
    """The layers of a prompt that are cut while later ones run.

    Parameters
    ----------
    policy : Policy
    n_layers : int
    seeds : sequence of int
        One per sequence.
    """

    def __init__(self, policy: Policy, n_layers: int, seeds: Sequence[int]) -> None:
        self.policy, self.parts = policy, policy.method.parts()
        self.n_layers, self.seeds = n_layers, seeds
        self.prompts: list[PromptLayer] = []
        #: per layer and sequence: positions in the order in which they are kept, ``[H, T]``, and how many still are
        self.orders: list[list[Tensor]] = []
        self.counts: list[list[list[int]]] = []

    def add(self, prompt: PromptLayer) -> None:
        """Take in the next layer and cut all layers so far."""
        self.prompts.append(prompt)
        rows = range(len(prompt.lengths))
        views = [prompt.view(row, self.n_layers, self.seeds[row]) for row in rows]
        self.orders.append([self.parts.selector.order(self.parts.scorer.score(view)) for view in views])
        self.counts.append([[prompt.lengths[row]] * view.n_kv_heads for row, view in enumerate(views)])
        budgets = [self._stage(row) for row in rows]
        for i, layer in enumerate(self.prompts):
            wanted = [[min(old, new) for old, new in zip(self.counts[i][row], budgets[row][i], strict=True)] for row in rows]
            if wanted != self.counts[i]:
                self.counts[i] = wanted
                layer.narrow([[self.orders[i][row][h, :n].sort().values for h, n in enumerate(wanted[row])] for row in rows])

    def _stage(self, row: int) -> list[list[int]]:
        """Return what the layers so far may hold of one sequence."""
        seq_len = self.prompts[0].lengths[row]
        views = [prompt.view(row, self.n_layers, self.seeds[row]) for prompt in self.prompts]
        request = Request(
            self.policy.entries(seq_len), self.policy.minimum(seq_len), self.parts.selector, implied=self.policy.budget is None
        )
        stage: list[list[int]] = self.parts.allocator.stage_budgets(views, request, self.n_layers)  # type: ignore[attr-defined]
        return stage
