from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom
from sklearn.linear_model import Ridge
from threadpoolctl import threadpool_limits

from features_cache import CacheError, CacheWriter, LayerInfo, Rows
from pipeline.diagnostics.domain_test import domain_test
from pipeline.drift import drift
from pipeline.errors import FitError
from pipeline.extract import extract


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with threadpool_limits(1):
        yield


def sets(m: int, d: int, apart: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    first, second = rng.standard_normal((2, m, d)).astype(np.float32)
    return first, second + np.float32(apart)


@pytest.mark.parametrize(("m", "d"), [(20, 40), (41, 3)])
def test_the_test_keeps_its_level(m: int, d: int) -> None:
    """Under one distribution a p-value of at most 0.05 comes up in 5 % of cases, in the limits of chance."""
    cases = 300
    rejected = sum(
        domain_test(*sets(m, d, 0.0, case), seed=case, permutations=59).p_value <= 0.05 for case in range(cases)
    )
    assert binom.ppf(0.001, cases, 0.05) <= rejected <= binom.ppf(0.999, cases, 0.05)


def test_power_grows_with_the_distance() -> None:
    found = [domain_test(*sets(60, 10, apart)) for apart in (0.0, 0.3, 1.0, 5.0)]
    assert [test.accuracy for test in found] == sorted(test.accuracy for test in found)
    assert found[-1].accuracy == 1
    assert found[-1].p_value == pytest.approx(0.001)
    assert found[0].p_value > 0.05


def test_scores_are_those_of_ridge_regression_on_rows_it_has_not_seen() -> None:
    first, second = sets(30, 6, 0.5)
    rows = np.vstack([first, second]).astype(float)
    rows = (rows - rows.mean(axis=0)) / rows.std(axis=0)
    labels = np.repeat([-1.0, 1.0], 30)
    rng = np.random.default_rng(4)
    folds = np.concatenate([rng.permutation(np.arange(30) % 5) for _ in range(2)])
    expected = np.empty(60)
    for fold in range(5):
        model = Ridge(alpha=6.0, fit_intercept=False).fit(rows[folds != fold], labels[folds != fold])
        expected[folds == fold] = model.predict(rows[folds == fold])
    found = domain_test(first, second, seed=4, permutations=9)
    np.testing.assert_allclose(found.scores.ravel(), expected, atol=1e-6)
    assert found.accuracy == np.mean((expected > 0) == (labels > 0))


def test_constant_features_tell_nothing() -> None:
    same = np.ones((10, 3), np.float32)
    assert domain_test(same, same.copy(), permutations=19).p_value == 1


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a cache of features; `images` numbers the images, so that equal numbers are equal bytes."""

    def make(
        name: str, features: np.ndarray, images: np.ndarray, fingerprint: str = "f", precision: str = "fp32"
    ) -> Path:
        n = len(features)
        zeros = np.zeros(n, np.int64)
        rows = Rows([f"{number}.png" for number in range(n)], zeros - 1, [""] * n, [""] * n, zeros, zeros)
        layer = LayerInfo("top", features.shape[1], "float32", {"layer": "top", "precision": precision}, fingerprint)
        handles = {"source": name, "backbone": "net", "pool": "avg"}
        digests = np.frombuffer(b"".join(hashlib.blake2b(b"%d" % i, digest_size=16).digest() for i in images), np.uint8)
        path = tmp_path / f"{name}.h5"
        with CacheWriter.create(
            path, rows, (), [layer], handles, {"aliases": {"logits": ["top"], "stages": ["low", "top"]}}
        ) as writer:
            writer.begin_run({})
            writer.write(np.arange(n), {"top": features}, digests.reshape(n, 16))
        return path

    return make


def test_images_of_both_sets_are_left_out_and_copies_count_once(write: Callable[..., Path]) -> None:
    first, second = sets(40, 5, 0.0)
    shared = first[:15]
    one = write("one", np.vstack([first, first[:3]]), np.array([*range(40), 0, 1, 2]))
    two = write("two", np.vstack([second, shared]), np.array([*range(100, 140), *range(15)]))
    result = drift(one, two, "top")
    assert (result.images, result.shared, result.compared) == ([40, 55], 15, 25)
    assert drift(one, two, "logits") == result, "by its alias, too"
    alone = drift(write("three", first[15:], np.arange(15, 40)), write("four", second, np.arange(100, 140)), "top")
    assert alone.compared == 25
    named = {image.uri for image in result.foreign_in_first}
    assert not named & {f"{number}.png" for number in [*range(15), 40, 41, 42]}


def test_what_a_cache_in_parts_lacks_is_said(write_photos: Callable[..., Path], tmp_path: Path) -> None:
    how: dict[str, Any] = {"engine": "torch", "precision": "fp32", "size": 32}
    first, second = (write_photos(tmp_path / f"{seed}", ("blue",), each=16, seed=seed) for seed in (1, 2))
    extract(first, ["test_resnet@random:0"], output=tmp_path / "parts", part_rows=8, part="1/2", **how)
    extract(second, ["test_resnet@random:0"], output=tmp_path / "whole", **how)
    (note,) = drift(tmp_path / "parts", tmp_path / "whole").notes
    assert "lacks 1 of 2 parts" in note


def test_the_most_foreign_images_are_named_first(write: Callable[..., Path]) -> None:
    first, second = sets(50, 4, 0.5)
    second[[7, 31]] += 4
    result = drift(write("one", first, np.arange(50)), write("two", second, np.arange(50, 100)), "top")
    assert {image.uri for image in result.foreign_in_second[:2]} == {"7.png", "31.png"}
    scores = [image.score for image in result.foreign_in_second]
    assert scores == sorted(scores, reverse=True)


def test_what_cannot_be_compared_is_refused(write: Callable[..., Path]) -> None:
    first, second = sets(20, 4, 0.0)
    one = write("one", first, np.arange(20))
    with pytest.raises(FitError, match="extracted in the same way, but these differ in precision fp32 and bf16"):
        drift(one, write("other", second, np.arange(20, 40), "g", "bf16"), "top")
    with pytest.raises(CacheError, match=r"both caches are .*one.h5"):
        drift(one, one, "top")
    with pytest.raises(FitError, match="several: low, top"):
        drift(one, write("more", second, np.arange(20, 40)), "stages")
    with pytest.raises(CacheError, match=r"no layer tip.*did you mean top"):
        drift(one, write("two", second, np.arange(20, 40)), "tip")
    with pytest.raises(FitError, match=r"at least 5 images .* got 0 in one.h5 and 0 in same.h5"):
        drift(one, write("same", first, np.arange(20)), "top")
    second[3, 2] = np.nan
    with pytest.raises(FitError, match=r"layer top of \S+ has NaN or infinite features in 1 of 20 rows, first 3.png"):
        drift(one, write("bad", second, np.arange(20, 40)), "top")
