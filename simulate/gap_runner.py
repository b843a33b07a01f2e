"""`kvtool analyze gaps`: a capture in; tables, sentences, gaps.jsonl, gaps.csv, gaps.md and a picture out."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvtool.errors import ConfigError
from kvtool.files import write_text
from kvtool.policies import Policy, expand_policies, refuse_impossible
from kvtool.policies.headfile import check_heads
from kvtool.policies.shapes import SHAPES
from kvtool.policies.text import method_key
from kvtool.policies.when import When
from kvtool.progress import track
from kvtool.simulate.gap_curves import PromptCurves, Ranking, prompt_curves, ranking_of
from kvtool.simulate.gap_rows import Figure, GapRow, ShapeRow, fill_row, start_row
from kvtool.simulate.gap_words import sentences, shape_lines, shape_table, table, table_lines
from kvtool.simulate.gaps import PARTS, Decomposer
from kvtool.simulate.prompts import usable_prompts
from kvtool.simulate.rank import resample_weights
from kvtool.textgrid import save_tables

DEFAULT_POLICIES = ("snapkv", "h2o", "pyramidkv", "cake", "adakv", "lava", "random")


@dataclass(frozen=True, slots=True)
class GapConfig:
    """What is taken apart.

    Attributes
    ----------
    capture : str
        Path of the capture.
    policies : tuple of str
        Text forms; those without a budget are taken at each of `budgets`.
    budgets : tuple of str
    heads : str
        Heads file for the policies that take one and name none.
    shapes : bool
        Also find the best budgets of every shape under each policy's ranking.
    draws : int
        Bootstrap draws.
    seed : int
        Of the bootstrap.
    """

    capture: str
    policies: tuple[str, ...] = DEFAULT_POLICIES
    budgets: tuple[str, ...] = ("2%", "5%", "10%", "20%")
    heads: str = ""
    shapes: bool = False
    draws: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.draws < 10:
            raise ConfigError(f"gaps: draws={self.draws} must be at least 10")


@dataclass(frozen=True, slots=True)
class GapSummary:
    """What was found.

    Attributes
    ----------
    folder : Path
    n_samples : int
    rows : tuple of GapRow
    shapes : tuple of ShapeRow
    sentences : tuple of str
    """

    folder: Path
    n_samples: int
    rows: tuple[GapRow, ...]
    shapes: tuple[ShapeRow, ...]
    sentences: tuple[str, ...]

    def text(self) -> str:
        """Return the tables and sentences that the command prints."""
        blocks = [table(self.rows)]
        remarks = sorted({f"{row.policy}: {row.message}" for row in self.rows if row.message})
        blocks += ["\n".join(remarks)] if remarks else []
        blocks += ["Least harm of every shape of budgets:\n" + shape_table(self.shapes)] if self.shapes else []
        blocks.append("\n".join(self.sentences))
        names = ["gaps.md", "gaps.jsonl", "gaps.csv", *(["shapes.csv"] if self.shapes else []), "gaps.png"]
        blocks.append("\n".join(str(self.folder / name) for name in names))
        return "\n\n".join(blocks)


def run_gaps(config: GapConfig, out: str | Path) -> GapSummary:
    """Take the harm of every configuration apart, and write what was found.

    Parameters
    ----------
    config : GapConfig
    out : path
        Output folder.

    Raises
    ------
    ConfigError
        Unknown policy, one with compensation or moments, or no possible configuration.
    DataError
        Missing or damaged capture, without probes, or that lacks a statistic.
    """
    from kvtool.capture.reader import open_capture
    from kvtool.simulate.gap_plots import plot_gaps

    policies = [p for p in expand_policies(config.policies, config.budgets, heads=config.heads) if not p.method.keeps_all]
    _refuse(policies)
    with open_capture(config.capture) as capture:
        samples = usable_prompts(capture, "gaps")
        check_heads(policies, capture.model)
        refuse_impossible(policies, [sample.seq_len for sample in samples])
        prompts = [prompt_curves(sample, policies) for sample in track(samples, len(samples), "gaps")]
        what = f"{capture.model.model_id}, {capture.config.get('task')}, {len(samples)} prompts"
        title = f"{what}, compressed at the {samples[0].compress_at}"
    decomposer, weights = Decomposer(prompts), resample_weights(len(prompts), config.draws, config.seed)
    rows = sorted(
        (make_row(decomposer, prompts, policies, index, weights) for index in range(len(policies))),
        key=lambda row: (row.retention, row.harm is None, row.harm.mean if row.harm else 0.0),
    )
    shapes = shape_rows(decomposer, prompts, policies) if config.shapes else []
    summary = GapSummary(Path(out), len(prompts), tuple(rows), tuple(shapes), tuple(sentences(rows)))
    _write(summary, title)
    plot_gaps(rows, Path(out) / "gaps.png", title)
    return summary


def _refuse(policies: Sequence[Policy]) -> None:
    if not policies:
        raise ConfigError("gaps: full keeps everything and loses nothing; name policies that drop entries")
    for policy in policies:
        if policy.compensation.active or policy.when != When() or policy.quant.active:
            raise ConfigError(
                f"policy {policy}: gaps are of what is kept of a prompt; leave compensate=, decode=, positions=, chunk= and quant= out "
                "(kvtool analyze compensation explains representatives)"
            )


def make_row(
    decomposer: Decomposer, prompts: Sequence[PromptCurves], policies: Sequence[Policy], index: int, weights: np.ndarray
) -> GapRow:
    """Return the row of one policy."""
    policy, counts = policies[index], []
    shape = policy.method.parts().allocator.budget_shape()
    seq_lens = np.asarray([prompt.seq_len for prompt in prompts], dtype=np.float64)
    message = None
    for prompt in prompts:
        count = prompt.counts[index]
        if isinstance(count, str):
            message = message or count.removeprefix(f"policy {policy}: ")
        else:
            counts.append(count)
    if message is not None:
        asked = np.asarray([policy.asked(prompt.seq_len) for prompt in prompts], dtype=np.float64)
        row = start_row(policy, asked, seq_lens, shape)
        row.status, row.message = "impossible", message
        return row
    row = start_row(policy, np.asarray([count.mean() for count in counts]), seq_lens, shape)
    gaps = decomposer.gaps(ranking_of(policy), counts, shape, prompts[0].kinds[index])
    fill_row(row, gaps, weights)
    return row


def shape_rows(decomposer: Decomposer, prompts: Sequence[PromptCurves], policies: Sequence[Policy]) -> list[ShapeRow]:
    """Return the least harm of every shape, for each ranking and budget once; kinds where a policy knows them."""
    kinds = next((each for each in prompts[0].kinds if each is not None), None)
    named: dict[Ranking, str] = {}
    totals: dict[tuple[Ranking, str], list[int]] = {}
    for index, policy in enumerate(policies):
        counts = [prompt.counts[index] for prompt in prompts]
        if policy.budget is None or any(isinstance(count, str) for count in counts):
            continue
        ranking = ranking_of(policy)
        named.setdefault(ranking, method_key(policy))
        heads = prompts[0].harm[ranking][0].size
        totals.setdefault((ranking, str(policy.budget)), [heads * policy.entries(prompt.seq_len) for prompt in prompts])
    found = []
    for (ranking, budget), asked in track(list(totals.items()), len(totals), "shapes"):
        yardstick = decomposer.yardstick(ranking)
        total = yardstick.reference_total(asked)
        best = {shape: yardstick.best(total, shape, kinds).budgets for shape in SHAPES if shape != "kinds" or kinds is not None}
        harm: dict[str, float] = {
            shape: float(yardstick.harms(yardstick.scaled(budgets, asked)).mean()) for shape, budgets in best.items()
        }
        retention = float(
            np.mean([n / prompts[0].harm[ranking][0].size / p.seq_len for n, p in zip(asked, prompts, strict=True)])
        )
        found.append(ShapeRow(named[ranking], budget, retention, harm))
    return sorted(found, key=lambda row: (row.retention, row.harm["free"]))


def _write(summary: GapSummary, title: str) -> None:
    folder = summary.folder
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "gaps.jsonl", "".join(json.dumps(row.to_json(), ensure_ascii=False) + "\n" for row in summary.rows))
    tables = [("", table_lines(summary.rows))]
    if summary.shapes:
        write_text(
            folder / "shapes.csv", _csv([{**row.to_json(), "harm": None, **row.harm} for row in summary.shapes], ("harm",))
        )
        tables.append(("Least harm of every shape of budgets", shape_lines(summary.shapes)))
    data = _csv([flat_row(row) for row in summary.rows])
    save_tables(folder, "gaps", f"Gaps to the oracle: {title}", tables, data, summary.sentences)


def flat_row(row: GapRow) -> dict[str, Any]:
    """Return a row of the CSV file: means, and intervals as `_low` and `_high`."""
    names = ("policy", "budget", "retention", "entries", "shape", "status", "adapts", "degenerate", "scaled", "slack")
    flat: dict[str, Any] = {name: getattr(row, name) for name in names}
    figures: dict[str, Figure | None] = {"harm": row.harm, "oracle": row.oracle, "loss": row.loss}
    for part in PARTS:
        figures[part] = row.parts.get(part)
    for name, found in figures.items():
        flat[name] = None if found is None else found.mean
        flat[f"{name}_low"] = None if found is None else found.low
        flat[f"{name}_high"] = None if found is None else found.high
    return flat | {"explained_by": " ".join(row.explains)}


def _csv(rows: Sequence[dict[str, Any]], without: Sequence[str] = ()) -> str:
    buffer = io.StringIO()
    names = [name for name in dict.fromkeys(key for row in rows for key in row) if name not in without]
    writer = csv.DictWriter(buffer, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
