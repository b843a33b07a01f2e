"""One test for every policy: what simulate must keep to, whatever the method ranks by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kvtool.capture.reader import open_capture
from kvtool.models import LoadedModel
from kvtool.policies import method_classes, parse_policy
from kvtool.simulate.evaluate import evaluate_sample

CLASSES = method_classes()
NAMES = sorted(name for name, cls in CLASSES.items() if not cls.keeps_all)


@pytest.mark.parametrize("name", NAMES)
def test_predictions(
    name: str,
    llama_capture: tuple[Path, LoadedModel],
    toy_heads: Callable[..., Path],
    toy_plan: Callable[..., Path],
    toy_budgets: Callable[..., Path],
) -> None:
    info = llama_capture[1].info
    heads = toy_heads(n_layers=info.n_layers, n_heads=info.n_heads, n_kv_heads=info.n_kv_heads)
    more = f",{CLASSES[name].small}" if CLASSES[name].small else ""
    more += f",heads={heads}" if "heads" in CLASSES[name].__dataclass_fields__ and name != "optimal" else ""
    more += f",plan={toy_plan(info.n_layers, info.n_kv_heads)}" if name == "optimal" else ""
    more += f",file={toy_budgets(info.n_layers, info.n_heads, info.n_kv_heads)}" if name == "plan" else ""
    with open_capture(llama_capture[0]) as capture:
        sample = capture.samples[0]
        least = parse_policy(f"{name}:budget=100%{more}").minimum(sample.seq_len)
        budgets = [f"{max(least, 1)}entries", "30%", "60%", "100%", "5000", f"{least - 1}entries" if least > 1 else "1entries"]
        policies = [parse_policy(f"{name}:budget={budget}{more}") for budget in budgets]
        found, again = evaluate_sample(sample, policies), evaluate_sample(sample, policies[::-1])[::-1]
    assert found == again
    tiny, low, middle, full, oversized, below = found
    for prediction, policy in zip(found[:5], policies, strict=False):
        assert policy.budget is not None
        assert prediction.message is None
        assert prediction.entries == policy.budget.resolve(sample.seq_len)
        assert prediction.harm is not None
        assert prediction.harm >= 0
        assert prediction.recall is not None
        assert 0 <= prediction.recall <= 1 + 1e-6
    for prediction in (full, oversized):
        assert prediction.harm == pytest.approx(0, abs=1e-4)
        assert prediction.recall == pytest.approx(1, abs=1e-6)
    assert low.recall <= middle.recall + 1e-6  # type: ignore[operator]
    assert tiny.degenerate == (least > 1 or None) or least <= 1
    assert bool(below.message) == (least > 1)
