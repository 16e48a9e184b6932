from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from features_cache import DONE, CacheError, CacheWriter, DamagedCacheError, LayerInfo, Rows, open_cache, parse_json
from features_cache.lock import WriterLock

ROOT = Path(__file__).resolve().parents[1]


def harness(name: str, *arguments: object) -> str:
    """Run one of the harnesses in ``benchmarks/``, which start processes of their own; return what it prints."""
    command = [sys.executable, str(ROOT / "benchmarks" / name), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300, env=environment)
    return done.stdout


def test_kills_at_random_moments_lose_nothing_that_was_marked_done() -> None:
    counts = json.loads(harness("kills.py", "--kills", 8, "--rows", 1500, "--extract", 0))["writers"]
    nothing = ("rows_lost", "files_that_failed_to_open", "wrong_rows", "left_incomplete")
    assert {name: counts[name] for name in nothing} == dict.fromkeys(nothing, 0)
    assert counts["rows_computed"] >= 1400
    assert counts["rows_recomputed"] < 1500, "a killed writer loses what came since its last commit, not all"


def fuzzed(*arguments: object) -> dict[str, dict[str, int]]:
    """Run `fuzz.py` in a short form, which fails on any error that is not ours; return the rows of its table."""
    head, _, *rows = [line.strip("| ").split(" | ") for line in harness("fuzz.py", *arguments).splitlines()]
    return {row[0]: dict(zip(head[1:], map(int, row[1:]), strict=True)) for row in rows}


def test_damage_is_refused_or_harmless_outside_the_arrays_and_named_inside() -> None:
    counts = fuzzed("structure", "rows", "--cases", 500)
    assert counts["structure"]["refused"] > 475
    assert counts["rows"]["read"] == 500


def test_forged_files_of_every_kind_are_read_or_refused_in_one_line() -> None:
    kinds = ("images", "caches", "parts", "heads", "networks", "plans", "runs", "manifests", "shards")
    packed = ("json_manifests", "archives", "gzipped_shards", "tables")
    for kind, counts in fuzzed(*kinds, *packed, "--cases", 12).items():
        assert counts["read"] + counts["refused"] == 12, kind
        assert counts["read"] > 0 < counts["refused"], kind


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "1e400", "9" * 400, "[" * 100_000, b"\xff", '"a', ""])
def test_what_is_no_strict_json_is_one_error(text: str | bytes) -> None:
    with pytest.raises(ValueError, match="expected JSON: "):
        parse_json(text)


def test_what_comes_from_a_file_cannot_break_the_line_of_a_message() -> None:
    assert str(CacheError("no layer a\nb\x1b[2J\u2028\ud800é")) == "no layer a\\nb\\x1b[2J\\u2028\\ud800é"


LIMITED = """
import resource, sys
import numpy as np
from features_cache import CacheError, CacheWriter, LayerInfo, Rows
path, when, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
def limit_files(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
def write(writer, rows):
    k = np.asarray(rows)
    writer.write(k, {"a": np.outer(k, np.arange(50))}, np.zeros((len(k), 16)))
rows = Rows([str(i) for i in range(100)], np.zeros(100, int), [""] * 100, [""] * 100, *np.ones((2, 100), int))
try:
    if when == "create":
        limit_files(limit)
    with CacheWriter.create(path, rows, ["c"], [LayerInfo("a", 50, "float32", {}, "f")], {}, {}) as writer:
        write(writer, range(10))
        writer.commit()
        array = writer.cache.header.arrays["/features/a"]
        limit_files(array.offset + 60 * array.row_bytes)
        write(writer, range(50, 90))
except CacheError as error:
    print(error)
"""


@pytest.mark.parametrize(("when", "limit"), [("create", 20_000), ("create", 560_000), ("write", 0)])
def test_a_file_size_limit_is_one_clear_line_and_the_next_run_goes_on(tmp_path: Path, when: str, limit: int) -> None:
    path = tmp_path / "a.h5"
    command = [sys.executable, "-c", LIMITED, str(path), when, str(limit)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert len(output.splitlines()) == 1
    assert "file-size limit" in output
    if when == "create":
        assert list(tmp_path.iterdir()) == []
        return
    assert np.flatnonzero(open_cache(path).states == DONE).tolist() == list(range(10))
    with CacheWriter.resume(path) as writer:
        k = writer.pending()
        writer.write(k, {"a": np.outer(k, np.arange(50))}, np.zeros((len(k), 16)))
    file = open_cache(path)
    np.testing.assert_array_equal(file.matrix("a"), np.outer(np.arange(100), np.arange(50)))
    assert (file.states == DONE).all()


DISK = """
import sys
import numpy as np
from features_cache import CacheError, CacheWriter, LayerInfo, Rows
path, count, full = sys.argv[1], int(sys.argv[2]), sys.argv[3]
rows = Rows([str(i) for i in range(count)], np.zeros(count, int), *[[""] * count] * 2, *np.ones((2, count), int))
try:
    with CacheWriter.create(path, rows, ["c"], [LayerInfo("a", 50, "float32", {}, "f")], {}, {}) as writer:
        if full:
            try:
                open(full, "wb").write(bytes(1 << 22))
            except OSError as error:
                print("full:", error.strerror)
        k = np.arange(count)
        writer.write(k, {"a": np.outer(k, np.arange(50))}, np.zeros((count, 16)))
    print("complete")
except CacheError as error:
    print(error)
"""


@pytest.mark.parametrize(("count", "expected"), [(9000, "GB are free"), (4000, "full: No space left|complete")])
def test_a_real_disk_that_is_full_shows_before_anything_is_computed(tmp_path: Path, count: int, expected: str) -> None:
    inside = f"{tmp_path}/a.h5 {count} {tmp_path}/filler"
    mount = f"mount -t tmpfs -o size=3m none {tmp_path} && exec {sys.executable} -c '{DISK}' {inside}"
    alone = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "mount -t tmpfs none /mnt"], check=False).returncode:
        pytest.skip("this system lets nobody mount a file system of their own")
    output = subprocess.run([*alone, mount], capture_output=True, text=True, check=True, timeout=60).stdout
    assert len(output.splitlines()) == len(expected.split("|"))
    for part in expected.split("|"):
        assert part in output


def small(path: Path, n: int = 30) -> Path:
    rows = Rows([f"{i}.png" for i in range(n)], np.arange(n) % 2, ["train"] * n, [""] * n, *np.ones((2, n), int))
    layers = [LayerInfo("a", 6, "float32", {"x": 1}, "f"), LayerInfo("b", 3, "float16", {}, "g")]
    with CacheWriter.create(path, rows, ["cat", "dog"], layers, {"source": "s"}, {"q": 1}) as writer:
        writer.begin_run({"engine": "torch"})
        k = np.arange(0, n, 2)
        features = {"a": np.outer(k, np.arange(6)), "b": np.outer(k, [1, 2, 3])}
        writer.write(k, features, np.repeat(k, 16).reshape(-1, 16))
    return path


def test_a_disk_that_fills_up_loses_no_committed_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = small(tmp_path / "a.h5")
    writer = CacheWriter.resume(path)
    k = writer.pending()
    writer.write(k, {"a": np.ones((15, 6)), "b": np.ones((15, 3))}, np.zeros((15, 16)))

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(CacheError, match="the disk is full"):
            writer.commit()
    assert np.flatnonzero(open_cache(path).states).tolist() == list(range(0, 30, 2))
    writer.close()  # commits what could not be committed before
    assert (open_cache(path).states == DONE).all()


def test_a_lock_that_cannot_be_taken_whole_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(CacheError, match="the disk is full"):
            WriterLock(tmp_path / "a.h5")
    WriterLock(tmp_path / "a.h5").release()


def test_a_read_only_folder_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = small(tmp_path / "a.h5")

    def refused(*_: object, **__: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refused)
        with pytest.raises(CacheError, match="read-only; choose another folder"):
            CacheWriter.resume(path)
    CacheWriter.resume(path).close()


Change = Callable[[dict[str, Any]], object]


def forge(path: Path, change: Change, behind: int = 0) -> Path:
    """Change the table, append bytes, and give the file the right digest, as an attacker would."""
    data = path.read_bytes() + bytes(behind)
    line, rest = data[: data.index(b"\n") + 1], data[data.index(b"\n") + 1 :]
    magic, version, size, checked, file_bytes, _ = line.split()
    table = json.loads(rest[: int(size)])
    change(table)
    file_bytes = str(len(data)).encode()
    text = json.dumps(table).encode().ljust(int(size))
    head = b" ".join([magic, version, str(len(text)).encode(), checked, file_bytes]) + b" "
    assert len(text) < 16_000  # stays in the user block
    body = text + data[len(head) + 33 + len(text) : int(checked)]
    digest = hashlib.blake2b(head + body, digest_size=16).hexdigest().encode()
    path.write_bytes(head + digest + b"\n" + body + data[int(checked) :])
    return path


def put(*keys: Any) -> Change:
    *way, last, value = keys

    def change(table: dict[str, Any]) -> None:
        place: Any = table
        for key in way:
            place = place[key]
        place[last] = value

    return change


def shift(name: str, by: int) -> Change:
    return lambda table: table["arrays"][name].update(offset=table["arrays"][name]["offset"] + by)


FORGERIES: dict[str, Change] = {
    "offset outside the file": put("arrays", "/features/a", "offset", 1 << 50),
    "negative offset": put("arrays", "/features/a", "offset", -8),
    "offset in the structure": put("arrays", "/rows/size", "offset", 2048),
    "offset no number": put("arrays", "/rows/size", "offset", True),
    "overlap": shift("/rows/size", -8),
    "behind the end": shift("/rows/state", 1),
    "huge shape": put("arrays", "/features/a", "shape", [1 << 55, 6]),
    "shape of floats": put("arrays", "/features/a", "shape", [30.0, 6]),
    "shape no list": put("arrays", "/features/a", "shape", 30),
    "object dtype": put("arrays", "/features/a", "dtype", "|O"),
    "other dtype": put("arrays", "/rows/label", "dtype", "<f8"),
    "text width": put("arrays", "/rows/uri", "dtype", "|S999999"),
    "no rows": put("rows", 0),
    "other rows": put("rows", 31),
    "rows a text": put("rows", "30"),
    "no layers": put("layers", []),
    "dim": put("layers", 0, "dim", 7),
    "layer name": put("layers", 0, "name", "../a"),
    "layer twice": put("layers", 1, "name", "a"),
    "layer dtype": put("layers", 0, "dtype", "object"),
    "layers no list": put("layers", {"a": 1}),
    "an array more": put("arrays", "/x", {"offset": 1 << 16, "dtype": "<f4", "shape": [1]}),
    "an array less": lambda table: table["arrays"].pop("/rows/run"),
    "handles no object": put("handles", [1]),
    "newline in a handle": put("handles", "source", "a\nb"),
}


@pytest.mark.parametrize("case", FORGERIES)
def test_a_forged_table_is_refused(tmp_path: Path, case: str) -> None:
    with pytest.raises(DamagedCacheError, match="contradicts the format") as caught:
        open_cache(forge(small(tmp_path / "a.h5"), FORGERIES[case]))
    assert "\n" not in str(caught.value)


def test_a_forged_table_without_contradiction_opens(tmp_path: Path) -> None:
    file = open_cache(forge(small(tmp_path / "a.h5"), put("handles", {"source": "z"})))
    assert file.handles == {"source": "z"}
    assert file.classes == ("cat", "dog")
    np.testing.assert_array_equal(file.matrix("b")[4], [4, 8, 12])


@pytest.mark.parametrize("by", [0, 1, 4])
def test_an_array_may_lie_anywhere_but_off_its_alignment(tmp_path: Path, by: int) -> None:
    path = small(tmp_path / "a.h5")
    end = -(-path.stat().st_size // 8) * 8
    forge(path, put("arrays", "/rows/size", "offset", end + by), behind=300)
    if by == 0:
        assert open_cache(path).sizes.tolist() == [0] * 30
    else:
        with pytest.raises(DamagedCacheError, match="not aligned"):
            open_cache(path)


def other_version(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"thawline-cache 1 ", b"thawline-cache 2 ", 1))


def plain_hdf5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["a"] = h5py.ExternalLink("/etc/passwd", "/")


FORGED_LINE = b"thawline-cache 1 9 999999999 9 " + b"a" * 32 + b"\n"
WRONG_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "another version": (other_version, "format version 2, this release reads version 1"),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "cut short"),
    "cut in the table": (lambda path: path.write_bytes(path.read_bytes()[:200]), "cut short"),
    "extended": (lambda path: path.write_bytes(path.read_bytes() + b"x"), "extended"),
    "empty": (lambda path: path.write_bytes(b""), "not a feature cache"),
    "text": (lambda path: path.write_text("hello\n" * 9), "not a feature cache"),
    "another HDF5 file": (plain_hdf5, "HDF5 file of something else"),
    "first line only": (lambda path: path.write_bytes(b"thawline-cache x\n"), "first line is damaged"),
    "a forged size": (lambda path: path.write_bytes(FORGED_LINE), "contradict each other"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "not a regular file"),
    "nothing": (lambda path: path.unlink(), "no such file"),
    "a pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "not a regular file"),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_other_files_are_refused_with_a_reason(tmp_path: Path, case: str) -> None:
    spoil, message = WRONG_FILES[case]
    path = small(tmp_path / "a.h5")
    spoil(path)
    with pytest.raises(CacheError, match=message) as caught:
        open_cache(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(CacheError, match=message):
        CacheWriter.resume(path)
    assert not path.with_name("a.h5.lock").exists()


LINKS: list[Callable[[Path, Path], None]] = [
    lambda name, kept: name.symlink_to(kept),
    lambda name, kept: name.hardlink_to(kept),
    lambda name, kept: name.symlink_to(kept.with_name("not there yet")),
]


@pytest.mark.parametrize("link", LINKS, ids=["symbolic", "hard", "dangling"])
@pytest.mark.parametrize("ending", ["lock", "tmp"])
def test_nothing_is_written_through_a_link_in_a_strangers_folder(
    tmp_path: Path, ending: str, link: Callable[[Path, Path], None]
) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "cache").mkdir()
    kept, cache = tmp_path / "own" / "letter.txt", tmp_path / "cache" / "a.h5"
    kept.write_text("dear")
    name = cache.with_name(f"a.h5.{ending}")
    link(name, kept)
    rows = Rows(["a.png"], np.array([0]), [""], [""], np.array([1]), np.array([1]))
    layers = [LayerInfo("a", 2, "float32", {}, "f")]
    if ending == "tmp":  # an interrupted writer leaves such a file: it is replaced
        CacheWriter.create(cache, rows, ["x"], layers, {}, {}).close()
        assert not cache.is_symlink()
        assert open_cache(cache).n_rows == 1
    else:
        with pytest.raises(CacheError, match=r"a\.h5\.lock: it is a link or no regular file; remove it"):
            CacheWriter.create(cache, rows, ["x"], layers, {}, {})
        assert not cache.exists()
        assert name.is_symlink() == (link is not LINKS[1])
    assert kept.read_text() == "dear"
    assert [path.name for path in kept.parent.iterdir()] == ["letter.txt"]


def test_a_pipe_under_the_name_of_the_lock_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.h5.lock")
    with pytest.raises(CacheError, match="no regular file"):
        WriterLock(tmp_path / "a.h5")
