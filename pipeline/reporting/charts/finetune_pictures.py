"""The pictures of a fine-tuning: losses over epochs, and gradients, steps and dead units by layer and epoch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.ticker import MaxNLocator

from pipeline.arrays import Float64Array
from pipeline.evaluation.wording import METRIC_TITLES, metric_text
from pipeline.reporting.charts.theme import SCREEN, save_figure, short
from pipeline.results import FinetuneResult, TunedResult

MOST_NAMED = 45  # with more layers, only every second, third or so is named
_ORDERS = 6.0  # the colours span at most so many orders of magnitude; smaller numbers look like the smallest of these


def save_training(results: Sequence[TunedResult], path: Path) -> None:
    """Write the losses over epochs as one PNG file, a panel for each run, with the epoch whose weights were kept."""
    with SCREEN.figure(5 * len(results), 3.6) as figure:
        panels = figure.subplots(1, len(results), squeeze=False, sharey=True)[0]
        for axes, result in zip(panels, results, strict=True):
            epochs, best = [epoch["epoch"] for epoch in result.history], result.params["best_epoch"]
            for key, label, color in (
                ("train_loss", "training", SCREEN.quiet),
                ("valid_loss", "validation", SCREEN.ink),
            ):
                if key in result.history[0]:
                    losses = [epoch[key] for epoch in result.history]
                    axes.plot(epochs, losses, color=color, linewidth=2, marker=".", label=label)
            axes.axvline(best, color=SCREEN.accent, linestyle="--", label=f"kept: epoch {best}")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_ylim(bottom=0)
            axes.set(xlabel="epoch", ylabel="loss")
            axes.legend()
            title = f"freeze {result.freeze}, seed {result.seed}, shots {result.shots}: test {_reached(result)}"
            axes.set_title(title, fontsize=10)
        save_figure(figure, path, dpi=120)


def _reached(result: TunedResult) -> str:
    """Return what networks are compared by, with its name unless that is accuracy."""
    if isinstance(result, FinetuneResult):
        return f"{result.accuracy:.3f}"
    return f"{METRIC_TITLES[result.metric]} {metric_text(result.metric, getattr(result, result.metric))}"


def save_gradients(results: Sequence[TunedResult], path: Path) -> None:
    """Write a row of three maps for each run as one PNG file: layers from the line upwards, epochs to the right.

    The runs were trained with ``watch="gradients"``. Colours show the norm of the gradient, how much a step changed the
    weights (as a share of them), and the share of dead units. Cells are white where there is no number: without a bias
    dead units cannot be counted, and a gradient may not be finite.
    """
    tables = [{key: _table(result, key) for key in ("gradient", "weight", "update", "dead")} for result in results]
    heights = [float(np.clip(0.16 * len(table["gradient"]) + 1.2, 2.4, 9)) for table in tables]
    with SCREEN.figure(12, sum(heights)) as figure:
        panels = figure.subplots(len(results), 3, squeeze=False, height_ratios=heights, sharey="row")
        for row, result, table in zip(panels, results, tables, strict=True):
            gradient, dead = table["gradient"], table["dead"]
            share = np.divide(
                table["update"], table["weight"], out=np.full_like(gradient, np.nan), where=table["weight"] > 0
            )
            run = f"{result.backbone}, freeze {result.freeze}, seed {result.seed}, shots {result.shots}"
            _draw_map(row[0], gradient, _decades(gradient), "cividis", f"{run}\nnorm of the gradient")
            _draw_map(row[1], share, _decades(share), "cividis", "step, as a share of the weights")
            _draw_map(row[2], dead, Normalize(0, 1), "Reds", "dead units, as a share")
            layers = list(result.history[0]["gradients"])
            step = -(-len(layers) // MOST_NAMED)
            named = range(len(layers) - 1, -1, -step)
            row[0].set_yticks(list(named), [short(layers[index]) for index in named], fontsize=7)
        save_figure(figure, path, dpi=120)


def _table(result: TunedResult, key: str) -> Float64Array:
    """Return one of the watched numbers (layers, epochs), NaN where there is none."""
    records = [epoch["gradients"].values() for epoch in result.history]
    return np.array([[layer[key] for layer in record] for record in records], np.float64).T


def _decades(values: Float64Array) -> LogNorm:
    """Return a logarithmic scale for the positive values."""
    known = values[np.isfinite(values) & (values > 0)]
    highest = float(known.max()) if known.size else 1.0
    lowest = float(known.min()) if known.size else 0.1
    return LogNorm(max(min(lowest, highest / 10), highest / 10**_ORDERS), highest)


def _draw_map(axes: Axes, values: Float64Array, norm: Normalize, colours: str, title: str) -> None:
    shown = np.where(np.isfinite(values), values, np.nan)
    shown = np.maximum(shown, norm.vmin or 0.0)  # a gradient of 0 has no logarithm, but it is not missing
    edges: Any = (0.5, values.shape[1] + 0.5, -0.5, len(values) - 0.5)
    image = axes.imshow(
        shown, cmap=colours, norm=norm, aspect="auto", origin="lower", extent=edges, interpolation="nearest"
    )
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02, format="{x:g}")
    bar.ax.yaxis.set_minor_formatter("")
    axes.set_title(title, fontsize=10, loc="left")
    axes.grid(visible=False)
    axes.spines[:].set_visible(True)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
