"""What is tried next follows from the finished trials and the seed alone, and the journal is a copy that Optuna reads."""

from __future__ import annotations

import builtins
import math
from pathlib import Path
from typing import Any

import pytest

from kvtool.errors import MissingDependencyError
from kvtool.simulate.spaces import parse_space
from kvtool.simulate.study import BATCH, JOURNAL, Journal, check_optuna, propose

optuna = pytest.importorskip("optuna")
SPACE = parse_space("cake:gamma=log(1..1000),tau1=0.2..5,window={8,16,32},kernel=1..21 step 2,pool={max,avg}")


def value(params: dict[str, Any]) -> float:
    """A bowl with its bottom at gamma 30, tau1 2, kernel 9, max pooling, window 8."""
    distance = abs(math.log(params["gamma"] / 30)) + abs(params["tau1"] - 2) + abs(params["kernel"] - 9) / 5
    return distance + (params["pool"] == "avg") + params["window"] / 16


def run(
    sampler: Any, n: int, n_objectives: int = 1, seed: int = 0, records: list[dict[str, Any]] | None = None
) -> list[dict[str, Any]]:
    records = list(records or [])
    size = BATCH[sampler]
    while len(records) < n:
        start = len(records) // size * size
        for trial in propose(SPACE, sampler, n_objectives, records[:start], seed)[len(records) - start : n - start]:
            values = [value(trial["params"]), abs(trial["params"]["tau1"] - 4)][:n_objectives]
            values = [None, None][:n_objectives] if trial["params"]["window"] == 32 and len(records) > 1 else values
            records.append({**trial, "values": values, "policy": str(SPACE.policy(trial["params"], "5%"))})
    return records


@pytest.mark.parametrize(("sampler", "n_objectives"), [("random", 1), ("tpe", 1), ("nsga2", 2)])
def test_an_interrupted_search_makes_the_same_trials(sampler: Any, n_objectives: int) -> None:
    whole = run(sampler, 50, n_objectives)
    assert whole[0]["params"] == SPACE.default()
    for cut in (1, BATCH[sampler], BATCH[sampler] + 3):
        assert run(sampler, 50, n_objectives, records=whole[:cut]) == whole
    # A longer search begins with the trials of a shorter one; another seed makes others.
    assert run(sampler, 27, n_objectives) == whole[:27]
    assert run(sampler, 50, n_objectives, seed=1)[1:] != whole[1:]


def test_tpe_finds_what_chance_does_not() -> None:
    def best(sampler: Any, seed: int) -> float:
        return min(r["values"][0] for r in run(sampler, 64, seed=seed) if r["values"][0] is not None)

    seeds = range(2)
    assert sum(best("tpe", s) for s in seeds) < 0.8 * sum(best("random", s) for s in seeds)


def test_impossible_settings_are_left_alone() -> None:
    records = run("tpe", 80)
    late = [r["params"]["window"] for r in records[40:]]
    assert late.count(32) < len(late) / 3 / 2  # half of what chance would give


def test_a_grid_tries_every_setting_once() -> None:
    space = parse_space("snapkv:window={8,16},kernel=1..41 step 2")
    found: list[Any] = []
    while batch := propose(space, "grid", 1, found, 0):
        found += batch
    assert [trial["params"] for trial in found] == list(space.grid())
    assert len(found) == 42


def test_the_journal_is_read_by_optuna_and_heals(tmp_path: Path) -> None:
    records = run("nsga2", 30, 2)
    Journal(tmp_path, SPACE, ["a", "b"], records[:10]).add(records[10:20])
    path = tmp_path / JOURNAL
    # What a kill can leave: half a line, a lock, half a new journal.
    path.write_bytes(path.read_bytes()[:-30])
    (tmp_path / f"{JOURNAL}.lock").symlink_to(path)
    (tmp_path / f".{JOURNAL}.tmp").write_text("{")
    Journal(tmp_path, SPACE, ["a", "b"], records[:20]).add(records[20:])
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
    study = optuna.load_study(study_name="kvtool", storage=storage)
    assert study.user_attrs["objectives"] == ["a", "b"]
    assert [trial.params for trial in study.trials] == [{k: r["params"][k] for k in SPACE.searched} for r in records]
    assert [trial.values for trial, r in zip(study.trials, records, strict=True) if None not in r["values"]] == [
        r["values"] for r in records if None not in r["values"]
    ]
    assert [trial.user_attrs["policy"] for trial in study.trials] == [r["policy"] for r in records]


def test_without_optuna_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **more: Any) -> Any:
        if name == "optuna":
            raise ModuleNotFoundError("No module named 'optuna'", name="optuna")
        return real(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError, match=r"pip install 'kvtool\[search\]'"):
        check_optuna("tpe")
    check_optuna("grid")  # needs none
