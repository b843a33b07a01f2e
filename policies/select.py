"""Apply a policy: layer views -> kept positions. The one function that simulate, infer and researchers call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvtool.errors import ConfigError, KvtoolError
from kvtool.policies.base import LayerView, Memo, Policy, Request
from kvtool.policies.shares import share
from kvtool.policies.statistics import AttentionInputs, Rope, compute_statistics

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
    head_scores : Tensor ``[Q]`` or None
        Importance of the layer's query heads, for methods that share a budget by it.
    """

    inputs: AttentionInputs
    layer: int
    n_layers: int
    seed: int = 0
    head_scores: Tensor | None = None

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
        if name == "head_scores" and self.head_scores is not None:
            return self.head_scores[:, None]
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


def kept_counts(
    policy: Policy, views: Sequence[LayerView], scores: Sequence[Tensor], memo: Memo | None = None
) -> list[list[int]]:
    """Return how many prompt entries every (layer, KV head) keeps; slots of a compensation are not among them.

    Parameters
    ----------
    policy : Policy
    views : sequence of LayerView
    scores : sequence of Tensor
        What the policy's scorer gave each view.
    memo : Memo, optional
        Of the same views and scores: what one budget has worked out is used by the next.

    Raises
    ------
    ConfigError
        The budget is smaller than the protected entries.
    KvtoolError
        The allocator breaks its contract.
    """
    parts, seq_len = policy.method.parts(), views[0].seq_len
    implied, least = policy.budget is None, policy.minimum(seq_len)
    request = Request(policy.entries(seq_len, least), least, parts.selector, implied, memo or Memo())
    if policy.budget is not None and request.budget >= seq_len:
        # A budget for everything drops nothing, whatever a method's rule would do with it.
        return [[seq_len] * view.n_kv_heads for view in views]
    budgets = parts.allocator.allocate(views, scores, request)
    if not policy.method.exact:
        # Official rules count what a short prompt has not got.
        least = min(parts.selector.protected, seq_len)
        budgets = [[min(seq_len, max(n, least)) for n in heads] for heads in budgets]
    if policy.compensation.takes_slots:
        budgets = _with_room_for_slots(policy, budgets, request, seq_len)
    flat = [n for heads in budgets for n in heads]
    if policy.budget is not None and policy.method.exact and sum(flat) != request.budget * len(flat):
        raise KvtoolError(
            f"policy {policy}: its allocator gave {sum(flat)} entries, {request.budget * len(flat)} were asked for"
        )
    if min(flat) < min(request.minimum, seq_len) or max(flat) > seq_len:
        raise KvtoolError(f"policy {policy}: its allocator left the range {request.minimum} ... {seq_len} of a head's budget")
    if not policy.compensation.takes_slots:
        return budgets
    # A gated head gets no representatives, so that its slots go back to real entries.
    return [
        [
            n if gated else policy.compensation.kept(n, seq_len)
            for n, gated in zip(heads, policy.compensation.gated(view), strict=True)
        ]
        for heads, view in zip(budgets, views, strict=True)
    ]


def _with_room_for_slots(policy: Policy, budgets: list[list[int]], request: Request, seq_len: int) -> list[list[int]]:
    """Raise heads to protected entries plus slots, at the expense of the others; official rules know of no slots.

    The sum stays: of each layer where its budgets depend on that layer alone, else of all. Budgets that are large enough
    are left as they are.

    Raises
    ------
    ConfigError
        The sum does not suffice.
    """
    least = min(request.minimum, seq_len)
    if all(n >= least for heads in budgets for n in heads):
        return budgets
    groups = budgets if policy.method.parts().allocator.layer_local else [[n for heads in budgets for n in heads]]
    flat: list[int] = []
    for group in groups:
        if sum(group) < least * len(group):
            raise ConfigError(
                f"policy {policy}: it leaves {sum(group)} entries to {len(group)} heads, and {least} per head are needed for the "
                "protected ones and the slots of its compensation; raise the budget or use a larger block="
            )
        flat += share(sum(group), [max(0, n - least) for n in group], least, seq_len)
    rest = iter(flat)
    return [[next(rest) for _ in heads] for heads in budgets]


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
    parts = policy.method.parts()
    if policy.method.keeps_all:
        import torch

        return [[torch.arange(view.seq_len) for _ in range(view.n_kv_heads)] for view in views]
    scores = [parts.scorer.score(view) for view in views]
    counts = kept_counts(policy, views, scores)
    return [parts.selector.keep(score, heads) for score, heads in zip(scores, counts, strict=True)]


def select(
    policy: Policy | str,
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    head_scores: Sequence[Sequence[float]] | Tensor | None = None,
    scaling: float | None = None,
    rope: Rope | None = None,
    output_weights: Sequence[Tensor] | None = None,
    seed: int = 0,
) -> list[list[Tensor]]:
    """Select entries for tensors from anywhere.

    Parameters
    ----------
    policy : Policy or str
        Policy, its text form or a study's name.
    queries : sequence of Tensor ``[Q, T, D]``
        Post-RoPE queries, one tensor per layer.
    keys, values : sequence of Tensor ``[H, T, D]``
        Post-RoPE keys and values, one tensor per layer.
    head_scores : array of shape (L, Q), optional
        Importance of each query head, for methods that share a budget by it and are given no file.
    scaling : float, optional
        Factor of the logits; default 1 / sqrt(D).
    rope : Rope, optional
        How the queries were rotated, for methods that look into the future (``expected``).
    output_weights : sequence of Tensor ``[hidden, Q * D]``, optional
        Output projections, for methods that weigh values by them (``critical``).
    seed : int
        For policies that draw.

    Returns
    -------
    list of list of Tensor
        ``[L][H]`` ascending int64 positions.

    Raises
    ------
    ConfigError
        Shapes that do not fit together, something the policy needs is missing, or a budget smaller than the protected
        entries.
    """
    import torch

    policy = Policy.parse(policy) if isinstance(policy, str) else policy
    _check_request(policy, queries, keys, values, {"head_scores": head_scores, "output_weights": output_weights})
    views = []
    for layer, (q, k, v) in enumerate(zip(queries, keys, values, strict=True)):
        if (
            not q.numel()
            or q.dim() != 3
            or k.dim() != 3
            or k.shape[:2] != v.shape[:2]
            or q.shape[1:] != k.shape[1:]
            or q.shape[0] % k.shape[0]
        ):
            raise ConfigError(
                f"layer {layer}: queries [heads, T, D], keys and values [kv_heads, T, D] are needed, "
                f"found {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
            )
        weight = None if output_weights is None else output_weights[layer]
        inputs = AttentionInputs(q, k, v, q.shape[-1] ** -0.5 if scaling is None else scaling, rope=rope, output_weight=weight)
        importance = None if head_scores is None else torch.as_tensor(head_scores[layer], dtype=torch.float64)
        if importance is not None and importance.shape != q.shape[:1]:
            raise ConfigError(f"layer {layer}: {list(importance.shape)} head scores were given for {q.shape[0]} query heads")
        views.append(TensorView(inputs, layer, len(queries), seed, importance))
    return kept_positions(policy, views)


def _check_request(
    policy: Policy,
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    more: dict[str, Sequence[Any] | Tensor | None],
) -> None:
    """Refuse what `select` cannot serve before anything is computed."""
    import torch

    if not isinstance(policy, Policy):
        raise ConfigError(f"a policy or its text is needed, found {type(policy).__name__}; policy_from_dict reads a dict")
    if policy.when.chunk:
        raise ConfigError(
            f"policy {policy}: select sees a whole prompt; chunk= is for CompressedCache and kvtool infer, remove it"
        )
    counts = {"queries": len(queries), "keys": len(keys), "values": len(values)}
    counts |= {name: len(given) for name, given in more.items() if given is not None}
    if len(set(counts.values())) != 1 or not counts["queries"]:
        found = ", ".join(f"{n} {name}" for name, n in counts.items())
        raise ConfigError(f"one entry per layer is needed in each list, and at least one layer; found {found}")
    for tensor in (*queries, *keys, *values):
        if not isinstance(tensor, torch.Tensor):
            raise ConfigError(
                f"queries, keys and values must be torch tensors, found {type(tensor).__name__}; use torch.from_numpy"
            )
