"""A real capture of a random-weight model, small enough for literal references."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvtool import models
from kvtool.capture.runner import CaptureConfig, run_capture
from kvtool.data.tasks import load_task
from kvtool.models import LoadedModel


@pytest.fixture(scope="session")
def make_capture(random_model: Callable[..., Any], byte_tokenizer: Any) -> Callable[..., LoadedModel]:
    """Capture needle prompts with a random-weight model into a path; returns the model."""

    def build(
        path: Path, architecture: str = "llama", n: int = 3, compress_at: Any = "prompt", length: int = 230, **changes: Any
    ) -> LoadedModel:
        model = random_model(architecture, **changes)
        loaded = LoadedModel(model, byte_tokenizer, models.describe(model, architecture))
        samples = load_task("niah", byte_tokenizer, n, length, seed=0)
        config = CaptureConfig(task="niah", model=architecture, n=n, length=length, compress_at=compress_at)
        run_capture(config, loaded, samples, path)
        return loaded

    return build


@pytest.fixture(scope="session")
def llama_capture(
    tmp_path_factory: pytest.TempPathFactory, make_capture: Callable[..., LoadedModel]
) -> tuple[Path, LoadedModel]:
    path = tmp_path_factory.mktemp("capture") / "c.h5"
    return path, make_capture(path)
