"""Large captures: probes layer by layer, statistics once, several processes; the figures stay the same. Answers of one token."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvtool import models
from kvtool.capture.reader import CapturedSample, open_capture
from kvtool.capture.runner import CaptureConfig, run_capture
from kvtool.data.tasks import load_task
from kvtool.errors import ConfigError
from kvtool.models import LoadedModel
from kvtool.policies import expand_policies, kept_counts, kept_positions, method_classes, parse_policy
from kvtool.policies.base import Memo
from kvtool.simulate import evaluate, workers
from kvtool.simulate.curves import curves
from kvtool.simulate.evaluate import KnownView, evaluate_sample, sample_table
from kvtool.simulate.rank import risks
from kvtool.simulate.runner import SimulateConfig, run_simulate
from kvtool.simulate.workers import evaluate_samples
from kvtool.textgrid import figure

TEXTS = (
    "snapkv:window=8",
    "adakv:window=8",
    "adakv:window=8,floor=0.5",
    "adakv:window=8,normalize=true",
    "adakv:window=8,rule=kvpress",
    "cake:window=8",
    "cake:window=8,tau1=2",
    "cake:window=16",
    "lava:window=8",
    "lava:window=8,floor=0.2",
    "hace-layer:window=8",
    "pyramidkv:window=8",
    "critical:window=8",
    "h2o:window=8",
    "tova",
)
BUDGETS = ("10%", "20%", "35%", "70%")


def test_layer_by_layer_is_all_at_once(llama_capture: tuple[Path, LoadedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    policies = expand_policies(TEXTS, BUDGETS)
    with open_capture(llama_capture[0]) as capture:
        sample = capture.samples[0]
        table, views = sample_table(sample), sample.views()
        expected = []
        for policy in policies:
            parts = policy.method.parts()
            scores = [parts.scorer.score(view) for view in views]
            orders = np.stack([parts.selector.order(score).numpy() for score in scores])
            expected.append(curves(table, orders, np.asarray([kept_counts(policy, views, scores)])))
        # Nothing may read the probes of all layers; batches of one group, and hardly any room for statistics.
        monkeypatch.setattr(CapturedSample, "probes", lambda self: pytest.fail("the probes of all layers were read"))
        monkeypatch.setattr(evaluate, "ORDER_BYTES", 1)
        monkeypatch.setattr(evaluate, "KNOWN_BYTES", 1)
        found = evaluate_sample(sample, policies)
    for wanted, prediction in zip(expected, found, strict=True):
        for name in ("harm", "margin_change", "layer_harm", "recall"):
            assert getattr(prediction, name) == pytest.approx(float(getattr(wanted, name)[0]), rel=1e-12, abs=1e-12)


def test_probes_of_a_layer_are_those_of_the_file(llama_capture: tuple[Path, LoadedModel]) -> None:
    with open_capture(llama_capture[0]) as capture:
        sample = capture.samples[0]
        whole = sample.probes()
        for layer in range(capture.model.n_layers):
            for one, all_ in zip(
                sample.layer_probes(layer), (whole.attention, whole.gain, whole.attention_own, whole.gain_own), strict=True
            ):
                assert (one == all_[layer]).all()


def test_statistics_are_read_once(llama_capture: tuple[Path, LoadedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[str, int]] = []
    plain = CapturedSample.selection
    monkeypatch.setattr(
        CapturedSample, "selection", lambda self, name, layer: read.append((name, layer)) or plain(self, name, layer)
    )
    with open_capture(llama_capture[0]) as capture:
        evaluate_sample(capture.samples[0], expand_policies(TEXTS, BUDGETS))
        assert len(read) == len(set(read))
        known: dict = {}
        view = KnownView(capture.samples[0].views()[0], known)
        monkeypatch.setattr(evaluate, "KNOWN_BYTES", view.statistic("last").nbytes)
        view.statistic("accumulated")
        assert list(known) == [(0, "accumulated")]


@pytest.mark.parametrize("name", sorted(method_classes()))
def test_what_is_remembered_changes_nothing(name: str, llama_capture: tuple[Path, LoadedModel]) -> None:
    cls = method_classes()[name]
    if cls.keeps_all or {"heads", "plan", "file"} & set(cls.__dataclass_fields__):
        pytest.skip("needs no budgets, or a file")
    texts = [text for text in TEXTS if text.split(":")[0] == name] or [f"{name}:{cls.small}" if cls.small else name]
    with open_capture(llama_capture[0]) as capture:
        views = capture.samples[0].views()
        facts: dict = {}
        for text in texts:
            policies = [parse_policy(f"{text}{',' if ':' in text else ':'}budget={b}") for b in ("40%", "60%", "80%", "60%")]
            scores = [policies[0].method.parts().scorer.score(view) for view in views]
            memo = Memo(facts)
            for policy in policies:
                assert kept_counts(policy, views, scores, memo) == kept_counts(policy, views, scores)


def test_processes_predict_the_same(llama_capture: tuple[Path, LoadedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    policies = expand_policies(("snapkv:window=8", "cake:window=8"), BUDGETS)
    with open_capture(llama_capture[0]) as capture:
        plain = [found for _, found in evaluate_samples(capture, capture.samples, policies, 1)]
        monkeypatch.setattr(workers, "WORTH", 1)
        # Only what is left of an interrupted run, in its order.
        found = list(evaluate_samples(capture, capture.samples[1:], policies, 2))
        assert [sample.id for sample, _ in found] == [sample.id for sample in capture.samples[1:]]
        assert [predictions for _, predictions in found] == plain[1:]
        with pytest.raises(ConfigError, match="jobs=-1"):
            list(evaluate_samples(capture, capture.samples, policies, -1))


def test_small_requests_stay_in_one_process(llama_capture: tuple[Path, LoadedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "ProcessPoolExecutor", lambda *_: pytest.fail("processes were started"))
    with open_capture(llama_capture[0]) as capture:
        assert len(list(evaluate_samples(capture, capture.samples, expand_policies(("tova",), BUDGETS), 0))) == len(
            capture.samples
        )


def test_lost_evidence_is_that_of_the_kept_positions(
    llama_capture: tuple[Path, LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    policies = expand_policies(("snapkv:window=8", "adakv:window=8", "window"), ("20%", "100%"))
    with open_capture(llama_capture[0]) as capture:
        sample = capture.samples[0]
        spans = sample.meta["evidence"]
        assert spans
        positions = [j for a, b in spans for j in range(a, b)]
        found, probes, views = evaluate_sample(sample, policies), sample.probes(), sample.views()
        group = capture.model.n_heads // capture.model.n_kv_heads
        weight = np.abs(probes.gain.sum(-1, dtype=np.float64) + probes.gain_own)
        weight /= probes.attention.sum(-1, dtype=np.float64) + probes.attention_own
        for policy, prediction in zip(policies, found, strict=True):
            lost = whole = 0.0
            for view, heads in zip(views, kept_positions(policy, views), strict=True):
                for q in range(capture.model.n_heads):
                    attention = probes.attention[view.layer, q].astype(float) * weight[view.layer, q][:, None]
                    gone = sorted(set(positions) - set(heads[q // group].tolist()))
                    lost, whole = lost + attention[:, gone].sum(), whole + attention[:, positions].sum()
            assert prediction.evidence == pytest.approx(lost / whole, rel=1e-5, abs=1e-9)
        n = sample.seq_len
        # Overlapping spans count once, one that reaches into the question as far as it is compressed, one behind it not at all.
        monkeypatch.setitem(sample.meta, "evidence", [[n - 2, n + 3], [3, 6], [5, 7], [n, n + 1]])
        assert sample.evidence_spans == [(n - 2, n), (3, 6), (5, 7)]
        assert sample.evidence_positions.tolist() == [3, 4, 5, 6, n - 2, n - 1]
        monkeypatch.setitem(sample.meta, "evidence", [])
        assert [p.evidence for p in evaluate_sample(sample, policies)] == [None] * len(policies)


def test_an_answer_of_one_token_loses_nothing_and_has_no_recall(
    random_model: Callable[..., Any], byte_tokenizer: Any, tmp_path: Path
) -> None:
    model = random_model("llama")
    loaded = LoadedModel(model, byte_tokenizer, models.describe(model, "llama"))
    short, long = load_task("niah", byte_tokenizer, 2, 230, seed=0)
    run_capture(
        CaptureConfig(task="niah", model="llama", n=2, length=230),
        loaded,
        [replace(short, answer_ids=short.answer_ids[:1]), long],
        tmp_path / "c.h5",
    )
    policies = [parse_policy(text) for text in ("snapkv:budget=20%,window=8", "snapkv:budget=20%,window=8,compensate=mean")]
    with open_capture(tmp_path / "c.h5") as capture, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [sample.n_probe > 0 for sample in capture.samples] == [False, True]
        one, several = (evaluate_sample(sample, policies) for sample in capture.samples)
    for prediction in one:
        assert (prediction.harm, prediction.evidence, prediction.missing, prediction.note) == (0, 0, 0, None)
        assert prediction.recall is not None
        assert math.isnan(prediction.recall)
        assert figure(prediction.recall) == "-"
    for untouched, prediction in zip(one, several, strict=True):
        assert prediction.harm is not None
        assert prediction.evidence is not None
        assert prediction.evidence > 0
        # The evidence of the others still counts.
        expected = np.log1p(prediction.harm) + 8 * prediction.evidence
        np.testing.assert_allclose(risks([untouched, prediction]), [0, expected], rtol=1e-12)
    config = SimulateConfig(str(tmp_path / "c.h5"), ("snapkv:window=8", "random:window=8"), ("20%",))
    summary = run_simulate(config, tmp_path / "out")
    assert {row.policy: row.recall for row in summary.rows}["snapkv:budget=20%,window=8"] == pytest.approx(several[0].recall)
    assert "1 of 2 prompts have an answer of one token" in summary.text()
    assert "nan" not in summary.text()
