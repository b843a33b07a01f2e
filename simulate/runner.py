"""The simulate stage: a capture in, ranking.jsonl, shortlist.yaml and ranking.png out; resumes sample by sample."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvtool.calibration import Calibration, Where, read_calibration
from kvtool.errors import ConfigError, DataError
from kvtool.files import append_records, config_hash, open_run, read_records, write_text
from kvtool.policies import Policy, expand_policies, refuse_impossible
from kvtool.policies.headfile import check_heads
from kvtool.progress import say, track
from kvtool.simulate.evaluate import Prediction
from kvtool.simulate.rank import Row, rank_rows, resample_weights
from kvtool.simulate.workers import evaluate_samples

if TYPE_CHECKING:
    from kvtool.capture.reader import Capture
    from kvtool.models import LoadedModel

DEFAULT_BUDGETS = ("2%", "5%", "10%", "20%", "50%")
#: rows of one budget that the command prints; the control and impossible ones come on top
SHOWN = 10


@dataclass(frozen=True, slots=True)
class SimulateConfig:
    """What a simulation does; together with the capture it decides the result.

    Attributes
    ----------
    capture : str
        Path of the capture.
    policies : tuple of str
        Text forms; those without a budget are taken at each of `budgets`. Empty: every registered method.
    budgets : tuple of str
    heads : str
        Heads file for the policies that take one and name none.
    refine : int
        Configurations that get a masked teacher-forced forward, the best ones of every budget in turn.
    draws : int
        Bootstrap draws.
    seed : int
        Of the bootstrap.
    calibration : str
        File of `kvtool analyze calibrate`; the ranking then goes by the accuracy that it predicts.
    shortlist_cap : int or None
        At most so many configurations per budget on the shortlist; None: all that are not clearly dominated.
    jobs : int
        Processes; 0: one per core, see `kvtool.simulate.workers.evaluate_samples`. No part of the result.
    """

    capture: str
    policies: tuple[str, ...] = ()
    budgets: tuple[str, ...] = DEFAULT_BUDGETS
    heads: str = ""
    refine: int = 0
    draws: int = 1000
    seed: int = 0
    calibration: str = ""
    shortlist_cap: int | None = None
    jobs: int = 1

    def __post_init__(self) -> None:
        for name, low in (("refine", 0), ("draws", 10), ("shortlist_cap", 1)):
            if (value := getattr(self, name)) is not None and value < low:
                raise ConfigError(f"simulate: {name}={getattr(self, name)} must be at least {low}")


@dataclass(frozen=True, slots=True)
class SimulateSummary:
    """What a simulation left.

    Attributes
    ----------
    folder : Path
    n_samples, n_configurations, n_impossible, n_shortlisted, n_refined : int
    rows : tuple of Row
    n_cut : int
        Configurations that only the shortlist's cap left out.
    calibrated : str
        What the calibration knows of these configurations; empty without one.
    n_one_token : int
        Prompts whose answer is predicted before anything is dropped: risk 0 under every policy, no recall.
    """

    folder: Path
    n_samples: int
    n_configurations: int
    n_impossible: int
    n_shortlisted: int
    n_refined: int
    rows: tuple[Row, ...]
    n_cut: int = 0
    calibrated: str = ""
    n_one_token: int = 0

    def text(self) -> str:
        """Return the table that the command prints: the best configurations of each budget."""
        from kvtool.textgrid import figure, grid

        calibrated = any(row.predicted is not None for row in self.rows)
        lines, places, remarks, hidden = [], Counter[str | None](), dict[str, int](), 0
        for row in self.rows:
            places[row.budget] += 1
            if places[row.budget] > SHOWN and row.status == "ok" and not (row.shortlisted and row.method.startswith("random")):
                hidden += row.shortlisted
                continue
            interval = "-" if row.risk is None else f"{row.risk_low:.2f}-{row.risk_high:.2f}"
            notes = [
                name
                for name, on in (("Pareto", row.pareto), ("degenerate", row.degenerate), ("yardstick", row.yardstick))
                if on
            ]
            notes += [row.status] if row.status != "ok" else []
            notes += ["drops nothing"] if row.budget is not None and row.status == "ok" and row.retention >= 1 else []
            if text := (row.note or row.message or "").removeprefix(f"policy {row.policy}: "):
                remarks.setdefault(text, len(remarks) + 1)
                notes.append(f"({remarks[text]})")
            notes += [f"refined nll {row.refined['nll']:.3f}"] if row.refined else []
            mark = "*" if row.shortlisted else ""
            cells = [
                row.policy,
                f"{100 * row.retention:.2f}%",
                "-" if row.rank is None else str(row.rank),
                mark,
                figure(row.risk, 2),
            ]
            accuracy = (
                "-" if row.predicted is None else f"{row.predicted:.2f} ({row.predicted_low:.2f}-{row.predicted_high:.2f})"
            )
            lines.append(
                [*cells, interval, *([accuracy] * calibrated), figure(row.harm, 2), figure(row.recall, 3), ", ".join(notes)]
            )
        header = ["policy", "kept", "rank", "short", "risk", "95 %", *(["accuracy"] * calibrated), "harm", "recall", "note"]
        table = grid(header, lines)
        note = f"{self.n_configurations} configurations on {self.n_samples} prompts; {self.n_shortlisted} shortlisted (*)"
        note += f", {self.n_cut} as close left out by the cap" if self.n_cut else ""
        note += f"; {self.n_impossible} impossible" if self.n_impossible else ""
        said = [self.calibrated] if self.calibrated else []
        if self.n_one_token:
            said += [
                f"{self.n_one_token} of {self.n_samples} prompts have an answer of one token, predicted before anything is dropped: "
                "risk 0 under every policy, and no recall (-); capture with --compress-at context to judge them"
            ]
        among = f" ({hidden} of them shortlisted)" if hidden else ""
        note += f"; {len(self.rows) - len(lines)} more{among} in ranking.jsonl" if len(lines) < len(self.rows) else ""
        files = [str(self.folder / name) for name in ("ranking.jsonl", "shortlist.yaml", "ranking.png")]
        return "\n".join([table, "", note, *said, *(f"({number}) {text}" for text, number in remarks.items()), *files])


def run_simulate(config: SimulateConfig, out: str | Path, loaded: LoadedModel | None = None) -> SimulateSummary:
    """Rank all configurations on a capture; stopped at any moment, the same call continues.

    Parameters
    ----------
    config : SimulateConfig
    out : path
        Output folder.
    loaded : LoadedModel, optional
        Needed to refine.

    Raises
    ------
    ConfigError
        Unknown policy, or the folder holds another simulation.
    DataError
        Missing or damaged capture, a statistic that it lacks, or the capture of another model.
    """
    from kvtool.capture.reader import open_capture
    from kvtool.simulate.plots import plot_ranking
    from kvtool.simulate.shortlist import make_shortlist, write_shortlist

    folder, policies = Path(out), expand_policies(config.policies, config.budgets, heads=config.heads)
    calibration = read_calibration(config.calibration) if config.calibration else None
    if config.refine and loaded is None:
        raise ConfigError("simulate: refining needs the captured model; give it, or refine=0")
    with open_capture(config.capture) as capture:
        if not capture.samples:
            raise DataError(f"capture {config.capture} holds no complete sample; run the capture again, it continues")
        if config.refine and loaded is not None:
            capture.check_model(loaded.info)
        if not config.policies:
            policies = _servable(capture, policies)
        refuse_impossible(policies, [sample.seq_len for sample in capture.samples])
        _check_statistics(capture, policies)
        identity = run_identity(config, capture, policies)
        open_run(folder, identity, {"capture": config.capture, **_versions(), "samples": [s.id for s in capture.samples]})
        predictions = _predict(capture, policies, folder / "predictions.jsonl", config.jobs)
        weights = resample_weights(len(capture.samples), config.draws, config.seed)
        n_compressible = [sum(s.compressible) for s in capture.samples]
        where = _where(capture, identity)
        rows = rank_rows(policies, predictions, capture.model, n_compressible, weights, calibration, where)
        shortlist = make_shortlist(rows, weights, config.shortlist_cap, calibration.gap_width if calibration else 0.0)
        n_refined = _refine(config, capture, loaded, rows, folder / "refined.jsonl") if loaded is not None else 0
        title = f"{capture.model.model_id}, {capture.config.get('task')}, {len(capture.samples)} prompts"
        n_one_token = sum(sample.n_probe == 0 for sample in capture.samples)
    write_text(folder / "ranking.jsonl", "".join(json.dumps(row.to_json(), ensure_ascii=False) + "\n" for row in rows))
    write_shortlist(folder / "shortlist.yaml", shortlist, {"capture": identity["capture"], "run": config_hash(identity)})
    plot_ranking(rows, folder / "ranking.png", title)
    n_impossible = sum(row.status == "impossible" for row in rows)
    n_cut = sum(map(len, shortlist.cut.values()))
    said = _said_of(calibration, where, rows) if calibration is not None else ""
    counts = (len(predictions), len(rows), n_impossible, len(shortlist.entries), n_refined)
    return SimulateSummary(folder, *counts, tuple(rows), n_cut, said, n_one_token)


def _where(capture: Capture, identity: dict[str, Any]) -> Where:
    """Return what the samples are of, for a calibration."""
    length = sum(sample.seq_len for sample in capture.samples) / len(capture.samples)
    task = str(capture.config.get("task"))
    return Where(capture.model.fingerprint, capture.samples[0].compress_at, task, length, identity.get("heads", {}))


def _said_of(calibration: Calibration, where: Where, rows: Sequence[Row]) -> str:
    """Return what a calibration knows of these rows, in a line."""
    able = [row for row in rows if row.status == "ok"]
    known, own = len(able), sum(row.confirmed for row in able)
    here = {source.get("model") for source in calibration.sources}
    if where.model not in here:
        return "accuracy: by the calibration's curve alone, which was fitted on runs of another model"
    if own == known:
        return f"accuracy: errors of confirmed runs carried over for all {known} configurations"
    if own:
        rest = "the others by the curve and its level"
        return f"accuracy: errors of confirmed runs carried over for {own} of {known} configurations, {rest}"
    return "accuracy: by the calibration's curve; no confirmed run has these policies in this query mode, kind and length of prompts"


def run_identity(config: SimulateConfig, capture: Capture, policies: Sequence[Policy]) -> dict[str, Any]:
    """Return everything that decides the result; capture and heads files by their content, not by their path."""
    heads = check_heads(policies, capture.model)
    samples = [[s.id, s.seq_len, config_hash({"prompt": list(s.prompt_ids)})] for s in capture.samples]
    return {
        "capture": config_hash({"config": capture.config, "samples": samples}),
        "model": asdict(capture.model),
        "task": capture.config.get("task"),
        "length": capture.config.get("length"),
        "n": len(capture.samples),
        "prompt_seed": capture.config.get("seed"),
        "compress_at": capture.samples[0].compress_at,
        "policies": [str(policy) for policy in policies],
        **({"heads": heads} if heads else {}),
        "refine": config.refine,
        "draws": config.draws,
        "seed": config.seed,
        **({"calibration": config_hash(asdict(read_calibration(config.calibration)))} if config.calibration else {}),
        **({"shortlist_cap": config.shortlist_cap} if config.shortlist_cap else {}),
    }


def _servable(capture: Capture, policies: Sequence[Policy]) -> list[Policy]:
    """Leave out of the default what this capture cannot serve, and say so; what was asked for by name is refused instead."""
    lacking: dict[str, str] = {}
    for policy in policies:
        try:
            _check_statistics(capture, [policy])
        except (DataError, ConfigError) as error:
            lacking.setdefault(policy.method.name, str(error))
    if lacking:
        say(f"simulate: without {', '.join(lacking)}: {next(iter(lacking.values()))}")
    return [policy for policy in policies if policy.method.name not in lacking]


def _check_statistics(capture: Capture, policies: Sequence[Policy]) -> None:
    """Refuse what the file cannot serve before a folder is claimed: the mended request may then use the same folder."""
    for name in sorted({name for policy in policies for name in policy.needs()}):
        capture.samples[0].selection(name, 0)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("numpy", "torch")}


def _predict(capture: Capture, policies: Sequence[Policy], path: Path, jobs: int) -> list[list[Prediction]]:
    """Predict every sample, one record each as it is done."""
    done = {record["sample"]: record["predictions"] for record in read_records(path)}
    left = [sample for sample in capture.samples if sample.id not in done]
    work = evaluate_samples(capture, left, policies, jobs)
    for sample, predictions in track(work, len(capture.samples), "simulate", len(capture.samples) - len(left)):
        record = {"sample": sample.id, "predictions": [p.to_json() for p in predictions]}
        append_records(path, [record])
        done[sample.id] = record["predictions"]
    return [[Prediction(**p) for p in done[sample.id]] for sample in capture.samples]


def choose_for_refinement(rows: Sequence[Row], n: int) -> list[Row]:
    """Return the best `n` configurations, taken from every budget in turn by rank."""
    able = [row for row in rows if row.status == "ok" and row.budget is not None and not row.yardstick]
    place: dict[str | None, int] = {}
    keyed = []
    for row in sorted(able, key=lambda row: (row.rank or 0, row.policy)):
        place[row.budget] = place.get(row.budget, -1) + 1
        keyed.append((place[row.budget], row.retention, row))
    return [row for *_, row in sorted(keyed, key=lambda item: item[:2])[:n]]


def _refine(config: SimulateConfig, capture: Capture, loaded: LoadedModel | None, rows: Sequence[Row], path: Path) -> int:
    """Refine the best rows on every sample, one record per sample as it is done; fills ``Row.refined``."""
    from kvtool.simulate.refine import Refined, refine_sample

    chosen = choose_for_refinement(rows, config.refine)
    if not chosen or loaded is None:
        return 0
    policies = [Policy.parse(row.policy) for row in chosen]
    done = {record["sample"]: record["refined"] for record in read_records(path)}
    left = [sample for sample in capture.samples if sample.id not in done]
    for sample in track(left, len(capture.samples), "refine", len(capture.samples) - len(left)):
        record = {"sample": sample.id, "refined": [asdict(r) for r in refine_sample(loaded, sample, policies)]}
        append_records(path, [record])
        done[sample.id] = record["refined"]
    for index, row in enumerate(chosen):
        per_sample = {name: [float(done[s.id][index][name]) for s in capture.samples] for name in Refined.__dataclass_fields__}
        row.refined = {**{name: float(np.mean(values)) for name, values in per_sample.items()}, "per_sample": per_sample}
    return len(chosen)
