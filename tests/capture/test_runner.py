"""Refusals, fall-backs that are recorded, and what a run reports."""

from __future__ import annotations

import capture_toy as toy
import numpy as np
import pytest
import torch

from kvtool.capture.prompt_pass import greedy_answer
from kvtool.capture.reader import open_capture
from kvtool.capture.runner import CaptureConfig, run_capture
from kvtool.errors import ConfigError, DataError
from kvtool.policies.statistics import AttentionInputs, Rope, compute_statistics


@pytest.fixture(scope="module")
def loaded():
    return toy.build_loaded("llama")


def _config(**changes):
    return CaptureConfig(**{"task": "toy", "model": "llama", "n": 2, "windows": (8,), **changes})


def test_same_command_again_does_nothing(loaded, tmp_path):
    samples, out = toy.make_samples(2), tmp_path / "c.h5"
    assert run_capture(_config(), loaded, samples, out).n_reused == 0
    before = out.stat()
    summary = run_capture(_config(), loaded, samples, out)
    assert (summary.n_samples, summary.n_reused, summary.size_bytes) == (2, 2, before.st_size)
    assert out.stat().st_mtime_ns == before.st_mtime_ns
    assert not (tmp_path / "c.h5.parts").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"compress_at": "context"}, "compress_at"), ({"windows": (8, 9)}, "statistics"), ({"answer_tokens": 3}, "answer_tokens")],
)
def test_another_configuration_is_refused(loaded, tmp_path, changes, named):
    samples, out = toy.make_samples(2), tmp_path / "c.h5"
    run_capture(_config(), loaded, samples, out)
    before = out.read_bytes()
    with pytest.raises(ConfigError, match=rf"another configuration \({named}:"):
        run_capture(_config(**changes), loaded, samples, out)
    assert out.read_bytes() == before


def test_other_prompts_or_weights_are_refused(loaded, tmp_path):
    out = tmp_path / "c.h5"
    run_capture(_config(), loaded, toy.make_samples(2), out)
    with pytest.raises(ConfigError, match="prompts: "):
        run_capture(_config(), loaded, toy.make_samples(2, seed=5), out)
    with pytest.raises(ConfigError, match="fingerprint: "):
        run_capture(_config(), toy.build_loaded("llama", seed=1), toy.make_samples(2), out)


def test_prompt_longer_than_the_context_is_refused(tmp_path):
    small = toy.build_loaded("llama", max_positions=56)
    with pytest.raises(ConfigError, match=r"sample toy-0 needs 59 tokens, but random-llama has a context of 56"):
        run_capture(_config(), small, toy.make_samples(2), tmp_path / "c.h5")
    assert list(tmp_path.iterdir()) == []


def test_no_samples(loaded, tmp_path):
    with pytest.raises(DataError, match="no samples"):
        run_capture(_config(), loaded, [], tmp_path / "c.h5")


@pytest.mark.parametrize(
    "changes", [{"n": 0}, {"compress_at": "answer"}, {"windows": (0,)}, {"answer_tokens": 1}, {"statistics": ("nonsense",)}]
)
def test_bad_configurations(changes):
    with pytest.raises(ConfigError):
        _config(**changes)


def test_no_gold_answer_uses_the_models_own(loaded, tmp_path):
    (sample,) = toy.make_samples(1, n_answer=0)
    summary = run_capture(_config(n=1), loaded, [sample], tmp_path / "c.h5")
    assert summary.n_model_answers == 1
    ids = torch.tensor([sample.prompt_ids])
    for _ in range(sample.sample.max_new_tokens):  # no cache at all
        ids = torch.cat([ids, loaded.model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    expected = ids[0, len(sample.prompt_ids) :].tolist()
    with open_capture(tmp_path / "c.h5") as capture:
        assert capture.samples[0].answer_source == "model"
        assert capture.samples[0].answer_ids == expected
        assert (capture.samples[0].probes().margins < 0).sum() == 0 or capture.samples[0].probes().nll.max() < np.log(toy.VOCAB)


def test_own_answer_stops_at_the_end_token(loaded):
    (sample,) = toy.make_samples(1)
    answer = greedy_answer(loaded.model, sample.prompt_ids, 6)
    before = loaded.model.generation_config.eos_token_id
    try:
        loaded.model.generation_config.eos_token_id = [answer[2]]
        assert greedy_answer(loaded.model, sample.prompt_ids, 6) == answer[: answer.index(answer[2]) + 1]
    finally:
        loaded.model.generation_config.eos_token_id = before


def test_long_answers_are_cut_and_it_is_recorded(loaded, tmp_path):
    (sample,) = toy.make_samples(1, n_answer=9)
    assert run_capture(_config(n=1, answer_tokens=5), loaded, [sample], tmp_path / "c.h5").n_truncated == 1
    with open_capture(tmp_path / "c.h5") as capture:
        stored = capture.samples[0]
        assert stored.answer_truncated
        assert stored.answer_ids == sample.answer_ids[:5]
        assert stored.n_probe == 4


def test_one_token_answers_have_no_margins_when_the_prompt_is_compressed(loaded, tmp_path, capsys):
    (sample,) = toy.make_samples(1, n_answer=1)
    assert run_capture(_config(n=1), loaded, [sample], tmp_path / "p.h5").n_without_margins == 1
    assert "compression cannot change it" in capsys.readouterr().err
    with open_capture(tmp_path / "p.h5") as capture:
        probes = capture.samples[0].probes()
        assert probes.margins.shape == (0,)
        assert probes.gain.shape == (2, 4, 0, capture.samples[0].seq_len)
    config = _config(n=1, compress_at="context")
    assert run_capture(config, loaded, [sample], tmp_path / "c.h5").n_without_margins == 0


def test_sliding_layers_are_reported(tmp_path):
    summary = run_capture(_config(model="mistral"), toy.build_loaded("mistral"), toy.make_samples(2), tmp_path / "c.h5")
    assert summary.n_kept_layers == 4
    with open_capture(tmp_path / "c.h5") as capture:
        assert capture.samples[0].views() == []


def test_asked_alone_or_together_a_statistic_is_the_same_to_the_bit():
    """Capture computes all statistics of a prompt, live inference only those of its policy: both must choose alike."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, 301, 16, generator=generator) for n in (4, 2, 2))
    for window in (None, 37):
        rope, weight = Rope(torch.rand(8, generator=generator)), torch.randn(24, 64, generator=generator)
        inputs = AttentionInputs(q, k, v, 0.25, window, rope, weight)
        names = _config(windows=(8, 32)).names()
        together = compute_statistics(inputs, names)
        for name in names:
            assert torch.equal(together[name], compute_statistics(inputs, [name])[name])
