"""Text, dict and YAML forms of a policy; parameters are checked against their declared type and range."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

from kvtool.errors import ConfigError, DataError, near_matches
from kvtool.policies.base import Method, Policy
from kvtool.policies.budget import Budget
from kvtool.policies.compensation import Compensation
from kvtool.policies.headfile import with_heads
from kvtool.policies.names import OWN, is_policy_file, policy_file_values, study_values
from kvtool.policies.quant import Quant
from kvtool.policies.registry import method_class, method_classes
from kvtool.policies.when import When
from kvtool.progress import say

#: Options that every method takes beside its own parameters, in the order of the text form.
OPTIONS: tuple[type[Compensation] | type[When] | type[Quant], ...] = (Compensation, When, Quant)

#: Those that a method takes which keeps every entry.
OF_ALL = (Quant,)


def parse_policy(text: str) -> Policy:
    """Read ``name`` or ``name:key=value,...``; ``budget`` is one of the keys.

    The name is a registered method, a study's name such as ``h2o_8_64_512``, or the path of a policy's JSON or YAML file; see
    `kvtool.policies.names`.
    """
    return policy_from_dict(text_values(text))


def text_values(text: str) -> dict[str, Any]:
    """Return the dict form of a text form; a study's name and a file bring their values."""
    name, _, rest = text.strip().partition(":")
    values: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in rest.split(","))):
        key, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"policy {text!r}: {item!r} is not key=value")
        if key.strip() in values:
            raise ConfigError(f"policy {text!r}: {key.strip()!r} is given twice")
        values[key.strip()] = value.strip()
    name = name.strip()
    if is_policy_file(name):
        # The command line has the last word.
        return {**policy_file_values(name), **values}
    named = study_values(name)
    if named is None:
        return {"name": name, **values}
    if said := [key for key in values if key in named and values[key] != str(named[key])]:
        raise ConfigError(
            f"policy {text!r}: the name {name!r} already says {', '.join(f'{k}={named[k]}' for k in said)}; "
            f"write {named['name']}:... to choose freely"
        )
    return {**named, **values}


def format_policy(policy: Policy) -> str:
    """Return the shortest text that `parse_policy` reads back: budget, then the parameters that differ from the default."""
    return _format_policy(policy, [f"budget={budget}" for budget in _budget(policy)])


def _budget(policy: Policy) -> list[str]:
    """Return the budget's text, if the policy has one; a method's own number of entries is said too."""
    own = [OWN] if policy.method.implies_budget else []
    return own if policy.budget is None else [str(policy.budget)]


def _format_policy(policy: Policy, items: list[str]) -> str:
    for part in (policy.method, policy.compensation, policy.when, policy.quant):
        items = items + [f"{k}={_format(v)}" for k, v in _changed(part).items()]
    return policy.method.name + (":" + ",".join(items) if items else "")


def policy_from_dict(values: Mapping[str, Any]) -> Policy:
    """Build a policy from ``{"name": ..., "budget": ..., parameter: value}`` (the YAML and JSON form).

    Raises
    ------
    ConfigError
        Unknown name or key (with near matches), wrong type, or a value out of range.
    """
    rest = dict(values)
    cls = method_class(str(rest.pop("name", "")))
    budget = rest.pop("budget", None)
    budget = None if budget == OWN else budget
    owners = {f.name: owner for owner in (*OPTIONS, cls) for f in dataclasses.fields(owner)}
    arguments: dict[type, dict[str, Any]] = {owner: {} for owner in (*OPTIONS, cls)}
    for key, value in rest.items():
        if key not in owners:
            names = [*([] if cls.keeps_all else ["budget"]), *(f.name for f in dataclasses.fields(cls))]
            fit = OF_ALL if cls.keeps_all else OPTIONS
            options = [name for name, owner in owners.items() if owner in fit and name not in names]
            known = ", ".join(names) or "none"
            more = f"; options{'' if cls.keeps_all else ' of every policy'}: {', '.join(options)}"
            raise ConfigError(
                f"policy {cls.name!r} has no parameter {key!r}.{near_matches(key, [*names, *options])} Known: {known}{more}"
            )
        owner = owners[key]
        arguments[owner][key] = _convert(cls.name, key, value, get_type_hints(owner)[key])
    try:
        compensation, when = Compensation(**arguments[Compensation]), When(**arguments[When])
        quant = Quant(**arguments[Quant])
    except ConfigError as error:
        raise ConfigError(f"policy {cls.name!r}: {error}") from error
    return Policy(cls(**arguments[cls]), None if budget is None else Budget.parse(str(budget)), compensation, when, quant)


def policy_to_dict(policy: Policy) -> dict[str, Any]:
    """Return the dict form: every parameter of the method spelled out, and the options that differ from the default."""
    budget = dict.fromkeys(("budget",), text[0]) if (text := _budget(policy)) else {}
    options = {**_changed(policy.compensation), **_changed(policy.when), **_changed(policy.quant)}
    return {"name": policy.method.name, **budget, **policy.method.parameters(), **options}


def method_key(policy: Policy) -> str:
    """Return the text form without the budget: the same method at another budget has the same key."""
    return _format_policy(policy, [])


def _changed(part: Method | Compensation | When | Quant) -> dict[str, Any]:
    values = {f.name: (getattr(part, f.name), f.default) for f in dataclasses.fields(part)}
    return {name: value for name, (value, default) in values.items() if value != default}


def _format(value: Any) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value)


def _convert(name: str, key: str, value: Any, hint: Any) -> Any:
    """Convert a text or JSON value to the declared type of a parameter."""
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        if value not in choices:
            raise ConfigError(f"policy {name!r}: {key}={value!r}; choose one of {', '.join(map(str, choices))}")
        return value
    if hint is bool:
        text = str(value).lower()
        if text not in ("true", "false"):
            raise ConfigError(f"policy {name!r}: {key}={value!r} is not true or false")
        return text == "true"
    try:
        return hint(str(value))
    except ValueError as error:
        raise ConfigError(
            f"policy {name!r}: {key}={value!r} is not {'a whole number' if hint is int else 'a number'}"
        ) from error


def check_range(name: str, key: str, value: float, low: float, high: float = float("inf")) -> None:
    """Raise ConfigError unless ``low <= value <= high``; used by the methods' ``__post_init__``."""
    if not low <= value <= high:
        limit = f"at least {low:g}" if high == float("inf") else f"in {low:g} ... {high:g}"
        raise ConfigError(f"policy {name!r}: {key}={value} must be {limit}")


def check_kernel(name: str, kernel: int) -> None:
    """Raise ConfigError unless a pooling kernel is odd; used by the methods' ``__post_init__``."""
    check_range(name, "kernel", kernel, 1)
    if kernel % 2 == 0:
        raise ConfigError(f"policy {name!r}: kernel={kernel} is even; an odd kernel keeps scores aligned with positions")


def expand_policies(texts: Sequence[str], budgets: Sequence[str], *, real: bool = False, heads: str = "") -> list[Policy]:
    """Read policies; those without a budget are taken at each of `budgets`. Without texts: every registered method.

    Parameters
    ----------
    texts : sequence of str
        Text forms, with or without a budget; names of studies and files of policies bring theirs. ``budget=own`` asks for a
        method's own number of entries.
    budgets : sequence of str
        Text forms of budgets.
    real : bool
        For real inference: methods that can only be simulated are refused, or left out of the default.
    heads : str
        Heads file for the policies that take one and name none. Without texts, methods that cannot do without are left out, and
        it is said.

    Returns
    -------
    list of Policy
        Without repetitions, in order.

    Raises
    ------
    ConfigError
        A text that cannot be read, or a policy that cannot run for real or lacks its heads file.
    DataError
        A file that cannot be read or does not hold what a policy needs.
    """
    names = [name for name, cls in method_classes().items() if not (real and cls.simulate_only)]
    policies: dict[Policy, None] = {}
    for text in texts or names:
        values = text_values(text)
        fixed = "budget" in values or method_class(str(values["name"])).keeps_all
        for each in [values] if fixed else [{**values, "budget": budget} for budget in budgets]:
            policies[with_heads(policy_from_dict(each), heads)] = None
    for policy in policies if real else ():
        if policy.method.simulate_only:
            raise ConfigError(f"policy {policy}: {policy.method.name!r} looks into the future; only kvtool simulate can run it")
    return _with_files(list(policies), refuse=bool(texts))


def _with_files(policies: list[Policy], *, refuse: bool) -> list[Policy]:
    """Refuse policies without the files they need, or leave them out and say so."""
    lacking: dict[str, list[str]] = {}
    able = []
    for policy in policies:
        try:
            policy.method.parts().allocator.check_files()
        except (ConfigError, DataError) as error:
            if refuse:
                raise type(error)(f"policy {policy}: {error}") from error
            names = lacking.setdefault(str(error), [])
            names += [policy.method.name] if policy.method.name not in names else []
        else:
            able.append(policy)
    for reason, names in lacking.items():
        say(f"policies: without {', '.join(names)}: {reason}")
    return able
