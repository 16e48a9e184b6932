"""Results over several seeds: how much they vary, and which heads differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pipeline.arrays import BoolArray, StrArray
from pipeline.evaluation.comparisons import best_validated, compare_over_splits, compare_with_chosen, may_be_best
from pipeline.evaluation.intervals import FEWEST_SPLITS, accuracy_interval
from pipeline.evaluation.metrics import mean_if_known
from pipeline.evaluation.predictions import Predictions
from pipeline.results import FitResult, SeedSummary


def summarise_seeds(results: Sequence[FitResult], predictions: Sequence[Predictions]) -> list[SeedSummary]:
    """Summarise each layer, head and number of shots over seeds, in order; return nothing for a single seed.

    Heads of the same shots are compared if their test rows are the same for each seed.
    """
    cells: dict[tuple[str, str, int | str], list[int]] = {}
    for index, result in enumerate(results):
        cells.setdefault((result.layer, result.head, result.shots), []).append(index)
    if len(results) == len(cells):
        return []
    found = {cell: _summary([results[index] for index in indices]) for cell, indices in cells.items()}
    for shots in dict.fromkeys(result.shots for result in results):
        rivals = [cell for cell in cells if cell[2] == shots]
        said = [[predictions[index] for index in cells[cell]] for cell in rivals]
        tests = {tuple(one.uris.tobytes() for one in of_head) for of_head in said}
        if len(tests) > 1:
            continue
        right, units = np.array([pool_seeds(of_head)[0] for of_head in said]), pool_seeds(said[0])[1]
        chosen = best_validated([mean_validation([results[index] for index in cells[cell]]) for cell in rivals])
        one = results[cells[rivals[0]][0]]
        shared = len(set(next(iter(tests)))) == 1 and one.cv is None
        splits = [np.concatenate([each.accuracies() for each in of_head]) for of_head in said]
        if shared or len(splits[0]) < FEWEST_SPLITS:
            p_values = compare_with_chosen(right, units, chosen)
        else:
            p_values = compare_over_splits(splits, chosen, one.n_pool, one.n_test // (one.cv or 1))
        for cell, p, best in zip(rivals, p_values, may_be_best(right, units), strict=True):
            may_be = bool(best) if len(rivals) > 1 else None
            found[cell] = replace(found[cell], p_vs_best=p, in_best_set=may_be, shared_test=shared)
    return list(found.values())


def pool_seeds(predictions: Sequence[Predictions]) -> tuple[BoolArray, StrArray]:
    """Return whether each test row of each seed was predicted right, and what each row belongs to.

    An image that several seeds test gives several rows of one unit, so it does not count as several images.
    """
    right = np.concatenate([each.right for each in predictions])
    return right, np.concatenate([each.units for each in predictions])


def mean_validation(results: Sequence[FitResult]) -> tuple[float | None, float | None]:
    """Return the mean metric on validation rows and the mean log-loss there, None where a result lacks it."""
    losses = [one.validation_log_loss for one in results]
    return mean_if_known([one.validated for one in results]), mean_if_known(losses)


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
        accuracy_ci95=accuracy_interval(mean, one.n_test, one.n_effective),
        accuracy_sd=float(accuracies.std(ddof=1)),
        accuracy_min=float(accuracies.min()),
        accuracy_max=float(accuracies.max()),
        p_vs_best=None,
    )
