"""Decoding without a cache gives the full cache's tokens, keeps nothing, and resumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kvtool.errors import ConfigError
from kvtool.infer.nocache import NAME, NoCacheConfig, decode_without_cache, read_no_cache, run_no_cache
from kvtool.infer.stress_prompts import Book
from kvtool.models import LoadedModel, load_model


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model("tiny", device="cpu")


def test_tokens_are_those_of_plain_generation(loaded: LoadedModel) -> None:
    device = torch.device("cpu")
    prompt = Book.read(loaded).batch(1, 96, 3, device)
    tokens, record = decode_without_cache(loaded.model, (device,), prompt, 5)
    made = loaded.model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    assert tokens == made[0, 96:].tolist()
    assert len(record["step_s"]) == 5
    assert record["kv_bytes_prompt_end"] == record["kv_bytes_generation_end"] == 0


def test_a_run_continues_and_has_one_row_a_length(loaded: LoadedModel, tmp_path: Path) -> None:
    config = NoCacheConfig(length=32, max_length=64, n_new=2, repeats=2)
    rows = run_no_cache(config, loaded, tmp_path)
    assert [(row.policy, row.length, row.n) for row in rows] == [(NAME, 32, 2), (NAME, 64, 2)]
    path = tmp_path / "records.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]))
    assert [row.length for row in run_no_cache(config, loaded, tmp_path)] == [32, 64]
    after = path.read_text().splitlines(keepends=True)
    assert after[:3] == lines[:3]
    assert len(after) == 4
    assert json.loads((tmp_path / "no_cache.json").read_text())[1]["tpot_s"][1] == read_no_cache(tmp_path)[1].tpot_s[1]  # type: ignore[index]


def test_lengths_beyond_the_context_are_refused(loaded: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lower max_length"):
        run_no_cache(NoCacheConfig(length=4096, max_length=8192), loaded, tmp_path)


def test_what_does_not_fit_is_a_row(loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvtool.infer import stress_memory

    monkeypatch.setattr(stress_memory, "free_bytes", lambda devices: 1000)
    (row,) = run_no_cache(NoCacheConfig(length=32, max_length=32, repeats=1), loaded, tmp_path)
    assert row.status == "would not fit"
    assert row.tpot_s is None
