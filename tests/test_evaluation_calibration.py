from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression

from pipeline.evaluation.calibration import fit_temperature, tempered, useful_temperature
from pipeline.evaluation.metrics import log_loss


def spoilt(n: int, k: int, temperature: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that are `temperature` times too sure, and labels drawn from the honest ones."""
    rng = np.random.default_rng(seed)
    scores = 2 * rng.standard_normal((n, k))
    y = (rng.random(n)[:, None] > softmax(scores, axis=1).cumsum(axis=1)).sum(axis=1)
    return softmax(temperature * scores, axis=1), y


@pytest.mark.parametrize("temperature", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("k", [2, 7])
def test_the_temperature_that_was_put_in_is_found(k: int, temperature: float) -> None:
    probabilities, y = spoilt(20_000, k, temperature)
    found = fit_temperature(probabilities, y)
    assert found == pytest.approx(temperature, rel=0.05)
    assert log_loss(y, tempered(probabilities, found)) <= log_loss(y, probabilities)


def test_it_is_scikit_learns_temperature_on_many_rows() -> None:
    rng = np.random.default_rng(1)
    y = np.arange(4000) % 3
    x = rng.standard_normal((4000, 5)) + 0.7 * rng.standard_normal((3, 5))[y]
    model = LogisticRegression(C=1e-4).fit(x[:500], y[:500])
    oracle = CalibratedClassifierCV(FrozenEstimator(model), method="temperature", ensemble=False).fit(x[500:], y[500:])
    found = fit_temperature(model.predict_proba(x[500:]), y[500:])
    assert tempered(model.predict_proba(x), found) == pytest.approx(oracle.predict_proba(x), abs=0.01)


@pytest.mark.parametrize("n", [1, 9, 300])
def test_rows_that_are_all_right_make_as_sure_as_their_number_allows(n: int) -> None:
    probabilities = np.tile([0.5001, 0.4999], (n, 1))
    calibrated = tempered(probabilities, fit_temperature(probabilities, np.zeros(n, np.int64)))
    assert calibrated[0, 0] == pytest.approx((n + 1) / (n + 2), abs=1e-4)


def test_calibrated_probabilities_are_those_of_the_scores_and_nothing_stays_nothing() -> None:
    scores = np.array([[60.0, 0.0, -5.0], [900.0, 890.0, 0.0]])
    np.testing.assert_allclose(tempered(softmax(scores, axis=1), 6.0)[:, :2], softmax(scores / 6, axis=1)[:, :2])
    of_two = np.array([[0.6, 0.4]])
    padded = tempered(np.hstack([of_two, np.zeros((1, 3))]), 40.0)
    assert padded[0, 2:].tolist() == [0, 0, 0]
    np.testing.assert_allclose(padded[:, :2], tempered(of_two, 40.0))


def test_a_temperature_that_does_not_help_on_other_rows_is_dropped() -> None:
    honest, y = spoilt(400, 3, 1.0)
    sure, truth = spoilt(400, 3, 5.0)
    assert useful_temperature(sure, truth) == fit_temperature(sure, truth)
    right = np.tile([0.999, 0.001], (9, 1))
    assert useful_temperature(right, np.zeros(9, np.int64)) is not None, "nine right ones do not make it certain"
    assert useful_temperature(honest[:1], y[:1]) is None
    assert useful_temperature(*spoilt(2000, 3, 1.0)) is None
    order = np.random.default_rng(0).permutation(400)
    assert useful_temperature(sure[order], truth[order]) == pytest.approx(fit_temperature(sure, truth))


def test_a_probability_of_zero_for_the_true_class_counts_as_the_smallest() -> None:
    votes = np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.4]])
    y = np.array([1, 1, 0])
    lifted = np.maximum(votes, np.finfo(float).eps)
    assert fit_temperature(votes, y) == pytest.approx(fit_temperature(lifted, y))
    assert useful_temperature(np.tile(votes, (4, 1)), np.tile(y, 4)) is None


@given(st.floats(1e-5, 1e5), st.integers(0, 50))
def test_labels_stay_and_certainty_falls_with_temperature(temperature: float, seed: int) -> None:
    probabilities = np.random.default_rng(seed).dirichlet(np.ones(4), 20)
    calibrated = tempered(probabilities, temperature)
    rows = np.arange(20)
    assert (calibrated[rows, probabilities.argmax(axis=1)] == calibrated.max(axis=1)).all()
    assert tempered(probabilities, 1.0) == pytest.approx(probabilities, abs=1e-12)
    warmer = tempered(probabilities, 2 * temperature)
    assert (warmer.max(axis=1) <= calibrated.max(axis=1) + 1e-12).all()


def test_each_row_may_have_a_temperature_of_its_own() -> None:
    probabilities, _ = spoilt(4, 3, 1.0)
    together = tempered(probabilities, np.array([[1.0], [2.0], [3.0], [0.1]]))
    assert together[2] == pytest.approx(tempered(probabilities, 3.0)[2])
