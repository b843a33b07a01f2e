"""Plans: curves that sum to the prediction, budgets that are best by it, and a file that travels."""

from __future__ import annotations

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
from kvtool.policies import kept_positions, parse_policy
from kvtool.policies.headfile import check_heads
from kvtool.policies.planfile import Plan, read_plan, write_plan
from kvtool.simulate.curves import curves, head_harm
from kvtool.simulate.evaluate import evaluate_sample, sample_table
from kvtool.simulate.plan import FREE_SHARES, export_plan, sample_curves

SCORER = "snapkv:window=8,kernel=3"


@pytest.fixture(scope="module")
def plan(llama_capture: tuple[Path, LoadedModel], tmp_path_factory: pytest.TempPathFactory) -> Plan:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    export_plan(llama_capture[0], SCORER, path)
    return read_plan(str(path))


def test_head_curves_sum_to_the_prediction(llama_capture: tuple[Path, LoadedModel]) -> None:
    policy = parse_policy(f"{SCORER},budget=30%")
    with open_capture(llama_capture[0]) as capture:
        sample = capture.samples[0]
        parts, views = policy.method.parts(), sample.views()
        orders = np.stack([parts.selector.order(parts.scorer.score(view)).numpy() for view in views])
        rng = np.random.default_rng(0)
        counts = rng.integers(8, sample.seq_len, (5, *orders.shape[:2]))
        table = sample_table(sample)
        by_head = head_harm(table, orders, counts)
        np.testing.assert_allclose(by_head.sum(axis=(1, 2)), curves(table, orders, counts).harm)
        # A head's curve does not depend on what the others keep.
        alone = counts.copy()
        alone[:, 1:] = sample.seq_len
        np.testing.assert_allclose(head_harm(table, orders, alone)[:, 0], by_head[:, 0])
        found = sample_curves(sample, policy)
        assert found.shape == (len(FREE_SHARES), *orders.shape[:2])
        np.testing.assert_allclose(found[-1], 0, atol=1e-4)


@pytest.mark.parametrize("budget", [12, 30, 80, 200])
def test_budgets_beat_every_other_allocation_by_their_own_curves(plan: Plan, budget: int) -> None:
    seq_len, minimum = 230, 8
    n_layers, n_heads = plan.harm.shape[1:]
    hulls = plan.hulls(seq_len, minimum)

    def cost(budgets: np.ndarray) -> float:
        return sum(hull.at(n) for hull, n in zip(hulls, budgets.flatten().tolist(), strict=True))

    best = plan.budgets(budget, seq_len, minimum)
    total = budget * n_layers * n_heads
    assert best.sum() == total
    assert ((best >= minimum) & (best <= seq_len)).all()
    # Exhaustive over a coarse lattice of all four heads, and the uniform allocation.
    points = np.linspace(minimum, seq_len, 12)
    for choice in product(points, repeat=n_layers * n_heads - 1):
        last = total - sum(choice)
        if minimum <= last <= seq_len:
            assert cost(best) <= cost(np.asarray([*choice, last])) + 1e-9
    by_layer, rank1 = (plan.budgets(budget, seq_len, minimum, shape) for shape in ("layer", "rank1"))
    for other in (np.full_like(best, budget), by_layer, rank1):
        assert other.sum() == total
        assert cost(best) <= cost(other) + 1e-9
    assert (by_layer == by_layer[:, :1]).all()
    assert cost(by_layer) <= cost(np.full_like(best, budget)) + 1e-9


def test_simulate_predicts_less_harm_than_uniform(plan: Plan, llama_capture: tuple[Path, LoadedModel]) -> None:
    texts = [f"optimal:plan={plan.path},budget=20%", f"{SCORER},budget=20%"]
    with open_capture(llama_capture[0]) as capture:
        # On the prompts the plan was made from, all together: the mean is what was minimised.
        found = [evaluate_sample(sample, [parse_policy(text) for text in texts]) for sample in capture.samples]
        optimal, uniform = (float(np.mean([row[i].harm for row in found])) for i in (0, 1))
        assert optimal < uniform
        assert all(row[0].entries == row[1].entries for row in found)
        kept = kept_positions(parse_policy(texts[0]), capture.samples[0].views())
        assert all(set(range(capture.samples[0].seq_len - 8, capture.samples[0].seq_len)) <= set(p.tolist()) for p in kept[0])


def test_round_trip_is_exact(plan: Plan, tmp_path: Path) -> None:
    write_plan(tmp_path / "again.json", plan)
    again = read_plan(str(tmp_path / "again.json"))
    assert (again.harm == plan.harm).all()
    assert (again.free_shares == plan.free_shares).all()
    assert (again.scorer, again.model, again.source, again.layers) == (plan.scorer, plan.model, plan.source, plan.layers)


def test_wrong_plans_are_refused(plan: Plan, llama_capture: tuple[Path, LoadedModel], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not found"):
        parse_policy(f"optimal:plan={tmp_path}/none.json,budget=5%").method.parts()
    value = json.loads(Path(plan.path).read_text())
    for change, match in (
        ({"schema": "x"}, "is no plan"),
        ({"harm": value["harm"][:-1]}, "damaged"),
        ({"free_shares": value["free_shares"][::-1]}, "damaged"),
        ({"layers": [0]}, "damaged"),
    ):
        bad = tmp_path / f"{next(iter(change))}.json"
        bad.write_text(json.dumps({**value, **change}))
        with pytest.raises(DataError, match=match):
            read_plan(str(bad))
    policy = parse_policy(f"optimal:plan={plan.path},budget=20%")
    info = llama_capture[1].info
    assert list(check_heads([policy], info)) == [plan.path]
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**value, "model": {**value["model"], "fingerprint": "other"}}))
    with pytest.raises(DataError, match="capture of this model"):
        check_heads([parse_policy(f"optimal:plan={other},budget=20%")], info)
    with pytest.raises(ConfigError, match="add plan=FILE"):
        check_heads([parse_policy("optimal:budget=20%")], info)
    with pytest.raises(ConfigError, match="leave it out"):
        export_plan(llama_capture[0], "snapkv:budget=5%", tmp_path / "p.json")
    with pytest.raises(ConfigError, match="looks into the future"):
        export_plan(llama_capture[0], "oracle", tmp_path / "p.json")


def test_commands(llama_capture: tuple[Path, LoadedModel], tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    made = CliRunner().invoke(cli, ["plan", "export", str(llama_capture[0]), "--scorer", "h2o:window=4", "-o", str(out)])
    assert made.exit_code == 0, made.output
    shown = CliRunner().invoke(cli, ["plan", "check", str(out), "--length", "300", "-r", "10%", "--json"])
    assert shown.exit_code == 0, shown.output
    budgets = np.asarray(json.loads(shown.output)["budgets"])
    assert budgets.sum() == 30 * budgets.size
