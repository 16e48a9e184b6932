"""matplotlib figures as inline SVG that follows the page: its fonts, its colours, light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, QUIET, GRID, PAPER = "#010101", "#020202", "#030303", "#040404"
SERIES = tuple(f"#0500{number:02x}" for number in range(1, 9))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
"""Colours that stand for those of the page's style sheet, in which every series has one for light and one for dark."""
LEGEND_LINE = 0.16
"""Inches."""
_VARIABLES = {
    INK: "var(--ink)",
    QUIET: "var(--quiet)",
    GRID: "var(--line)",
    PAPER: "var(--card)",
    **{color: f"var(--series-{number})" for number, color in enumerate(SERIES, 1)},
}
_numbers = count(1)


@contextmanager
def themed(width: float = 5.4, height: float = 3.5) -> Iterator[tuple[Figure, Axes]]:
    """Yield a figure of inches `width` by `height` with one pair of axes, drawn in the page's colours."""
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "font.size": 9,
        "text.parse_math": False,
        "text.color": INK,
        "axes.edgecolor": QUIET,
        "axes.labelcolor": INK,
        "xtick.color": QUIET,
        "ytick.color": QUIET,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "grid.color": GRID,
        "legend.frameon": False,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
    }
    with rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots()


def legend_above(figure: Figure, columns: int = 1) -> None:
    """Name the series above the axes, in room of its own: inside, marks would pass for data, and lines be hidden."""
    names = sum(len(axes.get_legend_handles_labels()[1]) for axes in figure.axes)
    figure.set_figheight(figure.get_figheight() + LEGEND_LINE * -(-names // columns))
    figure.legend(loc="outside upper left", ncols=columns, fontsize=8)


def to_svg(figure: Figure, label: str) -> str:
    """Return a figure as one ``<svg>`` element without outside references, `label` as its text alternative.

    Ids are made unique within the process, because several charts share a page.
    """
    from markupsafe import escape

    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    prefix = f"c{next(_numbers)}-"
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\1{prefix}", svg)
    svg = re.sub(r"#0[1-5][0-9a-f]{4}\b", lambda match: _VARIABLES.get(match[0], match[0]), svg)
    svg = re.sub(r"font: (?:\w+ )?(\d+(?:\.\d+)?px)[^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"\s+xmlns(:xlink)?=\"[^\"]*\"", "", svg, count=2)
    svg = svg.replace("xlink:href", "href")
    box = re.search(r'viewBox="[^"]*"', svg)
    opening = f'<svg {box[0] if box else ""} role="img" aria-label="{escape(label)}">'
    return re.sub(r"<svg[^>]*>", lambda _: opening, svg, count=1)
