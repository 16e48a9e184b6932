"""How a fine-tuning went: losses over epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from pipeline.reporting.charts.theme import SCREEN
from pipeline.results import FinetuneResult


def draw_training(axes: Axes, history: Sequence[Mapping[str, float]], best_epoch: int) -> None:
    """Draw the losses over the epochs of one run, and mark the epoch (from 1) whose weights were kept."""
    epochs = [epoch["epoch"] for epoch in history]
    for key, label, color in (("train_loss", "training", SCREEN.quiet), ("valid_loss", "validation", SCREEN.ink)):
        if key in history[0]:
            axes.plot(epochs, [epoch[key] for epoch in history], color=color, linewidth=2, marker=".", label=label)
    axes.axvline(best_epoch, color=SCREEN.accent, linestyle="--", label=f"kept: epoch {best_epoch}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    axes.set(xlabel="epoch", ylabel="loss")
    axes.legend()


def save_training(results: Sequence[FinetuneResult], path: Path) -> None:
    """Write the curves of all runs as one PNG file, a panel for each run."""
    with SCREEN.figure(5 * len(results), 3.6) as figure:
        panels = figure.subplots(1, len(results), squeeze=False, sharey=True)[0]
        for axes, result in zip(panels, results, strict=True):
            draw_training(axes, result.history, result.params["best_epoch"])
            title = f"freeze {result.freeze}, seed {result.seed}, shots {result.shots}: test {result.accuracy:.3f}"
            axes.set_title(title, fontsize=10)
        figure.savefig(path, format="png", dpi=120)
