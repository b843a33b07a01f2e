"""A tiny model on disk; the toys and scripts of these tests are importable by name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kvtool.models import LoadedModel

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import shard_toy

    folder = tmp_path_factory.mktemp("model")
    shard_toy.save_model(folder)
    return folder


@pytest.fixture(scope="session")
def loaded(model_folder: Path) -> LoadedModel:
    import shard_toy

    return shard_toy.load(model_folder)
