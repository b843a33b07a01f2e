"""One test for every registered policy: what each must keep to, whatever it ranks by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtool.errors import ConfigError
from kvtool.policies import Policy, kept_positions, method_classes, parse_policy, policy_from_dict, policy_to_dict
from kvtool.policies.select import TensorView
from kvtool.policies.statistics import AttentionInputs, Rope

L, Q, H, T, D = 2, 8, 4, 90, 16
CLASSES = method_classes()
NAMES = sorted(CLASSES)
COMPRESSING = [n for n in NAMES if not CLASSES[n].keeps_all]
#: A prompt that everything fits into, for every policy.
BUDGETS = [36, 50, 89]


@dataclass(frozen=True, slots=True)
class ToyView(TensorView):
    """A view that also knows the future, as a captured prompt does."""

    def statistic(self, name: str) -> torch.Tensor:
        if name == "future":
            return self.inputs.queries.new_tensor(np.random.default_rng(7).random((self.n_heads, self.seq_len)))
        return TensorView.statistic(self, name)


def toy_views(seq_len: int = T, seed: int = 0, n_heads: int = Q, n_kv: int = H, sample: int = 0) -> list[ToyView]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    rope = Rope(10000.0 ** -(torch.arange(0, D, 2) / D))
    views = []
    for layer in range(L):
        q, k, v = draw(n_heads, seq_len, D), draw(n_kv, seq_len, D), draw(n_kv, seq_len, D)
        inputs = AttentionInputs(q, k, v, D**-0.5, rope=rope, output_weight=draw(24, n_heads * D))
        views.append(ToyView(inputs, layer, L, sample, draw(n_heads).abs()))
    return views


#: Files of head kinds and scores by number of KV heads, for methods that cannot do without.
FILES: dict[int, Path] = {}
PLANS: dict[int, Path] = {}
BUDGET_FILES: dict[int, Path] = {}


@pytest.fixture(scope="module", autouse=True)
def head_files(toy_heads: Callable[..., Path], toy_plan: Callable[..., Path], toy_budgets: Callable[..., Path]) -> None:
    FILES.update({n_kv: toy_heads(n_layers=L, n_heads=Q, n_kv_heads=n_kv) for n_kv in (1, 2, 4)})
    PLANS.update({n_kv: toy_plan(n_layers=L, n_kv_heads=n_kv) for n_kv in (1, 2, 4)})
    BUDGET_FILES.update({n_kv: toy_budgets(n_layers=L, n_heads=Q, n_kv_heads=n_kv) for n_kv in (1, 2, 4)})


def text(name: str, budget: str | int, n_kv: int = H) -> str:
    """Text form with what the method needs on short prompts."""
    items = [f"budget={budget}", CLASSES[name].small]
    # Importance comes from the views; kinds of heads are in files only.
    items += [f"heads={FILES[n_kv]}"] if name == "head_windows" else []
    items += [f"plan={PLANS[n_kv]}"] if name == "optimal" else []
    items += [f"file={BUDGET_FILES[n_kv]}"] if name == "plan" else []
    return f"{name}:" + ",".join(filter(None, items))


def kept(policy: str, seq_len: int = T, seed: int = 0, **options: Any) -> list[list[list[int]]]:
    found = kept_positions(parse_policy(policy), toy_views(seq_len, seed, **options))
    return [[p.tolist() for p in layer] for layer in found]


@pytest.mark.parametrize("name", COMPRESSING)
@pytest.mark.parametrize("budget", BUDGETS)
def test_keeps_exactly_its_budget_sorted_unique_in_range(name: str, budget: int) -> None:
    result = kept(text(name, budget))
    sizes = [len(head) for layer in result for head in layer]
    assert sum(sizes) == budget * L * H
    for head in (head for layer in result for head in layer):
        assert head == sorted(set(head))
        assert 0 <= head[0] <= head[-1] < T


@pytest.mark.parametrize("name", COMPRESSING)
def test_keeps_sink_and_window(name: str) -> None:
    selector = parse_policy(text(name, 40)).method.parts().selector
    protected = set(range(selector.sink)) | set(range(T - selector.window, T))
    assert all(protected <= set(head) for layer in kept(text(name, 40)) for head in layer)


@pytest.mark.parametrize("name", COMPRESSING)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seq_len=st.integers(1, 120),
    retention=st.integers(1, 100),
    group=st.sampled_from([1, 2, 4]),
    n_kv=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 3),
)
def test_any_shape(name: str, seq_len: int, retention: int, group: int, n_kv: int, seed: int) -> None:
    # MHA (group 1), GQA and MQA (one KV head); prompts shorter than any window; tiny to full budgets.
    policy = parse_policy(text(name, f"{retention}%", n_kv))
    selector = policy.method.parts().selector
    views = toy_views(seq_len, seed, n_heads=group * n_kv, n_kv=n_kv)
    assert policy.budget is not None
    budget = policy.budget.resolve(seq_len)
    if budget < policy.minimum(seq_len):
        with pytest.raises(ConfigError, match="smaller than its"):
            kept_positions(policy, views)
        return
    result = kept_positions(policy, views)
    assert sum(len(head) for layer in result for head in layer) == budget * L * n_kv
    protected = set(range(min(selector.sink, seq_len))) | set(range(max(0, seq_len - selector.window), seq_len))
    for head in (head.tolist() for layer in result for head in layer):
        assert head == sorted(set(head))
        assert protected <= set(head) <= set(range(seq_len))


@pytest.mark.parametrize("options", ["mean,block=16", "weighted,block=full", "mean,block=8,gate=0.9"])
@pytest.mark.parametrize("name", COMPRESSING)
def test_slots_of_a_compensation_are_part_of_the_budget(name: str, options: str) -> None:
    policy, views = parse_policy(f"{text(name, 50)},compensate={options}"), toy_views()
    total = 0
    for view, heads in zip(views, kept_positions(policy, views), strict=True):
        for positions, gated in zip(heads, policy.compensation.gated(view), strict=True):
            total += len(positions) + (0 if gated else policy.compensation.slots(len(positions), T))
    assert total == 50 * L * H
    assert all("window_mean/32" in policy.needs() for _ in range("weighted" in options))


OFFICIAL = [
    "headkv:rule=official",
    "headkv:rule=factory",
    "pyramidkv:rule=factory",
    "pyramidkv:rule=adakv",
    "pyramidkv:rule=kvpress",
    "adakv:rule=official",
    "adakv:rule=kvpress",
    "cake:rule=official",
    "cake:rule=official,cascade=true",
    "cake:cascade=true",
]


@pytest.mark.parametrize("rule", OFFICIAL)
@pytest.mark.parametrize("seq_len", [1, 3, 5, 20, 31, 33, 90])
def test_official_rules_on_any_length(rule: str, seq_len: int) -> None:
    views = toy_views(seq_len)
    for budget in ("100%", "64entries", "5000entries", "60%", "45%", "36entries"):
        policy = parse_policy(f"{rule},budget={budget}")
        selector = policy.method.parts().selector
        assert policy.budget is not None
        entries = policy.budget.resolve(seq_len)
        if entries < policy.minimum(seq_len):
            with pytest.raises(ConfigError, match="smaller than its"):
                kept_positions(policy, views)
            continue
        heads = [p.tolist() for layer in kept_positions(policy, views) for p in layer]
        protected = set(range(max(0, seq_len - selector.window), seq_len))
        assert all(head == sorted(set(head)) and protected <= set(head) <= set(range(seq_len)) for head in heads)
        if entries == seq_len:
            assert heads == [list(range(seq_len))] * len(heads)


@pytest.mark.parametrize("name", COMPRESSING)
def test_is_deterministic(name: str) -> None:
    assert kept(text(name, 40)) == kept(text(name, 40))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("budget", ["100%", "90", "5000"])
def test_full_budget_or_more_is_the_identity(name: str, budget: str) -> None:
    policy = name if CLASSES[name].keeps_all else text(name, budget)
    assert kept(policy) == [[list(range(T))] * H] * L


@pytest.mark.parametrize("name", COMPRESSING)
@pytest.mark.parametrize("seq_len", [1, 2, 7, 31])
def test_prompts_shorter_than_the_window(name: str, seq_len: int) -> None:
    assert kept(text(name, 64), seq_len) == [[list(range(seq_len))] * H] * L


@pytest.mark.parametrize("name", COMPRESSING)
def test_one_order_serves_all_budgets(name: str) -> None:
    # What simulate relies on: the kept set at any count is a prefix of the selector's order.
    parts = parse_policy(text(name, 40)).method.parts()
    scores = parts.scorer.score(toy_views()[0])
    order = parts.selector.order(scores)
    assert sorted(order[0].tolist()) == list(range(T))
    for n in (36, 37, 50, 63, T):
        for head, positions in enumerate(parts.selector.keep(scores, [n] * H)):
            assert positions.tolist() == sorted(order[head, :n].tolist()), n


@pytest.mark.parametrize("name", COMPRESSING)
def test_budget_below_protected_is_refused(name: str) -> None:
    policy = parse_policy(text(name, 40))
    protected = policy.method.parts().selector.protected
    if protected < 2:
        pytest.skip("protects fewer than two entries: every budget is possible")
    with pytest.raises(ConfigError, match=f"smaller than its {protected} protected"):
        kept(text(name, f"{protected - 1}entries"))
    assert parse_policy(text(name, f"{protected}entries")).is_degenerate(T)
    assert not policy.is_degenerate(T)


@pytest.mark.parametrize("name", NAMES)
def test_text_and_dict_forms_round_trip(name: str) -> None:
    written = name if CLASSES[name].keeps_all else f"{name}:budget=12.5%"
    policy = Policy.parse(written)
    assert str(policy) == written
    assert policy_from_dict(policy_to_dict(policy)) == policy


@pytest.mark.parametrize("name", NAMES)
def test_says_what_it_is(name: str) -> None:
    cls = CLASSES[name]
    assert cls.__doc__
    assert all(getattr(cls, field) for field in ("source", "summary", "formula"))


@pytest.mark.parametrize("name", COMPRESSING)
def test_sample_seed_matters_only_to_policies_that_draw(name: str) -> None:
    same = kept(text(name, 40)) == kept(text(name, 40), sample=1)
    assert same == (name != "random")


@pytest.mark.parametrize("name", sorted(p.stem for p in Path(__file__).parents[2].glob("policies/methods/[a-z]*.py")))
def test_a_method_is_one_short_file(name: str) -> None:
    file = Path(__file__).parents[2] / "policies/methods" / f"{name}.py"
    assert len(file.read_text().splitlines()) < 100
