"""Rank cached layers and backbones by how well they suit the classes, without training a head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.stats import kendalltau, spearmanr
from threadpoolctl import threadpool_limits

from features_cache import AmbiguousCacheError, CacheFile, Catalog
from pipeline.arrays import IntArray
from pipeline.diagnostics.transfer_scores import h_score, indicators, leep, logme
from pipeline.errors import FitError
from pipeline.evaluation.folds import stratified_folds
from pipeline.evaluation.labels import find_labels
from pipeline.evaluation.rows import Layer, pooled, require_finite, select
from pipeline.evaluation.split_layers import split_layers
from pipeline.evaluation.targets import check_task
from pipeline.extraction.object_store import open_catalog
from pipeline.fit import fit
from pipeline.options import CLASSIFICATION, REGRESSION
from pipeline.results import Agreement, LayerScore, Progress
from pipeline.spec import aliases_of

MOST_ROWS = 4096
"""Number of training rows that are scored if some layer is wider than this. Time grows with the cube of the smaller."""
_FEWEST = 3
"""Layers that an agreement needs at least."""


@dataclass(frozen=True)
class RankReport:
    """The ranking, how well it agrees with test accuracy, and what a user should know.

    Parameters
    ----------
    ranking : list of LayerScore
        Largest LogME first.
    agreement : list of Agreement
        One for each score that at least three fitted layers have; empty if nothing was fitted.
    notes : list of str
    """

    ranking: list[LayerScore]
    agreement: list[Agreement]
    notes: list[str]


def rank(
    cache: str | Path | Catalog,
    source: str | None = None,
    backbone: str | None = None,
    pool: str | None = None,
    seed: int = 0,
    *,
    labels: str | Path | None = None,
    target: str | Sequence[str] | None = None,
    key: str | None = None,
    task: str = CLASSIFICATION,
    fitted: bool = False,
    progress: Progress | None = None,
) -> RankReport:
    """Score every cached layer of one source by LogME; for classes also by H-score, and cached logits by LEEP.

    Only training rows are scored; validation and test rows are not looked at.

    Parameters
    ----------
    cache : str, Path or Catalog
        A folder of cache files, or one file. Layers of all backbones and pools are ranked together.
    source, backbone, pool : str, optional
        Rank only these.
    seed : int, default 0
        Draws the splits that the source does not give, as in `fit`.
    labels, target, key, task
        A table to take labels from, and what is predicted, as for `fit`.
    fitted : bool, default False
        Also fit the default head of the task on every layer, and compare the scores with its default metric on test.
    progress : callable, optional
        Called as ``progress(done, total, text)``.

    Raises
    ------
    CacheError
        If no file fits, or files of several sources do.
    FitError
        If the rows have no labels, or there are too few.
    TableError
        If the table of labels cannot be read or joined.

    Examples
    --------
    ::

        for score in rank("cache", pool="avg").ranking:
            print(score.layer, score.logme)
    """
    metric = check_task(task, None)
    catalog = open_catalog(cache)
    files = _of_one_source(catalog, catalog.fitting(source, backbone, pool))
    catalog.check_source(files[0])
    alone = [Catalog(file.path) for file in pooled(files) or files]
    answers = find_labels(labels, target, key, task)
    layers = [layer for one in alone for layer in select(one, labels=answers, task=task)]
    split = split_layers(layers, [seed], ["all"], None, drop_leaks=False)
    limited = any(min(each.layer.dim, len(each.splits.train)) > MOST_ROWS for each in split)
    scores, notes = [], []
    for done, each in enumerate(split, 1):
        require_finite(each.layer)
        rows = _draw(each.splits.train, each.layer.table.labels, seed) if limited else each.splits.train
        scores.append(_score(each.layer, rows))
        notes += [*each.layer.table.notes, *each.splits.notes]
        if progress is not None:
            progress(done, len(split), "score")
    if limited:
        fewest = min(score.n_train for score in scores)
        notes.append(f"scores are of {fewest} training rows, drawn by seed and stratified by class")
    if fitted:
        reports = [fit(one, seeds=[seed], labels=answers, task=task, progress=progress) for one in alone]
        reached = [getattr(result, metric) for report in reports for result in report.results]
        scores = [
            replace(score, metric=metric, test_score=value, accuracy=value if metric == "accuracy" else None)
            for score, value in zip(scores, reached, strict=True)
        ]
    ranking = sorted(scores, key=lambda score: -score.logme)
    return RankReport(ranking, agreements(ranking) if fitted else [], list(dict.fromkeys(notes)))


def agreements(scores: Sequence[LayerScore]) -> list[Agreement]:
    """Compare the order by each score with the order on test, if at least three layers have both."""
    found = []
    for name in ("logme", "h_score", "leep"):
        both = [(getattr(score, name), score.test_score) for score in scores]
        pairs = [(score, reached) for score, reached in both if score is not None and reached is not None]
        if len(pairs) < _FEWEST or min(len(set(column)) for column in zip(*pairs, strict=True)) == 1:
            continue
        values, reached = zip(*pairs, strict=True)
        tau, rho = kendalltau(values, reached).statistic, spearmanr(values, reached).statistic
        found.append(Agreement(name, len(pairs), float(tau), float(rho)))
    return found


def _of_one_source(catalog: Catalog, files: Sequence[CacheFile]) -> Sequence[CacheFile]:
    sources = dict.fromkeys((file.handles.get("source", ""), file.handles.get("location", "")) for file in files)
    if len(sources) > 1:
        names, locations = zip(*sources, strict=True)
        raise AmbiguousCacheError(
            f"{catalog.path} holds {len(sources)} sources, whose layers cannot be compared; name one source: "
            f"{', '.join(names if len(set(names)) == len(names) else locations)}"
        )
    return files


def _draw(train: IntArray, labels: IntArray, seed: int) -> IntArray:
    """Draw one of as many parts as make them about `MOST_ROWS` training rows or fewer, stratified by class."""
    parts = -(-len(train) // MOST_ROWS)
    if parts == 1:
        return train
    return np.asarray(train[stratified_folds(labels[train], train, parts, seed)[0][1]])


def _score(layer: Layer, rows: IntArray) -> LayerScore:
    table, labels = layer.table, layer.table.labels[rows]
    if len(np.unique(labels)) < 2:
        raise FitError("ranking needs training rows of at least two classes, or of different numbers or labels")
    features = layer.features(rows)
    of_classes = table.task == CLASSIFICATION
    targets = indicators(labels) if of_classes else table.y[rows].reshape(len(rows), -1).astype(np.float64)
    if table.task == REGRESSION:
        targets = (targets - targets.mean()) / targets.std()
    file, info = layer.parts[0]
    are_logits = info.name in aliases_of(file.request).get("logits", ())
    with threadpool_limits(1):  # two threads would mostly wait for each other
        scores = logme(features, targets), h_score(features, labels) if of_classes else None
    return LayerScore(
        backbone=layer.handle("backbone"),
        pool=layer.handle("pool"),
        layer=layer.name,
        dim=layer.dim,
        n_train=len(rows),
        logme=scores[0],
        h_score=scores[1],
        leep=leep(features, labels) if are_logits and of_classes else None,
    )
