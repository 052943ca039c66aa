"""Figures for a paper: as wide as a column, in PNG, PDF or SVG by their suffix."""

from __future__ import annotations

import math
import textwrap
from typing import Any

from etils import epath

from sgpt_jax.errors import InputError
from sgpt_jax.files.lines import atomic_write

COLUMN = 3.35  # inches: a column of a paper with two
FORMATS = ("png", "pdf", "svg")
# Text stays text in PDF and SVG, and the same figure is the same bytes.
_STYLE: dict[Any, Any] = {
    "font.size": 7,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.0,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "sgpt",
}
_LABEL = 60  # characters of a legend's line
MARKERS = "osD^v<>"  # those that can be hollow


def check_path(path: epath.Path) -> None:
    """Raises InputError for a suffix that is none of `FORMATS`."""
    if path.suffix.lower().lstrip(".") not in FORMATS:
        raise InputError(f"{path}: a figure ends in {', '.join('.' + each for each in FORMATS)}")


def style() -> Any:
    """What a figure is drawn and saved in: a context manager."""
    import matplotlib

    return matplotlib.rc_context(_STYLE)


def panels(count: int, height: float = 2.1) -> tuple[Any, list[Any]]:
    """A figure with so many axes: one is as wide as a column, several are two in a row over the page's width.

    `height` is that of a row in inches; `legend` adds its own.
    """
    from matplotlib.figure import Figure

    columns = min(2, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(COLUMN * columns, height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for unused in grid[count:]:
        unused.remove()
    return figure, grid[:count]


def sizes(value: float, _: object = None) -> str:
    """A number of parameters or documents as papers write it: 135M, 1.3B, 100."""
    for unit, name in ((1e9, "B"), (1e6, "M")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:,.6g}"


def legend(figure: Any, axes: list[Any]) -> None:
    """One legend below all axes, one entry for each label, which is broken where a column would be too narrow."""
    found: dict[str, Any] = {}
    for each in axes:
        handles, labels = each.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    if found:
        box = figure.legend(
            found.values(),
            [textwrap.fill(label, _LABEL) for label in found],
            loc="outside lower center",
            ncols=min(2, len(axes)),
            fontsize=6,
            handlelength=1.8,
        )
        figure.set_figheight(figure.get_figheight() + box.get_window_extent().height / figure.dpi)


def save(figure: Any, path: epath.Path) -> None:
    """Writes a figure, whole or not at all.

    Raises:
        InputError: the suffix is none of `FORMATS`.
    """
    check_path(path)
    kind = path.suffix.lower().lstrip(".")
    undated: dict[str, Any] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind, {})
    with atomic_write(path) as stream:
        figure.savefig(stream, format=kind, dpi=300, metadata=undated)
