"""Names of the studies that kvtool reproduces <-> policies, both ways, and policies in files.

=====================================  ==============================================================================
name                                   policy
=====================================  ==============================================================================
``baseline``                           ``full``
``h2o_SINK_WINDOW_CAPACITY``           ``h2o`` with that sink and window, at most CAPACITY entries at every step
``streaming_SINK_WINDOW``              ``streaming``: SINK first and WINDOW last entries at every step
``A_window_W``                         ``window``: W last entries at every step
``B_streaming_W``                      ``streaming_4_W``: the window does not count the sinks
``G_confC_baseW``                      ``head_windows``: positional 16, mixed 64, gathering 256 where the confidence
                                       reaches C, else W; sink 4
``I_posP_mixM_gG``, ``J_posP_mixM_gG``  ``head_windows`` by kind, whatever the confidence; sink 4. I and J tell the
                                       intention (inverse, small gathering), not the policy
``K_uniformW_aware``                   ``head_windows`` with the window W for all heads; sink 4
``ablation_cC_wW[_bB]_kK_maxpool``     ``snapkv`` with capacity C, window W, kernel K; blocks of B evicted entries
                                       (``fullc``: all) become one plain mean. ``avgpool`` too
=====================================  ==============================================================================
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtool.errors import ConfigError, DataError

if TYPE_CHECKING:
    from kvtool.policies.base import Policy

#: A budget in a policy's values that says: the method's own number of entries.
OWN = "own"
#: Sink entries of the head-window study, and the windows of its group G.
SINK = 4
STUDY_WINDOWS = {"positional": 16, "mixed": 64, "gathering": 256}
SUFFIXES = (".json", ".yaml", ".yml")

PATTERNS: dict[str, str] = {
    "baseline": r"baseline",
    "h2o": r"h2o_(?P<sink>\d+)_(?P<window>\d+)_(?P<capacity>\d+)",
    "streaming": r"streaming_(?P<sink>\d+)_(?P<window>\d+)",
    "A": r"A_window_(?P<window>\d+)",
    "B": r"B_streaming_(?P<window>\d+)",
    "G": r"G_conf(?P<confidence>\d*\.?\d+)_base(?P<base>\d+)",
    "IJ": r"[IJ]_pos(?P<positional>\d+)_mix(?P<mixed>\d+)_g(?P<gathering>\d+)",
    "K": r"K_uniform(?P<base>\d+)_aware",
    "ablation": r"ablation_c(?P<capacity>\d+)_w(?P<window>\d+)(?:_b(?P<block>\d+)|_b?(?P<full>fullc))?"
    r"_k(?P<kernel>\d+)_(?P<pool>max|avg)pool",
}
#: How each of them is written, for messages and listings.
FORMS: dict[str, str] = {
    "baseline": "baseline",
    "h2o": "h2o_SINK_WINDOW_CAPACITY",
    "streaming": "streaming_SINK_WINDOW",
    "A": "A_window_W",
    "B": "B_streaming_W",
    "G": "G_confC_baseW",
    "IJ": "I_posP_mixM_gG or J_posP_mixM_gG",
    "K": "K_uniformW_aware",
    "ablation": "ablation_cC_wW[_bB|_fullc]_kK_maxpool",
}
#: study form -> the method that it is a policy of
METHODS: dict[str, str] = {
    "baseline": "full",
    "h2o": "h2o",
    "streaming": "streaming",
    "A": "window",
    "B": "streaming",
    "G": "head_windows",
    "IJ": "head_windows",
    "K": "head_windows",
    "ablation": "snapkv",
}
_ROLLING = {"decode": "evict"}


def study_values(name: str) -> dict[str, Any] | None:
    """Return the values of the policy that a study calls `name` (as of the JSON form), or None for any other name.

    Raises
    ------
    ConfigError
        The name has a study's form but says something impossible.
    """
    for form, pattern in PATTERNS.items():
        if match := re.fullmatch(pattern, name):
            return _values(form, name, match.groupdict())
    return None


def _values(form: str, name: str, said: dict[str, str | None]) -> dict[str, Any]:
    """Return the values of a policy from what its name says."""
    number = {key: int(value) for key, value in said.items() if value and value.isdigit()}
    if form == "baseline":
        return {"name": "full"}
    if form == "ablation":
        compensated = {"compensate": "mean", "block": "full" if said["full"] else said["block"], "bias": "none"}
        plain = {"name": "snapkv", "budget": _entries(number["capacity"])} | {k: said[k] for k in ("window", "kernel", "pool")}
        return plain | (compensated if compensated["block"] else {})
    if form == "h2o":
        if number["capacity"] < number["sink"] + number["window"]:
            raise ConfigError(
                f"policy {name!r}: a capacity of {number['capacity']} is smaller than sink {number['sink']} + window "
                f"{number['window']}; the form is {FORMS['h2o']}, the capacity counts both"
            )
        return {
            "name": "h2o",
            "budget": _entries(number["capacity"]),
            "sink": said["sink"],
            "window": said["window"],
        } | _ROLLING
    if form == "A":
        return {"name": "window", "budget": _entries(number["window"])} | _ROLLING
    if form in ("streaming", "B"):
        sink = number.get("sink", SINK)
        return {"name": "streaming", "budget": _entries(sink + number["window"]), "sink": sink} | _ROLLING
    if form == "G":
        windows: dict[str, Any] = dict(STUDY_WINDOWS, base=said["base"], confidence=said["confidence"])
    elif form == "K":
        windows = dict.fromkeys((*STUDY_WINDOWS, "base"), said["base"])
    else:
        # Kinds that the study did not have (heads that rest on the first tokens) get the window of mixed heads.
        windows = dict(said, base=said["mixed"])
    return {"name": "head_windows", "budget": OWN, "confidence": 0, "sink": SINK} | windows | _ROLLING


def _entries(number: int) -> str:
    return f"{number}entries"


def study_names(policy: Policy) -> tuple[str, ...]:
    """Return all study names of a policy, the usual one first; a heads file does not matter to a name."""
    values = policy.method.parameters()
    kind, entries = policy.method.name, policy.budget.entries if policy.budget else None
    found: list[str] = []
    if kind == "full":
        found = ["baseline"]
    elif kind == "h2o" and entries:
        found = [f"h2o_{values['sink']}_{values['window']}_{entries}"]
    elif kind == "streaming" and entries:
        window = entries - values["sink"]
        found = [f"streaming_{values['sink']}_{window}"] if window >= 0 else []
        found += [f"B_streaming_{window}"] if values["sink"] == SINK and window >= 0 else []
    elif kind == "window" and entries:
        found = [f"A_window_{entries}"]
    elif kind == "snapkv" and entries:
        found = _ablation_names(policy, entries)
    elif kind == "head_windows":
        found = _window_names(values)
    return tuple(name for name in found if _same(policy, name))


def _ablation_names(policy: Policy, entries: int) -> list[str]:
    values, compensation = policy.method.parameters(), policy.compensation
    block = "" if not compensation.active else "_fullc" if compensation.block == "full" else f"_b{compensation.block}"
    return [f"ablation_c{entries}_w{values['window']}{block}_k{values['kernel']}_{values['pool']}pool"]


def _window_names(values: Mapping[str, Any]) -> list[str]:
    positional, mixed, gathering, base = (values[key] for key in ("positional", "mixed", "gathering", "base"))
    letters = "IJ" if positional > gathering else "JI"
    by_kind = [f"{letter}_pos{positional}_mix{mixed}_g{gathering}" for letter in letters]
    return [f"K_uniform{base}_aware", *by_kind, f"G_conf{values['confidence']:g}_base{base}"]


def _same(policy: Policy, name: str) -> bool:
    """Return True if `name` reads back as `policy`; the heads file is not part of a name."""
    from kvtool.policies.text import policy_from_dict

    try:
        values = study_values(name)
        if values is None:
            return False
        if heads := getattr(policy.method, "heads", ""):
            values["heads"] = heads
        return policy_from_dict(values) == policy
    except ConfigError:
        return False


def study_name(policy: Policy) -> str | None:
    """Return the usual study name of a policy, or None if no study has it."""
    return next(iter(study_names(policy)), None)


def is_policy_file(name: str) -> bool:
    """Return True for what can only be the path of a policy file."""
    return name.endswith(SUFFIXES)


def policy_file_values(path: str) -> dict[str, Any]:
    """Read the values of a policy from a JSON or YAML file.

    Parameters
    ----------
    path : str
        Holds the dict form (``{"name": "snapkv", "budget": "10%"}``), a text (``snapkv:budget=10%``), or SnapKV's settings as its
        code and the compensation study write them: ``window_sizes``, ``max_capacity_prompts``, ``kernel_sizes`` (one number, or
        one per layer, all equal), ``pooling``. A study's file says its block in its name
        (``ablation_c4096_w32_b32_k7_maxpool.json``), or in ``block_sizes`` (``"full"`` for all).

    Raises
    ------
    DataError
        Missing or damaged file.
    ConfigError
        It holds something else, or layers with different settings.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
        value = json.loads(text) if file.suffix == ".json" else _yaml(text)
    except OSError as error:
        raise DataError(f"policy file {path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        line = " ".join(str(error).split())[:160]
        raise DataError(f"policy file {path} is not {file.suffix[1:].upper()} ({line})") from error
    if isinstance(value, str):
        from kvtool.policies.text import text_values

        return text_values(value)
    if isinstance(value, dict) and "window_sizes" in value:
        return _snapkv_values(value, file)
    if isinstance(value, dict) and "name" in value:
        return {str(key): item for key, item in value.items()}
    raise ConfigError(
        f"policy file {path} holds no policy: a name with its parameters ({{name: snapkv, budget: 10%}}), or SnapKV's window_sizes, "
        "max_capacity_prompts, kernel_sizes, pooling are needed"
    )


def _yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _snapkv_values(value: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """SnapKV's settings as its code reads them (``compress_args_path``)."""
    known = {"window_sizes", "max_capacity_prompts", "kernel_sizes", "pooling", "block_sizes"}
    if unknown := sorted(set(value) - known):
        raise ConfigError(f"policy file {file}: {', '.join(unknown)} is not known; there are {', '.join(sorted(known))}")
    for key in ("max_capacity_prompts", "kernel_sizes", "pooling"):
        if key not in value:
            raise ConfigError(f"policy file {file}: {key} is missing beside window_sizes")
    pool = str(value["pooling"])
    if pool not in ("maxpool", "avgpool"):
        raise ConfigError(f"policy file {file}: pooling={pool!r}; choose maxpool or avgpool")
    found = {
        "name": "snapkv",
        "budget": _entries(_number(value, "max_capacity_prompts", file)),
        "window": _number(value, "window_sizes", file),
        "kernel": _number(value, "kernel_sizes", file),
        "pool": pool.removesuffix("pool"),
    }
    named = study_values(file.stem) if re.fullmatch(PATTERNS["ablation"], file.stem) else None
    block: Any = value.get("block_sizes") and (value["block_sizes"] if value["block_sizes"] == "full" else None)
    if "block_sizes" in value:
        block = block or _number(value, "block_sizes", file)
    elif named is not None:
        block = named.get("block")
    if block is not None:
        found |= {"compensate": "mean", "block": str(block), "bias": "none"}
    if named is not None and {k: str(v) for k, v in named.items()} != {k: str(v) for k, v in found.items()}:
        raise ConfigError(f"policy file {file}: its name and its content say different things; rename it or mend the content")
    return found


def _number(value: Mapping[str, Any], key: str, file: Path) -> int:
    """Return one whole number, or the one that all layers share."""
    items = value[key] if isinstance(value[key], list) else [value[key]]
    if not items or any(isinstance(item, bool) or not isinstance(item, int) for item in items):
        raise ConfigError(f"policy file {file}: {key}={value[key]!r}; a whole number, or a list of one per layer, is needed")
    if len(set(items)) > 1:
        raise ConfigError(
            f"policy file {file}: {key} differs between layers ({min(items)} ... {max(items)}); kvtool's snapkv treats all layers alike. "
            "Budgets per layer come from a method such as pyramidkv or cake"
        )
    return int(items[0])
