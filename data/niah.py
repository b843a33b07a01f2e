"""Needle in a haystack: exact lengths in tokens, needles at sentence starts, evidence positions in the record."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvtool.data.needles import NOUNS, QUESTIONS, Fact, draw_facts
from kvtool.data.tasks import Encoded, Sample, TaskRequest, encode_text, first_ids, int_option, text_tokens
from kvtool.errors import ConfigError

KINDS = ("single", "multikey", "multivalue")


def build_niah(request: TaskRequest, tokenizer: Any) -> list[Encoded]:
    """Build needle prompts of exactly ``request.length`` tokens.

    Raises
    ------
    ConfigError
        Unknown kind, or a length too short for the needles.
    """
    kind = request.options.get("kind", "single")
    if kind not in KINDS:
        raise ConfigError(f"task niah: kind={kind!r}; choose one of {', '.join(KINDS)}")
    n_keys = int_option(request, "keys", 8, 2, len(NOUNS)) if kind == "multikey" else 1
    n_values = int_option(request, "values", 2, 2, 4) if kind == "multivalue" else 1
    depth = int_option(request, "depth", 0, 0, 100) if "depth" in request.options else None
    tokens = text_tokens(request, tokenizer, "sherlock_holmes.txt", request.length)
    stops = {i for token, i in tokenizer.get_vocab().items() if token.endswith(".")}
    encoded = []
    for index in range(request.n):
        rng = np.random.default_rng([request.seed, index, 0])
        facts = draw_facts(rng, [n_values] + [1] * (n_keys - 1))
        encoded.append(_one(request, tokenizer, tokens, stops, facts, kind, depth, index, rng))
    return encoded


def _one(
    request: TaskRequest,
    tokenizer: Any,
    tokens: np.ndarray,
    stops: set[int],
    facts: list[Fact],
    kind: str,
    depth: int | None,
    index: int,
    rng: np.random.Generator,
) -> Encoded:
    asked = facts[0]
    first = first_ids(tokenizer)
    question = encode_text(tokenizer, asked.question(int(rng.integers(len(QUESTIONS)))))
    answer = encode_text(tokenizer, asked.answer())
    statements = [(fact is asked, encode_text(tokenizer, text)) for fact in facts for text in fact.statements()]
    n_filler = request.length - len(first) - len(question) - sum(len(ids) for _, ids in statements)
    if n_filler < len(statements):
        raise ConfigError(
            f"task niah: length {request.length} leaves no room for {len(statements)} needles and the question; "
            f"at least {request.length - n_filler + len(statements)} tokens are needed"
        )
    start = int(rng.integers(0, len(tokens) - n_filler + 1))
    filler = tokens[start : start + n_filler].tolist()
    # Values of one key keep their order, so that "in order of appearance" is well defined.
    spots = [_spot(rng, n_filler, depth if own else None) for own, _ in statements]
    own_spots = sorted(s for s, (own, _) in zip(spots, statements, strict=True) if own)
    spots = own_spots + spots[len(own_spots) :]
    context, evidence = _insert(
        filler, [(s, own, ids) for s, (own, ids) in zip(spots, statements, strict=True)], stops, len(first)
    )
    sample = Sample(
        id=f"niah-{kind}-{request.length}-s{request.seed}-{index:04d}",
        context=tokenizer.decode(context),
        question=tokenizer.decode(question),
        answers=(asked.answer(),),
        metric="exact",
        max_new_tokens=len(answer),
        meta={
            "task": f"niah:{kind}",
            "length": request.length,
            "depth": round((evidence[0][0] - len(first)) / max(1, len(context)), 4),
            "n_needles": len(statements),
            "evidence": evidence,
        },
    )
    return Encoded(sample, first + context, question, answer)


def _spot(rng: np.random.Generator, n_filler: int, depth: int | None) -> int:
    return int(rng.integers(0, n_filler + 1)) if depth is None else round(n_filler * depth / 100)


def _insert(
    filler: list[int], needles: list[tuple[int, bool, list[int]]], stops: set[int], offset: int
) -> tuple[list[int], list[list[int]]]:
    """Put needles into the filler, each moved back to the start of a sentence if one is near; returns evidence spans."""
    context: list[int] = []
    evidence: list[list[int]] = []
    last = 0
    for wanted, own, ids in sorted(needles, key=lambda needle: needle[0]):
        spot = max(last, _sentence_start(filler, wanted, stops))
        context += filler[last:spot]
        if own:
            evidence.append([offset + len(context), offset + len(context) + len(ids)])
        context += ids
        last = spot
    return context + filler[last:], evidence


def _sentence_start(filler: list[int], spot: int, stops: set[int], reach: int = 60) -> int:
    for back in range(spot, max(0, spot - reach), -1):
        if filler[back - 1] in stops:
            return back
    return spot
