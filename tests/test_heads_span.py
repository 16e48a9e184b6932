from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.preprocessing import StandardScaler, normalize
from sklearn.svm import LinearSVC
from threadpoolctl import threadpool_limits

from pipeline.heads.choose import scale, train_final
from pipeline.heads.registry import find_head
from pipeline.heads.solvers.span import find_span


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Two threads on a busy machine wait for each other most of the time."""
    with threadpool_limits(1):
        yield


@settings(max_examples=40)
@given(n=st.integers(2, 20), extra=st.integers(1, 60), rank=st.integers(1, 20), seed=st.integers(0, 99))
def test_inner_products_are_kept_for_any_rank(n: int, extra: int, rank: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = (rng.standard_normal((n, rank)) @ rng.standard_normal((rank, n + extra))).astype(np.float32)
    others = rng.standard_normal((5, n + extra)).astype(np.float32)
    span = find_span(rows)
    assert span is not None
    size = float(np.abs(rows).max()) ** 2 * rows.shape[1]
    assert span.rotated @ span.rotated.T == pytest.approx(rows.astype(float) @ rows.T, abs=1e-6 * size)
    # what of another row lies outside of the span is lost, its products with the rows are not
    products = others.astype(float) @ rows.T
    assert span.rotate(rows, others) @ span.rotated.T == pytest.approx(products, abs=1e-4 * np.sqrt(size) * 10)


def test_weights_come_back_to_the_features_with_the_same_scores() -> None:
    rng = np.random.default_rng(0)
    rows, others = rng.standard_normal((30, 9000)).astype(np.float32), rng.standard_normal((7, 9000)).astype(np.float32)
    span = find_span(rows)
    assert span is not None
    weights = rng.standard_normal((4, span.rotated.shape[1]))
    restored = span.unrotate(rows, weights)
    assert restored.shape == (4, 9000)
    assert others @ restored.T == pytest.approx(span.rotate(rows, others) @ weights.T, abs=1e-3)
    assert np.linalg.norm(restored, axis=1) == pytest.approx(np.linalg.norm(weights, axis=1), rel=1e-6)


@pytest.mark.parametrize("rows", [np.ones((5, 5)), np.ones((6, 5)), np.zeros((3, 9))])
def test_nothing_is_rotated_where_nothing_is_gained(rows: np.ndarray) -> None:
    assert find_span(rows.astype(np.float32)) is None


@pytest.mark.parametrize("scaling", ["standard", "l2", "none"])
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(
    ("name", "params", "oracle"),
    [
        ("logreg", {"C": 0.1}, LogisticRegression(C=0.1, tol=1e-8, max_iter=10_000)),
        ("linear_svm", {"C": 0.1}, LinearSVC(C=0.1, tol=1e-9, max_iter=100_000)),
        ("ridge", {"alpha": 3.0}, RidgeClassifier(alpha=3.0)),
    ],
)
def test_a_head_trained_in_the_span_is_the_head_trained_on_the_features(
    name: str, params: dict[str, float], oracle: object, classes: int, scaling: str
) -> None:
    rng = np.random.default_rng(classes)
    y = np.arange(40) % classes
    features = (rng.standard_normal((40, 300)) + 0.7 * (y[:, None] == np.arange(300) % 5)).astype(np.float32)
    fresh = rng.standard_normal((50, 300)).astype(np.float32)
    scaled = scale(scaling, features.copy(), fresh.copy(), rotated=True)
    assert scaled.span is not None
    fitted = train_final(find_head(name), params, scaled, y)
    direct = oracle.fit(scaled.train.astype(float), y)  # type: ignore[attr-defined]
    size = float(np.abs(direct.coef_).max())
    assert fitted.estimator.coef_ == pytest.approx(direct.coef_, abs=0.01 * size)
    assert fitted.estimator.intercept_ == pytest.approx(direct.intercept_, abs=2e-3)
    assert (fitted.estimator.predict(scaled.held) == direct.predict(scaled.held)).mean() > 0.97
    assert fitted.converged


def test_scaling_is_that_of_the_training_rows() -> None:
    rng = np.random.default_rng(1)
    train, held = rng.normal(3, 2, (40, 6)).astype(np.float32), rng.normal(3, 2, (9, 6)).astype(np.float32)
    scaled = scale("standard", train.copy(), held.copy(), rotated=False)
    assert scaled.held == pytest.approx(StandardScaler().fit(train).transform(held), abs=1e-6)
    assert np.linalg.norm(scale("l2", train.copy(), held.copy(), rotated=False).held, axis=1) == pytest.approx(1)
    assert (scale("none", train.copy(), held.copy(), rotated=False).held == held).all()


def test_joined_layers_are_scaled_to_length_1_each() -> None:
    rows = np.random.default_rng(1).normal(0, [100] * 3 + [1] * 5, (9, 8)).astype(np.float32)
    rows[4] = 0
    scaled = scale("l2", rows.copy(), rows.copy(), rotated=False, dims=(3, 5))
    expected = np.hstack([normalize(rows[:, :3]), normalize(rows[:, 3:])]) / np.sqrt(2)
    np.testing.assert_allclose(scaled.train, expected, atol=1e-6)
    np.testing.assert_allclose(scaled.held, expected, atol=1e-6)
    assert scaled.scaler.transform(later := rows.copy()) == pytest.approx(expected, abs=1e-6)
    assert (later == rows).all()
