from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from features_cache import CacheWriter, LayerInfo, Rows
from pipeline.errors import FitError
from pipeline.evaluation.leaks import NearDuplicates
from pipeline.evaluation.splits import make_splits
from pipeline.fit import fit
from pipeline.neighbours import planting
from pipeline.results import NearThreshold

CLEAN, COPIES, DIM = 240, 60, 24


@pytest.fixture
def leaky(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two classes that features hardly tell apart; some test images nearly repeat training images of wrong looks."""
    generator = np.random.default_rng(0)
    features = generator.standard_normal((CLEAN, DIM))
    labels = np.arange(CLEAN) % 2
    features[:, 0] += 1.2 * (2 * labels - 1)
    given = np.where(np.arange(CLEAN) % 3 == 0, "test", "train")
    copied = np.flatnonzero(given == "train")[:COPIES]
    copies = features[copied] + 0.02 * generator.standard_normal((COPIES, DIM))
    write(tmp_path / "a.h5", np.vstack([features, copies]), np.r_[labels, labels[copied]], [*given, *["test"] * COPIES])
    monkeypatch.setattr(planting, "threshold_of", lambda *_, **__: NearThreshold("a", 0.99, 9, {}, 0.97))
    monkeypatch.setattr("pipeline.neighbours.leaks.threshold_of", planting.threshold_of)
    monkeypatch.setattr("pipeline.neighbours.leaks.kept_threshold", lambda *_: 0.99)
    return tmp_path


def write(path: Path, features: np.ndarray, labels: np.ndarray, splits: list[str]) -> None:
    n = len(features)
    rows = Rows([f"{i:04d}" for i in range(n)], labels, splits, [""] * n, *np.ones((2, n), int))
    layer = LayerInfo("a", features.shape[1], "float32", {"precision": "fp32"}, "f")
    with CacheWriter.create(path, rows, ["x", "y"], [layer], {"source": "s"}, {}) as writer:
        writer.write(np.arange(n), {"a": features}, np.arange(2 * n).astype("<u8").view(np.uint8).reshape(n, 16))


def test_joined_layers_are_compared_on_the_deepest_in_whatever_order_they_are_named(tmp_path: Path) -> None:
    features, labels = np.random.default_rng(0).standard_normal((60, 4)), np.arange(60) % 2
    rows = Rows([f"{i:04d}" for i in range(60)], labels, [""] * 60, [""] * 60, *np.ones((2, 60), int))
    layers = [LayerInfo(name, 4, "float32", {"precision": "fp32"}, name) for name in ("low", "top")]
    with CacheWriter.create(tmp_path / "a.h5", rows, ["x", "y"], layers, {"source": "s"}, {}) as writer:
        digests = np.arange(120).astype("<u8").view(np.uint8).reshape(60, 16)
        writer.write(np.arange(60), {"low": features, "top": features}, digests)
    for name in ("low+top", "top+low"):
        (result,) = fit(tmp_path, [name], ["centroid"], jobs=1).results
        assert result.leak_price is not None
        assert result.leak_price.layer == "top"


def test_the_planted_inflation_is_recovered(leaky: Path) -> None:
    report = fit(leaky, ["a"], ["knn"])
    result, said = report.results[0], report.predictions[0]
    copies = np.array([int(uri) >= CLEAN for uri in said.uris.tolist()])
    price = result.leak_price
    assert price is not None
    assert (price.layer, price.threshold, price.near) == ("a", 0.99, COPIES)
    assert price.accuracy_far == pytest.approx(said.right[~copies].mean())
    assert result.accuracy - price.accuracy_far > 0.02, "copies of training images are easier"
    assert sum(one.images for one in price.bins) == len(copies)
    assert all(one.low <= one.high for one in price.bins)
    assert [one.low for one in price.bins] == sorted(one.low for one in price.bins)
    far = price.bins[0]
    assert far.accuracy_ci95[0] < far.accuracy < far.accuracy_ci95[1]


def test_near_duplicates_of_training_images_are_left_out(leaky: Path, thawline: Callable[..., Any]) -> None:
    found = thawline("fit", leaky, "--head", "knn", "--drop-leaks", "near", "--json").json
    result = found["results"][0]
    assert result["n_test"] == CLEAN / 3
    assert result["leak_price"]["near"] == 0
    assert any(
        f"{COPIES} of {CLEAN // 3 + COPIES} test images repeat or nearly repeat" in note for note in found["notes"]
    )
    assert any("this finds 97% of planted copies" in note for note in found["notes"])
    shown = thawline("fit", leaky, "--head", "knn").stdout
    told = f"{COPIES} of 140 compared test images are near-duplicates of training images (similarity 0.990 or more)"
    assert f"{told}; without" in shown


def test_the_bare_flag_still_stands_before_the_cache(leaky: Path, thawline: Callable[..., Any]) -> None:
    for arguments in (("--drop-leaks", leaky), (leaky, "--drop-leaks"), (leaky, "--drop-leaks", "--head", "ridge")):
        assert thawline("fit", *arguments, "--json").json["results"][0]["n_test"] == CLEAN / 3 + COPIES
    assert thawline("fit", leaky, "--drop-leaks", "nearly").returncode == 2
    with pytest.raises(FitError, match="true, false or 'near'"):
        fit(leaky, drop_leaks="nearly")


def chain(count: int) -> NearDuplicates:
    """Rows of which each is near the next, in groups of three."""
    first = np.arange(count - 1)
    return NearDuplicates(np.arange(count), np.arange(count) // 3, first, first + 1)


@pytest.mark.parametrize("seed", range(5))
def test_drawn_splits_keep_groups_together_and_drop_what_is_still_near(seed: int) -> None:
    n, near = 60, chain(60)
    columns = (np.arange(n) // 3 % 2, np.full(n, ""), np.full(n, ""), np.arange(2 * n).astype("<u8").view(np.uint8))
    columns = (*columns[:3], columns[3].reshape(n, 16))
    kept = make_splits(*columns, seed, near=near)
    sides = [set((part // 3).tolist()) for part in (kept.train, kept.val, kept.test)]
    assert not sides[0] & sides[1]
    assert not (sides[0] | sides[1]) & sides[2]
    dropped = make_splits(*columns, seed, near=near, drop_leaks=True)
    known = np.concatenate([dropped.train, dropped.val])
    assert np.abs(dropped.test[:, None] - known[None]).min() > 1, "no test row is near a training row"
    assert set(dropped.test.tolist()) == {row for row in kept.test.tolist() if np.abs(known - row).min() > 1}
