"""The answer of a study: what is compared, what is never recommended, and what a text's cache must have room for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kvtool.analysis.points import Place, Point, common_budgets, make_place, most_entries, nothing_chosen
from kvtool.analysis.reading import reading_answer, text_place
from kvtool.analysis.study import StudyData, choose, headline
from kvtool.analysis.study_heads import _shared

SAMPLES = [f"s{i}" for i in range(24)]


def place_of(policies: dict[str, int], heads: dict[str, list[list[int]]] | None = None) -> Place:
    """Policy -> right answers of the first so many prompts; entries after the budget."""
    records = []
    for policy, right in policies.items():
        method, _, rest = policy.partition(":budget=")
        budget = rest.partition(",")[0]
        share = float(budget.rstrip("%")) / 100 if budget else 1.0
        for i, sample in enumerate(SAMPLES):
            records.append({
                "sample": sample, "policy": policy, "method": method, "budget": budget or None, "retention": share,
                "entries": 100 * share, "seq_len": 100, "compress_at": "prompt", "status": "ok", "message": None,
                "degenerate": False, "metric": "exact", "score": float(i < right), "answer_accuracy": float(i < right),
                "kv_bytes_prompt_end": 1000 * share, "kv_bytes_full": 1000, "slack_bytes": 0, "tpot_s": 0.01,
                "meta": {"task": "niah"}, "head_entries": (heads or {}).get(method, [[10, 10]]),
            })  # fmt: skip
    found = make_place(records, "m")
    assert found is not None
    return found


def test_the_choice_is_among_retentions_that_all_methods_ran() -> None:
    grid = {f"{name}:budget={b}": 24 if b == "20%" else 2 for name in ("headkv", "snapkv") for b in ("10%", "20%")}
    place = place_of({"full": 24, **grid, "headkv:budget=13%": 24, "random:budget=13%": 0})
    assert common_budgets(place.points) == {"10%", "20%"}
    choice = choose(place)
    assert choice.point is not None
    assert choice.point.budget == "20%"
    assert len(choice.tied) == 1
    assert f"not told apart from it there: {choice.tied[0]}" in headline([choice])
    assert f"not told apart from it there: {choice.tied[0]}" in headline([choice, choice])
    unequal = replace(choice, tied=())
    assert f"{choice.tied[0]} in 1 of 2" in headline([choice, unequal])
    assert "not told apart" not in headline([unequal])


def test_the_full_cache_as_the_answer_differs_from_itself_by_nothing() -> None:
    choice = choose(place_of({"full": 24, "snapkv:budget=10%": 6}))
    assert choice.point is None
    assert choice.change is not None
    assert (choice.change.mean, choice.change.low, choice.change.high) == (0.0, 0.0, 0.0)
    assert choice.why.startswith("closest: snapkv at 10 %, task score -0.75 (")


def test_lazy_eviction_that_leaves_nothing_chosen() -> None:
    lazy = "h2o:budget=512,window=64,sink=8,decode=evict,interval={}"
    # 512 - (interval - 1) entries are left, at least the 72 protected ones.
    assert [nothing_chosen(lazy.format(n), 1024) for n in (1, 64, 256, 440, 441, 512)] == [False] * 4 + [True] * 2
    assert not nothing_chosen("snapkv:budget=10%", 1024)
    bare = "h2o:budget=20%,sink=4,window=4,decode=evict,interval=16"
    assert choose(place_of({"full": 24, bare: 24})).point is None


@pytest.mark.parametrize(
    ("interval", "evicted", "most"), [(1, True, 40.0), (64, True, 100.0), (64, False, 40.0), (None, True, 40.0)]
)
def test_room_that_a_text_needs(interval: int | None, evicted: bool, most: float) -> None:
    assert most_entries({"entries": 40.0, "planned_entries": 100, "interval": interval, "evicted": evicted}) == most


def reading(policy: str, entries: float, interval: int, planned: int) -> list[dict[str, Any]]:
    method = policy.partition(":budget=")[0]
    return [
        {"sample": f"t{i}", "document": "walden", "policy": policy, "method": method, "budget": None, "status": "ok", "n": 10,
         "nll": 20.0 + i, "degenerate": False, "entries": entries, "planned_entries": planned, "interval": interval, "evicted": True}
        for i in range(4)
    ]  # fmt: skip


def row(label: str, entries: float) -> dict[str, Any]:
    return {
        "model": "m", "task": "walden", "length": 1024, "label": label, "policy": label, "budget": None, "note": "",
        "perplexity": 10.0, "perplexity_ratio": 1.0, "perplexity_ratio_high": 1.01, "effective_context": entries,
    }  # fmt: skip


def test_the_answer_by_texts_counts_what_must_be_held_and_says_what_fails() -> None:
    bare = "h2o:budget=512,window=64,sink=8,decode=evict,interval=512"
    text = text_place([*reading("full", 1023, 1, 1024), *reading(bare, 141, 512, 512)], "m", {}, "walden", 1024)
    assert text is not None
    assert next(p for p in text.points if p.policy == bare).entries == 512
    good, weak = np.ones(24), np.zeros(24)
    points = tuple(
        Point(name, "", policy, policy, None, "ok", False, values={"score": values})
        for name, policy, values in (("full", "full", good), ("a", "streaming:window=64", weak), ("b", "h2o_8_32_256", good))
    )
    needles = Place("m", "niah", 1024, "prompt", "exact", "infer", tuple(SAMPLES), points)

    def answer(*rows: dict[str, Any]) -> str:
        found = reading_answer(StudyData("s", "small", "", (needles,), ({},), list(rows), [], texts=(text,)))
        assert found is not None
        return found[0]

    assert "run b: 256 of 1024 entries" in answer(row(bare, 141.0), row("b", 256.0))
    assert "fails" not in answer(row("b", 256.0))
    assert "run a: 64 of 1024 entries" in answer(row("a", 64.0), row("b", 256.0))
    assert "fails on this study's tasks: -1.00 (" in answer(row("a", 64.0), row("b", 256.0))


def test_heads_are_drawn_where_most_methods_are() -> None:
    uneven = {"hace": [[5, 15]], "headkv": [[2, 18]]}
    grid = {f"{name}:budget={b}": 20 for name in ("hace", "headkv", "snapkv", "random") for b in ("5%", "10%", "20%")}
    added = {f"headkv:budget={b}": 20 for b in ("12%", "13%", "14%", "15%", "16%")}
    place = place_of({"full": 24, **grid, **added}, uneven)
    assert {(p.label, p.budget) for p in _shared(place)} == {("hace", "10%"), ("headkv", "10%"), ("snapkv", "10%")}
    assert _shared(place_of({"full": 24, "snapkv:budget=10%": 20})) == []
