"""One test for every registered policy: what each must keep to, whatever it ranks by."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvtool.errors import ConfigError
from kvtool.policies import Policy, method_classes, parse_policy, policy_from_dict, policy_to_dict, select

L, Q, H, T, D = 2, 8, 4, 90, 16
NAMES = sorted(method_classes())
COMPRESSING = [n for n in NAMES if not method_classes()[n].keeps_all]


def tensors(seq_len: int = T, seed: int = 0) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int) -> list[torch.Tensor]:
        return [torch.randn(heads, seq_len, D, generator=generator) for _ in range(L)]

    return draw(Q), draw(H), draw(H)


def kept(policy: str, seq_len: int = T, seed: int = 0, **options: Any) -> list[list[list[int]]]:
    return [[p.tolist() for p in layer] for layer in select(policy, *tensors(seq_len, seed), **options)]


@pytest.mark.parametrize("name", COMPRESSING)
@pytest.mark.parametrize("budget", [36, 50, 89])
def test_keeps_exactly_its_budget_sorted_unique_in_range(name: str, budget: int) -> None:
    result = kept(f"{name}:budget={budget}")
    sizes = [len(head) for layer in result for head in layer]
    assert sum(sizes) == budget * L * H
    for head in (head for layer in result for head in layer):
        assert head == sorted(set(head))
        assert 0 <= head[0] <= head[-1] < T


@pytest.mark.parametrize("name", COMPRESSING)
def test_keeps_sink_and_window(name: str) -> None:
    selector = parse_policy(f"{name}:budget=40").method.parts().selector
    protected = set(range(selector.sink)) | set(range(T - selector.window, T))
    assert all(protected <= set(head) for layer in kept(f"{name}:budget=40") for head in layer)


@pytest.mark.parametrize("name", COMPRESSING)
def test_is_deterministic(name: str) -> None:
    assert kept(f"{name}:budget=40") == kept(f"{name}:budget=40")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("budget", ["100%", "90", "5000"])
def test_full_budget_or_more_is_the_identity(name: str, budget: str) -> None:
    text = name if method_classes()[name].keeps_all else f"{name}:budget={budget}"
    assert kept(text) == [[list(range(T))] * H] * L


@pytest.mark.parametrize("name", COMPRESSING)
@pytest.mark.parametrize("seq_len", [1, 2, 7, 31])
def test_prompts_shorter_than_the_window(name: str, seq_len: int) -> None:
    assert kept(f"{name}:budget=64", seq_len) == [[list(range(seq_len))] * H] * L


@pytest.mark.parametrize("name", COMPRESSING)
def test_larger_budgets_hold_smaller_kept_sets(name: str) -> None:
    small, large = kept(f"{name}:budget=40"), kept(f"{name}:budget=60")
    for layer, (few, many) in enumerate(zip(small, large, strict=True)):
        assert all(set(a) <= set(b) for a, b in zip(few, many, strict=True)), layer


@pytest.mark.parametrize("name", COMPRESSING)
def test_budget_below_protected_is_refused(name: str) -> None:
    policy = parse_policy(f"{name}:budget=40")
    protected = policy.method.parts().selector.protected
    if protected < 2:
        pytest.skip("protects fewer than two entries: every budget is possible")
    with pytest.raises(ConfigError, match=f"smaller than its {protected} protected"):
        kept(f"{name}:budget={protected - 1}entries")
    assert parse_policy(f"{name}:budget={protected}entries").is_degenerate(T)
    assert not policy.is_degenerate(T)


@pytest.mark.parametrize("name", NAMES)
def test_text_and_dict_forms_round_trip(name: str) -> None:
    text = name if method_classes()[name].keeps_all else f"{name}:budget=12.5%"
    policy = Policy.parse(text)
    assert str(policy) == text
    assert policy_from_dict(policy_to_dict(policy)) == policy


@pytest.mark.parametrize("name", NAMES)
def test_says_what_it_is(name: str) -> None:
    cls = method_classes()[name]
    assert cls.__doc__
    assert all(getattr(cls, field) for field in ("source", "summary", "formula"))


@pytest.mark.parametrize("name", COMPRESSING)
def test_sample_seed_matters_only_to_policies_that_draw(name: str) -> None:
    same = kept(f"{name}:budget=40", seed=0) == [
        [p.tolist() for p in layer] for layer in select(f"{name}:budget=40", *tensors(), seed=1)
    ]
    assert same == (name != "random")
