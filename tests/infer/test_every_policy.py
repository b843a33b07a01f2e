"""One test for every policy that can run: what real inference must keep to, whatever the method ranks by."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from kvtool.infer.cache import CompressedCache
from kvtool.policies import method_classes, parse_policy

CLASSES = method_classes()
NAMES = sorted(name for name, cls in CLASSES.items() if not (cls.simulate_only or cls.keeps_all))
KV_HEADS = {"mha": 4, "gqa": 2, "mqa": 1}
T, NEW = 70, 6


@pytest.fixture(scope="module")
def models(random_model: Callable[..., Any]) -> dict[str, Any]:
    return {kind: random_model("llama", num_key_value_heads=n) for kind, n in KV_HEADS.items()}


@pytest.fixture(scope="module")
def plain_text(models: dict[str, Any]) -> Callable[[str, int], list[int]]:
    """What the plain model says after a prompt of a length; the same for all policies."""
    return cache(lambda kind, seq_len: run(models[kind], None, seq_len))


def text(name: str, budget: str | int, heads: Path, plan: Path, budgets: Path) -> str:
    items = [f"budget={budget}", CLASSES[name].small]
    items += [f"heads={heads}"] if "heads" in CLASSES[name].__dataclass_fields__ and name != "optimal" else []
    items += [f"plan={plan}"] if name == "optimal" else []
    items += [f"file={budgets}"] if name == "plan" else []
    return f"{name}:" + ",".join(filter(None, items))


def run(model: Any, cache: Any, seq_len: int) -> list[int]:
    ids = torch.randint(3, 300, (1, seq_len), generator=torch.Generator().manual_seed(5))
    out = model.generate(ids, past_key_values=cache, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    return out[0, seq_len:].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", KV_HEADS)
@pytest.mark.parametrize("name", NAMES)
def test_real_inference(
    name: str,
    kind: str,
    models: dict[str, Any],
    plain_text: Callable[[str, int], list[int]],
    toy_heads: Callable[..., Path],
    toy_plan: Callable[..., Path],
    toy_budgets: Callable[..., Path],
) -> None:
    model, n_kv = models[kind], KV_HEADS[kind]
    heads = toy_heads(2, 4, n_kv), toy_plan(n_layers=2, n_kv_heads=n_kv), toy_budgets(2, 4, n_kv)
    plain = plain_text(kind, T)
    policy = parse_policy(text(name, 40, *heads))
    # Full and oversized budgets give the plain model's text; so does a prompt shorter than every window.
    assert run(model, CompressedCache(text(name, "100%", *heads), model), T) == plain
    assert run(model, CompressedCache(text(name, 5000, *heads), model), T) == plain
    assert run(model, CompressedCache(policy, model), 5) == plain_text(kind, 5)
    for budget in (40, max(policy.minimum(T), 2)):
        caches = [CompressedCache(text(name, f"{budget}entries", *heads), model) for _ in range(2)]
        first, second = (run(model, cache, T) for cache in caches)
        assert first == second
        entries = [n for layer in caches[0].entries() for row in layer for n in row]
        # The last new token is never fed.
        assert sum(entries) == (budget + NEW - 1) * 2 * n_kv
        per_entry = 2 * 16 * 4
        assert caches[0].count_bytes().used == sum(entries) * per_entry
