"""From a real capture to tables: against the policies' own predictions and masked forwards, and what is refused."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from kvtool.capture.reader import open_capture
from kvtool.cli import cli
from kvtool.errors import ConfigError, DataError
from kvtool.models import LoadedModel
from kvtool.policies import Policy
from kvtool.simulate.attribution import CAUSES, EVICT, N_SETS, PLAIN, SLOTS, STEPS
from kvtool.simulate.attribution_refine import refine_states
from kvtool.simulate.attribution_rows import REAL, Estimate, Row
from kvtool.simulate.attribution_runner import FILES, AttributionConfig, AttributionSummary, run_attribution
from kvtool.simulate.attribution_sample import WEIGHTED, sample_cells
from kvtool.simulate.attribution_words import paragraph
from kvtool.simulate.evaluate import evaluate_sample
from kvtool.simulate.gate import gated_loss
from kvtool.simulate.refine import refine_sample

KINDS = {"evict": "", "fewer": ",compensate=slots", "mean": ",compensate=mean,bias=none", "count": ",compensate=mean"}
KINDS |= {"weighted": ",compensate=weighted"}


def texts(policy: str, block: str) -> list[Policy]:
    """The policies of one cell, in the order of `REAL`."""
    found = [policy, *(f"{policy}{kind},block={block}" for kind in list(KINDS.values())[1:])]
    return [Policy.parse(text) for text in found]


@pytest.mark.parametrize(("method", "block"), [("snapkv:budget=40%,window=16", "16"), ("adakv:budget=30%,window=16", "full")])
def test_what_can_be_run_is_predicted_as_the_policies_are(
    method: str, block: str, llama_capture: tuple[Path, LoadedModel]
) -> None:
    with open_capture(llama_capture[0]) as capture:
        sample = capture.samples[0]
        found = sample_cells(sample, [(Policy.parse(method), block)])
        assert found.moved.tolist() == [0]
        for (name, state), want in zip(REAL.items(), evaluate_sample(sample, texts(method, block)), strict=True):
            assert found.measures.harm[0, state].sum() == pytest.approx(want.harm, rel=1e-9), name
            assert found.measures.margin[0, state].sum() == pytest.approx(-(want.margin_change or 0.0), rel=1e-9, abs=1e-12)
        assert found.budget.mean() == pytest.approx(want.entries)
        # A gate takes heads away one by one, by the very figure that the fit sees.
        threshold = float(np.median(found.variance))
        harm = found.measures.harm[0].reshape(WEIGHTED + 1, -1)
        loss = gated_loss(threshold, found.variance.reshape(1, -1), (harm[WEIGHTED] - harm[EVICT])[None])
        gated = Policy.parse(f"{method},compensate=weighted,block={block},gate={threshold}")
        assert evaluate_sample(sample, [gated])[0].harm == pytest.approx(harm[EVICT].sum() + loss[0], rel=1e-9)


@pytest.mark.parametrize("compress_at", ["prompt", "context"])
def test_masked_forwards_equal_those_of_the_policies(
    compress_at: Any, tmp_path: Path, make_capture: Callable[..., LoadedModel]
) -> None:
    loaded = make_capture(tmp_path / "c.h5", n=1, length=170, compress_at=compress_at)
    cells = [(Policy.parse("adakv:budget=30%,window=8"), "16"), (Policy.parse("streaming:budget=20%"), "full")]
    with open_capture(tmp_path / "c.h5") as capture:
        sample = capture.samples[0]
        full, found = refine_states(loaded, sample, cells, range(WEIGHTED + 1))
        for (policy, block), states in zip(cells, found, strict=True):
            policies = [Policy.parse("full"), *texts(str(policy), block)]
            for state, want in zip((None, *REAL.values()), refine_sample(loaded, sample, policies), strict=True):
                got = full if state is None else states[state]
                assert (got.nll, got.margin) == (pytest.approx(want.nll, abs=2e-4), pytest.approx(want.margin, abs=2e-4))
            for perfect in (0, SLOTS):
                assert states[perfect].nll == pytest.approx(full.nll, abs=2e-4)
                assert states[perfect].kl == pytest.approx(0, abs=1e-6)
            assert abs(states[PLAIN].nll - full.nll) > 1e-2


@pytest.fixture(scope="module", params=["margin", "harm"])
def summary(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, llama_capture: tuple[Path, LoadedModel]
) -> AttributionSummary:
    path, loaded = llama_capture
    config = AttributionConfig(
        str(path),
        ("adakv:window=16",),
        ("12%", "40%"),
        ("8", "24", "full"),
        measure=request.param,
        refine=True,
        draws=50,
    )
    return run_attribution(config, tmp_path_factory.mktemp("attribution"), loaded)


def test_everything_adds_up(summary: AttributionSummary) -> None:
    able = [row for row in summary.rows if row.message is None]
    assert len(summary.rows) == 6
    assert [(row.policy, row.block) for row in summary.rows if row.message] == [("adakv:budget=12%,window=16", "8")]
    for row in able:
        assert row.sets[0] == pytest.approx(0, abs=1e-6)
        assert sum(row.causes[cause].mean for cause in CAUSES) == pytest.approx(row.cost["mean"] - row.sets[0], abs=1e-9)
        assert sum(row.ladder[step].mean for step in STEPS) == pytest.approx(row.cost["mean"] - row.cost["evict"], abs=1e-9)
        assert row.loss["mean"].mean == pytest.approx(row.cost["mean"] - row.cost["evict"], abs=1e-9)
        assert row.given["mean"].mean == pytest.approx(row.cost["fewer"] - row.cost["mean"], abs=1e-9)
        assert row.cost["mean"] - row.mended["count"].mean == pytest.approx(row.cost["count"], abs=1e-9)
        assert len(row.sets) == N_SETS
        for name in REAL:
            assert sum(head["cost"][name] for head in row.heads) == pytest.approx(row.cost[name], rel=1e-9, abs=1e-9)
        for cause in CAUSES:
            assert sum(head["causes"][cause] for head in row.heads) == pytest.approx(row.causes[cause].mean, abs=1e-9)
        assert 0 < row.held_plain <= row.held_counted <= 1
        assert row.gap >= 0
        assert row.real is not None
        real = row.real["nll"]
        assert sum(cause.mean for cause in row.real["causes"].values()) == pytest.approx(real["mean"] - real["full"], abs=1e-4)
        assert 0 <= row.real["as_predicted"] <= row.real["sure"] <= 10
        assert bool(row.gates) == (row.block == "full")  # captured for some block sizes
    assert any("block_variance/24" in note for note in summary.notes)


def test_files_hold_what_was_found(summary: AttributionSummary) -> None:
    folder = summary.folder
    assert all((folder / name).stat().st_size > 100 for name in FILES)
    value = json.loads((folder / "compensation.json").read_text())
    assert value["prompts"] == 3
    assert [row["harm"] for row in value["rows"]] == [row.harm for row in summary.rows]
    with (folder / "heads.csv").open() as file:
        lines = list(csv.DictReader(file))
    able = [row for row in summary.rows if row.message is None]
    assert len(lines) == sum(len(row.heads) for row in able) == 4 * len(able)
    assert float(lines[0]["count_loss"]) == pytest.approx(able[0].heads[0]["loss"]["count"].mean, rel=1e-5)
    text = (folder / "compensation.md").read_text()
    assert all(row.label in text for row in summary.rows)
    assert f"{len(able) - 1} more in" in summary.text(said=1)
    assert len(summary.text(said=1)) < len(summary.text())


def test_words_follow_the_figures() -> None:
    def row(low: float, high: float) -> Row:
        mean = (low + high) / 2
        causes = {cause: Estimate(float(i), 0.0, 4.0) for i, cause in enumerate(CAUSES)}
        losses = {name: Estimate(mean, low, high) for name in ("mean", "count", "weighted")}
        harm = {"evict": 5.0, "fewer": 6.5, "mean": 6.0, "count": 5.0, "weighted": 5.0}
        found = Row(
            "snapkv:budget=5%",
            "32",
            entries=26,
            slots=16,
            measure="harm",
            harm=harm,
            loss=losses,
            causes=causes,
            held_plain=np.exp(-5.3),
        )
        found.given = {"mean": Estimate(0.5, 0.4, 0.6)}
        found.held_counted = float(np.exp(-1.2))
        return found

    worse, better, unsure = (paragraph(row(*limits)) for limits in ((1.0, 2.0), (-2.0, -1.0), (-1.0, 2.0)))
    assert "plain mean: loses, +1.50 (+1.00 to +2.00) of harm against evicting alone" in worse
    assert (
        "its slots (16 per head) cost 1.50, what stands in them gives +0.50 (+0.40 to +0.60) back, as it weighs exp(-5.3)"
        in worse
    )
    assert "of the 6.00 of harm that it costs against the full cache, 3.00 (50 %) the plain instead" in worse
    assert "mean with ln n: hurts" in worse
    assert "mean with ln n: helps" in better
    assert "mean with ln n: makes no sure difference" in unsure


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"policies": ("snapkv:compensate=mean",)}, ConfigError, "leave compensate= out"),
        ({"policies": ("h2o:decode=evict",)}, ConfigError, "leave that out"),
        ({"policies": ("full",)}, ConfigError, "evicts nothing"),
        ({"policies": ("snapkv:window=16",), "budgets": ("8%",), "blocks": ("8",)}, ConfigError, "slots of its compensation"),
        ({"refine": True}, ConfigError, "needs the captured model"),
        ({"blocks": ("0",)}, ConfigError, "block='0'"),
        ({"blocks": ()}, ConfigError, "no block size"),
        ({"measure": "loss"}, ConfigError, "there are margin, harm"),
        ({"policies": ("snapkv:window=5",)}, DataError, "--windows 5"),
    ],
)
def test_what_cannot_be_is_refused(
    changes: dict[str, Any], error: type[Exception], words: str, tmp_path: Path, llama_capture: tuple[Path, LoadedModel]
) -> None:
    with pytest.raises(error, match=words):
        run_attribution(AttributionConfig(str(llama_capture[0]), **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_layers_that_cannot_be_compressed_are_refused(tmp_path: Path, make_capture: Callable[..., LoadedModel]) -> None:
    make_capture(tmp_path / "c.h5", "mistral", n=1)
    with pytest.raises(DataError, match="no layer that can be compressed, or prompts that differ in which"):
        run_attribution(AttributionConfig(str(tmp_path / "c.h5")), tmp_path / "out")


def test_command(tmp_path: Path, llama_capture: tuple[Path, LoadedModel]) -> None:
    base = [
        "analyze",
        "compensation",
        str(llama_capture[0]),
        "-p",
        "snapkv:window=16",
        "-r",
        "40%",
        "-o",
        str(tmp_path / "out"),
    ]
    result = CliRunner().invoke(cli, [*base, "--block", "16,full"])
    assert result.exit_code == 0, result.output
    assert "snapkv:budget=40%,window=16, block 16" in result.output
    value = json.loads(CliRunner().invoke(cli, [*base, "--block", "full", "--json"]).stdout)
    assert value["rows"][0]["harm"]["evict"] > 0
    assert value["rows"][0]["measure"] == "margin"
    result = CliRunner().invoke(cli, [*base, "--block", "some"])
    assert (result.exit_code, result.output.count("\n")) == (2, 1)
    result = CliRunner().invoke(cli, ["analyze", "compensation", str(tmp_path / "no.h5")])
    assert (result.exit_code, "not found" in result.output) == (1, True)
