"""Fixtures of the infer tests: small policies, uneven budgets, and the float64 reference of a compressed model."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from kvtool.attention import AttentionCall, attention_handler
from kvtool.data.tasks import Encoded, Sample
from kvtool.models import LoadedModel, describe
from kvtool.policies import Budget, Method, Policy, method_class
from kvtool.policies.base import Allocator, LayerView, Parts, Request, Selector
from kvtool.policies.scorers import Accumulated


@dataclass(frozen=True, slots=True)
class UnevenAllocator(Allocator):
    """Head h of H gets a share that grows with h; sums to the total."""

    layer_local: ClassVar[bool] = True

    def allocate(self, views: Sequence[LayerView], scores: Sequence[torch.Tensor], request: Request) -> list[list[int]]:
        rows, budget, minimum = [], request.budget, request.minimum
        for view in views:
            step = (budget - minimum) // view.n_kv_heads
            shift = [step * (2 * h - view.n_kv_heads + 1) // 2 for h in range(view.n_kv_heads)]
            row = [budget + s for s in shift]
            row[-1] += budget * view.n_kv_heads - sum(row)
            rows.append(row)
        return rows


@dataclass(frozen=True, slots=True)
class AcrossLayers(Allocator):
    """The last layer gives half of its free entries to the first: needs all layers at once."""

    def allocate(self, views: Sequence[LayerView], scores: Sequence[torch.Tensor], request: Request) -> list[list[int]]:
        budget, minimum = request.budget, request.minimum
        moved = (budget - minimum) // 2 if len(views) > 1 else 0
        last = len(views) - 1
        return [[budget + moved * ((i == 0) - (i == last))] * view.n_kv_heads for i, view in enumerate(views)]


@dataclass(frozen=True, slots=True)
class Uneven(Method):
    """A third party's method with different budgets per head."""

    window: int = 4
    layers: bool = False
    name: ClassVar[str] = "uneven"
    source: ClassVar[str] = "test"
    summary: ClassVar[str] = "test"
    formula: ClassVar[str] = "test"

    def parts(self) -> Parts:
        return Parts(Accumulated(), AcrossLayers() if self.layers else UnevenAllocator(), Selector(1, self.window))


#: One method of each kind: position, accumulated, window and last-query scores, one set per layer, budgets that differ by
#: layer and by head. Every other one goes through ``test_every_policy.py``.
METHODS = ("full", "window", "streaming", "h2o", "snapkv", "tova", "random", "cake", "adakv")


def small_policies(budget: str = "50%") -> list[Policy]:
    """A policy of each kind with protected windows that fit short prompts, and two with uneven budgets."""
    found = []
    for cls in map(method_class, METHODS):
        names = {f.name for f in dataclasses.fields(cls)}
        small = {k: v for k, v in {"window": 6, "sink": 2}.items() if k in names}
        found.append(Policy(cls(**small), None if cls.keeps_all else Budget.parse(budget)))
    return [*found, Policy(Uneven(), Budget.parse(budget)), Policy(Uneven(layers=True), Budget.parse(budget))]


@pytest.fixture(scope="session")
def policies() -> list[Policy]:
    return small_policies()


@pytest.fixture(scope="session")
def uneven() -> type[Uneven]:
    return Uneven


def reference_logits(model: Any, prompt: list[int], fed: list[int], kept: list[list[torch.Tensor]]) -> torch.Tensor:
    """Logits ``[1 + N, V]`` of the last prompt token and the fed ones: the whole model in float64, one pass over the
    whole sequence, an explicit additive mask per layer and head that hides evicted entries from the fed tokens."""
    double = copy.deepcopy(model).double()
    n_prompt, n_all = len(prompt), len(prompt) + len(fed)

    def handler(call: AttentionCall) -> torch.Tensor:
        n_kv, group = call.keys.shape[1], call.queries.shape[1] // call.keys.shape[1]
        assert n_kv == len(kept[call.layer])
        out = torch.empty_like(call.queries)
        rows, columns = torch.arange(n_all)[:, None], torch.arange(n_all)[None, :]
        for q in range(call.queries.shape[1]):
            h = q // group
            held = columns[0] >= n_prompt
            held[kept[call.layer][h]] = True
            hidden = (columns > rows) | ((rows >= n_prompt) & ~held)
            if call.window is not None:
                hidden |= columns <= rows - call.window
            mask = torch.zeros(n_all, n_all, dtype=torch.float64).masked_fill(hidden, float("-inf"))
            logits = call.queries[0, q] @ call.keys[0, h].T * call.scaling + mask
            out[0, q] = torch.softmax(logits, -1) @ call.values[0, h]
        return out

    with torch.no_grad(), attention_handler(double, handler):
        return double(torch.tensor([prompt + fed]), use_cache=False).logits[0, n_prompt - 1 :]


@pytest.fixture(scope="session")
def reference() -> Callable[..., torch.Tensor]:
    return reference_logits


@pytest.fixture(scope="session")
def loaded_model(random_model: Callable[..., Any], byte_tokenizer: Any) -> LoadedModel:
    model = random_model("llama")
    return LoadedModel(model, byte_tokenizer, describe(model, "random"))


@pytest.fixture(scope="session")
def encoded() -> Callable[..., Encoded]:
    """Build a sample of random tokens."""

    def build(index: int, n_context: int = 60, n_question: int = 8, n_answer: int = 5, *, gold: bool = True) -> Encoded:
        ids = torch.randint(
            3, 250, (n_context + n_question + n_answer,), generator=torch.Generator().manual_seed(index)
        ).tolist()
        sample = Sample(f"s{index}", "c", "q", ("gold",) if gold else (), "f1", 6, {"index": index})
        cut = n_context + n_question
        return Encoded(sample, ids[:n_context], ids[n_context:cut], ids[cut:] if gold else [])

    return build
