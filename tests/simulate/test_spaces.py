"""Search spaces: the grammar, what is left out and said, and one clear line for every wrong text."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtool.errors import ConfigError, DataError
from kvtool.policies import Policy
from kvtool.simulate.domains import Domain
from kvtool.simulate.spaces import AUTO, SPACES, parse_space, searches_budget, with_statistics


def menu(*windows: int):
    return lambda name: "/" not in name or name.partition("/")[2] in {str(w) for w in windows}


@pytest.mark.parametrize("text", [*SPACES, AUTO])
def test_ready_spaces_serve_a_usual_capture(text: str) -> None:
    space = with_statistics(parse_space(text), menu(8, 16, 32, 64))
    assert str(space.domains["window"]) == "{8,16,32,64}"
    assert any("holds no window_" in note and "--windows" in note for note in space.notes)
    policy = space.policy(space.default(), "5%")
    # The defaults of the space are those of the method.
    assert str(policy) == str(Policy.parse(f"{space.method}:budget=5%"))


@pytest.mark.parametrize(
    ("text", "points"),
    [
        ("snapkv:kernel=1..9", [1, 3, 5, 7, 9]),  # even ones are refused by the method
        ("snapkv:kernel=3..11 step 4", [3, 7, 11]),
        ("snapkv:kernel={7, 3}", [7, 3]),
        ("snapkv:pool={max,avg}", ["max", "avg"]),
        ("adakv:normalize={false,true}", [False, True]),
        ("adakv:floor=0..1 step 0.25", [0.0, 0.25, 0.5, 0.75, 1.0]),
        ("snapkv:compensate={none,mean},block={16,full}", ["none", "mean"]),
        ("snapkv:budget=2%..3% step 0.5", [2.0, 2.5, 3.0]),
        ("cake:gamma=5,kernel={1,3}", [5.0]),
    ],
)
def test_domains(text: str, points: list) -> None:
    domain = next(iter(parse_space(text).domains.values()))
    assert list(domain.points or ()) == points
    assert [type(p) for p in domain.points or ()] == [type(p) for p in points]


def test_ranges_of_real_numbers_have_no_points() -> None:
    space = parse_space("cake:gamma=log(1..1000),tau1=0.5..2")
    assert (space.n_points, space.domains["gamma"].log, space.domains["tau1"].log) == (None, True, False)
    assert space.default() == {"gamma": 200.0, "tau1": 1.0}


@pytest.mark.parametrize(
    "text", ["snapkv:window={8,16},kernel=1..9 step 2,pool=avg", "cake:gamma=log(1..100),tau1=0.2..5", AUTO]
)
def test_the_text_reads_back(text: str) -> None:
    space = parse_space(text)
    assert parse_space(str(space)) == space


def test_a_file_says_the_same(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text("method: snapkv\nwindow: [8, 16]\nkernel: 1..9 step 2\npool: avg\nbudget: [2%, 4%]\n")
    assert parse_space(str(path)) == parse_space("snapkv:window={8,16},kernel=1..9 step 2,pool=avg,budget={2%,4%}")
    assert searches_budget(str(path))
    path.write_text("window: [8, 16]\n")
    with pytest.raises(DataError, match="method: NAME"):
        parse_space(str(path))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("snapvk", "Did you mean 'snapkv'"),
        ("h2o", "no ready-made space for 'h2o'"),
        ("snapkw:window=8..64", "Did you mean 'snapkv'"),
        ("snapkv:windw=8..64", "Did you mean 'window'"),
        ("snapkv:window=64..8", "goes upwards"),
        ("snapkv:window=8..", "not understood"),
        ("snapkv:window=1.5..4", "whole numbers"),
        ("snapkv:window={8,x}", "'x' is not a whole number"),
        ("snapkv:pool=max..avg", "not understood"),
        ("snapkv:pool=1..2", "no range"),
        ("snapkv:pool={max,foo}", "choose one of"),
        ("snapkv:kernel={3,4}", "even"),
        ("snapkv:kernel=log(0..9)", "above 0"),
        ("snapkv:window=8,window=9", "twice"),
        ("snapkv:window={8,16", "key=domain"),
        ("snapkv:window=8", "nothing to search"),
        ("snapkv:block={16,32}", "needs a compensation"),
        ("snapkv:budget={32,64}", "percent"),
        ("cake:gamma=-5..5", "at least 0"),
        ("oracle:x={1,2}", "cannot run for real"),
        ("full:x={1,2}", "keeps everything"),
    ],
)
def test_wrong_texts_get_one_clear_line(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        parse_space(text)
    assert "\n" not in str(caught.value)


def test_a_window_that_is_fixed_and_missing_is_not_blamed_on_others() -> None:
    space = with_statistics(parse_space("snapkv:kernel={1,3},window=20"), menu(8))
    assert str(space) == "snapkv:kernel={1,3},window=20"
    with pytest.raises(ConfigError, match="window_mean/20"):
        with_statistics(parse_space("snapkv:kernel={1,3},window={20,40}"), menu(8))


def test_useless_options_are_left_out_of_the_policy() -> None:
    space = parse_space("snapkv:compensate={none,mean},block={16,32},bias={auto,none}")
    texts = {str(space.policy(params, "10%")) for params in space.grid()}
    assert len(list(space.grid())) == 8
    assert texts == {"snapkv:budget=10%"} | {
        str(Policy.parse(f"snapkv:budget=10%,compensate=mean,block={b},bias={bias}"))
        for b, bias in itertools.product((16, 32), ("auto", "none"))
    }


@given(st.floats(0.001, 1000, allow_nan=False))
def test_proposed_numbers_stay_inside_and_read_back(value: float) -> None:
    domain = Domain(low=0.001, high=1000.0, log=True)
    clean = domain.clean(value)
    assert 0.001 <= clean <= 1000
    assert abs(clean - value) <= 1e-3 * value
    policy = parse_space("cake:gamma=log(0.001..1000)").policy({"gamma": clean}, "5%")
    assert Policy.parse(str(policy)).method.parameters()["gamma"] == clean


def test_nearest() -> None:
    assert Domain(values=(8, 16, 64)).nearest(32) == 16
    assert Domain(low=2, high=9).nearest(1.0) == 2
    assert Domain(values=("avg", "max")).nearest("none") == "avg"
    assert Domain(low=1, high=9, step=2, whole=True).nearest(7) == 7
