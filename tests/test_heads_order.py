"""What must not matter to a head: how classes are numbered, in which order rows come, and how many jobs run."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from sklearn.datasets import load_digits
from threadpoolctl import threadpool_limits

from pipeline.evaluation.calibration import tempered
from pipeline.heads.choose import make_fold, scale, search, train_final
from pipeline.heads.registry import FAMILIES, find_head

KINDS = [f"{family}/{scaling}" for family in FAMILIES for scaling in ("l2", "standard")]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with threadpool_limits(1):
        yield


def outcome(name: str, x: np.ndarray, y: np.ndarray, *, n_train: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Labels of the last 400 rows, and their calibrated probabilities with a column for each of the classes of `y`."""
    head = find_head(name)
    train, val, fresh = np.split(np.arange(len(x)), [n_train, len(x) - 400])
    rotated = head.family.linear and x.shape[1] > n_train
    choice = search(head, [make_fold(scale(head.scaling, x[train], x[val], rotated=rotated), y[train], y[val])])
    scaled = scale(head.scaling, x[train], x[fresh], rotated=rotated)
    estimator = train_final(head, choice.params, scaled, y[train]).estimator
    probabilities = None
    if head.family.probabilities:
        probabilities = head.family.predict_proba(estimator, scaled.held)
        if choice.temperature is not None:
            probabilities = tempered(probabilities, choice.temperature)
    return estimator.predict(scaled.held), probabilities


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("n_train", [40, 240])
@pytest.mark.parametrize("name", KINDS)
def test_numbers_of_classes_and_order_of_rows_change_no_label(name: str, n_train: int, classes: int) -> None:
    pixels, digits = load_digits(return_X_y=True)
    rng = np.random.default_rng(n_train)
    chosen = rng.permutation(len(digits))[: n_train + 600]
    x, y = pixels[chosen].astype(np.float32), (digits[chosen] % classes).astype(np.int64)
    renamed = rng.permutation(classes)
    renamed = renamed if (renamed != np.arange(classes)).any() else renamed[::-1]
    order = np.concatenate(
        [rng.permutation(n_train), n_train + rng.permutation(len(x) - 400 - n_train), np.arange(len(x) - 400, len(x))]
    )
    labels, probabilities = outcome(name, x, y, n_train=n_train)
    again, told = outcome(name, x[order], renamed[y[order]], n_train=n_train)
    assert (again == renamed[labels]).all()
    if probabilities is not None and told is not None:
        assert told[:, renamed] == pytest.approx(probabilities, abs=1e-6)
