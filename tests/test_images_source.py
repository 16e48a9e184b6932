"""The front door: what is opened as what, and what is refused with which words."""

from __future__ import annotations

import tracemalloc
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from pipeline.errors import SourceError
from pipeline.images.sources import registry
from pipeline.images.sources.items import ImageSource, Item, Items, build_source, sort_source
from pipeline.images.sources.registry import open_source


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "Photo.JPG"
    Image.new("RGB", (4, 4)).save(path)
    return path


def test_a_single_image_has_no_label(photo: Path) -> None:
    source = open_source(photo)
    status = photo.stat()
    assert (source.name, source.location, source.classes) == ("Photo", photo.as_posix(), ())
    assert source.items == [("Photo.JPG", -1, "", "", status.st_size, status.st_mtime_ns)]
    assert source.read(source.items[0]) == photo.read_bytes()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Photo.JPEG", r"found nothing there; did you mean Photo\.JPG"),
        ("notes.txt", r"expected a folder of images.*found another kind of file"),
        (
            "empty",
            r"expected at least one image \(.*\.jpg.*\), found none; 1 \.md passed over.*cannot read them$",
        ),
        (
            "phone",
            r"found none; 1 \.aae, 2 \.heic, 1 \.mov, 1 \.nef passed over.*save pictures among them as \.jpg or \.png$",
        ),
        ("phone/1.HEIC", r"found another kind of file; save it as \.jpg or \.png$"),
        ("x\0y", r"expected a folder of images"),
        ("n" * 5000, r"expected a folder of images"),
        ("Photo.JPG/inside", r"expected a folder of images"),
    ],
)
def test_refusals_are_one_line(tmp_path: Path, photo: Path, name: str, message: str) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/readme.md").write_text("no image")
    (tmp_path / "phone/sub").mkdir(parents=True)
    for name_there in ("1.HEIC", "sub/2.heic", "raw.nef", ".hidden.heic", "1.AAE", "1.mov"):
        (tmp_path / "phone" / name_there).write_bytes(b"no image")
    with pytest.raises(SourceError, match=message) as caught:
        open_source(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_digits_are_scikit_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = open_source("digits")
    truth = load_digits()
    assert (source.name, source.location, len(source.items)) == ("digits", "digits", 1797)
    assert source.classes == tuple("0123456789")
    assert [item.label for item in source.items] == truth.target.tolist()
    assert [item.uri for item in source.items[:2]] == ["digits/0000", "digits/0001"]
    assert {(item.split, item.group, item.mtime_ns) for item in source.items} == {("", "", 0)}
    for number in (0, 7, 1796):
        data = source.read(source.items[number])
        assert len(data) == source.items[number].size
        image = Image.open(BytesIO(data))
        np.testing.assert_allclose(np.asarray(image), truth.images[number] * 255 / 16, atol=0.5)


def test_a_folder_called_digits_comes_first(tmp_path: Path, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "digits").mkdir()
    photo.rename(tmp_path / "digits/a.jpg")
    monkeypatch.chdir(tmp_path)
    assert [item.uri for item in open_source("digits").items] == ["a.jpg"]


@pytest.mark.parametrize("word", ["Digits", "./digits", "digit"])
def test_only_that_word_means_the_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match="did you mean digits"):
        open_source(word)


def test_another_kind_of_source_is_one_opener_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_list(path: Path) -> ImageSource | None:
        if path.suffix != ".list":
            return None
        names = path.read_text().split()
        return build_source(path.stem, path.as_posix(), [(Item(name), name[0]) for name in names], lambda _: b"bytes")

    monkeypatch.setitem(registry._PATHS, "a .list", open_list)
    (tmp_path / "my.list").write_text("b2 a1")
    source = open_source(tmp_path / "my.list")
    assert source.classes == ("a", "b")
    assert [(item.uri, item.label) for item in source.items] == [("a1", 0), ("b2", 1)]
    (tmp_path / "none.list").write_text("")
    with pytest.raises(SourceError, match="expected at least one image"):
        open_source(tmp_path / "none.list")


def test_items_are_a_sequence_that_keeps_columns() -> None:
    made = [Item(f"é{n}", n % 3 - 1, "val" * (n % 2), "g" * n, n, 10**18 + n) for n in range(9)]
    items = Items.of(iter(made))
    assert (len(items), [*items], items[-2]) == (9, made, made[-2])
    assert items == made != Items.of(made[:8])
    assert items[2:7:2] == made[2:7:2]
    assert items[np.array([4, 0])] == [made[4], made[0]]
    assert type(items[3].size) is int
    assert Items.of([]) == []
    with pytest.raises(IndexError):
        items[9]


def test_items_take_little_memory() -> None:
    tracemalloc.start()
    try:
        items = Items.of(Item(f"{n:050d}", size=n, mtime_ns=10**18 + n) for n in range(15_000))
        assert tracemalloc.get_traced_memory()[1] < 350 * len(
            items
        )  # 2 MB of these are independent of how many they are
    finally:
        tracemalloc.stop()


def test_classes_in_two_unicode_forms_are_one() -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    labelled = [(Item("a"), composed), (Item("b"), decomposed), (Item("c"), "th\u00e9")]
    source = build_source("x", "x", labelled, lambda item: b"")
    assert (source.classes, [item.label for item in source.items]) == ((composed, "th\u00e9"), [0, 0, 1])
    assert source.notes == []


@pytest.mark.parametrize(
    "names", [("Cat", "cat"), ("big cat", "bigcat"), ("cat", "cat "), ("\uff21", "a"), ("Straße", "strasse")]
)
def test_classes_that_look_alike_are_named(names: tuple[str, str]) -> None:
    labelled = [(Item(str(number)), name) for number, name in enumerate([*names, "dog"])]
    source = build_source("x", "x", labelled, lambda item: b"")
    assert len(source.classes) == 3, "they are not merged"
    (note,) = source.notes
    assert all(repr(name) in note for name in names)
    assert "dog" not in note


@pytest.mark.parametrize(("time", "stored"), [(10**19, 2**63 - 1), (-(10**19), 1 - 2**63), (5, 5)])
def test_times_that_a_cache_cannot_store_are_clipped(time: int, stored: int) -> None:
    source = build_source("x", "x", [(Item("a", mtime_ns=time), "")], lambda item: b"")
    assert np.array([source.items[0].mtime_ns], np.int64)[0] == stored


def test_empty_splits_and_groups_take_no_memory(tmp_path: Path) -> None:
    uris = [f"{name}/{number}.png" for name in "ba" for number in (2, 0, 1)]
    items = Items.of([Item(uri, label=number // 3, size=number) for number, uri in enumerate(uris)])
    source = sort_source("s", "/s", items, ["b", "a"], lambda item: b"")
    rows = source.items.rows
    assert [column.strides for column in (rows.splits, rows.groups)] == [(0,), (0,)]  # type: ignore[attr-defined]
    wanted = sorted(Item(uri, label=1 - number // 3, size=number) for number, uri in enumerate(uris))
    assert list(source.items) == wanted
    assert list(source.items[1:3]) == wanted[1:3]
