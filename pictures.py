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
    # Text stays text, ids come from the name; the PDF embeds outlines that every viewer has.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "pdf.fonttype": 42}):
        for ending, metadata in FORMATS.items():
            buffer = io.BytesIO()
            canvas.savefig(buffer, format=ending, dpi=dpi, metadata=metadata)
            path, content = folder / f"{name}.{ending}", buffer.getvalue()
            write_atomic(path, lambda file, content=content: file.write(content))  # type: ignore[misc]
            files.append(path)
    return files
