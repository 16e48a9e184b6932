"""Layers crossed with the splits of their rows: the data of every head that is trained."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import FitError
from pipeline.evaluation.folds import cross_splits
from pipeline.evaluation.rows import Layer
from pipeline.evaluation.splits import Splits, make_splits


@dataclass(frozen=True, eq=False)
class SplitLayer:
    """One layer and one split of its rows; a cross-validation has one for each fold."""

    layer: Layer
    seed: int
    shots: int | str
    splits: Splits


def split_layers(
    layers: Sequence[Layer], seeds: Sequence[int], shots: Sequence[int | str], cv: int | None, *, drop_leaks: bool
) -> list[SplitLayer]:
    """Split the rows of each layer; layers of the same files share their splits.

    Raises `FitError` if a layer holds whole activations, which heads do not read.
    """
    for whole in (layer for layer in layers if any(info.shape for _, info in layer.parts)):
        raise FitError(
            f"layer {whole.name} was extracted with pool none, which keeps whole activations; "
            "extract it with another pool, such as avg"
        )
    made: dict[tuple[int, int, int | str], list[Splits]] = {}
    found = []
    for layer, seed, count in itertools.product(layers, seeds, shots):
        table = layer.table
        key = (id(table), seed, count)
        if key not in made:
            columns = (table.labels, table.splits, table.groups, table.digests)
            how: Any = {"near": table.near, "values": table.values}
            if cv is None:
                names = (table.classes, table.uris.tolist())
                made[key] = [make_splits(*columns, seed, count, *names, drop_leaks=drop_leaks, **how)]
            else:
                made[key] = cross_splits(*columns, seed, cv, count, table.classes, **how)
        found += [SplitLayer(layer, seed, count, splits) for splits in made[key]]
    return found
