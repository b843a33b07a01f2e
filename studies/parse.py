"""A study file -> `Study`. Whatever can be wrong is said here, with file and line, before anything is loaded."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from kvtool.errors import ConfigError, DataError, near_matches
from kvtool.studies.content import n_points
from kvtool.studies.directions import read_direction
from kvtool.studies.located import Located, build, check_keys, convert, merge, parse_yaml, read_yaml
from kvtool.studies.schema import SCALES, Choice, Stage, Study, Subset, all_lengths
from kvtool.studies.stages import KINDS, ON_CAPTURE, ON_INFER, WITH_POLICIES

Item = TypeVar("Item")

KEYS = (
    *("study", "about", "models", "tasks", "lengths", "compress_at", "retentions", "policies", "n", "seed", "stages"),
    *("reference", "directions", "small"),
)
#: A name becomes a part of folder names.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
#: What a stage needs to be there too.
NEEDS = {"classify": "capture", "simulate": "capture", "refine": "simulate", "hiv": "capture"} | {
    **dict.fromkeys(ON_CAPTURE, "capture"),
    **dict.fromkeys(ON_INFER, "infer"),
}
SHIPPED = Path(__file__).parent.parent / "experiments"


def find_study(name: str) -> Path:
    """Return the path of a study: a file, or the name of one that comes with kvtool.

    Raises
    ------
    ConfigError
        Neither.
    """
    path = Path(name)
    if path.exists() or path.suffix in (".yaml", ".yml"):
        return path
    known = {file.stem: file for file in sorted(SHIPPED.glob("*.yaml"))}
    if name in known:
        return known[name]
    raise ConfigError(
        f"no study {name!r}.{near_matches(name, known)} Give a YAML file, or one of: {', '.join(known) or 'none'}"
    )


def read_study(path: Path, scale: str) -> Study:
    """Read a study at a scale.

    Parameters
    ----------
    path : Path
    scale : str
        ``"full"``, or ``"small"``: with the values under ``small:`` in the place of the others.

    Raises
    ------
    ConfigError
        Whatever is wrong in it, with the line.
    DataError
        Missing file.
    """
    return _study(read_yaml(path), scale, path.parent)


def parse_study(text: str, scale: str, file: str = "study") -> Study:
    """Read a study from text; see `read_study`."""
    return _study(parse_yaml(text, file), scale, Path(file).parent)


def _study(root: Located, scale: str, folder: Path) -> Study:
    if scale not in SCALES:
        raise ConfigError(f"scale {scale!r}: choose {' or '.join(SCALES)}")
    values = dict(check_keys(root, KEYS, "the study"))
    small = values.pop("small", None)
    if small is not None:
        check_keys(small, [key for key in KEYS if key not in ("study", "small")], "'small'")
    elif scale == "small":
        raise root.error("the study has no 'small' scale; add small: with the values that differ, or take --scale full")
    for key in ("study", "models", "stages"):
        if key not in values:
            raise root.error(f"the study needs {key!r}")
    stages = values["stages"]
    if scale == "small" and small is not None:
        values = merge(dataclasses.replace(root, value=values), small).value
    more = small.value.get("stages") if scale == "small" and small is not None else None
    retentions = _retentions(values.get("retentions"), "'retentions'")
    study = Study(
        name=_name(values["study"], "'study'"),
        about=values["about"].text("'about'") if "about" in values else "",
        scale=scale,
        models=_models(values["models"]),
        tasks=_listed(values.get("tasks"), _task),
        lengths=_listed(values.get("lengths"), _length),
        compress_at=_listed(values.get("compress_at"), _mode) or ("prompt",),
        retentions=retentions,
        policies=_choices(values["policies"], "'policies'", lambda x: _policy(x, retentions)) if "policies" in values else (),
        n=_whole(values, "n", 32, 1),
        seed=_whole(values, "seed", 0, 0),
        stages=(),
        reference=_reference(values.get("reference"), folder),
    )
    _refuse_twice(values.get("policies", root), "'policies'", [choice.label for choice in study.policies])
    _refuse_twice(values["models"], "'models'", [choice.label for choice in study.models])
    found = tuple(_stage(*item, study) for item in _stage_items(stages, more).values())
    study = dataclasses.replace(study, stages=tuple(sorted(found, key=lambda stage: list(KINDS).index(stage.kind))))
    _check_whole(study, stages)
    _check_heads(study, stages)
    directions = tuple(read_direction(item, study) for item in _items(values.get("directions")))
    return dataclasses.replace(study, directions=directions)


def _items(found: Located | None) -> list[Located]:
    return [] if found is None else found.items()


def _listed(found: Located | None, read: Callable[[Located], Item]) -> tuple[Item, ...]:
    return tuple(dict.fromkeys(read(item) for item in _items(found)))


def _refuse_twice(where: Located, what: str, labels: Sequence[str]) -> None:
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise where.error(f"{what} holds {twice[0]!r} twice; labels must differ")


def _name(found: Located, what: str) -> str:
    text = found.text(what)
    if not NAME.fullmatch(text):
        raise found.error(f"{what} is {text!r}; letters, digits and _.+- are allowed, as it becomes a part of file names")
    return text


def _whole(values: dict[str, Located], key: str, default: int, low: int) -> int:
    if key not in values:
        return default
    number: int = convert(values[key], int, repr(key))
    if number < low:
        raise values[key].error(f"{key!r} is {number}; it must be at least {low}")
    return number


def _length(found: Located) -> int:
    number: int = convert(found, int, "an item of 'lengths'")
    if number < 2:
        raise found.error(f"length {number}: at least 2 tokens are needed")
    return number


def _mode(found: Located) -> str:
    mode = found.text("an item of 'compress_at'")
    if mode not in ("prompt", "context"):
        raise found.error(f"compress_at {mode!r}: choose prompt or context")
    return mode


def _task(found: Located) -> str:
    from kvtool.data.tasks import TASKS

    spec = found.text("an item of 'tasks'")
    name, known = spec.partition(":")[0], [*TASKS, "file"]
    if name not in known:
        raise found.error(f"unknown task {name!r}.{near_matches(name, known)} Known: {', '.join(known)}")
    try:
        if name in TASKS:
            TASKS[name].read_options(name, spec.partition(":")[2])
            n_points(spec)
    except (ConfigError, DataError) as error:
        raise found.error(str(error)) from error
    return spec


def _retentions(found: Located | None, what: str) -> tuple[str, ...]:
    from kvtool.policies import Budget

    def read(item: Located) -> str:
        try:
            return str(Budget.parse(item.text(f"an item of {what}")))
        except ConfigError as error:
            raise error if str(error).startswith(item.file) else item.error(str(error)) from error

    return _listed(found, read)


def _choices(found: Located, what: str, check: Callable[[Located], str]) -> tuple[Choice, ...]:
    """Read ``[text, ...]``, ``{label: text}``, ``{group: [text, ...]}`` and ``{group: {label: text}}``.

    An item of a list may be ``label: text`` too.
    """
    chosen = []
    if isinstance(found.value, dict):
        for name, item in found.value.items():
            if isinstance(item.value, list):
                chosen += [_choice(one, what, check, name) for one in item.value]
            elif isinstance(item.value, dict):
                chosen += [Choice(label, check(one), name) for label, one in item.value.items()]
            else:
                chosen.append(Choice(name, check(item)))
    else:
        chosen = [_choice(item, what, check) for item in found.items()]
    if not chosen:
        raise found.error(f"{what} is empty")
    return tuple(chosen)


def _choice(item: Located, what: str, check: Callable[[Located], str], group: str = "") -> Choice:
    if isinstance(item.value, dict) and len(item.value) == 1:
        label, value = next(iter(item.value.items()))
        return Choice(label, check(value), group)
    return Choice(item.text(f"an item of {what}"), check(item), group)


def _models(found: Located) -> tuple[Choice, ...]:
    """Read models as policies are read; a mapping with ``id`` is one model with lengths of its own."""
    if not (isinstance(found.value, dict) and found.value):
        return _choices(found, "'models'", _model)
    chosen: list[Choice] = []
    for label, item in found.value.items():
        own = isinstance(item.value, dict) and "id" in item.value
        one = dataclasses.replace(found, value={label: item})
        chosen += [_own_model(label, item)] if own else _choices(one, "'models'", _model)
    return tuple(chosen)


def _own_model(label: str, found: Located) -> Choice:
    values = check_keys(found, ("id", "lengths"), f"model {label!r}")
    if not (lengths := _listed(values.get("lengths"), _length)):
        raise found.error(f"model {label!r} needs 'lengths'; without lengths of its own give it as {label}: ID")
    return Choice(label, _model(values["id"]), lengths=lengths)


def _model(found: Located) -> str:
    from kvtool.shapes import is_shape, parse_shape

    name = found.text("a model")
    try:
        return parse_shape(name).text if is_shape(name) else name
    except ConfigError as error:
        raise found.error(str(error)) from error


def _policy(found: Located, retentions: tuple[str, ...]) -> str:
    """Check a policy's text at every retention, and return it."""
    text = found.text("a policy")
    try:
        expand(text, retentions)
    except (ConfigError, DataError) as error:
        raise found.error(str(error)) from error
    return text


@lru_cache(maxsize=4096)
def expand(text: str, retentions: tuple[str, ...]) -> tuple[str, ...]:
    """Return a policy's text forms, one per retention, or one where it brings its own budget or there are no retentions.

    Raises
    ------
    ConfigError
        Not a policy, or one without a budget and no retentions.
    """
    from kvtool.policies.registry import method_class
    from kvtool.policies.text import policy_from_dict, text_values

    values = text_values(text)
    cls = method_class(str(values["name"]))
    if "budget" in values or cls.keeps_all or not retentions:
        return (str(policy_from_dict(values)),)
    return tuple(str(policy_from_dict({**values, "budget": budget})) for budget in retentions)


def _stage_items(stages: Located, more: Located | None) -> dict[str, tuple[str, str, Located]]:
    """Read the list of stages, and what the small scale changes of it: name -> kind, name, values."""
    found: dict[str, tuple[str, str, Located]] = {}
    for small, source in ((False, stages), (True, more)):
        for item in _items(source):
            kind, values = _one_stage(item)
            if values.value is False:
                if not small or kind not in found:
                    raise item.error(f"stage {kind!r}: false leaves out, under 'small', a stage that the study has")
                del found[kind]
                continue
            values = dataclasses.replace(values, value={}) if values.value is None else values
            rest = dict(values.mapping(f"stage {kind!r}"))
            name = _name(rest.pop("name"), "'name' of a stage") if "name" in rest else kind
            if name in found and not small:
                raise item.error(f"stage {name!r} is given twice; give one of them another name: ...")
            if name in found:
                kind, _, below = found[name]
                found[name] = kind, name, merge(below, dataclasses.replace(values, value=rest))
            else:
                found[name] = kind, name, dataclasses.replace(values, value=rest)
    if not found:
        raise stages.error(f"'stages' is empty; there are {', '.join(KINDS)}")
    return found


def _one_stage(item: Located) -> tuple[str, Located]:
    if isinstance(item.value, str):
        return item.value, dataclasses.replace(item, value=None)
    if isinstance(item.value, dict) and len(item.value) == 1:
        return next(iter(item.value.items()))
    raise item.error(f"a stage is its name, or its name with parameters (infer: {{n: 8}}), found {item.shown}")


def _stage(kind: str, name: str, values: Located, study: Study) -> Stage:
    if kind not in KINDS:
        raise values.error(f"unknown stage {kind!r}.{near_matches(kind, KINDS)} Known: {', '.join(KINDS)}")
    cls, what = KINDS[kind], f"stage {name!r}"
    of_grid = [f.name for f in dataclasses.fields(Subset)]
    own = [f.name for f in dataclasses.fields(cls)]
    check_keys(values, [*own, *of_grid], what)
    mine = {key: item for key, item in values.value.items() if key in own}
    parameters: Any = build(cls, dataclasses.replace(values, value=mine), what)
    subset = _subset({key: item for key, item in values.value.items() if key not in own}, study, what)
    return Stage(kind, name, parameters, subset)


def _subset(values: dict[str, Located], study: Study, what: str) -> Subset:
    groups = {choice.group for choice in study.policies if choice.group}
    known: dict[str, Sequence[Any]] = {
        "tasks": study.tasks,
        "lengths": all_lengths(study),
        "compress_at": study.compress_at,
        "models": [choice.label for choice in study.models],
    }
    retentions = _retentions(values.get("retentions"), f"'retentions' of {what}") if "retentions" in values else None
    chosen: dict[str, Any] = {"retentions": retentions}
    for key, there in known.items():
        if key in values:
            chosen[key] = _listed(values[key], lambda item, there=there, key=key: _known(item, there, f"{key!r} of {what}"))  # type: ignore[misc]
    if "policies" in values:
        labels = [*groups, *(choice.label for choice in study.policies)]
        chosen["policies"] = _listed(
            values["policies"], lambda item: _label_or_policy(item, labels, retentions or study.retentions)
        )
    return Subset(**chosen)


def _known(item: Located, there: Sequence[Any], what: str) -> Any:
    if item.value not in there:
        raise item.error(
            f"{item.value!r} in {what} is not in the study.{near_matches(str(item.value), map(str, there))} "
            f"There are {', '.join(map(str, there)) or 'none'}"
        )
    return item.value


def _label_or_policy(item: Located, labels: Sequence[str], retentions: tuple[str, ...]) -> str:
    text = item.text("a policy")
    if text in labels:
        return text
    try:
        return _policy(item, retentions)
    except ConfigError as error:
        near = near_matches(text, labels)
        raise (item.error(f"{text!r} is no label or group of the study.{near}") if near else error) from error


def _check_whole(study: Study, stages: Located) -> None:
    """Refuse stages that lack what they work on."""
    lengths = study.lengths or all(model.lengths for model in study.models)
    for stage in study.stages:
        needed = NEEDS.get(stage.kind)
        if needed and study.stage(needed) is None:
            raise stages.error(f"stage {stage.name!r} needs a stage {needed!r}")
        if stage.kind in ("capture", "infer") and not (study.tasks and lengths):
            raise stages.error(f"stage {stage.name!r} needs 'tasks' and 'lengths'")
        if stage.kind == "perplexity" and not lengths:
            raise stages.error(f"stage {stage.name!r} needs 'lengths'")
        if stage.kind in WITH_POLICIES and not study.policies:
            raise stages.error(f"stage {stage.name!r} needs 'policies'")
        if stage.kind == "consistency" and not any(getattr(s.parameters, "generate", False) for s in study.stages):
            raise stages.error(f"stage {stage.name!r} compares texts, which 'infer' with generate: false does not make")
        if getattr(stage.parameters, "take", "") == "shortlist" and study.stage("simulate") is None:
            raise stages.error(f"stage {stage.name!r} takes the shortlist, which a stage 'simulate' makes")


def _check_heads(study: Study, stages: Located) -> None:
    """Refuse policies that need a heads file, where no stage makes one."""
    from kvtool.policies import parse_policy
    from kvtool.studies.graph import at_retentions, chosen

    if study.stage("classify") is not None:
        return
    for stage in study.stages:
        for choice in chosen(study, stage) if stage.kind in WITH_POLICIES else ():
            try:
                parse_policy(at_retentions(study, stage, choice)[0]).method.parts().allocator.check_files()
            except (ConfigError, DataError) as error:
                text = f"stage {stage.name!r}, policy {choice.label!r}: {error}; a stage 'classify' would make that file"
                raise stages.error(text) from error


def _reference(found: Located | None, folder: Path) -> str | None:
    if found is None:
        return None
    path = folder / found.text("'reference'")
    if not path.is_file():
        raise found.error(f"'reference': {path} does not exist; it is looked for beside the study")
    return str(path)
