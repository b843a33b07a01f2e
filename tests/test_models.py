from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvtool import attention, models
from kvtool.errors import ConfigError, DataError, UnsupportedModelError

ARCHITECTURES = ("llama", "mistral", "qwen2", "opt", "gpt_neox")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kvtool_attention_is_plain_attention(architecture: str, random_model: Callable[..., Any]) -> None:
    model = random_model(architecture)
    ids = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    padding = torch.ones(2, 40, dtype=torch.long)
    padding[1, :7] = 0

    def run() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
            padded = model(ids, attention_mask=padding).logits[padding.bool()]
            return model(ids).logits, padded, model.generate(ids, attention_mask=padding, **options)

    plain = run()
    attention.prepare(model)
    ours = run()
    torch.testing.assert_close(ours[0], plain[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[1], plain[1], rtol=1e-5, atol=1e-5)
    assert torch.equal(ours[2], plain[2])


def test_facts(random_model: Callable[..., Any]) -> None:
    info = models.describe(random_model("mistral"), "m")
    assert (info.n_layers, info.n_heads, info.n_kv_heads, info.head_dim, info.max_positions) == (2, 4, 2, 16, 512)
    assert info.windows == (16, 16)
    assert info.compressible(16) == (True, True)
    assert info.compressible(17) == (False, False)


def test_fingerprint_tells_weights_apart(random_model: Callable[..., Any]) -> None:
    same, again, other = (models.fingerprint(random_model("llama", seed=s)) for s in (0, 0, 1))
    assert same == again != other


def test_handler_is_removed_after_an_exception(random_model: Callable[..., Any]) -> None:
    model = random_model("llama")
    ids = torch.arange(3, 13)[None]
    before = model(ids).logits

    def fail(call: attention.AttentionCall) -> torch.Tensor:
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"), attention.attention_handler(model, fail):
        model(ids)
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(model(ids).logits, before)


def test_a_lost_handover_is_reported() -> None:
    attention.hand_over(torch.zeros(1), lambda call: call.queries)
    with pytest.raises(UnsupportedModelError, match=r"kvtool.prepare\(model\)"):
        attention.hand_over(torch.zeros(1), lambda call: call.queries)


@pytest.mark.parametrize("name", ["/no/such/folder", "nothing", "./here"])
def test_missing_model(name: str) -> None:
    with pytest.raises(DataError, match="not found"):
        models.load_model(name)


@pytest.mark.parametrize(("option", "value"), [("device", "cuda:99"), ("device", "toaster"), ("dtype", "float17")])
def test_what_the_machine_lacks_is_refused(option: str, value: str) -> None:
    with pytest.raises(ConfigError, match=value):
        models.load_model("tiny", **{option: value})


def test_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no config.json"):
        models.load_model(str(tmp_path))


def test_too_long_a_prompt(random_model: Callable[..., Any]) -> None:
    info = models.describe(random_model("llama"), "m")
    models.check_length(info, 512, "the prompt")
    with pytest.raises(ConfigError, match="needs 513 tokens, but m has a context of 512"):
        models.check_length(info, 513, "the prompt")


def test_small_models_take_one_thread_unless_the_user_asked_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, before = models.load_model("tiny", device="cpu"), torch.get_num_threads()
    large = replace(loaded, info=replace(loaded.info, head_dim=256))
    monkeypatch.setattr("kvtool.models._threads", [])
    try:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
        torch.set_num_threads(3)
        for model, threads in ((loaded, 1), (large, 3), (loaded, 1)):
            models.set_threads(model)
            assert torch.get_num_threads() == threads
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        torch.set_num_threads(2)
        models.set_threads(loaded)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
