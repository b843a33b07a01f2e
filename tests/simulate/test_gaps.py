"""Gaps to the oracle: parts that add up, yardsticks that are optimal, shapes that policies really have."""

from __future__ import annotations

import csv
import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from kvtool.capture.reader import open_capture
from kvtool.cli import cli
from kvtool.errors import ConfigError, DataError
from kvtool.models import LoadedModel
from kvtool.policies import Policy, expand_policies, parse_policy
from kvtool.policies.shapes import group_of
from kvtool.simulate.curves import head_harm
from kvtool.simulate.evaluate import evaluate_sample, sample_table
from kvtool.simulate.gap_curves import ORACLE, PromptCurves, prompt_curves, protected_oracle, ranking_of
from kvtool.simulate.gap_rows import GapRow, fill_row, largest_parts, start_row
from kvtool.simulate.gap_runner import GapConfig, run_gaps
from kvtool.simulate.gap_words import number, sentences
from kvtool.simulate.gaps import PARTS, Decomposer, Gaps, Yardstick, harm_at
from kvtool.simulate.plan import export_plan
from kvtool.simulate.rank import resample_weights

W = "window=8,kernel=3"
TEXTS = [
    f"snapkv:{W}",
    "h2o:window=4,sink=2",
    f"pyramidkv:{W}",
    "cake:window=8",
    f"adakv:{W}",
    f"lava:{W}",
    "keydiff",
    "random:window=8",
]
BUDGETS = ["8%", "30%", "70%"]


@pytest.fixture(scope="module")
def policies() -> list[Policy]:
    return expand_policies(TEXTS, BUDGETS)


@pytest.fixture(scope="module")
def prompts(llama_capture: tuple[Path, LoadedModel], policies: list[Policy]) -> list[PromptCurves]:
    with open_capture(llama_capture[0]) as capture:
        return [prompt_curves(sample, policies) for sample in capture.samples]


def all_gaps(prompts: list[PromptCurves], policies: list[Policy]) -> list[Gaps]:
    decomposer, found = Decomposer(prompts), []
    for index, policy in enumerate(policies):
        counts = [prompt.counts[index] for prompt in prompts]
        assert not any(isinstance(count, str) for count in counts)
        shape = policy.method.parts().allocator.budget_shape()
        found.append(decomposer.gaps(ranking_of(policy), counts, shape, prompts[0].kinds[index]))  # type: ignore[arg-type]
    return found


def test_harms_are_those_of_simulate(
    llama_capture: tuple[Path, LoadedModel], prompts: list[PromptCurves], policies: list[Policy]
) -> None:
    gaps = all_gaps(prompts, policies)
    with open_capture(llama_capture[0]) as capture:
        for s, sample in enumerate(capture.samples):
            for each, prediction in zip(gaps, evaluate_sample(sample, policies), strict=True):
                assert each.harm[s] == pytest.approx(prediction.harm, abs=1e-9)
        # And the curves those of the literal function.
        sample, policy = capture.samples[0], policies[0]
        parts, views = policy.method.parts(), sample.views()
        orders = np.stack([parts.selector.order(parts.scorer.score(view)).numpy() for view in views])
        counts = np.broadcast_to(np.arange(sample.seq_len + 1)[:, None, None], (sample.seq_len + 1, *orders.shape[:2]))
        np.testing.assert_allclose(
            prompts[0].harm[ranking_of(policy)], head_harm(sample_table(sample), orders, counts), atol=1e-9
        )


def test_parts_add_up_and_fixed_budgets_never_beat_the_best(prompts: list[PromptCurves], policies: list[Policy]) -> None:
    for policy, gaps in zip(policies, all_gaps(prompts, policies), strict=True):
        parts = gaps.parts()
        np.testing.assert_allclose(sum(parts.values()), gaps.harm - gaps.oracle, atol=1e-9)
        assert gaps.slack <= 1e-9, policy
        assert parts["price"].mean() >= -1e-9, policy
        if not gaps.adapts:
            assert parts["allocation"].mean() >= -1e-9, policy
        if policy.method.parts().allocator.budget_shape() == "uniform":
            np.testing.assert_array_equal(parts["allocation"], 0.0)
            assert not gaps.adapts


def test_no_budgets_of_the_shape_do_less_harm(prompts: list[PromptCurves], policies: list[Policy]) -> None:
    """The yardsticks against many other allocations of the same total and shape, harm taken from the prompts' own curves."""
    rng = np.random.default_rng(0)
    if len({prompt.seq_len for prompt in prompts}) > 1:
        pytest.skip("prompts of one length are needed for exact totals")
    for policy, gaps, index in zip(policies, all_gaps(prompts, policies), range(len(policies)), strict=True):
        ranking, count = ranking_of(policy), prompts[0].counts[index]
        assert not isinstance(count, str)
        total, low, high = int(count.sum()), ranking[1].protected, prompts[0].seq_len
        shape = policy.method.parts().allocator.budget_shape()
        for _ in range(200):
            groups = group_of("free" if shape == "within" else shape, *count.shape)
            sizes = np.bincount(groups.ravel())
            budgets = low + rng.dirichlet(np.ones(len(sizes)) * 0.7) * (total - low * count.size) / sizes
            taken = np.floor(np.minimum(budgets, high)).astype(int)
            taken[0] += (total - int((taken * sizes).sum())) // sizes[0]
            whole = taken[groups]
            if int(whole.sum()) != total or whole.max() > high or whole.min() < low:
                continue
            if shape == "within" and len(set(whole.sum(axis=1).tolist())) > 1:
                continue
            harm = np.mean([harm_at(prompt.harm[ranking], whole) for prompt in prompts])
            assert harm >= gaps.in_shape.mean() - 1e-9
            assert harm >= gaps.free.mean() - 1e-9


def test_the_best_free_budgets_are_exhaustively_the_best() -> None:
    rng = np.random.default_rng(1)
    curves = [np.cumsum(rng.exponential(size=(9, 2, 2)), axis=0)[::-1] + rng.normal(0, 0.3, (9, 2, 2)) for _ in range(3)]
    yardstick = Yardstick(curves, 1)
    for total in (4, 9, 17, 28, 32):
        options = [np.asarray(c).reshape(2, 2) for c in product(range(1, 9), repeat=4) if sum(c) == total]
        least = min(float(yardstick.harms([budgets] * 3).mean()) for budgets in options)
        found = yardstick.best(total, "free")
        assert yardstick.harms(yardstick.scaled(found.budgets, [total] * 3)).mean() == pytest.approx(least)


def test_the_oracle_keeps_the_most_future_attention(llama_capture: tuple[Path, LoadedModel], policies: list[Policy]) -> None:
    """What the oracle is the upper bound of: attention mass, prompt by prompt, over all ways to rank *and* to share.

    Harm is no sum over entries, so no such bound holds for it; what holds is tested above, for one ranking at a time.
    """
    from kvtool.policies import kept_positions

    with open_capture(llama_capture[0]) as capture:
        for sample in capture.samples[:2]:
            views = sample.views()
            mass = np.stack([view.statistic("future").double().numpy() for view in views])
            heads = mass.reshape(len(views), views[0].n_kv_heads, -1, sample.seq_len).sum(axis=2)
            for policy in policies:
                kept = kept_positions(policy, views)
                total = sum(len(positions) for layer in kept for positions in layer)
                held = sum(
                    float(heads[i, h][positions.numpy()].sum())
                    for i, layer in enumerate(kept)
                    for h, positions in enumerate(layer)
                )
                assert held <= float(np.sort(heads.ravel())[::-1][:total].sum()) + 1e-6


def test_policies_have_the_shape_that_they_say(prompts: list[PromptCurves], policies: list[Policy]) -> None:
    for index, policy in enumerate(policies):
        shape = policy.method.parts().allocator.budget_shape()
        for prompt in prompts:
            count = prompt.counts[index]
            assert not isinstance(count, str)
            if shape == "within":
                assert len(set(count.sum(axis=1).tolist())) == 1
            else:
                groups = group_of(shape, *count.shape)
                assert all(np.ptp(count[groups == g]) == 0 for g in range(int(groups.max()) + 1)), policy


def test_optimal_budgets_of_a_shape_come_close_to_their_yardstick(
    llama_capture: tuple[Path, LoadedModel], tmp_path: Path
) -> None:
    export_plan(llama_capture[0], f"snapkv:{W}", tmp_path / "plan.json")
    shapes = ["uniform", "layer", "head", "within", "rank1", "free"]
    chosen = expand_policies([f"optimal:plan={tmp_path}/plan.json,shape={shape}" for shape in shapes], ["20%"])
    with open_capture(llama_capture[0]) as capture:
        found = [prompt_curves(sample, chosen) for sample in capture.samples]
    uniform = 0.0
    for policy, gaps in zip(chosen, all_gaps(found, chosen), strict=True):
        parts = gaps.parts()
        assert policy.method.parts().allocator.budget_shape() == getattr(policy.method, "shape")  # noqa: B009
        assert parts["allocation"].mean() >= -1e-9
        uniform = uniform or float(gaps.harm.mean())
        # A plan knows its curves at 65 places only, and follows their hulls.
        assert parts["allocation"].mean() <= 0.25 * uniform


def test_prompts_of_different_lengths_are_scaled() -> None:
    rng = np.random.default_rng(2)

    def prompt(seq_len: int) -> PromptCurves:
        falling = np.cumsum(rng.exponential(size=(seq_len + 1, 2, 2)), axis=0)[::-1]
        ranking = ranking_of(parse_policy("snapkv:window=4,budget=50%"))
        return PromptCurves(
            seq_len, {r: falling * (1 + i / 9) for i, r in enumerate((ORACLE, ranking, protected_oracle(ranking)))}
        )

    prompts = [prompt(n) for n in (40, 36, 44)]
    ranking = ranking_of(parse_policy("snapkv:window=4,budget=50%"))
    counts = [np.full((2, 2), n // 2) for n in (40, 36, 44)]
    gaps = Decomposer(prompts).gaps(ranking, counts, "uniform")
    assert not gaps.same
    assert not gaps.adapts
    parts = gaps.parts()
    np.testing.assert_array_equal(parts["allocation"], 0.0)
    np.testing.assert_allclose(sum(parts.values()), gaps.harm - gaps.oracle, atol=1e-9)
    scaled = Decomposer(prompts).yardstick(ranking).scaled(np.array([[44, 4], [20, 8]]), [76, 68, 84])
    assert [int(budgets.sum()) for budgets in scaled] == [76, 68, 84]
    assert scaled[0][0, 0] > scaled[0][1, 0] > scaled[0][1, 1] > scaled[0][0, 1] >= 4


def gaps_of(harm: list[float], *steps: list[float]) -> Gaps:
    return Gaps(*map(np.asarray, (harm, *steps)), adapts=False, same=True, slack=0.0)  # type: ignore[arg-type, misc]


def test_rows_intervals_and_words() -> None:
    gaps = gaps_of([10.0, 12.0, 14.0, 16.0], [9.0, 11, 13, 15], [8.0, 10, 12, 14], [2.0, 3, 4, 5], [1.0, 2, 3, 4])
    row = start_row(parse_policy("snapkv:budget=5%,window=8"), np.full(4, 51.0), np.full(4, 1024.0), "uniform")
    weights = resample_weights(4, 400, 0)
    fill_row(row, gaps, weights)
    assert row.loss is not None
    assert {name: part.mean for name, part in row.parts.items()} == {
        "allocation": 1,
        "price": 1,
        "selection": 7.5,
        "protection": 1,
    }
    assert row.loss.mean == pytest.approx(sum(part.mean for part in row.parts.values()))
    # A part that is the same for all prompts has no spread; the resampling is paired.
    assert row.parts["price"].low == row.parts["price"].high == 1
    assert row.parts["selection"].low < 7.5 < row.parts["selection"].high
    assert row.explains == ["selection", "allocation"]
    said = sentences([row])
    assert said == [
        "5%: selection (which entries are kept) explains most of the loss, 71 %; then allocation (how the budget is shared), 10 %"
    ]
    assert largest_parts(dict.fromkeys(PARTS, 0.0)) == []
    assert [number(x) for x in (0, 1e-9, 0.01234, 1.2345, 123.456, -2.5)] == ["0", "0", "0.0123", "1.23", "123", "-2.50"]


def test_what_beats_the_oracle_or_the_common_budgets_is_said() -> None:
    weights = resample_weights(3, 100, 0)
    row = start_row(parse_policy("h2o:budget=5%,window=8"), np.full(3, 51.0), np.full(3, 1024.0), "free")
    fill_row(row, gaps_of([1.0, 1, 1], [2.0, 2, 2], [2.0, 2, 2], [3.0, 3, 3], [3.0, 3, 3]), weights)
    row.adapts = True
    said = sentences([row])
    assert any("less harm than the oracle" in each for each in said)
    assert any("fit their budgets to each prompt" in each for each in said)
    assert said[0] == "5%: nothing is lost against the oracle"


def test_command_writes_everything(llama_capture: tuple[Path, LoadedModel], tmp_path: Path) -> None:
    arguments = [
        "analyze",
        "gaps",
        str(llama_capture[0]),
        "-r",
        "5%,30%",
        "--shapes",
        "-o",
        str(tmp_path / "g"),
        "--draws",
        "50",
    ]
    for text in (f"snapkv:{W}", "random:window=6,sink=2", "oracle", "h2o:window=64"):
        arguments += ["-p", text]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    assert "Least harm of every shape" in result.output
    assert "30%: " in result.output
    assert "smaller than its 64 protected entries" in result.output
    assert (tmp_path / "g" / "gaps.png").read_bytes()[:4] == b"\x89PNG"
    rows = [json.loads(line) for line in (tmp_path / "g" / "gaps.jsonl").read_text().splitlines()]
    with (tmp_path / "g" / "gaps.csv").open() as file:
        flat = list(csv.DictReader(file))
    assert len(rows) == len(flat) == 8
    for row, line in zip(rows, flat, strict=True):
        if row["status"] == "ok":
            steps = [row["per_sample"][name] for name in ("harm", "in_shape", "free", "protected", "oracle")]
            np.testing.assert_allclose(np.mean(steps[0]) - np.mean(steps[-1]), row["loss"]["mean"], atol=1e-9)
            assert sum(float(line[name]) for name in PARTS) == pytest.approx(float(line["loss"]), abs=1e-9)
            assert row["loss"]["low"] <= row["loss"]["mean"] <= row["loss"]["high"]
        else:
            assert line["harm"] == ""
    with (tmp_path / "g" / "shapes.csv").open() as file:
        for line in csv.DictReader(file):
            tight, loose = (float(line[name]) for name in ("uniform", "free"))
            assert all(loose - 1e-9 <= float(line[name]) <= tight + 1e-9 for name in ("layer", "head", "within", "rank1"))
            assert float(line["rank1"]) <= min(float(line["layer"]), float(line["head"])) + 1e-9
    shown = CliRunner().invoke(cli, [*arguments[:-8], "--json"])
    assert [row["policy"] for row in json.loads(shown.stdout)["rows"]]


def test_what_cannot_be_taken_apart_is_refused(llama_capture: tuple[Path, LoadedModel], tmp_path: Path) -> None:
    def run(*texts: str, **changes: object) -> None:
        run_gaps(GapConfig(str(llama_capture[0]), texts, ("20%",), **changes), tmp_path / "g")  # type: ignore[arg-type]

    with pytest.raises(ConfigError, match="leave compensate="):
        run("snapkv:window=8,compensate=mean,block=16")
    with pytest.raises(ConfigError, match="leave compensate="):
        run("h2o:window=8,decode=evict")
    with pytest.raises(ConfigError, match="full keeps everything"):
        run("full")
    with pytest.raises(ConfigError, match="draws=5 must be at least 10"):
        run("snapkv", draws=5)
    with pytest.raises(ConfigError, match="protected"):
        run("snapkv:window=200")
    with pytest.raises(DataError, match="none"):
        run_gaps(GapConfig(str(tmp_path / "none.h5"), ("snapkv",)), tmp_path / "g")
    assert not (tmp_path / "g").exists()


def test_an_impossible_row_has_no_figures() -> None:
    row = GapRow("p", "p", "5%", 0.05, 51.0, "uniform", "impossible", "too small")
    assert row.to_json()["harm"] is None
    assert sentences([row]) == []


def test_budgets_are_named_as_they_were_asked_for() -> None:
    figures = gaps_of([3.0], [3.0], [2.0], [1.0], [1.0])
    rows = []
    for text, entries in (("h2o:budget=64entries", 64.0), ("duo:sink=4,recent=16", 20.0), ("head_windows:base=9", 13.0)):
        row = start_row(parse_policy(text), np.asarray([entries]), np.asarray([400.0]), "free")
        fill_row(row, figures, np.ones((10, 1)))
        rows.append(row)
    assert [each.split(":")[0] for each in sentences(rows)] == ["64 entries", "own budget of 5.00%", "own budget of 3.25%"]
