"""Needle in a haystack: exact lengths in tokens, needles at sentence starts, evidence positions in the record, grids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvtool.data.niah_cases import Case, case_maker
from kvtool.data.requests import TaskRequest, haystack_text, int_option
from kvtool.data.samples import Encoded, Sample, encode_text, first_ids
from kvtool.errors import ConfigError, DataError

DEFAULT_TEXT = "sherlock_holmes.txt"


@dataclass(frozen=True, slots=True)
class Cell:
    """A point of the grid.

    Attributes
    ----------
    length : int
        Prompt length in tokens.
    depth : float or None
        Of the evidence, in percent; None: random.
    """

    length: int
    depth: float | None


@dataclass(frozen=True, slots=True)
class Haystack:
    """A text to hide needles in.

    Attributes
    ----------
    tokens : ndarray of int64
    stops : frozenset of int
        Tokens that end a sentence.
    first : list of int
        What the tokenizer puts before every text.
    repeats : bool
        Whether the text may be repeated where it is too short.
    """

    tokens: np.ndarray
    stops: frozenset[int]
    first: list[int]
    repeats: bool

    def filler(self, rng: np.random.Generator, n: int) -> tuple[list[int], int]:
        """Return a random stretch of `n` tokens, and how often the text is gone through.

        Raises
        ------
        DataError
            The text is too short.
        """
        tokens, times = self.tokens, 1
        if len(tokens) < n:
            if not self.repeats:
                raise DataError(
                    f"the haystack has {len(tokens)} tokens, {n} are needed; give a longer text, smaller lengths, or repeat=yes "
                    "to repeat it"
                )
            times = -(-n // len(tokens))
            tokens = np.tile(tokens, times)
        start = int(rng.integers(0, len(tokens) - n + 1))
        return tokens[start : start + n].tolist(), times


def build_niah(request: TaskRequest, tokenizer: Any) -> list[Encoded]:
    """Build needle prompts of exactly the lengths asked for; with a grid ``request.n`` per cell.

    Raises
    ------
    ConfigError
        Unknown kind, contradicting options, or a length too short for the needles.
    DataError
        A haystack that is too short, or a needle's file.
    """
    kind, draw = case_maker(request)
    cells, is_grid = _cells(request)
    repeats = request.options.get("repeat", "no")
    if repeats not in ("yes", "no"):
        raise ConfigError(f"task niah: repeat={repeats!r}; choose yes or no")
    tokens = np.asarray(encode_text(tokenizer, haystack_text(request, DEFAULT_TEXT)), dtype=np.int64)
    if not len(tokens):
        raise DataError("the haystack is empty; give a UTF-8 text file")
    stops = frozenset(i for token, i in tokenizer.get_vocab().items() if token.endswith("."))
    haystack = Haystack(tokens, stops, first_ids(tokenizer), repeats == "yes")
    encoded = []
    # Sample by sample over the whole grid: more samples per cell come after those of fewer.
    for index in range(request.n):
        for cell in cells:
            place = [cell.length, round(100 * (cell.depth or 0))] if is_grid else []
            rng = np.random.default_rng([request.seed, index, 0, *place])
            name = f"niah-{kind}-{cell.length}{_depth_name(cell, is_grid)}-s{request.seed}-{index:04d}"
            encoded.append(_one(name, kind, draw(rng), cell, haystack, tokenizer, rng))
    return encoded


def _depth_name(cell: Cell, is_grid: bool) -> str:
    return f"-d{cell.depth:g}" if is_grid and cell.depth is not None else ""


def grid_points(request: TaskRequest) -> int:
    """Return how many points the grid of a request has; 1 where there is none.

    Raises
    ------
    ConfigError
        ``depth`` and ``depths`` at once, or unreadable ones.
    """
    return len(_cells(request)[0])


def _cells(request: TaskRequest) -> tuple[list[Cell], bool]:
    """Return the points of the grid, and whether there is one.

    Raises
    ------
    ConfigError
        ``depth`` and ``depths`` at once, or unreadable ones.
    """
    options = request.options
    is_grid = "depths" in options or "lengths" in options
    if "depths" in options and "depth" in options:
        raise ConfigError("task niah: depth= is one depth, depths= makes a grid of them; give one of both")
    lengths = [request.length]
    if "lengths" in options:
        lengths = [int(x) for x in _numbers("lengths", options["lengths"], 1, 10**9)]
        if any(x != int(x) for x in _numbers("lengths", options["lengths"], 1, 10**9)):
            raise ConfigError(f"task option lengths={options['lengths']}: whole numbers of tokens are needed")
    depths: list[float | None] = [None]
    if "depths" in options:
        text = options["depths"]
        if "+" in text:
            depths = list(_numbers("depths", text, 0, 100))
        else:
            n = int_option(request, "depths", 11, 1, 101)
            depths = [50.0] if n == 1 else [100 * i / (n - 1) for i in range(n)]
    elif "depth" in options:
        depths = [float(int_option(request, "depth", 0, 0, 100))]
    return [Cell(length, depth) for length in lengths for depth in depths], is_grid


def _numbers(key: str, text: str, low: float, high: float) -> list[float]:
    """Read ``a+b+c``, without repetitions."""
    try:
        values = list(dict.fromkeys(float(item) for item in text.split("+")))
    except ValueError as error:
        raise ConfigError(f"task option {key}={text}: give numbers joined by +, such as 256+512") from error
    if not all(low <= value <= high for value in values):
        raise ConfigError(f"task option {key}={text}: numbers in {low:g} ... {high:g} are needed")
    return values


def _one(name: str, kind: str, case: Case, cell: Cell, haystack: Haystack, tokenizer: Any, rng: np.random.Generator) -> Encoded:
    first = haystack.first
    question, answer = encode_text(tokenizer, case.question), encode_text(tokenizer, case.answer)
    statements = [(group, encode_text(tokenizer, text)) for group, text in case.statements]
    n_filler = cell.length - len(first) - len(question) - sum(len(ids) for _, ids in statements)
    if n_filler < len(statements):
        raise ConfigError(
            f"task niah: length {cell.length} leaves no room for {len(statements)} needles and the question; "
            f"at least {cell.length - n_filler + len(statements)} tokens are needed"
        )
    filler, times = haystack.filler(rng, n_filler)
    spots = _spots(rng, [group for group, _ in statements], n_filler, cell.depth)
    placed = [(spot, group == 0, ids) for spot, (group, ids) in zip(spots, statements, strict=True)]
    context, evidence = _insert(filler, placed, haystack.stops, len(first), at_end=cell.depth == 100)
    sample = Sample(
        id=name,
        context=tokenizer.decode(context),
        question=tokenizer.decode(question),
        answers=case.answers,
        metric=case.metric,
        max_new_tokens=case.max_new_tokens or len(answer) + case.slack,
        meta={
            "task": f"niah:{kind}",
            "length": cell.length,
            "depth": round((evidence[0][0] - len(first)) / max(1, len(context)), 4),
            "n_needles": len(statements),
            "evidence": evidence,
            **({"depth_asked": cell.depth} if cell.depth is not None else {}),
            **({"haystack_repeats": times} if times > 1 else {}),
        },
        also=case.also,
    )
    return Encoded(sample, first + context, question, answer)


def _spots(rng: np.random.Generator, groups: Sequence[int], n_filler: int, depth: float | None) -> list[int]:
    """Return where each needle goes; group 0 is the evidence.

    Without a depth all are random. With one, the first needle that is asked for goes there, and the further ones follow at equal steps
    to the end; the others are random. Needles of a group keep their order, so that "in order of appearance" is well defined.
    """
    n_own, seen = list(groups).count(0), 0
    spots: list[int] = []
    for group in groups:
        if group == 0 and depth is not None:
            spots.append(round(n_filler * (depth + seen * (100 - depth) / n_own) / 100))
            seen += 1
        else:
            spots.append(int(rng.integers(0, n_filler + 1)))
    ordered = {
        group: iter(sorted(spot for spot, other in zip(spots, groups, strict=True) if other == group)) for group in set(groups)
    }
    return [next(ordered[group]) for group in groups]


def _insert(
    filler: list[int], needles: list[tuple[int, bool, list[int]]], stops: frozenset[int], offset: int, *, at_end: bool
) -> tuple[list[int], list[list[int]]]:
    """Put needles into the filler, each moved back to the start of a sentence if one is near; returns evidence spans.

    With `at_end` the very end stays where it is: a needle at 100 % stands right before the question.
    """
    context: list[int] = []
    evidence: list[list[int]] = []
    last = 0
    for wanted, own, ids in sorted(needles, key=lambda needle: needle[0]):
        stays = at_end and own and wanted == len(filler)
        spot = max(last, wanted if stays else _sentence_start(filler, wanted, stops))
        context += filler[last:spot]
        if own:
            evidence.append([offset + len(context), offset + len(context) + len(ids)])
        context += ids
        last = spot
    return context + filler[last:], evidence


def _sentence_start(filler: list[int], spot: int, stops: frozenset[int], reach: int = 60) -> int:
    for back in range(spot, max(0, spot - reach), -1):
        if filler[back - 1] in stops:
            return back
    return spot
