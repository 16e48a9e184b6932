from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import multivariate_normal
from sklearn.covariance import ledoit_wolf
from threadpoolctl import threadpool_limits

from pipeline.diagnostics.transfer_scores import h_score, indicators, leep, logme


@pytest.fixture(autouse=True)
def _one_thread():
    with threadpool_limits(1):
        yield


def clouds(n: int, d: int, classes: int = 3, apart: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % classes)
    middles = apart * rng.standard_normal((classes, d))
    return (middles[labels] + rng.standard_normal((n, d)) + 0.5).astype(np.float32), labels


def evidence_by_search(features: np.ndarray, y: np.ndarray) -> float:
    """The largest log density of y under N(0, FF'/a + I/b), over both precisions."""
    gram, n = features.astype(float) @ features.astype(float).T, len(y)

    def negative(logs: np.ndarray) -> float:
        a, b = np.exp(logs)
        return -multivariate_normal(np.zeros(n), gram / a + np.eye(n) / b).logpdf(y)

    starts = [(0.0, 0.0), (4.0, 2.0), (-2.0, 4.0)]
    return max(-minimize(negative, start, method="Nelder-Mead", options={"xatol": 1e-6}).fun for start in starts)


def logme_of_classes(features: np.ndarray, labels: np.ndarray) -> float:
    return logme(features, indicators(labels))


@pytest.mark.parametrize(("n", "d", "apart"), [(40, 5, 1.0), (40, 5, 0.0), (30, 60, 0.3), (25, 1, 2.0)])
def test_logme_is_the_maximum_of_the_evidence(n: int, d: int, apart: float) -> None:
    features, labels = clouds(n, d, apart=apart)
    expected = np.mean([evidence_by_search(features, (labels == k).astype(float)) for k in range(3)]) / n
    assert logme_of_classes(features, labels) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("n", "d"), [(60, 8), (30, 90)])
def test_h_score_is_the_trace_of_its_definition(n: int, d: int) -> None:
    features, labels = clouds(n, d)
    centred = features.astype(float) - features.astype(float).mean(axis=0)
    means = np.stack([centred[labels == label].mean(axis=0) for label in labels])
    shrunk, shrinkage = ledoit_wolf(centred, assume_centered=True)
    expected = (1 - shrinkage) * np.trace(np.linalg.solve(shrunk, means.T @ means / n))
    assert h_score(features, labels) == pytest.approx(expected, rel=1e-6)


def test_h_score_tells_wide_noise_from_wide_signal() -> None:
    """The plain H-score is K - 1 for both."""
    noise, labels = clouds(40, 400, apart=0.0)
    signal, _ = clouds(40, 400, apart=1.0)
    assert h_score(noise, labels) < 0.8 < 1.5 < h_score(signal, labels) < 2


def test_leep_is_the_likelihood_of_the_empirical_classifier() -> None:
    rng = np.random.default_rng(0)
    labels, logits = np.arange(50) % 4, rng.standard_normal((50, 7)) * 3
    source = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    total = 0.0
    for row, label in enumerate(labels):
        joint = np.array([source[labels == label, z].sum() for z in range(7)]) / 50
        total += np.log((joint / (source.sum(axis=0) / 50) * source[row]).sum())
    assert leep(logits, labels) == pytest.approx(total / 50)


@pytest.mark.parametrize("score", [logme_of_classes, h_score])
def test_scores_rise_with_the_distance_of_classes_and_forget_the_unit(score) -> None:
    values = [score(*clouds(90, 20, apart=apart)) for apart in (0.0, 0.3, 1.0, 3.0)]
    assert values == sorted(values)
    features, labels = clouds(90, 20)
    assert score(features * 1000, labels) == pytest.approx(score(features, labels), rel=1e-4)


@pytest.mark.parametrize("score", [logme_of_classes, h_score])
@pytest.mark.parametrize("values", [np.zeros((9, 4)), np.ones((9, 4)), np.eye(3)[np.arange(9) % 3]], ids=str)
def test_degenerate_features_have_finite_scores(score, values: np.ndarray) -> None:
    assert np.isfinite(score(values.astype(np.float32), np.arange(9) % 3))


def test_logme_of_a_number_is_the_maximum_of_the_evidence() -> None:
    features, _ = clouds(40, 5)
    number = features[:, 0] + 0.3 * np.random.default_rng(1).standard_normal(40)
    expected = evidence_by_search(features, number) / 40
    assert logme(features, number[:, None].astype(float)) == pytest.approx(expected, abs=1e-4)
