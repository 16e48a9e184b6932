"""Files with images inside: zip archives, gzipped shards, Parquet and Arrow tables give the bytes of the folder."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import struct
import sys
import tarfile
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features_cache import UriRange
from pipeline.errors import SourceError, UnreadableImageError
from pipeline.images.sources import gzipped, tables
from pipeline.images.sources.registry import open_source

CLASSES = ["cat", "dog"]
IMAGES = {
    f"{name}/{number}.png": random.Random(f"{name}{number}").randbytes(200 + 40_000 * (number == 3))
    for name in CLASSES
    for number in range(6)
}
"""No images, but nobody decodes them here."""


def read_all(path: Path) -> list[tuple[bytes, str, str]]:
    """The bytes, class and split of each item, read by several threads at once."""
    source = open_source(path)
    with ThreadPoolExecutor(4) as pool:
        data = list(pool.map(source.read, source.items))
    classes = (*source.classes, "")
    return sorted((one, classes[item.label], item.split) for one, item in zip(data, source.items, strict=True))


def expected(split: str = "") -> list[tuple[bytes, str, str]]:
    return sorted((data, name.partition("/")[0], split) for name, data in IMAGES.items())


def write_zip(path: Path, prefix: str = "", method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in IMAGES.items():
            archive.writestr(prefix + name, data)
    return path


def write_tar(path: Path, mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in IMAGES.items():
            for member, content in ((name, data), (f"{name[:-4]}.cls", name.partition("/")[0].encode())):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def table_of(features: dict[str, Any] | None = None, **more: Any) -> pa.Table:
    """The images as Hugging Face's `datasets` stores them."""
    columns = {
        "image": [{"bytes": data, "path": name.replace("/", "-")} for name, data in IMAGES.items()],
        "label": [CLASSES.index(name.partition("/")[0]) for name in IMAGES],
        **more,
    }
    features = features or {"image": {"_type": "Image"}, "label": {"names": CLASSES, "_type": "ClassLabel"}}
    return pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def write_parquet(path: Path, table: pa.Table | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table_of() if table is None else table, path, row_group_size=5)
    return path


def write_arrow(path: Path, table: pa.Table | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = table_of() if table is None else table
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=5)
    return path


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (write_zip, "a.zip"),
        (write_tar, "a.tar.gz"),
        (write_tar, "A.TGZ"),
        (write_parquet, "a.parquet"),
        (write_arrow, "data-00000-of-00001.arrow"),
    ],
)
def test_packed_images_are_those_of_the_folder(tmp_path: Path, write: Callable[[Path], Path], name: str) -> None:
    path = write(tmp_path / name)
    assert read_all(path) == expected()
    source = open_source(path)
    assert source.location == path.as_posix()
    assert {item.mtime_ns for item in source.items} == {path.stat().st_mtime_ns}
    assert [item.uri for item in source.items] == sorted({item.uri for item in source.items})
    os.utime(path, ns=(0, 1))
    with pytest.raises(UnreadableImageError, match=r"^the shard changed after it was listed$"):
        source.read(source.items[0])
    path.unlink()
    with pytest.raises(UnreadableImageError, match=r"^no such shard$"):
        source.read(source.items[-1])


@pytest.mark.parametrize(
    ("write", "train", "test"),
    [
        (write_zip, "train.zip", "test.zip"),
        (write_tar, "train-000.tar.gz", "test-000.tgz"),
        (write_parquet, "train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
        (write_arrow, "train/data-00000-of-00001.arrow", "test/data-00000-of-00001.arrow"),
    ],
)
def test_names_in_a_folder_tell_the_split(tmp_path: Path, write: Callable[[Path], Path], train: str, test: str) -> None:
    (tmp_path / "data").mkdir()
    for name in (train, test):
        write(tmp_path / name)
    (tmp_path / "dataset_info.json").write_text("{}")
    assert read_all(tmp_path) == sorted(expected("train") + expected("test"))
    assert open_source(tmp_path).passed_over == {".json": 1}


def test_of_several_kinds_in_a_folder_one_is_read_and_the_others_are_counted(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", "w")
    pq.write_table(pa.table({"key": ["a"]}), tmp_path / "0.parquet")
    assert read_all(tmp_path) == expected()
    assert open_source(tmp_path).passed_over == {".parquet": 1}


# ------------------------------------------------------------------------------------------------------- zip


@pytest.mark.parametrize("prefix", ["photos/", "train/", "Training/", "photos/train/"])
def test_a_folder_around_all_is_no_class(tmp_path: Path, prefix: str) -> None:
    split = "train" if "train" in prefix.lower() else ""
    path = write_zip(tmp_path / "a.zip", prefix, zipfile.ZIP_STORED)
    assert read_all(path) == expected(split)
    assert open_source(path).items[0].uri == f"a.zip/{prefix}cat/0.png"


def test_members_of_a_zip_that_are_passed_over(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("a.png", "../b.png", "/c.png", ".d.png", "__MACOSX/._a.png", "sub/.e/f.png", "notes.txt", "x/"):
            archive.writestr(name, b"data")
        archive.writestr("g.jpg_large", b"P5\n1 1\n255\n\0")
        archive.writestr("h.dcm", b"DICM")
    source = open_source(tmp_path / "a.zip")
    assert [item.uri for item in source.items] == ["a.zip/a.png", "a.zip/g.jpg_large"]
    assert source.passed_over == {".txt": 1, ".dcm": 1}


def test_damage_inside_a_zip_is_an_unreadable_row(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip")
    found = bytearray(path.read_bytes())
    at = found.index(b"cat/1.png") + 40
    found[at] ^= 1
    found[found.rindex(b"cat/2.png") - 46 + 8] |= 1  # the flag of encryption, in the directory
    found[found.rindex(b"cat/4.png") - 46 + 10] = 99  # the method
    path.write_bytes(found)
    source = open_source(path)
    reasons = {}
    for item in source.items:
        try:
            assert source.read(item) == IMAGES[item.uri.removeprefix("a.zip/")]
        except UnreadableImageError as error:
            reasons[item.uri] = str(error)
    assert reasons.keys() == {f"a.zip/cat/{number}.png" for number in (1, 2, 4)}
    assert reasons["a.zip/cat/1.png"].startswith("damaged in its archive")
    assert reasons["a.zip/cat/2.png"] == "encrypted"
    assert reasons["a.zip/cat/4.png"] == "compressed by method 99, not by deflate"


def test_a_zip_that_is_none_and_an_image_that_unpacks_to_more_than_it_says(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"PK\3\4 no")
    with pytest.raises(SourceError, match=r"a\.zip: expected a zip archive, found a damaged") as caught:
        open_source(tmp_path / "a.zip")
    assert "\n" not in str(caught.value)
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.png", bytes(1 << 24))
    found = (tmp_path / "b.zip").read_bytes()
    at = found.index(b"PK\1\2") + 24
    (tmp_path / "b.zip").write_bytes(found[:at] + (100).to_bytes(4, "little") + found[at + 4 :])
    source = open_source(tmp_path / "b.zip")
    with pytest.raises(UnreadableImageError, match="the checksum differs"):
        source.read(source.items[0])


# -------------------------------------------------------------------------------------------------- tar.gz


def test_gzip_is_read_at_any_position(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gzipped, "SPACING", 5000)
    monkeypatch.setattr(gzipped, "MOST_STATES", 8)
    monkeypatch.setattr(gzipped, "HELD_BYTES", 20_000)
    generator = random.Random(1)
    content = b"".join(generator.randbytes(3000) + bytes(9000) for _ in range(40))
    middle = 217_000
    packed = gzip.compress(content[:middle]) + gzip.compress(content[middle:]) + bytes(700)  # two streams and padding
    one = gzipped.Gzipped(lambda: io.BytesIO(packed))
    with one.open() as file:
        assert file.read() == content
        assert file.seek(-100, io.SEEK_CUR) == len(content) - 100
        assert file.read() == content[-100:]
    for _ in range(200):
        start = generator.randrange(len(content))
        size = generator.randrange(min(30_000, len(content) - start) + 1)
        assert one.read(start, size) == content[start : start + size]
    with pytest.raises(OSError, match="ends early"):
        one.read(len(content) - 10, 11)


@pytest.mark.parametrize("damage", [lambda data: data[:-9000], lambda data: data[:500] + b"xx" + data[502:]])
def test_a_damaged_gzipped_shard_is_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = write_tar(tmp_path / "x.tar.gz")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(SourceError, match=r"x\.tar\.gz: expected a tar file compressed by gzip, found") as caught:
        open_source(path)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------- tables


def test_a_plain_column_of_bytes_with_text_labels_splits_and_groups(tmp_path: Path) -> None:
    table = pa.table(
        {
            "Label": [name.partition("/")[0] for name in IMAGES],
            "jpg": pa.array(IMAGES.values(), pa.large_binary()),
            "split": ["Training", *[""] * (len(IMAGES) - 1)],
            "group": pa.array([7.0, *[None] * (len(IMAGES) - 1)]),
            "caption": ["a photo"] * len(IMAGES),
        }
    )
    source = open_source(write_parquet(tmp_path / "val-0.parquet", table))
    assert source.classes == ("cat", "dog")
    assert source.items[0][:4] == ("val-0.parquet/0000000", 0, "train", "7")
    assert source.items[-1][:4] == ("val-0.parquet/0000011", 1, "val", "")
    assert [source.read(item) for item in source.items] == [*IMAGES.values()]


def test_class_labels_are_found_by_the_metadata(tmp_path: Path) -> None:
    table = table_of().rename_columns(["image", "fine"]).append_column("text", pa.array([""] * len(IMAGES)))
    features = {"fine": {"names": CLASSES, "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path = write_parquet(tmp_path / "a.parquet", table)
    assert read_all(path) == expected()
    assert open_source(path).items[0].uri == "a.parquet/0000000/cat-0.png"


def test_rows_without_label_or_image(tmp_path: Path) -> None:
    table = pa.table(
        {
            "image": [{"bytes": b"a", "path": None}, {"bytes": None, "path": "gone.png"}, None],
            "label": [-1, None, 1],
        }
    ).replace_schema_metadata(table_of().schema.metadata)
    source = open_source(write_parquet(tmp_path / "a.parquet", table))
    assert [(item.uri, item.label) for item in source.items] == [
        ("a.parquet/0000000", -1),
        ("a.parquet/0000001/gone.png", -1),
        ("a.parquet/0000002", 0),
    ]
    assert source.read(source.items[0]) == b"a"
    assert [source.read(item) for item in source.items[1:]] == [b"", b""], "each has a digest, and is done"


def test_other_columns_with_images_and_labels_are_named(tmp_path: Path) -> None:
    table = table_of().append_column("mask", pa.array([b""] * len(IMAGES))).rename_columns(["image", "class", "mask"])
    table = table.replace_schema_metadata(None).append_column("photo", table["image"])
    notes = open_source(write_parquet(tmp_path / "a.parquet", table)).notes
    assert notes == [
        "2 columns hold images; 'image' is read",
        "a.parquet has no column 'label' but 'class', which is not read: rename it if it fits",
    ]


def test_a_table_with_paths_is_a_manifest_even_with_images_inside(tmp_path: Path) -> None:
    table = table_of(path=[f"{number}.png" for number in range(len(IMAGES))])
    assert open_source(write_parquet(tmp_path / "a.parquet", table)).items[0].uri == "0.png"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (table_of(label=[2] * len(IMAGES)), r"expected labels from 0 to below 2, found 2"),
        (table_of(label=[[1]] * len(IMAGES)), r"expected numbers or text in column 'label', found list"),
        (table_of(split=["dev"] * len(IMAGES)), r"expected split train, val, test or none in row 1, found 'dev'"),
        (pa.table({"x": [1]}), r"expected a column that holds images, found x"),
        (pa.table([[b"a"], [b"b"]], ["image", "image"]), r"expected one column 'image', found 2"),
    ],
)
@pytest.mark.parametrize("write", [write_parquet, write_arrow], ids=["parquet", "arrow"])
def test_tables_that_are_refused(
    tmp_path: Path, write: Callable[[Path, pa.Table], Path], table: pa.Table, message: str
) -> None:
    write(tmp_path / f"set/a.{write.__name__.removeprefix('write_')}", table)
    with pytest.raises(SourceError, match=message) as caught:
        open_source(tmp_path / "set")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.arrow", "sub/a.parquet"])
def test_damaged_tables_and_no_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"PAR1 no")
    with pytest.raises(SourceError, match=r"expected a table") as caught:
        open_source(tmp_path)
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(SourceError, match=r"pip install 'thawline\[parquet\]'"):
        open_source(tmp_path)


def test_row_groups_are_read_once_in_order_and_few_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    whole = tables._read_group

    def counted(*arguments: Any) -> Any:
        read.append(arguments[3])
        return whole(*arguments)

    monkeypatch.setattr(tables, "_read_group", counted)
    monkeypatch.setattr(tables, "HELD_BYTES", 1)
    source = open_source(write_parquet(tmp_path / "a.parquet"))
    for item in [*source.items, source.items[0]]:
        source.read(item)
    assert read == [0, 1, 2, 0]
    monkeypatch.setattr(tables, "CHUNK_LIMIT", 100)
    with pytest.raises(UnreadableImageError, match=r"in a row group of .* bytes, more than 100"):
        source.read(source.items[-1])


def test_an_archive_with_a_forged_offset_has_unreadable_images(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip")
    data = path.read_bytes()
    end = data.rindex(b"PK\5\6")
    count, size = struct.unpack_from("<HL", data, end + 10)
    far = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, 2**64 - 1)
    where = struct.pack("<4sLQL", b"PK\6\7", 0, end, 1)
    path.write_bytes(
        data[:end] + far + where + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, *[2**16 - 1] * 2, *[2**32 - 1] * 2, 0)
    )
    source = open_source(path)
    assert len(source.items) == len(IMAGES)
    for item in source.items:
        with pytest.raises(UnreadableImageError, match="cannot be read"):
            source.read(item)


NAMES = ["a-b", "a.b", "a", "a/c", "a b", "b/a", "a0", "é"]
"""Of archives whose uris come in another order than the names, since some characters are before ``/``."""


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Archives of `NAMES` in a folder, in which another folder is named as one of them begins."""
    folder = tmp_path_factory.mktemp("archives")
    for name in NAMES:
        path = folder / f"{name}.zip"
        path.parent.mkdir(exist_ok=True)
        write_zip(path)
    return folder


ENDS = st.sampled_from(NAMES).flatmap(
    lambda name: st.sampled_from(
        [name, f"{name}.zip", f"{name}.zip/", f"{name}.zip/dog/2.png", f"{name}.zip0", "", "~"]
    )
)


@settings(deadline=None, max_examples=40)
@given(first=ENDS, end=st.none() | ENDS)
def test_a_range_of_archives_is_listed_as_in_the_whole(archives: Path, first: str, end: str | None) -> None:
    whole, wanted = open_source(archives), UriRange(first, end)
    some = open_source(archives, wanted)

    def of(span: UriRange) -> list[str]:
        return [
            item.uri for item in whole.items if span.first <= item.uri and (span.end is None or item.uri < span.end)
        ]

    listed = [item.uri for item in some.items]
    assert listed == of(some.within or UriRange("", None))
    assert set(of(wanted)) <= set(listed)
    read = [(some.read(item), some.classes[item.label], *item[2:]) for item in some.items]
    chosen = [item for item in whole.items if item.uri in set(listed)]
    assert read == [(whole.read(item), whole.classes[item.label], *item[2:]) for item in chosen]
