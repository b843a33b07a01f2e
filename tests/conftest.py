"""Shared fixtures: random-weight models of five architectures and a byte tokenizer; no network, no GPU."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ARCHITECTURES = ("llama", "mistral", "qwen2", "opt", "gpt_neox")

#: Files of half a minute and more, longest first: begun last, one of them would keep one process busy while the others wait.
LONGEST = (
    "infer/test_decode.py",
    "test_stages_agree.py",
    "studies/test_run.py",
    "infer/test_cache.py",
    "test_cli.py",
    "test_docs.py",
    "studies/test_looks.py",
    "simulate/test_attribution_runner.py",
    "simulate/test_search.py",
    "infer/test_perplexity.py",
    "infer/test_stress.py",
    "capture/test_memory.py",
    "executors/test_shards.py",
    "simulate/test_kill.py",
    "capture/test_resume.py",
    "test_demo.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the longest files first; without a device keep one case of each test for it, which says that it was skipped."""
    order = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))
    on_device = [item for item in items if item.get_closest_marker("gpu")]
    if on_device:
        import torch

        if not torch.cuda.is_available():
            first = {item.nodeid.partition("[")[0]: item for item in reversed(on_device)}
            others = {item.nodeid for item in on_device} - {item.nodeid for item in first.values()}
            config.hook.pytest_deselected(items=[item for item in items if item.nodeid in others])
            items[:] = [item for item in items if item.nodeid not in others]


def build_random_model(architecture: str, *, seed: int = 0, **changes: Any) -> Any:
    """Return a 2-layer random-weight model in eval mode; GQA where the architecture has it, Mistral with window 16."""
    import torch
    from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, MistralConfig, OPTConfig, Qwen2Config

    torch.manual_seed(seed)
    base: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    gqa = {**base, "num_key_value_heads": 2, "intermediate_size": 96}
    config = {
        "llama": lambda: LlamaConfig(**{**gqa, **changes}),
        "mistral": lambda: MistralConfig(**{**gqa, "sliding_window": 16, **changes}),
        "qwen2": lambda: Qwen2Config(**{**gqa, **changes}),
        "opt": lambda: OPTConfig(**{**base, "ffn_dim": 96, "word_embed_proj_dim": 64, **changes}),
        "gpt_neox": lambda: GPTNeoXConfig(**{**base, "intermediate_size": 96, **changes}),
    }[architecture]()
    config.initializer_range = 0.3
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


@pytest.fixture(scope="module", autouse=True)
def _what_lives_is_no_garbage() -> None:
    """Runs collect garbage after every prompt, and would look through all that torch, transformers and pytest hold each time:
    a third of a second, more than most prompts of these tests take."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def random_model() -> Callable[..., Any]:
    """The builder `build_random_model`, as a fixture for test modules of every package."""
    return build_random_model


@pytest.fixture(scope="session")
def byte_tokenizer() -> Any:
    """A byte-level tokenizer with a first token, made on the spot."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": 0} | {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), start=1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


@pytest.fixture(scope="session")
def toy_heads(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a ``heads.json`` with random scores, kinds and confidences for a model of the given shape; returns its path."""
    import json

    import numpy as np

    from kvtool.classify.kinds import KINDS

    def build(n_layers: int, n_heads: int, n_kv_heads: int, fingerprint: str = "toy") -> Path:
        rng = np.random.default_rng(3)

        def table(n: int) -> list[dict[str, Any]]:
            return [
                {
                    "layer": layer,
                    "head": head,
                    "kind": str(rng.choice(KINDS)),
                    "confidence": float(rng.random()),
                    "unsure": False,
                    "importance": float(rng.random()),
                    "retrieval": float(rng.random()),
                }
                for layer in range(n_layers)
                for head in range(n)
            ]

        value = {
            "schema": "kvtool.heads/1",
            "model": {"model_id": "toy", "fingerprint": fingerprint},
            "n_layers": n_layers,
            "n_heads": n_heads,
            "n_kv_heads": n_kv_heads,
            "heads": table(n_heads),
            "kv_heads": table(n_kv_heads),
        }
        path = tmp_path_factory.mktemp("heads") / "heads.json"
        path.write_text(json.dumps(value))
        return path

    return build


@pytest.fixture(scope="session")
def toy_plan(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a plan with random falling harm curves for a model of the given shape; returns its path."""
    import numpy as np

    from kvtool.policies.planfile import Plan, write_plan

    def build(n_layers: int, n_kv_heads: int, fingerprint: str = "toy") -> Path:
        rng = np.random.default_rng(5)
        free_shares = np.concatenate([[0.0], np.geomspace(0.01, 1.0, 9)])
        steps = rng.random((len(free_shares), n_layers, n_kv_heads))
        harm = steps[::-1].cumsum(0)[::-1] - steps[-1]
        model = {"model_id": "toy", "fingerprint": fingerprint, "n_layers": n_layers, "n_kv_heads": n_kv_heads}
        path = tmp_path_factory.mktemp("plan") / "plan.json"
        write_plan(path, Plan("", "snapkv:window=8,kernel=3", 8, free_shares, harm, tuple(range(n_layers)), model, {}))
        return path

    return build


@pytest.fixture(scope="session")
def toy_budgets(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write random budgets for a model of the given shape, 20 % of 100 tokens on average; returns its path."""
    import numpy as np

    from kvtool.policies.budgetfile import Levels, make_plan, write_budgets
    from kvtool.policies.shares import share

    def build(n_layers: int, n_heads: int, n_kv_heads: int, fingerprint: str = "toy") -> Path:
        weights = np.random.default_rng(6).random(n_layers * n_kv_heads).tolist()
        entries = np.asarray(share(20 * len(weights), weights, 8, 100)).reshape(1, n_layers, n_kv_heads)
        model = {
            "model_id": "toy",
            "fingerprint": fingerprint,
            "n_layers": n_layers,
            "n_heads": n_heads,
            "n_kv_heads": n_kv_heads,
        }
        path = tmp_path_factory.mktemp("budgets") / "budgets.json"
        table = Levels(("20%",), "entries", entries, 100)
        write_budgets(path, make_plan("snapkv:window=8,kernel=3", range(n_layers), table, model, {}))
        return path

    return build
