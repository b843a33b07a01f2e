"""Quantized tensors: codes of 8 or 4 bits with a scale and a centre per group. Pure functions of tensors.

A code c of b bits stands for ``centre + (c - (2^b - 1) / 2) * scale``. The centre is the middle of a group's range, rounded to
bfloat16; the scale covers the largest distance from that rounded centre. So a constant group comes back as its constant (to half
a step of the rounding error), and no rounding of a scale or centre can push a value out of what the codes reach by more than
a quarter of a step.

Shapes: R rows, M groups of a row, g entries of a group, D channels, C groups of channels, W bytes of an entry's codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtool.errors import DataError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(slots=True)
class Codes:
    """Quantized keys or values.

    Attributes
    ----------
    packed : Tensor ``[R, M, g, W]``
        uint8.
    scale, centre : Tensor
        bfloat16; ``[R, M, 1, 1, D]`` per channel of a group of entries (keys), ``[R, M, g, C, 1]`` per entry and group of
        channels (values).
    bits, width : int
        Bits of a code; D.
    """

    packed: Tensor
    scale: Tensor
    centre: Tensor
    bits: int
    width: int

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.packed, self.scale, self.centre

    def part(self, rows: slice, groups: slice) -> Codes:
        """Return views of some rows and groups."""
        if (rows.stop - rows.start, groups.stop - groups.start) == self.packed.shape[:2]:
            return self
        packed, scale, centre = (t[rows, groups] for t in self.tensors)
        return Codes(packed, scale, centre, self.bits, self.width)

    def grown_to(self, n_groups: int) -> Codes:
        """Return a copy with room for `n_groups` groups."""
        longer = [t.new_zeros(t.shape[0], n_groups, *t.shape[2:]) for t in self.tensors]
        for new, old in zip(longer, self.tensors, strict=True):
            new[:, : old.shape[1]] = old
        return Codes(longer[0], longer[1], longer[2], self.bits, self.width)

    def put(self, first: int, other: Codes) -> None:
        """Write the groups of `other` from group `first` on."""
        for mine, new in zip(self.tensors, other.tensors, strict=True):
            mine[:, first : first + new.shape[1]] = new

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return what the codes stand for, ``[R, M * g, D]``; the only tensor of that size that is made."""
        import torch

        found = unpack(self.packed, self.bits, self.width, dtype)
        n_channel_groups = self.scale.shape[3]
        # Per channel: scale [R, M, 1, 1, D] against codes [R, M, g, 1, D]; per entry: [R, M, g, C, 1] against [R, M, g, C, D / C].
        shaped = found.view(*found.shape[:3], n_channel_groups, -1)
        scale = self.scale.to(dtype)
        shaped.mul_(scale).add_(torch.sub(self.centre.to(dtype), scale, alpha=top_code(self.bits) / 2))
        return found.view(found.shape[0], -1, self.width)


def top_code(bits: int) -> int:
    """Return the largest code."""
    return (1 << bits) - 1


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes ``[..., D]`` of 8 or 4 bits into bytes, uint8 ``[..., ceil(D * bits / 8)]``.

    With 4 bits, byte j holds channel j in its low half and channel j + W in its high half, so that both halves unpack to
    adjacent channels.
    """
    import torch

    codes = codes.to(torch.uint8)
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    low, high = codes.chunk(2, dim=-1)
    return low | (high << 4)


def unpack(packed: Tensor, bits: int, width: int, dtype: torch.dtype) -> Tensor:
    """Return the codes of `pack` as numbers, ``[..., width]``, contiguous."""
    if bits == 8:
        return packed.to(dtype)
    n_bytes = packed.shape[-1]
    found = packed.new_empty(*packed.shape[:-1], width, dtype=dtype)
    found[..., :n_bytes] = packed & 15
    found[..., n_bytes:] = (packed >> 4)[..., : width - n_bytes]
    return found


def quantize_keys(x: Tensor, bits: int, lengths: Tensor | None = None) -> Codes:
    """Quantize per channel over groups of entries.

    Parameters
    ----------
    x : Tensor ``[R, M, g, D]``
    bits : int
        8 or 4.
    lengths : Tensor ``[R]``, optional
        Entries of each row, the rest of its groups is padding; None: no padding.

    Raises
    ------
    DataError
        Values that are not finite.
    """
    import torch

    low = high = x
    if lengths is not None:
        index = torch.arange(x.shape[1] * x.shape[2], device=x.device).view(1, x.shape[1], x.shape[2], 1)
        real = index < lengths.view(-1, 1, 1, 1)
        low, high = x.masked_fill(~real, float("inf")), x.masked_fill(~real, float("-inf"))
    least, most = low.amin(dim=2, keepdim=True), high.amax(dim=2, keepdim=True)
    if lengths is not None:
        filled = real.any(dim=2, keepdim=True)
        least, most = (t.masked_fill(~filled, 0.0) for t in (least, most))
    return _encode(x[:, :, :, None], least[:, :, :, None], most[:, :, :, None], bits)


def quantize_values(x: Tensor, bits: int, n_channel_groups: int) -> Codes:
    """Quantize per entry over groups of channels; for parameters and errors see `quantize_keys`."""
    shaped = x.reshape(*x.shape[:3], n_channel_groups, -1)
    return _encode(shaped, shaped.amin(dim=-1, keepdim=True), shaped.amax(dim=-1, keepdim=True), bits)


def _encode(x: Tensor, least: Tensor, most: Tensor, bits: int) -> Codes:
    """Encode ``[R, M, g, C, c]`` with ranges that broadcast against it."""
    import torch

    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    least, most, half = least.to(wide), most.to(wide), top_code(bits) / 2
    centre = (least / 2 + most / 2).to(torch.bfloat16)
    middle = centre.to(wide)
    scale = (torch.maximum(most - middle, middle - least) / half).to(torch.bfloat16)
    if not bool(torch.isfinite(centre).all() & torch.isfinite(scale).all()):
        raise DataError(
            "keys or values hold numbers that are not finite (or beyond 1e38); they cannot be quantized, leave quant= out"
        )
    step = scale.to(wide)
    # A group whose entries all are its centre has no step: any code stands for the centre.
    codes = (
        ((x.to(wide) - middle) / torch.where(step > 0, step, torch.ones_like(step)) + half).round_().clamp_(0, top_code(bits))
    )
    packed = pack(codes.flatten(3), bits)
    return Codes(packed, scale, centre, bits, int(codes.shape[3] * codes.shape[4]))
