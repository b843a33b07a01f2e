"""Read a capture file. Other stages import this module and no other of the capture stage; it needs no torch to open a file.

The format is described in ``docs/capture-format.md``.

Shapes: L layers, Q query heads, H KV heads, T prompt positions, P probe tokens, M margins.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from numpy.typing import NDArray

from kvtool.capture.records import Features, FloatArray, Probes, RepeatScores
from kvtool.errors import DataError
from kvtool.models import ModelInfo

if TYPE_CHECKING:
    from types import TracebackType

    from torch import Tensor

SCHEMA = "kvtool.capture/1"

__all__ = ["SCHEMA", "Capture", "CapturedSample", "CapturedView", "Features", "Probes", "RepeatScores", "open_capture"]

#: head features that a file need not hold
OPTIONAL_FEATURES = ("masses", "far_entropy", "offset_variance", "head_output", "content_follow", "slot_follow")


def parts_folder(path: Path) -> Path:
    """Return the folder in which a running capture keeps its finished samples."""
    return path.with_name(path.name + ".parts")


def selection_key(name: str) -> str:
    """Return the data set name of a statistic: ``window_mean/32`` -> ``window_mean_32``."""
    return name.replace("/", "_")


@contextmanager
def damage(path: Path) -> Iterator[None]:
    """Turn HDF5's complaints about a damaged file into one clear line."""
    try:
        yield
    except (OSError, KeyError, RuntimeError, ValueError, TypeError, AttributeError, OverflowError) as error:
        what = " ".join(str(error).split())[:160]
        raise DataError(f"capture {path} is damaged or incomplete ({what}); remove it and capture again") from error


@dataclass(frozen=True, slots=True)
class CapturedView:
    """One layer of a captured prompt; a `kvtool.policies.base.LayerView`."""

    layer: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    seq_len: int
    seed: int
    sample: CapturedSample = field(repr=False, compare=False)

    def statistic(self, name: str) -> Tensor:
        """Return a selection statistic, float32 ``[Q, T]`` or ``[H, T]``.

        Raises
        ------
        ConfigError
            No such statistic.
        DataError
            The file lacks it; the message names the capture option to add.
        """
        import torch

        return torch.from_numpy(self.sample.selection(name, self.layer))


@dataclass(frozen=True, slots=True)
class CapturedSample:
    """One captured prompt. Attributes are read when the file is opened, arrays when they are asked for.

    Attributes
    ----------
    id : str
    index : int
        Number in the file.
    seq_len : int
        T, the tokens that a policy may compress.
    n_prompt, n_probe : int
        Tokens of context + question; probe tokens P.
    seed : int
        For policies that draw.
    compress_at : str
        ``"prompt"`` or ``"context"``.
    compressible : tuple of bool
        Per layer; False for sliding windows shorter than the prompt, which keep everything.
    meta : dict
    answers : tuple of str
    answer_source : str
        ``"gold"``, or ``"model"`` where the task has no answer and the model's own greedy one is used.
    answer_truncated : bool
        Only the first tokens of the answer were probed.
    """

    id: str
    index: int
    seq_len: int
    n_prompt: int
    n_probe: int
    seed: int
    compress_at: str
    compressible: tuple[bool, ...]
    meta: dict[str, Any]
    answers: tuple[str, ...]
    answer_source: str
    answer_truncated: bool
    capture: Capture = field(repr=False, compare=False)

    @property
    def evidence_spans(self) -> list[tuple[int, int]]:
        """Spans of tokens that the task names as evidence, as far as they are compressed."""
        spans = [(int(a), min(int(b), self.seq_len)) for a, b in self.meta.get("evidence", [])]
        return [(a, b) for a, b in spans if a < b]

    @property
    def evidence_positions(self) -> NDArray[np.int64]:
        """Positions of `evidence_spans`, ascending, each once."""
        spans = [np.arange(a, b) for a, b in self.evidence_spans]
        return np.unique(np.concatenate([np.empty(0, dtype=np.int64), *spans]))

    @property
    def prompt_ids(self) -> list[int]:
        """Token ids of context + question."""
        return self._array("prompt_ids").tolist()  # type: ignore[no-any-return]

    @property
    def answer_ids(self) -> list[int]:
        """Token ids of the probed answer."""
        return self._array("answer_ids").tolist()  # type: ignore[no-any-return]

    def views(self) -> list[CapturedView]:
        """Return the views of the compressible layers, in order."""
        model = self.capture.model
        return [
            CapturedView(layer, model.n_layers, model.n_heads, model.n_kv_heads, self.seq_len, self.seed, self)
            for layer, compressible in enumerate(self.compressible)
            if compressible
        ]

    def selection(self, name: str, layer: int) -> FloatArray:
        """Return a selection statistic of one layer, float32 ``[Q | H, T]``; errors as `CapturedView.statistic`."""
        from kvtool.policies.statistics import parse_statistic

        if name == "future":
            return self._future(layer)
        kind, window = parse_statistic(name)
        key = f"selection/{selection_key(name)}"
        with damage(self.capture.path):
            group = self.capture.group(self.index)
            if key in group:
                return np.ascontiguousarray(group[key][layer], dtype=np.float32)
            known = ", ".join(group["selection"])
        option = f"the statistic {name} added"
        if window and kind.startswith("window"):
            option = f"--windows {window} added to its other windows"
        raise DataError(f"capture {self.capture.path} has no statistic {name!r} (it has {known}); capture again with {option}")

    def _future(self, layer: int) -> FloatArray:
        """Return the attention of all evaluation probes to each position, summed, float32 ``[Q, T]``."""
        with damage(self.capture.path):
            dataset = self.capture.group(self.index)["probes/attention"]
            scale = np.float32(np.asarray(dataset.attrs["scale"])[layer])
            summed: FloatArray = np.asarray(dataset[layer], dtype=np.float32).sum(axis=1) * scale
            return summed

    def features(self) -> Features:
        """Return the head features."""
        with damage(self.capture.path):
            group = self.capture.group(self.index)["features"]
            edges = np.asarray(group["distance_profile"].attrs["edges"], dtype=np.int64)
            sink_mass, entropy, profile = (
                np.asarray(group[key][()], dtype=np.float32) for key in ("sink_mass", "entropy", "distance_profile")
            )
            more = {key: np.asarray(group[key][()], dtype=np.float32) for key in OPTIONAL_FEATURES if key in group}
            facts = group.attrs
            local, projected = int(facts.get("local", 32)), bool(facts.get("projected", False))
            return Features(
                sink_mass, entropy, profile, edges, int(facts["n_rows"]), int(facts["sink"]), local, projected=projected, **more
            )

    def layer_probes(self, layer: int) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
        """Return one layer's probes: attention and gain ``[Q, P, T]``, and both of the probe tokens' own entries ``[Q, P]``.

        Nothing of the other layers is read.
        """
        keys = ("attention", "gain", "attention_own", "gain_own")
        attention, gain, attention_own, gain_own = (self._array(f"probes/{key}", layer) for key in keys)
        return attention, gain, attention_own, gain_own

    def probes(self) -> Probes:
        """Return the evaluation probes with their scale applied."""
        return Probes(
            self._array("probes/attention"),
            self._array("probes/gain"),
            *(self._array(f"probes/{key}") for key in ("attention_own", "gain_own", "margins", "nll", "rows")),
        )

    def _array(self, key: str, layer: int | None = None) -> NDArray[Any]:
        with damage(self.capture.path):
            dataset = self.capture.group(self.index)[key]
            array: NDArray[Any] = dataset[()] if layer is None else dataset[layer]
            if "scale" in dataset.attrs:
                scale = np.asarray(dataset.attrs["scale"], dtype=np.float32)
                array = array.astype(np.float32)
                array *= scale.reshape(-1, *[1] * (array.ndim - 1)) if layer is None else scale[layer]
            return array


@dataclass(slots=True)
class Capture:
    """An open capture file; use it in a ``with`` statement.

    Attributes
    ----------
    path : Path
    model : ModelInfo
        The captured model.
    config : dict
        Everything that decided the result.
    tokenizer_hash : str
    versions : dict of str to str
    samples : sequence of CapturedSample
        The complete ones, in order.
    """

    path: Path
    model: ModelInfo
    config: dict[str, Any]
    tokenizer_hash: str
    versions: dict[str, str]
    _file: Any = field(repr=False)
    samples: Sequence[CapturedSample] = ()

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; arrays can no longer be read."""
        self._file.close()

    def group(self, index: int) -> Any:
        """Return the HDF5 group of a sample."""
        return self._file[f"samples/{index:05d}"]

    def repeats(self) -> RepeatScores:
        """Return the scores on repeated random tokens; files without them say so in `RepeatScores.skipped`."""
        names = ("induction", "echo", "copy")
        with damage(self.path):
            if "repeats" not in self._file:
                return RepeatScores(None, None, None, dict.fromkeys(names, "the capture is of an older kvtool; capture again"))
            group = self._file["repeats"]
            found = {name: np.asarray(group[name][()], dtype=np.float32) if name in group else None for name in names}
            return RepeatScores(**found, skipped=dict(json.loads(group.attrs["skipped"])))

    def check_model(self, info: ModelInfo) -> None:
        """Refuse a model that is not the captured one.

        Raises
        ------
        DataError
            Configuration or weights differ.
        """
        if info.fingerprint != self.model.fingerprint:
            raise DataError(
                f"capture {self.path} is of {self.model.model_id} ({self.model.architecture}, {self.model.fingerprint}), "
                f"but {info.model_id} ({info.architecture}, {info.fingerprint}) was given; use that model or capture this one"
            )


def open_capture(path: str | Path) -> Capture:
    """Open a finished capture file.

    Parameters
    ----------
    path : str or Path

    Returns
    -------
    Capture

    Raises
    ------
    DataError
        Missing, unfinished, damaged or of another schema.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(_missing(path))
    with damage(path):
        file = h5py.File(path, "r")
    try:
        with damage(path):
            schema = str(file.attrs.get("schema", "none"))
        if schema != SCHEMA:
            raise DataError(f"{path} has schema {schema!r}, {SCHEMA!r} is needed; give a file that kvtool capture has written")
        with damage(path):
            return _open(path, file)
    except BaseException:
        file.close()
        raise


def _missing(path: Path) -> str:
    parts = parts_folder(path)
    if parts.is_dir():
        done = len(list(parts.glob("[0-9]*.h5")))
        return f"capture {path} is not finished ({done} samples in {parts}); run the same capture command again, it continues"
    return f"capture {path} not found; give a file that kvtool capture has written"


def _open(path: Path, file: Any) -> Capture:
    model = json.loads(file.attrs["model"])
    model["windows"] = tuple(model["windows"])
    config, versions = json.loads(file.attrs["config"]), json.loads(file.attrs["versions"])
    capture = Capture(path, ModelInfo(**model), config, str(file.attrs["tokenizer_hash"]), versions, file)
    groups = file["samples"]
    complete = [name for name in sorted(groups) if bool(groups[name].attrs.get("complete", False))]
    capture.samples = tuple(_sample(capture, int(name), groups[name].attrs) for name in complete)
    if not capture.samples:
        raise DataError(f"capture {path} holds no complete sample; remove it and capture again")
    return capture


def _sample(capture: Capture, index: int, attrs: Any) -> CapturedSample:
    return CapturedSample(
        id=str(attrs["id"]),
        index=index,
        seq_len=int(attrs["seq_len"]),
        n_prompt=int(attrs["n_prompt"]),
        n_probe=int(attrs["n_probe"]),
        seed=int(attrs["seed"]),
        compress_at=str(attrs["compress_at"]),
        compressible=tuple(bool(c) for c in attrs["compressible"]),
        meta=json.loads(attrs["meta"]),
        answers=tuple(json.loads(attrs["answers"])),
        answer_source=str(attrs["answer_source"]),
        answer_truncated=bool(attrs["answer_truncated"]),
        capture=capture,
    )
