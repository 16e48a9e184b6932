from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pipeline.errors import FitError
from pipeline.evaluation.intervals import bootstrap, corrected_t_test, mcnemar, wilson
from pipeline.evaluation.metrics import count, macro_f1


@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.sampled_from([0.9, 0.95]))
def test_wilson_is_scipys_and_holds_the_share(case: tuple[int, int], confidence: float) -> None:
    successes, n = case
    low, high = wilson(successes, n, confidence)
    expected = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= low <= successes / n <= high <= 1


def test_wilson_of_a_printed_example() -> None:
    # Newcombe 1998, table I: 81 of 263 is 0.2553 to 0.3662
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)


def test_bootstrap_of_a_mean_is_scipys_percentile_interval() -> None:
    values = np.random.default_rng(0).exponential(size=200)
    found = bootstrap(lambda rows: values[rows].mean(axis=-1), len(values), draws=9000, seed=1)
    expected = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=9000, rng=2).confidence_interval
    assert found == pytest.approx((expected.low, expected.high), abs=0.01)


def test_bootstrap_takes_a_statistic_of_counts_and_repeats_with_its_seed() -> None:
    rng = np.random.default_rng(3)
    true = rng.integers(0, 3, 400)
    predicted = np.where(rng.random(400) < 0.8, true, rng.integers(0, 3, 400))

    def statistic(rows: np.ndarray) -> np.ndarray:
        return macro_f1(count(true[rows], predicted[rows], 3))

    low, high = bootstrap(statistic, 400, draws=300)
    assert low < float(macro_f1(count(true, predicted, 3))) < high
    assert bootstrap(statistic, 400, draws=300) == (low, high)
    assert bootstrap(statistic, 400, draws=300, seed=1) != (low, high)


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 5))
def test_mcnemar_is_the_binomial_test_on_discordant_rows(only_a: int, only_b: int, both: int) -> None:
    right_a = np.array([True] * only_a + [False] * only_b + [True] * both, bool)
    right_b = np.array([False] * only_a + [True] * only_b + [True] * both, bool)
    expected = stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert mcnemar(right_a, right_b) == pytest.approx(expected, rel=1e-9)


def test_corrected_t_test_is_the_plain_one_with_a_larger_variance() -> None:
    differences = np.random.default_rng(4).normal(0.01, 0.02, 10)
    plain = stats.ttest_1samp(differences, 0)
    t, p = corrected_t_test(differences, n_train=800, n_test=200)
    assert t == pytest.approx(plain.statistic * math.sqrt((1 / 10) / (1 / 10 + 200 / 800)))
    assert p == pytest.approx(2 * stats.t.sf(abs(t), df=9))
    # without test rows nothing overlaps, and the correction is none
    assert corrected_t_test(differences, 800, 0) == pytest.approx((plain.statistic, plain.pvalue))


def test_corrected_t_test_without_spread() -> None:
    assert corrected_t_test(np.zeros(3), 80, 20) == (0.0, 1.0)
    assert corrected_t_test(np.full(3, -0.5), 80, 20) == (-math.inf, 0.0)


def test_what_cannot_be_judged_is_refused() -> None:
    with pytest.raises(FitError, match="at least one test row"):
        wilson(0, 0)
    with pytest.raises(FitError, match="at least one test row"):
        bootstrap(lambda rows: rows.mean(axis=-1), 0)
    with pytest.raises(FitError, match="one test set, got 2 and 3"):
        mcnemar(np.ones(2, bool), np.ones(3, bool))
    with pytest.raises(FitError, match="at least two"):
        corrected_t_test(np.ones(1), 80, 20)
