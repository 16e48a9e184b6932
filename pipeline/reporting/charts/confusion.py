"""Which classes are taken for which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from pipeline.arrays import Float64Array, IntArray
from pipeline.reporting.charts.theme import SCREEN, short

MOST_COUNTED = 30  # with more classes, cells are too small for counts
MOST_NAMED = 120
MOST_SLANTED = 15


def confusion_counts(y_true: IntArray, y_pred: IntArray, n_classes: int) -> IntArray:
    """Return how often each true class (row) was called each class (column), (K, K) int64."""
    return np.bincount(y_true * n_classes + y_pred, minlength=n_classes**2).reshape(n_classes, n_classes)


def draw_confusion(axes: Axes, counts: IntArray, classes: Sequence[str]) -> None:
    """Draw how often each true class (row of the k x k counts) was called each class (column).

    Cells show their counts for up to 30 classes; rows and columns are named for up to 120.
    """
    k = len(classes)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    norm = PowerNorm(1 if k <= MOST_COUNTED else 0.5, 0, 1)  # without counts, rare mistakes need a darker colour
    image = axes.imshow(shares, cmap="Blues", norm=norm, interpolation="nearest")
    axes.set(xlabel="predicted", ylabel="true")
    axes.grid(visible=False)
    axes.spines[:].set_visible(True)
    if k <= MOST_COUNTED:
        _write_counts(axes, counts, shares)
    else:
        axes.figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.6)
    if k > MOST_NAMED:
        return
    names = [short(name) for name in classes]
    size = float(np.clip(420 / k, 5.5, 10))
    if k > MOST_SLANTED:
        turn: dict[str, Any] = {"rotation": 90}
    else:
        turn = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if max(map(len, names)) > 3 else {}
    axes.set_xticks(np.arange(k), names, fontsize=size, **turn)
    axes.set_yticks(np.arange(k), names, fontsize=size)


def _write_counts(axes: Axes, counts: IntArray, shares: Float64Array) -> None:
    size = float(np.clip(160 / len(counts), 6, 10))
    for row, column in np.argwhere(counts > 0):
        right, dark = row == column, shares[row, column] > 0.5
        color = "white" if dark else (SCREEN.ink if right else SCREEN.accent)
        weight = "normal" if right else "bold"
        axes.text(
            column, row, str(counts[row, column]), ha="center", va="center", color=color, fontsize=size, weight=weight
        )


def confusion_figure(y_true: IntArray, y_pred: IntArray, classes: Sequence[str], title: str = "") -> Figure:
    """Return the confusion matrix of test predictions (class numbers), its size chosen by the number of classes."""
    side = float(np.clip(0.45 * len(classes), 4.5, 16))
    margin = 0.07 * max(len(short(name)) for name in classes) if len(classes) <= MOST_NAMED else 0.4
    with SCREEN.figure(side + margin + 0.6, side + margin) as figure:
        figure.set_layout_engine("compressed")  # keeps the matrix square, however long the names are
        axes = figure.subplots()
        draw_confusion(axes, confusion_counts(y_true, y_pred, len(classes)), classes)
        axes.set_title(title)
    return figure
