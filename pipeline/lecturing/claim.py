"""What a claim is given and returns, and how figures get their intervals and verdicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
from scipy.special import stdtrit

from pipeline.arrays import Float64Array
from pipeline.errors import SourceError, UnreadableImageError
from pipeline.evaluation.intervals import CONFIDENCE
from pipeline.evaluation.splits import labelled_rows, make_splits
from pipeline.images.loader import digest_of
from pipeline.images.sources.registry import ImageSource, Item, Items
from pipeline.reporting.charts.theme import MARKERS
from pipeline.reporting.page.method_charts import HEIGHT, WIDTH, Chart
from pipeline.reporting.page.svg import PAGE, add_legend, to_svg
from pipeline.results import LectureFigure, Progress

T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """What the claims are measured on, where they may keep what they compute, and whether in a short form."""

    source: ImageSource
    folder: Path
    quick: bool
    progress: Progress

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of what is trained: five, or two in the short form."""
        return tuple(range(2 if self.quick else 5))

    @cached_property
    def split_source(self) -> ImageSource:
        """The source with splits: its own, or those that seed 0 draws. So no seed trains or chooses on test images."""
        items = self.source.items
        labels = np.array([item.label for item in items], np.int64)
        given, groups = (np.array([getattr(item, name) for item in items]) for name in ("split", "group"))
        digests = np.array([list(use_image(self.source, item, digest_of)) for item in items], np.uint8)
        splits = make_splits(labels, given, groups, digests, seed=0)
        parts = {row: name for name in ("train", "val", "test") for row in getattr(splits, name).tolist()}
        named = (item._replace(split=parts.get(row, "")) for row, item in enumerate(items))
        return replace(self.source, items=Items.of(named))

    @cached_property
    def sample(self) -> ImageSource:
        """At most 1,000 labelled images of the source, 200 in the short form, drawn by seed 0."""
        labelled = labelled_rows(np.array([item.label for item in self.source.items], np.int64))
        drawn = np.sort(np.random.default_rng(0).permutation(labelled)[: 200 if self.quick else 1000])
        return replace(self.source, items=self.source.items[drawn])


def use_image(source: ImageSource, item: Item, use: Callable[[bytes], T]) -> T:
    """Return what `use` makes of an image's bytes; raises `SourceError`, which names it, if it cannot be read."""
    try:
        return use(source.read(item))
    except UnreadableImageError as error:
        raise SourceError(f"{item.uri}: {error}; remove it, or mend the source") from error


@dataclass(frozen=True)
class Findings:
    """What was found: figures, charts, and notes on how it was measured."""

    figures: list[LectureFigure]
    charts: list[Chart] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def mean_interval(values: Sequence[float] | Float64Array, tests: int = 1, overlap: float = 0.0) -> tuple[float, float]:
    """Return Student's interval of a mean over seeds, which holds for so many `tests` together.

    Where seeds draw splits of the same images, `overlap` is the number of held-out images over that of training images,
    and the interval is wider (Nadeau and Bengio 2003).

    Examples
    --------
    >>> low, high = mean_interval([1.0, 2.0, 3.0])
    >>> f"{low:.2f} to {high:.2f}"
    '-0.48 to 4.48'
    """
    count, mean = len(values), float(np.mean(values))
    error = float(np.std(values, ddof=1)) * (1 / count + overlap) ** 0.5
    reach = error * float(stdtrit(count - 1, 1 - (1 - CONFIDENCE) / tests / 2))
    return mean - reach, mean + reach


def verdict(interval: tuple[float, float], expected: int) -> str:
    """Return what an interval says about the sign that is expected, 1 or -1; without any spread it says nothing.

    Examples
    --------
    >>> verdict((0.1, 0.2), 1), verdict((0.1, 0.2), -1), verdict((-0.1, 0.2), 1)
    ('agrees', 'contradicts', 'open')
    """
    low, high = interval
    if low <= 0 <= high or low == high:
        return "open"
    return "agrees" if (low > 0) == (expected > 0) else "contradicts"


def p_text(p: float) -> str:
    """Return a p-value with its sign, such as ``p < 0.001``."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def seeds_figure(
    name: str,
    values: Sequence[float] | Float64Array,
    published: str = "",
    origin: str = "",
    *,
    expected: int = 0,
    tests: int = 1,
    overlap: float = 0.0,
) -> LectureFigure:
    """Return the mean of values, one a seed, with its `mean_interval`, and its verdict if a sign is `expected`."""
    interval = mean_interval(values, tests if expected else 1, overlap)
    judged = verdict(interval, expected) if expected else ""
    return LectureFigure(name, float(np.mean(values)), interval, published, origin, judged)


def line_chart(
    title: str,
    caption: str,
    x: Sequence[float],
    lines: dict[str, Float64Array],
    labels: tuple[str, str],
    *,
    ticks: Sequence[str] = (),
    band: bool = True,
) -> Chart:
    """Return a chart of lines by name, each (seeds, x): the mean, and the range of the seeds as a band.

    `labels` name the axes, `ticks` the positions on the first.
    """
    with PAGE.figure(WIDTH, HEIGHT) as figure:
        axes = figure.subplots()
        for number, (name, values) in enumerate(lines.items()):
            color, style = PAGE.series[number % len(MARKERS)], "-" if number < len(MARKERS) else "--"
            mean = values.mean(axis=0)
            axes.plot(x, mean, style, color=color, marker=MARKERS[number % len(MARKERS)], markersize=4, label=name)
            if band:
                axes.fill_between(x, values.min(axis=0), values.max(axis=0), color=color, alpha=0.15, linewidth=0)
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        if ticks:
            axes.set_xticks(x, ticks, rotation=30, ha="right")
        add_legend(figure, columns=2)
        svg = to_svg(figure, f"{title} The numbers are in the table below.")
    heads = list(ticks) or [f"{one:g}" for one in x]
    rows = [(name, *(f"{value:.3g}" for value in values.mean(axis=0))) for name, values in lines.items()]
    return Chart(title, caption, svg, (labels[1], *heads), rows)
