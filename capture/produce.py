"""Samples as the files that a capture is put together from, made in this process or on a cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from kvtool.capture.sample import capture_sample
from kvtool.capture.store import part_image
from kvtool.errors import CapacityError, is_out_of_memory

if TYPE_CHECKING:
    from kvtool.capture.runner import CaptureConfig
    from kvtool.data.tasks import Encoded
    from kvtool.executors.execution import Execution
    from kvtool.models import LoadedModel


def made_here(
    config: CaptureConfig, loaded: LoadedModel, samples: Sequence[Encoded], todo: Sequence[int], run: str, _: Execution
) -> Iterator[tuple[int, Any]]:
    """Yield samples by their number, as files, made in this process."""
    for index in todo:
        yield index, made(config, loaded, samples[index], index, run)


def made(config: CaptureConfig, loaded: LoadedModel, sample: Encoded, index: int, run: str) -> memoryview:
    """Return sample number `index` as a file."""
    with _memory_errors(sample):
        stored = capture_sample(config, loaded, sample, permuted=index < config.permute)
    return part_image(stored, run)


def made_on_ray(
    config: CaptureConfig, loaded: LoadedModel, samples: Sequence[Encoded], todo: Sequence[int], run: str, execution: Execution
) -> Iterator[tuple[int, Any]]:
    """Yield samples by their number, as files, as they come from the workers of a Ray cluster.

    Raises
    ------
    CapacityError
        After all others: samples that no worker survived.
    """
    from kvtool.capture.remote import CaptureJob, CaptureTask
    from kvtool.executors.ray_pool import run_on_ray

    tasks = [CaptureTask(index, samples[index]) for index in todo]
    lost = []
    for result in run_on_ray(CaptureJob.of(config, loaded, run), tasks, execution) if tasks else ():
        if result.worker is None:
            lost.append(result.value)
        else:
            yield result.value
    if lost:
        raise CapacityError(f"{len(lost)} samples could not be captured: {lost[0]}; finished samples are kept")


class _memory_errors:
    """Turn running out of memory into one clear line."""

    def __init__(self, sample: Encoded) -> None:
        self.what = f"sample {sample.sample.id} ({len(sample.prompt_ids)} tokens)"

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if is_out_of_memory(error):
            raise CapacityError(
                f"out of memory while capturing {self.what}; finished samples are kept. Use shorter prompts or fewer answer tokens"
            ) from error
