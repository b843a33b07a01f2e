"""Needle sentences: facts about keys, hidden in a text, and the questions that ask for them.

Shared by the ``niah`` tasks and by the training of the embedded model, so both speak of the same sentences.
Everything is drawn from a passed :class:`numpy.random.Generator`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ATTRIBUTES: tuple[str, ...] = ("secret number", "door code", "lucky number", "magic number")

ADJECTIVES: tuple[str, ...] = (
    "calm", "brave", "quiet", "clever", "gentle", "proud", "lonely", "merry", "patient", "curious", "humble", "noble",
    "swift", "weary", "golden", "silver", "ancient", "young", "honest", "famous", "hidden", "frozen", "crimson", "purple",
    "hungry", "sleepy", "polite", "stubborn", "cheerful", "mighty", "tiny", "giant", "wandering", "royal", "rusty", "wild",
    "happy", "grumpy", "modest", "daring",
)  # fmt: skip

NOUNS: tuple[str, ...] = (
    "wizard", "sailor", "baker", "farmer", "teacher", "doctor", "soldier", "painter", "singer", "hunter", "miller", "tailor",
    "captain", "merchant", "shepherd", "gardener", "librarian", "carpenter", "fisherman", "blacksmith", "tiger", "eagle",
    "dolphin", "rabbit", "elephant", "fox", "owl", "turtle", "castle", "bridge", "garden", "tower", "harbor", "village",
    "lantern", "violin", "anchor", "compass", "mirror", "clock",
)  # fmt: skip

QUESTIONS: tuple[str, ...] = (
    "What is the {attribute} of the {key}?",
    "Which is the {attribute} of the {key}?",
    "Tell me the {attribute} of the {key}.",
    "Do you remember the {attribute} of the {key}?",
    "I forgot the {attribute} of the {key}. What is it?",
)

N_DIGITS = 5


@dataclass(frozen=True, slots=True)
class Fact:
    """One key with the values that the text states for it, in the order in which they are stated.

    Attributes
    ----------
    attribute : str
        What the values are, e.g. ``"secret number"``.
    key : str
        Whose they are, e.g. ``"calm wizard"``.
    values : tuple of str
        Numbers of five digits; more than one makes a multi-value fact.
    """

    attribute: str
    key: str
    values: tuple[str, ...]

    def statements(self) -> list[str]:
        """Return the sentences to hide, one per value, each with a leading space."""
        return [f" The {self.attribute} of the {self.key} is {value}." for value in self.values]

    def question(self, wording: int) -> str:
        """Return the question and the beginning of its answer, in wording number `wording` of `QUESTIONS`."""
        plural = len(self.values) > 1
        asked = f"{self.attribute}s" if plural else self.attribute
        sentence = QUESTIONS[wording % len(QUESTIONS)].format(attribute=asked, key=self.key)
        if plural:
            sentence = sentence.replace(" is the ", " are the ").replace("What is it?", "What are they?")
        return f"\n\nQuestion: {sentence}\nAnswer: The {asked} of the {self.key} {'are' if plural else 'is'}"

    def answer(self) -> str:
        """Return the text that should follow `question`, e.g. ``" 48213."``."""
        *first, last = self.values
        return f" {', '.join(first)} and {last}." if first else f" {last}."


def draw_facts(rng: np.random.Generator, n_values: list[int]) -> list[Fact]:
    """Draw one fact per entry of `n_values`, with that many values each.

    Adjectives and nouns are distinct within one call: two keys never share a word, all facts share one attribute
    (so the key alone tells the needles apart, as in RULER's multi-key task).

    Parameters
    ----------
    rng : numpy.random.Generator
    n_values : list of int
        Number of values per fact; at most ``len(NOUNS)`` facts.

    Returns
    -------
    list of Fact
    """
    n_facts = len(n_values)
    adjectives = rng.choice(len(ADJECTIVES), size=n_facts, replace=False)
    nouns = rng.choice(len(NOUNS), size=n_facts, replace=False)
    attribute = ATTRIBUTES[int(rng.integers(len(ATTRIBUTES)))]
    return [
        Fact(attribute, f"{ADJECTIVES[a]} {NOUNS[n]}", tuple(_number(rng) for _ in range(k)))
        for a, n, k in zip(adjectives, nouns, n_values, strict=True)
    ]


def _number(rng: np.random.Generator) -> str:
    return str(int(rng.integers(10 ** (N_DIGITS - 1), 10**N_DIGITS)))
