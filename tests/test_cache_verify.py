from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from features_cache import (
    DONE,
    PENDING,
    UNREADABLE,
    CacheError,
    CacheLockedError,
    CacheWriter,
    Catalog,
    DamagedCacheError,
    LayerInfo,
    Rows,
    ThawlineError,
    export_features,
    open_cache,
    repair,
    verify,
)
from features_cache.layout import RUN_BYTES
from pipeline.evaluation.rows import select

N = 24
LAYERS = [LayerInfo("a", 5, "float32", {}, "f"), LayerInfo("b", 3, "float16", {}, "g")]
IMAGES = {f"{i}.png": f"image {i}".encode() for i in range(N)}
UNREAD, BAD = 4, 7


def compute(writer: CacheWriter, rows: np.ndarray[tuple[int], np.dtype[np.int64]]) -> None:
    data = [IMAGES[f"{row}.png"] for row in rows.tolist()]
    digests = np.array([list(hashlib.blake2b(one, digest_size=16).digest()) for one in data], np.uint8)
    features = {"a": np.outer(rows + 1, np.arange(5)), "b": np.outer(rows + 1, [1, 2, 3])}
    writer.write(rows, features, digests)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    rows = Rows(list(IMAGES), np.arange(N) % 2, ["train"] * N, ["g"] * N, np.arange(N), np.arange(N))
    with CacheWriter.create(tmp_path / "a.h5", rows, ["x", "y"], LAYERS, {}, {}) as writer:
        writer.begin_run({"engine": "torch"})
        compute(writer, np.array([row for row in range(N) if row not in (UNREAD, BAD)]))
        writer.fail(BAD, "no image", None)
    return tmp_path / "a.h5"


def damage(path: Path, array: str, row: int, bit: int) -> None:
    place = open_cache(path).header.arrays[array]
    data = bytearray(path.read_bytes())
    data[place.offset + row * place.row_bytes + bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_a_sound_file_is_sound(path: Path) -> None:
    ticks: list[None] = []
    report = verify(path, tick=lambda: ticks.append(None))
    assert report.sound
    assert len(ticks) == 2, "for each chunk of both layers"
    assert (report.rows, report.done, report.unreadable, report.pending) == (N, N - 2, 1, 1)
    assert report.bytes_checked == (N - 2) * (5 * 4 + 3 * 2)
    assert report.damaged == report.changed == report.damaged_runs == []


ARRAYS = ["label", "size", "mtime_ns", "digest", "uri", "group", "split", "reason", "run", "source_crc", "result_crc"]
DAMAGES = [f"/rows/{name}" for name in ARRAYS] + [f"/{kind}/{name}" for kind in ("features", "crc") for name in "ab"]


@pytest.mark.parametrize("array", DAMAGES)
def test_any_flipped_bit_of_a_done_row_is_found_by_row_and_mended(path: Path, array: str) -> None:
    generator = random.Random(array)
    rows = sorted(generator.sample([row for row in range(N) if row not in (UNREAD, BAD)], 3))
    before = {name: np.array(open_cache(path).matrix(name)) for name in "ab"}
    for row in rows:
        damage(path, array, row, generator.randrange(open_cache(path).header.arrays[array].row_bytes * 8))
    report = verify(path)
    assert not report.sound
    assert sorted({finding.row for finding in report.damaged}) == rows
    layer = array[-1] if not array.startswith("/rows") else None
    assert {finding.layer for finding in report.damaged} == {layer} or array == "/rows/label"
    assert all(finding.uri == open_cache(path).uris[finding.row] for finding in report.damaged)

    assert repair(path, report) == 3
    assert np.flatnonzero(open_cache(path).states == PENDING).tolist() == sorted([*rows, UNREAD])
    with CacheWriter.resume(path) as writer:
        compute(writer, np.array(rows))
    mended = verify(path)
    in_the_source_columns = array in ("/rows/label", "/rows/uri", "/rows/group", "/rows/split", "/rows/source_crc")
    assert mended.sound != in_the_source_columns  # those come right when the file grows with its source
    for name in "ab":
        np.testing.assert_array_equal(open_cache(path).matrix(name), before[name])


@pytest.mark.parametrize(("row", "bit"), [(0, 1), (0, 5), (BAD, 0), (BAD, 3), (UNREAD, 0), (UNREAD, 7)])
def test_a_damaged_state_never_makes_a_row_count_that_is_none(path: Path, row: int, bit: int) -> None:
    damage(path, "/rows/state", row, bit)
    report = verify(path)
    assert {finding.row for finding in report.damaged} == {row}
    repair(path, report)
    assert open_cache(path).states[row] == PENDING
    assert verify(path).sound


def test_a_done_row_that_claims_to_be_unreadable_is_found(path: Path) -> None:
    damage(path, "/rows/state", 0, 0)
    damage(path, "/rows/state", 0, 1)
    assert open_cache(path).states[0] == UNREADABLE
    report = verify(path)
    assert [finding.row for finding in report.damaged] == [0]
    repair(path, report)
    assert verify(path).sound


def test_a_state_that_falls_back_to_pending_costs_a_computation_only(path: Path) -> None:
    damage(path, "/rows/state", 0, 0)
    assert verify(path).sound
    assert verify(path).pending == 2


def test_a_damaged_record_of_a_run_is_found_and_emptied(path: Path) -> None:
    damage(path, "/runs", 0, 100)
    report = verify(path)
    assert report.damaged == []
    assert report.damaged_runs == [0]
    assert not report.sound
    assert repair(path, report) == 0
    assert verify(path).sound
    assert open_cache(path).array("/runs")[0] == b""
    assert open_cache(path).array("/runs").dtype.itemsize == RUN_BYTES


def test_images_that_changed_or_went_are_named_and_are_no_damage(path: Path) -> None:
    def read(uri: str) -> bytes:
        if uri == "3.png":
            raise FileNotFoundError("3.png is gone")
        if uri == "5.png":
            raise ThawlineError("5.png cannot be had")
        return b"edited" if uri == "9.png" else IMAGES[uri]

    report = verify(path, read)
    assert report.sound
    assert [(finding.row, finding.uri) for finding in report.changed] == [(3, "3.png"), (5, "5.png"), (9, "9.png")]
    assert "3.png is gone" in report.changed[0].what
    assert "in the source has changed" in report.changed[2].what
    assert repair(path, report) == 0
    assert verify(path, IMAGES.__getitem__).changed == []


def test_damage_of_the_structure_is_refused(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[2000] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedCacheError, match="structure"):
        verify(path)


def test_repair_waits_for_no_writer_and_touches_no_other_file(path: Path) -> None:
    damage(path, "/features/a", 2, 9)
    report = verify(path)
    with CacheWriter.resume(path), pytest.raises(CacheLockedError):
        repair(path, report)
    assert open_cache(path).states[2] == DONE
    rows = Rows(["0"], np.zeros(1, int), [""], [""], np.ones(1, int), np.ones(1, int))
    CacheWriter.create(path.with_name("b.h5"), rows, ["x"], LAYERS, {}, {}).close()
    with pytest.raises(CacheError, match="not the file that was verified"):
        repair(path.with_name("b.h5"), report)
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["a.h5", "b.h5"]


COLUMNS = ["label", "uri", "group", "split", "source_crc", "result_crc", "digest"]


@pytest.mark.parametrize("array", [*(f"/rows/{name}" for name in COLUMNS), "/crc/a", "/features/a"])
@pytest.mark.parametrize("bit", [0, 7])
def test_every_reader_refuses_a_flipped_bit(path: Path, tmp_path: Path, array: str, bit: int) -> None:
    damage(path, array, 11, bit)
    told = r"a\.h5 is damaged in 1 of 24 rows, first row 11: .*; run cache verify with repair, then extract again"
    readers: list[Callable[[], object]] = [
        lambda: open_cache(path).xy("a"),
        lambda: export_features(open_cache(path), "a", tmp_path / "a.npy"),
        lambda: select(Catalog(path), ["a"])[0].features(np.arange(20)),
    ]
    for read in readers:
        with pytest.raises(DamagedCacheError, match=told):
            read()
    assert not (tmp_path / "a.npy").exists()


@pytest.mark.parametrize(("row", "bit"), [(11, 1), (UNREAD, 0), (BAD, 0)])
def test_every_reader_refuses_a_state_that_contradicts_the_row(path: Path, row: int, bit: int) -> None:
    damage(path, "/rows/state", row, bit)
    with pytest.raises(DamagedCacheError, match=f"first row {row}"):
        open_cache(path).xy("b")


def test_a_damaged_layer_leaves_the_others_readable_and_repair_helps(path: Path) -> None:
    right = open_cache(path).xy("b")[0].tolist()
    damage(path, "/features/a", 3, 9)
    damage(path, "/features/a", 12, 3)
    assert open_cache(path).xy("b")[0].tolist() == right
    with pytest.raises(DamagedCacheError, match="2 of 24 rows, first row 3"):
        open_cache(path).xy("a", "train")
    assert repair(path, verify(path)) == 2
    assert len(open_cache(path).xy("a")[0]) == N - 4
