"""Manifests, as CSV and as Parquet: what a row means and what a table may not hold."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import SourceError, UnreadableImageError
from pipeline.images.sources.registry import open_source

Writer = Callable[[Path, dict[str, list[str]]], Path]


def write_csv(folder: Path, table: dict[str, list[str]]) -> Path:
    lines = [",".join(table), *(",".join(row) for row in zip(*table.values(), strict=True))]
    path = folder / "list.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_parquet(folder: Path, table: dict[str, list[str]]) -> Path:
    path = folder / "list.parquet"
    pq.write_table(pa.table(table), path)
    return path


def write_separated(folder: Path, table: dict[str, list[str]], separator: str, name: str) -> Path:
    path = folder / name
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=separator).writerows([table, *zip(*table.values(), strict=True)])
    return path


def write_jsonl(folder: Path, table: dict[str, list[str]]) -> Path:
    path = folder / "list.jsonl"
    rows = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
    path.write_text("\n\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8-sig")
    return path


WRITERS: dict[str, Writer] = {
    "csv": write_csv,
    "tsv": lambda folder, table: write_separated(folder, table, "\t", "list.tsv"),
    "semicolons": lambda folder, table: write_separated(folder, table, ";", "list.csv"),
    "bars": lambda folder, table: write_separated(folder, table, "|", "list.tsv"),
    "jsonl": write_jsonl,
    "parquet": write_parquet,
}


@pytest.fixture(params=WRITERS.values(), ids=WRITERS.keys())
def write(request: pytest.FixtureRequest) -> Writer:
    return request.param


def test_all_columns(tmp_path: Path, write: Writer) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/b.jpg").write_bytes(b"bbb")
    (tmp_path / "a.png").write_bytes(b"a")
    manifest = write(
        tmp_path,
        {
            "split": ["Training", "valid", ""],
            "path": ["./sub/b.jpg", "a.png", "missing.gif"],
            "label": ["dog", "cat", ""],
            "remark": ["x", "y", "z"],
            "group": ["g1", "", "g2"],
        },
    )
    source = open_source(manifest)
    assert source.name == f"{tmp_path.name}-list"
    assert source.location == manifest.as_posix()
    assert source.classes == ("cat", "dog")
    assert source.items == [
        ("a.png", 0, "val", "", 1, (tmp_path / "a.png").stat().st_mtime_ns),
        ("missing.gif", -1, "", "g2", -1, 0),
        ("sub/b.jpg", 1, "train", "g1", 3, (tmp_path / "sub/b.jpg").stat().st_mtime_ns),
    ]
    assert source.read(source.items[2]) == b"bbb"
    with pytest.raises(UnreadableImageError, match=r"^no such file$"):
        source.read(source.items[1])


def test_path_alone_is_enough_and_may_lead_anywhere(tmp_path: Path, write: Writer) -> None:
    (tmp_path / "list").mkdir()
    (tmp_path / "up.jpg").write_bytes(b"up")
    (tmp_path / "abs").write_bytes(b"abs")
    source = open_source(write(tmp_path / "list", {"path": ["../up.jpg", (tmp_path / "abs").as_posix()]}))
    assert [(item.uri, item.label) for item in source.items] == [("../up.jpg", -1), ((tmp_path / "abs").as_posix(), -1)]
    assert [source.read(item) for item in source.items] == [b"up", b"abs"]


def test_an_image_that_is_named_absolutely_counts_as_changed_when_it_is(tmp_path: Path) -> None:
    image = tmp_path / "photos/a.png"
    image.parent.mkdir()
    image.write_bytes(b"first")
    (tmp_path / "list").mkdir()
    manifest = write_csv(tmp_path / "list", {"path": [str(image), "../photos/a.png"]})
    before = open_source(manifest).items
    assert [(item.size, item.mtime_ns) for item in before] == [(5, image.stat().st_mtime_ns)] * 2
    image.write_bytes(b"second")
    assert {item.size for item in open_source(manifest).items} == {6}


def test_a_folder_as_a_row_is_unreadable(tmp_path: Path, write: Writer) -> None:
    (tmp_path / "folder.jpg").mkdir()
    source = open_source(write(tmp_path, {"path": ["folder.jpg"]}))
    with pytest.raises(UnreadableImageError, match=r"^not a regular file$"):
        source.read(source.items[0])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"file": ["a"], "label": ["x"]}, r"expected a column 'path', found file, label"),
        ({"paht": ["a"]}, r"expected a column .path., found paht"),
        ({"path": []}, r"expected at least one row below the header, found none"),
        ({"path": ["a", "b", "./a"]}, r"expected each path once, found 'a' in rows \d and \d"),
        ({"path": ["x/../a", "a"]}, r"expected each path once, found 'a'"),
        ({"path": ["a", " "]}, r"expected a path in row \d, found none"),
        ({"path": ["a"], "split": ["trian"]}, r"expected split.*'trian'; did you mean train"),
        ({"path": ["a"], "split": ["dev"]}, r"expected split train, val, test or none in row \d, found 'dev'"),
        ({"path": ["a"], " Path": ["b"]}, r"expected one column 'path', found 2"),
    ],
)
def test_refusals_are_one_line(tmp_path: Path, write: Writer, table: dict[str, list[str]], message: str) -> None:
    if write is write_jsonl and not any(table.values()):
        message = "found an empty file"  # there is no header without rows
    with pytest.raises(SourceError, match=message) as caught:
        open_source(write(tmp_path, table))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "found an empty file"),
        (b"\n\n", "found an empty file"),
        ("path\nü.jpg\n".encode("latin-1"), r"expected UTF-8 text, found another encoding"),
        ("path\na.jpg\n".encode("utf-16"), r"expected UTF-8 text"),
        ("path\na.jpg\n".encode("utf-16-le"), r"found a NUL character"),
        (b"path\na\0b.jpg\n", r"without NUL"),
        (b'\n\npath\n"a.jpg\n', r"expected a comma-separated table, line 4"),
        (b"path,label\na.jpg\n", r"expected 2 fields in row 2, found 1"),
        (b"path\na,b.jpg\n", r"expected 1 fields in row 2, found 2"),
        (b"file;label\na.jpg;x\n", r"expected a column 'path', found file, label"),
        (b'path;label\n"a.jpg;x\n', r"expected a semicolon-separated table, line"),
        (b"path," + b"x" * 200_000 + b"\na.jpg,b\n", r"expected a comma-separated table, line 1: field larger than"),
    ],
)
def test_csv_that_is_no_table(tmp_path: Path, data: bytes, message: str) -> None:
    manifest = tmp_path / "bad.CSV"
    manifest.write_bytes(data)
    with pytest.raises(SourceError, match=message) as caught:
        open_source(manifest)
    assert "\n" not in str(caught.value)


def test_csv_forms_that_spreadsheets_write(tmp_path: Path) -> None:
    manifest = tmp_path / "m.csv"
    manifest.write_bytes('\ufeffPath,Label\r\n"a, b.jpg","say ""x"""\r\n\r\nü.jpg,y\r\n'.encode())
    source = open_source(manifest)
    assert [(item.uri, source.classes[item.label]) for item in source.items] == [
        ("a, b.jpg", 'say "x"'),
        ("ü.jpg", "y"),
    ]


def test_parquet_numbers_and_nulls_become_text(tmp_path: Path) -> None:
    table = {"path": ["a", "b", "c"], "label": pa.array([3.0, float("nan"), None]), "group": pa.array([7, 8, None])}
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    source = open_source(tmp_path / "t.parquet")
    assert source.classes == ("3",)
    assert [(item.label, item.group) for item in source.items] == [(0, "7"), (-1, "8"), (-1, "")]


def test_parquet_with_a_nul_in_a_path(tmp_path: Path) -> None:
    pq.write_table(pa.table({"path": ["a\0b"]}), tmp_path / "t.parquet")
    with pytest.raises(SourceError, match="without NUL"):
        open_source(tmp_path / "t.parquet")


def test_damaged_parquet(tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(SourceError, match="expected a Parquet table") as caught:
        open_source(tmp_path / "t.parquet")
    assert "\n" not in str(caught.value)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = write_parquet(tmp_path, {"path": ["a"]})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(SourceError, match=r"pip install 'thawline\[parquet\]'"):
        open_source(manifest)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"path": "a"}\n{"path": \n', r"expected a JSON object in line 2, found no JSON"),
        ('{"path": "a"}\n[1]\n', r"expected a JSON object in line 2, found list"),
        ('{"path": ["a"]}\n', r"expected numbers or text for 'path' in line 1, found several"),
        ('{"path": "a", "label": {}}\n', r"expected numbers or text for 'label' in line 1, found several"),
        ('{"label": 1}\n', r"expected a column 'path', found label"),
        ("", r"found an empty file"),
    ],
)
def test_jsonl_that_is_no_table(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(SourceError, match=message) as caught:
        open_source(tmp_path / "a.jsonl")
    assert "\n" not in str(caught.value)


def test_jsonl_numbers_and_missing_values_become_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"path": 1, "label": 3.0}\n{"group": 7, "path": "b", "box": [1, 2]}\n')
    source = open_source(tmp_path / "a.jsonl")
    assert source.classes == ("3",)
    assert [item[:4] for item in source.items] == [("1", 0, "", ""), ("b", -1, "", "7")]


@given(st.binary(max_size=60))
def test_any_bytes_are_a_source_or_one_line(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    manifest = tmp_path_factory.getbasetemp() / "fuzz.csv"
    manifest.write_bytes(b"path,label\n" + data)
    try:
        uris = [item.uri for item in open_source(manifest).items]
    except SourceError as error:
        uris, message = [], str(error)
        assert message.splitlines() == [message]
    assert uris == sorted(set(uris))


@pytest.mark.parametrize(("column", "wanted"), [("class", "label"), ("target", "label"), ("subset", "split")])
def test_columns_that_may_be_meant_are_named(tmp_path: Path, write: Writer, column: str, wanted: str) -> None:
    others = {name: ["train"] for name in ("label", "split") if name != wanted}
    (note,) = open_source(write(tmp_path, {"path": ["a"], column: ["x"], **others})).notes
    assert f"no column '{wanted}' but '{column}'" in note
    assert open_source(write(tmp_path, {"path": ["a"], column: ["x"], **others, wanted: ["test"]})).notes == []
