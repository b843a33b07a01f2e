"""The edge to Optuna: what to try next, as a function of the finished trials alone; and a journal of them for Optuna's tools.

Trials are proposed in batches. A batch follows from the trials of the batches before it and from the seed, whatever was
interrupted in between: a search that was killed and goes on makes the same trials as an undisturbed one, and a longer search starts
with the trials of a shorter one.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kvtool.errors import MissingDependencyError
from kvtool.files import config_hash
from kvtool.simulate.domains import Domain
from kvtool.simulate.spaces import Space

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

Sampler = Literal["grid", "random", "tpe", "nsga2"]
#: trials that are proposed together; of NSGA-II: one generation
BATCH: dict[str, int] = {"grid": 32, "random": 16, "tpe": 8, "nsga2": 20}
#: trials drawn evenly before TPE models anything
STARTUP = 16
JOURNAL = "study.journal"
NO_OPTUNA = "searching needs Optuna, which is not installed; run: pip install 'kvtool[search]'"


def check_optuna(sampler: str) -> None:
    """Refuse a search that needs Optuna where it is missing.

    Raises
    ------
    MissingDependencyError
    """
    if sampler != "grid":
        _optuna()


def propose(
    space: Space, sampler: Sampler, n_objectives: int, records: Sequence[Mapping[str, Any]], seed: int
) -> list[dict[str, Any]]:
    """Return the next batch of trials.

    Parameters
    ----------
    space : Space
    sampler : str
        ``"grid"``: every setting in turn; else of Optuna.
    n_objectives : int
        All are minimised.
    records : sequence of mapping
        The trials of all batches before: ``params``, ``values`` (None where one is impossible) and ``attrs``.
    seed : int

    Returns
    -------
    list of dict
        ``params``, and ``attrs``: what the sampler wants to know about the trial later. Empty at the end of a grid.
    """
    start, size = len(records), BATCH[sampler]
    if sampler == "grid":
        return [{"params": params, "attrs": {}} for params in itertools.islice(space.grid(), start, start + size)]
    optuna = _optuna()
    number = int(config_hash({"seed": seed, "batch": start // size}), 16) % 2**32
    samplers = {
        "random": lambda: optuna.samplers.RandomSampler(seed=number),
        "tpe": lambda: optuna.samplers.TPESampler(seed=number, n_startup_trials=STARTUP, multivariate=True),
        "nsga2": lambda: optuna.samplers.NSGAIISampler(seed=number, population_size=size),
    }
    study = optuna.create_study(directions=["minimize"] * n_objectives, sampler=samplers[sampler]())
    study.add_trials(frozen_trials(space, records))
    distributions = {name: _distribution(domain) for name, domain in space.searched.items()}
    found = []
    for k in range(size):
        trial = study.ask(fixed_distributions=distributions)
        params = {
            name: d.clean(trial.params[name]) if name in distributions else d.values[0] for name, d in space.domains.items()
        }
        # NSGA-II has to know a trial's generation; what TPE notes follows from the trials anyway.
        attrs = {k: v for k, v in study.get_trials(deepcopy=False)[trial.number].system_attrs.items() if "generation" in k}
        # The first trial of all is what the method does by default: a search never ends worse than that on its own prompts.
        found.append({"params": space.default() if start + k == 0 else params, "attrs": attrs})
    return found


def frozen_trials(space: Space, records: Sequence[Mapping[str, Any]]) -> list[FrozenTrial]:
    """Return finished trials in Optuna's form; an impossible value counts as somewhat worse than the worst one of all."""
    optuna = _optuna()
    distributions = {name: _distribution(domain) for name, domain in space.searched.items()}
    worst = [
        max((r["values"][i] for r in records if r["values"][i] is not None), default=0.0) * 1.1 + 1.0
        for i in range(len(records[0]["values"]) if records else 0)
    ]
    return [
        optuna.trial.create_trial(
            params={name: record["params"][name] for name in distributions},
            distributions=distributions,
            values=[bad if v is None else v for v, bad in zip(record["values"], worst, strict=True)],
            system_attrs=dict(record["attrs"]),
            user_attrs={"policy": record["policy"], **({"message": record["message"]} if record.get("message") else {})},
        )
        for record in records
    ]


class Journal:
    """Optuna's journal file of the search: a copy of the trials, made anew where an interrupted run left it behind.

    Parameters
    ----------
    folder : Path
    space : Space
    objectives : sequence of str
        Names of the values.
    records : sequence of mapping
        The trials so far.
    """

    def __init__(self, folder: Path, space: Space, objectives: Sequence[str], records: Sequence[Mapping[str, Any]]) -> None:
        self._space, self._records = space, list(records)
        path, fresh = folder / JOURNAL, folder / f".{JOURNAL}.tmp"
        # A lock that a killed process held would block for half a minute.
        for leftover in (*folder.glob(f"*{JOURNAL}*.lock*"), fresh):
            leftover.unlink(missing_ok=True)
        self._open(fresh, objectives, create=True).add_trials(frozen_trials(space, records))
        fresh.replace(path)
        self._study = self._open(path, objectives, create=False)

    @staticmethod
    def _open(path: Path, objectives: Sequence[str], *, create: bool) -> Study:
        optuna = _optuna()
        storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
        if not create:
            return optuna.load_study(study_name="kvtool", storage=storage)
        study = optuna.create_study(study_name="kvtool", storage=storage, directions=["minimize"] * len(objectives))
        study.set_user_attr("objectives", list(objectives))
        return study

    def add(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Append finished trials."""
        known = len(self._records)
        self._records += records
        self._study.add_trials(frozen_trials(self._space, self._records)[known:])


def _distribution(domain: Domain) -> Any:
    distributions = _optuna().distributions
    if domain.values:
        return distributions.CategoricalDistribution(domain.values)
    if domain.whole:
        step = 1 if domain.log else int(domain.step or 1)
        return distributions.IntDistribution(int(domain.low), int(domain.high), log=domain.log, step=step)
    return distributions.FloatDistribution(domain.low, domain.high, log=domain.log, step=domain.step)


def _optuna() -> Any:
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise MissingDependencyError(NO_OPTUNA) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
