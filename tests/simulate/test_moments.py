"""Simulate and the moments of eviction: predicted as what is kept of the prompt; chunks are a row that says why not."""

from __future__ import annotations

from pathlib import Path

from kvtool.capture.reader import open_capture
from kvtool.models import LoadedModel
from kvtool.policies import Policy
from kvtool.simulate.evaluate import evaluate_sample


def test_decoding_is_predicted_as_the_kept_set_and_chunks_are_not(llama_capture: tuple[Path, LoadedModel]) -> None:
    texts = ["h2o:budget=40,window=8", "h2o:budget=40,window=8,decode=evict,interval=4", "h2o:budget=40,window=8,chunk=64"]
    with open_capture(llama_capture[0]) as capture:
        sample = capture.samples[0]
        plain, evicting, chunked = evaluate_sample(sample, [Policy.parse(text) for text in texts])
    assert plain.harm is not None
    assert (evicting.harm, evicting.recall, evicting.entries) == (plain.harm, plain.recall, plain.entries)
    assert plain.note is None
    assert "while decoding" in str(evicting.note)
    assert chunked.harm is None
    assert "remove chunk=" in str(chunked.message)
