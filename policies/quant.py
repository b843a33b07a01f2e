"""How the entries that are kept are stored: as the model made them, or quantized to 8 or 4 bits. Part of every policy.

Keys are quantized per channel over groups of consecutive entries, values per entry over groups of channels (KIVI, arXiv
2402.02750): keys have few channels with large magnitudes, values have none. A code c of b bits stands for
``centre + (c - (2^b - 1) / 2) * scale``; scale and centre of every group are stored as bfloat16, which has the range of float32:
no model's entries overflow it, and what rounding takes from the centre is added to the range that the codes cover.

Everything here is arithmetic on counts, for plans; `kvtool.infer.quantized` does it to tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvtool.errors import ConfigError

#: Entries that a group of keys must have: scale and centre of fewer cost more than their codes save.
LEAST = 8

#: Bytes of one scale and one centre, bfloat16 each.
PAIR_BYTES = 4

#: Largest group; beyond it a single outlier spoils the codes of too many, and the bytes saved are below 0.4 %.
LARGEST = 1024


@dataclass(frozen=True, slots=True)
class Quant:
    """Storage of kept entries and of new tokens.

    Attributes
    ----------
    quant : str
        ``"none"``, ``"int8"`` or ``"int4"``.
    quant_group : int
        Entries that share a scale per key channel, and channels of a value that share one, at most. New tokens stay as they
        are until a group of them is full.
    quant_residual : int
        Last entries of every head that are never quantized: the most recent tokens.
    """

    quant: Literal["none", "int8", "int4"] = "none"
    quant_group: int = 64
    quant_residual: int = 0

    def __post_init__(self) -> None:
        if not LEAST <= self.quant_group <= LARGEST:
            raise ConfigError(f"quant_group={self.quant_group} must be in {LEAST} ... {LARGEST}")
        if self.quant_residual < 0:
            raise ConfigError(f"quant_residual={self.quant_residual} must be at least 0")
        for name in ("quant_group", "quant_residual"):
            value = getattr(self, name)
            if not self.active and value != Quant.__dataclass_fields__[name].default:
                raise ConfigError(f"{name}={value} needs quantization; add quant=int8, say")

    @property
    def active(self) -> bool:
        """True if entries are quantized."""
        return self.quant != "none"

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return {"none": 0, "int8": 8, "int4": 4}[self.quant]

    def coded(self, n_entries: int) -> int:
        """Return how many of a head's `n_entries` are quantized, the first ones: without the residual and a last group below `LEAST`."""
        free = max(0, n_entries - self.quant_residual)
        rest = free % self.quant_group
        return free - rest if rest < LEAST else free

    def channel_groups(self, width: int) -> int:
        """Return into how many equal groups the channels of a value are split."""
        fewest = -(-width // self.quant_group)
        found = next(n for n in range(fewest, width + 1) if width % n == 0)
        # A width without useful divisors, such as a prime number: one group, rather than groups of a few channels.
        return found if found <= 2 * fewest else 1

    def row_bytes(self, n_entries: int, key_width: int, value_width: int, element_bytes: int) -> int:
        """Return the bytes that one KV head's entries take: codes, scales and centres, and what stays as it is.

        Parameters
        ----------
        n_entries : int
            Entries of the head.
        key_width, value_width : int
            Channels of a key and a value.
        element_bytes : int
            Of an element of the model's own keys and values.
        """
        coded = self.coded(n_entries) if self.active else 0
        codes = coded * (code_bytes(key_width, self.bits) + code_bytes(value_width, self.bits))
        groups = -(-coded // self.quant_group)
        pairs = groups * key_width + coded * self.channel_groups(value_width)
        return codes + pairs * PAIR_BYTES + (n_entries - coded) * (key_width + value_width) * element_bytes


def code_bytes(width: int, bits: int) -> int:
    """Return the bytes of the codes of `width` channels; two codes of 4 bits share a byte."""
    return -(-width * bits // 8)
