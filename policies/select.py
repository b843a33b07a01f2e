"""Apply a policy: layer views -> kept positions. The one function that simulate, infer and researchers call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtool.errors import ConfigError
from kvtool.policies.base import LayerView, Policy
from kvtool.policies.statistics import AttentionInputs, compute_statistics

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class TensorView:
    """Layer view over tensors at hand; statistics are computed when asked for.

    Attributes
    ----------
    inputs : AttentionInputs
        Post-RoPE tensors of the prompt.
    layer, n_layers : int
    seed : int
    """

    inputs: AttentionInputs
    layer: int
    n_layers: int
    seed: int = 0

    @property
    def n_heads(self) -> int:
        return self.inputs.n_heads

    @property
    def n_kv_heads(self) -> int:
        return int(self.inputs.keys.shape[0])

    @property
    def seq_len(self) -> int:
        return self.inputs.seq_len

    def statistic(self, name: str) -> Tensor:
        return compute_statistics(self.inputs, [name])[name]


def refuse_impossible(policies: Sequence[Policy], seq_lens: Sequence[int]) -> None:
    """Refuse a request none of whose budgets can hold the protected entries, on any prompt.

    In a grid, single impossible points are rows of the result; a request of nothing else is a mistake.

    Raises
    ------
    ConfigError
        Of the first policy, with what to do.
    """
    first: ConfigError | None = None
    for policy in policies:
        if policy.budget is None:
            continue
        for seq_len in seq_lens:
            try:
                policy.entries(seq_len)
            except ConfigError as error:
                first = first or error
            else:
                return
    if first is not None:
        raise first


def kept_positions(policy: Policy, views: Sequence[LayerView]) -> list[list[Tensor]]:
    """Return the kept set of every (layer, KV head).

    Parameters
    ----------
    policy : Policy
    views : sequence of LayerView
        The compressible layers of one prompt, in order; a subset is allowed for layer-local allocators.

    Returns
    -------
    list of list of Tensor
        ``[len(views)][H]`` ascending int64 positions.

    Raises
    ------
    ConfigError
        The budget is smaller than the protected entries.
    """
    parts, seq_len = policy.method.parts(), views[0].seq_len
    budget = policy.entries(seq_len)
    minimum = min(parts.selector.protected, seq_len)
    budgets = parts.allocator.allocate(views, budget, minimum)
    kept = []
    for view, per_head in zip(views, budgets, strict=True):
        order = parts.selector.order(parts.scorer.score(view))
        kept.append([order[h, :b].sort().values for h, b in enumerate(per_head)])
    return kept


def select(
    policy: Policy | str,
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    scaling: float | None = None,
    seed: int = 0,
) -> list[list[Tensor]]:
    """Select entries for tensors from anywhere.

    Parameters
    ----------
    policy : Policy or str
        Policy or its text form.
    queries : sequence of Tensor ``[Q, T, D]``
        Post-RoPE queries, one tensor per layer.
    keys, values : sequence of Tensor ``[H, T, D]``
        Post-RoPE keys and values, one tensor per layer.
    scaling : float, optional
        Factor of the logits; default 1 / sqrt(D).
    seed : int
        For policies that draw.

    Returns
    -------
    list of list of Tensor
        ``[L][H]`` ascending int64 positions.

    Raises
    ------
    ConfigError
        Shapes that do not fit together, or a budget smaller than the protected entries.
    """
    policy = Policy.parse(policy) if isinstance(policy, str) else policy
    views = []
    for layer, (q, k, v) in enumerate(zip(queries, keys, values, strict=True)):
        if q.dim() != 3 or k.dim() != 3 or k.shape[:2] != v.shape[:2] or q.shape[1:] != k.shape[1:] or q.shape[0] % k.shape[0]:
            raise ConfigError(
                f"layer {layer}: queries [heads, T, D], keys and values [kv_heads, T, D] are needed, "
                f"found {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
            )
        inputs = AttentionInputs(q, k, v, q.shape[-1] ** -0.5 if scaling is None else scaling)
        views.append(TensorView(inputs, layer, len(queries), seed))
    return kept_positions(policy, views)
