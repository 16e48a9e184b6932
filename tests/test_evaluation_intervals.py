from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pipeline.errors import FitError
from pipeline.evaluation.intervals import (
    accuracy_interval,
    corrected_t_test,
    effective_rows,
    mcnemar,
    number_clusters,
    paired_interval,
    smallest_difference,
    tango,
    wilson,
)


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


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 5))
def test_mcnemar_is_the_binomial_test_on_discordant_rows(only_a: int, only_b: int, both: int) -> None:
    right_a = np.array([True] * only_a + [False] * only_b + [True] * both, bool)
    right_b = np.array([False] * only_a + [True] * only_b + [True] * both, bool)
    expected = stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert mcnemar(right_a, right_b) == pytest.approx(expected, rel=1e-9)


def test_tango_without_a_row_that_only_one_gets_right() -> None:
    z2 = stats.norm.ppf(0.975) ** 2  # then the interval has a closed form (Tango 1998)
    assert tango(0, 0, 44) == pytest.approx((-z2 / (44 + z2), z2 / (44 + z2)), abs=1e-9)


@given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 60))
def test_tango_holds_what_the_score_test_does_not_reject(only_a: int, only_b: int, same: int) -> None:
    n = only_a + only_b + same
    low, high = tango(only_a, only_b, n)
    assert tango(only_b, only_a, n) == pytest.approx((-high, -low), abs=1e-9)
    assert -1 <= low <= (only_a - only_b) / n <= high <= 1

    def statistic(difference: float) -> float:
        """Maximise the likelihood over the share of rows that only b gets right, on a grid, and standardise."""
        share = np.linspace(max(0, -difference), (1 - difference) / 2, 20_001)
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = [
                count * np.log(p) if count else 0.0
                for count, p in ((only_a, share + difference), (only_b, share), (same, 1 - 2 * share - difference))
            ]
        best = share[np.argmax(np.nan_to_num(sum(terms), nan=-np.inf))]
        return float((only_a - only_b - n * difference) / np.sqrt(n * (2 * best + difference - difference**2)))

    for bound, sign in ((low, 1), (high, -1)):
        if abs(bound) < 0.99:
            assert statistic(bound) == pytest.approx(sign * 1.959964, abs=0.02)


@given(st.lists(st.integers(0, 3), min_size=2, max_size=60), st.integers(2, 6), st.integers(0, 1 << 30))
def test_a_paired_interval_holds_the_difference_and_agrees_with_the_exact_test(
    kinds: list[int], groups: int, seed: int
) -> None:
    a, b = np.array(kinds) % 2 == 0, np.array(kinds) < 2
    for clusters in (None, np.random.default_rng(seed).integers(0, groups, len(kinds))):
        if clusters is not None:
            clusters = np.unique(clusters, return_inverse=True)[1]
        low, high = paired_interval(a, b, clusters)
        assert low <= a.mean() - b.mean() <= high
        if low > 0 or high < 0:
            assert mcnemar(a, b, clusters) < 0.05
        wider = paired_interval(a, b, clusters, 0.99)
        assert wider[0] <= low + 1e-9
        assert high <= wider[1] + 1e-9
    assert paired_interval(b, a) == pytest.approx(tuple(-x for x in reversed(paired_interval(a, b))), abs=1e-9)


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=10))
def test_mcnemar_over_clusters_looks_at_all_flips_of_their_signs(leads: list[int]) -> None:
    a = np.concatenate([np.arange(4) < max(lead, 0) for lead in leads])
    b = np.concatenate([np.arange(4) < max(-lead, 0) for lead in leads])
    flips = np.array(list(itertools.product([-1, 1], repeat=len(leads)))) @ np.array(leads)
    expected = float((np.abs(flips) >= abs(sum(leads))).mean())
    assert mcnemar(a, b, np.repeat(np.arange(len(leads)), 4)) == pytest.approx(expected)


def test_rows_of_equal_groups_count_as_their_groups_but_for_students_t() -> None:
    values = np.array([1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0])
    shrunk = (stats.norm.ppf(0.975) / stats.t.ppf(0.975, 7)) ** 2
    eight = np.repeat(np.arange(8), 5)
    # eight values repeated have the variance of eight rows, but for the 39/40 of the sample variance of forty
    assert effective_rows(np.repeat(values, 5), eight) == pytest.approx(8 * 40 / 39 * 7 / 8 * shrunk)
    assert effective_rows(np.ones(40), eight) == pytest.approx(8 * shrunk), "where all are right, groups count as one"
    assert effective_rows(values, None) == 8
    assert effective_rows(values, np.zeros(8, np.int64)) == 1
    spread = np.tile([0.0, 1.0, 1.0, 1.0], 10)
    assert effective_rows(spread, np.repeat(np.arange(10), 4)) == pytest.approx(40 * shrunk_to(9)), "never more"


def shrunk_to(degrees: int) -> float:
    return float((stats.norm.ppf(0.975) / stats.t.ppf(0.975, degrees)) ** 2)


def test_intervals_over_groups_cover_where_those_over_rows_fail() -> None:
    rng = np.random.default_rng(0)
    clusters, held = np.repeat(np.arange(12), 25), np.zeros(2)
    for _ in range(200):
        right = rng.random(300) < rng.beta(0.85 * 4, 0.15 * 4, 12)[clusters]
        for index, of in enumerate((clusters, None)):
            low, high = accuracy_interval(right.mean(), 300, effective_rows(right.astype(float), of))
            held[index] += low <= 0.85 <= high
    assert held[0] / 200 >= 0.92
    assert held[1] / 200 < 0.75


@pytest.mark.parametrize(("n", "disagreement", "comparisons"), [(400, 0.1, 1), (400, 0.1, 10), (150, 0.02, 1)])
def test_the_smallest_difference_is_found_in_80_percent_of_simulations(
    n: int, disagreement: float, comparisons: int
) -> None:
    smallest = smallest_difference(n, disagreement, comparisons)
    disagreement = max(disagreement, smallest)
    rng, found = np.random.default_rng(0), 0
    for _ in range(400):
        kind = rng.choice(3, n, p=[(disagreement + smallest) / 2, (disagreement - smallest) / 2, 1 - disagreement])
        found += mcnemar(kind == 0, kind == 1) < 0.05 / comparisons
    assert 0.7 < found / 400 < 0.88, "the exact test has a little less power than the formula says"


def test_rows_are_numbered_by_what_they_belong_to() -> None:
    assert number_clusters(np.array(["b", "a", "b"])).tolist() == [1, 0, 1]  # type: ignore[union-attr]
    assert number_clusters(np.array(["b", "a"])) is None


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
    t, p = corrected_t_test(np.array([0.8, 0.7, 0.6]) - np.array([0.9, 0.8, 0.7]), 80, 20)
    assert t == -math.inf
    assert math.isnan(p), "the same lead on every split says nothing of what it is on another"


def test_what_cannot_be_judged_is_refused() -> None:
    with pytest.raises(FitError, match="at least one test row"):
        wilson(0, 0)
    with pytest.raises(FitError, match="one test set, got 2 and 3"):
        mcnemar(np.ones(2, bool), np.ones(3, bool))
    with pytest.raises(FitError, match="at least two"):
        corrected_t_test(np.ones(1), 80, 20)
