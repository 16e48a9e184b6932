from __future__ import annotations

import hashlib
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from features_cache import (
    DONE,
    UNREADABLE,
    AmbiguousCacheError,
    CacheError,
    CacheFile,
    CacheWriter,
    Catalog,
    DamagedCacheError,
    Donors,
    LayerInfo,
    Rows,
    drop_redundant,
    grow,
    open_cache,
    prune,
    same_rows,
    superseded,
    verify,
)
from features_cache.catalog import superseded_files
from features_cache.grow import match_rows, set_aside
from features_cache.ledger import Ledger

LAYERS = [LayerInfo("a", 4, "float32", {}, "f"), LayerInfo("b", 2, "float16", {}, "g")]
Source = dict[str, tuple[str, int]]  # uri -> content, label


def digest_of(content: str) -> bytes:
    return hashlib.blake2b(content.encode(), digest_size=16).digest()


def features_of(content: str) -> dict[str, NDArray[np.float32]]:
    seed = int.from_bytes(digest_of(content)[:4])
    made = np.random.default_rng(seed).integers(-99, 99, 6).astype(np.float32)
    return {"a": made[:4], "b": made[4:]}


def rows_of(source: Source) -> Rows:
    """The images as a source lists them; equal sizes and times do not tell them apart, as in a copied folder."""
    n, contents = len(source), [content for content, _ in source.values()]
    labels = np.array([label for _, label in source.values()], np.int64)
    sizes = np.array([len(content) for content in contents], np.int64)
    return Rows(list(source), labels, ["train"] * n, [""] * n, sizes, np.full(n, 17))


def compute(writer: CacheWriter, source: Source) -> list[str]:
    """Compute the pending rows and return what was read; contents that begin with ``bad`` are no images."""
    items, read = list(source.values()), []
    for row in writer.pending().tolist():
        content = items[row][0]
        digest = np.frombuffer(digest_of(content), np.uint8)
        if content.startswith("bad"):
            writer.fail(row, "no image", digest)
        else:
            features = {name: features_of(content)[name][None] for name in writer.cache.layers}
            writer.write([row], features, digest[None])
        read.append(content)
    return read


def make(path: Path, source: Source, layers: list[LayerInfo] = LAYERS, handles: dict[str, str] | None = None) -> Path:
    with CacheWriter.create(path, rows_of(source), ["x", "y"], layers, handles or {}, {"q": 1}) as writer:
        writer.begin_run({"engine": "torch"})
        compute(writer, source)
    return path


def regrow(path: Path, source: Source, **options: Any) -> list[str]:
    with grow(path, rows_of(source), ["x", "y"], LAYERS, {}, {"q": 2}, **options) as writer:
        return compute(writer, source)


def check(file: CacheFile, source: Source) -> None:
    assert file.uris.tolist() == list(source)
    assert file.labels.tolist() == [label for _, label in source.values()]
    for row, (content, _) in enumerate(source.values()):
        assert file.digests[row].tobytes() == digest_of(content)
        assert file.states[row] == (UNREADABLE if content.startswith("bad") else DONE)
        if file.states[row] == DONE:
            for name, value in features_of(content).items():
                np.testing.assert_array_equal(file.matrix(name)[row], value)
    assert verify(file.path).sound


BASE: Source = {f"{i}.png": (f"image {i}", i % 2) for i in range(8)} | {"bad.png": ("bad bytes", 0)}
CHANGES: dict[str, tuple[Source, list[str]]] = {
    "added": (BASE | {"new.png": ("image new", 1)}, ["image new"]),
    "added in front": ({"0.jpg": ("image new", 1)} | BASE, ["image new"]),
    "removed": ({k: v for k, v in BASE.items() if k != "3.png"}, []),
    "edited": (BASE | {"3.png": ("image edited", 1)}, ["image edited"]),
    "relabelled": ({k: (v, 1 - label) for k, (v, label) in BASE.items()}, []),
    "reordered": (dict(reversed(BASE.items())), []),
    "mended": (BASE | {"bad.png": ("image mended", 0)}, ["image mended"]),
    "a longer name": ({"0" * 999: ("image new", 1)} | BASE, ["image new"]),
    "renamed": ({f"moved-{k}" if k == "0.png" else k: v for k, v in BASE.items()}, ["image 0"]),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_changed_source_costs_only_what_is_new(tmp_path: Path, case: str) -> None:
    source, computed = CHANGES[case]
    path = make(tmp_path / "a.h5", BASE)
    assert same_rows(open_cache(path), rows_of(BASE), ["x", "y"])
    assert not same_rows(open_cache(path), rows_of(source), ["x", "y"])
    assert regrow(path, source) == computed
    check(open_cache(path), source)
    check(open_cache(tmp_path / "a.superseded-1.h5"), BASE)
    assert same_rows(open_cache(path), rows_of(source), ["x", "y"])
    assert [run["engine"] for run in open_cache(path).runs] == ["torch"]
    assert open_cache(path).request == {"q": 2}


def test_one_long_name_does_not_widen_all(tmp_path: Path) -> None:
    names = [*(f"{number:06d}" for number in range(20_000)), "x" * 4000]
    zeros, none = np.zeros(len(names), np.int64), [""] * len(names)
    rows = Rows(names[:-1], zeros[1:], none[1:], none[1:], zeros[1:], zeros[1:])
    longer = Rows(names, zeros, none, none, zeros, zeros)
    CacheWriter.create(tmp_path / "a.h5", rows, ["x"], LAYERS, {}, {}).close()
    file = open_cache(tmp_path / "a.h5")
    tracemalloc.start()
    try:
        assert not same_rows(file, longer, ["x"])
        assert same_rows(file, rows, ["x"])
        match_rows(file, longer)
        assert tracemalloc.get_traced_memory()[1] < 25_000_000  # 80 MB if all were as wide
    finally:
        tracemalloc.stop()


def test_a_source_of_unreadable_images_only_grows_too(tmp_path: Path) -> None:
    bad: Source = {"bad.png": BASE["bad.png"]}
    path = make(tmp_path / "a.h5", bad)
    assert regrow(path, bad | {"0.png": BASE["0.png"]}) == ["image 0"]
    check(open_cache(path), bad | {"0.png": BASE["0.png"]})


def test_other_classes_splits_groups_or_times_are_another_source(tmp_path: Path) -> None:
    file, rows = open_cache(make(tmp_path / "a.h5", BASE)), rows_of(BASE)
    assert not same_rows(file, rows, ["x", "z"])
    for column, value in (("splits", ["val"] * 9), ("groups", ["g"] * 9), ("mtimes_ns", rows.mtimes_ns + 1)):
        assert not same_rows(file, Rows(**{**vars(rows), column: value}), ["x", "y"])


def test_without_carry_every_row_is_pending_and_known_by_its_bytes_only(tmp_path: Path) -> None:
    path = make(tmp_path / "a.h5", BASE)
    with grow(path, rows_of(BASE), ["x", "y"], LAYERS, {}, {}, carry=False) as writer:
        assert writer.pending().tolist() == list(range(9))
        donors = Donors(tmp_path, {"f", "g"})
        assert all((digest_of(content) in donors) != content.startswith("bad") for content, _ in BASE.values())


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def test_superseded_files_go_once_they_hold_nothing_of_their_own(tmp_path: Path) -> None:
    path = make(tmp_path / "a.h5", BASE)
    regrow(make(tmp_path / "a.b.h5", BASE), BASE)  # a name that only begins alike
    (tmp_path / "a.superseded-x.h5").write_bytes(b"a user's name for something else")
    few = {uri: BASE[uri] for uri in ("0.png", "1.png")}
    assert regrow(path, few) == []
    assert drop_redundant(path) == []  # there are rows that only the old file has
    assert regrow(path, BASE | {"n": ("image n", 0)}) == [*(f"image {i}" for i in range(2, 8)), "bad bytes", "image n"]
    assert names(superseded(tmp_path)) == ["a.b.superseded-1.h5", "a.superseded-1.h5", "a.superseded-2.h5"]
    (tmp_path / "a.superseded-9.h5").write_bytes(b"damaged")
    assert names(drop_redundant(path)) == ["a.superseded-1.h5", "a.superseded-2.h5"]
    assert names(superseded(tmp_path)) == ["a.b.superseded-1.h5", "a.superseded-9.h5"]
    assert [file.path.name for file in Catalog(tmp_path).files] == ["a.b.h5", "a.h5"]
    regrow(path, BASE)
    assert "a.superseded-10.h5" in names(superseded(tmp_path))


def test_donors_come_from_superseded_and_other_files_of_the_same_fingerprints(tmp_path: Path) -> None:
    path = make(tmp_path / "a.h5", BASE)
    regrow(path, {"0.png": BASE["0.png"]})
    make(tmp_path / "other.h5", {"z.png": ("image z", 0)})
    half = [LayerInfo("b", 2, "float16", {}, "other"), LayerInfo("a", 4, "float32", {}, "f")]
    make(tmp_path / "half.h5", {"q.png": ("image q", 0)}, half)
    (tmp_path / "junk.h5").write_bytes(b"junk")
    donors = Donors(tmp_path, {"f", "g"})
    for content in ("image 0", "image 7", "image z"):
        given = donors[digest_of(content)]
        assert given.keys() == {"a", "b"}
        for name, value in features_of(content).items():
            np.testing.assert_array_equal(given[name], value)
    assert digest_of("image q") not in donors
    assert donors.find(digest_of("image 0")[:8] + bytes(8)) is None
    with pytest.raises(CacheError, match="run the same command again"):
        donors[bytes(16)]
    assert list(Donors(tmp_path, {"f"})[digest_of("image q")]) == ["a"]


def flip(path: Path, array: str, row: int) -> None:
    place = open_cache(path).header.arrays[array]
    data = bytearray(path.read_bytes())
    data[place.offset + row * place.row_bytes] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "array", ["/features/a", "/features/b", "/crc/a", "/rows/digest", "/rows/result_crc", "/rows/run"]
)
def test_a_damaged_row_is_neither_given_away_nor_taken_over(tmp_path: Path, array: str) -> None:
    path = make(tmp_path / "a.h5", BASE)
    flip(path, array, 3)
    donors = Donors(tmp_path, {"f", "g"})
    assert [content for content, _ in BASE.values() if digest_of(content) not in donors] == ["image 3", "bad bytes"]
    assert regrow(path, BASE) == ["image 3"]
    check(open_cache(path), BASE)


def test_a_damaged_name_takes_no_row_of_another_image(tmp_path: Path) -> None:
    path = make(tmp_path / "a.h5", BASE)
    flip(path, "/rows/uri", 1)  # "1.png" becomes a second "0.png"
    assert open_cache(path).uris.tolist()[:2] == ["0.png", "0.png"]
    assert set(regrow(path, BASE)) <= {"image 0", "image 1"}
    check(open_cache(path), BASE)


def test_a_damaged_twin_does_not_stand_in_the_way_of_a_sound_one(tmp_path: Path) -> None:
    flip(make(tmp_path / "a.h5", BASE), "/features/a", 3)
    make(tmp_path / "b.h5", BASE)
    given = Donors(tmp_path, {"f", "g"})[digest_of("image 3")]
    np.testing.assert_array_equal(given["a"], features_of("image 3")["a"])


def test_a_damaged_row_does_not_make_its_sound_old_twin_redundant(tmp_path: Path) -> None:
    path = make(tmp_path / "a.h5", BASE)
    regrow(path, BASE)
    flip(path, "/rows/result_crc", 3)
    assert drop_redundant(path) == []


def test_other_layers_or_a_running_writer_leave_the_file_alone(tmp_path: Path) -> None:
    path = make(tmp_path / "a.h5", BASE)
    with pytest.raises(CacheError, match="holds other layers"):
        grow(path, rows_of(BASE), ["x", "y"], LAYERS[:1], {}, {})
    with CacheWriter.resume(path), pytest.raises(CacheError, match="is writing it"):
        regrow(path, BASE)
    with pytest.raises(CacheError, match="labels must lie"):
        grow(path, rows_of(BASE), ["x"], LAYERS, {}, {})
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.h5"]
    check(open_cache(path), BASE)


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from features_cache import Rows, grow, open_cache
from features_cache.ledger import Ledger
path, point = Path(sys.argv[1]), sys.argv[2]
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
old = open_cache(path)
if point == "end":  # when the new file, already in place, is opened for writing
    opened = Ledger.__init__
    Ledger.__init__ = lambda self, cache: die() if cache.path == path else opened(self, cache)
else:
    owner, name = {"carry": (Ledger, "put"), "commit": (Ledger, "commit"), "link": (Path, "hardlink_to"),
                   "replace": (Path, "replace")}[point]
    setattr(owner, name, die)
keep = np.arange(3)
rows = Rows(old.uris[keep].tolist(), old.labels[keep], ["train"] * 3, [""] * 3, old.sizes[keep], old.mtimes_ns[keep])
grow(path, rows, ["x", "y"], list(old.layers.values()), {}, {})
"""


@pytest.mark.parametrize("point", ["carry", "commit", "link", "replace", "end"])
def test_a_kill_while_growing_leaves_a_usable_file_and_every_row(tmp_path: Path, point: str) -> None:
    path = make(tmp_path / "a.h5", BASE)
    command = [sys.executable, "-c", KILLED, str(path), point]
    assert subprocess.run(command, check=False, timeout=60).returncode == -signal.SIGKILL
    assert open_cache(path).n_rows == (3 if point == "end" else 9)
    donors = Donors(tmp_path, {"f", "g"})
    assert all(digest_of(f"image {i}") in donors for i in range(8))
    few = dict(list(BASE.items())[:3])
    if same_rows(open_cache(path), rows_of(few), ["x", "y"]):
        with CacheWriter.resume(path) as writer:
            assert compute(writer, few) == []
    else:
        assert regrow(path, few) == []
    check(open_cache(path), few)
    assert drop_redundant(path) == []
    donors = Donors(tmp_path, {"f", "g"})
    assert all(digest_of(f"image {i}") in donors for i in range(8))
    assert {entry.suffix for entry in tmp_path.iterdir()} == {".h5"}


@pytest.mark.parametrize("point", ["put", "commit"])
def test_an_interrupt_while_growing_leaves_only_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    path = make(tmp_path / "a.h5", BASE)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    few = dict(list(BASE.items())[:3])
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, point, interrupted)
        with pytest.raises(KeyboardInterrupt):
            regrow(path, few)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.h5"]
    check(open_cache(path), BASE)
    assert regrow(path, few) == []
    check(open_cache(path), few)


def test_a_file_system_without_hard_links_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refused)
    path = make(tmp_path / "a.h5", BASE)
    assert regrow(path, BASE) == []
    check(open_cache(path), BASE)
    check(open_cache(tmp_path / "a.superseded-1.h5"), BASE)


def test_two_processes_that_supersede_one_file_keep_both_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = make(tmp_path / "a.h5", BASE), BASE | {"new.png": ("image new", 1)}
    module = sys.modules[set_aside.__module__]
    listed = superseded_files(path)
    set_aside(path)  # by the other process, since this one listed the folder
    make(tmp_path / "b.h5", other).replace(path)

    def late(_: Path) -> dict[int, Path]:
        monkeypatch.setattr(module, "superseded_files", superseded_files)
        return listed

    monkeypatch.setattr(module, "superseded_files", late)
    set_aside(path)
    check(open_cache(tmp_path / "a.superseded-1.h5"), BASE)
    check(open_cache(tmp_path / "a.superseded-2.h5"), other)


def test_rows_whose_run_has_lost_its_record_name_no_other_run(tmp_path: Path) -> None:
    path = make(tmp_path / "a.h5", BASE)
    flip(path, "/runs", 0)
    assert regrow(path, BASE) == []
    file = open_cache(path)
    assert (file.runs, set(file.run_ids.tolist())) == ([], {-1})


def test_a_run_that_another_process_begins_meanwhile_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path / "a.h5", BASE)
    runs, seen = CacheFile.runs.fget, []

    def growing(file: CacheFile) -> list[dict[str, Any]]:
        found = runs(file)
        later = [{**found[0], "run": len(found)}] if found and file.path in seen else []
        seen.append(file.path)
        return [*found, *later]

    with monkeypatch.context() as patch:
        patch.setattr(CacheFile, "runs", property(growing))
        assert regrow(path, BASE) == []
    check(open_cache(path), BASE)
    assert len(open_cache(path).runs) == 1


def test_prune_deletes_superseded_and_unfinished_files_only(tmp_path: Path) -> None:
    path = make(tmp_path / "a.h5", BASE)
    regrow(path, {"0.png": BASE["0.png"]})
    (tmp_path / "b.h5.tmp").write_bytes(b"left by a kill")
    old = superseded(tmp_path)
    assert names(old) == ["a.superseded-1.h5", "b.h5.tmp"]
    sizes = [file.stat().st_size for file in old]
    with pytest.raises(CacheError, match="is not a superseded file"):
        prune([*old, path])
    with CacheWriter.create(tmp_path / "b.h5", rows_of(BASE), ["x", "y"], LAYERS, {}, {}):
        (tmp_path / "b.h5.tmp").write_bytes(b"left by a kill")
        with pytest.raises(CacheError, match="is writing it"):
            prune(old[1:])
    assert prune(old) == sum(sizes)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.h5", "b.h5"]


def test_find_narrows_names_what_exists_and_lists_what_is_ambiguous(tmp_path: Path) -> None:
    two = {uri: BASE[uri] for uri in ("0.png", "1.png")}
    for name, backbone in (("r", "resnet50"), ("v", "vgg16")):
        layers = [LayerInfo("a", 4, "float32", {}, f"{name}-a"), LAYERS[1]]
        make(tmp_path / f"{name}.h5", two, layers, {"source": "photos", "backbone": backbone, "pool": "avg"})
    (tmp_path / "broken.h5").write_bytes(b"?")
    catalog = Catalog(tmp_path)
    assert [file.path.name for file in catalog.files] == ["r.h5", "v.h5"]
    assert ["broken.h5" in str(problem) for problem in catalog.problems] == [True]
    assert catalog.find(backbone="vgg16").path.name == "v.h5"
    assert catalog.find("a", backbone="resnet50", source="photos", pool="avg").path.name == "r.h5"
    with pytest.raises(CacheError, match=r"no backbone vgg61; it has resnet50, vgg16; did you mean vgg16\?"):
        catalog.find(backbone="vgg61")
    with pytest.raises(CacheError, match="no layer c; it has a, b"):
        catalog.find("c")
    with pytest.raises(CacheError, match="no pool max; it has avg"):
        catalog.find("a", pool="max")
    with pytest.raises(AmbiguousCacheError, match=r"2 files of .* match.*r\.h5 \(.*resnet50.*v\.h5"):
        catalog.find("a")
    assert Catalog(tmp_path / "r.h5").find("a").path.name == "r.h5"
    (tmp_path / "empty").mkdir()
    for path, message in (("none.h5", "no such file"), ("broken.h5", "not a feature"), ("empty", "no cache file")):
        with pytest.raises(CacheError, match=message):
            Catalog(tmp_path / path)


def test_files_that_no_option_tells_apart_are_told_by_what_differs(tmp_path: Path) -> None:
    for name, precision, size in (("r", "fp32", 224), ("v", "bf16", 64)):
        spec = {"layer": "a", "precision": precision, "preprocessing": {"size": [size, size], "resize": 256}}
        make(tmp_path / f"{name}.h5", BASE, [LayerInfo("a", 4, "float32", spec, name), LAYERS[1]])
    message = (
        r"name one of them instead of the folder: r.h5 \(precision fp32, preprocessing.size \[224, 224\], layers a, b"
    )
    with pytest.raises(AmbiguousCacheError, match=message):
        Catalog(tmp_path).find("a")


def test_a_copy_in_the_same_folder_is_refused_and_both_are_named(tmp_path: Path) -> None:
    shutil.copy(make(tmp_path / "a.h5", BASE, handles={"source": "s"}), tmp_path / "b.h5")
    with pytest.raises(AmbiguousCacheError, match=r"a\.h5 and b\.h5 in .* both hold a of s; delete one of them"):
        Catalog(tmp_path).find("a")
    make(tmp_path / "c.h5", BASE, LAYERS[:1], {"source": "s", "location": "/elsewhere"})
    assert Catalog(tmp_path).find("a", source="/elsewhere").path.name == "c.h5"
    (tmp_path / "b.h5").unlink()
    with pytest.raises(AmbiguousCacheError, match="location /elsewhere"):
        Catalog(tmp_path).find("a")
    with pytest.raises(AmbiguousCacheError, match="2 files"):
        Catalog(tmp_path).find()


LISTINGS: dict[str, tuple[Source, str | None]] = {
    "the same": (BASE, None),
    "another order": (dict(reversed(BASE.items())), None),
    "edited": (BASE | {"3.png": ("image edited", 1)}, None),  # told by digest, and both are labelled alike
    "relabelled": ({k: (v, 1 - label) for k, (v, label) in BASE.items()}, "in 9 labels;"),
    "added": (BASE | {"new.png": ("image new", 1)}, "in 1 image;"),
    "renamed": ({f"z{k}" if k == "0.png" else k: v for k, v in BASE.items()}, "in 2 images;"),
}


@pytest.mark.parametrize("case", LISTINGS)
def test_files_of_one_source_at_different_times_are_refused(tmp_path: Path, case: str) -> None:
    other, message = LISTINGS[case]
    make(tmp_path / "one.h5", BASE, LAYERS[:1], {"source": "s"})
    make(tmp_path / "other.h5", other, LAYERS[1:], {"source": "s"})
    for layer in ("a", "b"):
        catalog = Catalog(tmp_path)
        if message is None:
            assert layer in catalog.find(layer).layers
        else:
            with pytest.raises(CacheError, match=rf"(one|other)\.h5 and .*{message} extract s into this folder again"):
                catalog.find(layer)
        assert layer in Catalog(tmp_path / ("one.h5" if layer == "a" else "other.h5")).find(layer).layers


def test_damage_is_told_before_files_that_disagree(tmp_path: Path) -> None:
    make(tmp_path / "one.h5", BASE, LAYERS[:1], {"source": "s"})
    other = make(tmp_path / "other.h5", LISTINGS["relabelled"][0], LAYERS[1:], {"source": "s"})
    place = open_cache(other).header.arrays["/rows/label"]
    with other.open("r+b") as file:
        file.seek(place.offset)
        file.write(b"\7")
    with pytest.raises(DamagedCacheError, match=r"other\.h5 is damaged in 1 of 9 rows"):
        Catalog(tmp_path).find("a")


def test_known_digests_decide_what_is_carried_over(tmp_path: Path) -> None:
    path = make(tmp_path / "a.h5", BASE)
    swapped = BASE | {"0.png": BASE["1.png"], "1.png": BASE["0.png"], "moved.png": BASE["2.png"]}
    digests = np.array([list(digest_of(content)) for content, _ in swapped.values()], np.uint8)
    assert regrow(path, swapped, digests=digests) == []
    check(open_cache(path), swapped)
    digests[3] = 0  # not known: uri, size and time decide
    digests[4] = 1  # known to be other bytes now
    assert regrow(path, swapped, digests=digests) == ["image 4"]
