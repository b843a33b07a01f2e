"""Plans of fixed budgets: exact at their level, sensible between, and other tools' files come out as they went in."""

from __future__ import annotations

import io
import json
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtool.errors import ConfigError, DataError
from kvtool.policies import Budget, parse_policy
from kvtool.policies.budgetfile import BudgetPlan, Gates, Importance, Levels, make_plan, read_budgets, write_budgets
from kvtool.policies.fixed_allocator import plan_budgets
from kvtool.policies.headfile import check_heads
from kvtool.policies.plancheck import check_plan, read_any_plan
from kvtool.policies.planfile import Plan, write_plan
from kvtool.policies.planformats import budgets_at, export_as, fix_budgets, guess_format, import_plan, to_lukv

SCORER = "snapkv:window=6,sink=2"
QUICK = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
PUBLISHED = {"model_id": "toy", "fingerprint": "toy", "n_layers": 3, "n_heads": 4, "n_kv_heads": 2}


def info(**changes: Any) -> Any:
    return SimpleNamespace(**{**PUBLISHED, **changes})


def lukv_array(seed: int, dtype: Any, shape: tuple[int, int] = (3, 2)) -> np.ndarray:
    """Dropped shares that rise from row to row, (99, layers, heads), on average the row's own percentage."""
    rng = np.random.default_rng(seed)
    kept = np.sort(rng.dirichlet(np.ones(shape[0] * shape[1]), 99).reshape(99, *shape), axis=0)
    nominal = np.arange(1, 100)[:, None, None] / 100
    shares = nominal + 0.5 * np.minimum(nominal, 1 - nominal) * (kept - kept.mean(axis=(1, 2), keepdims=True))
    return np.ascontiguousarray(np.maximum.accumulate(shares, axis=0), dtype=dtype)


def curves(layers: tuple[int, ...] = (0, 1, 2), n_layers: int = 3) -> Plan:
    rng = np.random.default_rng(4)
    free = np.concatenate([[0.0], np.geomspace(0.01, 1, 20)])
    harm = rng.random((21, len(layers), 2))[::-1].cumsum(0)[::-1]
    model = {"model_id": "toy", "fingerprint": "toy", "n_layers": n_layers, "n_heads": 4, "n_kv_heads": 2}
    return Plan("p", SCORER, 8, free, harm - harm[-1], layers, model, {})


def saved(array: np.ndarray, path: Path) -> Path:
    np.save(path, array)
    return path


def stored(plan: BudgetPlan, path: Path) -> BudgetPlan:
    """The plan through a file, twice: the second has the same bytes."""
    write_budgets(path, plan)
    again = read_budgets(str(path))
    first = path.read_bytes()
    write_budgets(path, again)
    assert path.read_bytes() == first
    return again


@given(seed=st.integers(0, 10_000), dtype=st.sampled_from(["float16", "float32", "float64"]))
@QUICK
def test_lukvs_array_comes_out_as_it_went_in(seed: int, dtype: str, tmp_path: Path) -> None:
    source = saved(lukv_array(seed, dtype), tmp_path / "a.npy")
    plan = stored(import_plan(source, "lukv", SCORER, None, {}), tmp_path / "plan.json")
    export_as("lukv", tmp_path / "b.npy", plan, 4096, None)
    assert (tmp_path / "b.npy").read_bytes() == source.read_bytes()
    np.savez(tmp_path / "a.npz", curves=lukv_array(seed, dtype))
    again = import_plan(tmp_path / "a.npz", "lukv", SCORER, None, {})
    assert isinstance(again.table, Levels)
    assert isinstance(plan.table, Levels)
    assert (again.table.values == plan.table.values).all()


def lukv_counts(dropped: np.ndarray, seq_len: int) -> list[int]:
    """What the published code keeps of one layer, in words: the layer's total is rounded, fractions go by largest remainder."""
    ideal = (np.float32(1) - dropped.astype(np.float32)) * np.float32(seq_len)
    kept = np.floor(ideal).astype(int)
    left = round(float(ideal.sum())) - int(kept.sum())
    kept[np.argsort(-(ideal - kept), kind="stable")[:left]] += 1
    return np.clip(kept, 1, seq_len).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("seq_len", [500, 4096, 32768])
def test_lukvs_rule_gives_the_exported_budgets_back(seq_len: int, tmp_path: Path) -> None:
    plan = curves()
    array = to_lukv(plan, seq_len)
    assert array.shape == (99, 3, 2)
    imported = import_plan(saved(array, tmp_path / "a.npy"), "lukv", SCORER, info(), {})
    for percent in (2, 5, 10, 37, 80, 99):
        ours = budgets_at(plan, seq_len, Budget.parse(f"{percent}%"))
        assert [lukv_counts(row, seq_len) for row in array[99 - percent]] == ours.tolist()
        assert (budgets_at(imported, seq_len, Budget.parse(f"{percent}%")) == ours).all()
    assert check_plan(imported, seq_len, info())[0].endswith("the same model")


def test_layers_that_are_not_planned_drop_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    array = to_lukv(curves(layers=(0, 2)), 100)
    assert (array[:, 1] == 0).all()
    assert array[:, [0, 2]].mean(axis=(1, 2))[:-8] == pytest.approx(np.arange(1, 92) / 100)
    # 1 to 7 % do not hold the eight protected entries.
    assert (array[-7:, [0, 2]] == 0.92).all()
    assert "more than 1 % to 7 % of 100" in capsys.readouterr().err
    for form in ("duo", "headkv"):
        with pytest.raises(ConfigError, match=r"leaves layers \[1\] alone"):
            export_as(form, Path("x"), curves(layers=(0, 2)), 100, Budget.parse("20%"))


@given(rows=st.lists(st.lists(st.floats(-0.5, 1.5, width=32), min_size=3, max_size=3), min_size=1, max_size=4))
@QUICK
def test_duos_pattern_comes_out_as_it_went_in(rows: list[list[float]], tmp_path: Path) -> None:
    folder = tmp_path / "duo"
    folder.mkdir(exist_ok=True)
    np.savetxt(folder / "full_attention_heads.tsv", rows, delimiter="\t")
    (folder / "config.json").write_text(json.dumps({"sink_size": 3, "recent_size": 5, "lr": 0.02, "seed": None}))
    plan = stored(import_plan(folder, guess_format(folder), "", None, {"sparsity": 0.5}), tmp_path / "plan.json")
    assert (plan.sink, plan.window) == (3, 5)
    export_as("duo", tmp_path / "again", plan, 100, None)
    for name in ("full_attention_heads.tsv", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    # The same budgets as the method of that name, from the same file.
    views = [SimpleNamespace(layer=i, n_layers=len(rows), n_heads=3, n_kv_heads=3, seq_len=100) for i in range(len(rows))]
    for budget in ("own", "40entries", "20%"):
        policies = [
            parse_policy(t + f",budget={budget}")
            for t in (f"duo:heads={folder},sink=3,recent=5", f"plan:file={tmp_path / 'plan.json'}")
        ]
        found = [allocated(policy, views) for policy in policies]
        assert found[0] == found[1]


def allocated(policy: Any, views: list[Any]) -> list[list[int]]:
    from kvtool.policies.base import Request

    parts = policy.method.parts()
    request = Request(policy.entries(views[0].seq_len), policy.minimum(views[0].seq_len), parts.selector, policy.budget is None)
    return parts.allocator.allocate(views, [], request)  # type: ignore[no-any-return]


@given(seed=st.integers(0, 10_000), whole=st.booleans())
@QUICK
def test_headkvs_scores_come_out_as_they_went_in(seed: int, whole: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    keys = [f"{layer}-{head}" for layer in range(3) for head in range(4)]
    heads = {key: (rng.integers(0, 9, 3) if whole else rng.random(3)).tolist() for key in rng.permutation(keys)}
    source = tmp_path / "h.json"
    source.write_text(json.dumps(heads))
    plan = stored(import_plan(source, "headkv", "", info(), {}), tmp_path / "plan.json")
    export_as("headkv", tmp_path / "again.json", plan, 100, None)
    assert (tmp_path / "again.json").read_bytes() == source.read_bytes()
    views = [SimpleNamespace(layer=i, n_layers=3, n_heads=4, n_kv_heads=2, seq_len=100) for i in range(3)]
    texts = (f"headkv:heads={source},budget=30", f"plan:file={tmp_path / 'plan.json'},budget=30")
    assert allocated(parse_policy(texts[0]), views) == allocated(parse_policy(texts[1]), views)


def test_headkvs_rule_gives_a_plans_budgets_back(tmp_path: Path) -> None:
    plan = fix_budgets(curves(), 400, Budget.parse("15%"))
    export_as("headkv", tmp_path / "h.json", plan, 400, None)
    again = import_plan(tmp_path / "h.json", "headkv", SCORER, info(), {"beta": 1.0})
    assert (budgets_at(again, 400, Budget.parse("15%")) == budgets_at(plan, 400, None)).all()
    export_as("duo", tmp_path / "duo", plan, 400, None)
    gates = import_plan(tmp_path / "duo", "duo", "", info(), {})
    assert isinstance(gates.table, Gates)
    assert (np.argsort(gates.table.values.flatten()) == np.argsort(budgets_at(plan, 400, None).flatten())).all()


def slow_level_budgets(plan: BudgetPlan, budget: int, seq_len: int) -> list[int]:
    """The definition with exact fractions: interpolate shares of the unprotected entries, round by largest remainder."""
    assert isinstance(plan.table, Levels)
    least, length = plan.protected, plan.table.length
    known = [[Fraction(0)] * plan.table.values[0].size]
    known += [[Fraction(int(n) - least, length - least) for n in level.flatten()] for level in plan.table.values]
    known += [[Fraction(1)] * plan.table.values[0].size]
    wanted = Fraction(budget - least, seq_len - least)
    above = next(i for i, level in enumerate(known) if sum(level) / len(level) >= wanted)
    below = max(above - 1, 0)
    low, high = (sum(known[i]) / len(known[i]) for i in (below, above))
    part = (wanted - low) / (high - low) if high > low else Fraction(1)
    ideal = [(a + part * (b - a)) * (seq_len - least) for a, b in zip(known[below], known[above], strict=True)]
    kept = [int(x) for x in ideal]
    order = sorted(range(len(ideal)), key=lambda i: (-round(float(ideal[i] - kept[i]), 9), i))
    for i in order[: budget * len(ideal) - least * len(ideal) - sum(kept)]:
        kept[i] += 1
    return [least + n for n in kept]


@given(data=st.data())
@QUICK
def test_budgets_between_levels(data: st.DataObject) -> None:
    low = data.draw(st.lists(st.integers(8, 60), min_size=6, max_size=6))
    more = data.draw(st.lists(st.integers(0, 40), min_size=6, max_size=6))
    high = [a + b for a, b in zip(low, more, strict=True)]
    values = np.asarray([low] if sum(more) == 0 else [low, high]).reshape(-1, 3, 2)
    plan = make_plan(SCORER, range(3), Levels(("10%", "20%")[: len(values)], "entries", values, 100), PUBLISHED, {})
    seq_len = data.draw(st.sampled_from([100, 57, 400]))
    budget = data.draw(st.integers(8, seq_len))
    found = plan_budgets(plan, range(3), budget, 8, seq_len)
    assert found.sum() == budget * 6
    assert ((found >= 8) & (found <= seq_len)).all()
    assert found.flatten().tolist() == slow_level_budgets(plan, budget, seq_len)
    for level in values:
        if level.sum() % 6 == 0:
            assert (plan_budgets(plan, range(3), int(level.sum()) // 6, 8, 100) == level).all()
    if len(values) == 1:
        assert (plan_budgets(plan, range(3), 0, 8, 100, own=True) == values[0]).all()


def test_a_prompt_shorter_than_the_protected_entries_keeps_all() -> None:
    plan = fix_budgets(curves(), 400, Budget.parse("15%"))
    assert (plan_budgets(plan, range(3), 5, 5, 5) == 5).all()
    assert (plan_budgets(plan, range(3), 0, 5, 5, own=True) == 5).all()


def test_wrong_arrays_are_refused(tmp_path: Path) -> None:
    good = lukv_array(0, "float32")
    for array, match in (
        (good[:98], "shape"),
        (good.astype(np.int64), "floats"),
        (np.where(good > 0.5, np.nan, good), "in 0 ... 1"),
        (good * 2, "in 0 ... 1"),
        (good[::-1], "keep less at 2% than at 1%"),
    ):
        with pytest.raises(DataError, match=match):
            import_plan(saved(array, tmp_path / "bad.npy"), "lukv", SCORER, None, {})
    (tmp_path / "torn.npy").write_bytes((tmp_path / "bad.npy").read_bytes()[:300])
    buffer = io.BytesIO()
    np.save(buffer, np.asarray([object()]), allow_pickle=True)
    (tmp_path / "pickle.npy").write_bytes(buffer.getvalue())
    for name in ("torn.npy", "pickle.npy"):
        with pytest.raises(DataError, match="is no lukv file") as caught:
            import_plan(tmp_path / name, "lukv", SCORER, None, {})
        assert "\n" not in str(caught.value)
    source = saved(good, tmp_path / "good.npy")
    with pytest.raises(ConfigError, match="add --scorer"):
        import_plan(source, "lukv", "", None, {})
    with pytest.raises(DataError, match="n_layers 3 there, 5 in the model"):
        import_plan(source, "lukv", SCORER, info(n_layers=5), {})
    for scorer, match in (
        ("snapkv:budget=5%", "names a budget"),
        ("oracle", "future"),
        ("optimal", "is a plan itself"),
        ("snapk", "unknown policy"),
    ):
        with pytest.raises(ConfigError, match=match):
            import_plan(source, "lukv", scorer, None, {})
    with pytest.raises(DataError, match="not found"):
        import_plan(tmp_path / "none.npy", "lukv", SCORER, None, {})
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match="add --format"):
        guess_format(tmp_path / "x.bin")
    for name in ("nofile", "none.npy"):
        with pytest.raises(DataError, match=f"{name} not found; give a file of lukv, duo, headkv"):
            guess_format(tmp_path / name)


def test_check_finds_what_is_wrong(tmp_path: Path) -> None:
    array = lukv_array(1, "float64")
    plan = import_plan(saved(array, tmp_path / "a.npy"), "lukv", SCORER, info(), {})
    assert any("99 levels" in line for line in check_plan(plan, 1000))
    with pytest.raises(DataError, match="is of toy"):
        check_plan(plan, 1000, info(fingerprint="other"))
    unnamed = import_plan(tmp_path / "a.npy", "lukv", SCORER, None, {})
    assert "fits the shape" in check_plan(unnamed, 1000, info())[0]
    with pytest.raises(DataError, match="3 layers with 2 KV heads, toy has 3 with 4"):
        check_plan(unnamed, 1000, info(n_kv_heads=4))
    fallen = array.copy()
    fallen[49, 1, 0], fallen[50, 1, 0] = fallen[50, 1, 0] + 0.02, fallen[49, 1, 0]
    bad = import_plan(saved(fallen, tmp_path / "b.npy"), "lukv", SCORER, None, {})
    with pytest.raises(DataError, match="head 0 of row 1 has dropped"):
        check_plan(bad, 1000)
    shifted = import_plan(saved(np.clip(array + 0.01, 0, 1), tmp_path / "c.npy"), "lukv", SCORER, None, {})
    with pytest.raises(DataError, match="on average; does the array"):
        check_plan(shifted, 1000)
    assert check_plan(curves(), 1000, info())[0].endswith("the same model")
    with pytest.raises(DataError, match=r"is of toy \(.+\), not of toy \(other\); .* capture of this model"):
        check_plan(curves(), 1000, info(fingerprint="other"))


def test_damaged_plans_are_one_line(tmp_path: Path) -> None:
    plan = fix_budgets(curves(), 400, Budget.parse("15%"))
    path = tmp_path / "plan.json"
    write_budgets(path, plan)
    value = json.loads(path.read_text())
    levels = value["levels"]
    for change, match in (
        ({"schema": "x"}, "is no plan"),
        ({"layers": [0, 1]}, "are named"),
        ({"layers": [0, 2, 1]}, "must rise"),
        ({"protection": {"sink": 0, "window": 8}}, "protects 2 [+] 6 entries, the plan says 0 [+] 8"),
        ({"scorer": "snapkv:budget=5%"}, "names a budget"),
        ({"levels": {**levels, "values": [[[1, 2], [3, 4], [5, 6]]]}}, "fewer than the 8 protected"),
        ({"levels": {**levels, "values": [[[10.5, 20], [30, 40], [50, 60]]]}}, "whole numbers"),
        ({"levels": {**levels, "length": 20}}, "in 0 ... 20"),
        ({"levels": None}, "damaged"),
        ({"model": None}, "damaged"),
    ):
        path.write_text(json.dumps({**value, **change}))
        with pytest.raises(DataError, match=match) as caught:
            read_budgets(str(path))
        assert "\n" not in str(caught.value)
    path.write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        read_budgets(str(path))
    write_plan(path, curves())
    with pytest.raises(DataError, match="holds harm curves: run it with optimal"):
        read_budgets(str(path))
    assert isinstance(read_any_plan(str(path)), Plan)
    with pytest.raises(DataError, match="not found"):
        read_any_plan(str(tmp_path / "none.json"))


def test_the_policy_says_what_it_needs(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_budgets(path, fix_budgets(curves(), 400, Budget.parse("15%")))
    policy = parse_policy(f"plan:file={path},budget=own")
    assert parse_policy(str(policy)) == policy
    assert policy.entries(400) == 60
    assert policy.entries(800) == pytest.approx(8 + (60 - 8) / 392 * 792, abs=1)
    assert list(check_heads([policy], info())) == [str(path)]
    with pytest.raises(DataError, match="has 2 with"):
        check_heads([policy], info(n_layers=2))
    with pytest.raises(ConfigError, match="add file=FILE"):
        check_heads([parse_policy("plan:budget=5%")], info())
    write_budgets(path, import_plan(saved(lukv_array(0, "float32"), tmp_path / "a.npy"), "lukv", SCORER, None, {}))
    with pytest.raises(ConfigError, match=r"holds 99 budgets .1% to 99%.; add budget="):
        parse_policy(f"plan:file={path}").entries(400)


def test_importance_needs_all_heads() -> None:
    for heads, match in (
        ({"0-0": [1.0], "1-1": [1.0]}, "2 x 2 are needed"),
        ({"0-0": [-1.0]}, "not negative"),
        ({"0-0": []}, "has no scores"),
    ):
        with pytest.raises(ValueError, match=match), np.errstate(all="ignore"):
            Importance(heads, 1).check()
