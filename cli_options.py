"""Options that several commands share, as decorators, and how their values are read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

DEFAULT_RETENTIONS = "2%,5%,10%,20%,50%"


def model_options(command: Command) -> Command:
    """Options that load a model."""
    for option in (
        click.option("--dtype", default="auto", show_default=True, help="auto (as stored), float32, bfloat16 or float16."),
        click.option("--device", default="auto", show_default=True, help="auto (CUDA if there is one), cpu, cuda, cuda:1, ..."),
        click.option("--model", "-m", default="tiny", show_default=True, help="tiny (embedded), a model folder, or a hub id."),
    ):
        command = option(command)
    return command


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


def json_option(command: Command) -> Command:
    """Machine-readable output."""
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")(command)


def out_option(default: str, what: str) -> Callable[[Command], Command]:
    """Where the result goes."""
    kind = click.Path(path_type=Path)
    return click.option("--out", "-o", type=kind, default=default, show_default=True, help=what)


def policy_options(command: Command) -> Command:
    """Which policies at which budgets."""
    heads_help = "Heads file for policies that share by heads and name none: of kvtool classify, HeadKV or DuoAttention."
    for option in (
        click.option("--heads", default="", metavar="FILE", help=heads_help),
        click.option(
            "--retention",
            "-r",
            default=DEFAULT_RETENTIONS,
            show_default=True,
            help="Comma-separated budgets for policies without one: 1%, 0.01 or 64entries.",
        ),
        click.option(
            "--policy",
            "-p",
            "policies",
            multiple=True,
            help="Policy, e.g. snapkv:window=16 or h2o_8_64_512, or its JSON or YAML file; repeat for several. Default: all.",
        ),
    ):
        command = option(command)
    return command


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
