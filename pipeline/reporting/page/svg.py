"""Charts as inline SVG that follows the page: its fonts and its colours, light and dark."""

from __future__ import annotations

import io
import re
from itertools import count

from markupsafe import escape
from matplotlib import rc_context
from matplotlib.figure import Figure

from pipeline.reporting.charts.theme import Theme, draw_text

# These colours stand for variables of the page's style sheet, which has a value of each for light and for dark.
_VARIABLES = {
    "#010101": "var(--ink)",
    "#020202": "var(--quiet)",
    "#030303": "var(--line)",
    "#040404": "var(--accent)",
    **{f"#0500{number:02x}": f"var(--series-{number})" for number in range(1, 9)},
}
_INK, _QUIET, _GRID, _ACCENT, *_SERIES = _VARIABLES
PAGE = Theme(_INK, _QUIET, _GRID, _ACCENT, paper="none", series=_SERIES, font_size=9, percent=True)
"""The theme of the page."""
LEGEND_LINE = 0.16  # inches
_numbers = count(1)


def add_legend(figure: Figure, columns: int = 1) -> None:
    """Name the series above the axes, where they hide nothing, and make the figure higher by as much."""
    names = sum(len(axes.get_legend_handles_labels()[1]) for axes in figure.axes)
    figure.set_figheight(figure.get_figheight() + LEGEND_LINE * -(-names // columns))
    figure.legend(loc="outside upper left", ncols=columns, fontsize=8)


def to_svg(figure: Figure, label: str) -> str:
    """Return a figure as one ``<svg>`` element that refers to nothing outside, with `label` as its text alternative.

    Ids are made unique within the process, because several charts share a page.
    """
    text = io.StringIO()

    def write() -> None:
        text.truncate(text.seek(0))
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})

    with rc_context(PAGE.style):
        draw_text(figure, write)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    prefix = f"c{next(_numbers)}-"
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\1{prefix}", svg)
    svg = re.sub("|".join(_VARIABLES), lambda match: _VARIABLES[match[0]], svg)
    svg = re.sub(r"font: (?:\w+ )?(\d+(?:\.\d+)?px)[^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"\s+xmlns(:xlink)?=\"[^\"]*\"", "", svg, count=2)
    svg = svg.replace("xlink:href", "href")
    box = re.search(r'viewBox="[^"]*"', svg)
    opening = f'<svg {box[0] if box else ""} role="img" aria-label="{escape(label)}">'
    return re.sub(r"<svg[^>]*>", lambda _: opening, svg, count=1)
