"""Figures as files: PNG to look at, SVG for pages, PDF for papers, of the same canvas; the same data gives the same files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from kvtool.files import write_atomic

#: Ending -> metadata without date and program, which would differ from run to run.
FORMATS: dict[str, dict[str, Any]] = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}


def save_canvas(canvas: Any, folder: Path, name: str, dpi: int = 150) -> list[Path]:
    """Write a matplotlib figure as ``NAME.png``, ``.svg`` and ``.pdf``, each atomically.

    Parameters
    ----------
    canvas : matplotlib.figure.Figure
        Stays open.
    folder : Path
        Made where it is missing.
    name : str
    dpi : int
        Of the PNG.

    Returns
    -------
    list of Path
    """
    import matplotlib

    files = []
    layout, dpi_before, backend = canvas.get_layout_engine(), canvas.dpi, canvas.canvas
    # Text stays text, ids come from the name; the PDF embeds outlines that every viewer has.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "pdf.fonttype": 42}):
        try:
            # Laid out once, and so alike in all formats; savefig would lay out and draw anew for each.
            canvas.dpi = dpi
            canvas.draw_without_rendering()
            canvas.set_layout_engine("none")
            for ending in FORMATS:
                canvas.dpi = dpi
                path, content = folder / f"{name}.{ending}", _render(canvas, ending)
                write_atomic(path, lambda file, content=content: file.write(content))  # type: ignore[misc]
                files.append(path)
        finally:
            canvas.set_layout_engine(layout or "none")
            canvas.set_canvas(backend)
            canvas.dpi = dpi_before
    return files


def _render(canvas: Any, ending: str) -> bytes:
    """Return a figure as it is laid out as the bytes of a file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_pdf import FigureCanvasPdf
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer, metadata = io.BytesIO(), FORMATS[ending]
    if ending == "png":
        FigureCanvasAgg(canvas).print_png(buffer, metadata=metadata)
    elif ending == "svg":
        FigureCanvasSVG(canvas).print_svg(buffer, metadata=metadata)
    else:
        FigureCanvasPdf(canvas).print_pdf(buffer, metadata=metadata)
    return buffer.getvalue()
