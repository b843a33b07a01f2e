"""Which prompts of a capture figures per head can be averaged over."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtool.errors import DataError
from kvtool.progress import say

if TYPE_CHECKING:
    from kvtool.capture.reader import Capture, CapturedSample


def usable_prompts(capture: Capture, what: str, *, probes: bool = True) -> list[CapturedSample]:
    """Return the prompts of a capture, all with the same layers to compress; those without probes are left out, and it is said.

    Parameters
    ----------
    capture : Capture
    what : str
        Name of the question, for what is said.
    probes : bool
        Whether probes are needed.

    Raises
    ------
    DataError
        No prompt is left, no layer can be compressed, or the prompts differ in which.
    """
    samples = [sample for sample in capture.samples if sample.n_probe or not probes]
    if not samples:
        raise DataError(f"capture {capture.path} holds no prompt with probes; capture prompts with answers of several tokens")
    if len(samples) < len(capture.samples):
        say(f"{what}: {len(capture.samples) - len(samples)} of {len(capture.samples)} prompts have no probes and are left out")
    masks = {sample.compressible for sample in samples}
    if len(masks) != 1 or not any(next(iter(masks))):
        raise DataError(
            f"capture {capture.path} has no layer that can be compressed, or prompts that differ in which; capture prompts of one length"
        )
    return samples
