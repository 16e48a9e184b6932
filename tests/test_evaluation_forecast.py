from __future__ import annotations

import numpy as np
import pytest

from pipeline.evaluation.forecast import LabelCurve

LABELS = np.array([1.0, 2, 4, 8, 16])


def curve_of(floor: float, scale: float, rate: float, error: float = 0.005, noise: float = 0.0) -> LabelCurve:
    rng = np.random.default_rng(0)
    accuracies = 1 - floor - scale * LABELS**-rate + noise * rng.standard_normal(len(LABELS))
    return LabelCurve(LABELS, accuracies, np.full(len(LABELS), error))


@pytest.mark.parametrize(
    ("floor", "scale", "rate"), [(0.0, 0.5, 0.5), (0.05, 0.4, 0.8), (0.1, 0.6, 0.2), (0.3, 0.0, 1)]
)
def test_a_power_law_is_followed(floor: float, scale: float, rate: float) -> None:
    curve = curve_of(floor, scale, rate)
    for labels in (16, 32, 64):
        low, high = curve.interval(labels)
        assert low < 1 - floor - scale * labels**-rate < high
    low, high = curve.interval(32)
    assert high - low < 0.1


def test_the_further_and_the_noisier_the_wider() -> None:
    def width(curve: LabelCurve, labels: float) -> float:
        low, high = curve.interval(labels)
        return high - low

    sharp, blurred = curve_of(0.05, 0.5, 0.5), curve_of(0.05, 0.5, 0.5, error=0.03)
    assert width(sharp, 16) < width(sharp, 64)
    assert width(sharp, 64) < width(blurred, 64)
    assert width(sharp, 64) < width(LabelCurve(LABELS[:3], sharp.accuracies[:3], sharp.errors[:3]), 64)


def test_a_share_stays_a_share_and_more_labels_do_no_harm() -> None:
    curve = curve_of(0.0, 0.02, 1.0, error=0.05)
    drawn = curve.draws([16, 32, 64, 1e6])
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    assert (np.diff(np.median(drawn[:, :3], axis=0)) >= -0.002).all()
    assert (curve.draws([32]) == curve.draws([32])).all(), "the same forecast each time"


def test_intervals_cover_made_curves_that_are_no_power_laws() -> None:
    rng, held = np.random.default_rng(1), 0
    for _ in range(200):
        top, steep = rng.uniform(0.7, 0.99), rng.uniform(0.3, 1.2)
        truth = top / (1 + (rng.uniform(0.3, 2) / np.append(LABELS, 32)) ** steep)
        seen = truth[:-1] + 0.01 * rng.standard_normal(5)
        low, high = LabelCurve(LABELS, seen, np.full(5, 0.01)).interval(32)
        held += low <= truth[-1] <= high
    assert held / 200 >= 0.9
