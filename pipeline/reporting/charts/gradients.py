"""What a watched fine-tuning did layer by layer: gradients, steps and dead units over depth and time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.ticker import MaxNLocator

from pipeline.arrays import Float64Array
from pipeline.reporting.charts.style import INK, new_figure, short
from pipeline.results import FinetuneResult

MOST_NAMED = 45
"""Layers whose names fit beside the map; of more, some are named."""
_ORDERS = 6.0
"""Orders of magnitude that colours tell apart, at most; what is smaller looks like the smallest."""


def save_gradients(results: Sequence[FinetuneResult], path: Path) -> None:
    """Draw a row of three maps for each run: layers from the line upwards, epochs from left to right.

    Their colours are the norm of the gradient, the change of the weights by a step as a share of them, and the share of
    dead units; what has none (no bias to see it by, or a number that is not finite) is white.

    Parameters
    ----------
    results : sequence of FinetuneResult
        Trained with ``watch="gradients"``.
    path : Path
        Of a PNG file.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    tables = [{key: _table(result, key) for key in ("gradient", "weight", "update", "dead")} for result in results]
    heights = [float(np.clip(0.16 * len(table["gradient"]) + 1.2, 2.4, 9)) for table in tables]
    figure = new_figure(12, sum(heights))
    places = figure.subplots(len(results), 3, squeeze=False, height_ratios=heights, sharey="row")
    for row, result, table in zip(places, results, tables, strict=True):
        gradient, dead = table["gradient"], table["dead"]
        share = np.divide(
            table["update"], table["weight"], out=np.full_like(gradient, np.nan), where=table["weight"] > 0
        )
        _map(row[0], gradient, _decades(gradient), "cividis", "norm of the gradient")
        _map(row[1], share, _decades(share), "cividis", "step, as a share of the weights")
        _map(row[2], dead, Normalize(0, 1), "Reds", "dead units, as a share")
        _name_layers(row[0], list(result.history[0]["gradients"]))
        told = f"{result.backbone}, freeze {result.freeze}, seed {result.seed}, shots {result.shots}"
        row[0].set_title(f"{told}\n{row[0].get_title(loc='left')}", fontsize=10, color=INK, loc="left")
    figure.savefig(path, format="png", dpi=120)


def _table(result: FinetuneResult, key: str) -> Float64Array:
    """Return one of the numbers of every layer and epoch (layers, epochs), NaN where there is none."""
    records = [epoch["gradients"].values() for epoch in result.history]
    return np.array([[layer[key] for layer in record] for record in records], np.float64).T


def _decades(values: Float64Array) -> LogNorm:
    """Return a scale for the positive ones."""
    known = values[np.isfinite(values) & (values > 0)]
    highest = float(known.max()) if known.size else 1.0
    lowest = float(known.min()) if known.size else 0.1
    return LogNorm(max(min(lowest, highest / 10), highest / 10**_ORDERS), highest)


def _map(axes: Axes, values: Float64Array, norm: Normalize, colours: str, label: str) -> None:
    shown = np.where(np.isfinite(values), values, np.nan)
    shown = np.maximum(shown, norm.vmin or 0.0)  # a gradient of 0 has no logarithm, but it is not missing
    edges: Any = (0.5, values.shape[1] + 0.5, -0.5, len(values) - 0.5)
    image = axes.imshow(
        shown, cmap=colours, norm=norm, aspect="auto", origin="lower", extent=edges, interpolation="nearest"
    )
    axes.figure.colorbar(image, ax=axes, pad=0.02)
    axes.set_title(label, fontsize=10, color=INK, loc="left")
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _name_layers(axes: Axes, layers: Sequence[str]) -> None:
    step = -(-len(layers) // MOST_NAMED)
    named = range(len(layers) - 1, -1, -step)
    axes.set_yticks(list(named), [short(layers[place]) for place in named], fontsize=7)
