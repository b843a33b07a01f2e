"""Estimates: pieces of work are counted, more work takes longer, and a device that is not here can be given."""

from __future__ import annotations

import pytest
import torch

from kvtool.infer.bandwidth import probe_bytes
from kvtool.studies.estimate import FACTORS, PROCESS_BYTES, Rates, estimate, n_units
from kvtool.studies.graph import Node, build_graph
from kvtool.studies.parse import parse_study
from kvtool.studies.stages import KINDS

STUDY = """\
study: probe
models: {embedded: tiny}
tasks: [niah]
lengths: [512]
retentions: [10%, 20%]
policies: [snapkv, random, "h2o:budget=64"]
n: 4
stages:
  - capture
  - simulate
  - gaps
  - search: {trials: 20}
  - compensation: {policies: [snapkv], blocks: ["16", "32"]}
  - infer: {n: 5}
  - cliffs: {points: 2}
  - compare
  - no_cache: {length: 64, max_length: 256, repeats: 2}
"""
CPU = Rates("cpu", 20e9, 10e9)
#: Bytes of the tensor that the bandwidth of this machine is measured with; those below were taken with 256 MB.
PROBE = probe_bytes(torch.device("cpu"))


def graph(text: str = STUDY) -> dict[str, Node]:
    return {node.stage.kind: node for node in build_graph(parse_study(text, "full"))}


def test_every_kind_of_stage_has_a_factor() -> None:
    assert set(FACTORS) == set(KINDS)


def test_units_are_counted() -> None:
    nodes = graph()
    # 5 prompts x (2 + 2 + 1 policies and the full cache); 2 curves x 2 points on the 5 prompts; 3 lengths x 2 runs.
    assert {kind: n_units(nodes[kind]) for kind in ("infer", "cliffs", "no_cache", "gaps")} == {
        "infer": 30,
        "cliffs": 20,
        "no_cache": 6,
        "gaps": 5,
    }


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [
        ("search", "trials: 20", "trials: 200"),
        ("compensation", '["16", "32"]', '["16", "32", "64", full]'),
        ("compensation", '["16", "32"]', '["16", "32"], refine: true'),
        ("cliffs", "points: 2", "points: 4"),
        ("compare", "[snapkv, random,", "[snapkv, random, cake, tova,"),
        ("no_cache", "max_length: 256", "max_length: 1024"),
        ("infer", "lengths: [512]", "lengths: [2048]"),
        ("gaps", "lengths: [512]", "lengths: [2048]"),
    ],
)
def test_more_work_takes_longer(kind: str, old: str, new: str) -> None:
    less, more = (estimate(graph(text)[kind], CPU, FACTORS).seconds for text in (STUDY, STUDY.replace(old, new)))
    assert less is not None
    assert more is not None
    assert more > less > 0


def test_memory_is_at_least_what_was_measured() -> None:
    # Peaks of the resident set on the embedded model, kvtool run of this repository, prompts of 1024 tokens (docs/studies.md).
    text = STUDY.replace("lengths: [512]", "lengths: [1024]").replace(
        "length: 64, max_length: 256", "length: 1024, max_length: 2048"
    )
    nodes = graph(text.replace("- no_cache", "- stress: {length: 1024, max_length: 2048}\n  - no_cache"))
    measured = {
        "infer": 0.68e9,
        "cliffs": 0.66e9,
        "search": 0.60e9,
        "compensation": 0.61e9,
        "no_cache": 0.70e9,
        "stress": 1.13e9,
    }
    for kind, peak in measured.items():
        found = estimate(nodes[kind], CPU, FACTORS).bytes_
        assert found is not None
        assert peak <= found + (0 if kind != "stress" else max(0, 2 * ((256 << 20) - PROBE)))
        assert found <= 2 * peak + 2 * max(0, PROBE - (256 << 20))


def test_a_process_on_a_cpu_takes_memory_of_its_own() -> None:
    node = graph()["infer"]
    here, there = (estimate(node, Rates(name, 1e12, 1e11), FACTORS).bytes_ for name in ("cpu", "cuda"))
    assert here is not None
    assert there is not None
    assert here > PROCESS_BYTES > there > 0
