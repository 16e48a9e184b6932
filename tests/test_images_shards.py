"""Tar shards in WebDataset form: samples, labels, splits, and members that are passed over."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import SourceError, UnreadableImageError
from pipeline.images.sources import shards
from pipeline.images.sources.items import split_in
from pipeline.images.sources.registry import open_source
from pipeline.user_folder import user_folder


def write_tar(path: Path, *members: tuple[str, bytes] | tarfile.TarInfo) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for member in members:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member[0])
            data = b"" if isinstance(member, tarfile.TarInfo) else member[1]
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def labels_of(path: Path) -> dict[str, str]:
    source = open_source(path)
    return {item.uri: source.classes[item.label] if item.label >= 0 else "" for item in source.items}


def test_one_shard(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "train-000.tar", ("b.jpg", b"image b"), ("a.png", b"image a"), ("a.cls", b" 3\n"))
    source = open_source(shard)
    time = shard.stat().st_mtime_ns
    assert (source.name, source.location, source.classes) == ("train-000", shard.as_posix(), ("3",))
    assert source.items == [
        ("train-000.tar/a.png", 0, "train", "", 7, time),
        ("train-000.tar/b.jpg", -1, "train", "", 7, time),
    ]
    assert [source.read(item) for item in source.items] == [b"image a", b"image b"]


def test_a_shard_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SETTLED_NS", -1)
    members = (("b/é.jpg", b"image b"), ("a.png", b"image a"), ("a.cls", b"cat"), ("c.txt", b"?"), ("d.x.png", b"d"))
    shard = write_tar(tmp_path / "train-000.tar", *members, ("d.y.cls", b"dog"))
    first, read, before = open_source(shard), shards._read_shard, set(user_folder("shards").iterdir())
    monkeypatch.setattr(shards, "_read_shard", lambda *_: pytest.fail("it was read again"))
    again = open_source(shard)
    assert again.items == first.items
    assert (again.classes, again.notes) == (first.classes, first.notes)
    assert [again.read(item) for item in again.items] == [b"image a", b"image b", b"d"]
    monkeypatch.setattr(shards, "_read_shard", read)
    for kept in before:
        kept.write_bytes(kept.read_bytes()[:-50])
    assert open_source(shard).items == first.items, "what is kept of it is damaged"
    time = shard.stat().st_mtime_ns
    write_tar(shard, ("e.png", b"image e"), ("e.cls", b"dog"))
    os.utime(shard, ns=(time, time + 1))
    assert labels_of(shard) == {"train-000.tar/e.png": "dog"}
    with pytest.raises(UnreadableImageError, match="changed after it was listed"):
        again.read(again.items[0])


def test_a_shard_that_changes_while_it_is_listed_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard, read = write_tar(tmp_path / "a.tar", ("a.png", b"image a")), shards._read_shard

    def read_and_replace(*arguments: Any) -> Any:
        found = read(*arguments)
        write_tar(shard, ("0.png", b"image 0"), ("a.png", b"image A"))
        return found

    monkeypatch.setattr(shards, "_read_shard", read_and_replace)
    source = open_source(shard)
    with pytest.raises(UnreadableImageError, match="changed after it was listed"):
        source.read(source.items[0])
    monkeypatch.setattr(shards, "_read_shard", read)
    assert len(open_source(shard).items) == 2


def test_a_shard_whose_time_was_kept_is_listed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SETTLED_NS", -1)
    shard = write_tar(tmp_path / "a.tar", ("a.png", b"image"), ("a.cls", b"cat"))
    assert open_source(shard).classes == ("cat",)
    before = shard.stat()
    write_tar(shard, ("a.png", b"image"), ("a.cls", b"dog"))
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (shard.stat().st_size, shard.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert shard.stat().st_ctime_ns > before.st_ctime_ns
    assert open_source(shard).classes == ("dog",)


def test_a_folder_of_shards(tmp_path: Path) -> None:
    write_tar(tmp_path / "set/train-0.tar", ("1.jpg", b"x"), ("1.cls", b"cat"))
    write_tar(tmp_path / "set/train-1.tar", ("1.jpg", b"yy"), ("1.cls", b"dog"))
    write_tar(tmp_path / "set/held out/test/0.tar", ("1.jpg", b"zzz"), ("1.json", b'{"label": "cat"}'))
    source = open_source(tmp_path / "set")
    assert (source.name, source.location) == ("set", (tmp_path / "set").as_posix())
    assert [(item.uri, item.label, item.split) for item in source.items] == [
        ("held out/test/0.tar/1.jpg", 0, "test"),
        ("train-0.tar/1.jpg", 0, "train"),
        ("train-1.tar/1.jpg", 1, "train"),
    ]
    assert [source.read(item) for item in source.items] == [b"zzz", b"x", b"yy"]


def test_in_a_folder_images_come_before_shards(tmp_path: Path) -> None:
    write_tar(tmp_path / "backup.tar", ("1.jpg", b"x"))
    (tmp_path / "a.jpg").write_bytes(b"a")
    assert labels_of(tmp_path) == {"a.jpg": ""}


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        (("1.cls", b"7"), "7"),
        (("1.cls", "größe\n".encode()), "größe"),
        (("1.cls", b""), ""),
        (("1.json", b'{"label": 7}'), "7"),
        (("1.json", b'{"label": " cat "}'), "cat"),
        (("1.json", b'{"label": null}'), ""),
        (("1.json", b'{"caption": "a cat"}'), ""),
        (("1.json", b"[1, 2]"), ""),
        (("1.txt", b"a caption"), ""),
        (("2.cls", b"of another sample"), ""),
        (("sub/1.cls", b"of another folder"), ""),
    ],
)
def test_labels(tmp_path: Path, label: tuple[str, bytes], expected: str) -> None:
    assert labels_of(write_tar(tmp_path / "x.tar", ("1.jpg", b"x"), label)) == {"x.tar/1.jpg": expected}


def test_the_class_member_comes_before_json_and_names_reach_to_the_first_dot(tmp_path: Path) -> None:
    shard = write_tar(
        tmp_path / "x.tar",
        ("s/1.json", b'{"label": "json"}'),
        ("s/1.cls", b"cls"),
        ("s/1.left.jpg", b"x"),
        ("s/1.right.png", b"y"),
    )
    assert labels_of(shard) == {"x.tar/s/1.left.jpg": "cls", "x.tar/s/1.right.png": "cls"}


def test_a_label_is_one_class_however_json_writes_it(tmp_path: Path) -> None:
    labels = {"1": b"1", "2": b"1.0", "3": b'"1"', "4": b"0.5", "5": b"NaN"}
    members = [(f"{key}.json", b'{"label": ' + label + b"}") for key, label in labels.items()]
    shard = write_tar(tmp_path / "x.tar", *members, *((f"{key}.jpg", b"x") for key in labels))
    assert list(labels_of(shard).values()) == ["1", "1", "1", "0.5", ""]


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (("1.cls", b"\xff\xfe"), r"expected a label \(number or text\) in 1\.cls, found neither text nor JSON"),
        (("1.json", b"{"), r"found neither text nor JSON"),
        (("1.json", b"[" * 100_000), r"found neither text nor JSON"),
        (("1.json", b'{"label": [1]}'), r"expected a label.*1\.json, found list"),
        (("1.cls", b"x" * (1 << 21)), r"found 2097152 bytes"),
    ],
)
def test_what_is_no_label(tmp_path: Path, member: tuple[str, bytes], message: str) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        open_source(write_tar(tmp_path / "x.tar", ("1.jpg", b"x"), member))
    assert "\n" not in str(caught.value)


def test_members_that_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    shard = write_tar(
        tmp_path / "x.tar",
        ("./good.jpg", b"good"),
        ("../secret.jpg", b"climbs"),
        ("a/../../secret.jpg", b"climbs"),
        ("/secret.jpg", b"absolute"),
        (".hidden.jpg", b"hidden"),
        ("__MACOSX/._good.jpg", b"hidden"),
        link("soft.jpg", "../secret.jpg", tarfile.SYMTYPE),
        link("hard.jpg", "good.jpg", tarfile.LNKTYPE),
        link("pipe.jpg", "", tarfile.FIFOTYPE),
        link("folder.jpg", "", tarfile.DIRTYPE),
        ("notes.txt", b"no image"),
    )
    assert labels_of(shard) == {"x.tar/good.jpg": ""}


def test_of_a_name_that_occurs_twice_the_last_counts(tmp_path: Path) -> None:
    source = open_source(write_tar(tmp_path / "x.tar", ("1.jpg", b"old"), ("1.jpg", b"new!")))
    assert [source.read(item) for item in source.items] == [b"new!"]


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train-000.tar", "train"),
        ("imagenet1k-validation-00.tar", "val"),
        ("Test_3.TAR", "test"),
        ("valid/0001.tar", "val"),
        ("training/train-1.tar", "train"),
        ("train-val-0.tar", ""),
        ("trains-0.tar", ""),
        ("000.tar", ""),
    ],
)
def test_splits_by_name(path: str, split: str) -> None:
    assert split_in(path) == split


def test_a_shard_that_changed_is_not_read(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "x.tar", ("1.jpg", b"x" * 20_000), ("2.jpg", b"y"))
    source = open_source(shard)
    os.utime(shard, ns=(0, 1))
    with pytest.raises(UnreadableImageError, match=r"^the shard changed after it was listed$"):
        source.read(source.items[0])
    shard.unlink()
    with pytest.raises(UnreadableImageError, match=r"^no such shard$"):
        source.read(source.items[0])


@pytest.mark.parametrize("kept", [0, 100, 512, 700, 2048])
def test_a_shard_cut_short_is_named(tmp_path: Path, kept: int) -> None:
    shard = write_tar(tmp_path / "x.tar", ("1.jpg", b"x" * 2000), ("2.jpg", b"y" * 2000))
    shard.write_bytes(shard.read_bytes()[:kept])
    with pytest.raises(SourceError, match=r"x\.tar: expected an uncompressed tar file|expected at least one image"):
        open_source(shard)


def test_a_header_that_asks_for_gigabytes_is_damage(tmp_path: Path) -> None:
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 1 << 40
    (tmp_path / "a.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(SourceError, match="damaged or another file: a header of 1099511627776 bytes"):
        open_source(tmp_path / "a.tar")


def test_a_compressed_shard_is_named(tmp_path: Path) -> None:
    shard = tmp_path / "x.tar"
    with tarfile.open(shard, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("1.jpg"))
    with pytest.raises(SourceError, match="expected an uncompressed tar file") as caught:
        open_source(shard)
    assert "\n" not in str(caught.value)


@settings(max_examples=150)
@given(st.data())
def test_damage_is_one_line_or_the_right_bytes(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp()
    whole = write_tar(folder / "whole.tar", ("1.jpg", b"x"), ("1.cls", b"cat"), ("2.jpg", b"y")).read_bytes()
    damaged = bytearray(whole[: 6 * 512])
    for place, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(damaged) - 1), st.integers(0, 255)), max_size=4)
    ):
        damaged[place] = value
    shard = folder / "damaged.tar"
    shard.write_bytes(damaged)
    try:
        source = open_source(shard)
    except SourceError as error:
        lines = str(error).splitlines()
        assert len(lines) == 1
        return
    for item in source.items:
        assert len(source.read(item)) == item.size


def test_members_are_taken_by_their_header_and_the_others_are_counted(tmp_path: Path) -> None:
    pgm = b"P5\n1 1\n255\n\0"
    source = open_source(write_tar(tmp_path / "x.tar", ("1.jpg_large", pgm), ("1.cls", b"cat"), ("2.dcm", b"DICM")))
    assert [(item.uri, source.classes[item.label]) for item in source.items] == [("x.tar/1.jpg_large", "cat")]
    assert source.passed_over == {".dcm": 1}


@pytest.mark.parametrize(
    "stems", [("2024.05.01", "2024.05.02"), ("set v1.0", "set v1.1"), ("d.x/s0.25_a", "d.x/s0.25_b")]
)
@pytest.mark.parametrize("extension", [".cls", ".json"])
def test_names_with_dots_keep_their_own_labels(tmp_path: Path, stems: tuple[str, str], extension: str) -> None:
    first, second = stems
    labels = {".cls": (b"cat", b"dog"), ".json": (b'{"label": "cat"}', b'{"label": "dog"}')}[extension]
    members = [
        (first + ".jpg", b"x"),
        (second + ".jpg", b"y"),
        (first + extension, labels[0]),
        (second + extension, labels[1]),
    ]
    expected = {f"x.tar/{first}.jpg": "cat", f"x.tar/{second}.jpg": "dog"}
    assert labels_of(write_tar(tmp_path / "x.tar", *members)) == expected
    alone = write_tar(tmp_path / "y.tar", *members[:3])
    assert labels_of(alone) == {f"y.tar/{first}.jpg": "cat", f"y.tar/{second}.jpg": ""}, "no label of another image"


def test_images_that_a_label_of_their_sample_does_not_reach_are_named(tmp_path: Path) -> None:
    members = [("d/000.left.jpg", b"x"), ("d/000.target.cls", b"cat"), ("001.jpg", b"y"), ("002.left.jpg", b"z")]
    source = open_source(write_tar(tmp_path / "x.tar", *members, ("002.json", b"{}")))
    assert {item.label for item in source.items} == {-1}
    (note,) = source.notes
    assert note == (
        "1 images such as x.tar/d/000.left.jpg have no label, though a label has the same name up to the first dot: "
        "if it is theirs, call it 000.cls"
    )


@pytest.mark.parametrize("names", [("1.cls", "1.cls"), ("1.a.cls", "1.b.cls")])
def test_two_labels_for_one_image_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    first, second = names
    with pytest.raises(SourceError, match=r"expected one .*'cat' and 'dog'"):
        open_source(write_tar(tmp_path / "x.tar", ("1.jpg", b"x"), (first, b"cat"), (second, b"dog")))
    same = write_tar(tmp_path / "y.tar", ("1.jpg", b"x"), (first, b"cat"), (second, b"cat"))
    assert labels_of(same) == {"y.tar/1.jpg": "cat"}
