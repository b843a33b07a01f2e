"""Figures as files: three formats of one canvas, the same each time."""

from __future__ import annotations

from pathlib import Path

from kvtool.pictures import FORMATS, save_canvas


def test_three_formats_that_do_not_change(tmp_path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    canvas, axes = plt.subplots()
    axes.plot([1, 2], [2, 1])
    axes.set_title("a title")
    first = {path.name: path.read_bytes() for path in save_canvas(canvas, tmp_path / "new", "probe")}
    assert set(first) == {f"probe.{ending}" for ending in FORMATS}
    assert first["probe.png"].startswith(b"\x89PNG")
    assert first["probe.pdf"].startswith(b"%PDF")
    assert b">a title</text>" in first["probe.svg"]
    assert {path.name: path.read_bytes() for path in save_canvas(canvas, tmp_path, "probe")} == first
    plt.close(canvas)
