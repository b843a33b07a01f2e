"""What the probes predict is what happens: for a small step towards a kept set, predicted change = real change."""

from __future__ import annotations

import capture_toy as toy
import pytest
import torch

from kvtool.capture.probe_pass import probe_tokens, run_probes
from kvtool.capture.prompt_pass import run_prompt


def _predicted(record, kept, n_heads):
    """First-order change of the sum of margins when (layer, head) keeps only `kept`, as docs/capture-format.md has it."""
    total = 0.0
    for a, b, a_own, b_own in zip(record.attention, record.gain, record.attention_own, record.gain_own, strict=True):
        for head in range(n_heads):
            mask = kept[head]
            for i in range(a.shape[1]):
                before = b[head, i].double().sum() + b_own[head, i]
                kept_gain, kept_mass = (
                    b[head, i, mask].double().sum() + b_own[head, i],
                    a[head, i, mask].double().sum() + a_own[head, i],
                )
                total += float(kept_gain / kept_mass - before)
    return total


@pytest.mark.parametrize("kind", ["llama", "qwen2", "opt", "gpt_neox"])
def test_small_step_towards_a_kept_set(kind):
    model = toy.exact_norms(toy.build_model(kind).double())
    (sample,) = toy.make_samples(1, n_context=40)
    seq_len, ids = len(sample.context_ids), sample.prompt_ids + sample.answer_ids
    prompt = run_prompt(model, sample.context_ids, ["last"], 4)
    record = run_probes(model, prompt.keys, prompt.values, probe_tokens(sample.question_ids, sample.answer_ids))
    generator = torch.Generator().manual_seed(3)
    kept = torch.rand(4, seq_len, generator=generator) < 0.5

    def step(size):
        def change(layer, attention):
            masked = attention.clone()
            masked[:, seq_len:, :seq_len] *= kept[:, None, :]
            masked = masked / masked.sum(-1, keepdim=True)
            masked[:, :seq_len] = attention[:, :seq_len]
            return attention + size * (masked - attention)

        return float(toy.objective(toy.full_pass(model, ids[:-1], None, change), ids, len(sample.prompt_ids)).sum().detach())

    real = (step(1e-4) - step(-1e-4)) / 2e-4
    predicted = _predicted(record, kept, 4)
    assert abs(real) > 1e-2
    assert predicted == pytest.approx(real, rel=1e-4)


def test_single_entry_finite_difference():
    """The gain of one entry is the change of the objective per relative change of its attention."""
    model = toy.exact_norms(toy.build_model("llama").double())
    (sample,) = toy.make_samples(1, n_context=30)
    seq_len, ids = len(sample.prompt_ids), sample.prompt_ids + sample.answer_ids
    prompt = run_prompt(model, sample.prompt_ids, ["last"], 4)
    record = run_probes(model, prompt.keys, prompt.values, probe_tokens([], sample.answer_ids))
    for layer, head, i, j in [(0, 0, 0, 3), (0, 3, 2, 17), (1, 1, 1, 30), (1, 2, 0, 0)]:

        def scaled(factor, spot=(layer, head, i, j)):
            def change(at, attention):
                changed = attention.clone()
                if at == spot[0]:
                    changed[spot[1], seq_len + spot[2], spot[3]] *= factor
                return changed

            return float(toy.objective(toy.full_pass(model, ids[:-1], None, change), ids, seq_len + 1).sum().detach())

        real = (scaled(1 + 1e-4) - scaled(1 - 1e-4)) / 2e-4
        assert float(record.gain[layer][head, i, j]) == pytest.approx(real, rel=1e-4, abs=1e-9)
