"""Stage 2: train heads on cached features, choose their parameters on val, look at test once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from features_cache import Catalog
from pipeline.errors import FitError
from pipeline.evaluation.intervals import wilson
from pipeline.heads.cached import Layer, select
from pipeline.heads.registry import Head, find_head
from pipeline.heads.schedule import Cut, Finished, Progress, check_rows, cut_layers, run_trials
from pipeline.heads.store import SavedModel, check_destination, current_versions, save_model
from pipeline.heads.trial import Outcome
from pipeline.results import FitResult, to_json

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class TestPredictions:
    """What one model said about each test row.

    Parameters
    ----------
    uris, groups : (n,) str
        Names of the images, and of the groups they belong to; ``""`` is no group.
    y_true, y_pred : (n,) int64
        Class numbers.
    probabilities : (n, K) float64 or None
        Of all classes, a line each row, as the head gives them; ``None`` for heads without probabilities.
    """

    uris: NDArray[np.str_]
    groups: NDArray[np.str_]
    y_true: NDArray[np.int64]
    y_pred: NDArray[np.int64]
    probabilities: NDArray[np.float64] | None

    @property
    def probability(self) -> NDArray[np.float64] | None:
        """That of `y_pred` (n,)."""
        if self.probabilities is None:
            return None
        return np.asarray(self.probabilities[np.arange(len(self.y_pred)), self.y_pred])


@dataclass(frozen=True, eq=False)
class FitReport:
    """All results of a call, in the order layers × heads × seeds × shots.

    Parameters
    ----------
    results : list of FitResult
    predictions : list of TestPredictions
        One for each result.
    notes : list of str
        What a user should know, a sentence each.
    classes : tuple of str
        Class names by number.
    best : int
        Index of the result of best validation accuracy, the first on a tie: the one that is saved.
    saved : Path or None
        The model file.
    """

    results: list[FitResult]
    predictions: list[TestPredictions]
    notes: list[str]
    classes: tuple[str, ...]
    best: int
    saved: Path | None


def fit(
    cache: str | Path | Catalog,
    layers: Sequence[str] | None = None,
    heads: Sequence[str] = ("logreg",),
    seeds: Sequence[int] = (0,),
    shots: Sequence[int | str] = ("all",),
    source: str | None = None,
    backbone: str | None = None,
    pool: str | None = None,
    save: str | Path | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
    on_result: Callable[[FitResult, TestPredictions], None] | None = None,
) -> FitReport:
    """Train every head on every layer with every seed and number of shots.

    Parameters
    ----------
    cache : str, Path or Catalog
        A folder of cache files, or one file.
    layers : sequence of str, optional
        Layer names; ``A+B`` joins two. By default each layer of the one file that fits.
    heads : sequence of str, default ``("logreg",)``
        ``FAMILY`` or ``FAMILY/SCALING``, see `pipeline.heads.registry`.
    seeds : sequence of int, default ``(0,)``
        Draw the splits that the source does not give, and the shots.
    shots : sequence of int or "all", default ``("all",)``
        Training rows of each class; parameters are then chosen inside these rows only and val is not used.
    source, backbone, pool : str, optional
        Select a file where the cache holds several.
    save : str or Path, optional
        Write the model of best validation accuracy here, as a skops file.
    jobs : int, optional
        Fits at a time, each on one BLAS thread; by default one a core.
    progress : callable, optional
        Called as ``progress(done, total, text)`` after each fit.
    on_result : callable, optional
        Called as ``on_result(result, predictions)`` as soon as each fit is done, in the order in which they end.

    Raises
    ------
    FitError
        If the rows do not allow a fit; raised before the first one.
    CacheError
        If the cache or a layer cannot be found.
    ModelFileError
        If the model cannot be written.
    """
    _check_choices(heads, seeds, shots)
    seeds, shots = _distinct(seeds), _distinct(shots)
    chosen = _distinct([find_head(name) for name in heads])
    destination = None if save is None else check_destination(save)
    selected = select(cache if isinstance(cache, Catalog) else Catalog(cache), layers, source, backbone, pool)
    if len({layer.table.classes for layer in selected}) > 1:
        raise FitError("the layers are of sources with different classes; fit one source a call, named by --source")
    cuts = cut_layers(selected, seeds, shots)
    trials = [(cut, head) for layer in selected for head in chosen for cut in cuts if cut.layer is layer]
    check_rows(trials)

    def pass_on(place: int, outcome: Outcome) -> None:
        if on_result is not None:
            cut, head = trials[place]
            on_result(_result(cut, head, outcome), _predictions(cut, outcome))

    finished = run_trials(trials, jobs, progress, keep=destination is not None, finished=pass_on)
    pairs = list(zip(trials, finished.outcomes, strict=True))
    results = [_result(cut, head, outcome) for (cut, head), outcome in pairs]
    if destination is not None:
        save_model(destination, _model(finished, trials[finished.best][0].layer, results[finished.best]))
    return FitReport(
        results,
        [_predictions(cut, outcome) for (cut, _), outcome in pairs],
        _notes(trials, finished.outcomes),
        selected[0].table.classes,
        finished.best,
        destination,
    )


def _distinct(values: Sequence[T]) -> list[T]:
    return list(dict.fromkeys(values))


def _check_choices(heads: Sequence[str], seeds: Sequence[int], shots: Sequence[int | str]) -> None:
    for name, values in (("heads", heads), ("seeds", seeds), ("shots", shots)):
        if not values:
            raise FitError(f"fitting needs at least one of {name}, got none")
    for seed in seeds:
        if seed < 0:
            raise FitError(f"a seed is a whole number from 0 on, got {seed}")
    for count in shots:
        if count != "all" and (isinstance(count, str) or count < 1):
            raise FitError(f"shots are a positive number of images per class or 'all', got {count!r}")


def _result(cut: Cut, head: Head, outcome: Outcome) -> FitResult:
    y_true = cut.layer.table.labels[cut.splits.test]
    return FitResult(
        kind="head",
        backbone=cut.layer.handle("backbone"),
        layer=cut.layer.name,
        pool=cut.layer.handle("pool"),
        head=head.name,
        params=outcome.params,
        seed=cut.seed,
        shots=cut.shots,
        n_train=len(cut.splits.train),
        n_val=len(cut.splits.val),
        n_test=len(cut.splits.test),
        validation_accuracy=None if math.isnan(outcome.choice.score) else outcome.choice.score,
        accuracy_ci95=wilson(int((outcome.y_pred == y_true).sum()), len(y_true)),
        **asdict(outcome.metrics),
        seconds=outcome.seconds,
        converged=outcome.converged,
    )


def _predictions(cut: Cut, outcome: Outcome) -> TestPredictions:
    table, test = cut.layer.table, cut.splits.test
    return TestPredictions(
        table.uris[test], table.groups[test], table.labels[test], outcome.y_pred, outcome.probabilities
    )


def _model(finished: Finished, layer: Layer, result: FitResult) -> SavedModel:
    return SavedModel(
        finished.model,
        result.head,
        result.params,
        layer.describe(),
        layer.table.classes,
        to_json(result),
        current_versions(),
    )


def _notes(trials: Sequence[tuple[Cut, Head]], outcomes: Sequence[Outcome]) -> list[str]:
    cuts = dict.fromkeys(cut for cut, _ in trials)
    notes = [note for cut in cuts for note in cut.layer.table.notes]
    notes += [note for cut in cuts for note in cut.splits.notes]
    seeds = {cut.seed for cut in cuts}
    if len(seeds) > 1 and len({cut.splits.train.tobytes() for cut in cuts if cut.shots == "all"}) == 1:
        notes.append(f"all splits are given, so that {len(seeds)} seeds give the same results: one is enough")
    for head in dict.fromkeys(head for _, head in trials):
        choices = [outcome.choice for (_, other), outcome in zip(trials, outcomes, strict=True) if other is head]
        missed, tried = sum(choice.unconverged for choice in choices), sum(choice.tried for choice in choices)
        if missed:
            notes.append(f"{head.name}: the solver hit its iteration limit on {missed} of {tried} candidates")
        if any(math.isnan(choice.score) for choice in choices) and head.family.fixed:
            fixed = ", ".join(f"{name}={value:g}" for name, value in head.family.fixed.items())
            notes.append(f"{head.name}: one row a class leaves nothing to validate on, so {fixed} is taken")
    return _distinct(notes)
