"""The command that runs a study: a YAML file of stages, as one resumable graph."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvtool.cli_options import emit, execution_options, json_option, named_device_map, place_options

if TYPE_CHECKING:
    from kvtool.executors.execution import Execution
    from kvtool.studies.schema import Study

#: Where results go by default: one folder per study and scale.
RUNS = Path("kvtool-runs")


@click.command()
@click.argument("study", required=False)
@click.option(
    "--scale",
    type=click.Choice(["small", "full"]),
    default="full",
    show_default=True,
    help="small: with the values under 'small:' of the study, which the embedded model ends in minutes.",
)
@click.option("--dry-run", is_flag=True, help="List the nodes with estimated time and memory; run nothing.")
@click.option(
    "--assume",
    metavar="GFLOPS,GBPS",
    help="With --dry-run: estimate for a GPU that is not here, by its GFLOP/s and GB/s, such as 60000,1000; default: measure.",
)
@click.option("--status", "shows_status", is_flag=True, help="Say what is done and what is not; run nothing.")
@place_options
@click.option("--retry-failed", is_flag=True, help="Try units again that an earlier run on Ray gave up.")
@execution_options
@click.option("--out", "-o", type=click.Path(path_type=Path), help="Output folder.  [default: kvtool-runs/STUDY-SCALE]")
@json_option
def run(
    study: str | None,
    scale: str,
    dry_run: bool,
    assume: str | None,
    shows_status: bool,
    device: str,
    dtype: str,
    execution: Execution,
    out: Path | None,
    as_json: bool,
) -> None:
    """Run a study: a YAML file, or the name of one that comes with kvtool.

    What is done stays done: stopped at any moment, the same command continues. What fails is a row, and the rest goes on; the exit code
    is 1 then. STUDY may be left out with --status, which then tells of every study in the folder.

    \b
    kvtool run hace --scale small --dry-run
    kvtool run experiments/h2o_streaming.yaml --scale small
    kvtool run my-study.yaml --shard 0/4 -o /shared/my-study
    kvtool run --status
    """
    from kvtool.studies.parse import find_study, read_study
    from kvtool.studies.runner import run_study, study_status

    if study is None:
        if not shows_status:
            raise click.UsageError("give a study: a YAML file, or one of those that come with kvtool (kvtool run --help)")
        _status_of_folders(out or RUNS, as_json)
        return
    source = find_study(study)
    found = read_study(source, scale)
    folder = out or RUNS / f"{found.name}-{found.scale}"
    if shows_status:
        from kvtool.studies.tables import status_table, status_text

        summary = study_status(found, folder, dtype)
        emit(as_json, summary, f"{status_table(summary.rows)}\n\n{status_text(summary)}")
        return
    if dry_run:
        _dry_run(found, folder, device, dtype, assume, as_json)
        return
    summary = run_study(found, source, folder, device=device, dtype=dtype, device_map=named_device_map(), execution=execution)
    emit(as_json, summary, summary.text())
    click.get_current_context().exit(summary.exit_code)


def _status_of_folders(folder: Path, as_json: bool) -> None:
    """Print the state of the run in a folder, or of every run one level below."""
    from kvtool.errors import DataError
    from kvtool.studies.runner import STUDY, open_folder, study_status
    from kvtool.studies.tables import status_text

    folders = [folder] if (folder / STUDY).exists() else sorted(path.parent for path in folder.glob(f"*/{STUDY}"))
    if not folders:
        raise DataError(f"{folder} holds no run of a study; give one with -o, or run a study first (kvtool run --help)")
    found = []
    for each in folders:
        study, dtype = open_folder(each)
        found.append(study_status(study, each, dtype))
    emit(as_json, found, "\n\n".join(status_text(summary) for summary in found))


#: Seconds above which an estimate for a CPU says how to estimate for a GPU.
LONG = 2 * 86400


def _dry_run(study: Study, out: Path, device: str, dtype: str, assume: str | None, as_json: bool) -> None:
    """Print every node with what it will take."""
    from kvtool.progress import say
    from kvtool.studies.estimate import assumed_rates, estimate, facts, measure_rates, measured_factors
    from kvtool.studies.graph import build_graph
    from kvtool.studies.plan import IDLE, plan_nodes
    from kvtool.studies.tables import duration, plan_table, size

    nodes = build_graph(study, dtype)
    marks, remarks = plan_nodes(nodes, out.absolute())
    if assume is None:
        say("measuring what this device does in a second")
    rates = measure_rates(device) if assume is None else assumed_rates(assume)
    measured = [(node, mark.seconds if mark.whole else None) for node, mark in zip(nodes, marks, strict=True)]
    factors = measured_factors(measured, rates)
    estimates = [estimate(node, rates, factors) for node in nodes]
    states = [mark.state for mark in marks]
    left = facts(e for e, state in zip(estimates, states, strict=True) if state not in IDLE)
    rows: list[dict[str, Any]] = [
        {
            "node": n.title,
            "folder": n.name,
            "state": m.state,
            "note": m.note,
            "units": e.units,
            "seconds": e.seconds,
            "bytes": e.bytes_,
        }
        for n, e, m in zip(nodes, estimates, marks, strict=True)
    ]
    most = max((row for row in rows if row["state"] not in IDLE), key=lambda row: row["bytes"] or 0, default=None)
    where = f" ({most['node']})" if most is not None and left["bytes"] else ""
    notes = [
        f"{len(nodes)} nodes; about {duration(left['seconds'])} to go, at most {size(left['bytes'])} of memory at a time{where}"
    ]
    if rates.measured and str(rates.device).startswith("cpu") and left["seconds"] > LONG:
        notes.append(
            "that is for this CPU: --assume GFLOPS,GBPS estimates for a GPU that is not here, such as --assume 300000,2500"
        )
    notes += [f"{left['unknown']} nodes are of models whose size is not known here: not counted"] if left["unknown"] else []
    how = "measured" if rates.measured else "assumed"
    worth = (
        "stages corrected by what is done in this folder"
        if any(s for _, s in measured)
        else "expect a factor of two either way"
    )
    speed = f"{rates.flops / 1e9:.0f} GFLOP/s and {rates.bytes_per_s / 1e9:.1f} GB/s {how}"
    notes += remarks
    notes.append(f"estimated for {rates.device}: {speed}; {worth}")
    emit(
        as_json,
        {"nodes": rows, "left": left, "rates": rates, "factors": factors},
        "\n".join([plan_table(nodes, estimates, states), "", *notes]),
    )
