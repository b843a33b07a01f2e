"""Study files: what is wrong is said with file and line before anything is loaded; small scale; the studies that come with kvtool."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvtool.errors import ConfigError, DataError
from kvtool.studies.graph import at_retentions, build_graph, labels
from kvtool.studies.located import parse_yaml
from kvtool.studies.parse import SHIPPED, find_study, parse_study, read_study
from kvtool.studies.reference import read_reference
from kvtool.studies.stages import InferStage, StressStage

GOOD = """\
study: probe
models: [tiny]
tasks: [niah]
lengths: [256]
retentions: [10%, 0.25]
policies:
  Mine: snapkv:window=8
  Baselines: [h2o:window=8, "random:window=8"]
  StreamingLLM: streaming_4_60
stages:
  - capture
  - classify
  - simulate: {draws: 50}
  - infer: {n: 4}
small:
  lengths: [128]
  stages:
    - infer: {repeats: 2}
    - classify: false
"""


def test_a_study_says_what_it_says() -> None:
    study = parse_study(GOOD, "full")
    assert [(c.group, c.label, c.text) for c in study.policies] == [
        ("", "Mine", "snapkv:window=8"),
        ("Baselines", "h2o:window=8", "h2o:window=8"),
        ("Baselines", "random:window=8", "random:window=8"),
        ("", "StreamingLLM", "streaming_4_60"),
    ]
    assert study.retentions == ("10%", "25%")
    infer = study.stage("infer")
    assert infer is not None
    assert infer.parameters == InferStage(n=4)
    assert at_retentions(study, infer, study.policies[0]) == ["snapkv:budget=10%,window=8", "snapkv:budget=25%,window=8"]
    assert at_retentions(study, infer, study.policies[3]) == ["streaming:budget=64,decode=evict"]


def test_small_replaces_values_and_merges_stages() -> None:
    study = parse_study(GOOD, "small")
    assert study.lengths == (128,)
    assert [stage.name for stage in study.stages] == ["capture", "simulate", "infer"]
    assert study.stages[2].parameters == InferStage(n=4, repeats=2)


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("retentions: [10%", "retentoins: [10%", 5, "Did you mean 'retentions'"),
        ("[256]", "[long]", 4, "whole number, found 'long'"),
        ("[256]", "[true]", 4, "whole number, found True"),
        ("0.25]", "250%]", 5, "outside (0, 1]"),
        ("tasks: [niah]", "tasks: [niahh]", 3, "Did you mean 'niah'"),
        ("tasks: [niah]", "tasks: ['niah:dephts=3']", 3, "Did you mean 'depths'"),
        ("tasks: [niah]", "tasks: ['niah:depths=none']", 3, "depths"),
        ("models: [tiny]", "models: {a: {id: tiny, lenghts: [9]}}", 2, "Did you mean 'lengths'"),
        ("models: [tiny]", "models: {a: {id: tiny}}", 2, "needs 'lengths'"),
        ("models: [tiny]", "models: {a: {id: 'shape:lama-3m', lengths: [9]}}", 2, "Did you mean 'llama-3m'"),
        ("snapkv:window=8", "snapvk:window=8", 7, "Did you mean 'snapkv'"),
        ("snapkv:window=8", "snapkv:windw=8", 7, "Did you mean 'window'"),
        ("h2o:window=8", "h2o:window=eight", 8, "not a whole number"),
        ("- simulate: {draws: 50}", "- simulat: {draws: 50}", 13, "Did you mean 'simulate'"),
        ("{draws: 50}", "{drwas: 50}", 13, "Did you mean 'draws'"),
        ("{n: 4}", "{n: four}", 14, "a whole number, found 'four'"),
        ("{n: 4}", "{n: 4, policies: [Baseline]}", 14, "Did you mean 'Baselines'"),
        ("{n: 4}", "{n: 4, lengths: [512]}", 14, "512 in 'lengths' of stage 'infer' is not in the study"),
        ("{n: 4}", "{repeats: 0}", 14, "repeats=0 must be at least 1"),
        ("  - capture\n", "", 11, "'classify' needs a stage 'capture'"),
        ("study: probe", "study: a b", 1, "letters, digits"),
        ("models: [tiny]", "models: ['shape:lama-3m']", 2, "Did you mean 'llama-3m'"),
        ("  - capture\n", "  - capture\n  - capture\n", 12, "given twice"),
        ("tasks: [niah]", "tasks: [niah]\ntasks: [text]", 4, "given twice"),
        ("tasks: [niah]", "tasks: [niah", 4, "expected"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(old: str, new: str, line: int, words: str) -> None:
    assert old in GOOD
    with pytest.raises(ConfigError) as caught:
        parse_study(GOOD.replace(old, new, 1), "full", "my.yaml")
    assert f"my.yaml, line {line}: " in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("compare: {figures: [scroe]}", "Did you mean 'score'"),
        ("compare: {interval: normal}", "Choose"),
        ("search: {sampler: tpe}", "needs a space"),
        ("search: {by: haarm}", "Did you mean 'harm'"),
        ("stress: {max_length: 512, graphs: 1}", "true or false"),
    ],
)
def test_values_of_stages_are_checked(stage: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_study(GOOD.replace("  - infer: {n: 4}", f"  - infer: {{n: 4}}\n  - {stage}"), "full")


def test_models_are_lists_labels_groups_or_have_lengths_of_their_own() -> None:
    text = "models: {Group: [tiny, 'shape:llama-3m'], Mine: tiny, Short: {id: tiny, lengths: [64, 32]}, More: {Last: tiny}}"
    found = parse_study(GOOD.replace("models: [tiny]", text).replace("repeats: 2", "repeats: 2, models: [Mine]"), "full").models
    assert [(c.label, c.group, c.lengths) for c in found] == [
        ("tiny", "Group", None),
        ("shape:llama-3m", "Group", None),
        ("Mine", "", None),
        ("Short", "", (64, 32)),
        ("Last", "More", None),
    ]


def test_wrong_values_under_small_are_found_at_small_scale_only() -> None:
    text = GOOD.replace("repeats: 2", "repeat: 2")
    parse_study(text, "full")
    with pytest.raises(ConfigError, match=r"line 18.*Did you mean 'repeats'"):
        parse_study(text, "small")


def test_policies_without_budget_need_retentions() -> None:
    with pytest.raises(ConfigError, match=r"line 6: .*needs a budget"):
        parse_study(GOOD.replace("retentions: [10%, 0.25]\n", ""), "full")


def test_policies_that_need_heads_need_a_stage_that_finds_them() -> None:
    text = GOOD.replace("  Mine: snapkv", "  Mine: hace")
    parse_study(text, "full")
    with pytest.raises(ConfigError, match=r"line 11: stage 'simulate', policy 'Mine': .*a stage 'classify' would make"):
        parse_study(text, "small")


def test_a_study_without_small_has_no_small_scale() -> None:
    with pytest.raises(ConfigError, match="no 'small' scale"):
        parse_study(GOOD.partition("small:")[0], "small")


def test_several_stages_of_a_kind_need_names() -> None:
    text = GOOD.replace("  - infer: {n: 4}", "  - stress: {max_length: 512}\n  - stress: {name: endless, endless: 100}")
    study = parse_study(text.partition("small:")[0], "full")
    assert [(s.kind, s.name) for s in study.stages[-2:]] == [("stress", "stress"), ("stress", "endless")]
    assert study.stages[-2].parameters == StressStage(max_length=512)


def test_unknown_names_of_studies_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'hace'"):
        find_study("hce")
    with pytest.raises(DataError, match="cannot be read"):
        read_study(tmp_path / "none.yaml", "full")


def test_located_values_keep_their_lines() -> None:
    root = parse_yaml("a: 1\nb:\n  - x\n  - {c: 2.5}\n", "f")
    assert root.plain() == {"a": 1, "b": ["x", {"c": 2.5}]}
    assert [item.line for item in root.value["b"].value] == [3, 4]


@pytest.mark.parametrize("scale", ["small", "full"])
@pytest.mark.parametrize("name", ["hace", "head_windows", "snapkv_compensation", "h2o_streaming"])
def test_the_studies_that_come_with_kvtool(name: str, scale: str) -> None:
    study = read_study(find_study(name), scale)
    nodes = build_graph(study)
    assert len({node.key for node in nodes}) == len(nodes)
    place = {node.key: i for i, node in enumerate(nodes)}
    assert all(place[below.key] < place[node.key] for node in nodes for below in node.inputs.values())
    assert study.reference is not None
    reference, sources = read_reference(study.reference)
    assert reference
    assert sources
    if scale == "full":
        known = {choice.label for named in labels(study).values() for choice in named} | {"full", "no KV cache"}
        assert {item.label for item in reference} <= known


def test_every_study_is_shipped() -> None:
    assert {path.stem for path in SHIPPED.glob("*.yaml")} >= {"hace", "head_windows", "snapkv_compensation", "h2o_streaming"}
    hace = read_study(find_study("hace"), "full")
    assert (len(hace.models), len(hace.lengths), hace.retentions) == (4, 5, ("0.5%", "0.8%", "1%", "2%", "3%", "5%"))
    assert {"HACE", "HACE-LayerOnly", "HACE-HeadOnly", "CAKE", "PyramidKV", "HeadKV", "SnapKV"} <= {
        c.label for c in hace.policies
    }
