from __future__ import annotations

import numpy as np
import pytest
from statsmodels.stats.contingency_tables import mcnemar as oracle_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from pipeline.evaluation.comparisons import compare_models, compare_over_splits, holm, tie_notes
from pipeline.evaluation.intervals import corrected_t_test, mcnemar, wilson

NAMES = np.array([f"{i}.png" for i in range(200)])


def answers(*shares: float) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.random(200) < share for share in shares]


@pytest.mark.parametrize("p_values", [[0.03], [0.01, 0.04, 0.03, 0.2], [0.5, 0.5, 1e-9, 0.02, 0.9, 0.02], [1.0, 0.0]])
def test_holm_is_that_of_statsmodels(p_values: list[float]) -> None:
    assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1])


@pytest.mark.parametrize("shares", [(0.9, 0.8), (0.6, 0.61), (0.99, 0.3)])
def test_two_models_and_one_interval_are_those_of_statsmodels(shares: tuple[float, float]) -> None:
    a, b = answers(*shares)
    table = [[int((a & b).sum()), int((a & ~b).sum())], [int((~a & b).sum()), int((~a & ~b).sum())]]
    assert mcnemar(a, b) == pytest.approx(oracle_mcnemar(table, exact=True).pvalue)
    assert wilson(int(a.sum()), 200) == pytest.approx(proportion_confint(int(a.sum()), 200, method="wilson"))


def test_each_model_is_compared_with_the_best_of_its_own_test_rows() -> None:
    right = answers(0.7, 0.9, 0.88, 0.5)
    other = NAMES[::-1]
    found = compare_models([NAMES, NAMES, NAMES, other], right)
    expected = holm([mcnemar(right[1], right[0]), mcnemar(right[1], right[2])])
    assert found == [pytest.approx(expected[0]), None, pytest.approx(expected[1]), None]
    assert tie_notes(found) == [
        "1 of 2 other results are not distinguishable from the best on the same test images "
        "(McNemar's exact test, Holm's correction, 5 %)"
    ]


def test_a_single_result_is_compared_with_nothing() -> None:
    assert compare_models([NAMES], answers(0.5)) == [None]
    assert tie_notes([None]) == []


def test_equal_models_are_not_distinguishable() -> None:
    right = answers(0.8)[0]
    assert compare_models([NAMES, NAMES], [right, right]) == [None, 1.0]


def test_heads_over_the_same_splits_are_compared_by_the_corrected_t_test() -> None:
    rng = np.random.default_rng(2)
    draws = rng.normal(0.8, 0.03, 6)
    rivals = [draws, draws + 0.05 + rng.normal(0, 0.01, 6), draws - 0.1]
    found = compare_over_splits(rivals, 80, 20)
    expected = holm([corrected_t_test(rivals[1] - rivals[place], 80, 20)[1] for place in (0, 2)])
    assert found == [pytest.approx(expected[0]), None, pytest.approx(expected[1])]


def test_few_splits_and_a_lead_without_spread_are_not_judged() -> None:
    draws = np.random.default_rng(2).normal(0.8, 0.03, 5)
    assert compare_over_splits([draws, draws - 0.1, draws], 80, 20) == [None, None, 1.0]
    noisy = draws - np.array([0.1, 0.2, 0.1, 0.2, 0.1])
    assert compare_over_splits([draws[:4], noisy[:4]], 80, 20) == [None, None]
    assert compare_over_splits([draws, noisy], 80, 20)[1] is not None
