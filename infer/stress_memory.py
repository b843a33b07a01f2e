"""Memory of a process: peaks above a starting point, what is free, and what a run will need.

On CUDA the allocator's own counters are used. On Linux CPUs the kernel's high-water mark of the resident set, which can be started
anew (``/proc/self/clear_refs``); where it cannot, there is no figure, and the reason is recorded instead.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from kvtool.models import LoadedModel
    from kvtool.policies.base import Policy

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")

#: A run may plan with this share of what is free: estimates err, and others need memory too.
SAFE_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class Peak:
    """Highest memory of a phase.

    Attributes
    ----------
    used_bytes : int or None
        Above what was held at the start; None where it cannot be measured.
    reserved_bytes : int or None
        What the allocator had taken from the device, in all; CUDA only.
    why_not : str or None
        Why there is no figure.
    """

    used_bytes: int | None
    reserved_bytes: int | None = None
    why_not: str | None = None


class PeakMeter:
    """Measures peaks of phases above what was held when the meter was made.

    Parameters
    ----------
    devices : sequence of torch.device
        Of the model; the figures are sums over CUDA devices, or the process' own where there are none.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._cuda = [device for device in devices if device.type == "cuda"]
        release_memory()
        self._base = self._now()
        self.restart()

    def _now(self) -> int:
        if self._cuda:
            import torch

            return sum(torch.cuda.memory_allocated(device) for device in self._cuda)
        return resident_bytes() or 0

    def restart(self) -> None:
        """Begin another phase; what is held at this moment counts into it, what was freed before does not."""
        self._why_not: str | None = None
        if self._cuda:
            import torch

            for device in self._cuda:
                torch.cuda.reset_peak_memory_stats(device)
            return
        give_back_memory()
        try:
            (PROC / "self/clear_refs").write_text("5")
        except OSError as error:
            self._why_not = f"the resident set's high-water mark cannot be started anew here ({error.strerror or error})"

    def peak(self) -> Peak:
        """Return the peak of the phase."""
        if self._cuda:
            import torch

            used = sum(torch.cuda.max_memory_allocated(device) for device in self._cuda) - self._base
            return Peak(used, sum(torch.cuda.max_memory_reserved(device) for device in self._cuda))
        high = None if self._why_not else status_bytes("VmHWM")
        return (
            Peak(None, why_not=self._why_not or "no /proc/self/status here")
            if high is None
            else Peak(max(0, high - self._base))
        )


def release_memory() -> None:
    """Collect garbage and give freed memory back, so that a starting point holds nothing of what ran before."""
    gc.collect()
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    give_back_memory()


def give_back_memory() -> None:
    """Let the C library give freed blocks back to the system, which would count as resident otherwise."""
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
        if trim is not None:
            trim(0)


def resident_bytes() -> int | None:
    """Return the resident set of this process."""
    return status_bytes("VmRSS")


def status_bytes(key: str) -> int | None:
    """Return a size of ``/proc/self/status``, or None where there is none."""
    try:
        lines = (PROC / "self/status").read_text().splitlines()
    except OSError:
        return None
    found = next((line.split(":")[1].split() for line in lines if line.startswith(f"{key}:")), None)
    return None if found is None else int(found[0]) * 1024


def free_bytes(devices: Sequence[torch.device]) -> int | None:
    """Return what can still be allocated: on CUDA devices, or of main memory and the control group's limit; None if unknown."""
    cuda = [device for device in devices if device.type == "cuda"]
    if cuda:
        import torch

        # Memory that torch holds without using it is free, too.
        held = sum(torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) for device in cuda)
        return held + sum(torch.cuda.mem_get_info(device)[0] for device in cuda)
    try:
        lines = (PROC / "meminfo").read_text().splitlines()
    except OSError:
        return None
    available = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    limits = [n for n in (available, _group_room()) if n is not None]
    return min(limits) if limits else None


def _group_room() -> int | None:
    """Return what the control group still allows (version 2, or 1); None without a limit."""
    for limit, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        try:
            most, now = (CGROUP / limit).read_text().strip(), int((CGROUP / used).read_text())
        except (OSError, ValueError):
            continue
        if most.isdigit() and int(most) < 1 << 60:
            return max(0, int(most) - now)
    return None


def last_level_cache_bytes(device: torch.device) -> int | None:
    """Return the size of the cache between memory and processor, or None where it cannot be read."""
    if device.type == "cuda":
        import torch

        return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or None
    sizes = []
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = index.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KMG")) * unit)
    return max(sizes, default=None)


def weight_bytes(model: Any) -> int:
    """Return the bytes of all parameters, shared ones once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def read_bytes(model: Any) -> int:
    """Return the bytes of the parameters that a decode step reads: all but tables that it looks one row per sequence up in."""
    import torch

    head = model.get_output_embeddings()
    used = {
        id(p) for m in model.modules() if not isinstance(m, torch.nn.Embedding) for p in m._parameters.values() if p is not None
    }
    used |= set() if head is None else {id(p) for p in head.parameters()}
    return sum(p.numel() * p.element_size() for p in model.parameters() if id(p) in used)


def needed_bytes(loaded: LoadedModel, policy: Policy, batch: int, length: int, n_new: int) -> int:
    """Estimate the peak of a run above the model: keys and values of the prompt and the activations of one layer.

    A policy whose budgets depend on one layer only holds one layer of the prompt at a time, others all of them.
    """
    info, config = loaded.info, loaded.model.config.get_text_config()
    itemsize: int = next(loaded.model.parameters()).element_size()
    chunk = policy.when.chunk or length
    hidden = int(config.hidden_size)
    wide = int(getattr(config, "intermediate_size", 0) or getattr(config, "ffn_dim", 0) or 4 * hidden)
    heads = info.n_heads * info.head_dim
    activations = batch * min(chunk, length) * itemsize * (4 * hidden + 3 * wide + 4 * heads)
    per_layer = 2 * info.n_kv_heads * info.head_dim * itemsize * batch
    entries = length if policy.method.keeps_all else min(length, policy.asked(length))
    kept = per_layer * info.n_layers * (entries + n_new)
    if policy.method.keeps_all:
        # A layer's entries are copied into the store, which grows by copying.
        return activations + kept + 2 * per_layer * length
    if policy.when.chunk:
        return activations + kept + 2 * per_layer * chunk
    whole = 1 if policy.method.parts().allocator.layer_local else info.n_layers
    return activations + kept + per_layer * length * (whole + 1)
