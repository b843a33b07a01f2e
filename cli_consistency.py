"""The commands that judge runs against the full cache and against each other; part of ``kvtool analyze``."""

from __future__ import annotations

from pathlib import Path

import click

from kvtool.cli_options import emit, json_option, out_option


@click.command("consistency")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--baseline", default="full", show_default=True, help="Policy whose answers the others are compared with.")
@click.option("--right", "right_from", default=0.5, show_default=True, help="Score from which on an answer counts as right.")
@click.option("--review", "shown", default=300, show_default=True, help="Most answers on the review page; flips come first.")
@click.option("--draws", default=9999, show_default=True, help="Bootstrap draws, and draws of the tests.")
@click.option("--seed", default=0, show_default=True, help="Seed of the draws and of the answers that are shown.")
@out_option("consistency", "Folder to write.")
@json_option
def consistency(
    run: Path, baseline: str, right_from: float, shown: int, draws: int, seed: int, out: Path, as_json: bool
) -> None:
    """Does a compressed cache give the full cache's answers: exact, F1, edit similarity, flips; and a sheet for human review.

    \b
    kvtool analyze consistency run -o consistency
    """
    from kvtool.analysis.consistency_report import run_consistency

    summary = run_consistency(run, out, baseline, right_from, shown, draws, seed)
    emit(as_json, summary, summary.text())


@click.command("compare")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--baseline", default="full", show_default=True, help="Policy that the others are compared with.")
@click.option(
    "--figure",
    "figures",
    multiple=True,
    help="score, answer_accuracy, answer_exact, answer_nll or answer_margin; repeatable. Default: the first two.",
)
@click.option(
    "--interval",
    type=click.Choice(["expanded", "bca", "percentile"]),
    default="expanded",
    show_default=True,
    help="Kind of bootstrap interval.",
)
@click.option("--draws", default=9999, show_default=True, help="Bootstrap draws, and sign patterns of the tests.")
@click.option("--seed", default=0, show_default=True, help="Seed of both.")
@out_option("compare", "Folder to write.")
@json_option
def compare(
    runs: tuple[Path, ...],
    baseline: str,
    figures: tuple[str, ...],
    interval: str,
    draws: int,
    seed: int,
    out: Path,
    as_json: bool,
) -> None:
    """Policies against a baseline and each other, paired on the same samples: intervals, tests with Holm's correction, A/A noise.

    RUNS must have equal settings and samples; what differs is shown and refused.

    \b
    kvtool analyze compare run -o compare
    kvtool analyze compare run-snapkv run-h2o --baseline full --figure score -o compare
    """
    from kvtool.analysis.compare import Draws
    from kvtool.analysis.compare_report import run_compare

    summary = run_compare(runs, out, baseline, figures, Draws(draws, seed, interval))
    emit(as_json, summary, summary.text())
