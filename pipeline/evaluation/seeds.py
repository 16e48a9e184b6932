"""Results over several seeds: how much they vary, and which heads differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pipeline.evaluation.comparisons import compare_over_splits
from pipeline.evaluation.intervals import wilson
from pipeline.evaluation.predictions import Predictions
from pipeline.results import FitResult, SeedSummary


def summarise_seeds(results: Sequence[FitResult], predictions: Sequence[Predictions]) -> list[SeedSummary]:
    """Summarise each layer, head and number of shots over seeds, in order; return nothing for a single seed.

    Heads are compared if they share their splits and the test rows differ between splits, which is what the corrected
    resampled t-test needs.
    """
    cells: dict[tuple[str, str, int | str], list[int]] = {}
    for index, result in enumerate(results):
        cells.setdefault((result.layer, result.head, result.shots), []).append(index)
    if len(results) == len(cells):
        return []
    found = {cell: _summary([results[index] for index in indices]) for cell, indices in cells.items()}
    for shots in dict.fromkeys(result.shots for result in results):
        rivals = [cell for cell in cells if cell[2] == shots]
        tests = {tuple(predictions[index].uris.tobytes() for index in cells[cell]) for cell in rivals}
        one = results[cells[rivals[0]][0]]
        resampled = len(set(next(iter(tests)))) > 1 or one.cv is not None
        if len(tests) > 1 or not resampled:
            continue
        splits = [np.concatenate([predictions[index].accuracies() for index in cells[cell]]) for cell in rivals]
        p_values = compare_over_splits(splits, one.n_pool, one.n_test // (one.cv or 1))
        for cell, p in zip(rivals, p_values, strict=True):
            found[cell] = replace(found[cell], p_vs_best=p)
    return list(found.values())


def _summary(results: Sequence[FitResult]) -> SeedSummary:
    accuracies = np.array([result.accuracy for result in results])
    one, mean = results[0], float(accuracies.mean())
    return SeedSummary(
        backbone=one.backbone,
        layer=one.layer,
        pool=one.pool,
        head=one.head,
        shots=one.shots,
        seeds=len(results),
        accuracy_mean=mean,
        accuracy_ci95=wilson(round(mean * one.n_test), one.n_test),
        accuracy_sd=float(accuracies.std(ddof=1)),
        accuracy_min=float(accuracies.min()),
        accuracy_max=float(accuracies.max()),
        p_vs_best=None,
    )
