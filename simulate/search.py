"""Search for settings on half of the captured prompts, judge them on the other half; stopped at any moment, it continues."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import yaml

from kvtool.capture.reader import selection_key
from kvtool.errors import ConfigError, DataError
from kvtool.files import config_hash, open_run, write_text
from kvtool.policies.headfile import check_heads
from kvtool.policies.registry import method_class
from kvtool.progress import say
from kvtool.simulate.choose import Chosen, conclude, confirmation
from kvtool.simulate.domains import Domain
from kvtool.simulate.rank import resample_weights
from kvtool.simulate.spaces import AUTO, Space, parse_space, with_statistics
from kvtool.simulate.study import BATCH, check_optuna
from kvtool.simulate.trials import By, Task, captured_statistics, run_trials
from kvtool.simulate.verdict import Verdict, split_prompts
from kvtool.textgrid import save_tables

if TYPE_CHECKING:
    from kvtool.capture.reader import Capture, CapturedSample

SCHEMA = "kvtool.search/1"
RESULT, AUTO_RESULT = "search.yaml", "auto.yaml"
#: largest grid of the automatic choice
MOST_POINTS = 20_000


@dataclass(frozen=True, slots=True)
class SearchConfig:
    """What a search does; together with the capture it decides the result.

    Attributes
    ----------
    capture : str
        Path of the capture.
    space : str
        See `kvtool.simulate.spaces.parse_space`; empty with `auto`: window, kernel, pooling and compensation block of SnapKV.
    budgets : tuple of str
        One objective each; empty if the space holds the budget, which makes risk (or harm) and retention the objectives.
    trials : int
        Settings to try. A grid tries all.
    sampler : str
        ``"auto"``: all settings if they are no more than `trials`, else TPE for one objective and NSGA-II for several.
    auto : bool
        Try every setting and choose the simplest one that cannot be told from the best.
    heads : str
        Heads file for methods that take one.
    draws : int
        Bootstrap draws.
    seed : int
        Of the trials, of the split into halves and of the bootstrap.
    by : str
        What is minimised: ``"risk"``, which rankings go by (`kvtool.calibration.risk`), or ``"harm"`` alone.
    """

    capture: str
    space: str = ""
    budgets: tuple[str, ...] = ("5%",)
    trials: int = 200
    sampler: Literal["auto", "grid", "random", "tpe", "nsga2"] = "auto"
    auto: bool = False
    heads: str = ""
    draws: int = 1000
    seed: int = 0
    by: By = "risk"

    def __post_init__(self) -> None:
        if self.by not in get_args(By):
            raise ConfigError(f"search: by={self.by!r} is neither {' nor '.join(get_args(By))}")
        for name, low in (("trials", 1), ("draws", 10)):
            if getattr(self, name) < low:
                raise ConfigError(f"search: {name}={getattr(self, name)} must be at least {low}")
        if not (self.space or self.auto):
            raise ConfigError("search: a space is needed (a method's name or METHOD:key=domain,...), or the automatic choice")
        if self.auto and self.sampler not in ("auto", "grid"):
            raise ConfigError(f"search: the automatic choice tries every setting; sampler={self.sampler} does not fit")


@dataclass(frozen=True, slots=True)
class SearchSummary:
    """What a search left.

    Attributes
    ----------
    folder : Path
    space, sampler : str
    n_trials, n_repeated, n_impossible : int
        Trials; of them those whose setting had been tried before, and those that no prompt can run at any budget.
    n_searched, n_held_out : int
        Prompts.
    verdicts : tuple of Verdict
        One per budget; where the budget is searched, one per point of the front.
    together : str or None
        With several budgets: the setting that comes closest to the best of each, on average.
    marginals : dict
        Of an automatic choice, per budget and parameter: value -> least risk or harm with it on the prompts of the search.
    notes : tuple of str
    provenance : dict
        Model, task, length, prompts, seed and query mode of the capture.
    by : str
        What was minimised.
    """

    folder: Path
    space: str
    sampler: str
    n_trials: int
    n_repeated: int
    n_impossible: int
    n_searched: int
    n_held_out: int
    verdicts: tuple[Verdict, ...]
    together: str | None
    marginals: dict[str, dict[str, dict[str, float]]]
    notes: tuple[str, ...]
    provenance: dict[str, Any]
    by: By

    def text(self) -> str:
        """Return what the command prints."""
        from kvtool.simulate.search_text import summary_text

        return summary_text(self)


def run_search(config: SearchConfig, out: str | Path) -> SearchSummary:
    """Search, judge and write ``trials.jsonl``, ``search.yaml`` (``auto.yaml``), ``search.png`` and Optuna's ``study.journal``.

    Parameters
    ----------
    config : SearchConfig
    out : path
        Output folder.

    Raises
    ------
    ConfigError
        A space that cannot be read or searched, or the folder holds another search.
    DataError
        Missing or damaged capture, one that lacks what the space needs, or one of a single prompt.
    MissingDependencyError
        Optuna is needed and not installed.
    """
    from kvtool.capture.reader import open_capture
    from kvtool.simulate.search_plots import plot_search
    from kvtool.simulate.search_text import choice_data, choice_table

    folder = Path(out)
    with open_capture(config.capture) as capture:
        task = _task(config, capture)
        check_optuna(task.sampler)
        open_run(folder, _identity(config, task, capture), {"capture": config.capture, "trials": config.trials, **_versions()})
        for note in task.space.notes:
            say(f"search: {note}")
        records = run_trials(task, folder, config.trials, config.seed)
        weights = [resample_weights(len(prompts), config.draws, config.seed) for prompts in (task.searched, task.held_out)]
        chosen = conclude(task, records, weights[0], weights[1], simplest=config.auto)
        title = f"{capture.model.model_id}, {capture.config.get('task')}, {task.space.method}"
        provenance = {key: capture.config.get(key) for key in ("task", "length", "n", "seed")}
        provenance |= {"model": capture.model.model_id, "compress_at": capture.samples[0].compress_at}
    summary = _summary(folder, task, records, chosen, provenance)
    write_text(folder / (AUTO_RESULT if config.auto else RESULT), _yaml(summary, provenance))
    plot_search(summary, task.objectives, records, folder / "search.png", title)
    save_tables(folder, "choices", f"Searched: {title}", [("", choice_table(summary))], choice_data(summary), summary.notes)
    return summary


def _summary(
    folder: Path, task: Task, records: list[dict[str, Any]], chosen: Chosen, provenance: dict[str, Any]
) -> SearchSummary:
    return SearchSummary(
        folder=folder,
        space=str(task.space),
        sampler=task.sampler,
        n_trials=len(records),
        n_repeated=sum(record["repeats"] is not None for record in records),
        n_impossible=sum(all(value is None for value in record["values"]) for record in records),
        n_searched=len(task.searched),
        n_held_out=len(task.held_out),
        verdicts=chosen.verdicts,
        together=chosen.together,
        marginals=chosen.marginals,
        notes=(*task.space.notes, *chosen.notes),
        provenance=provenance,
        by=task.by,
    )


def _task(config: SearchConfig, capture: Capture) -> Task:
    samples = [sample for sample in capture.samples if sample.n_probe and sample.views()]
    if len(samples) < 2:
        raise DataError(
            f"capture {config.capture} has {len(samples)} prompts that can be compressed and judged; a search needs at least 2, "
            "half of them to be judged on (12 or more to tell anything)"
        )
    space = _space(config, capture, samples[0])
    budgets = () if "budget" in space.domains else config.budgets
    n_points, sampler = space.n_points, config.sampler
    if config.auto or (sampler == "auto" and n_points is not None and n_points <= config.trials):
        sampler = "grid"
    if sampler == "auto":
        sampler = "tpe" if len(budgets) == 1 else "nsga2"
    if sampler == "grid" and (n_points is None or n_points > MOST_POINTS):
        raise ConfigError(
            f"search: the space has {'infinitely many' if n_points is None else n_points} settings, a grid tries at most "
            f"{MOST_POINTS}; use lists or steps, or another sampler without --auto"
        )
    searched, held_out = split_prompts(len(samples), config.seed)
    return Task(space, sampler, budgets, tuple(samples[i] for i in searched), tuple(samples[i] for i in held_out), config.by)


def _space(config: SearchConfig, capture: Capture, sample: CapturedSample) -> Space:
    """Read the space and leave out what the capture or the heads file cannot serve."""
    space = parse_space(config.space or AUTO)
    if config.heads and "heads" not in space.domains and hasattr(method_class(space.method), "heads"):
        space = Space(space.method, {**space.domains, "heads": Domain(values=(config.heads,))}, space.notes)
    if config.auto and "budget" in space.domains:
        raise ConfigError("search: the automatic choice is per budget; give budgets with -r instead of in the space")
    names = captured_statistics(sample)
    space = with_statistics(space, lambda name: selection_key(name) in names)
    if not space.searched:
        raise ConfigError(f"search: nothing is left to search in {space}: {'; '.join(space.notes)}")
    policy = space.policy(space.default(), "50%")
    check_heads([policy], capture.model)
    for name in policy.needs():
        sample.selection(name, 0)
    return space


def _identity(config: SearchConfig, task: Task, capture: Capture) -> dict[str, Any]:
    """Return everything that decides the trials; their number is not part of it: a longer search continues a shorter one."""
    samples = [[s.id, s.seq_len, config_hash({"prompt": list(s.prompt_ids)})] for s in capture.samples]
    policy = task.space.policy(task.space.default(), "50%")
    return {
        "search": config_hash({"config": capture.config, "samples": samples}),
        "model": asdict(capture.model),
        "space": str(task.space),
        "sampler": task.sampler,
        "batch": BATCH[task.sampler],
        "budgets": list(task.budgets),
        "auto": config.auto,
        "heads": check_heads([policy], capture.model),
        "draws": config.draws,
        "seed": config.seed,
        "by": config.by,
    }


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("numpy", "torch", "optuna"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _yaml(summary: SearchSummary, provenance: dict[str, Any]) -> str:
    """Return the result file; its ``policies`` are read by ``kvtool infer --shortlist``."""
    value = {
        "schema": SCHEMA,
        **provenance,
        "space": summary.space,
        "sampler": summary.sampler,
        "by": summary.by,
        "trials": summary.n_trials,
        "repeated": summary.n_repeated,
        "impossible": summary.n_impossible,
        "prompts": {"searched": summary.n_searched, "held_out": summary.n_held_out},
        "notes": list(summary.notes),
        "chosen": [verdict.to_json() for verdict in summary.verdicts],
        **({"together": summary.together} if summary.together else {}),
        **({f"least_{summary.by}": summary.marginals} if summary.marginals else {}),
        "policies": confirmation(summary.verdicts),
    }
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=120)
