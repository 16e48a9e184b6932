"""How much of the class scores' variance do direct connections explain, and how much the network?"""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import RidgeCV

from features_cache import Catalog
from pipeline.arrays import Float64Array, IntArray
from pipeline.evaluation.folds import stratified_folds
from pipeline.evaluation.intervals import CONFIDENCE
from pipeline.evaluation.leaks import join_units
from pipeline.evaluation.rows import select
from pipeline.extract import extract
from pipeline.lecturing.claim import Findings, Setting, line_chart, verdict
from pipeline.results import LectureFigure
from pipeline.spec import DEFAULT_BACKBONE

_PENALTIES = np.logspace(-3, 4, 8)
_FOLDS = 5
_RESAMPLES = 2000
_PERMUTATIONS = 99
_CLAIMED = 0.8
DIRECT = "input"


def measure_claim(setting: Setting) -> Findings:
    """Cross-validate ridge regression of the class scores on pixels, on the best layer, and on both."""
    layers = ("stages", "penultimate", DIRECT)
    folder = setting.folder / "features"
    (found,) = extract(setting.sample, layers=layers, output=folder, progress=setting.progress)
    chosen = select(Catalog(found.path), [*found.layers])
    table = chosen[0].table
    features = {layer.name: layer.features(np.arange(len(table.labels))).astype(np.float64) for layer in chosen}
    units = np.unique(join_units(table.groups, table.digests), return_inverse=True)[1]
    scores = np.eye(len(table.classes))[table.labels]  # (n, k)
    rng = np.random.default_rng(0)
    permuted = np.hstack([scores[rng.permutation(len(scores))] for _ in range(_PERMUTATIONS)])
    folds = stratified_folds(table.labels, units, _FOLDS, seed=0)

    names = [name for name in features if name != DIRECT]
    paths = {(name,): [features[name]] for name in features} | {
        (name, DIRECT): [features[name], features[DIRECT]] for name in names
    }
    misses, promise = {}, {}
    for done, (path, parts) in enumerate(paths.items()):
        setting.progress(done, len(paths), " + ".join(path))
        targets = np.hstack([scores, permuted]) if path == (DIRECT,) else scores
        misses[path], promise[path] = _cross_validate(parts, targets, scores.shape[1], folds)
    best = np.array([[promise[(name,)][fold] for name in names] for fold in range(len(folds))]).argmax(axis=1)
    fold_of = np.empty(len(scores), np.int64)
    for number, (_, held) in enumerate(folds):
        fold_of[held] = number
    picked = best[fold_of]  # the layer of each row's fold, chosen on the other folds
    network, both = (
        np.array([misses[path(names[layer])][row].sum() for row, layer in enumerate(picked)])
        for path in (lambda name: (name,), lambda name: (name, DIRECT))
    )
    count = scores.shape[1]
    direct, null = misses[DIRECT,][:, :count].sum(axis=1), misses[DIRECT,][:, count:]
    total = ((scores - scores.mean(axis=0)) ** 2).sum(axis=1)

    def explained(missed: Float64Array) -> float:
        return float(1 - missed.sum() / total.sum())

    by_unit = np.array([np.bincount(units, weights=each) for each in (direct, network, both, total)])
    drawn = by_unit[:, rng.integers(0, by_unit.shape[1], (_RESAMPLES, by_unit.shape[1]))].sum(axis=2)
    found_shares = 1 - drawn[:3] / drawn[3]
    nulls = 1 - null.reshape(len(scores), _PERMUTATIONS, count).sum(axis=(0, 2)) / total.sum()
    observed = explained(direct)
    p = (1 + int((nulls >= observed).sum())) / (1 + _PERMUTATIONS)
    share = _interval(found_shares[0] / found_shares[2])
    above = (share[0] - _CLAIMED, share[1] - _CLAIMED)
    figures = [
        LectureFigure(
            "share of what both explain that direct connections explain alone", observed / explained(both), share,
            "often 0.8 to 0.9", "the lecture", verdict(above, 1),
        ),
        LectureFigure(f"R² of direct connections (permutation p = {p:.2f})", observed, _interval(found_shares[0])),
        LectureFigure("R² of the network's best layer", explained(network), _interval(found_shares[1])),
        LectureFigure("R² of both", explained(both), _interval(found_shares[2])),
        LectureFigure("R² of direct connections, largest with permuted classes", float(nulls.max())),
    ]  # fmt: skip
    chart = line_chart(
        "Where does the network know more than a linear map of the pixels?",
        "Cross-validated R² of the class scores: each layer alone and with direct connections from the pixels.",
        np.arange(len(names)).tolist(),
        {
            "layer alone": np.array([[explained(misses[name,].sum(axis=1)) for name in names]]),
            "layer and direct connections": np.array([[explained(misses[name, DIRECT].sum(axis=1)) for name in names]]),
            "direct connections alone": np.full((1, len(names)), observed),
        },
        ("layer", "R²"),
        ticks=names,
    )
    used = ", ".join(dict.fromkeys(names[layer] for layer in best))
    notes = [
        f"{len(scores)} images, {DEFAULT_BACKBONE}; ridge regression in {_FOLDS} folds, whose penalty and layer "
        f"({used}) are chosen on the other folds; intervals are by {_RESAMPLES:,} resamplings of images (or groups)."
    ]
    return Findings(figures, [chart], notes)


def _cross_validate(
    parts: list[Float64Array], targets: Float64Array, count: int, folds: list[tuple[IntArray, IntArray]]
) -> tuple[Float64Array, list[float]]:
    """Return the squared error of each row and target (n, m), and what each fold's training rows promise.

    The promise is the leave-one-out score of the first `count` targets. Each part is scaled to a variance of 1 in all,
    not feature by feature, which would blow up pixels that are nearly always black.
    """
    errors, promises = np.empty_like(targets), []
    for train, held in folds:
        joined = np.hstack([part / np.sqrt(part[train].var(axis=0).sum()) for part in parts])
        ridge = RidgeCV(_PENALTIES, alpha_per_target=True).fit(joined[train], targets[train])
        errors[held] = (ridge.predict(joined[held]) - targets[held]) ** 2
        promises.append(float(np.mean(ridge.best_score_[:count])))
    return errors, promises


def _interval(values: Float64Array) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
