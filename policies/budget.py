"""Budget arithmetic in one place: what a budget means and how it becomes a whole number of entries."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal

from kvtool.errors import ConfigError

_HELP = "write a retention such as 1% or 0.01, or entries such as 64entries"


@dataclass(frozen=True, slots=True)
class Budget:
    """KV entries kept per KV head, sink and window included, averaged over layers and heads.

    Exactly one of both is set.

    Attributes
    ----------
    entries : int or None
        Number of entries, at least 1.
    retention : Decimal or None
        Share of the prompt in (0, 1].
    """

    entries: int | None = None
    retention: Decimal | None = None

    def __post_init__(self) -> None:
        if (self.entries is None) == (self.retention is None):
            raise ConfigError("a budget is either a number of entries or a retention, not both")
        if self.entries is not None and self.entries < 1:
            raise ConfigError(f"budget of {self.entries} entries: at least 1 is needed; {_HELP}")
        if self.retention is not None and not 0 < self.retention <= 1:
            raise ConfigError(f"retention {self.retention} is outside (0, 1]; {_HELP}")

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read ``"1%"``, ``"0.01"``, ``"64entries"`` or a whole number from 2 on (entries).

        Raises
        ------
        ConfigError
            Anything else; ``"1"`` too, as it could mean either.
        """
        text = text.strip()
        if match := re.fullmatch(r"(\d+)\s*(?:entries|entry)", text):
            return cls(entries=int(match[1]))
        if match := re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*%", text):
            return cls(retention=Decimal(match[1]) / 100)
        if re.fullmatch(r"\d*\.\d+|0|\d+\.\d*", text):
            return cls(retention=Decimal(text))
        if text == "1":
            raise ConfigError("budget 1 could mean everything or one entry: write 100% or 1entries")
        if re.fullmatch(r"\d+", text):
            return cls(entries=int(text))
        raise ConfigError(f"budget {text!r} is not understood; {_HELP}")

    def __str__(self) -> str:
        """Text that `parse` reads back: ``"64"``, ``"1entries"`` or ``"1.5%"``."""
        if self.entries is not None:
            return str(self.entries) if self.entries > 1 else "1entries"
        assert self.retention is not None
        percent = (self.retention * 100).normalize()
        return f"{percent:f}%"

    def resolve(self, seq_len: int) -> int:
        """Return the number of entries for a prompt of `seq_len` tokens, in ``1 ... seq_len`` (halves are rounded up)."""
        if self.entries is not None:
            return min(self.entries, seq_len)
        assert self.retention is not None
        wanted = (self.retention * seq_len).quantize(Decimal(1), rounding=ROUND_HALF_UP)
        return min(max(1, int(wanted)), seq_len)
