"""What the search command prints."""

from __future__ import annotations

from shlex import quote
from typing import TYPE_CHECKING

from kvtool.textgrid import Lines, csv_text, figure, grid

if TYPE_CHECKING:
    from kvtool.simulate.search import SearchSummary
    from kvtool.simulate.verdict import Verdict

NAMES = {"grid": "every setting", "random": "random settings", "tpe": "Optuna's TPE", "nsga2": "Optuna's NSGA-II"}


def summary_text(summary: SearchSummary) -> str:
    """Return the table of choices, the reasons in plain words, and where the files are."""
    table = grid(*choice_table(summary))
    lines = [
        f"{summary.n_trials} trials ({NAMES[summary.sampler]}; {summary.n_repeated} repeated, {summary.n_impossible} impossible) of "
        f"{summary.space}",
        f"searched on {summary.n_searched} prompts, judged on {summary.n_held_out} held-out ones; {summary.by}: smaller is better",
        "",
        table,
        "",
        *(_words(verdict, summary.by) for verdict in summary.verdicts),
    ]
    for budget, parameters in summary.marginals.items():
        lines += ["", f"least {summary.by} at {budget} on the searched prompts, by value"]
        lines += [f"  {name}: {_least(values)}" for name, values in parameters.items() if name != "window and compensation"]
        lines += _windows(parameters.get("window and compensation", {}), summary.by)
    if summary.together:
        lines += ["", f"one setting for all budgets: {summary.together}"]
    name = "auto.yaml" if summary.marginals else "search.yaml"
    files = [name, "trials.jsonl", "search.png", *([] if summary.sampler == "grid" else ["study.journal"])]
    lines += ["", *summary.notes, *(str(summary.folder / file) for file in files)]
    return "\n".join([*lines, f"confirm: {confirming(summary, name)}"])


def choice_table(summary: SearchSummary) -> Lines:
    """Return header and lines of the choices."""
    header = ["setting", "kept", f"{summary.by}, searched", "held out", "defaults", "difference (95 %)", "ties"]
    return header, [_cells(verdict) for verdict in summary.verdicts]


def choice_data(summary: SearchSummary) -> str:
    """Return the choices as CSV, unrounded."""
    names = "budget policy default retention searched default_searched held_out default_held_out difference low high verdict n_tied reason"
    keys = names.split()
    return csv_text(keys, [[getattr(verdict, key) for key in keys] for verdict in summary.verdicts])


def confirming(summary: SearchSummary, name: str) -> str:
    """Return the command that runs what was chosen on as many other prompts of the same kind."""
    asked = summary.provenance
    options = [
        f"-m {quote(str(asked['model']))}",
        f"-t {quote(str(asked['task']))}",
        f"-n {asked['n']}",
        f"--length {asked['length']}",
    ]
    options += [f"--compress-at {asked['compress_at']}", f"--seed {int(asked['seed'] or 0) + 1000}"]
    return f"kvtool infer {' '.join(options)} --shortlist {quote(str(summary.folder / name))} -o confirmed"


def _cells(verdict: Verdict) -> list[str]:
    spread = "-" if verdict.low is None or verdict.high is None else f"{verdict.low:.2f} to {verdict.high:.2f}"
    return [
        verdict.policy,
        f"{100 * verdict.retention:.2f}%",
        figure(verdict.searched, 2),
        figure(verdict.held_out, 2),
        figure(verdict.default_held_out, 2),
        f"{figure(verdict.difference, 2)} ({spread})",
        str(verdict.n_tied),
    ]


def _words(verdict: Verdict, by: str) -> str:
    against = f" ({verdict.default})" if verdict.default and verdict.default != verdict.policy else ""
    gain = ""
    if by == "risk" and verdict.default_searched is not None and verdict.difference is not None:
        first = verdict.searched - verdict.default_searched
        gain = f"; risk against the defaults {first:+.2f} where it was searched, {verdict.difference:+.2f} held out"
    elif verdict.default_searched and verdict.default_held_out and verdict.held_out is not None:
        first = 1 - verdict.searched / verdict.default_searched
        second = 1 - verdict.held_out / verdict.default_held_out
        gain = f"; {first:.0%} less harm than the defaults where it was searched, {second:.0%} held out"
    note = f"; {verdict.note}" if verdict.note else ""
    return f"{verdict.budget}: {verdict.reason}. On held-out prompts {verdict.verdict}{against}{gain}{note}"


def _least(values: dict[str, float]) -> str:
    return ", ".join(f"{value} {loss:.2f}" for value, loss in values.items())


def _windows(values: dict[str, float], by: str) -> list[str]:
    """Return the table of windows against compensations."""
    cells = {tuple(key.split(", ")): loss for key, loss in values.items()}
    windows, kinds = dict.fromkeys(w for w, _ in cells), dict.fromkeys(kind for _, kind in cells)
    if len(windows) < 2 or len(kinds) < 2:
        return []
    rows = [[f"  window {w}", *(figure(cells.get((w, kind)), 2) for kind in kinds)] for w in windows]
    return grid([f"  least {by}", *kinds], rows).splitlines()
