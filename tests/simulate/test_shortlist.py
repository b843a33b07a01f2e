"""The shortlist from predictions written by hand: what is dominated, represented, cut and always in."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtool.models import ModelInfo
from kvtool.policies import Policy
from kvtool.simulate.evaluate import Prediction
from kvtool.simulate.rank import Row, rank_rows, resample_weights
from kvtool.simulate.shortlist import Shortlist, make_shortlist, read_shortlist, write_shortlist

INFO = ModelInfo("toy", "Toy", "0", n_layers=3, n_heads=4, n_kv_heads=2, head_dim=8, max_positions=512, windows=(None,) * 3)


def ranked(
    harms: dict[str, list[float]], entries: dict[str, float] | None = None, recall: dict[str, float] | None = None
) -> list[Row]:
    """Rank configurations with the given harm per sample at 100 tokens; `entries` where the budget is not what is kept."""
    policies = [Policy.parse(text) for text in harms]
    n_samples = len(next(iter(harms.values())))
    predictions = []
    for s in range(n_samples):
        sample = []
        for i, (text, policy) in enumerate(zip(harms, policies, strict=True)):
            kept = (entries or {}).get(text, policy.asked(100))
            # Recalls differ unless the test says otherwise: nothing is alike by accident.
            harm = harms[text][s]
            sample.append(Prediction(kept, kept / 100, harm, harm, harm, (recall or {}).get(text, 0.5 + i / 1000)))
        predictions.append(sample)
    return rank_rows(policies, predictions, INFO, [3] * n_samples, resample_weights(n_samples, 1000, 0))


def made(harms: dict[str, list[float]], cap: int | None = None, **more: dict[str, float]) -> Shortlist:
    rows = ranked(harms, **more)
    found = make_shortlist(rows, resample_weights(len(next(iter(harms.values()))), 1000, 0), cap)
    assert {e["policy"] for e in found.entries} == {row.policy for row in rows if row.shortlisted}
    return found


def shortlisted(harms: dict[str, list[float]], cap: int | None = None, **more: dict[str, float]) -> dict[str, str]:
    return {e["policy"]: e["why"] for e in made(harms, cap, **more).entries}


def test_comparisons_are_paired() -> None:
    # Prompts differ far more than policies do. h2o is worse on every prompt; streaming is better on half of them.
    best = [float(10 * s) for s in range(8)]
    found = shortlisted(
        {
            "snapkv:budget=50%": best,
            "h2o:budget=50%": [h + 0.5 for h in best],
            "streaming:budget=50%": [h + (2.0 if s % 2 else -1.8) for s, h in enumerate(best)],
            "random:budget=50%": [h + 50 for h in best],
        }
    )
    assert set(found) == {"snapkv:budget=50%", "streaming:budget=50%", "random:budget=50%"}
    assert found["streaming:budget=50%"] == "not clearly worse than snapkv:budget=50%"
    assert found["random:budget=50%"].startswith("control")


@pytest.mark.parametrize("n_prompts", [1, 5])
def test_a_few_prompts_prove_nothing(n_prompts: int) -> None:
    found = shortlisted({"snapkv:budget=50%": [1.0] * n_prompts, "h2o:budget=50%": [9.0] * n_prompts})
    assert f"{n_prompts} prompts are too few to tell" in found["h2o:budget=50%"]


def test_each_budget_has_its_own_list() -> None:
    found = shortlisted({"h2o:budget=50%": [1.0] * 8, "snapkv:budget=50%": [2.0] * 8, "snapkv:budget=80%": [0.5] * 8})
    assert set(found) == {"h2o:budget=50%", "snapkv:budget=80%"}


KERNELS = {f"snapkv:budget=50%,kernel={2 * k + 1}": [1.0 + 0.01 * k] * 3 for k in range(40)}


def test_without_a_cap_every_close_one_is_in() -> None:
    found = made(KERNELS)
    assert len(found.entries) == 40
    assert found.cut == {}


def test_a_cap_keeps_the_best_and_records_the_rest() -> None:
    found = made({**KERNELS, "random:budget=50%": [9.0] * 3}, cap=4)
    texts = [str(Policy.parse(text)) for text in KERNELS]
    assert [e["policy"] for e in found.entries] == [*texts[:4], "random:budget=50%"]
    assert found.cut == {"50%": texts[4:]}


def test_a_cap_that_cuts_nothing_says_nothing() -> None:
    assert made({"snapkv:budget=50%": [1.0] * 8, "h2o:budget=50%": [2.0] * 8}, cap=1).cut == {}


def test_what_keeps_less_is_not_dominated_by_what_keeps_more() -> None:
    # Official rules miss their budget: more harm at fewer bytes is another offer, more harm at more bytes is none.
    harms = {"snapkv:budget=50%": [1.0] * 8, "cake:budget=50%,rule=official": [2.0] * 8}
    assert set(shortlisted(harms, entries={"cake:budget=50%,rule=official": 45.0})) == {*harms}
    assert set(shortlisted(harms, entries={"cake:budget=50%,rule=official": 51.0})) == {"snapkv:budget=50%"}


def test_what_keeps_more_does_not_dominate_the_others() -> None:
    harms = {"snapkv:budget=50%": [2.0] * 8, "pyramidkv:budget=50%,rule=factory": [1.0] * 8, "h2o:budget=50%": [3.0] * 8}
    found = shortlisted(harms, entries={"pyramidkv:budget=50%,rule=factory": 56.0})
    assert set(found) == {"snapkv:budget=50%", "pyramidkv:budget=50%,rule=factory"}


def test_policies_without_a_budget_meet_those_of_at_most_their_bytes() -> None:
    small, large = "K_uniform16_aware", "K_uniform64_aware"  # 20 and 68 entries
    harms = {"snapkv:budget=40%": [2.0] * 8, small: [9.0] * 8, large: [3.0] * 8, "full": [0.0] * 8}
    found = shortlisted(harms)
    # The small one has no rival; the large one is clearly worse than what keeps 40; the full cache is run anyway.
    names = {str(Policy.parse(small)): "smallest predicted risk of all that keep at most as many bytes"}
    assert found == {"snapkv:budget=40%": "smallest predicted risk at this budget", **names}
    assert str(Policy.parse(large)) in shortlisted({**harms, large: [1.9] * 8})


def test_what_cannot_be_told_apart_is_run_once() -> None:
    names = ["snapkv:budget=50%,kernel=9", "snapkv:budget=50%", "snapkv:budget=50%,compensate=refit"]
    recall = dict.fromkeys(names, 0.5)
    # The last digits of a sum depend on its order.
    harms = {names[0]: [1.0] * 8, names[1]: [1.0 + 1e-13] * 8, names[2]: [1.0] * 8}
    found = made(harms, recall=recall)
    assert [(e["policy"], e.get("alike")) for e in sorted(found.entries, key=lambda e: e["policy"])] == [
        ("snapkv:budget=50%", ["snapkv:budget=50%,kernel=9"]),
        # The same kept sets, but other values in them.
        ("snapkv:budget=50%,compensate=refit", None),
    ]


def test_prompts_without_a_recall_hide_no_likeness() -> None:
    """NaN is not equal to itself; answers of one token have no recall."""
    texts = [f"snapkv:budget=50%,kernel={k}" for k in (1, 3)]
    found = made({text: [1.0] * 8 for text in texts}, recall=dict.fromkeys(map(str, texts), float("nan")))
    assert len(found.entries) == 1
    assert len(found.entries[0]["alike"]) == 1


def test_the_same_harm_on_average_is_not_alike() -> None:
    harms = {"snapkv:budget=50%": [1.0, 3.0] * 4, "h2o:budget=50%": [3.0, 1.0] * 4}
    assert len(shortlisted(harms, recall=dict.fromkeys(harms, 0.5))) == 2


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.lists(st.integers(0, 5), min_size=8, max_size=8)), min_size=1, max_size=12))
def test_nothing_is_left_out_without_a_better_one(points: list[tuple[int, list[int]]]) -> None:
    """Against a literal reading: left out means that something at most as large is better in nearly all draws."""
    harms = {f"h2o:budget=50%,window={i + 1}": [float(h) for h in row] for i, (_, row) in enumerate(points)}
    kept = {str(Policy.parse(text)): 40.0 + size for text, (size, _) in zip(harms, points, strict=True)}
    rows = ranked(harms, entries={text: kept[str(Policy.parse(text))] for text in harms})
    weights = resample_weights(8, 400, 0)
    found = {e["policy"] for e in make_shortlist(rows, weights).entries}
    for row in rows:
        rivals = [r for r in rows if kept[r.policy] <= kept[row.policy]]
        best = min(sum(r.loss) for r in rivals)
        better = [r for r in rivals if sum(r.loss) == best]
        shares = []
        for rival in better:
            gaps = [a - b for a, b in zip(row.loss, rival.loss, strict=True)]
            shares.append(
                sum(sum(w * g for w, g in zip(draw, gaps, strict=True)) <= 0 for draw in weights.tolist()) / len(weights)
            )
        if row.policy in found:
            assert max(shares) >= 0.015
        else:
            assert min(shares) <= 0.035
    assert found


def test_the_file_says_what_the_cap_left_out_and_reads_back(tmp_path: Path) -> None:
    found = made(KERNELS, cap=2)
    write_shortlist(tmp_path / "s.yaml", found, {"capture": "x"})
    value = yaml.safe_load((tmp_path / "s.yaml").read_text())
    assert len(value["left_out_by_the_cap"]["50%"]) == 38
    assert [str(p) for p in read_shortlist(tmp_path / "s.yaml")] == [e["policy"] for e in found.entries]
