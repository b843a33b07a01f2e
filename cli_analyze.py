"""The analyze commands: read what the stages wrote, and put it side by side."""

from __future__ import annotations

from pathlib import Path

import click

from kvtool.cli_options import emit, json_option, out_option


@click.group()
def analyze() -> None:
    """Put prediction and reality side by side: report, fidelity."""


@analyze.command("report")
@click.argument("simulate_dir", type=click.Path(path_type=Path))
@click.argument("infer_dir", type=click.Path(path_type=Path))
@out_option("report", "Folder to write.")
@json_option
def analyze_report(simulate_dir: Path, infer_dir: Path, out: Path, as_json: bool) -> None:
    """Tables, figures and report.html from a simulate and an infer folder ('-' for no simulate folder).

    \b
    kvtool analyze report sim run -o report
    kvtool analyze report - run -o report
    """
    from kvtool.analysis.runner import run_analyze

    summary = run_analyze(None if str(simulate_dir) == "-" else simulate_dir, infer_dir, out)
    emit(as_json, summary, summary.text())


@analyze.command("fidelity")
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--draws", default=2000, show_default=True, help="Bootstrap draws over prompts.")
@click.option("--seed", default=0, show_default=True, help="Seed of the bootstrap.")
@click.option("--out", "-o", type=click.Path(path_type=Path), help="Also write fidelity.json and fidelity.md here.")
@json_option
def analyze_fidelity(folders: tuple[Path, ...], draws: int, seed: int, out: Path | None, as_json: bool) -> None:
    """How well the offline ranking agrees with reality: Kendall tau-b within each budget, with intervals.

    FOLDERS are pairs: simulate folder, infer folder, and so on.

    \b
    kvtool analyze fidelity sim1024 run1024 sim2048 run2048
    """
    from kvtool.analysis.runner import run_fidelity

    if len(folders) % 2:
        raise click.UsageError("give pairs of folders: simulate folder, infer folder, ...")
    pairs = list(zip(folders[::2], folders[1::2], strict=True))
    result = run_fidelity(pairs, draws=draws, seed=seed, out=out)
    emit(as_json, result, result.text())
