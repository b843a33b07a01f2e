"""A search on a real capture against literal loops, the verdict on prompts that it never saw, and what a kill leaves."""

from __future__ import annotations

import csv
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from kvtool.capture.reader import open_capture
from kvtool.errors import ConfigError, DataError
from kvtool.files import read_records
from kvtool.models import LoadedModel
from kvtool.policies import Policy
from kvtool.simulate.choose import MARGIN, confirmation
from kvtool.simulate.evaluate import evaluate_sample
from kvtool.simulate.search import SearchConfig, SearchSummary, run_search
from kvtool.simulate.shortlist import read_shortlist
from kvtool.simulate.trials import By, measure
from kvtool.simulate.verdict import BETTER, FEW, SAME, UNCLEAR, WORSE, compare, split_prompts, tied_with_best, words

pytest.importorskip("optuna")
WINDOWS, KERNELS, POOLS = (8, 16), (1, 5), ("max", "avg")
BUDGETS = ("20%", "40%")
GRID = "snapkv:window={8,16},kernel={1,5},pool={max,avg}"


@pytest.fixture(scope="module")
def capture(tmp_path_factory: pytest.TempPathFactory, make_capture: Callable[..., LoadedModel]) -> Path:
    path = tmp_path_factory.mktemp("search") / "c.h5"
    make_capture(path, n=12)
    return path


@pytest.fixture(scope="module", params=["risk", "harm"])
def grid(request: pytest.FixtureRequest, capture: Path, tmp_path_factory: pytest.TempPathFactory) -> SearchSummary:
    config = SearchConfig(str(capture), GRID, BUDGETS, draws=200, by=request.param)
    return run_search(config, tmp_path_factory.mktemp("grid") / "out")


def literal(path: Path, prompts: list[int], text: str, by: str) -> list[float]:
    """Risk or harm of one policy, one prompt at a time."""
    found = []
    with open_capture(path) as capture:
        for i in prompts:
            (prediction,) = evaluate_sample(capture.samples[i], [Policy.parse(text)])
            assert prediction.harm is not None
            assert prediction.evidence is not None  # the prompts are needles
            found.append(prediction.harm if by == "harm" else np.log(1 + prediction.harm) + 8 * prediction.evidence)
    return found


def test_every_setting_is_tried_and_the_best_is_found(grid: SearchSummary, capture: Path) -> None:
    searched, held_out = split_prompts(12, 0)
    assert (len(searched), len(held_out), set(searched) & set(held_out)) == (6, 6, set())
    assert (grid.sampler, grid.n_trials) == ("grid", 8)
    for verdict in grid.verdicts:
        table = {
            text: float(np.mean(literal(capture, searched, text, grid.by)))
            for w, k, p in itertools.product(WINDOWS, KERNELS, POOLS)
            if (text := str(Policy.parse(f"snapkv:budget={verdict.budget},window={w},kernel={k},pool={p}")))
        }
        assert verdict.searched == pytest.approx(min(table.values()), abs=1e-12)
        assert table[verdict.policy] == pytest.approx(verdict.searched, abs=1e-12)
        assert (
            verdict.default == f"snapkv:budget={verdict.budget},window=16,kernel=5"
        )  # 32 and 7 are not in the space: the nearest
        chosen, default = (literal(capture, held_out, text, grid.by) for text in (verdict.policy, verdict.default))
        assert verdict.held_out == pytest.approx(np.mean(chosen), abs=1e-12)
        assert verdict.difference == pytest.approx(np.mean(chosen) - np.mean(default), abs=1e-12)
        assert verdict.low <= verdict.difference <= verdict.high


def test_the_result_is_a_shortlist(grid: SearchSummary) -> None:
    policies = {str(policy) for policy in read_shortlist(grid.folder / "search.yaml")}
    value = yaml.safe_load((grid.folder / "search.yaml").read_text())
    assert {c["policy"] for c in value["chosen"]} <= policies
    assert {p for p in policies if p.startswith("random")}
    assert value["prompts"] == {"searched": 6, "held_out": 6}
    assert value["by"] == grid.by
    assert f"{grid.by}, searched" in grid.text()
    assert (grid.folder / "search.png").stat().st_size > 5000
    drawn = list(csv.DictReader((grid.folder / "search.csv").read_text().splitlines()))
    trials = [line for line in drawn if line["panel"] == "trials" and line["what"] == drawn[0]["what"]]
    assert len(trials) == grid.n_trials
    best = [float(line["best_so_far"]) for line in trials if line["best_so_far"]]
    assert best == sorted(best, reverse=True)
    assert best[-1] == min(float(line["value"]) for line in trials if line["value"])
    chosen = list(csv.DictReader((grid.folder / "choices.csv").read_text().splitlines()))
    assert [line["policy"] for line in chosen] == [verdict.policy for verdict in grid.verdicts]
    assert all((grid.folder / f"choices.{ending}").stat().st_size for ending in ("md", "tex"))
    assert all(v.policy in grid.text() and v.verdict in grid.text() for v in grid.verdicts)


def test_controls_are_protected_as_what_they_control(grid: SearchSummary) -> None:
    for entry in confirmation(grid.verdicts):
        if entry["policy"].startswith("random"):
            selector = Policy.parse(entry["policy"]).method.parts().selector
            assert (selector.sink, selector.window) in {(0, w) for w in WINDOWS}


def test_the_same_call_changes_nothing_and_another_space_is_refused(grid: SearchSummary, capture: Path) -> None:
    config = SearchConfig(str(capture), GRID, BUDGETS, draws=200, by=grid.by)
    before = (grid.folder / "trials.jsonl").read_bytes(), (grid.folder / "search.yaml").read_bytes()
    assert run_search(config, grid.folder).verdicts == grid.verdicts
    assert ((grid.folder / "trials.jsonl").read_bytes(), (grid.folder / "search.yaml").read_bytes()) == before
    with pytest.raises(ConfigError, match="another configuration"):
        run_search(SearchConfig(str(capture), "snapkv:window={8,16}", BUDGETS, draws=200, by=grid.by), grid.folder)
    with pytest.raises(ConfigError, match=r"another configuration .*by: "):
        run_search(replace(config, by="harm" if grid.by == "risk" else "risk"), grid.folder)


@pytest.mark.parametrize("by", ["risk", "harm"])
def test_auto_takes_the_simplest_of_the_ties(capture: Path, tmp_path: Path, by: By) -> None:
    space = "snapkv:window={8,16},kernel={1,7},compensate={none,mean},block={16,full}"
    summary = run_search(SearchConfig(str(capture), space, ("40%",), auto=True, draws=200, by=by), tmp_path / "out")
    (verdict,) = summary.verdicts
    records = [r for r in read_records(tmp_path / "out" / "trials.jsonl") if r["repeats"] is None]
    # none has no block: 2 windows x 2 kernels x (none, two blocks)
    assert (summary.n_trials, summary.n_repeated, len(records)) == (16, 4, 12)
    loss = np.asarray([r["loss"]["40%"] for r in records])
    weights = np.random.default_rng(0).multinomial(6, np.full(6, 1 / 6), size=200) / 6
    best = int(np.argmin(loss.mean(1)))
    # 5 % more harm is a step of log 1.05 in the risk, which counts harm by its logarithm.
    most = loss[best].mean() * (1 + MARGIN) if by == "harm" else loss[best].mean() + np.log(1 + MARGIN)
    near = [i for i in range(12) if loss[i].mean() <= most]
    plain = [i for i in near if records[i]["params"]["compensate"] == "none"]
    tied = [i for i in near if np.quantile(weights @ (loss[i] - loss[best]), 0.025) <= 1e-9]
    names = {records[i]["policy"] for i in (plain or tied)}
    assert verdict.policy.replace("budget=40%,", "").replace(":budget=40%", "") in names
    # Of those without a compensation the one with the fewest changes: kernel 7 is the default, 16 the window nearest to it.
    changes = {r["policy"]: (r["params"]["kernel"] != 7) + (r["params"]["window"] != 16) for r in records}
    if plain:
        assert changes[verdict.policy.replace("budget=40%,", "").replace(":budget=40%", "")] == min(changes[n] for n in names)
    assert verdict.best.replace("budget=40%,", "").replace(":budget=40%", "") == records[best]["policy"]
    assert summary.marginals["40%"]["window"]["8"] == pytest.approx(
        min(x.mean() for x, r in zip(loss, records, strict=True) if r["params"]["window"] == 8)
    )
    assert set(summary.marginals["40%"]["compensation"]) == {"none", "mean 16", "mean full"}
    assert (tmp_path / "out" / "auto.yaml").exists()


def test_a_searched_budget_gives_a_front(capture: Path, tmp_path: Path) -> None:
    config = SearchConfig(str(capture), "snapkv:budget=10%..60%,window={8,16},pool={max,avg}", (), trials=40, draws=100)
    summary = run_search(config, tmp_path / "out")
    kept, risk = ([getattr(v, name) for v in summary.verdicts] for name in ("retention", "searched"))
    assert summary.sampler == "nsga2"
    assert len(kept) > 2
    assert kept == sorted(kept)
    assert risk == sorted(risk, reverse=True)
    assert all(v.default and f"budget={v.budget}" in v.default for v in summary.verdicts)


def test_windows_and_budgets_that_do_not_fit_are_said(capture: Path, tmp_path: Path) -> None:
    summary = run_search(
        SearchConfig(str(capture), "snapkv:window=1..64,kernel={1,3}", ("5%", "30%"), draws=50), tmp_path / "out"
    )
    assert any("searched at {8,16,32,64}" in note for note in summary.notes)
    small, large = summary.verdicts
    # 5 % of 230 tokens are 12 entries: the default window of 32 does not fit in, the next smaller one that does is compared with.
    assert small.default == "snapkv:budget=5%,window=8,kernel=3"
    assert large.default == "snapkv:budget=30%,kernel=3"
    records = read_records(tmp_path / "out" / "trials.jsonl")
    assert {r["params"]["window"] for r in records if r["values"][0] is None} == {16, 32, 64}
    with pytest.raises(ConfigError, match="no setting"):
        run_search(SearchConfig(str(capture), "snapkv:window={32,64},kernel={1,3}", ("5%",), draws=50), tmp_path / "none")


def test_what_keeps_more_than_its_budget_is_no_setting(capture: Path) -> None:
    with open_capture(capture) as file:
        policy = Policy.parse("pyramidkv:budget=30%,window=8,rule=factory,beta=3")
        (found,) = measure(file.samples[:3], [policy])
        kept = [evaluate_sample(s, [policy])[0].entries for s in file.samples[:3]]
    assert bool(found.message) == any(k > 69.5 for k in kept)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"space": "snapkv:window={20,40}"}, "window_mean/20"),
        ({"space": "hace"}, "heads"),
        ({"space": "cake:gamma=1..9", "sampler": "grid"}, "infinitely many"),
        ({"space": "snapkv:budget=2%..9%,kernel={1,3}", "auto": True}, "with -r"),
        ({"space": ""}, "a space is needed"),
        ({"space": "snapkv", "trials": 0}, "at least 1"),
        ({"space": "snapkv", "by": "luck"}, "neither risk nor harm"),
        ({"space": "snapkv", "auto": True, "sampler": "tpe"}, "does not fit"),
    ],
)
def test_wrong_requests_get_one_clear_line(capture: Path, tmp_path: Path, config: dict[str, Any], said: str) -> None:
    with pytest.raises((ConfigError, DataError), match=said):
        run_search(SearchConfig(str(capture), **config), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_prompt_is_not_searched(make_capture: Callable[..., LoadedModel], tmp_path: Path) -> None:
    make_capture(tmp_path / "c.h5", n=1)
    with pytest.raises(DataError, match="at least 2"):
        run_search(SearchConfig(str(tmp_path / "c.h5"), "snapkv"), tmp_path / "out")


def test_words() -> None:
    assert words((-1.0, -2.0, -0.1), 8, same=False) == BETTER
    assert words((1.0, 0.1, 2.0), 8, same=False) == WORSE
    assert words((-1.0, -2.0, 0.1), 8, same=False) == UNCLEAR
    assert words((0.0, 0.0, 0.0), 8, same=True) == SAME
    assert words((-1.0, -2.0, -0.1), 5, same=False).startswith(FEW)


def test_intervals_and_ties_by_hand() -> None:
    weights = np.random.default_rng(0).multinomial(8, np.full(8, 1 / 8), size=2000) / 8
    difference, low, high = compare([1.0] * 8, [2.0, 2.2, 1.8, 2.1, 1.9, 2.3, 1.7, 2.0], weights)
    assert difference == pytest.approx(-1)
    # standard error of the mean: the population deviation 0.187 / sqrt 8
    assert (high - low) / 2 == pytest.approx(1.96 * 0.187 / np.sqrt(8), rel=0.1)
    loss = np.asarray([[1.0] * 8, [1.1, 0.9] * 4, [2.0] * 8, [float("nan")] * 8])
    assert tied_with_best(loss, weights) == [0, 1]


def test_kill_anywhere_and_the_same_trials_come_out(capture: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    script = Path(__file__).parent / "kill_search.py"
    command = [sys.executable, str(script), str(capture), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) == 4
    names = ("run.json", "trials.jsonl", "search.yaml", "search.png")
    whole = {name: (tmp_path / "undisturbed" / name).read_bytes() for name in names}
    assert len(whole["trials.jsonl"].splitlines()) == 20
    for folder in sorted(tmp_path.glob("step*")):
        assert {name: (folder / name).read_bytes() for name in names} == whole, folder.name
        journal = [json.loads(line) for line in (folder / "study.journal").read_bytes().splitlines()]
        assert sum("params" in line for line in journal) == 20
