"""What all pictures share: colours that colour-blind people tell apart, names that fit, and how they are saved."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#1f2a44"
ACCENT = "#d1495b"
QUIET = "#8d99ae"
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c7a00", "#000000")
"""Those of Okabe and Ito (2008), their yellow darkened for white paper."""
MARKERS = ("o", "^", "s", "D", "v", "P", "X", "*")
LINES = ("-", "--", ":", "-.")
LONGEST = 30


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of its own, in inches: no display and no global state are touched."""
    return Figure(figsize=(width, height), layout="constrained")


def short(name: str, longest: int = LONGEST) -> str:
    """Return `name` with its middle left out where it is long, and nothing in it read as a formula."""
    if len(name) > longest:
        tail = (longest - 1) // 3
        name = f"{name[: longest - 1 - tail]}…{name[-tail:]}"
    return name.replace("$", r"\$")


def tidy(axes: Axes) -> None:
    """Leave of the frame only what is read."""
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write ``NAME.png`` and ``NAME.svg``, whose text stays text, and return their paths."""
    paths = [folder / f"{name}.{suffix}" for suffix in ("png", "svg")]
    with mpl.rc_context({"svg.fonttype": "none"}):
        for path in paths:
            figure.savefig(path, dpi=150)
    return paths
