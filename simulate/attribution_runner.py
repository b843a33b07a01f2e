"""`kvtool analyze compensation`: a capture in; tables, words, compensation.json, heads.csv and two pictures out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvtool.errors import ConfigError
from kvtool.files import write_json
from kvtool.policies import Policy, expand_policies
from kvtool.policies.compensation import Compensation
from kvtool.policies.headfile import check_heads
from kvtool.policies.when import When
from kvtool.progress import track
from kvtool.simulate.attribution_rows import MEASURES, Row, make_row, real_figures
from kvtool.simulate.attribution_sample import WEIGHTED, SampleCells, possible, sample_cells
from kvtool.simulate.attribution_words import accuracy_table, help_table, paragraph, real_table, table
from kvtool.simulate.curves import Float
from kvtool.simulate.evaluate import sample_table
from kvtool.simulate.prompts import usable_prompts
from kvtool.simulate.rank import resample_weights
from kvtool.textgrid import Lines, grid, save_tables

if TYPE_CHECKING:
    from kvtool.capture.reader import Capture, CapturedSample
    from kvtool.models import LoadedModel

SCHEMA = "kvtool.compensation/1"
DEFAULT_POLICIES = ("snapkv",)
DEFAULT_BLOCKS = ("16", "32", "64", "full")
#: Budgets and blocks that the command says sentences about; the others are in compensation.md.
SAID = 8
FILES = ("compensation.json", "compensation.md", "heads.csv", "causes.png", "heads.png")

#: One budget of one method with one block size.
Key = tuple[Policy, str]


@dataclass(frozen=True, slots=True)
class AttributionConfig:
    """What is attributed.

    Attributes
    ----------
    capture : str
        Path of the capture.
    policies : tuple of str
        Text forms without compensation; those without a budget are taken at each of `budgets`.
    budgets : tuple of str
    blocks : tuple of str
        Evicted entries per representative, or ``full``.
    heads : str
        Heads file for the policies that take one and name none.
    measure : str
        What losses and causes are counted in: ``"margin"`` (signed) or ``"harm"`` (lost margins only).
    refine : bool
        Also run every counterfactual as a masked forward of the answer.
    draws : int
        Bootstrap draws.
    seed : int
        Of the bootstrap.
    """

    capture: str
    policies: tuple[str, ...] = DEFAULT_POLICIES
    budgets: tuple[str, ...] = ("5%", "10%")
    blocks: tuple[str, ...] = DEFAULT_BLOCKS
    heads: str = ""
    measure: str = "margin"
    refine: bool = False
    draws: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.draws < 10:
            raise ConfigError(f"compensation: draws={self.draws} must be at least 10")
        if self.measure not in MEASURES:
            raise ConfigError(f"compensation: measure={self.measure!r} is unknown; there are {', '.join(MEASURES)}")
        if not self.blocks:
            raise ConfigError("compensation: no block size; give some such as 32,64,full")
        for block in self.blocks:
            Compensation(compensate="mean", block=block)


@dataclass(frozen=True, slots=True)
class AttributionSummary:
    """What an attribution found.

    Attributes
    ----------
    folder : Path
    n_samples : int
    notes : tuple of str
        What the figures leave out or take for granted.
    rows : tuple of Row
    """

    folder: Path
    n_samples: int
    notes: tuple[str, ...]
    rows: tuple[Row, ...]

    def text(self, said: int | None = SAID) -> str:
        """Return tables and sentences; of `said` rows only, None: of all."""
        able = [row for row in self.rows if row.message is None]
        cost = MEASURES[able[0].measure]
        shown = [row for row in self.rows if row.message is not None] + able[:said]
        parts = [
            f"Predicted {cost}: evicting alone, with the slots left empty, and with plain means in them. What these cost is the sum of "
            "four causes.",
            grid(*table(self.rows)),
            "Means with ln n, and means weighted by observed attention with their entropy, against evicting alone. Heads that a gate "
            "lets through get representatives, the others real entries.",
            grid(*help_table(self.rows)),
        ]
        if any(row.real for row in self.rows):
            parts += [
                "The same for real: answer nll by masked forwards, all layers together; its causes add up to what the plain mean costs "
                "above the full cache. Last: how many of the differences that are sure have the predicted direction.",
                grid(*real_table(self.rows)),
                "Accuracy of the answer's tokens in the same forwards:",
                grid(*accuracy_table(self.rows)),
            ]
        parts += [paragraph(row) for row in shown]
        if said is not None and len(able) > said:
            parts.append(f"{len(able) - said} more in {self.folder / 'compensation.md'}")
        parts += [*self.notes, "\n".join(str(self.folder / name) for name in FILES)]
        return "\n\n".join(part for part in parts if part)

    def tables(self) -> list[tuple[str, Lines]]:
        """Return heading and table of each part."""
        found = [("What the plain mean costs, and why", table(self.rows)), ("What its remedies change", help_table(self.rows))]
        if any(row.real for row in self.rows):
            found += [
                ("The same for real: answer nll", real_table(self.rows)),
                ("The same for real: accuracy", accuracy_table(self.rows)),
            ]
        return found


def run_attribution(config: AttributionConfig, out: str | Path, loaded: LoadedModel | None = None) -> AttributionSummary:
    """Attribute the loss of compensation at every budget and block size.

    Parameters
    ----------
    config : AttributionConfig
    out : path
        Output folder.
    loaded : LoadedModel, optional
        Needed to refine.

    Raises
    ------
    ConfigError
        Unknown policy, one with a compensation or with eviction while decoding, or nothing that is possible.
    DataError
        Missing or damaged capture, a statistic that it lacks, prompts that differ in their compressible layers, or another model.
    """
    from kvtool.capture.reader import open_capture

    if config.refine and loaded is None:
        raise ConfigError("compensation: refining needs the captured model; give it, or leave --refine out")
    policies = expand_policies(config.policies or DEFAULT_POLICIES, config.budgets, heads=config.heads)
    _refuse(policies)
    with open_capture(config.capture) as capture:
        check_heads(policies, capture.model)
        if config.refine and loaded is not None:
            capture.check_model(loaded.info)
        samples = usable_prompts(capture, "compensation")
        keys = [(policy, block) for policy in policies for block in dict.fromkeys(config.blocks)]
        reasons = _impossible(samples, policies, tuple(dict.fromkeys(config.blocks)))
        able = [key for key in keys if reasons[key] is None]
        if not able:
            raise ConfigError(str(next(iter(reasons.values()))))
        found, floored = _cells(samples, able)
        weights = resample_weights(len(samples), config.draws, config.seed)
        layers = np.flatnonzero(samples[0].compressible).tolist()
        rows: dict[Key, Row] = {}
        for key in keys:
            policy, block = str(key[0]), key[1]
            if reasons[key] is not None:
                rows[key] = Row(policy, block, reasons[key])
            else:
                rows[key] = make_row(policy, block, *found[key], layers, weights, config.measure)
        if config.refine and loaded is not None:
            nll, accuracy = run_states(loaded, samples, able)
            for n, key in enumerate(able):
                rows[key].real = real_figures(nll[:, n], accuracy[:, n], rows[key].cost, weights)
        notes = _notes(capture, list(rows.values()), floored)
        what = _provenance(config, capture, len(samples))
    summary = AttributionSummary(Path(out), len(samples), tuple(notes), tuple(rows.values()))
    _write(summary, what)
    return summary


def _refuse(policies: Sequence[Policy]) -> None:
    for policy in policies:
        if policy.compensation.active:
            raise ConfigError(f"policy {policy} has a compensation already; leave compensate= out, all kinds are compared")
        if policy.when != When():
            raise ConfigError(
                f"policy {policy} evicts while decoding or in chunks, where compensation is not possible; leave that out"
            )
        if policy.quant.active:
            raise ConfigError(f"policy {policy}: what stands for evicted entries is compared unquantized; leave quant= out")
        if policy.method.keeps_all:
            raise ConfigError(f"policy {policy} evicts nothing; give one that does, such as snapkv")


def _impossible(samples: Sequence[CapturedSample], policies: Sequence[Policy], blocks: Sequence[str]) -> dict[Key, str | None]:
    """Return why a budget and block size is impossible in some prompt; prompts of one length are asked once."""
    reasons: dict[Key, str | None] = {(policy, block): None for policy in policies for block in blocks}
    asked: set[int] = set()
    for sample in samples:
        # Room for slots depends on the length, and on the prompt only where a method's own rule shares out the budget.
        if sample.seq_len in asked and all(policy.method.exact for policy in policies):
            continue
        asked.add(sample.seq_len)
        for key, reason in possible(policies, blocks, sample).items():
            reasons[key] = reasons[key] or reason
    return reasons


def _cells(samples: Sequence[CapturedSample], able: Sequence[Key]) -> tuple[dict[Key, tuple[list[SampleCells], int]], float]:
    """Compute all prompts, the cells of one scorer together; also the mean share of attention below the file's precision."""
    groups: dict[Any, list[Key]] = {}
    for key in able:
        parts = key[0].method.parts()
        groups.setdefault((parts.scorer, parts.selector), []).append(key)
    by_group: dict[Any, list[SampleCells]] = {group: [] for group in groups}
    for sample in track(samples, len(samples), "compensation"):
        shared = sample_table(sample)
        for group, members in groups.items():
            by_group[group].append(sample_cells(sample, members, shared))
    found = {key: (by_group[group], n) for group, members in groups.items() for n, key in enumerate(members)}
    return found, float(np.mean([cells.floored for cells in next(iter(by_group.values()))]))


def run_states(loaded: LoadedModel, samples: Sequence[CapturedSample], cells: Sequence[Key]) -> tuple[Float, Float]:
    """Run every state of every cell on every prompt as a masked forward.

    Parameters
    ----------
    loaded : LoadedModel
    samples : sequence of S CapturedSample
    cells : sequence of N (Policy, str)

    Returns
    -------
    nll, accuracy : ndarray of shape (S, N, WEIGHTED + 2)
        Of the answer; last, with the full cache.
    """
    from kvtool.simulate.attribution_refine import refine_states

    figures = []
    for sample in track(samples, len(samples), "refine"):
        whole, found = refine_states(loaded, sample, cells, range(WEIGHTED + 1))
        figures.append([[(state.nll, state.accuracy) for state in [*states, whole]] for states in found])
    nll, accuracy = np.moveaxis(np.asarray(figures), -1, 0)
    return nll, accuracy


def _notes(capture: Capture, rows: Sequence[Row], floored: float) -> list[str]:
    notes = []
    if floored:
        notes.append(f"{floored:.1%} of the captured attention is below the file's precision and taken as its smallest number.")
    without = list(dict.fromkeys(row.block for row in rows if row.message is None and not row.gates))
    if without:
        names = ", ".join(f"block_variance/{block}" for block in without)
        notes.append(
            f"No gate is suggested where capture {capture.path} has no {names}; capture again with that among the statistics."
        )
    if not any(row.real for row in rows):
        notes.append(
            "All of this is to first order, each head on its own; --refine adds what all of them do together. docs/compensation.md says "
            "where the two differ."
        )
    return notes


def _provenance(config: AttributionConfig, capture: Capture, n_samples: int) -> dict[str, Any]:
    from importlib.metadata import version

    keys = ("task", "length", "seed")
    return {
        "schema": SCHEMA,
        "capture": {"path": str(capture.path), **{key: capture.config.get(key) for key in keys}},
        "compress_at": capture.samples[0].compress_at,
        "prompts": n_samples,
        "model": {"model_id": capture.model.model_id, "fingerprint": capture.model.fingerprint},
        "measure": config.measure,
        "draws": config.draws,
        "seed": config.seed,
        "versions": {name: version(name) for name in ("numpy", "torch")},
    }


def _write(summary: AttributionSummary, what: dict[str, Any]) -> None:
    from kvtool.simulate.attribution_plots import plot_causes, plot_heads, write_causes, write_heads

    folder, rows = summary.folder, summary.rows
    write_json(folder / "compensation.json", {**what, "notes": list(summary.notes), "rows": [row.to_json() for row in rows]})
    title = f"{what['model']['model_id']}, {what['capture']['task']}, {summary.n_samples} prompts"
    page = f"# Compensation: {title}\n\n```\n{summary.text(said=None)}\n```\n"
    write_causes(rows, folder / "causes.csv")
    data = (folder / "causes.csv").read_text(encoding="utf-8") if (folder / "causes.csv").exists() else None
    save_tables(folder, "compensation", f"Compensation: {title}", summary.tables(), data, summary.notes, page)
    write_heads(rows, folder / "heads.csv")
    plot_causes(rows, folder / "causes.png", title)
    plot_heads(rows, folder / "heads.png", title)
