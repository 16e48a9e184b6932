from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.metrics import log_loss
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC
from threadpoolctl import threadpool_limits

from pipeline.arrays import Float32Array, IntArray
from pipeline.errors import FitError
from pipeline.heads import linear_svm, logreg
from pipeline.heads.choose import Fold, balanced_weights, make_fold, scale, search, train_final
from pipeline.heads.family import Family, Fitted, Params, Step
from pipeline.heads.linear import C_GRID
from pipeline.heads.registry import FAMILIES, Head, find_head
from pipeline.heads.solvers.spectrum import find_spectrum


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Two threads on a busy machine wait for each other most of the time."""
    with threadpool_limits(1):
        yield


def digits(n: int = 700, seed: int = 0) -> tuple[Fold, np.ndarray, np.ndarray]:
    """A fold of standardised digits, and fresh rows with labels."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(x))
    x, y = x[order].astype(np.float32), y[order].astype(np.int64)
    scaler = StandardScaler().fit(x[:n])
    x = scaler.transform(x)
    return Fold(x[:n], y[:n], x[n : n + 300], y[n : n + 300]), x[n + 300 :], y[n + 300 :]


def cold(models: Sequence[object], fold: Fold) -> list[int]:
    """Right answers of each model, fitted by itself in float64."""
    with threadpool_limits(1):
        return [
            int((model.fit(fold.train.astype(float), fold.y).predict(fold.held) == fold.y_held).sum())  # type: ignore[attr-defined]
            for model in models
        ]


@pytest.mark.parametrize("seed", [0, 1])
def test_logreg_chooses_as_a_cold_float64_loop_and_predicts_the_same(seed: int) -> None:
    fold, fresh, _ = digits(300, seed)
    choice = search(find_head("logreg"), [fold])
    models = [LogisticRegression(C=c, tol=1e-8, max_iter=5000) for c in C_GRID]
    right = cold(models, fold)
    chosen = C_GRID.index(choice.params["C"])
    assert right[chosen] == max(right)
    assert abs(choice.score * 300 - max(right)) < 1.5, "one row on the border may fall either way"
    path = find_head("logreg").family.path([{"C": c} for c in C_GRID], fold.train, fold.y, fold.held)
    alike = [(step.predicted == model.predict(fold.held)).mean() for step, model in zip(path, models, strict=True)]
    assert np.mean(alike) >= 0.998
    assert min(alike) > 0.98
    final = train_final(find_head("logreg"), choice.params, scale("none", fold.train, fresh, rotated=False), fold.y)
    assert (final.estimator.predict(fresh) == models[chosen].predict(fresh)).mean() >= 0.995
    assert final.converged


@pytest.mark.parametrize("scaling", ["standard", "l2", "none"])
@pytest.mark.parametrize("labels", [2, 10])
@pytest.mark.parametrize("c", [1e-4, 0.03, 10.0])
def test_logreg_is_scikit_learns_optimum_however_rows_are_scaled(scaling: str, labels: int, c: float) -> None:
    x, y = load_digits(n_class=labels, return_X_y=True)
    rows = scale(scaling, x[:300].astype(np.float32), x[300:].astype(np.float32), rotated=False).train
    found = find_head("logreg").family.fit({"C": c}, rows, y[:300]).estimator
    exact = LogisticRegression(C=c, tol=1e-9, max_iter=20_000).fit(rows.astype(float), y[:300])
    losses = [
        log_loss(y[:300], model.predict_proba(rows)) + float(np.sum(model.coef_**2)) / (2 * c * 300)
        for model in (found, exact)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert found.predict_proba(rows) == pytest.approx(exact.predict_proba(rows), abs=2e-3)


def test_units_follow_the_principal_axes_and_can_be_undone() -> None:
    rng = np.random.default_rng(0)
    rows = (rng.standard_normal((500, 8)) * 2.0 ** -np.arange(8) + 3).astype(np.float32)
    spectrum = find_spectrum(rows)
    variances, axes = np.linalg.eigh(np.cov(rows.T, bias=True))
    assert spectrum.mean == pytest.approx(rows.mean(axis=0), rel=1e-5)
    assert spectrum.spread == pytest.approx(variances[::-1][:4], rel=1e-3)
    units = spectrum.units(curvature=0.3, penalty=0.02)
    for axis, variance in list(zip(axes.T, variances, strict=True))[:3:-1]:
        weights = np.append(axis, 0)[None]
        assert units.apply(weights) == pytest.approx(weights / np.sqrt(0.3 * variance + 0.02), rel=1e-3, abs=1e-2)
    weights = rng.standard_normal((3, 9))
    assert units.inverse().apply(units.apply(weights)) == pytest.approx(weights)


@pytest.mark.parametrize("c", [1.0, 10.0, 3162.0, 1e5])
def test_logreg_is_the_optimum_where_wide_features_make_the_loss_flat(c: float) -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 10, 700)
    hidden = rng.standard_normal((700, 400))
    hidden[:, :60] += 0.55 * rng.standard_normal((10, 60))[y]
    features = np.maximum(hidden @ (rng.standard_normal((400, 2000)) * np.arange(1, 401)[:, None] ** -0.5), 0)
    rows = StandardScaler().fit(features[:200]).transform(features).astype(np.float32)
    train, fresh = rows[:200], rows[200:]
    exact = LogisticRegression(C=c, tol=1e-10, max_iter=50_000).fit(train.astype(float), y[:200])
    fitted = find_head("logreg").family.fit({"C": c}, train, y[:200])
    assert fitted.params == {"C": c}
    assert (fitted.estimator.predict(fresh) == exact.predict(fresh)).mean() >= 0.99


def test_linear_svm_is_liblinears_optimum_along_the_path() -> None:
    fold, fresh, _ = digits(400)
    svm = find_head("linear_svm")
    steps = dict(zip(C_GRID, svm.family.path(svm.family.grid(400), fold.train, fold.y, fold.held), strict=True))
    for c in C_GRID[:21:5]:
        exact = LinearSVC(C=c, tol=1e-6, max_iter=20_000).fit(fold.train.astype(float), fold.y)
        assert (steps[c].predicted == exact.predict(fold.held)).mean() >= 0.995
        found = svm.family.fit({"C": c}, fold.train, fold.y).estimator
        assert (found.predict(fresh) == exact.predict(fresh)).mean() >= 0.995
        assert found.coef_ == pytest.approx(exact.coef_, abs=0.02 * float(np.abs(exact.coef_).max()))


@pytest.mark.parametrize(
    ("shape", "c", "ways", "gap"),
    [
        ((400, 64), 1e3, {"_find_steps"}, 1e-4),  # float32 rounds the shares, of which the bound is made
        ((100, 512), 1e5, {"_bottom"}, 1e-9),  # few rows
        ((600, 640), 1e3, {"_bottom", "_find_steps"}, 1e-9),  # all are within the margin: solved where C is large
    ],
    ids=["passes", "few", "large C"],
)
def test_linear_svm_is_the_optimum_where_c_is_large(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], c: float, ways: set[str], gap: float
) -> None:
    taken = set()

    def noted(name: str, plain: Callable[..., object]) -> Callable[..., object]:
        return lambda *arguments: (taken.add(name), plain(*arguments))[1]

    for name in ("_bottom", "_find_steps"):
        monkeypatch.setattr(linear_svm._SquaredHinge, name, noted(name, getattr(linear_svm._SquaredHinge, name)))
    generator = np.random.default_rng(0)
    features, y = generator.standard_normal(shape).astype(np.float32), generator.integers(0, 2, shape[0])
    rows = np.hstack([features, np.ones((len(y), 1))]) * (2 * y - 1)[:, None]
    svm = find_head("linear_svm").family

    def loss(scores: np.ndarray) -> float:
        return c * float(np.square(np.maximum(1 - scores, 0)).sum())

    found = svm.fit({"C": c}, features, y)
    weights = np.append(found.estimator.coef_[0], found.estimator.intercept_)
    value = weights @ weights / 2 + loss(rows @ weights)
    shares = 2 * c * np.maximum(1 - rows @ weights, 0)
    bound = shares.sum() - np.square(shares @ rows).sum() / 2 - np.square(shares).sum() / (4 * c)
    assert found.converged
    assert bound <= value * (1 + 1e-9), "the dual problem is a lower bound of the optimum"
    assert value <= bound * (1 + gap)
    *_, step = path = list(svm.path([{"C": c} for c in np.geomspace(1e-5 * c, c, 11)], features, y, features))
    assert all(step.converged for step in path)
    assert step.scores is not None
    assert loss((2 * y - 1) * step.scores()[:, 0].astype(float)) <= value * (1 + 1e-4)
    assert taken == ways


def test_linear_svm_says_what_it_takes_beside_the_rows() -> None:
    generator = np.random.default_rng(0)
    rows, y = generator.standard_normal((1000, 520)).astype(np.float32), generator.integers(0, 2, 1000)
    svm = find_head("linear_svm").family
    tracemalloc.start()
    list(svm.path([{"C": c} for c in (1.0, 1e2, 1e4)], rows, y, rows[:1]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    told = svm.bytes_beside(len(rows), 1)
    assert 0.8 * told <= peak <= 1.3 * told


def test_ridge_path_is_the_classifier_alpha_by_alpha() -> None:
    fold, _, _ = digits(400)
    ridge = find_head("ridge").family
    grid = ridge.grid(400)
    for params, step in zip(grid, ridge.path(grid, fold.train, fold.y, fold.held), strict=True):
        exact = RidgeClassifier(**params).fit(fold.train.astype(float), fold.y)
        assert (step.predicted == exact.predict(fold.held)).mean() >= 0.995


def test_rbf_path_is_the_plain_svc_on_every_candidate_and_its_gamma_comes_back_absolute() -> None:
    fold, fresh, _ = digits(200)
    rbf = find_head("rbf_svm").family
    grid = rbf.grid(200)
    scale_gamma = 1 / (fold.train.shape[1] * fold.train.var(dtype=float))
    for params, step in zip(grid, rbf.path(grid, fold.train, fold.y, fold.held), strict=True):
        exact = SVC(C=params["C"], gamma=params["gamma"] * scale_gamma, break_ties=True).fit(fold.train, fold.y)
        assert (step.predicted == exact.predict(fold.held)).mean() >= 0.995
    fitted = rbf.fit({"C": 10.0, "gamma": 0.5}, fold.train, fold.y)
    assert fitted.params == {"C": 10.0, "gamma": pytest.approx(0.5 * scale_gamma)}
    exact = SVC(C=10, gamma=0.5 * scale_gamma, break_ties=True).fit(fold.train, fold.y)
    assert (fitted.estimator.predict(fresh) == exact.predict(fresh)).all()


@pytest.mark.parametrize("labels", [2, 10])
def test_knn_votes_as_scikit_learn_does_for_every_k(labels: int) -> None:
    fold, _, _ = digits(150)
    y = fold.y % labels
    knn = find_head("knn").family
    grid = knn.grid(150)
    assert [params["k"] for params in grid] == [50, 30, 20, 15, 10, 7, 5, 3, 2, 1]
    for params, step in zip(grid, knn.path(grid, fold.train, y, fold.held), strict=True):
        exact = KNeighborsClassifier(params["k"], metric="cosine", algorithm="brute", weights="distance")
        shares = exact.fit(fold.train, y).predict_proba(fold.held)
        smoothed = (params["k"] * shares + 1 / labels) / (params["k"] + 1)
        assert step.probabilities == pytest.approx(smoothed, abs=1e-5)
        assert knn.predict_proba(knn.fit(params, fold.train, y).estimator, fold.held) == pytest.approx(smoothed)
        assert (step.predicted == exact.predict(fold.held)).mean() >= 0.995
    assert knn.grid(4) == [{"k": 3}, {"k": 2}, {"k": 1}]


def test_centroid_is_the_nearest_class_mean() -> None:
    rng = np.random.default_rng(0)
    y = np.arange(60) % 4
    train, fresh = rng.standard_normal((60, 5)).astype(np.float32), rng.standard_normal((90, 5)).astype(np.float32)
    found = find_head("centroid").family.fit({}, train, y).estimator
    assert (found.predict(fresh) == NearestCentroid().fit(train, y).predict(fresh)).all()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("labels", [(3, 7), (0, 4, 9)])
def test_every_head_learns_labels_with_gaps_and_sees_constant_features(name: str, labels: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    y = np.repeat(labels, 12).astype(np.int64)
    features = rng.standard_normal((len(y), 6)).astype(np.float32)
    features[:, 0] = 2.5
    features[:, 1:] += 8 * rng.standard_normal((len(labels), 5))[np.searchsorted(labels, y)]
    head = find_head(name)
    scaled = scale(head.scaling, features[::2].copy(), features[1::2].copy(), rotated=head.family.linear)
    choice = search(head, [make_fold(scaled, y[::2], y[1::2])])
    fitted = train_final(head, choice.params, scaled, y[::2])
    assert choice.score == 1
    assert (fitted.estimator.predict(scaled.held) == y[1::2]).all()
    assert fitted.estimator.classes_.tolist() == list(labels)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("labels", [(3, 7), (0, 4, 9)])
def test_hyperplanes_give_the_labels_of_the_estimator(name: str, labels: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    y = np.repeat(labels, 20).astype(np.int64)
    rows = rng.standard_normal((len(y), 6)).astype(np.float32)
    rows += 2 * rng.standard_normal((len(labels), 6)).astype(np.float32)[np.searchsorted(labels, y)]
    fresh = 2 * rng.standard_normal((200, 6)).astype(np.float32)
    family = find_head(name).family
    estimator = family.fit(family.fixed, rows, y).estimator
    found = family.hyperplanes(estimator)
    if found is None:
        assert not family.linear
        return
    assert (found.weights.shape, found.bias.shape) == ((len(labels), 6), (len(labels),))
    scores = fresh @ found.weights.T + found.bias
    assert (estimator.classes_[scores.argmax(axis=1)] == estimator.predict(fresh)).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_one_row_a_class_has_a_fixed_rule(name: str) -> None:
    head = find_head(name)
    choice = search(head, [])
    rows = np.eye(3, 8, dtype=np.float32)
    scaled = scale("standard", rows.copy(), rows.copy(), rotated=head.family.linear)
    fitted = train_final(head, choice.params, scaled, np.arange(3))
    assert np.isnan(choice.score)
    assert choice.params == head.fixed
    assert fitted.estimator.predict(scaled.held).tolist() == [0, 1, 2]


class Scripted(Family):
    """Candidates whose right answers are written down beforehand."""

    def __init__(self, right: Sequence[int]) -> None:
        self.right = right

    def grid(self, n_rows: int) -> Sequence[Params]:
        return [{"number": number} for number in range(len(self.right))]

    def path(
        self,
        grid: Sequence[Params],
        train: Float32Array,
        y: IntArray,
        held: Float32Array,
        weight: Float32Array | None = None,
    ) -> Iterator[Step]:
        for count in self.right:
            yield Step(np.arange(10) < count, converged=count != 3)

    def fit(self, params: Params, train: Float32Array, y: IntArray, weight: Float32Array | None = None) -> Fitted:
        raise NotImplementedError


def scripted(right: Sequence[int], folds: int = 1) -> tuple[int, int, int, float]:
    fold = Fold(
        np.zeros((4, 1), np.float32), np.zeros(4, np.int64), np.zeros((10, 1), np.float32), np.ones(10, np.int64)
    )
    choice = search(Head("scripted", Scripted(right), "none"), [fold] * folds)
    return choice.params["number"], choice.tried, choice.unconverged, choice.score


def test_the_first_of_equals_is_taken_and_folds_are_added_up() -> None:
    assert scripted([2, 5, 4, 5], folds=3) == (1, 4, 0, 0.5)


@pytest.mark.parametrize("seed", range(4))
def test_of_equals_the_lower_log_loss_counts(seed: int) -> None:
    fold, _, _ = digits(200, seed)
    easy = Fold(fold.train, fold.y, fold.held[:12], fold.y_held[:12])
    models = [LogisticRegression(C=c, tol=1e-8, max_iter=5000) for c in C_GRID[::4]]
    right = cold(models, easy)
    assert right.count(max(right)) > 3, "few rows are told right by many"
    best = [model for model, count in zip(models, right, strict=True) if count == max(right)]
    losses = {model.C: log_loss(easy.y_held, model.predict_proba(easy.held), labels=range(10)) for model in best}
    choice = search(find_head("logreg"), [easy])
    chosen = LogisticRegression(C=choice.params["C"], tol=1e-8, max_iter=5000).fit(easy.train.astype(float), easy.y)
    assert cold([chosen], easy) == [max(right)]
    assert log_loss(easy.y_held, chosen.predict_proba(easy.held), labels=range(10)) < min(losses.values()) + 1e-3


def test_rows_of_unknown_classes_and_probabilities_of_0_leave_the_log_loss_finite() -> None:
    class Sure(Scripted):
        def path(
            self,
            grid: Sequence[Params],
            train: Float32Array,
            y: IntArray,
            held: Float32Array,
            weight: Float32Array | None = None,
        ) -> Iterator[Step]:
            for share in self.right:
                wrong = np.array([[share / 10, 1 - share / 10], [1.0, 0.0], [0.0, 1.0]])
                yield Step(np.array([0, 0, 1]), converged=True, probabilities=wrong)

    rows = np.zeros((3, 1), np.float32)
    fold = Fold(rows[:2], np.array([0, 2]), rows, np.array([0, 2, 5]))  # one right, one wrong, one never seen
    assert search(Head("sure", Sure([6, 9, 7]), "none"), [fold]).params == {"number": 1}


def test_every_candidate_is_tried() -> None:
    assert scripted([1, 5] + [4] * 30 + [9])[:2] == (32, 33)


def test_candidates_at_their_iteration_limit_are_counted() -> None:
    assert scripted([3, 5, 3, 4])[2] == 2


@pytest.mark.parametrize("name", ["logreg", "linear_svm"])
def test_an_iteration_limit_is_a_flag_and_no_warning(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fold, _, _ = digits(200)
    for module in (logreg, linear_svm):
        monkeypatch.setattr(module, "MOST_ITERATIONS", 3)
    assert not find_head(name).family.fit({"C": 10.0}, fold.train, fold.y).converged
    assert search(find_head(name), [fold]).unconverged > 0


@pytest.mark.parametrize(
    ("name", "family", "scaling", "canonical"),
    [
        ("logreg", "logreg", "l2", "logreg/l2"),
        ("logreg/standard", "logreg", "standard", "logreg/standard"),
        ("knn/l2", "knn", "l2", "knn/l2"),
        ("ridge/none", "ridge", "none", "ridge/none"),
    ],
)
def test_names_of_heads(name: str, family: str, scaling: str, canonical: str) -> None:
    assert find_head(name) == Head(canonical, FAMILIES[family], scaling)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("logregg", "no head named 'logregg'.*did you mean logreg"),
        ("linear-svm/l2", "did you mean linear_svm"),
        ("logreg/standart", "no scaling named 'standart'.*did you mean standard"),
        ("logreg/", "no scaling named ''"),
    ],
)
def test_unknown_heads_name_the_nearest(name: str, message: str) -> None:
    with pytest.raises(FitError, match=message):
        find_head(name)


def test_the_grid_is_the_published_one() -> None:
    assert len(C_GRID) == 45
    assert (C_GRID[0], C_GRID[-1]) == (pytest.approx(1e-6), pytest.approx(1e5))
    assert np.diff(np.log10(C_GRID)) == pytest.approx(11 / 44)


@pytest.mark.parametrize("labels", [2, 4])
def test_intercepts_are_right_where_the_penalty_dwarfs_them(labels: int) -> None:
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(labels), [30, 20, 10, 5][:labels])
    train = rng.standard_normal((len(y), 40)).astype(np.float32)
    logreg = find_head("logreg").family
    exact = LogisticRegression(C=1e-6, tol=1e-10, max_iter=10_000, solver="newton-cg").fit(train.astype(float), y)
    step = next(iter(logreg.path(logreg.grid(len(y)), train, y, train)))
    assert step.probabilities == pytest.approx(exact.predict_proba(train), abs=1e-4)
    assert logreg.fit({"C": 1e-6}, train, y).estimator.predict_proba(train) == pytest.approx(
        exact.predict_proba(train), abs=1e-4
    )


@pytest.mark.parametrize(
    ("name", "params", "oracle"),
    [
        ("logreg", {"C": 0.1}, LogisticRegression(C=0.1, tol=1e-8, max_iter=10_000, class_weight="balanced")),
        ("linear_svm", {"C": 0.1}, LinearSVC(C=0.1, tol=1e-5, max_iter=20_000)),
        ("ridge", {"alpha": 3.0}, RidgeClassifier(alpha=3.0, class_weight="balanced")),
        ("rbf_svm", {"C": 1.0, "gamma": 1.0}, SVC(C=1.0, class_weight="balanced")),
    ],
)
def test_balanced_is_scikit_learns_balanced_weight_in_search_and_in_training(
    name: str, params: Params, oracle: SVC
) -> None:
    fold, fresh, _ = digits(300)
    kept = np.flatnonzero((fold.y > 2) | (np.arange(300) % 4 == 0))  # three classes become rare
    train, y = fold.train[kept], fold.y[kept]
    head = find_head(name)
    weight = balanced_weights(y)
    # liblinear's class weights leave the rest unweighted when it sets one class against it
    given_weights = (weight,) if name == "linear_svm" else ()
    expected = oracle.fit(train.astype(float), y, *given_weights)
    final = train_final(head, params, scale("none", train, fresh, rotated=False), y, balanced=True).estimator
    assert (final.predict(fresh) == expected.predict(fresh)).mean() >= 0.995
    step = next(iter(head.family.path([params], train, y, fresh, weight)))
    assert (step.predicted == expected.predict(fresh)).mean() >= 0.995


def test_balanced_search_chooses_by_the_mean_over_classes() -> None:
    y_held = np.array([0] * 9 + [1])
    all_zero, half = np.zeros(10, np.int64), np.array([0] * 6 + [1] * 4)

    class Two(Scripted):
        def path(
            self,
            grid: Sequence[Params],
            train: Float32Array,
            y: IntArray,
            held: Float32Array,
            weight: Float32Array | None = None,
        ) -> Iterator[Step]:
            assert (weight is not None) == balanced
            yield from (Step(predicted, converged=True) for predicted in (all_zero, half))

    rows = np.zeros((10, 1), np.float32)
    for balanced in (False, True):
        choice = search(Head("two", Two([1, 2]), "none"), [Fold(rows, y_held, rows, y_held)], balanced=balanced)
        assert choice.params == {"number": int(balanced)}
        assert choice.score == pytest.approx((6 / 9 + 1) / 2 if balanced else 0.9)


@pytest.mark.parametrize("name", ["logreg", "linear_svm"])
@pytest.mark.parametrize("width", [40, 600])
def test_the_choice_of_c_is_that_of_scikit_learn_on_overlapping_classes(name: str, width: int) -> None:
    rng = np.random.default_rng(width)
    y = np.arange(700) % 4
    signal = rng.standard_normal((4, 30))[y] + 2.0 * rng.standard_normal((700, 30))
    x = np.hstack([signal, signal @ rng.standard_normal((30, width - 30)) + rng.standard_normal((700, width - 30))])
    scaled = scale("standard", x[:200].astype("f"), x[200:350].astype("f"), rotated=True)
    choice = search(find_head(name), [make_fold(scaled, y[:200], y[200:350])])
    grid = C_GRID[:29]  # beyond C = 10 nothing changes but scikit-learn's time
    models = [
        LogisticRegression(C=c, tol=1e-12, max_iter=20_000)
        if name == "logreg"
        else LinearSVC(C=c, tol=1e-6, max_iter=50_000)
        for c in grid[::2]
    ]
    fold = Fold(scaled.train, y[:200], scaled.held, y[200:350])
    right = cold(models, fold)
    assert round(choice.score * 150) >= max(right) - 1
    final = train_final(find_head(name), choice.params, scaled, y[:200]).estimator
    exact = models[0].set_params(C=choice.params["C"]).fit(scaled.train.astype(float), y[:200])
    fresh = ((x[350:] - x[:200].mean(axis=0)) / x[:200].std(axis=0)).astype("f")
    assert (final.predict(fresh) == exact.predict(fresh)).mean() >= 0.995
