"""The search command: settings found on half of a capture's prompts, judged on the other half."""

from __future__ import annotations

from pathlib import Path

import click

from kvtool.cli_options import emit, json_option, out_option, read_budgets


@click.command()
@click.argument("capture_file", type=click.Path(path_type=Path))
@click.option(
    "--space",
    "-s",
    default="",
    metavar="SPACE",
    help="What to search: a ready-made space (hace, snapkv, cake, adakv, pyramidkv, headkv, lava, compensation), "
    "METHOD:key=domain,... with domains a..b, 'a..b step c', 'log(a..b)', {a,b,c} or a value, or a YAML file.",
)
@click.option(
    "--auto", is_flag=True, help="Try every window, kernel and compensation block; take the simplest as good as the best."
)
@click.option(
    "--retention",
    "-r",
    default=None,
    help="Comma-separated budgets, one objective each; default: 5%, unless the space holds it.",
)
@click.option("--trials", default=200, show_default=True, help="Settings to try; --auto tries all.")
@click.option(
    "--sampler",
    type=click.Choice(["auto", "grid", "random", "tpe", "nsga2"]),
    default="auto",
    show_default=True,
    help="auto: all settings if they are few, TPE for one objective, NSGA-II for several.",
)
@click.option("--heads", default="", metavar="FILE", help="Heads file for methods that share by heads.")
@click.option(
    "--by",
    type=click.Choice(["risk", "harm"]),
    default="risk",
    show_default=True,
    help="What is minimised: the risk that kvtool simulate ranks by, or the predicted harm alone.",
)
@click.option("--draws", default=1000, show_default=True, help="Bootstrap draws for the intervals.")
@click.option("--seed", default=0, show_default=True, help="Seed of the trials, of the halves and of the bootstrap.")
@out_option("search", "Folder to write.")
@json_option
def search(
    capture_file: Path,
    space: str,
    auto: bool,
    retention: str | None,
    trials: int,
    sampler: str,
    heads: str,
    by: str,
    draws: int,
    seed: int,
    out: Path,
    as_json: bool,
) -> None:
    """Search a method's settings on half of a capture's prompts, and judge what is found on the other half.

    \b
    kvtool search c.h5 --auto -r 2%,5%,10% -o auto
    kvtool search c.h5 --space cake -r 5% --trials 200 -o found
    kvtool search c.h5 --space hace --heads heads.json -r 2%,5% -o found
    kvtool search c.h5 --space "snapkv:window=8..64,kernel={1,3,7,15},budget=2%..20%" -o front
    """
    from kvtool.simulate.search import SearchConfig, run_search
    from kvtool.simulate.spaces import searches_budget

    if retention is not None and searches_budget(space):
        raise click.UsageError("the space searches the budget; leave out --retention")
    budgets = () if searches_budget(space) else tuple(read_budgets(retention or "5%"))
    config = SearchConfig(
        capture=str(capture_file),
        space=space,
        budgets=budgets,
        trials=trials,
        sampler=sampler,  # type: ignore[arg-type]
        auto=auto,
        heads=heads,
        draws=draws,
        seed=seed,
        by=by,  # type: ignore[arg-type]
    )
    summary = run_search(config, out)
    emit(as_json, summary, summary.text())
