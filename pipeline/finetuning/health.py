"""What the record of a watched run says: do gradients vanish or explode, do units die, do weights move at all?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.arrays import Float64Array
from pipeline.backbones.network_file import TOP_LAYER

VANISHED = 1e-3
"""Gradient in the lowest third of the layers, as a share of that in the highest: with batch norms it is about 1."""
EXPLODED = 1e3
"""The same share where gradients grow on their way down."""
GROWN = 100.0
"""Gradient of an epoch, against that of the first, whose loss is about that of guessing: hardly more can be wrong."""
DEAD = 0.5
"""Share of dead units in a layer: pretrained networks have some, 12 % in a layer of EfficientNet-Lite0."""
LEAP = 0.3
"""Change of the weights by a step, as a share of them, in the median layer: usual are 0.00001 to 0.01."""
STILL = 1e-7
"""The same share in any layer: numbers of float32 are as far apart, so that the change is rounded away."""

Record = Mapping[str, Mapping[str, Any]]


def judge(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a sentence on each thing that is wrong with a run; none for a healthy one, or one of a single epoch.

    The first epoch serves as a yardstick alone: the new head starts from zero, so that what is below it gets next to
    no gradient.

    Parameters
    ----------
    history : sequence of mapping
        Epochs with the ``gradients`` of `pipeline.finetuning.watch.Watch`.
    """
    if len(history) < 2:
        return []
    records: list[Record] = [epoch["gradients"] for epoch in history]
    layers = list(records[0])
    body = [place for place, layer in enumerate(layers) if not layer.startswith(TOP_LAYER)]
    gradient, weight, update = (_column(records, key) for key in ("gradient", "weight", "update"))
    share = np.divide(update, weight, out=np.full_like(update, np.nan), where=weight > 0)[1:]
    across = _across_depth([layers[place] for place in body], np.median(gradient[1:, body], axis=0))
    return [*across, *_over_time(gradient), *_dead(records[-1]), *_steps(layers, share)]


def _column(records: Sequence[Record], key: str) -> Float64Array:
    """Return one of the numbers, of every epoch and layer (epochs, layers)."""
    return np.array([[layer[key] for layer in record.values()] for record in records], np.float64)


def _across_depth(layers: Sequence[str], gradient: Float64Array) -> list[str]:
    """Compare the lowest third of the layers with the highest: single layers differ by their size alone."""
    third = len(layers) // 3
    if not third:
        return []
    low, high = np.median(gradient[:third]), np.median(gradient[-third:])
    if low < VANISHED * high:
        return [
            f"gradients vanish on their way down from {layers[-1]} to {layers[0]}: the lowest third of the layers has "
            f"{low / high:.0e} of what the highest has; freeze more, or begin with pretrained weights"
        ]
    if low > EXPLODED * high:
        return [
            f"gradients explode on their way down from {layers[-1]} to {layers[0]}: the lowest third of the layers has "
            f"{_times(low, high)} what the highest has; take --clip 1, or begin with pretrained weights"
        ]
    return []


def _over_time(gradient: Float64Array) -> list[str]:
    whole = np.sqrt((gradient**2).sum(axis=1))
    bad = np.flatnonzero(~(whole <= GROWN * whole[0]))  # what is not a number, too
    if not len(bad):
        return []
    epoch = bad[0]
    return [
        f"gradients explode: in epoch {epoch + 1} their norm is {whole[epoch]:.3g}, {_times(whole[epoch], whole[0])} "
        "that of the first epoch; take a lower --lr, or --clip 1"
    ]


def _times(value: float, of: float) -> str:
    return f"{value / of:.0f} times" if of > 0 else "any number of times"


def _dead(record: Record) -> list[str]:
    """Name the layer with the most dead units, the uppermost of equals: what is below it dies with it."""
    *inner, output = ((layer, numbers["dead"]) for layer, numbers in record.items())
    if output[1] == 1:  # a loss of exactly zero: nobody learns any more, and nobody has to
        return []
    dead = [(share, place, layer) for place, (layer, share) in enumerate(inner) if share is not None and share >= DEAD]
    if not dead:
        return []
    share, _, layer = max(dead)
    others = f" (and at least half of those of {len(dead) - 1} other layers)" if len(dead) > 1 else ""
    return [
        f"units die: no training image of the last epoch gave a gradient to {share:.0%} of the units of {layer}"
        f"{others}; take a lower --lr"
    ]


def _steps(layers: Sequence[str], share: Float64Array) -> list[str]:
    """Judge how far a step moves the weights, by medians over epochs."""
    with np.errstate(invalid="ignore"):
        usual = np.median(share, axis=0)
    found = []
    if np.nanmedian(usual) > LEAP:
        found.append(
            f"steps are too long: each changes the weights of the median layer by {np.nanmedian(usual):.0%} of their "
            "size; take a lower --lr"
        )
    still = [layer for layer, moved in zip(layers, usual, strict=True) if moved < STILL]
    if still:
        found.append(
            f"{len(still)} of {len(layers)} layers stand still, such as {still[0]}: a step changes their weights by "
            f"less than {STILL:.0e} of their size; take a higher --lr, or a --layer-decay nearer to 1"
        )
    return found
