"""Scales of float16, checksums, and one clear line for every kind of damaged file."""

from __future__ import annotations

import shutil

import capture_toy as toy
import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kvtool.capture.reader import open_capture
from kvtool.capture.runner import CaptureConfig, run_capture
from kvtool.capture.store import to_half
from kvtool.errors import CapacityError, DataError
from kvtool.policies.base import LayerView


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    path = tmp_path_factory.mktemp("capture") / "c.h5"
    run_capture(CaptureConfig("toy", "llama", 2, windows=(8,)), toy.build_loaded("llama"), toy.make_samples(2), path)
    return path


@settings(max_examples=60, deadline=None)
@given(arrays(np.float32, (3, 2, 5), elements=st.floats(-1, 1, width=32)), st.integers(-100, 100))
def test_to_half_keeps_eleven_bits_at_any_magnitude(unit, exponent):
    array = unit * np.float32(2.0**exponent)
    stored = to_half([array], "x")
    value = stored.array.astype(np.float32) * stored.attrs["scale"][0]
    peak = np.abs(array).max()
    np.testing.assert_allclose(value[0], array, rtol=2**-11, atol=peak * 2**-39)


def test_to_half_refuses_what_is_not_finite():
    for bad in (np.inf, np.nan):
        with pytest.raises(DataError, match="gain of layer 1 is not finite"):
            to_half([np.ones((1, 1, 2), np.float32), np.array([[[1, bad]]], np.float32)], "gain")


def test_sample_reads_back(captured):
    with open_capture(captured) as capture:
        assert [s.id for s in capture.samples] == ["toy-0", "toy-1"]
        sample, encoded = capture.samples[1], toy.make_samples(2)[1]
        assert sample.prompt_ids == encoded.prompt_ids
        assert sample.answer_ids == encoded.answer_ids
        assert sample.meta == {"index": 1}
        assert (sample.answers, sample.answer_source, sample.answer_truncated) == (("a",), "gold", False)
        views = sample.views()
        assert [v.layer for v in views] == [0, 1]
        assert all(isinstance(v, LayerView) for v in views)
        assert views[1].statistic("window_mean/8").shape == (4, sample.seq_len)
        assert views[1].statistic("key_norm").shape == (2, sample.seq_len)
        probes = sample.probes()
        assert probes.attention.shape == probes.gain.shape == (2, 4, 3, sample.seq_len)
        assert probes.attention.dtype == np.float32
        np.testing.assert_allclose(probes.attention.sum(-1) + probes.attention_own, 1, rtol=1e-3)
        features = sample.features()
        assert features.distance_profile.shape == (2, 4, len(features.edges))
        assert (features.n_rows, features.sink) == (sample.seq_len, 4)


def test_missing_statistic_names_the_option(captured):
    with open_capture(captured) as capture:
        view = capture.samples[0].views()[0]
        with pytest.raises(DataError, match=r"no statistic 'window_mean/48'.*capture again with --windows 48"):
            view.statistic("window_mean/48")


def test_another_model_is_refused(captured):
    with open_capture(captured) as capture:
        capture.check_model(toy.build_loaded("llama").info)
        with pytest.raises(DataError, match="use that model or capture this one"):
            capture.check_model(toy.build_loaded("llama", seed=1).info)


def _one_line(error):
    assert "\n" not in str(error.value)


def _read_everything(path):
    with open_capture(path) as capture:
        for sample in capture.samples:
            sample.probes(), sample.features(), sample.prompt_ids, sample.answer_ids
            for view in sample.views():
                for name in capture.config["statistics"]:
                    view.statistic(name)


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match="not found") as error:
        open_capture(tmp_path / "none.h5")
    _one_line(error)


@pytest.mark.parametrize("text", [b"", b"hello", b"\x89HDF\r\n\x1a\n" + b"\0" * 100])
def test_not_hdf5(tmp_path, text):
    (tmp_path / "x.h5").write_bytes(text)
    with pytest.raises(DataError, match="damaged") as error:
        open_capture(tmp_path / "x.h5")
    _one_line(error)


def test_another_schema(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.attrs["schema"] = "kvtool.capture/999"
    with pytest.raises(DataError, match=r"'kvtool\.capture/999', 'kvtool\.capture/1' is needed"):
        open_capture(tmp_path / "x.h5")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_truncated(captured, tmp_path, share):
    whole = captured.read_bytes()
    (tmp_path / "x.h5").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(DataError, match="damaged") as error:
        _read_everything(tmp_path / "x.h5")
    _one_line(error)


def test_damage_in_the_middle_is_an_error_or_harmless(captured, tmp_path):
    """64 flipped bytes anywhere: one line, or everything reads as before (unused space, or small attributes' padding)."""
    whole, messages = captured.read_bytes(), []
    rng = np.random.default_rng(0)
    for start in rng.integers(0, len(whole) - 64, size=40):
        broken = bytearray(whole)
        broken[start : start + 64] = bytes(b ^ 0x5A for b in broken[start : start + 64])
        (tmp_path / "x.h5").write_bytes(broken)
        try:
            _read_everything(tmp_path / "x.h5")
        except DataError as error:
            messages.append(str(error))
    assert len(messages) > 30
    assert not any("\n" in message for message in messages)


def test_missing_data_set(captured, tmp_path):
    shutil.copy(captured, tmp_path / "x.h5")
    with h5py.File(tmp_path / "x.h5", "r+") as file:
        del file["samples/00000/probes/gain"]
    with pytest.raises(DataError, match="damaged or incomplete"), open_capture(tmp_path / "x.h5") as capture:
        capture.samples[0].probes()


def test_torn_sample_is_left_out(captured, tmp_path):
    shutil.copy(captured, tmp_path / "x.h5")
    with h5py.File(tmp_path / "x.h5", "r+") as file:
        del file["samples/00000"].attrs["complete"]
    with open_capture(tmp_path / "x.h5") as capture:
        assert [s.id for s in capture.samples] == ["toy-1"]


def test_full_disk_while_putting_together(tmp_path, monkeypatch):
    """The file-size limit of the operating system stands for a full disk: parts survive, a later run finishes."""
    import resource

    loaded, samples, out = toy.build_loaded("llama"), toy.make_samples(3), tmp_path / "c.h5"
    config = CaptureConfig("toy", "llama", 3, windows=(8,))
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    try:
        with pytest.raises(CapacityError, match="no space left") as error:
            run_capture(config, loaded, samples, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    _one_line(error)
    assert not out.exists()
    assert run_capture(config, loaded, samples, out).n_reused == 3
    _read_everything(out)
