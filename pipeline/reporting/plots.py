"""Pictures of results. Each function draws on the axes it is given; nothing here computes a result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL.Image import Image

from pipeline.results import FinetuneResult

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


def training_curves(axes: Axes, history: Sequence[Mapping[str, float]], best_epoch: int) -> None:
    """Draw the losses over the epochs of one run, and mark the epoch whose weights were kept.

    Parameters
    ----------
    axes : Axes
        Where to draw.
    history : sequence of mapping
        Of a `pipeline.results.FinetuneResult`.
    best_epoch : int
        From 1.
    """
    epochs = [epoch["epoch"] for epoch in history]
    for key, label, color in (("train_loss", "training", QUIET), ("valid_loss", "validation", INK)):
        if key in history[0]:
            axes.plot(epochs, [epoch[key] for epoch in history], color=color, linewidth=2, marker=".", label=label)
    axes.axvline(best_epoch, color=ACCENT, linestyle="--", label=f"kept: epoch {best_epoch}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss")
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def save_training(results: Sequence[FinetuneResult], path: str) -> None:
    """Write the curves of all runs, a panel each, as one picture.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    figure = Figure(figsize=(5 * len(results), 3.6), layout="constrained")
    places = figure.subplots(1, len(results), squeeze=False, sharey=True)[0]
    for axes, result in zip(places, results, strict=True):
        training_curves(axes, result.history, result.params["best_epoch"])
        axes.set_title(
            f"freeze {result.freeze}, seed {result.seed}, shots {result.shots}: test {result.accuracy:.3f}", fontsize=10
        )
    figure.savefig(path, format="png", dpi=120)


def image_strip(axes: Sequence[Axes], images: Sequence[Image], titles: Sequence[str]) -> None:
    """Show one image on each of `axes` under its title; axes left over stay empty."""
    for place in axes:
        place.axis("off")
    for place, image, title in zip(axes, images, titles, strict=False):
        place.imshow(np.asarray(image), cmap="gray")
        place.set_title(title, fontsize=9, color=INK)
