from __future__ import annotations

import itertools
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.contingency_tables import mcnemar as oracle_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from pipeline.evaluation.comparisons import (
    best_validated,
    compare_over_splits,
    compare_with_chosen,
    holm,
    may_be_best,
)
from pipeline.evaluation.intervals import corrected_t_test, mcnemar, wilson

NAMES = np.array([f"{i}.png" for i in range(200)])


def answers(*shares: float) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.array([rng.random(200) < share for share in shares])


@pytest.mark.parametrize("p_values", [[0.03], [0.01, 0.04, 0.03, 0.2], [0.5, 0.5, 1e-9, 0.02, 0.9, 0.02], [1.0, 0.0]])
def test_holm_is_that_of_statsmodels(p_values: list[float]) -> None:
    assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1])


@pytest.mark.parametrize("shares", [(0.9, 0.8), (0.6, 0.61), (0.99, 0.3)])
def test_two_models_and_one_interval_are_those_of_statsmodels(shares: tuple[float, float]) -> None:
    a, b = answers(*shares)
    table = [[int((a & b).sum()), int((a & ~b).sum())], [int((~a & b).sum()), int((~a & ~b).sum())]]
    assert mcnemar(a, b) == pytest.approx(oracle_mcnemar(table, exact=True).pvalue)
    assert wilson(int(a.sum()), 200) == pytest.approx(proportion_confint(int(a.sum()), 200, method="wilson"))


def test_each_model_is_compared_with_the_one_chosen_on_validation_not_with_the_best_on_test() -> None:
    right = answers(0.7, 0.88, 0.9)
    found = compare_with_chosen(right, NAMES, 1)
    expected = holm([mcnemar(right[1], right[0]), mcnemar(right[1], right[2])])
    assert found == [pytest.approx(expected[0]), None, pytest.approx(expected[1])]
    in_pairs = np.repeat(NAMES[:100], 2)
    clustered = compare_with_chosen(right, in_pairs, 1)
    pairs = np.repeat(np.arange(100), 2)
    assert clustered[2] == pytest.approx(max(holm([mcnemar(right[1], right[i], pairs) for i in (0, 2)])))


def test_ties_of_validation_accuracy_go_to_the_lower_log_loss_then_to_the_first() -> None:
    assert best_validated([(0.9, 0.3), (0.9, 0.2), (0.9, 0.2), (0.8, 0.1)]) == 1
    assert best_validated([(None, None), (None, 0.1), (0.1, None)]) == 2, "what was not validated comes last"


def test_a_single_result_is_compared_with_nothing() -> None:
    assert compare_with_chosen(answers(0.5), NAMES, 0) == [None]
    assert may_be_best(answers(0.5)).tolist() == [True]


def test_equal_models_are_not_distinguishable() -> None:
    right = answers(0.8)
    assert compare_with_chosen(np.repeat(right, 2, axis=0), NAMES, 0) == [None, 1.0]
    assert may_be_best(np.repeat(right, 3, axis=0)).all()


def test_heads_over_the_same_splits_are_compared_by_the_corrected_t_test() -> None:
    rng = np.random.default_rng(2)
    draws = rng.normal(0.8, 0.03, 6)
    rivals = [draws, draws + 0.05 + rng.normal(0, 0.01, 6), draws - 0.1]
    found = compare_over_splits(rivals, 1, 80, 20)
    expected = holm([corrected_t_test(rivals[1] - rivals[index], 80, 20)[1] for index in (0, 2)])
    assert found == [pytest.approx(expected[0]), None, pytest.approx(expected[1])]


def test_a_lead_without_spread_is_not_judged() -> None:
    draws = np.random.default_rng(2).normal(0.8, 0.03, 5)
    assert compare_over_splits([draws, draws - 0.1, draws], 0, 80, 20) == [None, None, 1.0]
    noisy = draws - np.array([0.1, 0.2, 0.1, 0.2, 0.1])
    assert compare_over_splits([draws, noisy], 0, 80, 20)[1] is not None


def test_the_set_of_two_models_is_that_of_the_exact_sign_flips() -> None:
    rng = np.random.default_rng(5)
    for _ in range(20):
        totals = rng.integers(-3, 4, 9)  # of nine groups of three rows: all 512 flips can be looked at
        a = np.repeat(np.maximum(totals, 0), 3) > np.tile(np.arange(3), 9)
        b = np.repeat(np.maximum(-totals, 0), 3) > np.tile(np.arange(3), 9)
        sums = np.array(list(itertools.product([-1, 1], repeat=9))) @ totals
        p = (np.abs(sums) >= abs(totals.sum())).mean()
        groups = np.repeat(np.arange(9), 3)
        assert mcnemar(a, b, groups) == pytest.approx(p)
        if abs(p - 0.05) > 0.02:
            assert may_be_best(np.array([a, b]), groups).all() == (p > 0.05)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(1, 8), st.integers(1, 60), st.booleans())
def test_the_set_holds_the_best_on_test_and_depends_on_no_order(seed: int, k: int, n: int, grouped: bool) -> None:
    rng = np.random.default_rng(seed)
    right = rng.random((k, n)) < rng.random((k, 1))
    groups = rng.integers(0, 5, n) if grouped else None
    found = may_be_best(right, groups)
    assert found[right.sum(axis=1) == right.sum(axis=1).max()].all()
    order = rng.permutation(k)
    assert may_be_best(right[order], groups).tolist() == found[order].tolist()
    assert may_be_best(right, groups, level=1.0).all()
    assert (found <= may_be_best(right, groups, level=0.99)).all(), "more confidence leaves out fewer"


def correlated(rng: np.random.Generator, accuracies: np.ndarray, n: int, correlation: float) -> np.ndarray:
    """Models of these accuracies that tend to err on the same rows."""
    bounds = np.array([NormalDist().inv_cdf(accuracy) for accuracy in accuracies])
    common, own = rng.standard_normal(n), rng.standard_normal((len(bounds), n))
    return np.asarray(np.sqrt(correlation) * common + np.sqrt(1 - correlation) * own < bounds[:, None])


@pytest.mark.parametrize("correlation", [0.0, 0.9])
def test_all_of_ten_equal_models_are_in_the_set_in_95_percent_of_simulations(correlation: float) -> None:
    rng = np.random.default_rng(0)
    draws, accuracies = 150, np.full(10, 0.9)
    kept = sum(bool(may_be_best(correlated(rng, accuracies, 200, correlation)).all()) for _ in range(draws))
    assert kept / draws >= 0.95 - 2 * np.sqrt(0.05 * 0.95 / draws)


def test_correlation_between_models_helps_to_leave_some_out() -> None:
    rng = np.random.default_rng(0)
    accuracies = np.linspace(0.95, 0.85, 6)
    sizes = [
        np.mean([may_be_best(correlated(rng, accuracies, 200, correlation)).sum() for _ in range(30)])
        for correlation in (0.0, 0.95)
    ]
    assert sizes[1] < sizes[0] - 1


def test_rows_in_groups_are_counted_as_groups() -> None:
    a, b = np.arange(40) < 38, np.arange(40) % 10 < 6
    assert may_be_best(np.array([a, b])).tolist() == [True, False]
    assert may_be_best(np.array([a, b]), np.arange(40) // 10).all(), "four groups can tell nothing apart"
