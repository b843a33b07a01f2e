"""Perplexity of a run folder: one row per policy with intervals, paired with the full cache; effective context; loss by position.

Shapes: S segments, C clusters (texts, or segments where there is one text only), D bootstrap draws.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtool.analysis.points import most_entries
from kvtool.analysis.statistics import Interval, percentile_interval
from kvtool.bootstrap import bootstrap_weights
from kvtool.errors import DataError
from kvtool.executors.records import read_units
from kvtool.files import read_run, write_json, write_text
from kvtool.policies.base import Policy
from kvtool.policies.names import study_names
from kvtool.textgrid import figure, grid, save_tables

Float = NDArray[np.float64]

SCHEMA, FULL, DRAWS = "kvtool.perplexity/1", "full", 2000


@dataclass(frozen=True, slots=True)
class PerplexityRow:
    """One policy over all segments.

    Attributes
    ----------
    policy, method : str
        As asked for; as it ran, without its budget.
    study : str
        Names that studies have for it; empty where none has.
    status, message : str, str or None
        ``"ok"``, or why a segment has no result; then there are no figures.
    n_segments, n_tokens : int
        What was counted.
    entries : float or None
        Context held: mean entries per KV head at the end of the segments, sink and window included; of lazy eviction the capacity
        that fills up between cuts, see `kvtool.analysis.points.most_entries`.
    perplexity, accuracy : Interval or None
        exp of the mean loss over all counted tokens; share of tokens that are the most likely ones.
    ratio, accuracy_change : Interval or None
        Perplexity over the full cache's, and accuracy minus its, on the same tokens.
    excess : float or None
        Loss above the full cache's, nats per token: log of the ratio.
    kv_share : float or None
        Bytes of the entries held at the end over those of all tokens.
    how : str or None
        ``"chunks"`` or ``"steps"``.
    drops_nothing, degenerate : bool
    """

    policy: str
    method: str
    study: str
    status: str
    message: str | None
    n_segments: int
    n_tokens: int
    entries: float | None = None
    perplexity: Interval | None = None
    accuracy: Interval | None = None
    ratio: Interval | None = None
    accuracy_change: Interval | None = None
    excess: float | None = None
    kv_share: float | None = None
    how: str | None = None
    drops_nothing: bool = False
    degenerate: bool = False


@dataclass(frozen=True, slots=True)
class BinRow:
    """One policy's tokens with at least `start` and less than `stop` tokens before them.

    Attributes
    ----------
    policy : str
    start, stop, n_tokens : int
    perplexity : float
    ratio : Interval
        Over the full cache's, on the same tokens.
    """

    policy: str
    start: int
    stop: int
    n_tokens: int
    perplexity: float
    ratio: Interval


@dataclass(frozen=True, slots=True)
class Perplexity:
    """What a run folder says.

    Attributes
    ----------
    folder : Path
    config : dict
    rows : tuple of PerplexityRow
        The full cache first.
    bins : tuple of BinRow
    within : float
        Nats per token.
    enough : dict of str to (float or None)
        Method -> effective context: fewest entries held, of those tried, from which on its loss is within `within` of the full
        cache's; None: none of those tried.
    clusters : str
        What was resampled: ``"texts"`` or ``"segments"``.
    """

    folder: Path
    config: dict[str, Any]
    rows: tuple[PerplexityRow, ...]
    bins: tuple[BinRow, ...]
    within: float
    enough: dict[str, float | None]
    clusters: str

    def text(self) -> str:
        """Return the table that the command prints."""
        return "\n".join([grid(HEADER, [_cells(row) for row in self.rows]), "", *self.notes()])

    def notes(self) -> list[str]:
        """Return how to read the table, and what stands out."""
        config = self.config
        counted = (
            f"the first {config['prompt']} tokens are the prompt" if config["prompt"] > 1 else "token by token from the start"
        )
        lines = [
            f"{config['n_segments']} segments of {config['length']} tokens, {counted}; intervals 95 %, {self.clusters} resampled; "
            "x full and +accuracy on the same tokens"
        ]
        lines += [
            f"{row.policy}: {row.status}, {row.message or 'no reason was recorded'}" for row in self.rows if row.status != "ok"
        ]
        idle = [row.policy for row in self.rows if row.drops_nothing and row.policy != FULL]
        if idle:
            lines.append(
                f"never evicts, so equals the full cache: {', '.join(idle)}; segments of {config['length']} tokens fit into it"
            )
        if any("interval=" in row.policy and not row.drops_nothing for row in self.rows):
            lines.append("context held of lazy eviction (interval=): the capacity, which fills up between cuts")
        known = [
            f"{name.replace(':decode=evict', '')}: {'more than was tried' if n is None else f'{n:.0f} entries'}"
            for name, n in self.enough.items()
        ]
        if known:
            lines.append(f"effective context (loss within {self.within:g} nats of the full cache): {'; '.join(known)}")
        return [*lines, *config["notes"]]


HEADER = [
    "policy",
    "context held",
    "KV kept",
    "perplexity",
    "95 %",
    "x full",
    "95 %",
    "accuracy",
    "+accuracy",
    "read in",
    "note",
]


def _cells(row: PerplexityRow) -> list[str]:
    if row.perplexity is None or row.accuracy is None or row.ratio is None or row.accuracy_change is None:
        return [row.policy, *["-"] * 9, row.status]
    share = "-" if row.kv_share is None else f"{100 * row.kv_share:.1f}%"
    full = row.policy == FULL
    return [
        row.policy,
        figure(row.entries, 1),
        share,
        _number(row.perplexity.mean),
        _range(row.perplexity),
        "1" if full else f"{row.ratio.mean:.3f}",
        "" if full else _range(row.ratio, 3),
        f"{100 * row.accuracy.mean:.2f}%",
        "" if full else f"{100 * row.accuracy_change.mean:+.2f}",
        row.how or "-",
        ", ".join(filter(None, [row.study, *_flags(row)])),
    ]


def _flags(row: PerplexityRow) -> list[str]:
    flags = {"degenerate": row.degenerate, "drops nothing": row.drops_nothing and row.policy != FULL}
    return [name for name, is_so in flags.items() if is_so]


def _range(interval: Interval, digits: int = 2) -> str:
    if math.isnan(interval.low):
        return "-"
    return f"{_number(interval.low, digits)}-{_number(interval.high, digits)}"


def _number(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}" if value < 1e5 else f"{value:.3g}"


def read_perplexity(folder: Path, *, within: float = 0.05, draws: int = DRAWS, seed: int = 0) -> Perplexity:
    """Read a run folder of `kvtool perplexity`.

    Parameters
    ----------
    folder : Path
    within : float
        Nats per token that count as no loss, for the effective context.
    draws, seed : int
        Of the bootstrap.

    Raises
    ------
    DataError
        The folder holds no such run, or no result of the full cache.
    """
    config = read_run(folder)["config"]
    if config.get("schema") != SCHEMA:
        raise DataError(
            f"{folder} holds a run of {config.get('schema')}, {SCHEMA} is needed; give a folder of kvtool perplexity"
        )
    records = read_units(folder)
    by_policy = {policy: {r["sample"]: r for r in records if r["policy"] == policy} for policy in config["policies"]}
    full = {sample: r for sample, r in by_policy.get(FULL, {}).items() if r["status"] == "ok"}
    if not full:
        raise DataError(f"{folder} holds no result of the full cache yet; run the same command again, it continues")
    texts = {r["document"] for r in full.values()}
    by_text = len(texts) > 1
    rng = np.random.default_rng(seed)
    resampling = _Resampling(full, by_text, draws, rng)
    rows = [_row(policy, found, full, resampling) for policy, found in by_policy.items() if found]
    bins = [b for row in rows if row.status == "ok" for b in _bins(row.policy, by_policy[row.policy], full, resampling)]
    enough = effective_contexts(rows, within)
    return Perplexity(folder, config, tuple(rows), tuple(bins), within, enough, "texts" if by_text else "segments")


class _Resampling:
    """Draws of whole clusters, the same for all policies.

    Parameters
    ----------
    full : dict
        Sample -> record of the full cache.
    by_text : bool
        Resample texts instead of segments.
    """

    def __init__(self, full: dict[str, dict[str, Any]], by_text: bool, draws: int, rng: np.random.Generator) -> None:
        names = [r["document"] if by_text else sample for sample, r in full.items()]
        numbers = {name: i for i, name in enumerate(dict.fromkeys(names))}
        self.cluster = {sample: numbers[name] for sample, name in zip(full, names, strict=True)}
        self.n = len(numbers)
        self.weights = bootstrap_weights(self.n, draws, rng) if self.n > 1 else np.zeros((0, 1))

    def ratio(self, samples: Sequence[str], above: Sequence[float], below: Sequence[float], exp: bool) -> Interval:
        """Return sum(above) / sum(below) over samples, or exp of it, with its interval; NaN bounds for a single cluster."""
        index = [self.cluster[sample] for sample in samples]
        top, bottom = (np.bincount(index, weights=np.asarray(v, dtype=np.float64), minlength=self.n) for v in (above, below))
        point = math.fsum(above) / math.fsum(below)
        if self.n < 2:
            return Interval(_exp(point) if exp else point, math.nan, math.nan)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            drawn = (self.weights @ top) / (self.weights @ bottom)
            drawn = np.exp(drawn) if exp else drawn
        return percentile_interval(_exp(point) if exp else point, drawn, self.n)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _row(
    policy: str, found: dict[str, dict[str, Any]], full: dict[str, dict[str, Any]], resampling: _Resampling
) -> PerplexityRow:
    records = [found[sample] for sample in full if sample in found]
    bad = next((r for r in found.values() if r["status"] != "ok"), None)
    if bad is not None or not records:
        first = bad or next(iter(found.values()))
        status = first["status"] if bad is not None else "missing"
        return PerplexityRow(policy, first["method"], "", status, first["message"], 0, 0, degenerate=bool(first["degenerate"]))
    samples = [r["sample"] for r in records]
    base = [full[sample] for sample in samples]
    n = [r["n"] for r in records]
    nll, hits = [r["nll"] for r in records], [r["hits"] for r in records]
    change = [a - b["nll"] for a, b in zip(nll, base, strict=True)]
    gain = [a - b["hits"] for a, b in zip(hits, base, strict=True)]
    return PerplexityRow(
        policy=policy,
        method=records[0]["method"],
        study=", ".join(study_names(Policy.parse(records[0]["ran"]))),
        status="ok",
        message=None,
        n_segments=len(records),
        n_tokens=sum(n),
        entries=float(np.mean([most_entries(r) for r in records])),
        perplexity=resampling.ratio(samples, nll, n, True),
        accuracy=resampling.ratio(samples, hits, n, False),
        ratio=resampling.ratio(samples, change, n, True),
        accuracy_change=resampling.ratio(samples, gain, n, False),
        excess=math.fsum(change) / sum(n),
        kv_share=sum(r["kv_bytes"] for r in records) / sum(r["kv_bytes_full"] for r in records),
        how=records[0]["how"],
        drops_nothing=not any(r["evicted"] for r in records),
        degenerate=any(r["degenerate"] for r in records),
    )


def _bins(
    policy: str, found: dict[str, dict[str, Any]], full: dict[str, dict[str, Any]], resampling: _Resampling
) -> list[BinRow]:
    sums: dict[tuple[int, int], list[tuple[str, float, float, float]]] = {}
    for sample, base in full.items():
        if sample not in found:
            continue
        theirs = {(start, stop): nll for start, stop, _, nll, _ in base["bins"]}
        for start, stop, n, nll, _ in found[sample]["bins"]:
            sums.setdefault((start, stop), []).append((sample, n, nll, nll - theirs[start, stop]))
    rows = []
    for (start, stop), parts in sums.items():
        samples, n, nll, change = (list(column) for column in zip(*parts, strict=True))
        ratio = resampling.ratio(samples, change, n, True)
        mean = math.fsum(nll) / math.fsum(n)
        rows.append(BinRow(policy, start, stop, int(math.fsum(n)), _exp(mean), ratio))
    return sorted(rows, key=lambda row: row.start)


def effective_contexts(rows: Sequence[PerplexityRow], within: float) -> dict[str, float | None]:
    """Return the effective context of each method with several sizes: fewest entries from which on nothing is lost."""
    by_method: dict[str, list[PerplexityRow]] = {}
    for row in rows:
        if row.status == "ok" and row.policy != FULL and row.entries is not None:
            by_method.setdefault(row.method, []).append(row)
    found: dict[str, float | None] = {}
    for method, mine in by_method.items():
        smallest = None
        for row in sorted(mine, key=lambda row: -(row.entries or 0.0)):
            if row.excess is None or row.excess > within:
                break
            smallest = row.entries
        if len(mine) > 1 or smallest is not None:
            found[method] = smallest
    return found


def write_perplexity(result: Perplexity) -> list[Path]:
    """Write table, data and figure into the run's folder; returns the files."""
    from kvtool.analysis.perplexity_plots import draw_perplexity

    folder = result.folder
    data = _csv([_flat(asdict(row)) for row in result.rows])
    table = (HEADER, [_cells(row) for row in result.rows])
    files = save_tables(
        folder, "perplexity", f"Perplexity: {', '.join(result.config['text'])}", [("", table)], data, result.notes()
    )
    write_json(
        folder / "perplexity.json",
        {
            "schema": "kvtool.perplexity_table/1",
            "within": result.within,
            "effective_context": result.enough,
            "resampled": result.clusters,
            "rows": [_plain(asdict(row)) for row in result.rows],
        },
    )
    write_text(folder / "perplexity_by_position.csv", _csv([_flat(asdict(row)) for row in result.bins]))
    return [*files, folder / "perplexity.json", folder / "perplexity_by_position.csv", *draw_perplexity(result)]


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """Spread intervals over columns."""
    found: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            found |= {key: value["mean"], f"{key}_low": value["low"], f"{key}_high": value["high"]}
        else:
            found[key] = value
    return found


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Leave out what JSON has no number for."""
    return {k: _plain(v) if isinstance(v, dict) else None if v != v else v for k, v in row.items()}


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(key for row in rows for key in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
