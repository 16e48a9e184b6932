"""How a fine-tuning went: losses over epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.reporting.charts.style import ACCENT, INK, QUIET, tidy
from pipeline.results import FinetuneResult


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
    tidy(axes)
    axes.legend(frameon=False)


def save_training(results: Sequence[FinetuneResult], path: Path) -> None:
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
