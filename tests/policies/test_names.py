"""Names of the studies and files of policies: read, printed back, refused in one line."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtool.errors import ConfigError, KvtoolError
from kvtool.policies import Policy, expand_policies, method_classes, policy_from_dict, policy_to_dict
from kvtool.policies.names import FORMS, METHODS, PATTERNS, study_name, study_names
from kvtool.policies.text import OPTIONS

#: name -> the policy as it is written out, by hand
NAMES = {
    "baseline": "full",
    "h2o_8_64_512": "h2o:budget=512,window=64,sink=8,decode=evict",
    "h2o_4_32_256": "h2o:budget=256,sink=4,decode=evict",
    "streaming_8_256": "streaming:budget=264,sink=8,decode=evict",
    "A_window_512": "window:budget=512,decode=evict",
    "B_streaming_64": "streaming:budget=68,decode=evict",
    "G_conf0.7_base64": "head_windows:budget=own,decode=evict",
    "G_conf0.55_base128": "head_windows:budget=own,base=128,confidence=0.55,decode=evict",
    "I_pos256_mix128_g128": (
        "head_windows:budget=own,positional=256,mixed=128,gathering=128,base=128,confidence=0.0,decode=evict"
    ),
    "I_pos512_mix64_g128": "head_windows:budget=own,positional=512,gathering=128,confidence=0.0,decode=evict",
    "J_pos64_mix64_g128": "head_windows:budget=own,positional=64,gathering=128,confidence=0.0,decode=evict",
    "K_uniform64_aware": "head_windows:budget=own,positional=64,gathering=64,confidence=0.0,decode=evict",
    "ablation_c4096_w32_b32_k7_maxpool": "snapkv:budget=4096,compensate=mean,block=32,bias=none",
    "ablation_c4096_w64_fullc_k7_maxpool": "snapkv:budget=4096,window=64,compensate=mean,block=full,bias=none",
    "ablation_c2048_w32_k7_maxpool": "snapkv:budget=2048",
    "ablation_c512_w16_k5_avgpool": "snapkv:budget=512,window=16,kernel=5,pool=avg",
}


@pytest.mark.parametrize(("name", "written"), NAMES.items())
def test_names_are_policies_and_print_back(name: str, written: str) -> None:
    policy = Policy.parse(name)
    assert str(policy) == written
    assert Policy.parse(written) == policy
    assert policy_from_dict(policy_to_dict(policy)) == policy
    assert name in study_names(policy)
    usual = study_name(policy)
    assert usual is not None
    assert Policy.parse(usual) == policy
    # Names carry their own budget: the grid's budgets do not multiply them.
    if "head_windows" not in written or "K_" in name:
        assert expand_policies([name], ["10%", "20%"]) == [policy]


def test_every_form_is_tried_and_belongs_to_a_method() -> None:
    assert PATTERNS.keys() == FORMS.keys() == METHODS.keys()
    assert set(METHODS.values()) <= set(method_classes())
    for pattern in PATTERNS.values():
        assert any(re.fullmatch(pattern, name) for name in NAMES), pattern


@settings(deadline=None)
@given(sink=st.integers(0, 300), window=st.integers(0, 3000), heavy=st.integers(0, 5000), base=st.integers(1, 600))
def test_any_numbers_round_trip(sink: int, window: int, heavy: int, base: int) -> None:
    names = [f"h2o_{sink}_{window}_{sink + window + heavy}", f"streaming_{sink}_{window}", f"A_window_{window}"]
    names += [f"B_streaming_{window}", f"G_conf0.{base}_base{base}", f"J_pos{base}_mix{window + 1}_g{sink + 1}"]
    names += [f"ablation_c{sink + window + 1}_w{window + 1}_b{base}_k{2 * base + 1}_avgpool"]
    for name in names:
        if re.match(r"(h2o_0_0_0|streaming_0_0|A_window_0)$", name):
            with pytest.raises(ConfigError, match="at least 1 is needed"):
                Policy.parse(name)
        else:
            found = study_names(Policy.parse(name))
            assert re.sub(r"(conf0\.\d*?)0+_", r"\1_", name) in found or name in found, found


def test_what_no_study_has_has_no_name() -> None:
    for text in (
        "snapkv:budget=10%",
        "snapkv:budget=512,sink=4",
        "snapkv:budget=512,compensate=mean",
        "h2o:budget=512",
        "h2o:budget=512,decode=evict,interval=8",
        "streaming:budget=264,sink=8",
        "streaming:budget=3,sink=8,decode=evict",
        "head_windows:budget=10%",
        "head_windows:budget=own,sink=8,decode=evict",
        "tova:budget=64",
    ):
        assert study_names(Policy.parse(text)) == (), text


def test_a_heads_file_does_not_matter_to_the_name() -> None:
    policy = Policy.parse("G_conf0.7_base64:heads=some/heads.json")
    assert policy.method.parameters()["heads"] == "some/heads.json"
    assert study_name(policy) == "G_conf0.7_base64"
    assert Policy.parse(str(policy)) == policy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h2o_8_64_50", "capacity of 50 is smaller than sink 8"),
        ("h2o_8_64_512:sink=4", "already says sink=8; write h2o:... to choose freely"),
        ("h2o_8_64_512:budget=10%", "already says budget=512entries"),
        ("G_conf1.5_base64", "confidence=1.5 must be in 0 ... 1"),
        ("ablation_c4096_w32_b0_k7_maxpool", "block='0'"),
        ("ablation_c4096_w32_b32_k6_maxpool", "kernel=6 is even"),
        ("A_window_0", "at least 1 is needed"),
        ("h2o_8_64", "unknown policy 'h2o_8_64'"),
        ("snapkv:budget=own", "needs a budget"),
        ("full:budget=10%", "takes no budget"),
    ],
)
def test_impossible_names_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        Policy.parse(text)


def test_options_may_follow_a_name() -> None:
    assert str(Policy.parse("h2o_8_64_512:interval=16")) == "h2o:budget=512,window=64,sink=8,decode=evict,interval=16"
    # To say the same again is no contradiction.
    assert Policy.parse("h2o_8_64_512:sink=8") == Policy.parse("h2o_8_64_512")


SETTINGS = {"window_sizes": 32, "max_capacity_prompts": 4096, "kernel_sizes": 7, "pooling": "maxpool"}


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("suffix", ["json", "yaml"])
@pytest.mark.parametrize(
    ("stem", "more", "written"),
    [
        ("snap", {}, "snapkv:budget=4096"),
        ("ablation_c4096_w32_b32_k7_maxpool", {}, "snapkv:budget=4096,compensate=mean,block=32,bias=none"),
        ("ablation_c4096_w32_fullc_k7_maxpool", {}, "snapkv:budget=4096,compensate=mean,block=full,bias=none"),
        ("any", {"block_sizes": 128}, "snapkv:budget=4096,compensate=mean,block=128,bias=none"),
        (
            "any",
            {"block_sizes": "full", "pooling": "avgpool"},
            "snapkv:budget=4096,pool=avg,compensate=mean,block=full,bias=none",
        ),
    ],
)
def test_settings_files_of_snapkv(stem: str, more: dict, written: str, suffix: str, per_layer: bool, tmp_path: Path) -> None:
    value = {**SETTINGS, **more}
    if per_layer:
        value = {k: [v] * 32 if isinstance(v, int) else v for k, v in value.items()}
    path = tmp_path / f"{stem}.{suffix}"
    path.write_text(json.dumps(value))
    assert str(Policy.parse(str(path))) == written
    assert [str(p) for p in expand_policies([str(path)], ["10%"])] == [written]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_capacity_prompts": [4096, 2048]}, "max_capacity_prompts differs between layers (2048 ... 4096)"),
        ({"window_sizes": "32"}, "window_sizes='32'; a whole number"),
        ({"window_sizes": []}, "window_sizes=[]; a whole number"),
        ({"kernel_sizes": 7.5}, "kernel_sizes=7.5; a whole number"),
        ({"kernel_sizes": None, "x": 1}, "x is not known"),
        ({"pooling": "max"}, "pooling='max'; choose maxpool or avgpool"),
        ({"window_sizes": 16}, "its name and its content say different things"),
        ({"block_sizes": 64}, "its name and its content say different things"),
    ],
)
def test_wrong_settings_are_one_clear_line(change: dict, message: str, tmp_path: Path) -> None:
    path = tmp_path / "ablation_c4096_w32_b32_k7_maxpool.json"
    path.write_text(json.dumps({**SETTINGS, **change}))
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        Policy.parse(str(path))
    assert "\n" not in str(caught.value)
    missing = {key: value for key, value in SETTINGS.items() if key != "pooling"}
    path.write_text(json.dumps(missing))
    with pytest.raises(ConfigError, match="pooling is missing"):
        Policy.parse(str(path))


def test_policy_files(tmp_path: Path) -> None:
    policy = Policy.parse("snapkv:budget=12.5%,window=16,compensate=mean,block=32")
    (tmp_path / "p.json").write_text(json.dumps(policy_to_dict(policy)))
    (tmp_path / "p.yaml").write_text("name: snapkv\nwindow: 16\n")
    (tmp_path / "t.yml").write_text("h2o_8_64_512\n")
    assert Policy.parse(str(tmp_path / "p.json")) == policy
    # Without a budget of its own a file is taken at each; the command line has the last word.
    found = expand_policies([str(tmp_path / "p.yaml"), f"{tmp_path / 'p.json'}:window=8"], ["10%", "20%"])
    assert [str(p) for p in found[:2]] == ["snapkv:budget=10%,window=16", "snapkv:budget=20%,window=16"]
    assert str(found[2]) == "snapkv:budget=12.5%,window=8,compensate=mean,block=32"
    assert Policy.parse(str(tmp_path / "t.yml")) == Policy.parse("h2o_8_64_512")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "holds no policy"),
        ('{"window": 3}', "holds no policy"),
        ('{"name": "snapk"}', "Did you mean"),
    ],
)
def test_damaged_policy_files(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(KvtoolError, match=message) as caught:
        Policy.parse(str(tmp_path / "p.json"))
    assert "\n" not in str(caught.value)
    with pytest.raises(KvtoolError, match="cannot be read"):
        Policy.parse(str(tmp_path / "none.yaml"))
    (tmp_path / "p.yaml").write_text("a: [")
    with pytest.raises(KvtoolError, match="is not YAML"):
        Policy.parse(str(tmp_path / "p.yaml"))


def test_no_parameter_of_a_method_is_called_as_an_option_of_every_policy() -> None:
    options = {f.name for owner in OPTIONS for f in dataclasses.fields(owner)} | {"name", "budget"}
    for name, cls in method_classes().items():
        # `name` is the class's own word, not a field.
        assert not options & {f.name for f in dataclasses.fields(cls)}, name
