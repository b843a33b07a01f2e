"""A capture's largest tensor grows with the prompt, not with its square."""

from __future__ import annotations

import capture_toy as toy
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kvtool.capture.runner import CaptureConfig
from kvtool.capture.sample import capture_sample
from kvtool.policies import statistics


class _Largest(TorchDispatchMode):
    """Remember the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, list | tuple) else [result]:
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.untyped_storage().nbytes() // value.element_size())
        return result


@pytest.mark.parametrize("compress_at", ["prompt", "context"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt_neox"])
def test_largest_tensor_grows_linearly(kind, compress_at, monkeypatch):
    monkeypatch.setattr(statistics, "BLOCK_ELEMENTS", 1 << 12)
    loaded = toy.build_loaded(kind, max_positions=4096)
    config = CaptureConfig("toy", kind, 1, compress_at=compress_at, feature_rows=32)
    largest, lengths = [], (300, 600, 1200)
    for length in lengths:
        (sample,) = toy.make_samples(1, n_context=length)
        with _Largest() as mode:
            capture_sample(config, loaded, sample)
        largest.append(mode.elements)
    assert largest[2] < lengths[2] ** 2 / 4  # far below one head's T x T
    assert largest[1] / largest[0] < 2.3
    assert largest[2] / largest[1] < 2.3
