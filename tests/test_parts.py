"""Caches in parts: the same numbers as one file, published once, and touched only where the source changed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from features_cache import (
    DONE,
    CacheError,
    CacheFile,
    Catalog,
    DamagedCacheError,
    PartedCache,
    begin_try,
    open_cache,
    open_plan,
    publish_try,
    tries_of,
)
from pipeline.errors import EngineError, SourceError
from pipeline.extract import extract
from pipeline.extraction import parts
from pipeline.extraction.inspection import check, list_files
from pipeline.extraction.lookup import rows_of
from pipeline.fit import fit
from pipeline.images.sources.registry import open_source
from pipeline.predict import predict
from pipeline.rank import rank
from pipeline.results import ExtractResult
from pipeline.similar import similar

NAME, LAYERS = "test_resnet@random:0", ("layer2", "penultimate")
OPTIONS: dict[str, Any] = {"size": 32, "precision": "fp32", "engine": "torch", "batch_size": 3}


def extracted(source: Path, cache: Path, layers: tuple[str, ...] = LAYERS, **options: Any) -> ExtractResult:
    (result,) = extract(source, [NAME], layers, output=cache, **OPTIONS | options)
    return result


def assert_equal(one: CacheFile, other: CacheFile) -> None:
    """Both hold the same rows with the same bytes, whatever the files."""
    assert (one.classes, one.handles, one.n_rows) == (other.classes, other.handles, other.n_rows)
    for name in ("uri", "label", "split", "group", "size", "mtime_ns", "digest", "state", "reason"):
        np.testing.assert_array_equal(one.array(f"/rows/{name}"), other.array(f"/rows/{name}"))
    assert one.layers == other.layers
    for layer in one.layers:
        np.testing.assert_array_equal(np.asarray(one.matrix(layer)), np.asarray(other.matrix(layer)))


@pytest.fixture(scope="module")
def photos(write_photos: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photos of 3 classes, 24 in all, of which one cannot be read and two are equal."""
    folder = write_photos(tmp_path_factory.mktemp("parts") / "photos")
    (folder / "green" / "3.png").write_bytes(b"no image")
    (folder / "red" / "7.png").write_bytes((folder / "red" / "6.png").read_bytes())
    return folder


@pytest.fixture(scope="module")
def whole(photos: Path) -> CacheFile:
    return open_cache(extracted(photos, photos.parent / "whole").path)


@pytest.fixture(scope="module")
def parted(photos: Path) -> PartedCache:
    """The same features in five parts."""
    file = open_cache(extracted(photos, photos.parent / "parted", part_rows=5).path)
    assert isinstance(file, PartedCache)
    return file


def test_parts_hold_what_one_file_holds_and_read_like_one(whole: CacheFile, parted: PartedCache) -> None:
    assert [part.n_rows for part in parted.parts] == [4, 5, 5, 5, 5]
    assert not parted.missing
    assert_equal(parted, whole)
    for layer in LAYERS:
        for got, wanted in zip(parted.xy(layer), whole.xy(layer), strict=True):
            np.testing.assert_array_equal(got, wanted)
        matrix, plain = parted.matrix(layer), whole.matrix(layer)
        assert (matrix.shape, matrix.dtype, len(matrix)) == (plain.shape, plain.dtype, len(plain))
        for key in (3, -1, slice(2, 17, 3), np.array([23, 0, 7, 7]), plain[:, 0] > 0, (slice(4, 9), slice(0, 2))):
            np.testing.assert_array_equal(matrix[key], plain[key])
        rows = np.array([20, 3, 10])
        np.testing.assert_array_equal(parted.features(layer, rows), whole.features(layer, rows))
    assert {run["part"] for run in parted.runs} == {part.path.name for part in parted.parts}


def test_forged_handles_do_not_change_what_a_part_holds(parted: PartedCache, photos: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(parted.path.parent, tmp_path / "copy")) / parted.path.name
    handles = open_plan(copy).handles
    copy.with_name(parted.parts[1].path.name).unlink()

    def fill(forged: dict[str, str]) -> None:
        replace(open_plan(copy), handles=forged).rewrite()
        parts.fill_part(str(forged), str(copy), 1, str(photos), None, parts.Computing(engine="torch"), lambda *_: None)

    with pytest.raises(DamagedCacheError, match="its handles lack pool; delete it"):
        fill({name: handle for name, handle in handles.items() if name != "pool"})
    with pytest.raises(CacheError, match="has no part 9; extract again"):
        parts.fill_part("", str(copy), 9, str(photos), None, parts.Computing(engine="torch"), lambda *_: None)
    fill(handles | {"pool": "max"})
    for layer in LAYERS:
        np.testing.assert_array_equal(open_cache(copy).matrix(layer)[:], parted.matrix(layer)[:])


def test_a_worker_opens_only_the_archives_of_its_part(photos: Path, tmp_path: Path) -> None:
    source, cache = tmp_path / "archives", tmp_path / "cache"
    for label in ("red", "green", "blue"):
        shutil.make_archive(str(source / label), "zip", photos, label)
    plan = open_plan(Path(extracted(source, cache, part_rows=3).path))
    wanted = [np.array(open_cache(path).matrix("penultimate")) for path in plan.paths]
    assert [part.rows for part in plan.parts] == [3] * 8  # and eight images in each archive
    for path in plan.paths:
        path.unlink()
    (source / "red.zip").write_bytes(b"damaged")

    def fill(number: int) -> Any:
        done = parts.fill_part("", str(plan.path), number, str(source), None, parts.Computing("torch"), lambda *_: None)
        assert done.computed == 3
        assert parts._kept is not None
        return parts._kept[1]

    first = fill(0)
    assert fill(1) is first, "the archive was opened again"
    second = fill(2)  # with images of two archives
    assert second is not first
    assert second.extractor is first.extractor, "the network was loaded again"
    with pytest.raises(SourceError, match=r"red\.zip"):
        fill(5)
    for number in range(3):
        np.testing.assert_array_equal(open_cache(plan.path_of(number)).matrix("penultimate"), wanted[number])


def test_a_folder_shows_the_parts_as_one_file(whole: CacheFile, parted: PartedCache) -> None:
    folder = parted.path.parent
    (file,) = Catalog(folder).files
    assert file.path == parted.path
    listing = list_files(folder)
    assert (len(listing.files), listing.problems, listing.superseded) == (1, [], [])
    plain = list_files(whole.path.parent).files[0]
    for name in ("layers", "rows", "done", "unreadable", "pending", "precision"):
        assert getattr(listing.files[0], name) == getattr(plain, name)
    assert len(check(folder)[0]) == 5


def test_all_that_reads_a_cache_reads_parts(
    whole: CacheFile, parted: PartedCache, photos: Path, tmp_path: Path, thawline: Callable[..., Any]
) -> None:
    reports = []
    for file in (whole, parted):
        model = tmp_path / f"{file.path.suffix[1:]}.skops"
        report = fit(file.path.parent, heads=["ridge"], save=model)
        ranking = rank(file.path.parent).ranking
        predictions = predict(model, photos, file.path.parent, engine="torch").predictions
        reports.append(([vars(one) | {"seconds": 0} for one in report.results], ranking, predictions))
    assert reports[0] == reports[1]
    exported = []
    for file in (whole, parted):
        path = tmp_path / f"{file.path.suffix[1:]}.npy"
        thawline("cache", "export", file.path.parent, path, "-l", "layer2")
        exported.append((np.load(path), path.with_name(f"{path.name}.csv").read_text()))
    np.testing.assert_array_equal(exported[0][0], exported[1][0])
    assert exported[0][1] == exported[1][1]
    shown = [thawline("cache", "show", file.path.parent, "--json").json for file in (whole, parted)]
    for name in ("classes", "specs", "unreadable", "duplicates"):
        assert shown[0][name] == shown[1][name]


def test_shares_of_a_job_array_make_the_whole(
    whole: CacheFile, photos: Path, tmp_path: Path, thawline: Callable[..., Any]
) -> None:
    command = ["extract", photos, "-b", NAME, *(word for layer in LAYERS for word in ("-l", layer)), "-o", tmp_path]
    command += ["--size", 32, "--precision", "fp32", "--engine", "torch", "--batch-size", 3, "--part-rows", 5, "--json"]
    first = thawline(*command, "--part", "1/3")
    (one,) = first.json["caches"]
    assert (one["rows"], one["done"], one["computed"]) == (24, 9, 9)
    assert "3 of 5 parts" in first.stderr
    assert "3 of 5 parts" in list_files(tmp_path).problems[0]
    assert any("3 of 5 parts" in note for note in fit(tmp_path, ["layer2"], cv=2).notes)
    thawline(*command, "--part", "3/3")
    (rest,) = thawline(*command).json["caches"]  # without a share, all that is left
    assert (rest["done"], rest["unreadable"], rest["rows"]) == (23, 1, 24)
    assert_equal(open_cache(rest["path"]), whole)
    (again,) = thawline(*command).json["caches"]
    assert (again["computed"], again["reused"]) == (0, 23)
    assert thawline(*command, "--part", "4/3").returncode == 2


def test_a_small_source_stays_one_file_that_the_first_share_extracts(photos: Path, tmp_path: Path) -> None:
    assert extract(photos, [NAME], LAYERS, output=tmp_path, part="2/2", **OPTIONS) == []
    assert not list(tmp_path.iterdir())
    assert extracted(photos, tmp_path, part="1/2").path.endswith(".h5")


@pytest.fixture
def copied(photos: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A source of 12 photos that a test may change, and its cache in 3 parts of 4."""
    source = tmp_path / "photos"
    for index in range(12):
        folder = source / ("blue", "green", "red")[index // 4]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (20 * index, 0, 90)).save(folder / f"{index:02}.png")
    extracted(source, tmp_path / "cache", part_rows=4)
    return source, tmp_path / "cache"


def test_an_image_more_or_less_touches_one_part(copied: tuple[Path, Path]) -> None:
    source, cache = copied
    before = {path.name: path.stat().st_ino for path in cache.glob("*.h5")}
    (source / "green" / "05.png").unlink()
    Image.new("RGB", (40, 40), (5, 5, 5)).save(source / "green" / "06b.png")
    result = extracted(source, cache)
    assert (result.computed, result.rows, result.done) == (1, 12, 12)
    after = {path.name: path.stat().st_ino for path in cache.glob("*.p?????.h5")}
    assert [before[name] == after[name] for name in sorted(before)] == [True, False, True]
    assert_equal(open_cache(result.path), open_cache(extracted(source, cache.parent / "anew").path))


def test_a_part_that_more_than_doubles_is_split_and_an_empty_one_is_dropped(copied: tuple[Path, Path]) -> None:
    source, cache = copied
    for index in range(5, 11):
        Image.new("RGB", (40, 40), (7, index, 200)).save(source / "blue" / f"{index:02}.png")
    for path in (source / "green").iterdir():
        path.unlink()
    result = extracted(source, cache)
    assert result.computed == 6
    file = open_cache(result.path)
    assert isinstance(file, PartedCache)
    assert [(part.number, part.rows, part.origin) for part in file.plan.parts] == [
        (0, 3, None),
        (3, 3, 0),
        (4, 4, 0),
        (2, 4, None),
    ]
    assert file.classes == ("blue", "red")
    assert_equal(file, open_cache(extracted(source, cache.parent / "anew").path))


def test_other_layers_in_parts_follow_a_changed_source(copied: tuple[Path, Path]) -> None:
    source, cache = copied
    extracted(source, cache, ("layer1",), part_rows=6)
    (source / "red" / "08.png").rename(source / "red" / "08b.png")
    Image.new("RGB", (40, 40), (9, 9, 9)).save(source / "red" / "09.png")
    extracted(source, cache, ("layer1",))
    other = Catalog(cache).find("layer2")
    assert other.uris.tolist() == [item.uri for item in open_source(source).items]
    assert np.flatnonzero(other.states != DONE).tolist() == [9]
    assert extracted(source, cache).computed == 1


def test_damage_is_found_in_its_part_and_only_its_rows_are_computed_again(copied: tuple[Path, Path]) -> None:
    source, cache = copied
    part = sorted(cache.glob("*.p00001.h5"))[0]
    array = open_cache(part).header.arrays["/features/layer2"]
    with part.open("r+b") as file:
        file.seek(array.offset + array.row_bytes)
        file.write(b"\xff\xff\xff")
    whole = Catalog(cache).files[0]
    with pytest.raises(DamagedCacheError, match="p00001"):
        whole.xy("layer2")
    reports, _ = check(cache, mend=True)
    assert [(report.path, [finding.row for finding in report.damaged]) for report in reports if not report.sound] == [
        (part, [1])
    ]
    assert extracted(source, cache).computed == 1
    assert_equal(Catalog(cache).files[0], open_cache(extracted(source, cache.parent / "anew").path))


def test_a_try_carries_what_others_finished_and_loses_if_it_is_late(copied: tuple[Path, Path]) -> None:
    source, cache = copied
    plan = open_plan(next(cache.glob("*.plan")))
    path = plan.path_of(1)
    images = parts.slice_source(open_source(source), slice(4, 8))
    rows, published = rows_of(images), open_cache(path)
    digests, wanted = np.array(published.digests), {name: np.array(published.matrix(name)) for name in LAYERS}
    path.unlink()

    def fill(writer: Any, which: list[int]) -> None:
        writer.write(which, {name: values[which] for name, values in wanted.items()}, digests[which])

    killed = begin_try(plan, 1, rows, images.classes)
    fill(killed, [0, 2])
    killed.commit()
    late = begin_try(plan, 1, rows, images.classes, donors=parts.donors_of(plan, 1))
    assert late.pending().tolist() == [1, 3]
    with begin_try(plan, 1, rows, images.classes, donors=parts.donors_of(plan, 1)) as writer:
        fill(writer, [1, 3])
    publish_try(writer.cache.path, lambda: False)
    assert not tries_of(path)
    for name, values in wanted.items():
        np.testing.assert_array_equal(open_cache(path).matrix(name), values)
    for writer in (late, killed):
        fill(writer, [1])
        with pytest.raises(CacheError, match="removed or replaced"):
            writer.close()
    assert extracted(source, cache).computed == 0


@pytest.mark.parametrize("order", [1, -1])
def test_a_try_that_has_nothing_takes_no_run_from_another(copied: tuple[Path, Path], order: int) -> None:
    source, cache = copied
    plan = open_plan(next(cache.glob("*.plan")))
    images = parts.slice_source(open_source(source), slice(4, 8))
    rows, published = rows_of(images), open_cache(plan.path_of(1))
    values = {name: published.matrix(name)[:2] for name in LAYERS}
    with begin_try(plan, 1, rows, images.classes) as begun, begin_try(plan, 1, rows, images.classes) as empty:
        begun.begin_run({"engine": "torch"})
        begun.write([0, 1], values, published.digests[:2])
    donors = [begun.cache.path, empty.cache.path][::order]
    with begin_try(plan, 1, rows, images.classes, donors=donors) as writer:
        assert [run["engine"] for run in writer.cache.runs] == ["torch"]
        assert writer.cache.run_ids.tolist() == [0, 0, -1, -1]


def test_weights_that_differ_from_those_of_the_plan_are_refused(
    copied: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, cache = copied
    plan = open_plan(next(cache.glob("*.plan")))
    plan.path_of(2).unlink()
    computing = parts.Computing("torch", "cpu")
    filler = parts.PartFiller(plan, open_source(source), computing)
    plain = parts.request_of
    monkeypatch.setattr(parts, "request_of", lambda plan: replace(plain(plan), backbone="test_resnet@random:1"))
    with pytest.raises(EngineError, match="other features than"):
        filler.fill(2, np.ones(12, bool), lambda *_: None)
    assert not plan.path_of(2).exists()


def test_two_processes_that_plan_at_once_follow_one_plan(copied: tuple[Path, Path]) -> None:
    _, cache = copied
    plan = open_plan(next(cache.glob("*.plan")))
    other = parts.replace(plan, pinned={"engine": "openvino"}, parts=plan.parts[:1])
    assert other.publish() == plan


def test_plans_that_were_changed_are_refused_with_what_to_do(copied: tuple[Path, Path]) -> None:
    _, cache = copied
    path = next(cache.glob("*.plan"))
    text = path.read_text()
    table = json.loads(text)
    for wrong in (
        text[:-9],
        text.replace('"rows": 4', '"rows": 5', 1),
        "[]",
        json.dumps(table | {"most_rows": 9}),
        "{}",
    ):
        path.write_text(wrong)
        with pytest.raises(DamagedCacheError, match="not usable as the plan"):
            open_cache(path)
    path.unlink()
    with pytest.raises(CacheError, match=r"is a part of .*\.plan, which is missing"):
        Catalog(cache)


def test_prune_deletes_tries_of_published_parts_and_parts_without_a_place(
    copied: tuple[Path, Path], thawline: Callable[..., Any]
) -> None:
    source, cache = copied
    plan = open_plan(next(cache.glob("*.plan")))
    left = cache / f"{plan.path_of(0).name}.try-0123"
    waiting = cache / f"{plan.path_of(2).name}.try-4567"
    waiting.write_bytes(b"")
    plan.path_of(2).unlink()
    for path in (source / "green").iterdir():
        path.unlink()
    extracted(source, cache, part="1/2")
    left.write_bytes(b"")
    deleted = thawline("cache", "prune", cache, "--yes", "--json").json["deleted"]
    assert deleted == sorted(map(str, [left, plan.path_of(1)]))
    assert waiting.exists()


@pytest.mark.parametrize("part_rows", [None, 5])
def test_a_folder_below_a_file_is_refused(part_rows: int | None, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(
        CacheError, match=r"cannot write .*file/c.*: a part of the path is a file, not a folder; choose"
    ):
        extracted(photos, tmp_path / "file" / "c", part_rows=part_rows)


def test_inputs_that_are_no_squares_are_extracted_in_parts(photos: Path, tmp_path: Path) -> None:
    alone = open_cache(extracted(photos, tmp_path / "alone", size=(32, 48)).path)
    (tmp_path / "parts").mkdir()
    extracted(photos, tmp_path / "parts", size=(32, 48), part_rows=12, part="1/2")
    found = open_cache(extracted(photos, tmp_path / "parts", size=(32, 48)).path)
    assert len(found.parts) == 2
    assert_equal(alone, found)


def test_an_answer_over_some_of_the_parts_says_so(photos: Path, tmp_path: Path) -> None:
    made = extracted(photos, tmp_path, part_rows=12, part="1/2")
    note = "lacks 1 of 2 parts"
    assert any(note in one for one in made.notes)
    shown = similar(tmp_path, [str(open_cache(made.path).uris[0])], layer="penultimate", count=1)
    assert any(note in one for one in shown.notes)
    other = extract(photos, [NAME], ["layer1"], output=tmp_path, **OPTIONS)
    assert not any("the source changed" in one for result in other for one in result.notes)


def test_rehash_reads_parts_again(copied: tuple[Path, Path]) -> None:
    source, cache = copied
    path = source / "green" / "05.bmp"
    Image.new("RGB", (40, 40), (1, 2, 3)).save(path)
    extracted(source, cache)
    status = path.stat()
    Image.new("RGB", (40, 40), (250, 2, 3)).save(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert extracted(source, cache).computed == 0
    result = extracted(source, cache, rehash=True)
    assert result.computed == 1
    alone = open_cache(extracted(source, cache.parent / "anew").path)
    for layer in LAYERS:
        found = open_cache(result.path).matrix(layer)
        np.testing.assert_array_equal(np.asarray(found), np.asarray(alone.matrix(layer)))


@pytest.mark.parametrize("part_rows", [None, 4])
def test_rehash_of_chosen_images_leaves_the_others_as_they_are(
    copied: tuple[Path, Path], part_rows: int | None
) -> None:
    source, cache = copied[0], copied[1].parent / "another"
    path = source / "red" / "09.png"
    Image.new("RGB", (40, 40), (1, 2, 3)).save(path, "BMP")
    before = {
        layer: np.array(values)
        for file in [open_cache(extracted(source, cache, part_rows=part_rows).path)]
        for layer, values in ((layer, file.matrix(layer)) for layer in LAYERS)
    }
    status = path.stat()
    Image.new("RGB", (40, 40), (250, 2, 3)).save(path, "BMP")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    result = extracted(source, cache, rehash=True, only={"red/09.png", "red/10.png"})
    assert (result.rows, result.done) == (12, 12)
    for layer, values in before.items():
        changed = (np.asarray(open_cache(result.path).matrix(layer)) != values).any(axis=1)
        assert np.flatnonzero(changed).tolist() == [9]


def test_other_files_follow_a_changed_source_only_when_all_parts_do(copied: tuple[Path, Path]) -> None:
    source, cache = copied
    (other,) = extract(source, [NAME], ["layer1"], output=cache, **OPTIONS)
    file = open_cache(other.path)
    known = dict(zip(file.uris.tolist(), map(bytes, np.asarray(file.matrix("layer1"))), strict=True))
    first, *_, last = sorted(source.rglob("*.png"))
    first.with_name("000.png").write_bytes(last.read_bytes())
    last.unlink()
    extracted(source, cache, part="1/5")
    for _ in range(2):
        file = open_cache(other.path)
        for uri, row, state in zip(file.uris.tolist(), np.asarray(file.matrix("layer1")), file.states, strict=True):
            if uri in known and state == DONE:
                assert bytes(row) == known[uri], f"{uri} has the features of another image"
        extracted(source, cache)
    assert f"{first.parent.name}/000.png" in open_cache(other.path).uris.tolist()
