"""How fast this device moves memory, measured in this process with its threads: the limit of a decode step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtool.infer.live import clock
from kvtool.infer.stress_memory import free_bytes, last_level_cache_bytes

if TYPE_CHECKING:
    import torch

#: Repetitions of each way to move memory; the fastest counts, as everything else only slows down.
REPEATS = 7


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Measured bandwidth.

    Attributes
    ----------
    bytes_per_s : float
        The best of the ways.
    ways : dict of str to float
        ``sum`` reads a tensor, ``product`` multiplies a matrix with a vector as a decode step does, ``copy`` reads and writes.
    n_bytes : int
        Size of the tensor.
    """

    bytes_per_s: float
    ways: dict[str, float]
    n_bytes: int


def measure_bandwidth(device: torch.device, n_bytes: int | None = None) -> Bandwidth:
    """Measure how many bytes a second a device reads, or reads and writes.

    Parameters
    ----------
    n_bytes : int, optional
        Size of the tensor; default: eight times the last-level cache, from 256 MB to 2 GB, and 4 GB on CUDA, where starting a kernel
        would be a tenth of a shorter pass; at most an eighth of what is free.
    """
    import torch

    n_bytes = probe_bytes(device) if n_bytes is None else n_bytes
    width = 1024
    source = torch.ones(max(1, n_bytes // 4 // width), width, device=device)
    size = source.numel() * source.element_size()
    vector, target = torch.ones(width, device=device), torch.empty_like(source)
    ways: dict[str, tuple[Callable[[], object], int]] = {
        "sum": (lambda: source.sum(), size),
        "product": (lambda: torch.mv(source, vector), size),
        "copy": (lambda: target.copy_(source), 2 * size),
    }
    found = {name: moved / _fastest(run, device) for name, (run, moved) in ways.items()}
    return Bandwidth(max(found.values()), found, size)


def probe_bytes(device: torch.device) -> int:
    """Return the size of the tensor that `measure_bandwidth` takes by itself; it holds two of them."""
    free = free_bytes([device])
    wanted = max(256 << 20, min(2 << 30, 8 * (last_level_cache_bytes(device) or 0)))
    wanted = 4 << 30 if device.type == "cuda" else wanted
    return wanted if free is None else min(wanted, free // 8)


def _fastest(run: Callable[[], object], device: torch.device) -> float:
    run()
    times = []
    for _ in range(REPEATS):
        started = clock(device)
        run()
        times.append(clock(device) - started)
    return max(min(times), 1e-9)
