"""Folders as sources: what is a split, what is a class, what is passed over."""

from __future__ import annotations

import io
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.errors import SourceError, UnreadableImageError
from pipeline.images.decode import decode
from pipeline.images.sources.folder import splits_and_classes, walk
from pipeline.images.sources.registry import open_source


def make(root: Path, *uris: str) -> Path:
    for uri in uris:
        file = root / uri
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(uri.encode())
    return root


def listed(root: Path) -> dict[str, tuple[str, str]]:
    """Uri to split and class name, through the front door."""
    source = open_source(root)
    return {item.uri: (item.split, source.classes[item.label] if item.label >= 0 else "") for item in source.items}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param(
            ["cat/1.jpg", "dog/2.PNG"], {"cat/1.jpg": ("", "cat"), "dog/2.PNG": ("", "dog")}, id="class folders"
        ),
        pytest.param(["b.jpg", "a.tiff"], {"a.tiff": ("", ""), "b.jpg": ("", "")}, id="flat"),
        pytest.param(["cat/x/y/1.jpg"], {"cat/x/y/1.jpg": ("", "cat")}, id="deeper nesting belongs to the class"),
        pytest.param(
            ["cat/1.jpg", "logo.png"], {"cat/1.jpg": ("", "cat"), "logo.png": ("", "")}, id="image beside classes"
        ),
        pytest.param(
            ["train/cat/1.jpg", "train/2.jpg", "val/3.jpg"],
            {"train/2.jpg": ("train", ""), "train/cat/1.jpg": ("train", "cat"), "val/3.jpg": ("val", "")},
            id="images directly in a split have no class",
        ),
        pytest.param(
            ["train/1.jpg", "bus/2.jpg"],
            {"bus/2.jpg": ("", "bus"), "train/1.jpg": ("", "train")},
            id="train, the vehicle",
        ),
        pytest.param(
            ["cat/1.jpg", "notes/readme.txt", "empty.d/x.md"], {"cat/1.jpg": ("", "cat")}, id="no image, no class"
        ),
        pytest.param(
            ["cat/1.jpg", "cat/.2.jpg", ".git/3.jpg", "__MACOSX/cat/._1.jpg"], {"cat/1.jpg": ("", "cat")}, id="hidden"
        ),
        pytest.param(["train/train/1.jpg"], {"train/train/1.jpg": ("train", "train")}, id="a class called train"),
    ],
)
def test_layouts(tmp_path: Path, files: list[str], expected: dict[str, tuple[str, str]]) -> None:
    assert listed(make(tmp_path, *files)) == expected


@pytest.mark.parametrize(
    ("word", "split"),
    [
        ("train", "train"),
        ("Training", "train"),
        ("val", "val"),
        ("VALID", "val"),
        ("validation", "val"),
        ("test", "test"),
        ("Testing", "test"),
    ],
)
def test_every_split_word(tmp_path: Path, word: str, split: str) -> None:
    assert listed(make(tmp_path, f"{word}/cat/1.jpg")) == {f"{word}/cat/1.jpg": (split, "cat")}


def test_val_and_valid_are_one_split_and_classes_are_shared(tmp_path: Path) -> None:
    source = open_source(make(tmp_path, "train/b/1.jpg", "train/a/2.jpg", "val/a/3.jpg", "valid/c/4.jpg"))
    assert source.classes == ("a", "b", "c")
    assert [(item.uri, item.split, item.label) for item in source.items] == [
        ("train/a/2.jpg", "train", 0),
        ("train/b/1.jpg", "train", 1),
        ("val/a/3.jpg", "val", 0),
        ("valid/c/4.jpg", "val", 2),
    ]


def test_classes_are_in_plain_text_order(tmp_path: Path) -> None:
    assert open_source(make(tmp_path, "10/a.jpg", "9/a.jpg", "Z/a.jpg", "a/a.jpg")).classes == ("10", "9", "Z", "a")


def test_split_folders_beside_others_are_refused(tmp_path: Path) -> None:
    make(tmp_path, "train/cat/1.jpg", "samples/2.jpg")
    with pytest.raises(SourceError, match=r"found split train beside samples.*move or rename") as caught:
        open_source(tmp_path)
    assert "\n" not in str(caught.value)


def test_items_carry_size_and_time(tmp_path: Path) -> None:
    make(tmp_path, "cat/1.jpg")
    os.utime(tmp_path / "cat/1.jpg", ns=(5, 1_234_567_890_123_456_789))
    (item,) = open_source(tmp_path).items
    assert (item.size, item.mtime_ns, item.group) == (9, 1_234_567_890_123_456_789, "")


def test_source_knows_its_name_and_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = make(tmp_path / "photos", "a.jpg")
    (tmp_path / "link").symlink_to(photos)
    monkeypatch.chdir(photos)
    for path in (photos, str(photos), ".", "../photos", photos / "..", "../link"):
        source = open_source(path)
        expected = {"..": tmp_path}.get(Path(path).name, tmp_path / "link" if path == "../link" else photos)
        assert (source.name, source.location) == (expected.name, expected.as_posix())


def test_read_gives_the_bytes(tmp_path: Path) -> None:
    source = open_source(make(tmp_path, "cat/1.jpg", "dog/2.jpg"))
    assert [source.read(item) for item in source.items] == [b"cat/1.jpg", b"dog/2.jpg"]


def test_a_file_that_vanishes_is_unreadable(tmp_path: Path) -> None:
    source = open_source(make(tmp_path, "a.jpg"))
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(UnreadableImageError, match=r"^no such file$"):
        source.read(source.items[0])


def test_a_file_without_permission_is_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(make(tmp_path, "a.jpg"))

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)  # root may read everything, so chmod would not do
    with pytest.raises(UnreadableImageError, match=r"^permission denied$"):
        source.read(source.items[0])


def test_links_are_followed_and_cycles_are_not(tmp_path: Path) -> None:
    elsewhere = make(tmp_path / "store", "deep/1.jpg", "single.jpg")
    root = make(tmp_path / "root", "cat/2.jpg")
    (root / "dog").symlink_to(elsewhere / "deep")
    (root / "cat/3.jpg").symlink_to(elsewhere / "single.jpg")
    (root / "cat/again").symlink_to(root / "cat")
    (root / "cat/up").symlink_to(root)
    (root / "cat/further").symlink_to(tmp_path)
    assert listed(root) == {"cat/2.jpg": ("", "cat"), "cat/3.jpg": ("", "cat"), "dog/1.jpg": ("", "dog")}


def test_two_folders_that_link_to_each_other_end(tmp_path: Path) -> None:
    make(tmp_path, "a/1.jpg", "b/2.jpg")
    (tmp_path / "a/to_b").symlink_to(tmp_path / "b")
    (tmp_path / "b/to_a").symlink_to(tmp_path / "a")
    assert set(listed(tmp_path)) == {"a/1.jpg", "a/to_b/2.jpg", "b/2.jpg", "b/to_a/1.jpg"}


def test_a_link_to_nowhere_or_itself_is_an_unreadable_row(tmp_path: Path) -> None:
    make(tmp_path, "ok.jpg")
    (tmp_path / "broken.jpg").symlink_to("nowhere")
    (tmp_path / "self.jpg").symlink_to("self.jpg")
    source = open_source(tmp_path)
    assert [(item.uri, item.size, item.mtime_ns) for item in source.items if item.size < 0] == [
        ("broken.jpg", -1, 0),
        ("self.jpg", -1, 0),
    ]
    for item in source.items:
        if item.size < 0:
            with pytest.raises(UnreadableImageError):
                source.read(item)


def test_a_pipe_is_not_an_image(tmp_path: Path) -> None:
    make(tmp_path, "ok.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    assert list(listed(tmp_path)) == ["ok.jpg"]


@pytest.mark.parametrize("name", [b"gr\xfcn.jpg", b"gr\xfcn/a.jpg"])
def test_a_name_that_is_not_utf8_is_named(tmp_path: Path, name: bytes) -> None:
    path = tmp_path / os.fsdecode(name)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"x")
    with pytest.raises(SourceError, match=r"UTF-8.*gr\\udcfcn.*rename") as caught:
        open_source(path.parent)
    assert str(caught.value).isascii()


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "cat/1.jpg", "dog/2.jpg")
    scandir = os.scandir

    def refuse_dog(path: Path) -> object:
        if Path(path).name == "dog":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse_dog)
    with pytest.raises(SourceError, match=r"dog: expected a folder that can be listed: Permission denied"):
        open_source(tmp_path)


def test_walk_takes_any_suffix(tmp_path: Path) -> None:
    make(tmp_path, "a.tar", "sub/B.TAR", "c.jpg", "tar")
    others: Counter[str] = Counter()
    found = {item.uri for item in walk(tmp_path, lambda _, extension: extension == ".tar", others)}
    assert found == {"a.tar", "sub/B.TAR"}
    assert others == {".jpg": 1, "without extension": 1}


def test_pictures_that_are_not_read_are_counted_beside_those_that_are(tmp_path: Path) -> None:
    source = open_source(make(tmp_path, "cat/1.jpg", "cat/2.HEIC", "cat/3.heic", "dog/4.CR2", "dog/4.xmp", "note.txt"))
    assert [item.uri for item in source.items] == ["cat/1.jpg"]
    assert source.passed_over == {".heic": 2, ".cr2": 1, ".xmp": 1, ".txt": 1}
    (note,) = source.notes
    assert note.startswith("1 .cr2, 2 .heic, 1 .txt, 1 .xmp passed over")
    assert open_source(tmp_path / "cat/1.jpg").notes == []


def image_bytes(kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 3)).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("name", ["a", "a.jpg_large", "a.jpg?w=300", "a.jpeg.1", "a.apng", "a.mpo", "a.dat"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_what_decodes_is_taken_whatever_its_name(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / name).write_bytes(image_bytes(kind))
    for path, uri in ((tmp_path, f"cat/{name}"), (tmp_path / "cat" / name, name)):
        source = open_source(path)
        assert [item.uri for item in source.items] == [uri]
        assert decode(source.read(source.items[0])).size == (4, 3)
        assert source.notes == []


def test_everything_left_aside_is_counted_by_its_ending(tmp_path: Path) -> None:
    make(tmp_path, "a.jpg", "x.y/README", "b.dcm", "c.DCM", "d.svs", "e.txt")
    others = {
        "f.bin": b"BMW is no bitmap",
        "g.wav": b"RIFF\0\0\0\0WAVE",
        "h.data": b"RIFF\0\0\0\0WAVE",
        "i.doc": b"P1 ",
    }
    for name, data in {**others, "raw.nef": image_bytes("TIFF")}.items():
        (tmp_path / name).write_bytes(data)
    source = open_source(tmp_path)
    assert [item.uri for item in source.items] == ["a.jpg"]
    counts = {
        "without extension": 1,
        ".dcm": 2,
        ".svs": 1,
        ".txt": 1,
        ".bin": 1,
        ".wav": 1,
        ".data": 1,
        ".doc": 1,
        ".nef": 1,
    }
    assert source.passed_over == counts
    assert "2 .dcm" in source.notes[0]
    assert "1 with other extensions" in source.notes[0]


names = st.sampled_from(["cat", "dog", "Train", "test", "valid"])
paths = st.lists(st.lists(names, min_size=1, max_size=3).map("/".join), min_size=1, max_size=8, unique=True)


@given(paths)
def test_place_never_invents_names(uris: list[str]) -> None:
    """Whatever the layout: a class is a folder on the path, a split is the first folder, and files are left alone."""
    files = [f"{uri}/x.jpg" for uri in uris]
    try:
        placed = splits_and_classes(files, Path("root"))
    except SourceError:
        tops = {file.split("/")[0].lower() for file in files}
        assert tops & {"train", "test", "valid"}
        assert tops & {"cat", "dog"}
        return
    for file, (split, label) in zip(files, placed, strict=True):
        folders = file.split("/")[:-1]
        if split:
            assert folders[0].lower().startswith(split)
            folders = folders[1:]
        assert label == (folders[0] if folders else "")


def test_a_sparse_file_is_unreadable_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "a.jpg").open("wb") as file:
        file.truncate(1 << 40)
    source = open_source(tmp_path)
    with pytest.raises(UnreadableImageError, match=r"^1099511627776 bytes, more than 1073741824$"):
        source.read(source.items[0])
