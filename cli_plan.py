"""The plan commands: budgets that travel."""

from __future__ import annotations

from pathlib import Path

import click

from kvtool.cli_options import emit, json_option, out_option


@click.group()
def plan() -> None:
    """Plans: optimal budgets for every head, measured once, for any total and length."""


@plan.command("export")
@click.argument("capture", type=click.Path(path_type=Path))
@click.option("--scorer", default="snapkv:window=8,kernel=11", show_default=True, help="Method that ranks, without a budget.")
@out_option("plan.json", "File to write.")
@json_option
def export(capture: Path, scorer: str, out: Path, as_json: bool) -> None:
    """Measure each head's harm at each budget on a capture, and write it as a plan.

    \b
    kvtool plan export c.h5 --scorer h2o -o plan.json
    kvtool infer -p optimal:plan=plan.json -p h2o -r 2%,5%
    """
    from kvtool.simulate.plan import export_plan

    made = export_plan(capture, scorer, out)
    facts = {"path": str(out), "scorer": made.scorer, "source": made.source, "layers": list(made.layers)}
    emit(
        as_json,
        facts,
        f"{made.harm.shape[1]} layers x {made.harm.shape[2]} KV heads under {made.scorer}, from {made.source['prompts']} prompts of "
        f"{made.source['task']}\n{out}",
    )


@plan.command("check")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--length", default=4096, show_default=True, help="Prompt length to show budgets for.")
@click.option("--retention", "-r", default="5%", show_default=True, help="Budget to show.")
@json_option
def check(file: Path, length: int, retention: str, as_json: bool) -> None:
    """Read a plan and show the budgets it gives.

    \b
    kvtool plan check plan.json --length 8192 -r 2%
    """
    from kvtool.policies import Budget, parse_policy
    from kvtool.policies.planfile import read_plan
    from kvtool.textgrid import grid

    found = read_plan(str(file))
    policy = parse_policy(f"optimal:plan={file},budget={Budget.parse(retention)}")
    budgets = found.budgets(policy.entries(length), length, policy.minimum(length))
    rows = [[str(layer), *map(str, row)] for layer, row in zip(found.layers, budgets.tolist(), strict=True)]
    header = ["layer", *(f"head {h}" for h in range(budgets.shape[1]))]
    title = f"{found.model['model_id']}, {found.scorer}: entries per KV head at {retention} of {length} tokens"
    facts = {"scorer": found.scorer, "model": found.model, "source": found.source, "budgets": budgets.tolist()}
    emit(as_json, facts, f"{title}\n{grid(header, rows)}")
