from __future__ import annotations

import csv
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from features_cache import PENDING, CacheFile, CacheWriter, LayerInfo, Rows, open_cache
from pipeline.extraction.inspection import detail

NETWORK = ("-b", "test_resnet@random:0", "--size", "32", "--engine", "torch")
Thawline = Callable[..., Any]


@pytest.fixture
def photos(make_photos: Callable[..., Path]) -> Path:
    """Train and test photos; one file is no image, one image stands on both sides of the split."""
    root = make_photos(name="photos/train")
    make_photos(each=2, name="photos/test")
    (root / "red" / "broken.png").write_bytes(b"no image")
    Image.new("RGB", (40, 40), (9, 99, 199)).save(root / "blue" / "twin.png")
    shutil.copy(root / "blue" / "twin.png", root.parent / "test" / "blue" / "twin[red].png")
    return root.parent


@pytest.fixture
def cache(thawline: Thawline, photos: Path, tmp_path: Path) -> Path:
    """Two files of one backbone, one layer each, made one after the other."""
    for layer in ("layer1", "input"):
        assert thawline("extract", photos, *NETWORK, "-l", layer, "-o", tmp_path / "cache").returncode == 0
    return tmp_path / "cache"


def flip(path: Path, array: str, row: int) -> None:
    """Change one bit in a row of an array."""
    place = open_cache(path).header.arrays[array]
    with path.open("r+b") as file:
        file.seek(place.offset + row * place.row_bytes)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))


def test_ls_lists_every_file(thawline: Thawline, cache: Path, photos: Path) -> None:
    (cache / "noise.h5").write_bytes(b"noise" * 99)
    listing = thawline("cache", "ls", cache, "--json").json
    assert sorted(tuple(file["layers"].items()) for file in listing["files"]) == [(("input", 3072),), (("layer1", 32),)]
    for file in listing["files"]:
        assert (file["rows"], file["done"], file["unreadable"], file["pending"]) == (33, 32, 1, 0)
        assert (file["source"], file["location"], file["backbone"]) == ("photos", str(photos), "test_resnet@random:0")
        assert file["bytes"] == Path(file["path"]).stat().st_size
    assert len(listing["problems"]) == 1
    assert listing["superseded"] == []
    shown = thawline("cache", "ls", cache)
    assert "32/33" in shown.stdout
    assert "noise.h5" in shown.stderr


def test_show_tells_all_about_one_file(thawline: Thawline, cache: Path) -> None:
    details = thawline("cache", "show", cache, "-l", "layer1", "--json").json
    assert details["unreadable"] == [{"uri": "train/red/broken.png", "reason": "not an image of a known format"}]
    twins = {"uris": ["test/blue/twin[red].png", "train/blue/twin.png"], "splits": ["test", "train"]}
    assert details["duplicates"][-1] == twins | {"labels": ["blue", "blue"], "across": True}
    assert details["classes"]["red"] == {"test": 2, "train": 9}
    assert details["specs"]["layer1"]["preprocessing"]["size"] == [32, 32]
    assert [run["rows"] for run in details["runs"]] == [32]
    text = thawline("cache", "show", cache, "-l", "layer1").stdout
    assert text.count("weights_digest") == 1, "what all layers share is said once"
    assert "mean 0.5 0.5 0.5" in text
    assert "twin[red].png (test) = train/blue/twin.png" in text, "names are no markup"
    thawline("cache", "show", cache).assert_one_line("layers layer1", "layers input", "name the source")


def test_show_reads_the_reasons_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows(["a", "b", "c"], np.array([-1, -1, -1]), [""] * 3, [""] * 3, *np.ones((2, 3), int))
    with CacheWriter.create(tmp_path / "a.h5", rows, [], [LayerInfo("x", 1, "float32", {}, "f")], {}, {}) as writer:
        for row, reason in ((0, "torn"), (2, "no image")):
            writer.fail(row, reason, bytes(range(16)))
    read: list[str] = []
    text = CacheFile._text
    monkeypatch.setattr(CacheFile, "_text", lambda file, name: read.append(name) or text(file, name))
    found = detail(open_cache(tmp_path / "a.h5")).unreadable
    assert found == [{"uri": "a", "reason": "torn"}, {"uri": "c", "reason": "no image"}]
    assert read.count("/rows/reason") == 1, "of a million rows they take a second"


def test_verify_names_damaged_rows_and_repair_makes_the_next_run_compute_them(
    thawline: Thawline, cache: Path, photos: Path
) -> None:
    assert thawline("cache", "verify", cache, "--source", photos).returncode == 0
    path = next(path for path in cache.glob("*.h5") if "layer1" in open_cache(path).layers)
    right = np.array(open_cache(path).matrix("layer1"))
    flip(path, "/features/layer1", 11)
    uri = str(open_cache(path).uris[11])

    found = thawline("cache", "verify", cache)
    assert found.returncode == 1
    assert f"row 11, {uri}" in found.stdout
    assert "--repair" in found.stdout
    as_json = thawline("cache", "verify", cache, "--json")
    assert as_json.returncode == 1
    assert f'"uri": "{uri}"' in as_json.stdout

    assert thawline("cache", "verify", cache, "--repair").returncode == 0
    assert np.flatnonzero(open_cache(path).states == PENDING).tolist() == [11]
    again = thawline("extract", photos, *NETWORK, "-l", "layer1", "-o", cache, "--json").json["caches"][0]
    assert (again["computed"], again["reused"]) == (1, 31)
    np.testing.assert_allclose(open_cache(path).matrix("layer1"), right, rtol=1e-2, atol=1e-3)
    assert thawline("cache", "verify", cache).returncode == 0


def test_verify_against_the_source_names_changed_and_missing_images(
    thawline: Thawline, cache: Path, photos: Path, make_photos: Callable[..., Path]
) -> None:
    Image.new("RGB", (40, 40)).save(photos / "train" / "red" / "0.png")
    (photos / "train" / "red" / "1.png").unlink()
    found = thawline("cache", "verify", cache, "--source", photos)
    assert found.returncode == 1
    assert "train/red/0.png: its image in the source has changed" in found.stdout
    assert "train/red/1.png: its image cannot be read: it is no longer in the source" in found.stdout
    thawline("cache", "verify", cache, "--source", make_photos(name="other")).assert_one_line(
        "no file of", "its sources are"
    )


def test_export_writes_the_finished_rows(thawline: Thawline, cache: Path, tmp_path: Path) -> None:
    written = thawline("cache", "export", cache, tmp_path / "out.npy", "-l", "layer1", "--json").json["files"]
    features = np.load(written[0])
    with Path(written[1]).open() as file:
        rows = list(csv.DictReader(file))
    assert features.shape == (32, 32)
    assert len(rows) == 32
    assert "train/red/broken.png" not in [row["uri"] for row in rows]
    thawline("cache", "export", cache, tmp_path / "out.txt", "-l", "input").assert_one_line(".parquet", ".txt")
    thawline("cache", "export", cache, tmp_path / "out.npy").assert_one_line("name the source, backbone, layer")


def test_prune_asks_before_it_deletes_what_was_superseded(
    thawline: Thawline, cache: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for image in (photos / "train" / "green").iterdir():
        image.unlink()  # the new file lacks these rows, so the old one is kept
    assert thawline("extract", photos, *NETWORK, "-l", "input", "-o", cache).returncode == 0
    old = sorted(map(str, cache.glob("*.superseded-*.h5")))  # of both files, because the other layer follows
    assert len(old) == 2
    assert "2 superseded files" in thawline("cache", "ls", cache).stdout
    monkeypatch.setattr("sys.stdin", io.StringIO())  # nobody answers
    assert thawline("cache", "prune", cache).returncode == 2
    assert sorted(map(str, cache.glob("*.superseded-*.h5"))) == old
    assert thawline("cache", "prune", cache, "--yes", "--json").json["deleted"] == old
    assert not list(cache.glob("*.superseded-*.h5"))
    assert "0 files deleted" in thawline("cache", "prune", cache).stdout


def test_fit_sees_the_files_of_a_backbone_as_one_cache(thawline: Thawline, cache: Path, photos: Path) -> None:
    fitted = ("--head", "centroid", "--jobs", 1, "--json")
    assert {r["layer"] for r in thawline("fit", cache, *fitted).json["results"]} == {"layer1", "input"}
    joined = thawline("fit", cache, "-l", "layer1+input", *fitted).json["results"]
    assert [(r["layer"], r["n_test"]) for r in joined] == [("layer1+input", 7)]
    assert thawline("extract", photos, *NETWORK, "-l", "stages", "-o", cache).returncode == 0
    stages = thawline("fit", cache, "-l", "stages", *fitted).json["results"]
    assert [r["layer"] for r in stages] == ["layer1", "layer2", "layer3"]
    thawline("fit", cache, "-l", "layer9").assert_one_line("layer9", "layer1", "input")


def test_two_sources_of_one_name_are_told_apart_by_location(
    thawline: Thawline, cache: Path, photos: Path, make_photos: Callable[..., Path]
) -> None:
    other = make_photos(each=3, name="elsewhere/photos")
    assert thawline("extract", other, *NETWORK, "-l", "input", "-o", cache).returncode == 0
    thawline("cache", "show", cache, "-l", "input").assert_one_line(str(photos), str(other), "name the source")
    rows = thawline("cache", "show", cache, "-l", "input", "--source", other, "--json").json["summary"]["rows"]
    assert rows == 9
