from __future__ import annotations

import math
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as oracle

from pipeline.evaluation.metrics import (
    auroc,
    count,
    evaluate,
    expected_calibration_error,
    log_loss,
    macro_f1,
    mean_per_class_accuracy,
    rate,
    top5_accuracy,
)
from pipeline.options import METRICS
from pipeline.results import FitResult

labels = st.integers(2, 6).flatmap(
    lambda k: st.tuples(
        st.just(k), st.lists(st.tuples(st.integers(0, k - 1), st.integers(0, k - 1)), min_size=1, max_size=40)
    )
)


@given(labels)
def test_counts_and_scores_are_scikit_learns(case: tuple[int, list[tuple[int, int]]]) -> None:
    k, pairs = case
    true, predicted = (np.array(column) for column in zip(*pairs, strict=True))
    found = evaluate(true, predicted, k)
    present = np.unique(true)
    recall = oracle.recall_score(true, predicted, labels=present, average=None, zero_division=0)
    table = oracle.confusion_matrix(true, predicted, labels=range(k))
    for counts, expected in zip(count(true, predicted, k), (table.sum(1), table.sum(0), table.diagonal()), strict=True):
        assert counts.tolist() == expected.tolist()
    assert found.accuracy == pytest.approx(oracle.accuracy_score(true, predicted))
    assert found.mean_per_class_accuracy == pytest.approx(recall.mean())
    assert found.macro_f1 == pytest.approx(oracle.f1_score(true, predicted, average="macro", zero_division=0))
    assert found.log_loss is None
    assert found.ece is None


def test_leading_axes_are_computed_as_one_by_one() -> None:
    rng = np.random.default_rng(0)
    true, predicted = rng.integers(0, 4, (7, 30)), rng.integers(0, 4, (7, 30))
    together = count(true, predicted, 4)
    one_by_one = [count(a, b, 4) for a, b in zip(true, predicted, strict=True)]
    assert (np.stack(together, axis=1) == np.array(one_by_one)).all()
    assert macro_f1(together) == pytest.approx([float(macro_f1(one)) for one in one_by_one])
    assert mean_per_class_accuracy(together) == pytest.approx(
        [float(mean_per_class_accuracy(one)) for one in one_by_one]
    )


def test_a_million_classes_cost_no_table_of_pairs() -> None:
    true = np.array([0, 999_999, 7, 7])
    found = evaluate(true, np.array([0, 999_999, 7, 123_456]), 1_000_000)
    assert (found.accuracy, found.mean_per_class_accuracy) == (0.75, pytest.approx(2.5 / 3))
    assert found.macro_f1 == pytest.approx((1 + 1 + 2 / 3 + 0) / 4)


def test_log_loss_is_scikit_learns_and_infinite_where_the_truth_had_no_probability() -> None:
    rng = np.random.default_rng(1)
    probabilities = rng.dirichlet(np.ones(5), 200)
    true = rng.integers(0, 5, 200)
    assert log_loss(true, probabilities) == pytest.approx(oracle.log_loss(true, probabilities, labels=range(5)))
    probabilities[0] = 0
    probabilities[0, (true[0] + 1) % 5] = 1
    assert log_loss(true, probabilities) == math.inf


def test_calibration_error_is_the_definition_bin_by_bin() -> None:
    rng = np.random.default_rng(2)
    probabilities = rng.dirichlet(np.full(3, 0.5), 500)
    probabilities[:3] = [[1, 0, 0], [0.6, 0.4, 0], [1 / 3, 1 / 3, 1 / 3]]
    true = rng.integers(0, 3, 500)
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == true
    expected = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            expected += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    assert expected_calibration_error(true, probabilities) == pytest.approx(expected, abs=1e-9)


def test_calibration_error_of_known_cases() -> None:
    certain = np.tile([1.0, 0.0], (10, 1))
    assert expected_calibration_error(np.zeros(10, np.int64), certain) == 0
    assert expected_calibration_error(np.ones(10, np.int64), certain) == 1
    half_right = np.repeat([0, 1], 5)
    assert expected_calibration_error(half_right, np.tile([0.75, 0.25], (10, 1))) == pytest.approx(0.25)


@pytest.mark.parametrize("n_classes", [2, 3, 12])
@pytest.mark.parametrize("digits", [1, 9], ids=["ties", "no ties"])
def test_metrics_of_scores_are_scikit_learns(n_classes: int, digits: int) -> None:
    rng = np.random.default_rng(n_classes)
    true = rng.permutation(np.arange(90) % n_classes)
    scores = np.round(rng.standard_normal((90, n_classes)) + 1.5 * np.eye(n_classes)[true], digits)
    predicted = scores.argmax(1)
    if n_classes == 2:
        scores = np.stack([-scores[:, 1], scores[:, 1]], axis=1)
        assert auroc(true, scores) == pytest.approx(oracle.roc_auc_score(true, scores[:, 1]))
    else:
        shares = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        expected = oracle.roc_auc_score(true, shares, multi_class="ovr")
        assert auroc(true, shares) == pytest.approx(expected)
    found = evaluate(true, predicted, n_classes, scores=scores)
    one_hot = np.eye(n_classes)[true]
    assert found.auroc == pytest.approx(oracle.roc_auc_score(one_hot, scores, average="macro"))
    assert found.average_precision == pytest.approx(oracle.average_precision_score(one_hot, scores, average="macro"))
    assert found.kappa == pytest.approx(oracle.cohen_kappa_score(true, predicted))
    if n_classes == 12 and digits == 9:
        assert found.top5_accuracy == pytest.approx(oracle.top_k_accuracy_score(true, scores, k=5))
    elif n_classes < 10:
        assert found.top5_accuracy is None


def test_metrics_of_scores_where_little_can_be_said() -> None:
    certain = np.array([[1.0, 0, 0, 0, 0, 0, 0, 0, 0, 0]])
    assert top5_accuracy(np.array([3]), certain) == 0, "a tie of nine classes is no place among the first five"
    assert math.isnan(auroc(np.array([1, 1]), np.ones((2, 2))))
    assert evaluate(np.array([1, 1]), np.array([1, 1]), 2, scores=np.ones((2, 2))).average_precision is None
    assert evaluate(np.array([1, 1]), np.array([1, 1]), 2).auroc is None, "no scores"
    assert evaluate(np.array([1, 1]), np.array([1, 1]), 2).kappa == 0, "chance alone would be right"
    unseen = np.array([[0.1, -np.inf], [0.2, -np.inf], [0.3, -np.inf]])
    assert auroc(np.array([0, 1, 1]), unseen) == pytest.approx((0 + 0.5) / 2), "no training rows: a guess"


def test_scores_of_different_models_are_not_compared() -> None:
    true, folds = np.array([0, 1, 0, 1]), np.array([0, 0, 1, 1])
    scores = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.2, 0.8]])
    assert rate("auroc", true, scores.argmax(1), 2, scores, folds) == 1
    assert rate("auroc", true, scores.argmax(1), 2, scores) == 0.75


def test_every_metric_that_can_be_asked_for_is_a_key_of_results() -> None:
    rng = np.random.default_rng(0)
    true, scores = np.arange(40) % 10, rng.standard_normal((40, 10))
    found = evaluate(true, scores.argmax(1), 10, scores=scores)
    for metric in METRICS:
        assert rate(metric, true, scores.argmax(1), 10, scores) == getattr(found, metric)
        assert metric in {field.name for field in fields(FitResult)}
