"""Search spaces in one line of text: ``snapkv:window=8..64,kernel={1,3,5,7},pool={max,avg}``; what a capture lacks is left out.

A value is fixed (``sink=4``), one of a list (``{max,avg}``), or in a range: ``0..3``, ``1..15 step 2``, ``log(1..1000)``. Ranges
are whole or real numbers, as the parameter is. ``budget=2%..20%`` makes the budget a part of the search.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from kvtool.errors import ConfigError, DataError, near_matches
from kvtool.policies import Policy, policy_from_dict
from kvtool.policies.base import Method
from kvtool.policies.compensation import USES, Compensation
from kvtool.policies.registry import method_class, method_classes
from kvtool.policies.when import When
from kvtool.simulate.domains import GRAMMAR, Domain, Value, domain_of, read_domain, value_text

#: name -> space; what the published methods leave to the user
SPACES = {
    "hace": "hace:layer_power=0..3,head_power=0..3,floor=0..0.9,window=1..1024,gamma=log(1..1000),kernel=1..21 step 2,"
    "scorer={cake,snapkv}",
    "hace-layer": "hace-layer:layer_power=0..3,floor=0..0.9,window=1..1024,gamma=log(1..1000),kernel=1..21 step 2,"
    "scorer={cake,snapkv}",
    "snapkv": "snapkv:window=1..1024,kernel=1..31 step 2,pool={max,avg},group={mean,max}",
    "pyramidkv": "pyramidkv:beta=log(1..40),window=1..1024,kernel=1..31 step 2,pool={max,avg}",
    "adakv": "adakv:floor=0..1,window=1..1024,kernel=1..31 step 2,pool={max,avg},normalize={false,true}",
    "cake": "cake:gamma=log(1..2000),tau1=log(0.2..5),tau2=log(0.2..5),window=1..1024,kernel=1..21 step 2,pool={max,avg}",
    "headkv": "headkv:beta=log(1.01..4),temperature=0.25..4,window=1..1024,kernel=1..31 step 2,pool={max,avg}",
    "lava": "lava:floor=0..1,window=1..1024,kernel=1..31 step 2",
    "compensation": "snapkv:window=1..1024,kernel=1..31 step 2,compensate={none,mean,weighted},block={16,32,64,128,256,full},"
    "bias={auto,none}",
}
#: The question of the SnapKV study: which window, kernel and compensation block for this model?
AUTO = "snapkv:window=1..1024,kernel={1,5,7,11,15,21},pool={max,avg},compensate={none,mean},block={32,64,128,256,full}"

OF_COMPENSATION = frozenset(f.name for f in dataclasses.fields(Compensation))
OF_WHEN = frozenset(f.name for f in dataclasses.fields(When))
#: Longest whole range whose values are looked at one by one.
MOST_VALUES = 4096


@dataclass(frozen=True, slots=True)
class Space:
    """A method and the domains of its parameters.

    Attributes
    ----------
    method : str
    domains : dict of str to Domain
        In the order of the text; ``budget`` (in percent) may be one of them.
    notes : tuple of str
        What was left out of the text's domains, and why.
    """

    method: str
    domains: dict[str, Domain]
    notes: tuple[str, ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        return self.method + ":" + ",".join(f"{k}={_shown(k, d)}" for k, d in self.domains.items())

    @property
    def searched(self) -> dict[str, Domain]:
        """The domains with more than one value."""
        return {k: d for k, d in self.domains.items() if not d.fixed}

    @property
    def n_points(self) -> int | None:
        """How many settings there are; None if infinitely many."""
        n = 1
        for domain in self.domains.values():
            if domain.points is None:
                return None
            n *= len(domain.points)
        return n

    def grid(self) -> Iterator[dict[str, Value]]:
        """Yield all settings; only where `n_points` is not None."""
        names = list(self.domains)
        for values in itertools.product(*(domain.points or () for domain in self.domains.values())):
            yield dict(zip(names, values, strict=True))

    def default(self) -> dict[str, Value]:
        """Return the method's own values, each moved to the nearest one of its domain."""
        own = _defaults(self.method)
        return {k: d.nearest(own[k]) if k in own else d.nearest(_middle(d)) for k, d in self.domains.items()}

    def policy(self, params: Mapping[str, Value], budget: str) -> Policy:
        """Return the policy of a setting; options that its compensation has no use for are left out.

        Parameters
        ----------
        params : mapping
            Values by name; a ``budget`` among them (in percent) counts before `budget`.
        budget : str

        Raises
        ------
        ConfigError
            The values do not fit together.
        """
        text = f"{params['budget']:g}%" if "budget" in params else budget
        return policy_from_dict({"name": self.method, "budget": text, **_useful(params)})


def parse_space(text: str) -> Space:
    """Read a space: the name of one in `SPACES`, its text, or the path of a YAML or JSON file with ``method:`` and a domain a key.

    Raises
    ------
    ConfigError
        Unknown name, parameter or form, with near matches; a value that the method refuses.
    DataError
        A file that cannot be read.
    """
    text = text.strip()
    if Path(text).suffix in (".yaml", ".yml", ".json"):
        method, domains = _read_file(Path(text))
    elif ":" in text:
        method, _, rest = text.partition(":")
        domains = _split(text, rest)
    elif text in SPACES:
        return parse_space(SPACES[text])
    else:
        raise ConfigError(_unknown_space(text))
    method = method.strip()
    cls = method_class(method)
    if cls.simulate_only or cls.keeps_all:
        raise ConfigError(f"space {text!r}: {method!r} {'cannot run for real' if cls.simulate_only else 'keeps everything'}")
    hints = _hints(method)
    names = [f.name for owner in (cls, Compensation, When) for f in dataclasses.fields(owner)]
    for key in domains:
        if key == "budget" and "%" not in domains[key]:
            raise ConfigError(f"space {text!r}: budget={domains[key]}: a searched budget is in percent, e.g. budget=2%..20%")
        if key not in (*names, "budget"):
            known = ", ".join(["budget", *names])
            raise ConfigError(f"space {text!r}: {method!r} has no parameter {key!r}.{near_matches(key, names)} Known: {known}")
    parsed = {k: read_domain(text, k, v, float if k == "budget" else hints[k]) for k, v in domains.items()}
    space = Space(method, parsed)
    if not space.searched:
        raise ConfigError(f"space {text!r} holds nothing to search; {GRAMMAR}")
    return narrowed(space, _valid(space), "other values are not allowed ({why})", strict=True)


def _unknown_space(text: str) -> str:
    if text in method_classes():
        return f"no ready-made space for {text!r}; write one, e.g. '{text}:window=8..64,...'. Ready: {', '.join(SPACES)}"
    return f"unknown space {text!r}.{near_matches(text, SPACES)} Ready: {', '.join(SPACES)}; or write METHOD:key=domain,..."


def _read_file(path: Path) -> tuple[str, dict[str, str]]:
    import yaml

    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
        method = str(value.pop("method"))
        return method, {
            k: "{" + ",".join(map(value_text, v)) + "}" if isinstance(v, list) else value_text(v) for k, v in value.items()
        }
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, KeyError) as error:
        line = " ".join(str(error).split())
        raise DataError(f"space {path} cannot be read ({line}); it needs method: NAME and one line per parameter") from error


def _split(text: str, rest: str) -> dict[str, str]:
    """Split at the commas outside of braces."""
    found: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in re.split(r",(?![^{]*\})", rest))):
        key, equals, value = (s.strip() for s in item.partition("="))
        if not equals or not value:
            raise ConfigError(f"space {text!r}: {item!r} is not key=domain; {GRAMMAR}")
        if key in found:
            raise ConfigError(f"space {text!r}: {key!r} is given twice")
        found[key] = value
    return found


def _shown(key: str, domain: Domain) -> str:
    return re.sub(r"(\d)(?=[,}.)]|$)(?!\.\d)", r"\1%", str(domain)) if key == "budget" else str(domain)


def _middle(domain: Domain) -> Value:
    return domain.values[0] if domain.values else (domain.low + domain.high) / 2


def _defaults(method: str) -> dict[str, Any]:
    return {f.name: f.default for owner in (method_class(method), Compensation, When) for f in dataclasses.fields(owner)}


def narrowed(space: Space, check: Callable[[str, Value], str | None], note: str, *, strict: bool = False) -> Space:
    """Leave out the values of finite domains for which `check` names a reason; `note` (with why) says so.

    Raises
    ------
    ConfigError
        Nothing is left of a domain, or an end of an infinite one (`strict`: any value of a list) is refused.
    """
    domains, notes = {}, list(space.notes)
    for key, domain in space.domains.items():
        points = domain.points
        looked = points if points is not None and len(points) <= MOST_VALUES else (domain.low, domain.high)
        reasons = {value: why for value in looked if (why := check(key, value)) is not None}
        if reasons and (looked is not points or len(reasons) == len(looked) or (strict and domain.values)):
            raise ConfigError(f"space {space.method}: {key}={domain}: {next(iter(reasons.values()))}")
        domains[key] = domain
        if reasons:
            left = tuple(value for value in looked if value not in reasons)
            domains[key] = domain_of(left, domain)
            why = note.format(why=next(iter(reasons.values())))
            notes.append(f"{key}={_shown(key, domain)} is searched at {_shown(key, domains[key])}: {why}")
    return Space(space.method, domains, tuple(notes))


def _valid(space: Space) -> Callable[[str, Value], str | None]:
    """Return a check of single values: does the method take it, with any of the compensations that are searched?"""
    kinds = space.domains["compensate"].points if "compensate" in space.domains else None
    default = space.default()

    def check(key: str, value: Value) -> str | None:
        why = None
        for kind in (kinds if key in OF_COMPENSATION and key != "compensate" else None) or (None,):
            try:
                _parts(space, {**default, key: value, **({} if kind is None else {"compensate": kind})})
            except ConfigError as error:
                why = str(error)
            else:
                return None
        return why

    return check


def with_statistics(space: Space, has: Callable[[str], bool]) -> Space:
    """Leave out the values that need a statistic which is not there.

    Parameters
    ----------
    space : Space
    has : callable
        Whether a statistic of that name is there.

    Raises
    ------
    ConfigError
        Nothing is left of a domain.
    """
    default = space.default()

    def lacks(key: str, value: Value) -> set[str]:
        return {name for name in _needs(space, {**default, key: value}) if not has(name)}

    # What all values of a key lack is not that key's doing.
    always = {
        key: set.intersection(*(lacks(key, value) for value in points))
        for key, domain in space.domains.items()
        if (points := domain.points) is not None and len(points) <= MOST_VALUES
    }

    def check(key: str, value: Value) -> str | None:
        found = sorted(lacks(key, value) - always[key]) if key in always else []
        return f"the capture holds no {found[0]}" if found else None

    return narrowed(space, check, "{why} and the like; more windows: kvtool capture --windows")


def _parts(space: Space, params: Mapping[str, Any]) -> tuple[Method, Compensation]:
    """Return the method and the compensation of a setting, checked by their own rules; a thousand values are looked at like this.

    Raises
    ------
    ConfigError
        A value is refused.
    """
    values, hints = _useful(params), _hints(space.method)
    for key, value in values.items():
        if get_origin(hints[key]) is Literal and value not in get_args(hints[key]):
            raise ConfigError(f"{key}={value}: choose one of {', '.join(map(str, get_args(hints[key])))}")
    own = {k: v for k, v in values.items() if k not in OF_COMPENSATION and k not in OF_WHEN}
    shared: dict[str, Any] = {k: v for k, v in values.items() if k in OF_COMPENSATION}
    return method_class(space.method)(**own), Compensation(**shared)


def _useful(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values without the budget and without options that the compensation has no use for."""
    kind = params.get("compensate")
    useless = {name for name, kinds in USES.items() if kind is not None and kind not in kinds}
    return {k: v for k, v in params.items() if k not in useless and k != "budget"}


@lru_cache
def _hints(method: str) -> dict[str, Any]:
    """Return the types of all parameters; resolving them takes longer than making a policy."""
    return {name: hint for owner in (Compensation, When, method_class(method)) for name, hint in get_type_hints(owner).items()}


def _needs(space: Space, params: Mapping[str, Any]) -> set[str]:
    try:
        method, compensation = _parts(space, params)
    except ConfigError:
        return set()
    return {*method.parts().needs(), *compensation.needs()}


def searches_budget(text: str) -> bool:
    """Return True if a space's text holds the budget."""
    return bool(text) and "budget" in parse_space(text).domains
