"""How much of the class scores' variance do direct connections explain, and how much the network?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import RidgeCV

from features_cache import Catalog
from pipeline.arrays import Float64Array, IntArray
from pipeline.errors import FitError
from pipeline.evaluation.folds import stratified_folds
from pipeline.evaluation.intervals import CONFIDENCE
from pipeline.evaluation.leaks import join_units
from pipeline.evaluation.rows import select
from pipeline.extract import extract
from pipeline.lecturing.claim import Findings, Setting, line_chart, verdict
from pipeline.reporting.page.method_charts import Chart
from pipeline.results import LectureFigure
from pipeline.spec import DEFAULT_BACKBONE

_PENALTIES = np.logspace(-3, 4, 8)
_FOLDS = 5
_RESAMPLES = 2000
_PERMUTATIONS = 99
_CLAIMED = 0.8
DIRECT = "input"


@dataclass(frozen=True, eq=False)
class _Sample:
    """Class scores (n, k), and what explains them: features (n, d) by layer. Rows of equal unit stay together."""

    scores: Float64Array
    features: dict[str, Float64Array]
    units: IntArray
    folds: list[tuple[IntArray, IntArray]]

    @property
    def layers(self) -> list[str]:
        """Return the names of the network's layers."""
        return [name for name in self.features if name != DIRECT]


def measure_claim(setting: Setting) -> Findings:
    """Cross-validate ridge regression of the class scores on pixels, on the best layer, and on both."""
    sample, rng = _read_sample(setting), np.random.default_rng(0)
    scores, count = sample.scores, sample.scores.shape[1]
    permuted = np.hstack([scores[rng.permutation(len(scores))] for _ in range(_PERMUTATIONS)])
    paths = [*((name,) for name in sample.features), *((name, DIRECT) for name in sample.layers)]
    misses, promise = {}, {}
    for done, path in enumerate(paths):
        setting.progress(done, len(paths), " + ".join(path))
        targets = np.hstack([scores, permuted]) if path == (DIRECT,) else scores
        parts = [sample.features[name] for name in path]
        misses[path], promise[path] = _cross_validate(parts, targets, count, sample.folds)
    misses[DIRECT,], null = misses[DIRECT,][:, :count], misses[DIRECT,][:, count:]
    missed = {path: found.sum(axis=1) for path, found in misses.items()}
    chosen = [sample.layers[at] for at in np.argmax([promise[name,] for name in sample.layers], axis=0)]
    network, both = np.empty((2, len(scores)))
    for (_, held), name in zip(sample.folds, chosen, strict=True):  # the layer is chosen on the other folds
        network[held], both[held] = missed[name,][held], missed[name, DIRECT][held]
    figures = _figures(sample, np.array([missed[DIRECT,], network, both]), null, rng)
    notes = [
        f"{len(scores)} images, {DEFAULT_BACKBONE}; ridge regression in {_FOLDS} folds, whose penalty and layer "
        f"({', '.join(dict.fromkeys(chosen))}) are chosen on the other folds; intervals are by {_RESAMPLES:,} "
        "resamplings of images (or groups)."
    ]
    return Findings(figures, [_chart(sample, missed)], notes)


def _read_sample(setting: Setting) -> _Sample:
    layers = ("stages", "penultimate", DIRECT)
    (found,) = extract(setting.sample, layers=layers, output=setting.folder / "features", progress=setting.progress)
    chosen = select(Catalog(found.path), [*found.layers])
    table = chosen[0].table
    units = np.unique(join_units(table.groups, table.digests), return_inverse=True)[1]
    folds = stratified_folds(table.labels, units, _FOLDS, seed=0)
    if sum(len(held) for _, held in folds) < len(units):
        raise FitError("without one of the folds a single class is left to train on; give images of more groups")
    features = {layer.name: layer.features(np.arange(len(units))).astype(np.float64) for layer in chosen}
    return _Sample(np.eye(len(table.classes))[table.labels], features, units, folds)


def _figures(
    sample: _Sample, missed: Float64Array, null: Float64Array, rng: np.random.Generator
) -> list[LectureFigure]:
    """Return the figures; `missed` (3, n) is the squared error of direct connections, the best layer, and both.

    `null` (n, permutations * k) is that of direct connections to permuted class scores. Rows are permuted one by one,
    so there is no p-value where rows come in groups.
    """
    total = _squares(sample.scores)
    direct, network, both = (1 - missed.sum(axis=1) / total.sum()).tolist()
    by_unit = np.array([np.bincount(sample.units, weights=each) for each in (*missed, total)])
    drawn = by_unit[:, rng.integers(0, by_unit.shape[1], (_RESAMPLES, by_unit.shape[1]))].sum(axis=2)
    shares = 1 - drawn[:3] / drawn[3]
    nulls = 1 - null.reshape(len(total), _PERMUTATIONS, -1).sum(axis=(0, 2)) / total.sum()
    p = (1 + int((nulls >= direct).sum())) / (1 + _PERMUTATIONS)
    tested = f" (permutation p = {p:.2f})" if by_unit.shape[1] == len(total) else ""
    share = _interval(shares[0] / shares[2])
    return [
        LectureFigure(
            "share of what both explain that direct connections explain alone", direct / both, share,
            "often 0.8 to 0.9", "the lecture", verdict((share[0] - _CLAIMED, share[1] - _CLAIMED), 1),
        ),
        LectureFigure(f"R² of direct connections{tested}", direct, _interval(shares[0])),
        LectureFigure("R² of the network's best layer", network, _interval(shares[1])),
        LectureFigure("R² of both", both, _interval(shares[2])),
        LectureFigure("R² of direct connections, largest with permuted classes", float(nulls.max())),
    ]  # fmt: skip


def _chart(sample: _Sample, missed: dict[tuple[str, ...], Float64Array]) -> Chart:
    names, total = sample.layers, _squares(sample.scores).sum()
    explained = {path: float(1 - one.sum() / total) for path, one in missed.items()}
    return line_chart(
        "Where does the network know more than a linear map of the pixels?",
        "Cross-validated R² of the class scores: each layer alone and with direct connections from the pixels.",
        np.arange(len(names)).tolist(),
        {
            "layer alone": np.array([[explained[name,] for name in names]]),
            "layer and direct connections": np.array([[explained[name, DIRECT] for name in names]]),
            "direct connections alone": np.full((1, len(names)), explained[DIRECT,]),
        },
        ("layer", "R²"),
        ticks=names,
    )


def _squares(scores: Float64Array) -> Float64Array:
    """Return the squared distance of each row's class scores from their mean (n,)."""
    return np.asarray(((scores - scores.mean(axis=0)) ** 2).sum(axis=1))


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
