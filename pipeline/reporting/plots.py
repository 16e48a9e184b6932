"""Pictures of results. Each function draws on the axes it is given; nothing here computes a result."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray
from PIL.Image import Image

INK = "#1f2a44"
ACCENT = "#d1495b"
QUIET = "#8d99ae"


def depth_curve(
    axes: Axes,
    layers: Sequence[str],
    accuracies: NDArray[np.float64],
    intervals: NDArray[np.float64],
    baseline: tuple[str, float] | None = None,
) -> None:
    """Draw accuracy against depth.

    Parameters
    ----------
    axes : Axes
        Where to draw.
    layers : sequence of str
        Names from the image upwards, k of them.
    accuracies : ndarray of float64, shape (k, seeds)
        Every seed's accuracy; the line goes through their means.
    intervals : ndarray of float64, shape (k, 2)
        Lower and upper ends, drawn as bars.
    baseline : tuple of str and float, optional
        Name and accuracy of a horizontal line to compare with.
    """
    places = np.arange(len(layers))
    means = accuracies.mean(axis=1)
    best = int(means.argmax())
    axes.vlines(places, intervals[:, 0], intervals[:, 1], color=QUIET, linewidth=5, alpha=0.45, label="95 % interval")
    axes.plot(places, means, color=INK, linewidth=2, marker="o", label="mean over seeds")
    axes.plot(np.repeat(places, accuracies.shape[1]), accuracies.ravel(), ".", color=INK, alpha=0.5, markersize=5)
    axes.plot(places[best], means[best], "o", color=ACCENT, markersize=10, zorder=3)
    axes.annotate(
        f"{layers[best]}  {means[best]:.3f}",
        (places[best], max(intervals[best, 1], accuracies[best].max())),
        (0, 8),
        textcoords="offset points",
        color=ACCENT,
        weight="bold",
        ha="center",
    )
    if baseline:
        axes.axhline(baseline[1], color=QUIET, linestyle="--", label=f"{baseline[0]}  {baseline[1]:.3f}")
    axes.set_xticks(places, layers, rotation=30, ha="right")
    axes.set_ylabel("test accuracy")
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower center")


def confusion_matrix(axes: Axes, counts: NDArray[np.int64], classes: Sequence[str]) -> None:
    """Draw how often each true class (row) was called each class (column).

    Parameters
    ----------
    axes : Axes
        Where to draw.
    counts : ndarray of int64, shape (k, k)
        Test images; rows are the truth.
    classes : sequence of str
        k names.
    """
    mistakes = counts * (1 - np.eye(len(counts), dtype=counts.dtype))
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.argwhere(counts > 0):
        wrong = mistakes[row, column] > 0
        color = ACCENT if wrong else ("white" if shares[row, column] > 0.5 else INK)
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=color, fontsize=9)
    places = np.arange(len(classes))
    axes.set_xticks(places, classes)
    axes.set_yticks(places, classes)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")


def image_strip(axes: Sequence[Axes], images: Sequence[Image], titles: Sequence[str]) -> None:
    """Show one image on each of `axes` under its title; axes left over stay empty."""
    for place in axes:
        place.axis("off")
    for place, image, title in zip(axes, images, titles, strict=False):
        place.imshow(np.asarray(image), cmap="gray")
        place.set_title(title, fontsize=9, color=INK)
