"""The head-importance-variance test; part of ``kvtool analyze``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from kvtool.cli_options import (
    bootstrap_options,
    emit,
    json_option,
    load_named,
    model_options,
    out_option,
    policies_of,
    read_budgets,
)


@click.command("hiv")
@click.argument("captures", nargs=-1, required=True, type=click.Path(path_type=Path))
@policies_of("2%,5%,20%", "Default: snapkv and h2o.")
@click.option(
    "--ablate", is_flag=True, help="Also cut every KV head under every policy: the importance that does not rest on gradients."
)
@click.option("--sink", default=4, show_default=True, help="First entries of a prompt, attention to which does not count.")
@click.option("--window", default=32, show_default=True, help="Last entries of a prompt, attention to which does not count.")
@bootstrap_options(1000)
@model_options
@out_option("hiv", "Folder to write; the same command continues an interrupted run.")
@json_option
def hiv(
    captures: tuple[Path, ...],
    policies: tuple[str, ...],
    retention: str,
    heads: str,
    ablate: bool,
    sink: int,
    window: int,
    draws: int,
    seed: int,
    model: str,
    device: str,
    dtype: str,
    out: Path,
    as_json: bool,
) -> None:
    """Head importance before and after compression, for real: variance, ranks, Head Specialization Score.

    Every prompt's answer is fed again over what a policy left, forward and backward. Several CAPTURES of one model, one per kind of
    prompts, are also compared with each other: do the kinds favour other heads, and still so after compression?

    \b
    kvtool analyze hiv c.h5 -p snapkv:window=8 -p h2o -r 2%,5%,20% -o hiv
    kvtool analyze hiv needles.h5 text.h5 -p snapkv -r 5% -o hiv
    """
    from kvtool.analysis.hiv_report import write_hiv
    from kvtool.policies import expand_policies
    from kvtool.simulate.importance import COMPRESSED, RECORDS, CutConfig, run_compressed

    chosen, budgets = policies or ("snapkv", "h2o"), read_budgets(retention)
    names = [path.stem for path in captures]
    if twice := [name for name in names if names.count(name) > 1]:
        raise click.UsageError(
            f"{names.count(twice[0])} captures are called {twice[0]}; their names tell the kinds of prompts apart"
        )
    # What is wrong is said before a model is loaded.
    expand_policies(chosen, budgets, heads=heads)
    cuts = {name: CutConfig(str(path), sink, window) for name, path in zip(names, captures, strict=True)}
    for path in captures:
        if not path.exists():
            raise click.UsageError(f"capture {path} does not exist; make one with kvtool capture")
    loaded = load_named(model, device, dtype)
    for name, cut in cuts.items():
        run_compressed(cut, loaded, out / name, chosen, budgets, heads, ablate)
    summary = write_hiv(out, {name: out / name / COMPRESSED / RECORDS for name in names}, (sink, window), draws, seed)
    emit(as_json, json.loads((out / "hiv.json").read_text(encoding="utf-8")), summary.text())
