"""Tasks: where prompts come from, and what is right. ``niah``, ``text`` and ``file:PATH.jsonl``.

A task spec is ``name`` or ``name:key=value,...``; a sample is encoded once and then used by every stage alike.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from kvtool.data.metrics import metric_function
from kvtool.errors import ConfigError, DataError, near_matches


@dataclass(frozen=True, slots=True)
class Sample:
    """One question about one context.

    Attributes
    ----------
    id : str
        Unique within a task; seeds of drawing policies hang on it.
    context, question : str
        The prompt is ``context + question``.
    answers : tuple of str
        Gold answers; the first one is fed teacher-forced. Empty: the model's own full-cache answer is used.
    metric : str
    max_new_tokens : int
    meta : dict
        Facts for tables, e.g. length, depth, ``evidence`` (token spans ``[start, stop]`` that hold the answer).
    """

    id: str
    context: str
    question: str
    answers: tuple[str, ...]
    metric: str
    max_new_tokens: int
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Encoded:
    """A sample as token ids; `context_ids` begins with the tokenizer's own first tokens (``<s>``)."""

    sample: Sample
    context_ids: list[int]
    question_ids: list[int]
    answer_ids: list[int]

    @property
    def prompt_ids(self) -> list[int]:
        """Context and question."""
        return self.context_ids + self.question_ids

    @property
    def n_tokens(self) -> int:
        """Positions that this sample needs: prompt and the longer of gold answer and generation."""
        return len(self.prompt_ids) + max(len(self.answer_ids), self.sample.max_new_tokens)


@dataclass(frozen=True, slots=True)
class TaskRequest:
    """What a user asks of a task.

    Attributes
    ----------
    n : int
        Samples wanted.
    length : int
        Prompt length in tokens, for tasks that build their prompts.
    seed : int
    options : dict of str to str
        ``key=value`` pairs of the spec.
    """

    n: int
    length: int
    seed: int
    options: dict[str, str]


def sample_seed(sample_id: str) -> int:
    """Return a stable 63-bit seed for policies that draw: the same sample gets the same draw in every stage."""
    return int.from_bytes(hashlib.sha256(sample_id.encode()).digest()[:8], "big") >> 1


def encode_text(tokenizer: Any, text: str, *, first: bool = False) -> list[int]:
    """Return the token ids of `text`; with `first`, the tokenizer's own first tokens come before."""
    # verbose=False: a whole book is longer than any context, which is no reason to warn here.
    return list(tokenizer(text, add_special_tokens=first, verbose=False)["input_ids"])


def first_ids(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts before every text (``<s>``), without those it puts after it."""
    ids = encode_text(tokenizer, "a", first=True)
    plain = encode_text(tokenizer, "a")
    for start in range(len(ids) - len(plain) + 1):
        if ids[start : start + len(plain)] == plain:
            return ids[:start]
    return []


def encode(sample: Sample, tokenizer: Any) -> Encoded:
    """Encode a sample whose context is text."""
    return Encoded(
        sample,
        first_ids(tokenizer) + encode_text(tokenizer, sample.context),
        encode_text(tokenizer, sample.question),
        encode_text(tokenizer, sample.answers[0]) if sample.answers else [],
    )


def apply_template(sample: Sample, template: str) -> Sample:
    """Put a sample into a template with ``{context}`` and, after it, ``{question}``, each once.

    What stands before the context belongs to the context, everything after it to the question: that is where
    ``compress_at=context`` cuts.

    Raises
    ------
    ConfigError
        The template lacks one of them, or has them in the other order.
    """
    before, found, rest = template.partition("{context}")
    between, found_too, after = rest.partition("{question}")
    if not found or not found_too or "{context}" in rest or "{question}" in after:
        raise ConfigError(f"template {template!r} must hold {{context}} and after it {{question}}, each once")
    return replace(sample, context=before + sample.context, question=between + sample.question + after)


def load_task(
    spec: str, tokenizer: Any, n: int, length: int = 1024, seed: int = 0, template: str | None = None
) -> list[Encoded]:
    """Build the samples of a task.

    Parameters
    ----------
    spec : str
        ``niah``, ``niah:kind=multikey,keys=8``, ``text``, ``text:path=FILE``, ``file:PATH.jsonl``.
    tokenizer : transformers tokenizer
    n : int
        Samples wanted; a file with fewer gives all it has.
    length : int
        Prompt length in tokens for tasks that build their prompts; ``file:`` takes its prompts as they are.
    seed : int
    template : str, optional
        For ``file:``, text with ``{context}`` and ``{question}``; default: context and question verbatim.

    Raises
    ------
    ConfigError
        Unknown task or option.
    DataError
        Missing, empty or malformed file.
    """
    if n < 1:
        raise ConfigError(f"{n} samples were asked for; at least 1 is needed")
    name, _, rest = spec.partition(":")
    if name == "file":
        return load_file(Path(rest), tokenizer, n, template)
    if template is not None:
        raise ConfigError(f"task {name!r} builds its own prompts; a template goes with file:PATH.jsonl only")
    if name not in TASKS:
        known = [*TASKS, "file:PATH.jsonl"]
        raise ConfigError(f"unknown task {name!r}.{near_matches(name, known)} Known: {', '.join(known)}")
    options = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"task {spec!r}: {item!r} is not key=value")
        options[key.strip()] = value.strip()
    task = TASKS[name]
    if unknown := sorted(set(options) - set(task.options)):
        known_text = ", ".join(task.options)
        raise ConfigError(
            f"task {name!r} has no option {unknown[0]!r}.{near_matches(unknown[0], task.options)} Known: {known_text}"
        )
    return task.build(TaskRequest(n, length, seed, options), tokenizer)


def load_file(path: Path, tokenizer: Any, n: int, template: str | None = None) -> list[Encoded]:
    """Read a JSONL file: ``context``, ``question``, ``answers``, optional ``id``, ``metric``, ``max_new_tokens``.

    Raises
    ------
    DataError
        Missing or empty file, or a bad line (with its number).
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"task file {path} cannot be read: {error}; give a UTF-8 file with one JSON object a line") from error
    samples: list[Sample] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            samples.append(_file_sample(path, number, line))
    if not samples:
        raise DataError(f"task file {path} holds no sample; give one JSON object a line with context, question, answers")
    ids = [s.id for s in samples]
    if twice := sorted({i for i in ids if ids.count(i) > 1}):
        raise DataError(f"task file {path}: id {twice[0]!r} occurs {ids.count(twice[0])} times; ids must be unique")
    chosen = samples[:n] if template is None else [apply_template(sample, template) for sample in samples[:n]]
    return [encode(sample, tokenizer) for sample in chosen]


def _file_sample(path: Path, number: int, line: str) -> Sample:
    where = f"task file {path}, line {number}"
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: found {type(record).__name__}, a JSON object is needed")
    for key in ("context", "question"):
        if not isinstance(record.get(key), str):
            raise DataError(f"{where}: {key!r} must be a string, found {type(record.get(key)).__name__}")
    answers = record.get("answers")
    if not isinstance(answers, list) or not all(isinstance(a, str) and a for a in answers):
        raise DataError(f"{where}: 'answers' must be a list of non-empty strings, found {json.dumps(answers)[:60]}")
    if not record["context"]:
        raise DataError(f"{where}: 'context' is empty; there is nothing to compress")
    n_new = record.get("max_new_tokens", 32)
    if not isinstance(n_new, int) or isinstance(n_new, bool) or n_new < 1:
        raise DataError(f"{where}: 'max_new_tokens' must be a whole number from 1, found {n_new!r}")
    metric = str(record.get("metric", "f1"))
    try:
        metric_function(metric)
    except ConfigError as error:
        raise DataError(f"{where}: {error}") from error
    return Sample(
        id=str(record.get("id", f"line{number}")),
        context=record["context"],
        question=record["question"],
        answers=tuple(answers),
        metric=metric,
        max_new_tokens=n_new,
        meta={"task": f"file:{path.name}"},
    )


@dataclass(frozen=True, slots=True)
class Task:
    """A task that builds its prompts.

    Attributes
    ----------
    summary : str
    options : dict of str to str
        Option -> what it does.
    build : callable
        ``(TaskRequest, tokenizer) -> list of Encoded``.
    """

    summary: str
    options: dict[str, str]
    build: Callable[[TaskRequest, Any], list[Encoded]]


def int_option(request: TaskRequest, key: str, default: int, low: int, high: int) -> int:
    """Read a whole number in ``low ... high`` from a task's options."""
    text = request.options.get(key, str(default))
    if not text.isdigit() or not low <= int(text) <= high:
        raise ConfigError(f"task option {key}={text}: a whole number in {low} ... {high} is needed")
    return int(text)


def haystack_text(request: TaskRequest, default: str) -> str:
    """Return the text of the option ``haystack`` or ``path``, or the embedded one."""
    path = request.options.get("haystack") or request.options.get("path")
    file = Path(path) if path else Path(__file__).parent / "text" / default
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"text {file} cannot be read: {error}; give a UTF-8 text file") from error


def text_tokens(request: TaskRequest, tokenizer: Any, default: str, n_needed: int) -> np.ndarray:
    """Tokenize a haystack; too short a text is an error, never repeated silently."""
    ids = np.asarray(encode_text(tokenizer, haystack_text(request, default)), dtype=np.int64)
    if len(ids) < n_needed:
        raise DataError(f"the text has {len(ids)} tokens, {n_needed} are needed; give a longer text or a smaller length")
    return ids


def _build_text(request: TaskRequest, tokenizer: Any) -> list[Encoded]:
    n_answer = int_option(request, "continue", 16, 2, 512)
    n_lead = int_option(request, "lead", 0, 0, max(0, request.length // 2))
    first = first_ids(tokenizer)
    tokens = text_tokens(request, tokenizer, "walden.txt", request.length + n_answer)
    encoded = []
    for index in range(request.n):
        rng = np.random.default_rng([request.seed, index, 1])
        start = int(rng.integers(0, len(tokens) - request.length - n_answer + 1))
        n_context = request.length - len(first)
        context = tokens[start : start + n_context].tolist()
        answer = tokens[start + n_context : start + n_context + n_answer].tolist()
        sample = Sample(
            id=f"text-{request.length}-s{request.seed}-{index:04d}",
            context=tokenizer.decode(context[: n_context - n_lead]),
            question=tokenizer.decode(context[n_context - n_lead :]),
            answers=(tokenizer.decode(answer),),
            metric="f1",
            max_new_tokens=n_answer,
            meta={"task": "text", "length": request.length, "start": start},
        )
        encoded.append(Encoded(sample, first + context[: n_context - n_lead], context[n_context - n_lead :], answer))
    return encoded


def _build_niah(request: TaskRequest, tokenizer: Any) -> list[Encoded]:
    from kvtool.data.niah import build_niah

    return build_niah(request, tokenizer)


TASKS: dict[str, Task] = {
    "niah": Task(
        "needle in a haystack: a fact hidden in a text, and a question for it",
        {
            "kind": "single (default), multikey (distractor keys) or multivalue (several values of one key)",
            "keys": "number of keys for multikey, default 8",
            "values": "number of values for multivalue, default 2",
            "depth": "depth of the asked needle in percent, default random",
            "haystack": "path of a UTF-8 text, default an embedded book",
        },
        _build_niah,
    ),
    "text": Task(
        "continuation: the text's own next tokens are the answer",
        {
            "path": "path of a UTF-8 text, default an embedded book",
            "continue": "tokens to continue, default 16",
            "lead": "last tokens of the prompt that count as the question (compress_at=context does not see them), default 0",
        },
        _build_text,
    ),
}
