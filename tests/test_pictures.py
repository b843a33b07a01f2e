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


def test_a_figure_stays_what_it_was_and_its_legend_is_not_cut(tmp_path: Path) -> None:
    """Laid out once for all formats: what stands outside of the axes is inside the picture, and the open figure is unchanged."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    canvas, axes = plt.subplots(layout="constrained", dpi=90)
    axes.plot([1, 2], [2, 1], label="a line")
    axes.set_ylabel("y" * 8, fontsize=40)
    canvas.legend(loc="outside right center", fontsize=30)
    layout, backend = canvas.get_layout_engine(), canvas.canvas
    first = {path.name: path.read_bytes() for path in save_canvas(canvas, tmp_path, "probe", 60)}
    assert (canvas.get_layout_engine(), canvas.canvas, canvas.dpi) == (layout, backend, 90)
    picture = plt.imread(tmp_path / "probe.png")
    assert picture.shape[:2] == (288, 384)  # 6.4 x 4.8 inches at 60 dpi
    border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    assert (border == 1).all()
    assert axes.get_position().x0 > 0.15 and axes.get_position().x1 < 0.85  # noqa: PT018
    assert {path.name: path.read_bytes() for path in save_canvas(canvas, tmp_path, "probe", 60)} == first
    plt.close(canvas)
