"""Prompts of a stress test: stretches of the embedded book, so that policies meet text and not noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtool.data.tasks import TaskRequest, encode_text, first_ids, haystack_text

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kvtool.models import LoadedModel


@dataclass(frozen=True, slots=True)
class Book:
    """A text in tokens.

    Attributes
    ----------
    first : tuple of int
        What the tokenizer puts before every text.
    ids : tuple of int
    """

    first: tuple[int, ...]
    ids: tuple[int, ...]

    @classmethod
    def read(cls, loaded: LoadedModel) -> Book:
        """Cut the embedded book into a model's tokens."""
        text = haystack_text(TaskRequest(1, 1, 0, {}), "walden.txt")
        return cls(tuple(first_ids(loaded.tokenizer)), tuple(encode_text(loaded.tokenizer, text)))

    def copies(self, n: int) -> int:
        """How many copies of the book a stretch of `n` tokens takes."""
        return -(-(n - len(self.first)) // len(self.ids))

    def stretch(self, n: int, seed: int) -> list[int]:
        """Return `n` tokens, beginning with the first ones; every seed begins elsewhere, and after the last page comes the first."""
        start = seed * 9973 % len(self.ids)
        return [*self.first, *self.ids[start:], *(self.ids * self.copies(n))][:n]

    def batch(self, n_rows: int, n: int, seed: int, device: torch.device) -> Tensor:
        """Return prompts ``[B, T]``, every row another stretch."""
        import torch

        return torch.tensor([self.stretch(n, seed + row) for row in range(n_rows)], device=device)
