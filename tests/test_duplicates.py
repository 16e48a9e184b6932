from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from features_cache import CacheFile, CacheWriter, LayerInfo, Rows, open_cache
from pipeline.duplicates import duplicates
from pipeline.errors import FitError, SourceError
from pipeline.extract import extract
from pipeline.neighbours import planting
from pipeline.neighbours.groups import group_images
from pipeline.neighbours.nearest import Pairs

BACKBONE = "test_resnet@random:0"
COPIES = {
    "a/small.png": ("a/0.png", lambda image: image.resize((60, 44))),
    "b/mirrored.png": ("a/1.png", ImageOps.mirror),
    "b/again.jpg": ("b/2.png", lambda image: image),
}


def write_pattern(path: Path, seed: int) -> None:
    """Write a smooth random picture."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3)).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize((120, 90), Image.Resampling.BICUBIC).save(path)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of patterns, copies of some, and their cache; another folder whose images are partly the same."""
    root = tmp_path_factory.mktemp("duplicates")
    for number in range(24):
        write_pattern(root / "photos" / "ab"[number % 2] / f"{number // 2}.png", number)
    for name, (original, edit) in COPIES.items():
        edit(Image.open(root / "photos" / original)).save(root / "photos" / name)
    shutil.copy(root / "photos/a/5.png", root / "photos/b/equal.png")
    for number in range(3):
        write_pattern(root / "others" / f"{number}.png", 200 + number)
    shutil.copy(root / "photos/a/7.png", root / "others/same.png")
    Image.open(root / "photos/b/8.png").resize((90, 70)).save(root / "others/small.png")
    for name in ("photos", "others"):
        extract(root / name, [BACKBONE], ["layer4"], size=32, engine="torch", output=root / f"{name}-cache")
    return root


def links(count: int, *pairs: tuple[int, int]) -> list[int]:
    first, second = np.array(pairs).reshape(-1, 2).T
    return group_images(Pairs(first, second, np.ones(len(pairs), np.float32)), count).tolist()


def test_every_image_of_a_group_is_near_its_centre() -> None:
    assert links(4) == [0, 1, 2, 3]
    assert links(5, (0, 3), (3, 4), (0, 4)) == [0, 1, 2, 0, 0]
    assert links(4, (0, 1), (1, 2)) == [1, 1, 1, 3], "the middle is near both"
    assert links(6, (0, 1), (1, 2), (2, 3), (3, 4), (4, 5)) == [1, 1, 1, 3, 3, 5], "a chain is cut"


def test_planted_copies_are_found_and_nothing_else(root: Path, thawline: Callable[..., Any], tmp_path: Path) -> None:
    asked = ("duplicates", root / "photos-cache", "--engine", "torch")
    found = thawline(*asked, "--json", "--csv", tmp_path / "groups.csv").json
    groups = {frozenset(image["uri"] for image in group) for group in found["groups"]}
    assert groups == {
        *(frozenset((copy, original)) for copy, (original, _) in COPIES.items()),
        frozenset(("a/5.png", "b/equal.png")),
    }
    near = found["near"]
    assert near["copies"] == 27
    assert near["apart"] == "classes"
    assert near["recall"].keys() == planting.EDITS.keys()
    assert near["recall_all"] == pytest.approx(np.mean(list(near["recall"].values())))
    assert found["images"] == [27]
    with (tmp_path / "groups.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["group"] for row in rows] == ["1", "1", "2", "2", "3", "3", "4", "4"]
    shown = thawline(*asked).stdout
    assert "8 images in 4 groups" in shown
    assert "false alarms: " in shown


def test_the_threshold_is_kept_until_rows_change(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = duplicates(root / "photos-cache", engine="torch").near
    monkeypatch.setattr(planting, "_planted", lambda *_: pytest.fail("it was kept"))
    assert duplicates(root / "photos-cache").near == before
    (kept,) = (root / "photos-cache").glob("*.near.json")
    text = kept.read_text()
    kept.write_text(text.replace('"key": "', '"key": "x'))
    with pytest.raises(pytest.fail.Exception):
        duplicates(root / "photos-cache")
    kept.write_text(text)


def test_what_of_a_second_cache_is_in_the_first(root: Path, thawline: Callable[..., Any]) -> None:
    asked = ("duplicates", root / "photos-cache", root / "others-cache", "--engine", "torch")
    found = thawline(*asked, "--json").json
    assert [(one["uri"], one["original"]["uri"]) for one in found["copies"]] == [
        ("same.png", "a/7.png"),
        ("small.png", "b/8.png"),
    ]
    assert found["copies"][0]["original"]["label"] == "a"
    assert "2 images of the second cache are in the first" in thawline(*asked).stdout


def test_recall_and_false_alarms_are_those_of_brute_force(root: Path) -> None:
    (file,) = (open_cache(path) for path in (root / "photos-cache").glob("*.h5"))
    report = duplicates(root / "photos-cache", engine="torch")
    features = np.asarray(file.features("layer4", slice(None)), np.float64)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    different = file.labels[:, None] != file.labels[None]
    once = np.array([uri != "b/equal.png" for uri in file.uris])  # of equal bytes, the first counts
    nearest = np.where(different & once, features @ features.T, -1).max(axis=1)[once]
    assert report.near.compared == once.sum()
    least = report.near.threshold - 1e-5  # what `duplicates` takes for near, in single precision
    assert report.near.false_alarms == pytest.approx(np.mean(nearest >= least))


def fake(path: Path, features: np.ndarray, labels: list[int] | None = None, fingerprint: str = "f") -> CacheFile:
    n = len(features)
    rows = Rows([f"{i}" for i in range(n)], np.array(labels or [-1] * n), [""] * n, [""] * n, *np.ones((2, n), int))
    layer = LayerInfo("a", features.shape[1], "float32", {"precision": "fp32"}, fingerprint)
    with CacheWriter.create(path, rows, ["x", "y"], [layer], {"location": "/nowhere"}, {}) as writer:
        writer.write(
            np.arange(n), {"a": features}, np.arange(16 * n).astype("<u2").view(np.uint8)[: 16 * n].reshape(n, 16)
        )
    return open_cache(path)


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    fake(tmp_path / "one.h5", np.ones((1, 3)))
    with pytest.raises(FitError, match="a single image"):
        duplicates(tmp_path / "one.h5")
    fake(tmp_path / "gone.h5", np.random.default_rng(0).standard_normal((9, 3)))
    with pytest.raises(SourceError, match="not where they were"):
        duplicates(tmp_path / "gone.h5")
    equal = duplicates(fake(tmp_path / "equal.h5", np.ones((9, 3))).path, threshold=0.9)
    assert [len(group) for group in equal.groups] == [9]
    with pytest.raises(FitError, match="can be compared only if"):
        duplicates(tmp_path / "gone.h5", fake(tmp_path / "other.h5", np.ones((3, 4)), fingerprint="g").path)


@pytest.mark.parametrize("count", [30, 200, 300])
def test_at_most_one_percent_or_one_pair_are_false_alarms(
    count: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = fake(tmp_path / "a.h5", np.random.default_rng(0).standard_normal((count, 4)), [0, 1] * (count // 2))
    monkeypatch.setattr(planting, "_planted", lambda *_: {"copy": np.full(9, 0.5, np.float32)})
    near = duplicates(file.path).near
    assert near.threshold > 0.5, "false alarms set it"
    assert near.false_alarms is not None
    assert 0 < round(near.false_alarms * count) <= max(count // 100, 2)


def test_images_that_all_have_the_same_features_cannot_be_told_apart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = fake(tmp_path / "equal.h5", np.ones((8, 3)), [0, 1] * 4)
    monkeypatch.setattr(planting, "_planted", lambda *_: {"copy": np.ones(8, np.float32)})
    with pytest.raises(FitError, match="different classes have the same features"):
        duplicates(file.path)
