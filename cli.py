"""The command line: parse, call one stage function, print. Results go to stdout, progress to stderr."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvtool import __version__
from kvtool.cli_analyze import analyze
from kvtool.cli_options import (
    compress_option,
    emit,
    execution_options,
    json_option,
    load_named,
    model_options,
    out_option,
    policy_options,
    read_budgets,
    sample_options,
    whole_numbers,
)
from kvtool.cli_perplexity import perplexity
from kvtool.cli_plan import plan
from kvtool.cli_rescore import metrics_command
from kvtool.cli_run import run
from kvtool.cli_samples import Decode, asked, decode_options, load_samples, subset_options
from kvtool.cli_search import search
from kvtool.cli_stress import shapes, stress
from kvtool.errors import KvtoolError, MissingDependencyError

if TYPE_CHECKING:
    from kvtool.executors.execution import Execution
    from kvtool.policies import Policy


class _OneLineErrors(click.Group):
    """A group whose commands end in one line and an exit code when the user can mend what happened."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KvtoolError as error:
            click.echo(f"kvtool: {error}", err=True)
            ctx.exit(error.exit_code)
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("kvtool"):
                raise
            missing = MissingDependencyError(f"package {error.name!r} is not installed; run: pip install {error.name}")
            click.echo(f"kvtool: {missing}", err=True)
            ctx.exit(missing.exit_code)
        except KeyboardInterrupt:
            click.echo("\nkvtool: interrupted; what was written is kept, the same command continues", err=True)
            ctx.exit(130)


@click.group(cls=_OneLineErrors, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="kvtool")
def cli() -> None:
    """Which KV-cache compression to run for your model and workload, at which budget - simulated, then proved.

    \b
    kvtool demo                                       everything, on the embedded model, in minutes
    kvtool capture -t niah --length 2048 -o c.h5      statistics of real attention
    kvtool simulate c.h5 -o sim                       rank policies offline, make a shortlist
    kvtool infer --shortlist sim/shortlist.yaml       run the shortlist for real
    kvtool analyze report sim infer                   tables, figures, report.html
    """


@cli.command()
@model_options
@sample_options
@subset_options
@compress_option
@click.option("--windows", default="8,16,32,64", show_default=True, help="Window sizes of the window statistics, in queries.")
@click.option("--statistics", default=None, help="Comma-separated selection statistics; default: all.")
@click.option(
    "--permute",
    default=8,
    show_default=True,
    help="Run the first prompts, so many, once more with their blocks permuted: do heads follow content or places?",
)
@click.option("--dry-run", is_flag=True, help="Say what would be captured and how large it gets; capture nothing.")
@execution_options
@out_option("capture.h5", "HDF5 file to write.")
@json_option
def capture(
    model: str,
    device: str,
    dtype: str,
    task: str,
    n: int,
    length: int,
    seed: int,
    template: str | None,
    compress_at: str,
    windows: str,
    statistics: str | None,
    permute: int,
    dry_run: bool,
    execution: Execution,
    out: Path,
    as_json: bool,
) -> None:
    """Record a model's attention statistics and answer gradients on real prompts.

    \b
    kvtool capture -m tiny -t niah -n 16 --length 2048 -o capture.h5
    kvtool capture -m ./my-model -t file:questions.jsonl -n 32 --compress-at context -o mine.h5
    """
    from kvtool.capture.runner import CaptureConfig, run_capture

    loaded = load_named(model, device, dtype)
    samples = load_samples(loaded, task, n, length, seed, template)
    config = CaptureConfig(
        task=task,
        model=model,
        n=asked(n, samples),
        length=length,
        seed=seed,
        compress_at=compress_at,  # type: ignore[arg-type]
        windows=tuple(whole_numbers("--windows", windows)),
        statistics=tuple(s.strip() for s in statistics.split(",")) if statistics else None,
        permute=permute,
    )
    if dry_run:
        from kvtool.capture.runner import estimate

        plan = estimate(config, loaded.info, samples)
        emit(as_json, plan, f"{plan.n_samples} samples, about {plan.size_bytes / 1e6:.1f} MB in {out}")
        return
    summary = run_capture(config, loaded, samples, out, execution)
    notes = [f"{summary.n_samples} samples in {summary.path} ({summary.size_bytes / 1e6:.1f} MB)"]
    if summary.n_missing:
        notes = [f"{summary.n_samples} samples are done, {summary.n_missing} are for other shards; the last one writes {out}"]
    for count, text in (
        (summary.n_reused, "were finished by an earlier run"),
        (summary.n_truncated, "have a longer answer than is probed: its first tokens only"),
        (summary.n_model_answers, "have no gold answer: the model's own full-cache answer is used"),
        (summary.n_without_margins, "have an answer of one token, which compression after the prompt cannot change"),
        (summary.n_unpermuted, "are too short to permute blocks: no content-versus-slot score of their heads"),
        (summary.n_kept_layers, "(sample, layer) pairs are sliding windows that no policy touches"),
    ):
        if count:
            notes.append(f"  {count} {text}")
    emit(as_json, summary, "\n".join(notes))


@cli.command()
@click.argument("capture_file", type=click.Path(path_type=Path))
@click.option(
    "--against",
    "others",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Capture of the same model on other prompts, tasks or texts: do the labels stay? Repeat for several.",
)
@click.option("--seed", default=0, show_default=True, help="Seed of the bootstrap and of the splits of prompts.")
@click.option(
    "--importance",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "reasoning", "gain"]),
    help="What headkv and hace share budgets by: HeadKV's score (where prompts name their evidence) or gain.",
)
@out_option("heads.json", "JSON file to write; from 8 prompts on NAME_reliability.png, .svg, .pdf and .csv lie beside it.")
@json_option
def classify(capture_file: Path, others: tuple[Path, ...], seed: int, importance: str, out: Path, as_json: bool) -> None:
    """Head kinds with a confidence that is checked on held-out prompts, and head importance, from a capture.

    \b
    kvtool classify capture.h5 -o heads.json
    kvtool classify niah.h5 --against more.h5 --against text.h5 -o heads.json
    """
    from kvtool.classify.runner import run_classify

    summary = run_classify(capture_file, out, seed=seed, others=others, importance=importance)
    emit(as_json, summary, summary.text())


@cli.command()
@click.argument("capture_file", type=click.Path(path_type=Path))
@policy_options
@click.option("--refine", default=0, show_default=True, help="Masked teacher-forced forwards for the best N (needs the model).")
@click.option("--draws", default=1000, show_default=True, help="Bootstrap draws for the intervals.")
@click.option("--seed", default=0, show_default=True, help="Seed of the bootstrap.")
@click.option("--calibration", default="", help="File of kvtool analyze calibrate: predict accuracy, and rank by it.")
@click.option(
    "--shortlist-cap",
    type=int,
    default=None,
    metavar="N",
    help="At most N configurations per budget on the shortlist; default: all that are not clearly dominated.",
)
@click.option("--jobs", "-j", default=0, show_default=True, help="Processes for large requests; 0: one per core.")
@model_options
@out_option("simulate", "Folder to write.")
@json_option
def simulate(
    capture_file: Path,
    policies: tuple[str, ...],
    retention: str,
    heads: str,
    refine: int,
    draws: int,
    seed: int,
    calibration: str,
    shortlist_cap: int | None,
    jobs: int,
    model: str,
    device: str,
    dtype: str,
    out: Path,
    as_json: bool,
) -> None:
    """Rank policies and budgets offline from a capture, and make a shortlist.

    \b
    kvtool simulate capture.h5 -o sim
    kvtool simulate capture.h5 -p snapkv -p snapkv:window=16 -p h2o -r 1%,5%,20% --refine 20 -o sim
    """
    from kvtool.simulate.runner import SimulateConfig, run_simulate

    config = SimulateConfig(
        capture=str(capture_file),
        policies=policies,
        budgets=tuple(read_budgets(retention)),
        heads=heads,
        refine=refine,
        draws=draws,
        seed=seed,
        calibration=calibration,
        shortlist_cap=shortlist_cap,
        jobs=jobs,
    )
    loaded = load_named(model, device, dtype) if refine else None
    summary = run_simulate(config, out, loaded)
    emit(as_json, summary, summary.text())


@cli.command()
@model_options
@sample_options
@subset_options
@decode_options
@compress_option
@policy_options
@click.option("--shortlist", type=click.Path(path_type=Path), help="shortlist.yaml of kvtool simulate, instead of --policy.")
@click.option("--kernel", default="auto", show_default=True, help="Attention kernel; auto takes the fastest that runs here.")
@click.option(
    "--generate/--no-generate",
    "generates",
    default=True,
    show_default=True,
    help="--no-generate feeds the gold answer only: accuracy and loss, no text, task score and speed; about ten times faster.",
)
@click.option("--dry-run", is_flag=True, help="List the units that would run; run nothing.")
@click.option("--retry-failed", is_flag=True, help="Try units again that an earlier run on Ray gave up.")
@execution_options
@out_option("infer", "Folder to write.")
@json_option
def infer(
    model: str,
    device: str,
    dtype: str,
    task: str,
    n: int,
    length: int,
    seed: int,
    template: str | None,
    compress_at: str,
    policies: tuple[str, ...],
    retention: str,
    heads: str,
    shortlist: Path | None,
    kernel: str,
    generates: bool,
    decode: Decode,
    dry_run: bool,
    execution: Execution,
    out: Path,
    as_json: bool,
) -> None:
    """Run policies for real: scores, KV bytes counted from tensors, times; the full cache always beside them.

    \b
    kvtool infer -t niah -n 32 --length 2048 --shortlist sim/shortlist.yaml -o run
    kvtool infer -m ./my-model -t file:questions.jsonl -p snapkv -p random -r 5%,10% -o run
    """
    from kvtool.infer.cache import check_moments
    from kvtool.infer.runner import InferConfig, run_infer

    chosen = _chosen_policies(policies, retention, heads, shortlist)
    loaded = load_named(model, device, dtype)
    samples = load_samples(loaded, task, n, length, seed, template)
    if dry_run:
        check_moments(chosen, loaded.model)
        units = [{"sample": s.sample.id, "policy": str(p)} for s in samples for p in chosen]
        emit(as_json, units, f"{len(units)} units: {len(samples)} samples x {len(chosen)} policies, and the full cache")
        return
    config = InferConfig(
        task=task,
        model=model,
        n=asked(n, samples),
        length=length,
        seed=seed,
        compress_at=compress_at,  # type: ignore[arg-type]
        kernel=kernel,
        generate=generates,
        **decode.fields(),
    )
    summary, *_ = [run_infer(config, loaded, samples, chosen, folder, execution) for folder in decode.folders(out)]
    emit(as_json, summary, summary.text())


def _chosen_policies(texts: tuple[str, ...], retention: str, heads: str, shortlist: Path | None) -> list[Policy]:
    from kvtool.policies import expand_policies
    from kvtool.policies.headfile import with_heads
    from kvtool.simulate.shortlist import read_shortlist

    if shortlist is None:
        return expand_policies(texts, read_budgets(retention), real=True, heads=heads)
    return [with_heads(policy, heads) for policy in read_shortlist(shortlist)]


@cli.command()
@model_options
@click.option("--length", default=1024, show_default=True, help="Prompt length in tokens.")
@click.option("--n", "-n", default=32, show_default=True, help="Prompts to capture, and as many fresh ones to run.")
@out_option("kvtool-demo", "Folder to write.")
@json_option
def demo(model: str, device: str, dtype: str, length: int, n: int, out: Path, as_json: bool) -> None:
    """Capture, classify, simulate, infer and analyze on needle prompts; prints the table and where the report is.

    \b
    kvtool demo
    kvtool demo --length 2048 -n 32 -o demo2048
    """
    from kvtool.demo import DemoConfig, run_demo

    loaded = load_named(model, device, dtype)
    summary = run_demo(DemoConfig(model=model, length=length, n=n), loaded, out)
    emit(as_json, summary, summary.text())


@cli.group(invoke_without_command=True)
@json_option
@click.pass_context
def policies(ctx: click.Context, as_json: bool) -> None:
    """List the policies; 'policies show NAME' tells one in full.

    \b
    kvtool policies
    kvtool policies show snapkv
    """
    if ctx.invoked_subcommand is None:
        from kvtool.policies import method_classes
        from kvtool.policies.describe import listing, policy_facts

        emit(as_json, [policy_facts(name) for name in method_classes()], listing())


@policies.command("show")
@click.argument("name")
@json_option
def policies_show(name: str, as_json: bool) -> None:
    """Formula, defaults, source, needs and study names of one policy; a study's name and a file of a policy will do.

    \b
    kvtool policies show hace
    kvtool policies show h2o_8_64_512
    """
    from kvtool.policies.describe import named_policy, policy_facts, policy_options, show

    method, policy = named_policy(name)
    facts = policy_facts(method)
    text = show(facts) if policy is None else f"{name} is {policy}\n\n{show(facts)}"
    emit(as_json, {**facts, "options": policy_options(), "policy": policy}, text)


@cli.command()
@json_option
def tasks(as_json: bool) -> None:
    """List the tasks and their options.

    \b
    kvtool tasks
    """
    from kvtool.data.tasks import TASKS

    rows: list[dict[str, Any]] = [
        {"name": name, "summary": task.summary, "options": task.options} for name, task in TASKS.items()
    ]
    summary = "your own prompts, one JSON object a line: context, question, answers, optional id, metric, max_new_tokens"
    rows.append({"name": "file:PATH.jsonl", "summary": summary, "options": {}})
    lines = []
    for row in rows:
        lines.append(f"{row['name']}: {row['summary']}")
        lines += [f"    {key}={'...':<5} {text}" for key, text in row["options"].items()]
    emit(as_json, rows, "\n".join(lines))


cli.add_command(analyze)
cli.add_command(perplexity)
cli.add_command(metrics_command)
cli.add_command(plan)
cli.add_command(run)
cli.add_command(search)
cli.add_command(shapes)
cli.add_command(stress)


def main() -> None:
    """Entry point of the ``kvtool`` command."""
    cli(prog_name="kvtool")


if __name__ == "__main__":
    main()
