"""Calibration on data whose curve is known; its intervals must hold what they promise on cells that it has not seen."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvtool.analysis.calibrate import Confirmed, fit_calibration, run_calibrate
from kvtool.analysis.fidelity_report import run_fidelity, was_fitted_on
from kvtool.analysis.load import load_simulation
from kvtool.calibration import FEATURES, Where, read_calibration, risk, with_evidence, write_calibration
from kvtool.errors import ConfigError, DataError
from kvtool.files import append_records, open_run
from kvtool.residuals import EVIDENCE, Setting

N, S, TOKENS = 16, 30, 6


def pair(seed: int, shift: float = 0.0) -> Confirmed:
    """Configurations whose answers come out right with a known probability; `shift` makes a cell differ from the others."""
    rng = np.random.default_rng(seed)
    harm = np.exp(rng.normal(0, 1.2, (N, 1)) + rng.normal(0, 0.3, (N, S)))
    figures = {"harm": harm, "evidence": rng.uniform(0, 1, (N, S))}
    real = rng.binomial(TOKENS, truth(figures, shift)) / TOKENS
    # Every pair has policies of its own: nothing is carried over but the level.
    methods, source = (
        tuple(f"p{seed}-{i}" for i in range(N)),
        {"model": "m", "compress_at": "prompt", "length": 512, "task": f"t{seed}"},
    )
    setting = Setting("m", "prompt", EVIDENCE, 512.0)
    return Confirmed(with_evidence(figures), real, ("5%", "10%") * (N // 2), methods, (0.05, 0.1) * (N // 2), source, setting)


def truth(figures: dict[str, np.ndarray], shift: float = 0.0) -> np.ndarray:
    index = 2.0 + shift - 2.0 * np.log1p(figures["harm"]) - 1.0 * figures["evidence"]
    return np.asarray(1 / (1 + np.exp(-index)))


def test_the_curve_is_found() -> None:
    found = fit_calibration([pair(seed) for seed in range(8)])
    fresh = pair(99)
    assert np.abs(found.predict(fresh.figures) - truth(fresh.figures)).mean() < 0.02
    assert (found.held_out, found.n_errors, len(found.sources)) == ("pair", 8 * N, 8)
    # In units of one: weights are stored per standard deviation.
    slopes = dict(zip(found.features, np.asarray(found.weights) / np.asarray(found.scale), strict=True))
    assert slopes["harm"] == pytest.approx(-2.0, abs=0.2)
    assert slopes["evidence"] == pytest.approx(-1.0, abs=0.25)
    # All pairs name their evidence: that they do says nothing, here or elsewhere.
    assert slopes["named"] == 0.0


def test_texts_and_needles_share_one_curve() -> None:
    texts = [pair(seed, shift=1.0) for seed in range(20, 24)]
    for each in texts:
        each.figures["evidence"][:] = 0.0
        each.real[:] = np.random.default_rng(5).binomial(TOKENS, truth(each.figures, 1.0)) / TOKENS
    kind = replace(texts[0].setting, kind="text")
    nameless = [replace(t, figures=with_evidence({"harm": t.figures["harm"]}), setting=kind) for t in texts]
    found = fit_calibration([*(pair(seed) for seed in range(8)), *nameless])
    slopes = dict(zip(found.features, np.asarray(found.weights) / np.asarray(found.scale), strict=True))
    assert slopes["named"] == pytest.approx(-1.0, abs=0.25)
    for each in (pair(98), nameless[0]):
        real = truth(each.figures, 0.0 if each.figures["named"].any() else 1.0)
        known = {k: v for k, v in each.figures.items() if k == "harm" or (k == "evidence" and each.figures["named"].any())}
        assert np.abs(found.predict(known) - real).mean() < 0.03


def test_risk_counts_evidence_only_where_it_is_named() -> None:
    harm = np.asarray([0.0, 1.0, 1e6])
    assert risk({"harm": harm}) == pytest.approx(np.log([1.0, 2.0, 1e6 + 1]))
    assert risk({"harm": harm, "evidence": np.asarray([0.5, 0.0, 1.0])}) == pytest.approx(
        risk({"harm": harm}) + np.asarray([4.0, 0.0, 8.0])
    )


def test_intervals_hold_at_least_nine_of_ten_means_on_cells_that_differ() -> None:
    """Cells are shifted at random, those that are judged like those of the fit; over many cells coverage is what was asked for."""
    rng = np.random.default_rng(1)
    held = []
    for repetition in range(6):
        found = fit_calibration([pair(100 * repetition + k, rng.normal(0, 0.5)) for k in range(10)])
        for k in range(10):
            judged = pair(100 * repetition + 50 + k, rng.normal(0, 0.5))
            predicted, real = found.predict(judged.figures).mean(1), judged.real.mean(1)
            bounds = [found.interval(float(p)) for p in predicted]
            held.append(np.mean([low <= r <= high for (low, high), r in zip(bounds, real, strict=True)]))
    assert np.mean(held) >= 0.88


def test_differences_are_surer_than_means_where_runs_are_shifted() -> None:
    """A shift of a whole run cancels in differences within it."""
    rng = np.random.default_rng(2)
    found = fit_calibration([pair(k, rng.choice([-0.6, 0.6])) for k in range(10)])
    assert found.gap_width < 0.9 * found.half_width
    alike = fit_calibration([pair(k) for k in range(8)])
    assert alike.gap_width > alike.half_width


def test_few_pairs_promise_less_and_give_the_largest_error() -> None:
    pairs = [pair(seed) for seed in range(3)]
    found = fit_calibration(pairs)
    assert found.level == 0.75
    left_out = [np.abs(predict(fit_calibration([p for p in pairs if p is not out]), out) - out.real.mean(1)) for out in pairs]
    assert found.half_width == pytest.approx(np.max(left_out), abs=1e-6)


def test_one_pair_is_split_by_prompts() -> None:
    found = fit_calibration([pair(3)])
    assert (found.held_out, found.n_errors) == ("prompts", 5 * N)


def test_a_file_gives_the_same_figures_back(tmp_path: Path) -> None:
    made = fit_calibration([pair(0), pair(1)])
    write_calibration(tmp_path / "c.json", made)
    assert read_calibration(tmp_path / "c.json") == made


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "other"}, "is no calibration"),
        ({"weights": [1.0]}, "do not fit together"),
        ({"scale": [0.0, 1.0]}, "do not fit together"),
        ({"half_width": None}, "damaged"),
        ({"gap_width": -0.1}, "do not fit together"),
        ({"surprise": 1}, "damaged"),
        ({"level": "high"}, "damaged"),
        ({"level": 1.5}, "do not fit together"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "c.json"
    write_calibration(path, fit_calibration([pair(0), pair(1)]))
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(DataError, match=message):
        read_calibration(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_calibration(tmp_path / "none.json")


def test_a_simulation_without_the_figures_is_refused() -> None:
    made = fit_calibration([pair(0)])
    with pytest.raises(DataError, match="no figure 'harm'"):
        made.predict({name: np.ones(3) for name in FEATURES if name != "harm"})


def folders(root: Path, seed: int, prompt_seed: int = 0) -> tuple[Path, Path]:
    """Write a pair as the folders of simulate and infer."""
    data, root = pair(seed), root / str(seed)
    samples, policies = [f"s{i}" for i in range(S)], [f"p{i}:budget=10%" for i in range(N)]
    shared = {"task": f"t{seed}", "length": 100, "compress_at": "prompt"}
    open_run(root / "sim", {"model": {"fingerprint": "f"}, "prompt_seed": prompt_seed, "n": S, **shared}, {})
    append_records(
        root / "sim/ranking.jsonl",
        [
            {"policy": p, "method": p.split(":")[0], "budget": "10%", "retention": 0.1, "status": "ok", "degenerate": False,
             "per_sample": {"recall": [0.5] * S, **{k: data.figures[k][i].tolist() for k in ("harm", "evidence")}}}
            for i, p in enumerate(policies)
        ],
    )  # fmt: skip
    open_run(root / "run", {"fingerprint": "f", "seed": 0, "policies": policies, **shared}, {})
    append_records(
        root / "run/records.jsonl",
        [
            {
                "sample": s,
                "policy": p,
                "status": "ok",
                "degenerate": False,
                "seq_len": 100,
                "answer_accuracy": float(data.real[i, j]),
            }
            for j, s in enumerate(samples)
            for i, p in enumerate(policies)
        ],
    )
    return root / "sim", root / "run"


def test_simulations_of_older_versions_are_completed_when_read(tmp_path: Path) -> None:
    simulated, _ = folders(tmp_path, 0)
    row = load_simulation(simulated).rows[0]
    figures = {name: np.asarray(row["per_sample"][name]) for name in ("harm", "evidence")}
    assert row["per_sample"]["risk"] == pytest.approx(np.log1p(figures["harm"]) + 8 * figures["evidence"])
    assert row["risk"] == pytest.approx(np.mean(row["per_sample"]["risk"]))


def test_from_folders_to_judgement(tmp_path: Path) -> None:
    pairs = [folders(tmp_path, seed) for seed in range(4)]
    summary = run_calibrate(pairs[:3], tmp_path / "c.json")
    assert "from 3 confirmed runs" in summary.text()
    judged = run_fidelity(pairs[3:], draws=50, calibration=tmp_path / "c.json")
    (agreement,) = judged.agreements
    assert agreement.tau["calibrated"].mean > 0.75
    assert judged.coverage is not None
    assert (judged.coverage.n, judged.coverage.seen) == (N, 0)
    assert "hold the real mean" in judged.text()
    again = run_fidelity(pairs[2:], draws=50, calibration=tmp_path / "c.json").coverage
    assert again is not None
    assert again.seen == 1
    assert "no test" in again.text()


def test_other_prompts_are_refused(tmp_path: Path) -> None:
    simulated, run = folders(tmp_path, 5, prompt_seed=9)
    with pytest.raises(ConfigError, match="same prompts on both sides"):
        run_calibrate([(simulated, run)], tmp_path / "c.json")


def test_what_a_calibration_was_fitted_on_is_known() -> None:
    made = fit_calibration([pair(0)])
    assert was_fitted_on(made, {"fingerprint": "m", "compress_at": "prompt", "length": 512, "task": "t0"})
    assert not was_fitted_on(made, {"fingerprint": "m", "compress_at": "prompt", "length": 512, "task": "t1"})


def habits(seed: int, own: np.ndarray, compress_at: str = "prompt", model: str = "m", length: int = 512) -> Confirmed:
    """A pair whose policies do better or worse than their figures say, by `own` (N,) on the logit."""
    made = pair(seed)
    index = 2.0 - 2.0 * np.log1p(made.figures["harm"]) - made.figures["evidence"] + own[:, None]
    real = np.random.default_rng(seed).binomial(TOKENS, 1 / (1 + np.exp(-index))) / TOKENS
    setting = Setting(model, compress_at, EVIDENCE, float(length))
    return replace(made, real=real, methods=tuple(f"p{i}" for i in range(N)), setting=setting)


def predict(found: Any, judged: Confirmed) -> np.ndarray:
    where = Where(judged.setting.model, judged.setting.compress_at, "text", judged.setting.length, {})
    return np.asarray(found.predict_policies(judged.figures, where, judged.methods, judged.shares)[0]).mean(1)


def test_what_policies_do_beyond_their_figures_is_carried_over() -> None:
    own = np.random.default_rng(7).normal(0, 1.5, N)
    found = fit_calibration([habits(seed, own) for seed in range(4)])
    judged = habits(50, own)
    real, curve = judged.real.mean(1), found.predict(judged.figures).mean(1)
    assert np.abs(predict(found, judged) - real).mean() < 0.6 * np.abs(curve - real).mean()
    # and the promised interval is as narrow as that, as it comes from pairs whose policies were confirmed elsewhere
    strangers = fit_calibration([replace(habits(s, own), methods=tuple(f"{s}-{i}" for i in range(N))) for s in range(4)])
    assert found.half_width < 0.8 * strangers.half_width


def test_nothing_is_carried_over_to_another_mode_model_or_kind_of_prompt() -> None:
    own = np.random.default_rng(7).normal(0, 1.5, N)
    found = fit_calibration([habits(seed, own) for seed in range(2)])
    for judged in (habits(50, own, compress_at="context"), habits(50, own, model="other")):
        assert predict(found, judged) == pytest.approx(found.predict(judged.figures).mean(1), abs=0)
    nameless = replace(habits(50, own), figures={"harm": habits(50, own).figures["harm"]})
    assert predict(found, nameless) == pytest.approx(found.predict(nameless.figures).mean(1), abs=0)


def test_files_of_before_have_no_errors_to_carry_over(tmp_path: Path) -> None:
    path, made = tmp_path / "c.json", fit_calibration([pair(0), pair(1)])
    write_calibration(path, made)
    value = json.loads(path.read_text())
    del value["residuals"]
    path.write_text(json.dumps(value))
    assert read_calibration(path) == replace(made, residuals=())


def test_policies_with_the_same_figures_are_one() -> None:
    own = np.random.default_rng(7).normal(0, 1.5, N)
    found, judged = fit_calibration([habits(seed, own) for seed in range(4)]), habits(50, own)
    twice = {name: np.concatenate([values, values]) for name, values in judged.figures.items()}
    methods = [*judged.methods, *(f"{name},quant=int8" for name in judged.methods)]
    where = Where("m", "prompt", "niah", 512.0, {})
    values, confirmed = found.predict_policies(twice, where, methods, [*judged.shares, *judged.shares])
    assert values[:N] == pytest.approx(values[N:], abs=0)
    assert confirmed.all()


def test_runs_without_an_order_are_refused() -> None:
    """A task that the model cannot do teaches nothing; one on which loss looks good would turn rankings around."""
    same = [replace(pair(seed), real=np.zeros((N, S))) for seed in range(2)]
    with pytest.raises(DataError, match=r"the same real accuracy \(0.00\)"):
        fit_calibration(same)
    turned = [replace(p, real=1 - p.real) for p in (pair(0), pair(1))]
    with pytest.raises(DataError, match="turn the ranking around"):
        fit_calibration(turned)


def test_a_difference_from_itself_is_no_error() -> None:
    """Policies with numbers of entries of their own are alone in their budgets: they say nothing of differences."""
    alone = replace(pair(3), budgets=tuple(str(i) for i in range(N)))
    found = fit_calibration([alone])
    assert found.gap_width == pytest.approx(2 * found.half_width)
    mixed = replace(alone, budgets=("5%", "5%", *alone.budgets[2:]))
    assert 0 < fit_calibration([mixed]).gap_width < 1
