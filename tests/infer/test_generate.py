"""Generation and answer scores against the model run without any cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvtool.infer.generate import generate, prefill, score_answer, score_logits
from kvtool.policies import Policy


def tokens(seed: int, n: int) -> list[int]:
    return torch.randint(3, 250, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("mode", ["prompt", "context"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "opt"])
def test_answer_scores_equal_a_masked_float64_model(
    mode: str,
    architecture: str,
    random_model: Callable[..., Any],
    policies: list[Policy],
    reference: Callable[..., torch.Tensor],
) -> None:
    model = random_model(architecture)
    context, question, answer = tokens(0, 50), tokens(1, 6), tokens(2, 5)
    prompt, asked = (context, question) if mode == "context" else (context + question, [])
    names = sorted({name for policy in policies for name in policy.method.parts().needs()})
    state = prefill(model, prompt, names, 9)
    for policy in policies:
        kept = state.choose(policy)
        found = score_answer(model, state.fork(policy, kept), asked, answer)
        logits = reference(model, prompt, asked + answer[:-1], [layer[0] for layer in kept])
        gold = answer if mode == "context" else answer[1:]
        rows = logits[-len(gold) :].log_softmax(-1)
        for i, token in enumerate(gold):
            p = rows[i, token].exp()
            assert found.nll[i] == pytest.approx(-float(rows[i, token]), rel=1e-4, abs=1e-4)
            assert found.margin[i] == pytest.approx(float(torch.logit(p)), rel=1e-4, abs=1e-4)
            assert found.hits[i] == (int(rows[i].argmax()) == token)
        assert len(found.nll) == len(gold)


def test_an_answer_of_one_token_has_nothing_that_compression_changes(random_model: Callable[..., Any]) -> None:
    model, policy = random_model("llama"), Policy.parse("window:budget=10")
    state = prefill(model, tokens(0, 30), (), 0)
    assert score_answer(model, state.fork(policy, state.choose(policy)), [], [7]).nll == []


def test_scores_by_hand() -> None:
    logits = torch.log(torch.tensor([[0.7, 0.2, 0.1], [0.25, 0.5, 0.25]]))
    scores = score_logits(logits, [0, 2])
    assert scores.nll == pytest.approx([0.3566749, 1.3862944])
    assert scores.margin == pytest.approx([0.8472979, -1.0986123])  # log(0.7 / 0.3), log(0.25 / 0.75)
    assert scores.hits == [True, False]


@pytest.mark.parametrize("mode", ["prompt", "context"])
def test_greedy_decoding_of_the_full_cache_is_the_plain_models(mode: str, random_model: Callable[..., Any]) -> None:
    model, full = random_model("llama"), Policy.parse("full")
    context, question = tokens(0, 50), tokens(1, 6)
    ids = torch.tensor([context + question])
    plain = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 56:].tolist()
    prompt, asked = (context, question) if mode == "context" else (context + question, [])
    state = prefill(model, prompt, (), 0)
    made = generate(model, state, state.fork(full, state.choose(full)), asked, 20, ())
    assert made.ids == plain
    assert len(made.step_s) == 19
    stopped = generate(model, state, state.fork(full, state.choose(full)), asked, 20, [plain[3]])
    assert stopped.ids == plain[: plain.index(plain[3]) + 1]
