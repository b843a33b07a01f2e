"""The consistency of a run as files: consistency.json, .csv, .md, and the review sheet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kvtool.analysis.consistency import RIGHT_FROM, ConsistencyRow, answer_pairs, consistency, find_policy
from kvtool.analysis.controls import check_comparable
from kvtool.analysis.load import Reality, load_reality
from kvtool.analysis.look_figures import consistency_figure
from kvtool.analysis.plain import columns, csv_text, ends, finite
from kvtool.analysis.resampling import DRAWS, Documents
from kvtool.analysis.review import choose, read_prompts, review_csv, review_page
from kvtool.analysis.statistics import Interval
from kvtool.files import write_json, write_text
from kvtool.textgrid import grid, save_tables

SCHEMA = "kvtool.consistency/1"
HEADER = ["policy", "kept", "n", "exact (95 %)", "token F1 (95 %)", "edit similarity (95 %)", "diverges at"]
FLIPS = ["right→wrong (95 %)", "wrong→right (95 %)", "p"]


@dataclass(frozen=True, slots=True)
class ConsistencySummary:
    """What the comparison of a run's answers found.

    Attributes
    ----------
    folder : Path
    reference : str
    rows : tuple of ConsistencyRow
    n_pairs, n_shown, n_flips : int
        Answers compared; on the page; that turned right or wrong.
    notes : tuple of str
    """

    folder: Path
    reference: str
    rows: tuple[ConsistencyRow, ...]
    n_pairs: int
    n_shown: int
    n_flips: int
    notes: tuple[str, ...]

    def text(self) -> str:
        """Return what the command prints."""
        sheet = f"{self.n_pairs} answers, {self.n_flips} flips; {self.n_shown} of them in {self.folder / 'review.html'}"
        return "\n".join([grid(*table(self.rows)), "", *self.notes, sheet])


def run_consistency(
    run: Path,
    out: Path,
    reference: str = "full",
    right_from: float = RIGHT_FROM,
    shown: int = 300,
    draws: int = DRAWS,
    seed: int = 0,
) -> ConsistencySummary:
    """Compare every policy's answers with the full cache's and write tables and the review sheet.

    Parameters
    ----------
    run : Path
        Folder of an infer run.
    out : Path
    reference : str
        The policy that the others are compared with.
    right_from : float
        Score from which on an answer is right.
    shown : int
        Most pairs on the page.
    draws, seed : int
        Of the intervals, and the seed of the pairs that are shown.

    Raises
    ------
    ConfigError
        The reference is no policy of the run, or its records mix settings.
    DataError
        Missing or damaged run, or one without generated answers.
    """
    reality = load_reality(run)
    check_comparable([reality])
    name = find_policy(reality, reference)
    pairs = answer_pairs(reality, name, right_from)
    rows = consistency(reality, pairs, name, right_from, draws, seed)
    chosen, prompts = choose(pairs, shown, seed), read_prompts(run)
    notes = _notes(reality, rows, name, right_from, bool(prompts), any(pair.score is not None for pair in pairs))
    summary = ConsistencySummary(
        out, name, tuple(rows), len(pairs), len(chosen), sum(bool(pair.flip) for pair in pairs), tuple(notes)
    )
    save_tables(out, "consistency", f"Consistency with {name}", [("", table(rows))], csv_of(rows), notes)
    write_text(out / "review.csv", review_csv(pairs, prompts))
    write_text(out / "review.html", review_page(chosen, prompts, _facts(reality, name), len(pairs), seed))
    settings = {"right_from": right_from, "draws": draws, "seed": seed, "reference": name}
    run_facts = {"folder": str(run), "config": reality.config, "n_samples": len(reality.samples)}
    found = {"schema": SCHEMA, "run": run_facts, **settings, "rows": [asdict(row) for row in rows], "notes": notes}
    write_json(out / "consistency.json", finite(found))
    if (drawn := consistency_figure(rows, name)) is not None:
        drawn.save(out)
    return summary


def table(rows: Sequence[ConsistencyRow]) -> tuple[list[str], list[list[str]]]:
    """Return one line per policy; flips only where there are gold answers."""
    scored = any(row.lost for row in rows)
    lines = []
    for row in rows:
        kept = "-" if row.retention is None else f"{100 * row.retention:.1f}%"
        cells = [row.policy, kept, str(row.n), *(_text(i) for i in (row.exact, row.f1, row.similarity))]
        cells.append("-" if row.divergence is None else f"{row.divergence:g}")
        if scored:
            cells += [_count(row.n_lost, row.lost), _count(row.n_won, row.won), "-" if row.p is None else f"{row.p:.3g}"]
        lines.append([*cells, _remark(row)])
    return [*HEADER, *(FLIPS if scored else []), "note"], lines


def _remark(row: ConsistencyRow) -> str:
    notes = ["degenerate"] if row.degenerate else []
    return ", ".join(notes + ([f"{row.n_missing} without an answer"] if row.n_missing else []))


def _text(value: Interval | None) -> str:
    return "-" if value is None else value.text()


def _count(n: int, share: Interval | None) -> str:
    return "-" if share is None else f"{n}: {share.text()}"


def _notes(
    reality: Reality, rows: Sequence[ConsistencyRow], name: str, right_from: float, has_prompts: bool, scored: bool
) -> list[str]:
    n_documents = Documents.named([r.get("document", r["sample"]) for r in reality.of(name)]).n
    notes = [
        f"compared with {name}; exact: all tokens equal; diverges at: median tokens before the first difference, where there is one"
    ]
    if scored:
        n_right = max((row.n_right for row in rows), default=0)
        notes.append(f"right: score from {right_from:g} on; {name} is right on {n_right} of {len(reality.of(name))} samples")
        notes.append("p: are both sorts of flips equally likely? Not corrected for the number of policies")
    else:
        notes.append("there are no gold answers, so there is no right and wrong: agreement only")
    if n_documents < len(reality.samples):
        notes.append(f"{len(reality.samples)} samples of {n_documents} documents: intervals resample documents")
    if not has_prompts:
        notes.append("this run stored no prompt ends (made by an earlier version): the sheet shows answers only")
    return notes + [row.message for row in rows if not row.n and row.message]


def _facts(reality: Reality, name: str) -> list[tuple[str, str]]:
    config, model = reality.config, reality.provenance.get("model", {})
    decoding = reality.provenance.get("decoding", {"strategy": "greedy"})
    return [
        ("Model", f"{model.get('model_id')}, {config.get('dtype')}"),
        ("Task", f"{config.get('task')}, {len(reality.samples)} samples"),
        ("Decoding", ", ".join(f"{key} {value}" if key != "strategy" else str(value) for key, value in decoding.items())),
        ("The policy sees", "context and question" if config.get("compress_at") == "prompt" else "the context only"),
        ("Compared with", name),
    ]


def csv_of(rows: Sequence[ConsistencyRow]) -> str:
    """Return the rows as CSV."""
    spread = ("exact", "f1", "similarity", "prefix", "lost", "won")
    plain = [name for name in ConsistencyRow.__dataclass_fields__ if name not in spread]
    lines = []
    for row in rows:
        cells = [getattr(row, name) for name in plain]
        lines.append(cells + [cell for name in spread for cell in ends(getattr(row, name))])
    return csv_text([*plain, *columns(spread)], lines)
