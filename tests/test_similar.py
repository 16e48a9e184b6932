from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from features_cache import CacheError, CacheFile, CacheWriter, LayerInfo, Rows, open_cache
from pipeline.errors import FitError
from pipeline.extract import extract
from pipeline.neighbours import index, nearest
from pipeline.neighbours.nearest import near_pairs, nearest_rows
from pipeline.neighbours.rows import DistinctImages, UnitRows
from pipeline.similar import similar

BACKBONE = "test_resnet@random:0"


def cache_of(path: Path, features: np.ndarray, digests: np.ndarray | None = None) -> CacheFile:
    """Write a cache file of these features, of images that do not exist."""
    n = len(features)
    rows = Rows([f"{i}.png" for i in range(n)], np.arange(n) % 2, [""] * n, [""] * n, *np.ones((2, n), int))
    numbers = np.arange(n) if digests is None else digests
    layer = LayerInfo("a", features.shape[1], "float32", {"precision": "fp32"}, "f")
    with CacheWriter.create(path, rows, ["x", "y"], [layer], {"source": "s"}, {}) as writer:
        writer.write(np.arange(n), {"a": features}, numbers.astype("<u8").repeat(2).view(np.uint8).reshape(n, 16))
    return open_cache(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, write_photos: Callable[..., Path]) -> Path:
    """A folder with photos and their cache, one of the photos twice."""
    root = tmp_path_factory.mktemp("similar")
    write_photos(root / "photos", each=6)
    shutil.copy(root / "photos/red/0.png", root / "photos/blue/twin.png")
    extract(root / "photos", [BACKBONE], ["layer4"], size=32, engine="torch", output=root / "cache")
    return root


@pytest.mark.parametrize("count", [1, 5, 500])
def test_nearest_rows_are_those_of_a_full_sort(tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.neighbours.rows.BLOCK", 37)
    monkeypatch.setattr(nearest, "BLOCK", 5)
    generator = np.random.default_rng(0)
    features = generator.standard_normal((300, 9)) + 0.5
    rows = UnitRows(cache_of(tmp_path / "a.h5", features), "a", np.arange(300))
    queries = rows.take(np.array([3, 200, 7, 9, 11, 250, 1]))
    found, similarities = nearest_rows(queries, rows, count)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    expected = unit[[3, 200, 7, 9, 11, 250, 1]] @ unit.T
    order = np.argsort(-expected, axis=1, kind="stable")[:, :count]
    np.testing.assert_array_equal(found, order)
    np.testing.assert_allclose(similarities, np.take_along_axis(expected, order, 1), atol=1e-6)


@pytest.mark.parametrize(("dim", "threshold", "few"), [(6, 0.9, 0), (300, 0.5, 1), (300, 0.965, 1 / 256)])
def test_near_pairs_are_all_pairs(
    tmp_path: Path, dim: int, threshold: float, few: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("BLOCK", 64), ("_TILE", 24), ("_SKETCH", 4), ("_SHORT", 2), ("_FEW", few)):
        monkeypatch.setattr(nearest, name, value)
    generator = np.random.default_rng(1)
    centres = generator.standard_normal((40, dim))
    features = centres[generator.integers(0, 40, 333)] + 0.2 * generator.standard_normal((333, dim))
    file = cache_of(tmp_path / "a.h5", features)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    similarity = unit @ unit.T
    clear = np.abs(similarity - threshold) > 2e-5  # of the others, rounding decides
    rows = UnitRows(file, "a", np.arange(333))
    pairs = near_pairs(rows, threshold)
    found = set(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))
    expected = np.triu(similarity >= threshold, 1)
    assert 50 < expected.sum() < 5000
    assert {pair for pair in found if clear[pair]} == {(a, b) for a, b in np.argwhere(expected & clear).tolist()}
    np.testing.assert_allclose(pairs.similarity, similarity[pairs.first, pairs.second], atol=1e-6)

    halves = UnitRows(file, "a", np.arange(100)), UnitRows(file, "a", np.arange(100, 333))
    across = near_pairs(halves[0], threshold, halves[1])
    found = set(zip(across.first.tolist(), (across.second + 100).tolist(), strict=True))
    assert {pair for pair in found if clear[pair]} == {
        (a, b) for a, b in np.argwhere(expected & clear).tolist() if a < 100 <= b
    }


def test_a_cache_in_which_all_looks_alike_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "MOST_PAIRS", 1000)
    file = cache_of(tmp_path / "a.h5", np.ones((60, 4)))
    with pytest.raises(FitError, match="nearly all look alike"):
        near_pairs(UnitRows(file, "a", np.arange(60)), 0.9)


def test_equal_images_count_once_and_bad_features_are_named(tmp_path: Path) -> None:
    features = np.random.default_rng(0).standard_normal((8, 4))
    features[6] = 0
    file = cache_of(tmp_path / "a.h5", features, np.array([5, 1, 5, 3, 1, 0, 9, 5]))
    images = DistinctImages(file, "a")
    assert images.rows.tolist() == [0, 1, 3, 5, 6]
    assert images.copies.tolist() == [0, 1, 0, 2, 1, 3, 4, 0]
    assert images.take(np.array([4])).tolist() == [[0, 0, 0, 0]], "a row of zeros has no direction"
    features[3, 1] = np.nan
    with pytest.raises(FitError, match=r"NaN or infinite features in 1 of 5 rows, first 3.png"):
        DistinctImages(cache_of(tmp_path / "b.h5", features, np.array([5, 1, 5, 3, 1, 0, 9, 5])), "a").take(slice(None))


def test_a_query_image_finds_itself_and_an_image_of_the_cache_its_neighbours(photos: Path) -> None:
    by_path = similar(photos / "cache", [photos / "photos/red/0.png"], count=18, engine="torch").found[0]
    assert by_path.neighbours[0].similarity == pytest.approx(1, abs=1e-5)
    assert by_path.neighbours[0].uri == "blue/twin.png", "of equal images, the first"
    assert len(by_path.neighbours) == 18, "the copy counts once"
    by_name = similar(photos / "cache", ["red/0.png"], count=17).found[0]
    assert [one.uri for one in by_name.neighbours] == [one.uri for one in by_path.neighbours[1:]]
    assert by_name.neighbours[0].label == by_name.neighbours[0].uri.split("/")[0]


def test_whole_folders_and_broken_images(photos: Path, tmp_path: Path, thawline: Callable[..., Any]) -> None:
    (tmp_path / "queries").mkdir()
    for name in ("green/1.png", "green/2.png"):
        shutil.copy(photos / "photos" / name, tmp_path / "queries" / Path(name).name)
    (tmp_path / "queries/3.png").write_bytes(b"no image")
    other = photos / "photos/blue/5.png"
    asked = ("similar", photos / "cache", tmp_path / "queries", other, "-n", 2, "--engine", "torch")
    found = thawline(*asked, "--json", "--csv", tmp_path / "found.csv").json
    asked_for = {Path(one["uri"]).name: one for one in found["similar"]}
    nearest_of = {name: one["neighbours"][0]["uri"] for name, one in asked_for.items() if one["neighbours"]}
    assert nearest_of == {"1.png": "green/1.png", "2.png": "green/2.png", "5.png": "blue/5.png"}
    broken, last = asked_for["3.png"], asked_for["5.png"]
    assert last["uri"] == str(other)
    assert broken["neighbours"] == []
    assert broken["reason"] == "not an image of a known format"
    assert (found["recall"], found["images"], found["layer"]) == (1, 18, "layer4")
    with (tmp_path / "found.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 6
    assert float(rows[0]["similarity"]) == pytest.approx(1, abs=1e-5)
    assert "not an image of a known format" in thawline(*asked).stdout


def test_a_large_cache_is_searched_through_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss")
    monkeypatch.setattr("pipeline.similar.EXACT_ROWS", 100)
    generator = np.random.default_rng(2)
    features = generator.standard_normal((1500, 8))
    file = cache_of(tmp_path / "a.h5", features)
    report = similar(tmp_path, ["7.png", "1200.png"], count=10)
    assert 0.95 <= report.recall <= 1
    assert report.notes
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    for row, one in zip((7, 1200), report.found, strict=True):
        order = np.argsort(-unit @ unit[row])[1:11]
        assert len({each.uri for each in one.neighbours} & {f"{number}.png" for number in order}) >= 8
    monkeypatch.setattr(index, "_build", lambda *_: pytest.fail("the index was kept"))
    assert similar(tmp_path, ["7.png"]).recall == report.recall
    file.path.unlink()
    cache_of(tmp_path / "a.h5", features[:1400])
    with pytest.raises(pytest.fail.Exception):
        similar(tmp_path, ["7.png"])


def test_without_faiss_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.similar.EXACT_ROWS", 5)
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    cache_of(tmp_path / "a.h5", np.eye(8))
    with pytest.raises(CacheError, match=r"pip install 'thawline\[search\]'"):
        similar(tmp_path, ["1.png"])


def test_a_cache_without_its_network_is_one_line(tmp_path: Path, photos: Path, thawline: Callable[..., Any]) -> None:
    cache_of(tmp_path / "a.h5", np.eye(8))
    thawline("similar", tmp_path, photos / "photos/red/0.png").assert_one_line("a.h5")
    thawline("similar", photos / "cache", "nosuch.png").assert_one_line("nosuch.png", "found nothing there")
