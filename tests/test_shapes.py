"""Architectures by name: the arithmetic against real models, the weights, and one line for what is wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from kvtool import device_maps, models
from kvtool.cli import cli
from kvtool.errors import CapacityError, ConfigError, MissingDependencyError
from kvtool.shape_models import empty_model, materialise, place_of, shape_fingerprint
from kvtool.shapes import SHAPES, footprint, parse_shape

SMALL = "shape:llama-3m,layers=2"


def run(*args: object) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in args], catch_exceptions=False)


@pytest.mark.parametrize("name", SHAPES)
def test_arithmetic_is_that_of_the_built_model(name: str) -> None:
    shape = parse_shape(f"shape:{name},layers=2,context=3000")
    model = empty_model(shape, torch.float16)
    assert sum(p.numel() for p in model.parameters()) == shape.n_parameters
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert {p.device.type for p in model.parameters()} == {"meta"}
    info = models.describe(model, name, "0")
    found = (info.n_layers, info.n_heads, info.n_kv_heads, info.head_dim, info.max_positions)
    assert found == (2, shape.n_heads, shape.n_kv_heads, shape.head_dim, 3000)
    assert info.compressible(10**6) == (True, True)


@pytest.mark.parametrize(
    ("name", "parameters", "kv_bytes"),
    [
        # As their publishers count them; KV bytes per token in 16 bit as in shared tables of the literature.
        ("llama-2-7b", 6_738_415_616, 524_288),
        ("mistral-7b", 7_241_732_096, 131_072),
        ("llama-3.1-8b", 8_030_261_248, 131_072),
        ("pythia-2.8b", 2_775_208_960, 327_680),
        ("opt-13b", 12_853_473_280, 819_200),
        ("qwen2.5-14b", 14_770_033_664, 196_608),
        ("qwen-14b", 14_167_290_880, 819_200),
        ("llama-3.2-1b", 1_235_814_400, 32_768),
    ],
)
def test_published_sizes(name: str, parameters: int, kv_bytes: int) -> None:
    assert SHAPES[name].n_parameters == parameters
    assert SHAPES[name].kv_bytes_per_token() == kv_bytes


def test_text_form_comes_back() -> None:
    for text in ("shape:opt-13b", "shape:opt-13b,context=8192,seed=3", "shape:llama-2-7b,layers=4"):
        assert parse_shape(text).text == text
        assert parse_shape(parse_shape(text).text) == parse_shape(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("shape:lama-2-7b", "Did you mean 'llama-2-7b'"),
        ("shape:", "Known: llama-2-7b"),
        ("shape:llama-3m,layer=2", "Did you mean 'layers'"),
        ("shape:llama-3m,layers=0", "at least 1"),
        ("shape:llama-3m,context=long", "whole number"),
        ("shape:llama-3m,seed", "unknown option 'seed'"),
    ],
)
def test_wrong_text(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_shape(text)
    result = run("capture", "-m", text)
    assert (result.exit_code, result.stderr.count("kvtool: ")) == (2, 1)


@pytest.fixture(scope="module")
def loaded() -> models.LoadedModel:
    return models.load_model(SMALL, device="cpu")


def test_weights_are_random_finite_and_the_same_again(loaded: models.LoadedModel) -> None:
    again = models.load_model(SMALL, device="cpu")
    ids = torch.randint(0, 512, (2, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, second = (m.model(input_ids=ids).logits.float() for m in (loaded, again))
    assert torch.equal(first, second)
    assert torch.isfinite(first).all()
    assert first.std() > 0.05
    other = models.load_model(f"{SMALL},seed=1", device="cpu")
    wide = models.load_model(SMALL, device="cpu", dtype="float32")
    prints = [m.info.fingerprint for m in (loaded, again, other, wide)]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3
    assert not torch.equal(next(loaded.model.parameters()), next(other.model.parameters()))
    assert not any(p.requires_grad for p in loaded.model.parameters())


def test_info_says_what_weights_and_tokenizer_are(loaded: models.LoadedModel) -> None:
    assert loaded.info.model_id == SMALL
    assert loaded.info.weights == "random, seed 0"
    assert "embedded model" in loaded.info.tokenizer
    assert next(loaded.model.parameters()).dtype == torch.bfloat16
    assert len(loaded.tokenizer) <= loaded.model.config.vocab_size
    assert loaded.model.generation_config.eos_token_id is None
    assert models.load_model("tiny", device="cpu").info.weights == ""


@pytest.mark.parametrize("name", ["opt-13b", "pythia-2.8b", "qwen-14b", "qwen3-0.6b", "mistral-7b", "llama-3.1-8b"])
def test_every_family_runs_and_equals_its_own_construction(name: str) -> None:
    """A narrow copy: rotary frequencies as the architecture computes them, and a finite forward in half precision."""
    import dataclasses

    shape = parse_shape(f"shape:{name},layers=1,context=128")
    narrow = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "ffn_dim": 64,
        "word_embed_proj_dim": 32,
        "vocab_size": 600,
        "head_dim": 8,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = {k: {**narrow, **heads}.get(k, v) for k, v in shape.config.items()}
    if "head_dim" not in shape.config:
        config.pop("head_dim", None)
    shape = dataclasses.replace(shape, config=config)
    model = empty_model(shape, torch.float16)
    materialise(model, {"": "cpu"}, 0)
    real = type(model)(model.config)
    for (mine, buffer), (theirs, wanted) in zip(model.named_buffers(), real.named_buffers(), strict=True):
        assert mine == theirs
        torch.testing.assert_close(buffer, wanted)
    head = model.get_output_embeddings().weight
    assert (head is model.get_input_embeddings().weight) == bool(model.config.tie_word_embeddings)
    with torch.no_grad():
        assert torch.isfinite(model.eval()(input_ids=torch.arange(100)[None]).logits).all()


def test_weights_are_made_in_their_dtype_at_once() -> None:
    """Never more than the model, one block of numbers in float32 and in its dtype: what a copy in float32 would exceed."""
    status = Path("/proc/self/status")
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("this system cannot start the resident set's high-water mark anew")

    def read(key: str) -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024

    shape = parse_shape("shape:llama-0.3b,layers=1")
    before = read("VmRSS")
    model = empty_model(shape, torch.bfloat16)
    materialise(model, {"": "cpu"}, 0)
    size = 2 * shape.n_parameters
    assert read("VmHWM") - before < 1.4 * size + 60e6
    assert sum(p.numel() * p.element_size() for p in model.parameters()) == size


def test_footprint_by_hand() -> None:
    shape = SHAPES["llama-2-7b"]
    size = footprint(shape, 1000, 2, kept=0.1, memory=14 * 10**9)
    assert size.weight_bytes == 2 * 6_738_415_616
    assert size.kv_bytes == 2 * 1000 * 524_288
    assert size.kept_bytes == 104_857_600
    assert (size.fits, size.kept_fits) == (False, True)
    assert size.longest == (14 * 10**9 - 2 * 6_738_415_616) // (2 * 524_288)
    read = 2 * (6_738_415_616 - 32000 * 4096)
    assert size.possible_speedup == pytest.approx((read + 1_048_576_000) / (read + 104_857_600))
    assert footprint(shape, 1000, 2, memory=10**9).longest == 0
    assert footprint(shape, 1000, 2).fits is None


def test_tables_that_are_looked_up() -> None:
    from kvtool.infer.stress_memory import read_bytes, weight_bytes

    for name in ("opt-13b", "llama-2-7b", "qwen3-0.6b", "pythia-2.8b"):
        shape = parse_shape(f"shape:{name},layers=1")
        model = empty_model(shape, torch.bfloat16)
        assert weight_bytes(model) == 2 * shape.n_parameters
        assert read_bytes(model) == 2 * (shape.n_parameters - shape.n_lookup)


def test_shapes_command() -> None:
    result = run("shapes", "--length", "32768", "--batch", "16", "--memory", "80GB", "-r", "2%")
    assert result.exit_code == 0
    assert all(name in result.output for name in SHAPES)
    rows = json.loads(run("shapes", "--memory", "24GiB", "--json").output)
    seven = next(row for row in rows if row["name"] == "llama-2-7b")
    assert seven["longest"] == (24 * 2**30 - 2 * 6_738_415_616) // 524_288
    for wrong in (("--memory", "much"), ("--length", "0"), ("-r", "0%")):
        assert run("shapes", *wrong).exit_code == 2


def test_a_shape_that_does_not_fit_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("kvtool.shape_models.materialise", full)
    with pytest.raises(CapacityError, match=r"weights need 13\.5 GB, cpu has no room"):
        models.load_model("shape:llama-2-7b", device="cpu")


def test_places() -> None:
    places = {"": "a", "model.layers.1": "b", "model.layers.1.mlp": "c", "model.layers.10": "d"}
    asked = ("model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.up", "model.layers.10.mlp.up", "lm_head.weight", "")
    assert [place_of(name, places) for name in asked] == ["b", "c", "d", "a", "a"]


class TestDeviceMaps:
    def test_unknown_kind(self) -> None:
        with pytest.raises(ConfigError, match="Did you mean 'auto'"):
            models.load_model(SMALL, device="cpu", device_map="aut")

    def test_without_accelerate(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(device_maps, "find_spec", lambda name: None)
        with pytest.raises(MissingDependencyError, match=r"pip install 'kvtool\[devices\]'"):
            models.load_model(SMALL, device="cpu", device_map="auto")
        result = run("infer", "-m", SMALL, "--device", "cpu", "--device-map", "auto")
        assert (result.exit_code, "kvtool[devices]" in result.stderr) == (1, True)

    def test_layers_that_fit_nowhere_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(CapacityError, match="no room for 1 parts"):
            device_maps.check_places({"model.layers.0": 0, "model.layers.1": "disk"})
        assert device_maps.check_places({"": "cpu"}) == {"": "cpu"}
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        with pytest.raises(CapacityError, match="smaller dtype"):
            device_maps.check_places({"a": 0, "b": "cpu"})

    def test_map_of_one_device_computes_the_same(self, loaded: models.LoadedModel) -> None:
        pytest.importorskip("accelerate", reason="the extra 'devices' is not installed")
        mapped = models.load_model(SMALL, device="cpu", device_map="auto")
        ids = torch.arange(40)[None]
        with torch.no_grad():
            assert torch.equal(mapped.model(input_ids=ids).logits, loaded.model(input_ids=ids).logits)


def test_fingerprint_hangs_on_every_part() -> None:
    texts = (
        "shape:llama-3m",
        "shape:llama-3m,seed=1",
        "shape:llama-3m,layers=2",
        "shape:llama-3m,context=64",
        "shape:llama-0.3b",
    )
    prints = {shape_fingerprint(parse_shape(text), torch.bfloat16) for text in texts}
    prints.add(shape_fingerprint(parse_shape(texts[0]), torch.float16))
    assert len(prints) == 6


def test_the_table_needs_no_torch() -> None:
    import subprocess

    code = "import sys, kvtool.shapes, kvtool.cli_stress; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done: Any = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
