from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from features_cache import (
    DONE,
    PENDING,
    UNREADABLE,
    CacheError,
    CacheLockedError,
    CacheWriter,
    LayerInfo,
    Rows,
    ledger,
    open_cache,
)

CLASSES = ("Äpfel", "pears", "")
HANDLES = {"source": "photos", "backbone": "resnet50", "pool": "avg"}
REQUEST = {"layers": ["last"], "size": None, "deep": {"a": [1, 2.5, "ü"]}}
LAST = LayerInfo("last", 5, "float32", {"name": "last", "mean": [0.5]}, "f-last")
HALF = LayerInfo("block.1.half", 3, "float16", {"name": "half"}, "f-half")


def make_rows(n: int) -> Rows:
    return Rows(
        uris=[f"klasse/bild-é-{i}.jpg" for i in range(n)],
        labels=np.arange(n) % 3 - 1,
        splits=[("", "train", "val", "test")[i % 4] for i in range(n)],
        groups=["" if i % 2 else f"g{i}" for i in range(n)],
        sizes=np.arange(n) * 10,
        mtimes_ns=np.arange(n) + 1_700_000_000_000_000_000,
    )


def values(n: int, layer: LayerInfo) -> NDArray[np.float32]:
    generator = np.random.default_rng(layer.dim)
    return generator.normal(size=(n, layer.dim)).astype(np.float16).astype(np.float32)


def digests(n: int) -> NDArray[np.uint8]:
    made = [hashlib.blake2b(str(i).encode(), digest_size=16).digest() for i in range(n)]
    return np.frombuffer(b"".join(made), np.uint8).reshape(n, 16)


def create(path: Path, n: int = 12, layers: tuple[LayerInfo, ...] = (LAST, HALF)) -> CacheWriter:
    return CacheWriter.create(path, make_rows(n), CLASSES, layers, HANDLES, REQUEST)


def write(writer: CacheWriter, rows: Any) -> None:
    n, rows = writer.cache.n_rows, np.asarray(rows)
    features = {layer.name: values(n, layer)[rows] for layer in writer.cache.layers.values()}
    writer.write(rows, features, digests(n)[rows])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "a.h5"


def test_a_new_file_says_what_was_asked(path: Path) -> None:
    with create(path) as writer:
        assert writer.pending().tolist() == list(range(12))
    file, rows = open_cache(path), make_rows(12)
    assert (file.handles, file.request, file.classes, file.n_rows) == (HANDLES, REQUEST, CLASSES, 12)
    assert list(file.layers.values()) == [LAST, HALF]
    assert file.uris.tolist() == list(rows.uris)
    assert file.splits.tolist() == list(rows.splits)
    assert file.groups.tolist() == list(rows.groups)
    np.testing.assert_array_equal(file.labels, rows.labels)
    np.testing.assert_array_equal(file.sizes, rows.sizes)
    np.testing.assert_array_equal(file.mtimes_ns, rows.mtimes_ns)
    assert (file.states == PENDING).all()
    assert (file.run_ids == -1).all()
    assert file.runs == []
    assert [entry.name for entry in path.parent.iterdir()] == ["a.h5"]


def test_plain_h5py_reads_everything_during_and_after_writing(path: Path) -> None:
    with create(path) as writer:
        writer.begin_run({"engine": "torch"})
        write(writer, [3, 1, 2, 7])
        writer.fail(5, "no image\n at all", None)
        writer.commit()
        compare_with_h5py(path)
    compare_with_h5py(path)


def compare_with_h5py(path: Path) -> None:
    raw = path.read_bytes()
    table = json.loads(raw[raw.index(b"\n") + 1 :][: int(raw.split(b" ")[2])])
    with h5py.File(path, "r") as file:
        names: list[str] = []
        file.visititems(lambda name, item: names.append("/" + name) if isinstance(item, h5py.Dataset) else None)
        assert set(names) == set(table["arrays"])
        for name, place in table["arrays"].items():
            dataset = file[name]
            assert dataset.id.get_create_plist().get_layout() == h5py.h5d.CONTIGUOUS
            assert dataset.id.get_offset() == place["offset"]
            assert list(dataset.shape) == place["shape"]
            assert dataset.dtype == np.dtype(place["dtype"])
        for layer in (LAST, HALF):
            stored = file["features"][layer.name][:]
            assert stored.dtype == layer.dtype
            np.testing.assert_array_equal(stored[[1, 2, 3, 7]], values(12, layer)[[1, 2, 3, 7]])
            sums = [zlib.crc32(stored[row].tobytes()) for row in (1, 7)]
            assert sums == file["crc"][layer.name][:][[1, 7]].tolist()
            assert file["features"][layer.name].attrs["fingerprint"].decode() == layer.fingerprint
            assert json.loads(file["features"][layer.name].attrs["spec"]) == layer.spec
        rows = make_rows(12)
        assert file["rows/uri"].asstr()[:].tolist() == list(rows.uris)
        assert file["rows/split"].asstr()[:].tolist() == list(rows.splits)
        assert tuple(file["classes"].asstr()[:]) == CLASSES
        assert file["rows/state"][:].tolist() == [0, 1, 1, 1, 0, 2, 0, 1, 0, 0, 0, 0]
        assert file["rows/reason"].asstr()[5] == "no image at all"
        assert file["rows/size"][:8].tolist() == [0, 10, 20, 30, 40, 50, 60, 70]
        np.testing.assert_array_equal(file["rows/digest"][:][[1, 2, 3, 7]], digests(12)[[1, 2, 3, 7]])
        assert file.attrs["format"].decode() == "thawline-cache 1"
        assert json.loads(file.attrs["handles"]) == HANDLES
        assert json.loads(file.attrs["request"]) == REQUEST


def test_resume_goes_on_where_it_stopped_and_keeps_the_provenance(path: Path) -> None:
    with create(path) as writer:
        writer.begin_run({"engine": "torch", "command": "x" * 9000})
        write(writer, [0, 1, 2])
    with CacheWriter.resume(path) as writer:
        assert writer.pending().tolist() == list(range(3, 12))
        writer.begin_run({"engine": "ov"})
        write(writer, writer.pending()[::-1].copy())
        np.testing.assert_array_equal(writer.read("last", [11, 0, 4]), values(12, LAST)[[11, 0, 4]])
        assert writer.read("block.1.half", [4]).dtype == np.float32
    file = open_cache(path)
    assert [(run["run"], run["engine"], run["rows"]) for run in file.runs] == [(0, "torch", 3), (1, "ov", 9)]
    assert all(run["started"] <= run["ended"] for run in file.runs)
    assert file.run_ids.tolist() == [0] * 3 + [1] * 9
    np.testing.assert_array_equal(file.matrix("last"), values(12, LAST))
    np.testing.assert_array_equal(file.digests, digests(12))


@pytest.mark.parametrize("held_bytes", [1, 100, 1 << 20])
def test_features_held_back_are_the_ones_that_were_given(
    path: Path, monkeypatch: pytest.MonkeyPatch, held_bytes: int
) -> None:
    monkeypatch.setattr(ledger, "HELD_BYTES", held_bytes)
    buffer = {layer.name: np.empty((3, layer.dim), np.float32) for layer in (LAST, HALF)}
    with create(path) as writer:
        for rows in np.array([[4, 0, 11], [1, 2, 3], [5, 7, 6], [10, 9, 8]]):
            for layer in (LAST, HALF):
                buffer[layer.name][:] = values(12, layer)[rows]
            writer.write(rows, buffer, digests(12)[rows])
            for given_before in buffer.values():
                given_before[:] = -1  # callers reuse their arrays
        np.testing.assert_array_equal(writer.read("last", [9, 4]), values(12, LAST)[[9, 4]])
        assert (open_cache(path).states == PENDING).all()
    file = open_cache(path)
    assert (file.states == DONE).all()
    for layer in (LAST, HALF):
        np.testing.assert_array_equal(file.matrix(layer.name), values(12, layer))


def test_more_runs_than_slots_keep_the_newest(path: Path) -> None:
    with create(path, 2) as writer:
        for number in range(131):
            writer.begin_run({"n": number})
    assert [run["run"] for run in open_cache(path).runs] == list(range(3, 131))


def test_the_matrix_is_the_file_and_xy_a_view_where_it_can_be(path: Path) -> None:
    with create(path) as writer:
        write(writer, range(12))
    file, rows = open_cache(path), make_rows(12)
    matrix = file.matrix("last")
    assert isinstance(matrix, np.memmap)
    assert not matrix.flags.writeable
    for split in (None, "train", "val", "test", ""):
        x, y = file.xy("last", split)
        keep = (rows.labels >= 0) & ((np.array(rows.splits) == split) | (split is None))
        np.testing.assert_array_equal(x, values(12, LAST)[keep])
        np.testing.assert_array_equal(y, rows.labels[keep])
    whole = Rows(**{**vars(make_rows(4)), "labels": np.zeros(4, int)})
    with CacheWriter.create(path.with_name("b.h5"), whole, CLASSES, [LAST], HANDLES, REQUEST) as writer:
        write(writer, range(4))
    file = open_cache(path.with_name("b.h5"))
    assert np.shares_memory(file.xy("last")[0], file.matrix("last"))
    assert file.xy("last")[0].shape == (4, 5)


def test_an_open_reader_sees_what_a_writer_commits(path: Path) -> None:
    with create(path) as writer:
        file = open_cache(path)
        assert (file.states == PENDING).all()
        write(writer, [4])
        writer.commit()
        assert np.flatnonzero(file.states == DONE).tolist() == [4]
        np.testing.assert_array_equal(file.matrix("last")[4], values(12, LAST)[4])


def test_float16_overflow_is_refused_and_nothing_of_the_batch_is_marked(path: Path) -> None:
    with create(path) as writer:
        big = {"last": values(12, LAST)[:2], "block.1.half": np.full((2, 3), 7e4, np.float32)}
        with pytest.raises(CacheError, match=r"block\.1\.half.*too large for float16.*float32"):
            writer.write([0, 1], big, digests(2))
        big["block.1.half"] = np.array([[65504, np.inf, -np.inf], [np.nan, -65504, 0]], np.float32)
        writer.write([0, 1], big, digests(2))
        write(writer, [2])
    file = open_cache(path)
    assert np.flatnonzero(file.states == DONE).tolist() == [0, 1, 2]
    np.testing.assert_array_equal(file.matrix("block.1.half")[:2], big["block.1.half"])


BAD_WRITES: dict[str, tuple[dict[str, Any], str]] = {
    "row out of range": ({"rows": [12]}, "out of range; expected 0 to 11"),
    "negative row": ({"rows": [-1]}, "out of range"),
    "a row was given twice": ({"rows": [3, 3]}, "a row was given twice"),
    "a finished row": ({"rows": [0]}, r"can be written once; \[0\]"),
    "a layer is missing": ({"layers": (LAST,)}, r"expected features of last, block\.1\.half, got last"),
    "a wrong dim": ({"wrong_dim": True}, "expected shape"),
    "a wrong digest": ({"digest_bytes": 8}, "digest of 1 rows"),
}


@pytest.mark.parametrize("case", BAD_WRITES)
def test_wrong_calls_are_refused_and_leave_the_file_as_it_was(path: Path, case: str) -> None:
    change, message = BAD_WRITES[case]
    with create(path) as writer:
        write(writer, [0])
        rows = change.get("rows", [3])
        features = {
            layer.name: np.zeros((len(rows), layer.dim + change.get("wrong_dim", False)), np.float32)
            for layer in change.get("layers", (LAST, HALF))
        }
        found = np.zeros((len(rows), change.get("digest_bytes", 16)), np.uint8)
        with pytest.raises(CacheError, match=message):
            writer.write(rows, features, found)
    assert np.flatnonzero(open_cache(path).states).tolist() == [0]


BAD_FILES: dict[str, tuple[dict[str, Any], str]] = {
    "no rows": ({"rows": make_rows(0)}, "the source has no images"),
    "no layers": ({"layers": ()}, "no layer was given"),
    "layer twice": ({"layers": (LAST, LAST)}, "same name"),
    "layer with a slash": ({"layers": (LayerInfo("a/b", 1, "float32", {}, "f"),)}, "cannot name a layer"),
    "layer named ..": ({"layers": (LayerInfo("..", 1, "float32", {}, "f"),)}, "cannot name a layer"),
    "float64": ({"layers": (LayerInfo("a", 1, "float64", {}, "f"),)}, "float32 or float16"),
    "no dimension": ({"layers": (LayerInfo("a", 0, "float32", {}, "f"),)}, "length of 1 or more"),
    "label without a class": ({"classes": ("one",)}, "labels must lie"),
    "class with a zero byte": ({"classes": ("a", "b\0", "c")}, "zero byte"),
    "unknown split": ({"rows": Rows(**{**vars(make_rows(4)), "splits": ["dev"] * 4})}, "unknown split"),
    "short column": ({"rows": Rows(**{**vars(make_rows(4)), "sizes": np.ones(3, int)})}, "must have 4 entries"),
    "class that is no Unicode": ({"classes": ("a", "caf\udce9", "c")}, "cannot be written as UTF-8"),
    "handle that is no Unicode": ({"handles": {"source": "caf\udce9"}}, "control characters"),
    "newline in a handle": ({"handles": {"source": "a\nb"}}, "control characters"),
    "huge request": ({"request": {"x": "y" * 70_000}}, "request has 7"),
    "larger than the disk": ({"layers": (LayerInfo("a", 1 << 46, "float32", {}, "f"),)}, "it needs .* GB"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_what_cannot_be_a_file_leaves_none(tmp_path: Path, case: str) -> None:
    change, message = BAD_FILES[case]
    given = {"rows": make_rows(4), "classes": CLASSES, "layers": (LAST,), "handles": HANDLES, "request": {}} | change
    with pytest.raises(CacheError, match=message) as caught:
        CacheWriter.create(tmp_path / "a.h5", **given)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_take_its_name_leaves_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refuse)
        with pytest.raises(CacheError, match="permission denied"):
            create(path)
    assert not list(path.parent.iterdir()), "neither its space nor its lock is kept"


def test_an_existing_file_is_not_replaced(path: Path) -> None:
    create(path).close()
    before = path.read_bytes()
    with pytest.raises(CacheError, match="already exists"):
        create(path)
    with pytest.raises(CacheError, match="its folder is a file; choose another folder"):
        create(path / "b.h5")
    assert path.read_bytes() == before


def test_a_second_process_is_refused_and_may_write_afterwards(path: Path) -> None:
    code = "import sys; from features_cache import CacheWriter; CacheWriter.resume(sys.argv[1]).close()"
    command = [sys.executable, "-c", code, str(path)]
    with create(path) as writer:
        write(writer, [0])
        other = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert other.returncode == 1
        assert "CacheLockedError" in other.stderr.splitlines()[-1]
        with pytest.raises(CacheLockedError, match=r"process \d+ is writing it"):
            CacheWriter.resume(path)
        write(writer, [1])
    subprocess.run(command, check=True, timeout=60)
    assert np.flatnonzero(open_cache(path).states).tolist() == [0, 1]
    assert [entry.name for entry in path.parent.iterdir()] == ["a.h5"]


def test_an_exception_commits_what_was_written(path: Path) -> None:
    def interrupted() -> None:
        with create(path) as writer:
            write(writer, [0, 5])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert np.flatnonzero(open_cache(path).states == DONE).tolist() == [0, 5]


def test_unreadable_rows_keep_a_short_reason(path: Path) -> None:
    with create(path) as writer:
        writer.fail(2, "ü" * 100, np.arange(16, dtype=np.uint8))
        writer.fail(3, "", None)
        writer.fail(4, "bytes", bytes(range(1, 17)))
        with pytest.raises(CacheError, match="digest of 1 rows"):
            writer.fail(5, "short", bytes(15))
    file = open_cache(path)
    assert file.states[2] == UNREADABLE
    assert file.digests[3:6].tolist() == [[0] * 16, list(range(1, 17)), [0] * 16]
    assert file.reasons.tolist()[2:5] == ["ü" * 40, "unreadable", "bytes"]
    assert file.digests[2].tolist() == list(range(16))


def test_unknown_layers_and_splits_are_named(path: Path) -> None:
    create(path).close()
    file = open_cache(path)
    with pytest.raises(CacheError, match=r"no layer lst; it has last, block\.1\.half; did you mean last\?"):
        file.matrix("lst")
    with pytest.raises(CacheError, match="did you mean train"):
        file.xy("last", "trian")


@pytest.mark.parametrize("rows", [12, 13])
def test_a_file_removed_or_replaced_underneath_is_noticed(path: Path, rows: int) -> None:
    writer = create(path)
    write(writer, [0])
    reader = open_cache(path)
    path.unlink()
    with pytest.raises(CacheError, match="removed or replaced"):
        writer.close()
    create(path, rows).close()
    with pytest.raises(CacheError, match="replaced by another file"):
        _ = reader.states
    with CacheWriter.resume(path) as again:
        write(again, [0])
    assert open_cache(path).states[0] == DONE


def test_a_commit_writes_nothing_twice(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with create(path) as writer:
        write(writer, [0, 1])
        writer.commit()
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", lambda *_: pytest.fail("nothing is left to write"))
            writer.commit()


texts = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=12)


@settings(max_examples=30, deadline=None)
@given(data=st.data(), n=st.integers(1, 40))
def test_any_order_of_writes_ends_in_the_same_matrix(data: Any, n: int, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("any") / "a.h5"
    uris = data.draw(st.lists(texts, min_size=n, max_size=n))
    order = data.draw(st.permutations(range(n)))
    cuts = sorted(data.draw(st.sets(st.integers(0, n), max_size=4)) | {0, n})
    rows = Rows(**{**vars(make_rows(n)), "uris": uris, "groups": uris})
    CacheWriter.create(path, rows, CLASSES, [LAST, HALF], HANDLES, REQUEST).close()
    for start, stop in pairwise(cuts):
        with CacheWriter.resume(path) as writer:
            assert set(writer.pending().tolist()) == set(order[start:])
            if stop > start:
                write(writer, list(order[start:stop]))
    file = open_cache(path)
    assert file.uris.tolist() == uris
    assert file.groups.tolist() == uris
    for layer in (LAST, HALF):
        np.testing.assert_array_equal(file.matrix(layer.name), values(n, layer))
