"""Scale rows, choose a head's parameters on held-out rows, and train the final head."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.compose import ColumnTransformer
from sklearn.preprocessing import Normalizer, StandardScaler

from pipeline.arrays import Float32Array, Float64Array, IntArray
from pipeline.evaluation.bootstrap import mean_known
from pipeline.evaluation.calibration import useful_temperature
from pipeline.evaluation.joined import Moments
from pipeline.evaluation.metrics import OF_SCORES, rate
from pipeline.evaluation.multilabel import EVEN, best_thresholds, rate_labels
from pipeline.evaluation.regression import rate_numbers
from pipeline.heads.family import Family, Fitted, Params, Step, of_both
from pipeline.heads.registry import Head
from pipeline.heads.solvers.blocks import StreamedRows, by_blocks
from pipeline.heads.solvers.span import Span, find_span
from pipeline.options import CLASSIFICATION
from pipeline.results import LOWER_IS_BETTER

COLUMNS_LENGTH = 0.2
"""How long joined columns are on average beside features of length 1, which differ by far less than their length."""

_TABLE = "table"


@dataclass(frozen=True)
class Scaled:
    """Rows scaled by statistics of the training rows alone; all of them in memory, or all of them streamed.

    Parameters
    ----------
    train : (n, d) float32
    held : (m, d) float32
    scaler : StandardScaler, Normalizer, ColumnTransformer or None
        Fitted on the training rows; the third has a `Normalizer` for each of several joined layers, and a
        `StandardScaler` for joined columns.
    span : Span or None
        Of the training rows, if it was asked for and is narrower than d.
    """

    train: Float32Array
    held: Float32Array
    scaler: Any
    span: Span | None


@dataclass(frozen=True)
class Fold:
    """Rows to try candidates on, in their span if there is one, and their labels."""

    train: Float32Array
    y: NDArray[Any]
    held: Float32Array
    y_held: NDArray[Any]


@dataclass(frozen=True)
class Choice:
    """The chosen parameters.

    Parameters
    ----------
    params : dict
    score : float
        The metric on the held-out rows of all folds, accuracy averaged over classes if balanced, an error with a minus;
        NaN for fixed parameters.
    log_loss : float or None
        Mean log-loss on these rows, before calibration; None for fixed parameters, or without probabilities.
    temperature : float or None
        Calibrates the probabilities of the chosen candidate; fitted on these rows, and None if it would not help.
    unconverged : int
        Number of candidates whose solver hit its iteration limit on some fold.
    tried : int
        Number of candidates.
    thresholds : (K,) float64 or None
        Scores from which on each of several labels is predicted, found on these rows; None for other tasks, or if
        nothing could be validated.
    """

    params: Params
    score: float
    log_loss: float | None
    temperature: float | None
    unconverged: int
    tried: int
    thresholds: Float64Array | None = None


def scale(
    scaling: str,
    train: Float32Array,
    held: Float32Array,
    *,
    rotated: bool,
    dims: Sequence[int] = (),
    joined: Moments | None = None,
) -> Scaled:
    """Scale `train` (n, d) and `held` (m, d) by statistics of `train`; both may be overwritten.

    Streamed rows are read once for means and variances, and scaled whenever they are read.

    Parameters
    ----------
    scaling : str
        One of `pipeline.heads.registry.SCALINGS`.
    rotated : bool
        Whether to find the span of `train`; not of streamed rows.
    dims : sequence of int, optional
        Number of features of each layer that a row joins.
    joined : Moments, optional
        Of the columns behind these features, in the rows of `train`.
    """
    scaler = _scaler(scaling, dims, joined)
    if scaling == "standard":
        for block in train.map(lambda _, rows: rows) if isinstance(train, StreamedRows) else [train]:
            scaler.partial_fit(block)
    elif scaler is not None:
        scaler.fit(np.array(train[:1]))  # which learns how many features there are
    if joined is not None:
        _set_moments(scaler, scaling, joined)
    if isinstance(train, StreamedRows) and isinstance(held, StreamedRows):
        in_place = _in_place(copy.deepcopy(scaler))
        train, held = train.scaled_by(in_place), held.scaled_by(in_place)
    elif scaler is not None:
        train, held = scaler.transform(train), scaler.transform(held)
    if scaler is not None:
        _set_copy(scaler)
    return Scaled(train, held, scaler, find_span(train) if rotated else None)


def _scaler(scaling: str, dims: Sequence[int], joined: Moments | None) -> Any:
    """Return a scaler that overwrites its rows, None if it would do nothing."""
    if scaling == "none" and joined is not None:
        return StandardScaler(copy=False)
    if scaling != "l2" or (len(dims) < 2 and joined is None):
        return {"standard": StandardScaler, "l2": Normalizer, "none": lambda copy: None}[scaling](copy=False)
    ends = np.cumsum(dims).tolist()
    layers = [(str(end), Normalizer(copy=False), slice(end - dim, end)) for end, dim in zip(ends, dims, strict=True)]
    weights = {name: len(dims) ** -0.5 for name, _, _ in layers}
    if joined is not None:
        layers.append((_TABLE, StandardScaler(copy=False), slice(ends[-1], ends[-1] + len(joined.mean))))
        weights[_TABLE] = COLUMNS_LENGTH * joined.columns**-0.5
    return ColumnTransformer(layers, transformer_weights=weights)


def _set_moments(scaler: Any, scaling: str, joined: Moments) -> None:
    """Give a fitted scaler what standardises joined columns, which stand behind the features."""
    own = scaler.named_transformers_[_TABLE] if isinstance(scaler, ColumnTransformer) else scaler
    if scaling == "none":
        own.mean_, own.scale_ = np.zeros_like(own.mean_), np.ones_like(own.scale_)
    own.mean_[-len(joined.mean) :], own.scale_[-len(joined.mean) :] = joined.mean, joined.scale


def _in_place(scaler: Any) -> Callable[[Float32Array], Float32Array]:
    """Return what overwrites rows as a fitted scaler would; unlike a `ColumnTransformer` in several threads at once."""

    def scale_layers(rows: Float32Array) -> Float32Array:
        for name, one, where in scaler.transformers_:
            rows[:, where] = one.transform(rows[:, where]) * scaler.transformer_weights[name]
        return rows

    if scaler is None:
        return lambda rows: rows
    return scale_layers if isinstance(scaler, ColumnTransformer) else scaler.transform


def _set_copy(scaler: Any) -> None:
    """Make a fitted scaler leave its input as it is: later rows belong to the caller."""
    for one in scaler.named_transformers_.values() if isinstance(scaler, ColumnTransformer) else [scaler]:
        one.set_params(copy=True)


def make_fold(scaled: Scaled, y: NDArray[Any], y_held: NDArray[Any]) -> Fold:
    """Return the rows for a search, in their span if there is one; the wide rows can then be freed."""
    if scaled.span is None:
        return Fold(scaled.train, y, scaled.held, y_held)
    return Fold(scaled.span.rotated, y, scaled.span.rotate(scaled.train, scaled.held), y_held)


def balanced_weights(y: IntArray) -> Float32Array:
    """Return weights (n,) of mean 1 that give every class of `y` (n,) the same total."""
    classes, codes, counts = np.unique(y, return_inverse=True, return_counts=True)
    return np.asarray(len(y) / (len(classes) * counts)[codes], np.float32)


def search(
    head: Head,
    folds: Sequence[Fold],
    *,
    balanced: bool = False,
    metric: str = "accuracy",
    task: str = CLASSIFICATION,
) -> Choice:
    """Choose parameters by a metric on the held-out rows.

    Of classes, ties go to the lower log-loss: if the held-out rows are few or easy, many candidates get all of them
    right, and the most regularised of these has learnt least. Without probabilities, ties go to the most regularised
    candidate.

    Parameters
    ----------
    head : Head
    folds : sequence of Fold
        One for a val split, several for cross-validation, none if nothing can be validated. The head's fixed
        parameters are taken if there is none, if no candidate predicts any held-out row right, or if the metric is not
        defined on these rows.
    balanced : bool, default False
        Whether every class counts alike, in training and in the accuracy; other metrics are not weighted.
    metric : str, default "accuracy"
        One of `pipeline.options.METRICS_OF` the task.
    task : str, default "classification"
        One of `pipeline.options.TASKS`.
    """
    family = head.family
    if not folds:
        return Choice(head.fixed, float("nan"), None, None, 0, 0)
    if task != CLASSIFICATION:
        return _search_values(head, folds, metric)
    grid = family.grid(min(len(fold.y) for fold in folds))
    weights = [balanced_weights(fold.y) if balanced else None for fold in folds]
    paths = [
        family.path(grid, fold.train, fold.y, fold.held, weight) for fold, weight in zip(folds, weights, strict=True)
    ]
    truth = np.concatenate([fold.y_held for fold in folds])
    held_weights = balanced_weights(truth) if balanced else np.ones(len(truth), np.float32)
    best, most, unconverged, hit = 0, -math.inf, 0, False
    least: float | None = None
    for number, steps in enumerate(zip(*paths, strict=True)):
        predicted = np.concatenate([step.predicted for step in steps])
        hit |= bool((predicted == truth).any())
        if metric == "accuracy":  # rounded, so that equals tie
            score = round(float(np.sum(held_weights[predicted == truth], dtype=np.float64)), 6) / len(truth)
        else:
            score = round(_rate(metric, steps, folds, truth, predicted), 9)
        unconverged += not all(step.converged for step in steps)
        if not score >= most:
            continue
        loss = _log_loss(steps, folds, held_weights)
        if score > most or (loss is not None and least is not None and loss < least):
            best, most, least = number, score, loss
    if not hit or most == -math.inf:  # e.g. no held-out row's class has a training row
        return Choice(head.fixed, float("nan"), None, None, unconverged, len(grid))
    temperature = None
    if family.probabilities:  # of final fits, which are more exact than the steps of a path
        fits = [family.fit(grid[best], fold.train, fold.y, weight) for fold, weight in zip(folds, weights, strict=True)]
        held = [
            by_blocks(partial(family.predict_proba, fit.estimator), fold.held)
            for fit, fold in zip(fits, folds, strict=True)
        ]
        temperature = _temperature(held, folds)
    return Choice(grid[best], most, least, temperature, unconverged, len(grid))


def _search_values(head: Head, folds: Sequence[Fold], metric: str) -> Choice:
    """Choose parameters where labels (n, K) or numbers (n,) are predicted; ties go to the most regularised candidate.

    Where the metric is not defined, as if no held-out row has a label, the head's fixed parameters are taken.
    """
    family = head.family
    grid = family.grid(min(len(fold.y) for fold in folds))
    paths = [family.path(grid, fold.train, fold.y, fold.held) for fold in folds]
    truth, once = np.concatenate([fold.y_held for fold in folds]), np.ones((1, sum(len(fold.y_held) for fold in folds)))
    numbers = np.repeat(np.arange(len(folds)), [len(fold.y_held) for fold in folds])
    best, most, unconverged = 0, -math.inf, 0
    thresholds = None
    for number, steps in enumerate(zip(*paths, strict=True)):
        unconverged += not all(step.converged for step in steps)
        predicted, found = np.concatenate([step.predicted for step in steps]), None
        if truth.ndim == 1:
            score = float(rate_numbers(metric, truth, predicted, once)[0])
        else:
            scores = np.concatenate([_label_scores(step) for step in steps])
            found = best_thresholds(truth, scores, default_threshold(family))
            score = float(mean_known(rate_labels(metric, truth, scores >= found, scores, numbers, once))[0])
        score = float(f"{-score if metric in LOWER_IS_BETTER else score:.9g}")  # so that equals tie, in any unit
        if score > most:
            best, most, thresholds = number, score, found
    if most == -math.inf:
        return Choice(head.fixed, float("nan"), None, None, unconverged, len(grid))
    return Choice(grid[best], most, None, None, unconverged, len(grid), thresholds)


def _label_scores(step: Step) -> Float64Array:
    given = step.scores() if step.probabilities is None and step.scores else step.probabilities
    return np.asarray(given, np.float64)


def default_threshold(family: Family) -> float:
    """Return the score from which on a label is predicted if validation rows do not say better."""
    return EVEN if family.probabilities else 0.0


def _rate(metric: str, steps: Sequence[Step], folds: Sequence[Fold], truth: IntArray, predicted: IntArray) -> float:
    """Return a metric other than accuracy of one candidate's steps on all folds."""
    n_classes = 1 + max(int(labels.max()) for fold in folds for labels in (fold.y, fold.y_held))
    if metric not in OF_SCORES:
        return rate(metric, truth, predicted, n_classes)
    parts = []
    for step, fold in zip(steps, folds, strict=True):
        given = step.scores() if step.probabilities is None and step.scores else step.probabilities
        part = np.full((len(fold.y_held), n_classes), -np.inf)  # of classes without a training row
        part[:, np.unique(fold.y)] = of_both(np.asarray(given))
        parts.append(part)
    numbers = np.repeat(np.arange(len(folds)), [len(fold.y_held) for fold in folds])
    return rate(metric, truth, predicted, n_classes, np.concatenate(parts), numbers)


def choice_notes(head: Head, choices: Sequence[Choice]) -> list[str]:
    """Return what a user should know about how the parameters of one head were chosen."""
    notes = []
    missed, tried = sum(choice.unconverged for choice in choices), sum(choice.tried for choice in choices)
    if missed:
        notes.append(f"{head.name}: the solver hit its iteration limit on {missed} of {tried} candidates")
    dropped = sum(
        choice.temperature is None and choice.thresholds is None and not math.isnan(choice.score) for choice in choices
    )
    if head.family.probabilities and dropped:
        told = f"{dropped} of {len(choices)} models are not calibrated"
        notes.append(f"{head.name}: {told}, because it would not help on validation rows")
    if any(math.isnan(choice.score) for choice in choices) and head.fixed:
        fixed = ", ".join(f"{name}={value:g}" for name, value in head.fixed.items())
        why = "nothing could be validated, as with few rows (or groups)"
        notes.append(f"{head.name}: {why}, so {fixed} is used")
    return notes


def _log_loss(steps: Sequence[Step], folds: Sequence[Fold], weights: Float32Array) -> float | None:
    """Return the mean log-loss of held-out rows, 0 for those of classes without a training row.

    It is rounded, so that the order of rows and classes does not break ties. None without probabilities.
    """
    parts = []
    for step, fold in zip(steps, folds, strict=True):
        if step.probabilities is None:
            return None
        learnt = np.unique(fold.y)
        columns = np.searchsorted(learnt, fold.y_held).clip(max=len(learnt) - 1)
        given = step.probabilities[np.arange(len(columns)), columns]
        parts.append(np.where(learnt[columns] == fold.y_held, given, 1.0))
    losses = np.log(np.maximum(np.concatenate(parts), np.finfo(np.float64).eps))
    return round(float(-weights.astype(np.float64) @ losses) / len(losses), 6)


def _temperature(held: Sequence[NDArray[np.float64]], folds: Sequence[Fold]) -> float | None:
    """Fit a temperature on the held-out rows of all folds whose class has training rows."""
    classes = np.unique(np.concatenate([fold.y for fold in folds]))
    parts, truths = [], []
    for probabilities, fold in zip(held, folds, strict=True):
        learnt = np.unique(fold.y)
        known = np.isin(fold.y_held, learnt)
        part = np.zeros((int(known.sum()), len(classes)))
        part[:, np.searchsorted(classes, learnt)] = probabilities[known]
        parts.append(part)
        truths.append(np.searchsorted(classes, fold.y_held[known]))
    truth = np.concatenate(truths)
    return useful_temperature(np.concatenate(parts), truth)


def train_final(head: Head, params: Params, scaled: Scaled, y: NDArray[Any], *, balanced: bool = False) -> Fitted:
    """Train on all rows, in their span if there is one, and convert the weights back to the features."""
    weight = balanced_weights(y) if balanced else None
    if scaled.span is None:
        return head.family.fit(params, scaled.train, y, weight)
    fitted = head.family.fit(params, scaled.span.rotated, y, weight)
    for one in getattr(fitted.estimator, "estimators_", [fitted.estimator]):
        rotated = np.atleast_2d(one.coef_)
        one.coef_ = scaled.span.unrotate(scaled.train, rotated).reshape(*one.coef_.shape[:-1], -1)
        one.n_features_in_ = scaled.train.shape[1]
    fitted.estimator.n_features_in_ = scaled.train.shape[1]
    return fitted
