"""Predict samples in several processes: each opens the capture itself, and only policies and predictions travel."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any

from kvtool.errors import CapacityError, ConfigError
from kvtool.simulate.evaluate import Prediction, evaluate_sample

if TYPE_CHECKING:
    from kvtool.capture.reader import Capture, CapturedSample
    from kvtool.policies import Policy

#: Predictions below which starting processes costs more than it saves.
WORTH = 20_000


def available_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def evaluate_samples(
    capture: Capture, samples: Sequence[CapturedSample], policies: Sequence[Policy], jobs: int = 1
) -> Iterator[tuple[CapturedSample, list[Prediction]]]:
    """Yield the samples with their predictions, in order.

    Parameters
    ----------
    capture : Capture
        An open one.
    samples : sequence of CapturedSample
    policies : sequence of Policy
    jobs : int
        Processes; 0: one per core. Small requests stay in this one. Each holds one sample's statistics and one layer's probes. A script
        that asks for more than one needs ``if __name__ == "__main__":``, as always with processes in Python.

    Raises
    ------
    ConfigError
        Fewer than 0 jobs.
    CapacityError
        A process was killed, most often for memory.
    """
    if jobs < 0:
        raise ConfigError(f"jobs={jobs} must be at least 0 (0: one per core)")
    jobs = min(jobs or available_cores(), len(samples))
    if jobs < 2 or len(samples) * len(policies) < WORTH:
        for sample in samples:
            yield sample, evaluate_sample(sample, policies)
        return
    import multiprocessing

    # A fresh interpreter: neither HDF5 nor torch's threads survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, _start, (str(capture.path.resolve()), list(policies))) as pool:
        try:
            places = [capture.samples.index(sample) for sample in samples]
            yield from zip(samples, pool.map(_work, places), strict=True)
        except BrokenProcessPool as error:
            raise CapacityError("a process of the simulation was killed, most likely for memory; use --jobs 1") from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_mine: dict[str, Any] = {}


def _start(path: str, policies: list[Policy]) -> None:
    """Set a worker up: its own open file, one thread, and an end with its parent."""
    import torch

    from kvtool.capture.reader import open_capture

    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _mine.update(capture=open_capture(path), policies=policies)


def _end_with_parent() -> None:
    """A killed parent cannot stop its workers, which would wait for work for ever."""
    import multiprocessing

    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(place: int) -> list[Prediction]:
    return evaluate_sample(_mine["capture"].samples[place], _mine["policies"])
