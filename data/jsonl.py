"""JSON lines of other people: good records are kept, bad ones are named with file, line and field."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

from kvtool.data.samples import Encoded
from kvtool.errors import DataError, NothingFitsError
from kvtool.progress import say

Item = TypeVar("Item")
#: Says why a model cannot run a sample, or None.
Fits = Callable[[Encoded], str | None]

#: Skipped records that are told one by one; the run records all of them.
MOST_TOLD = 5


class FieldError(DataError):
    """A record cannot be used because of one field."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(reason)
        self.field = field


@dataclass(frozen=True, slots=True)
class Skipped:
    """A record that was left out.

    Attributes
    ----------
    file : str
    line : int
        From 1.
    field : str
        Empty where the whole line is at fault.
    reason : str
    """

    file: str
    line: int
    field: str
    reason: str

    @property
    def text(self) -> str:
        """One line for people."""
        return f"{self.file}, line {self.line}: {self.reason}"


class Samples(list[Encoded]):
    """Samples, and what was left out on the way to them."""

    def __init__(self, samples: Iterable[Encoded] = (), skipped: Iterable[Skipped] = ()) -> None:
        super().__init__(samples)
        self.skipped = tuple(skipped)

    def like(self, samples: Iterable[Encoded]) -> Samples:
        """Return other samples of the same source."""
        return Samples(samples, self.skipped)


def skipped_facts(samples: Sequence[Encoded]) -> list[dict[str, Any]]:
    """Return what a run writes down about records that were left out; empty where there are none."""
    return [asdict(record) for record in getattr(samples, "skipped", ())]


@functools.cache
def say_once(text: str) -> None:
    """Print a line to stderr unless this process has printed it: a task may be loaded several times for one run."""
    say(text)


@dataclass(frozen=True, slots=True)
class Row(Generic[Item]):
    """A good record and where it stands."""

    line: int
    id: str
    value: Item


def parse_lines(
    data: bytes, where: str, parse: Callable[[dict[str, Any], int], tuple[str, Item]]
) -> tuple[list[Row[Item]], list[Skipped]]:
    """Parse every line; blank lines do not count.

    Parameters
    ----------
    data : bytes
        Of the file; UTF-8, a byte order mark is taken off. Lines end at newlines alone: other separators may stand in strings.
    where : str
        The file, for messages.
    parse : callable
        ``(record, line number) -> (id, value)``; raises `FieldError`.

    Returns
    -------
    list of Row, list of Skipped
        The first of several records with one id stays.
    """
    rows: list[Row[Item]] = []
    skipped: list[Skipped] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            name, value = parse(_json_object(line), number)
            if name in seen:
                raise FieldError("id", f"id {name!r} occurs in line {seen[name]} already; ids must be unique")
        except FieldError as error:
            skipped.append(Skipped(where, number, error.field, str(error)))
            continue
        seen[name] = number
        rows.append(Row(number, name, value))
    return rows, skipped


def _json_object(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise FieldError("", f"not UTF-8 (byte {line[error.start]:#04x} at {error.start + 1})") from error
    except ValueError as error:
        raise FieldError("", f"not JSON ({error})") from error
    except RecursionError as error:
        raise FieldError("", "not usable: nested too deeply") from error
    if not isinstance(record, dict):
        raise FieldError("", f"found {type(record).__name__}, a JSON object is needed")
    return record


def take(
    rows: Iterable[Row[Item]],
    skipped: Sequence[Skipped],
    where: str,
    n: int,
    make: Callable[[Item], Encoded],
    fits: Fits | None,
) -> Samples:
    """Encode the first `n` rows that the model can run, and say what was left out.

    Parameters
    ----------
    make : callable
        Encodes one value; raises `FieldError`.
    fits : callable, optional

    Raises
    ------
    DataError
        Nothing is left; a `NothingFitsError` if all records are too long for the model.
    """
    left_out = list(skipped)
    chosen: list[Encoded] = []
    for encoded in _encoded(rows, where, make, fits, left_out):
        chosen.append(encoded)
        if len(chosen) == n:
            break
    left_out.sort(key=lambda record: record.line)
    if not chosen:
        if not left_out:
            raise DataError(f"task file {where} holds no sample; give one JSON object a line")
        too_long = fits is not None and all(record.field == "context" for record in left_out)
        error = NothingFitsError if too_long else DataError
        raise error(f"none of the {len(left_out)} records of task file {where} can be used; the first: {left_out[0].text}")
    _tell(left_out, where)
    return Samples(chosen, left_out)


def _encoded(
    rows: Iterable[Row[Item]], where: str, make: Callable[[Item], Encoded], fits: Fits | None, left_out: list[Skipped]
) -> Iterator[Encoded]:
    for row in rows:
        try:
            encoded = make(row.value)
        except FieldError as error:
            left_out.append(Skipped(where, row.line, error.field, str(error)))
            continue
        if fits and (why := fits(encoded)):
            left_out.append(Skipped(where, row.line, "context", f"'context' is too long: {why}"))
            continue
        yield encoded


def _tell(left_out: Sequence[Skipped], where: str) -> None:
    if left_out:
        records = "1 record of" if len(left_out) == 1 else f"{len(left_out)} records of"
        more = [f"... and {len(left_out) - MOST_TOLD} more; run.json names them all"] if len(left_out) > MOST_TOLD else []
        say_once("\n  ".join([f"left out {records} {where}:", *(r.text for r in left_out[:MOST_TOLD]), *more]))


def text_field(record: dict[str, Any], key: str) -> str:
    """Return a field that must be a string."""
    value = record.get(key)
    if not isinstance(value, str):
        found = type(value).__name__ if key in record else "nothing"
        raise FieldError(key, f"{key!r} must be a string, found {found}")
    return value


def answers_field(record: dict[str, Any], *, may_lack: bool) -> tuple[str, ...]:
    """Return the gold answers; with `may_lack` an empty list is fine, and without it one of several may be empty."""
    answers = record.get("answers")
    if not isinstance(answers, list) or not all(isinstance(a, str) and (a or not may_lack) for a in answers):
        kind = "non-empty strings" if may_lack else "strings"
        found = json.dumps(answers, ensure_ascii=False)[:60] if "answers" in record else "nothing"
        raise FieldError("answers", f"'answers' must be a list of {kind}, found {found}")
    if not may_lack and not any(answers):
        raise FieldError("answers", "'answers' holds no answer; there is nothing to score against")
    return tuple(answers)
