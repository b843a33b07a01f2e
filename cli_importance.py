"""The command that puts the importances of heads side by side; part of ``kvtool analyze``."""

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


@click.command("importance")
@click.argument("capture", type=click.Path(path_type=Path))
@click.option(
    "--ablate", is_flag=True, help="Also cut the cache of every head in turn and feed the answer again (needs the model)."
)
@policies_of("5%,20%", "Measures again on the prompt as each leaves it. Default: none.")
@click.option("--sink", default=4, show_default=True, help="First entries of the prompt that a cut head keeps.")
@click.option("--window", default=32, show_default=True, help="Last entries of the prompt that a cut head keeps.")
@click.option(
    "--write",
    "written",
    nargs=2,
    multiple=True,
    metavar="MEASURE FILE",
    help="Write a heads file with this importance, for headkv and hace; repeatable.",
)
@bootstrap_options(1000)
@model_options
@out_option("importance", "Folder to write; the same command continues an interrupted run.")
@json_option
def importance(
    capture: Path,
    ablate: bool,
    policies: tuple[str, ...],
    retention: str,
    heads: str,
    sink: int,
    window: int,
    written: tuple[tuple[str, str], ...],
    draws: int,
    seed: int,
    model: str,
    device: str,
    dtype: str,
    out: Path,
    as_json: bool,
) -> None:
    """Which heads matter, by four measures: attention, HeadKV's score, gain, ablation; and after compression (HIV).

    \b
    kvtool analyze importance c.h5 -o imp
    kvtool analyze importance c.h5 --ablate -p snapkv -p h2o -r 5%,20% -o imp
    kvtool analyze importance c.h5 --ablate --write ablation heads.json -o imp
    """
    from kvtool.analysis.importance_report import write_importance
    from kvtool.classify.importance import CAPTURED, check_measures, measure_captured, write_heads
    from kvtool.policies import expand_policies
    from kvtool.simulate.importance import ABLATION, COMPRESSED, RECORDS, CutConfig, run_ablation, run_compressed

    # What is wrong is said before a model is loaded.
    check_measures([measure for measure, _ in written], ablate)
    budgets = read_budgets(retention)
    if policies:
        expand_policies(policies, budgets, heads=heads)
    cut = CutConfig(str(capture), sink, window)
    facts = measure_captured(capture, out, sink, window)
    loaded = load_named(model, device, dtype) if ablate or policies else None
    sources, compressed = [out / CAPTURED], None
    if loaded and ablate:
        run_ablation(cut, loaded, out)
        sources.append(out / ABLATION / RECORDS)
    if loaded and policies:
        run_compressed(cut, loaded, out, policies, budgets, heads, ablate)
        compressed = out / COMPRESSED / RECORDS
    summary = write_importance(out, sources, compressed, facts, draws, seed)
    lines = [summary.text()]
    for measure, file in written:
        negative = write_heads(capture, out / "importance.json", measure, Path(file))
        lines.append(f"{file}: importance is {measure}" + (f"; {negative} negative ones are set to 0" if negative else ""))
    found = json.loads((out / "importance.json").read_text(encoding="utf-8"))
    emit(as_json, {**found, "written": {file: measure for measure, file in written}}, "\n".join(lines))
