"""What becomes of cached features, and of a run, when the source changes between or during the runs."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from features_cache import DONE, PENDING, AmbiguousCacheError, CacheError, CacheWriter, Catalog, open_cache, verify
from pipeline.compare import compare
from pipeline.evaluation.rows import select
from pipeline.extract import extract
from pipeline.fit import fit
from pipeline.rank import rank

NETWORK = "test_resnet@random:0"
HOW: dict[str, Any] = {"backbones": [NETWORK], "size": 32, "precision": "fp32", "engine": "torch"}
Photos = Callable[..., Path]


@pytest.fixture
def manifest(make_photos: Photos) -> Path:
    """A manifest of 24 photos of three classes."""
    photos = make_photos()
    write_manifest(photos / "all.csv", {path: path.parent.name for path in sorted(photos.glob("*/*.png"))})
    return photos / "all.csv"


def write_manifest(path: Path, labels: dict[Path, str], split: str = "") -> None:
    with path.open("w", newline="") as stream:
        rows = [(image.relative_to(path.parent).as_posix(), label, split) for image, label in labels.items()]
        csv.writer(stream).writerows([("path", "label", "split"), *rows])


def read_labels(path: Path) -> dict[Path, str]:
    with path.open() as stream:
        return {path.parent / row["path"]: row["label"] for row in csv.DictReader(stream)}


def shown(cache: Path, layer: str) -> dict[str, str]:
    """The labels of the rows that `fit` would use, by uri."""
    (found,) = select(Catalog(cache), [layer])
    table = found.table
    return dict(zip(table.uris.tolist(), [table.classes[label] for label in table.labels], strict=True))


def listed(manifest: Path) -> dict[str, str]:
    return {path.relative_to(manifest.parent).as_posix(): label for path, label in read_labels(manifest).items()}


def test_labels_corrected_between_layers_hold_for_all_of_them(manifest: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    extract(manifest, layers=["layer1"], output=cache, **HOW)
    extract(manifest, layers=["layer2"], pool="max", output=cache, **HOW)
    labels = read_labels(manifest)
    corrected = dict(zip(labels, ["a new class", *list(labels.values())[:-1]], strict=True))
    write_manifest(manifest, corrected, split="train")
    (result,) = extract(manifest, layers=["layer3"], output=cache, **HOW)
    (note,) = [note for note in result.notes if "brought up to date" in note]
    assert note.count(".h5") == 2
    assert "to be computed" not in note
    for layer in ("layer1", "layer2", "layer3"):
        assert shown(cache, layer) == listed(manifest)
    for file in Catalog(cache).files:
        assert set(file.splits) == {"train"}
        assert (file.states == DONE).all()
        assert verify(file.path).sound
    assert shown(cache, "layer1+layer3") == listed(manifest)
    (again,) = extract(manifest, layers=["layer1"], output=cache, **HOW)
    assert (again.computed, again.notes) == (0, [])


def test_images_that_move_come_and_go_do_so_in_all_layers(make_photos: Photos, tmp_path: Path) -> None:
    photos, cache = make_photos(), tmp_path / "cache"
    extract(photos, layers=["layer1"], output=cache, **HOW)
    before = open_cache(next(cache.glob("*.h5")))
    old = dict(zip(before.uris.tolist(), np.array(before.matrix("layer1")), strict=True))
    (photos / "red" / "0.png").rename(photos / "blue" / "from red.png")
    (photos / "red" / "1.png").unlink()
    Image.new("RGB", (40, 40), "red").save(photos / "red" / "new.png")
    Image.new("RGB", (40, 40), "blue").save(photos / "blue" / "2.png")  # in the place of another image
    (result,) = extract(photos, layers=["layer2"], output=cache, **HOW)
    assert any("brought up to date" in note and "(2 images to be computed)" in note for note in result.notes)
    (file,) = [file for file in Catalog(cache).files if "layer1" in file.layers]
    assert file.uris[file.states == PENDING].tolist() == ["blue/2.png", "red/new.png"]
    for row in np.flatnonzero(file.states == DONE):
        uri = str(file.uris[row]).replace("blue/from red", "red/0")
        np.testing.assert_array_equal(file.matrix("layer1")[row], old[uri])
    labels = shown(cache, "layer1+layer2")
    assert len(labels) == 22
    assert labels["blue/from red.png"] == "blue"
    (again,) = extract(photos, layers=["layer1"], output=cache, **HOW)
    assert (again.computed, again.done, again.notes) == (2, 24, [])


def test_bytes_that_change_unseen_are_pending_in_the_other_layers(make_photos: Photos, tmp_path: Path) -> None:
    photos, cache = make_photos(), tmp_path / "cache"
    extract(photos, layers=["layer1"], output=cache, **HOW)
    image = photos / "red" / "3.png"
    status, data = image.stat(), bytearray(image.read_bytes())
    data[60] ^= 1
    image.write_bytes(data)
    import os

    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    extract(photos, layers=["layer2"], output=cache, rehash=True, **HOW)
    (file,) = [file for file in Catalog(cache).files if "layer1" in file.layers]
    assert file.uris[file.states == PENDING].tolist() == ["red/3.png"]


@pytest.fixture
def disagreeing(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache as older releases left it: the second layer has corrected labels, the first has not."""
    cache = tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.extract.bring_up_to_date", lambda *_: [])
        extract(manifest, layers=["layer1"], output=cache, **HOW)
        labels = read_labels(manifest)
        write_manifest(manifest, labels | {next(iter(labels)): "red"})
        extract(manifest, layers=["layer2"], output=cache, **HOW)
    return cache


def test_files_of_different_times_are_refused_until_one_layer_is_extracted_again(
    disagreeing: Path, manifest: Path, thawline: Callable[..., Any], tmp_path: Path
) -> None:
    others = tmp_path / "others"
    extract(manifest, layers=["layer1", "layer2"], output=others, **HOW)
    parts = "differ in 1 label; extract", str(manifest), "name one file instead of the folder"
    for command in (
        ["fit"],
        ["fit", "-l", "layer1"],
        ["fit", "-l", "layer2"],
        ["fit", "-l", "layer1+layer2"],
        ["rank"],
    ):
        thawline(command[0], disagreeing, *command[1:]).assert_one_line(*parts)
    thawline("drift", disagreeing, others, "-l", "layer1").assert_one_line(*parts)
    thawline("cache", "export", disagreeing, tmp_path / "x.npy", "-l", "layer1").assert_one_line(*parts)
    assert "differ in 1 label" in thawline("cache", "ls", disagreeing).stderr
    assert len(fit(next(disagreeing.glob("*.h5")), heads=["centroid"], jobs=1).results) == 1
    (result,) = extract(manifest, layers=["layer2"], output=disagreeing, **HOW)  # complete, but the other is behind
    assert result.computed == 0
    assert shown(disagreeing, "layer1") == shown(disagreeing, "layer2") == listed(manifest)
    assert len(rank(disagreeing).ranking) == 2
    assert thawline("cache", "ls", disagreeing).stderr == ""


def test_a_file_that_is_being_written_stays_and_is_named(disagreeing: Path, manifest: Path) -> None:
    (busy,) = [file.path for file in Catalog(disagreeing).files if "layer1" in file.layers]
    with CacheWriter.resume(busy):
        (result,) = extract(manifest, layers=["layer2"], output=disagreeing, **HOW)
        (note,) = result.notes
        assert note.startswith(f"{busy.name} could not be brought up to date: ")
        assert "is writing it" in note
    with pytest.raises(CacheError, match="differ in 1 label"):
        fit(disagreeing, ["layer2"])


def test_a_copy_in_the_cache_is_refused_by_all_that_read_it(
    manifest: Path, tmp_path: Path, thawline: Callable[..., Any]
) -> None:
    cache = tmp_path / "cache"
    extract(manifest, layers=["layer1"], output=cache, **HOW)
    (path,) = cache.glob("*.h5")
    shutil.copy(path, cache / "copy.h5")
    parts = path.name, "copy.h5", "both hold layer1", "delete one of them, or move it to another folder"
    thawline("fit", cache).assert_one_line(*parts)
    thawline("rank", cache).assert_one_line(*parts)
    assert all(part in thawline("cache", "ls", cache).stderr for part in parts)
    with pytest.raises(AmbiguousCacheError, match="both hold layer1"):
        extract(manifest, layers=["layer1"], output=cache, **HOW)
    (cache / "copy.h5").unlink()
    assert shown(cache, "layer1") == listed(manifest)


PLAN = """
source = "photos/all.csv"
[[extract]]
backbone = "test_resnet@random:0"
layer = ["layer1", "layer2"]
size = 32
precision = "fp32"
engine = "torch"
output = "cache"
[[extract]]
backbone = "test_resnet@random:0"
layer = "layer1"
pool = "max"
size = 32
precision = "fp32"
engine = "torch"
output = "cache"
[[fit]]
layer = {layers}
head = "centroid"
"""


def test_compare_sees_the_labels_of_today(manifest: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(PLAN.format(layers='"layer1"'))
    extract(manifest, layers=["layer2"], output=tmp_path / "cache", **HOW)
    compare(plan, tmp_path / "run")
    labels = read_labels(manifest)
    write_manifest(manifest, {image: label for image, label in labels.items() if label != "red"})
    report = compare(plan, tmp_path / "run")
    assert [(job.n_classes, job.result.n_pool + job.result.n_test) for job in report.results] == [(2, 16)] * 2
    assert not report.failures
