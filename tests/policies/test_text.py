from __future__ import annotations

import pytest

from kvtool.errors import ConfigError
from kvtool.policies import method_key, parse_policy, policy_from_dict


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("snapk:budget=3%", "Did you mean 'snapkv'"),
        ("snapkv:budgt=3%", "Did you mean 'budget'"),
        ("snapkv:kernal=3,budget=3%", "Did you mean 'kernel'"),
        ("snapkv:budget=10%,kernel=4", "kernel=4 is even"),
        ("snapkv:budget=10%,window=0", "window=0 must be at least 1"),
        ("snapkv:budget=10%,pool=median", "choose one of max, avg, none"),
        ("snapkv:budget=10%,window=wide", "not a whole number"),
        ("snapkv:budget=10%,window", "not key=value"),
        ("snapkv:budget=10%,window=3,window=4", "given twice"),
        ("snapkv", "needs a budget"),
        ("full:budget=10%", "takes no budget"),
        ("", "unknown policy ''"),
        ("streaming:budget=5%,sink=-1", "sink=-1 must be at least 0"),
    ],
)
def test_bad_text_gives_one_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_policy(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_defaults_are_left_out_of_the_text() -> None:
    assert str(parse_policy("snapkv: window=32, budget=1024 ,kernel=5")) == "snapkv:budget=1024,kernel=5"


def test_method_key_has_no_budget() -> None:
    assert method_key(parse_policy("snapkv:budget=1024,kernel=5")) == "snapkv:kernel=5"
    assert method_key(parse_policy("full")) == "full"


def test_dict_form_takes_numbers_and_text() -> None:
    assert policy_from_dict({"name": "h2o", "budget": 0.05, "window": 8}) == parse_policy("h2o:budget=5%,window=8")
