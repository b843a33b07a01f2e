"""Options that several commands share, as decorators, and how their values are read."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from kvtool.executors.execution import Execution
    from kvtool.models import LoadedModel

Command = TypeVar("Command", bound=Callable[..., Any])

DEFAULT_RETENTIONS = "2%,5%,10%,20%,50%"


_DEVICE_MAP = "kvtool.device_map"


def _note_device_map(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    """Keep the value for `load_named`: commands hand model, device and dtype on, and nothing else of how a model is loaded."""
    ctx.meta[_DEVICE_MAP] = value


def named_device_map() -> str | None:
    """Return the value of --device-map."""
    value: str | None = click.get_current_context().meta.get(_DEVICE_MAP)
    return value


def load_named(model: str, device: str, dtype: str) -> LoadedModel:
    """Load the model that the options name, and say so."""
    from kvtool.models import load_model, set_threads
    from kvtool.progress import say

    say(f"loading {model}")
    loaded = load_model(model, device, dtype, named_device_map())
    set_threads(loaded)
    if loaded.info.weights:
        say(
            f"weights are {loaded.info.weights}, tokenizer {loaded.info.tokenizer}: times and bytes are real, scores mean nothing"
        )
    return loaded


def place_options(command: Command) -> Command:
    """Options that say where and how a model is loaded."""
    for option in (
        click.option("--dtype", default="auto", show_default=True, help="auto (as stored), float32, bfloat16 or float16."),
        click.option("--device", default="auto", show_default=True, help="auto (CUDA if there is one), cpu, cuda, cuda:1, ..."),
        click.option(
            "--device-map",
            default=None,
            expose_value=False,
            callback=_note_device_map,
            help="Spread a model over several GPUs, as accelerate does: auto, balanced, balanced_low_0 or sequential.",
        ),
    ):
        command = option(command)
    return command


def model_options(command: Command) -> Command:
    """Options that load a model."""
    return click.option(
        "--model",
        "-m",
        default="tiny",
        show_default=True,
        help="tiny (embedded), a model folder, a hub id, or shape:NAME (random weights; see: kvtool shapes).",
    )(place_options(command))


def sample_options(command: Command) -> Command:
    """Options that choose the prompts."""
    for option in (
        click.option(
            "--template", default=None, help="For file: tasks, text with {context} and {question}; default: verbatim."
        ),
        click.option("--seed", default=0, show_default=True, help="Seed of the prompts."),
        click.option(
            "--length", default=1024, show_default=True, help="Prompt length in tokens, for tasks that build prompts."
        ),
        click.option("--n", "-n", default=16, show_default=True, help="Number of prompts."),
        click.option("--task", "-t", default="niah", show_default=True, help="Task; see: kvtool tasks."),
    ):
        command = option(command)
    return command


def compress_option(command: Command) -> Command:
    """Whether a policy may see the question."""
    kinds = click.Choice(["prompt", "context"])
    text = "What a policy sees before it compresses: prompt (context and question) or context (query-agnostic)."
    return click.option("--compress-at", type=kinds, default="prompt", show_default=True, help=text)(command)


def execution_options(command: Command) -> Command:
    """Where the work is done; the command gets one `Execution` for all of them."""

    @functools.wraps(command)
    def run(**options: Any) -> Any:
        names = ("executor", "shard", "ray_address", "ray_resources", "ray_workers", "ray_tries")
        asked = {name: options.pop(name) for name in names}
        execution = _execution(asked, options["device"], options.pop("retry_failed", False))
        if execution.ray:
            # The driver needs the model's facts and its tokenizer; its GPUs are for the workers.
            options["device"], click.get_current_context().meta[_DEVICE_MAP] = "cpu", None
        return command(**options, execution=execution)

    shard_help = "Do share I of N, counted from 0, e.g. 0/4; run the others elsewhere or later, over the same output."
    for option in (
        click.option("--ray-tries", type=int, help="So often may a sample's worker die before it is given up; default: 3."),
        click.option("--ray-workers", type=int, help="Most workers; default: as many as the cluster has room for."),
        click.option("--ray-resources", help="Of one worker, e.g. gpu=1,cpu=4; default: cpu=1, and gpu=1 for CUDA."),
        click.option("--ray-address", help="Ray cluster, host:port; default: RAY_ADDRESS, or this machine."),
        click.option("--shard", metavar="I/N", help=shard_help),
        click.option(
            "--executor",
            type=click.Choice(["local", "ray"]),
            default="local",
            show_default=True,
            help="ray: on the workers of a Ray cluster (pip install 'kvtool[ray]'). Runs continue with any executor.",
        ),
    ):
        run = option(run)
    return run  # type: ignore[return-value]


def _execution(asked: dict[str, Any], device: str, retry_failed: bool) -> Execution:
    from kvtool.executors.execution import Execution, RayOptions, Shard

    shard = Shard.parse(asked["shard"]) if asked["shard"] else None
    for_ray = {name: value for name, value in asked.items() if name.startswith("ray_") and value is not None}
    if asked["executor"] != "ray":
        if for_ray:
            raise click.UsageError(f"--{next(iter(for_ray)).replace('_', '-')} needs --executor ray")
        return Execution(shard, None, device, retry_failed=retry_failed)
    from kvtool.executors.ray_pool import import_ray

    import_ray()  # a missing package is better said before the model is loaded
    options = RayOptions.parse(**{name.removeprefix("ray_"): value for name, value in for_ray.items()})
    return Execution(shard, options, device, click.get_current_context().meta.get(_DEVICE_MAP), retry_failed)


def bootstrap_options(draws: int) -> Callable[[Command], Command]:
    """Add ``--draws`` and ``--seed`` of intervals over prompts."""

    def add(command: Command) -> Command:
        command = click.option("--seed", default=0, show_default=True, help="Seed of the bootstrap.")(command)
        return click.option("--draws", default=draws, show_default=True, help="Bootstrap draws over prompts.")(command)

    return add


def json_option(command: Command) -> Command:
    """Machine-readable output."""
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")(command)


def out_option(default: str, what: str) -> Callable[[Command], Command]:
    """Where the result goes."""
    kind = click.Path(path_type=Path)
    return click.option("--out", "-o", type=kind, default=default, show_default=True, help=what)


def policies_of(retentions: str, otherwise: str) -> Callable[[Command], Command]:
    """Which policies at which budgets: the budgets by default, and what is done where no policy is named."""
    heads_help = "Heads file for policies that share by heads and name none: of kvtool classify, HeadKV or DuoAttention."

    def decorate(command: Command) -> Command:
        for option in (
            click.option("--heads", default="", metavar="FILE", help=heads_help),
            click.option(
                "--retention",
                "-r",
                default=retentions,
                show_default=True,
                help="Comma-separated budgets for policies without one: 1%, 0.01 or 64entries.",
            ),
            click.option(
                "--policy",
                "-p",
                "policies",
                multiple=True,
                help=f"Policy, e.g. snapkv:window=16 or h2o_8_64_512, or its JSON or YAML file; repeat for several. {otherwise}",
            ),
        ):
            command = option(command)
        return command

    return decorate


policy_options = policies_of(DEFAULT_RETENTIONS, "Default: all.")


def read_budgets(text: str) -> list[str]:
    """Read the value of ``--retention``."""
    from kvtool.policies import Budget

    budgets = [str(Budget.parse(item)) for item in text.split(",") if item.strip()]
    if not budgets:
        raise click.UsageError("--retention is empty; give budgets such as 2%,10%")
    return budgets


def whole_numbers(option: str, text: str) -> list[int]:
    """Read comma-separated whole numbers of an option."""
    try:
        return [int(item) for item in text.split(",")]
    except ValueError as error:
        raise click.UsageError(f"{option} {text!r}: whole numbers separated by commas are needed") from error


def plain(value: Any) -> Any:
    """Turn results into JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def emit(as_json: bool, value: Any, text: str) -> None:
    """Print a result, as JSON or as text."""
    click.echo(json.dumps(plain(value), indent=2, ensure_ascii=False) if as_json else text)
