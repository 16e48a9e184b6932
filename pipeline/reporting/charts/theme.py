"""How charts look: colours, marks, text and lines, the same in every chart; the page has a theme of its own."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from matplotlib import rc_context, rcParams
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text

from features_cache import atomic_write, explained
from pipeline.evaluation.wording import ACCURACY, Measure

MARKERS = ("o", "^", "s", "D", "v", "P", "X", "*")
MOST_LINES = len(MARKERS)  # series that one chart can tell apart
LONGEST = 30


@dataclass(frozen=True)
class Theme:
    """The look of a family of charts: colours, size of text in points, shares as percentages or as fractions.

    `ink` is the colour of text, `quiet` of what matters less, `accent` of what stands out, `paper` of the background;
    `series` has eight colours for lines or classes.
    """

    ink: str
    quiet: str
    grid: str
    accent: str
    paper: str
    series: Sequence[str]
    font_size: float
    percent: bool

    @property
    def style(self) -> dict[Any, Any]:
        """Matplotlib's settings for this theme; text in an SVG stays text, and a ``$`` in a name starts no formula."""
        return {
            "svg.fonttype": "none",
            "text.parse_math": False,
            "font.size": self.font_size,
            **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), self.ink),
            **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), self.quiet),
            **dict.fromkeys(("axes.facecolor", "figure.facecolor"), self.paper),
            **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
            **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
            "axes.grid.axis": "y",
            "grid.color": self.grid,
        }

    @contextmanager
    def figure(self, width: float, height: float) -> Iterator[Figure]:
        """Yield an empty figure, in inches, to draw on within the ``with`` block; it needs no display."""
        with rc_context(self.style):
            yield Figure(figsize=(width, height), layout="constrained")

    def share(self, value: float) -> str:
        """Return a share as text: 0.953 or 95.3."""
        return f"{100 * value:.1f}" if self.percent else f"{value:.3f}"

    def show_shares(self, axis: Axis, label: str) -> None:
        """Label an axis of shares and its ticks."""
        axis.set_label_text(f"{label}, %" if self.percent else label)
        if self.percent:
            axis.set_major_formatter(lambda value, _: f"{100 * value:g}")

    def measured(self, measure: Measure, value: float) -> str:
        """Return a value of what methods are compared by as text."""
        return self.share(value) if measure.metric == ACCURACY else measure.text(value)

    def show_measure(self, axis: Axis, measure: Measure) -> None:
        """Label an axis of what methods are compared by, on test images, and its ticks."""
        if measure.metric == ACCURACY:
            self.show_shares(axis, f"test {measure.title}")
        else:
            axis.set_label_text(f"test {measure.title}")


SCREEN = Theme(
    ink="#1f2a44",
    quiet="#8d99ae",
    grid="#e6e9ee",
    accent="#d1495b",
    paper="white",
    # Colours of Okabe and Ito (2008), which colour-blind people tell apart; their yellow is darker for white paper.
    series=("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c7a00", "#000000"),
    font_size=10,
    percent=False,
)
"""The theme of picture files."""


def save_figure(figure: Figure, path: Path, dpi: int) -> None:
    """Write a picture in the format that its ending names; a file of that name is replaced.

    Raises
    ------
    CacheError
        The file cannot be written; it is as it was.
    """
    with rc_context(SCREEN.style), explained(path, "write"), atomic_write(path) as draft:
        draw_text(figure, lambda: figure.savefig(draft, dpi=dpi))


def draw_text(figure: Figure, draw: Callable[[], None]) -> None:
    """Call `draw`; if the usual font lacks a character, call it again with other installed fonts behind it.

    A character that no installed font has is drawn as a box; `characters_without_font` tells which these are.
    """
    lacking = "Glyph "  # how matplotlib's warning begins
    with warnings.catch_warnings():
        warnings.filterwarnings("error", lacking)
        with suppress(UserWarning):
            draw()
            return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", lacking)
        figure.draw_without_rendering()  # which gives the axes their names
        texts: list[Text] = figure.findobj(Text)
        families, _ = _fonts_for(frozenset("".join(text.get_text() for text in texts)))
        for text in texts:
            text.set_fontfamily([*rcParams["font.family"], *families])
        draw()


def characters_without_font(names: Iterable[str]) -> str:
    """Return the characters of `names` that no installed font has, sorted."""
    return "".join(sorted(_fonts_for(frozenset("".join(names)))[1]))


@cache
def _fonts_for(characters: frozenset[str]) -> tuple[list[str], set[str]]:
    """Return the families that draw what the usual font lacks, best first, and the characters that none draws."""
    usual = _drawn_by(fontManager.findfont(FontProperties()))
    missing = {character for character in characters if character.isprintable()} - usual
    families = []
    if missing:
        # the last resort draws a box for everything
        files = {font.name: font.fname for font in fontManager.ttflist if not font.name.startswith("Last Resort")}
        drawn = {family: missing & _drawn_by(file) for family, file in sorted(files.items())}
        while missing and drawn[best := max(drawn, key=lambda family: len(drawn[family] & missing))] & missing:
            families.append(best)
            missing -= drawn[best]
    return families, missing


def _drawn_by(file: str) -> set[str]:
    try:
        return {chr(code) for code in FT2Font(file).get_charmap()}
    except (OSError, RuntimeError):  # a damaged font, or one of pictures
        return set()


def short(name: str, longest: int = LONGEST) -> str:
    """Return `name`, with its middle left out if it is longer than `longest` characters."""
    if len(name) <= longest:
        return name
    tail = (longest - 1) // 3
    return f"{name[: longest - 1 - tail]}…{name[-tail:]}"
