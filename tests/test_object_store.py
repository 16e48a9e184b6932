"""Caches in object stores: the same features as in a folder, published once, and read from a copy that follows."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import time
import types
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

from features_cache import (
    CacheError,
    CacheFile,
    DamagedCacheError,
    PartedCache,
    PartPlan,
    open_cache,
    open_plan,
    prune,
    register_store,
    superseded,
)
from pipeline.errors import SourceError
from pipeline.extract import extract
from pipeline.extraction import object_store as stored
from pipeline.extraction import parts
from pipeline.extraction.inspection import check
from pipeline.extraction.object_store import local_path, open_catalog
from pipeline.fit import fit
from pipeline.images.sources.registry import open_source
from pipeline.images.sources.remote import RemotePath, Stamp, locate
from pipeline.results import ExtractResult

HOW: dict[str, Any] = {"size": 32, "precision": "fp32", "engine": "torch", "batch_size": 3}


@pytest.fixture
def url(object_store: Any) -> str:
    """A folder in a new bucket."""
    bucket = f"b{uuid.uuid4().hex}"
    object_store.mkdir(bucket)
    return f"s3://{bucket}/cache"


@pytest.fixture
def photos(make_photos: Callable[..., Path]) -> Path:
    return make_photos(each=5)


def extracted(photos: Path, output: str | Path, **options: Any) -> ExtractResult:
    (result,) = extract(photos, ["test_resnet@random:0"], ["layer1"], output=output, **HOW | options)
    return result


def on_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what follows have a folder of its own for copies."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / uuid.uuid4().hex))


def etags(store: Any, url: str) -> dict[str, str]:
    store.invalidate_cache()
    return {path.rpartition("/")[2]: info["ETag"] for path, info in store.find(url, detail=True).items()}


def assert_equal(one: CacheFile, other: CacheFile) -> None:
    assert one.uris.tolist() == other.uris.tolist()
    np.testing.assert_array_equal(one.array("/rows/digest"), other.array("/rows/digest"))
    np.testing.assert_array_equal(*(np.asarray(file.matrix("layer1")) for file in (one, other)))


def test_a_cache_in_a_store_holds_what_a_folder_holds(
    photos: Path, url: str, object_store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thawline: Any
) -> None:
    whole = open_cache(extracted(photos, tmp_path / "whole").path)
    made = extracted(photos, url, part_rows=4)
    assert (made.computed, made.done) == (15, 15)
    assert f"the cache is at {url}; results name its copy on this machine" in made.notes
    there = etags(object_store, url)
    assert sorted(Path(name).suffixes[-2:][-1] for name in there) == [".h5"] * 4 + [".plan"]
    on_another_machine(tmp_path, monkeypatch)
    (file,) = open_catalog(url).files
    assert isinstance(file, PartedCache)
    assert_equal(file, whole)
    assert_equal(open_catalog(f"{url}/{file.path.name}").files[0], whole)
    again = extracted(photos, url)
    assert (again.computed, again.reused) == (0, 15)
    assert etags(object_store, url) == there, "nothing was written again"
    results = [fit(cache, heads=["ridge"]).results for cache in (url, tmp_path / "whole")]
    assert [[vars(one) | {"seconds": 0} for one in each] for each in results[:1]] == [
        [vars(one) | {"seconds": 0} for one in each] for each in results[1:]
    ]
    assert thawline("cache", "ls", url, "--json").json["files"][0]["done"] == 15
    thawline("cache", "export", url, tmp_path / "a.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), whole.matrix("layer1"))


def test_a_copy_fetches_what_changed_and_nothing_else(
    photos: Path, url: str, object_store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extracted(photos, url, part_rows=4)
    fetched: list[str] = []
    download = stored.RemotePath.download

    def noted(self: Any, target: Path) -> str | None:
        fetched.append(target.name)
        return download(self, target)

    monkeypatch.setattr(stored.RemotePath, "download", noted)
    for path in (photos / "blue").iterdir():
        path.write_bytes((photos / "red" / "0.png").read_bytes())
    here = stored.user_folder("x").parent
    on_another_machine(tmp_path, monkeypatch)
    before = etags(object_store, url)
    assert extracted(photos, url).computed > 0
    assert sorted(fetched) == sorted(before)
    changed = {name for name, etag in etags(object_store, url).items() if etag != before[name]}
    assert 0 < len(changed) < len(before) - 1
    fetched.clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(here.parent))
    assert np.unique(open_catalog(url).files[0].digests[:5], axis=0).shape == (1, 16)
    assert set(fetched) == changed
    object_store.rm(f"{url}/{min(changed)}")
    monkeypatch.setattr(stored, "_JUST_NOW_NS", 0)
    assert len(open_catalog(url).files[0].missing) == 1  # type: ignore[attr-defined]
    assert len(list(local_path(url).glob(".*.etag"))) == len(before) - 1


def publish_after(
    number: int,
    act: Callable[[], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    then: Callable[[], Any] = int,
) -> list[Path]:
    """Let another machine act before the publication of this number, and this one then; return what is published."""
    publish, calls = parts.publish_try, []

    def slow(draft: Path, is_complete: Callable[[], bool], replaced: str | None) -> bool:
        calls.append(draft)
        if len(calls) == number:
            with monkeypatch.context() as other:
                on_another_machine(tmp_path, other)
                act()
            then()
        return publish(draft, is_complete, replaced)

    monkeypatch.setattr(parts, "publish_try", slow)
    return calls


def test_what_another_machine_published_survives_a_new_copy_of_it(
    photos: Path, url: str, object_store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command on this machine fetches the other machine's part while this machine fills its own."""
    uris = [item.uri for item in open_source(photos).items]

    def act() -> None:
        assert extracted(photos, url, only=uris[:1]).computed == 1

    publish_after(1, act, tmp_path, monkeypatch, then=lambda: open_catalog(url))
    assert extracted(photos, url, only=uris[1:]).done == 15
    assert (open_catalog(url).files[0].states == 1).all()


def test_a_plan_that_another_machine_rewrote_is_not_replaced(
    photos: Path, url: str, object_store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor if the copy of this machine is the new one by then."""
    extracted(photos, url, part_rows=4)
    plan = next(local_path(url).glob("*.plan"))
    for number in range(9):
        shutil.copyfile(photos / "red" / "1.png", photos / "red" / f"z{number}.png")
    rewrite, told = PartPlan.rewrite, []

    def slow(self: PartPlan) -> bool:
        if not told:
            told.append(None)
            with monkeypatch.context() as other:
                on_another_machine(tmp_path, other)
                extracted(photos, url)
            open_catalog(url)
            told.append(plan.read_bytes())
        told.append(rewrite(self))
        return told[-1]

    monkeypatch.setattr(PartPlan, "rewrite", slow)
    again = extracted(photos, url)
    assert (told[1], told[3:]) == (True, [False]), "the other machine, then this one"
    assert plan.read_bytes() == told[2]
    assert (again.computed, again.done) == (0, 24)


@pytest.mark.parametrize("complete", [True, False])
def test_the_slower_of_two_machines_takes_what_the_faster_one_published(
    complete: bool, photos: Path, url: str, object_store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other machine publishes the part, whole or a row that this one has not, just before this one does."""
    uris = [item.uri for item in open_source(photos).items]

    def act() -> None:
        result = extracted(photos, url, only=uris if complete else uris[:1])
        assert result.computed == (15 if complete else 1)

    calls = publish_after(1, act, tmp_path, monkeypatch)
    first = extracted(photos, url, only=uris[1:])
    file = open_cache(first.path)
    assert (file.states == 1).all(), "no row of either is lost"
    assert first.done == 15
    assert len(calls) == (2 if complete else 3)
    there = sorted(etags(object_store, url))
    assert [Path(name).suffix for name in there] == [".h5", ".plan"]
    on_another_machine(tmp_path, monkeypatch)
    assert_equal(open_catalog(url).files[0], file)


def test_any_part_that_another_machine_changed_meanwhile_is_tried_again(
    photos: Path, url: str, object_store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other machine publishes a row of the second part just before this one publishes the others."""
    uris = [item.uri for item in open_source(photos).items]
    publish_after(2, lambda: extracted(photos, url, only=uris[5:6]), tmp_path, monkeypatch)
    result = extracted(photos, url, only=[uri for uri in uris if uri != uris[5]], part_rows=5)
    assert (open_cache(result.path).states == 1).all(), "no row of either is lost"


def test_a_part_that_another_machine_published_meanwhile_is_not_computed(
    photos: Path, url: str, object_store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill = parts.PartFiller.fill

    def slow(self: Any, *arguments: Any) -> Any:
        monkeypatch.setattr(parts.PartFiller, "fill", fill)
        with monkeypatch.context() as other:
            on_another_machine(tmp_path, other)
            assert extracted(photos, url).computed == 15
        return fill(self, *arguments)

    monkeypatch.setattr(parts.PartFiller, "fill", slow)
    result = extracted(photos, url, part_rows=4)
    assert (result.computed, result.done) == (0, 15)


def test_what_a_killed_machine_began_is_carried_over(
    photos: Path, url: str, monkeypatch: pytest.MonkeyPatch, object_store: Any
) -> None:
    def killed(*_: Any) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as dying:
        dying.setattr(parts, "publish_try", killed)
        with pytest.raises(KeyboardInterrupt):
            extracted(photos, url)
    assert [Path(name).suffix for name in etags(object_store, url)] == [".plan"]
    result = extracted(photos, url)
    assert (result.computed, result.done) == (0, 15)
    assert not list(Path(result.path).parent.glob("*.try-*"))


def test_a_cluster_fills_a_store(
    photos: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, object_store: Any
) -> None:
    distributed = pytest.importorskip("distributed")

    def start() -> Any:
        return distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=False, protocol="tcp", host="127.0.0.1",
            dashboard_address="127.0.0.1:0", memory_limit=0,
        )  # fmt: skip

    monkeypatch.setitem(sys.modules, "queues", types.SimpleNamespace(Queue=start))
    made = extracted(photos, url, part_rows=4, cluster="queues.Queue:2")
    assert (made.computed, made.done) == (15, 15)
    assert_equal(open_cache(made.path), open_cache(extracted(photos, tmp_path / "whole").path))
    assert len(etags(object_store, url)) == 5


@pytest.mark.parametrize("cluster", [None, "queues.Queue:2"])
def test_a_part_that_is_split_in_a_store_loses_no_features(
    cluster: str | None, photos: Path, url: str, monkeypatch: pytest.MonkeyPatch, object_store: Any
) -> None:
    if cluster is not None:
        distributed = pytest.importorskip("distributed")
        start = partial(
            distributed.LocalCluster, n_workers=1, threads_per_worker=1, processes=False, protocol="tcp",
            host="127.0.0.1", dashboard_address="127.0.0.1:0", memory_limit=0,
        )  # fmt: skip
        monkeypatch.setitem(sys.modules, "queues", types.SimpleNamespace(Queue=start))
    for name in ("blue", "green"):
        shutil.rmtree(photos / name)
    (other,) = extract(photos, ["test_resnet@random:0"], ["layer2"], output=url, part_rows=5, **HOW)
    assert extracted(photos, url, part_rows=5).computed == 5
    for index in range(5, 12):
        Image.new("RGB", (40, 40), (20 * index, 0, 90)).save(photos / "red" / f"{index:02}.png")
    result = extracted(photos, url, cluster=cluster)
    file = open_cache(result.path)
    assert isinstance(file, PartedCache)
    assert [(part.number, part.origin) for part in file.plan.parts] == [(0, None), (1, 0), (2, 0)]
    assert (result.computed, result.done) == (7, 12)
    follower = open_catalog(url).find("layer2")
    assert (follower.path.name, int(follower.pending.sum())) == (Path(other.path).name, 7)
    for index in range(7):  # into part 1, which was cut from another itself
        Image.new("RGB", (40, 40), (0, 20 * index, 90)).save(photos / "red" / f"09-{index}.png")
    result = extracted(photos, url, cluster=cluster)
    file = open_cache(result.path)
    assert isinstance(file, PartedCache)
    assert [(part.number, part.origin) for part in file.plan.parts] == [(0, None), (1, 0), (3, 1), (4, 1), (2, 0)]
    assert (result.computed, result.done) == (7, 19)


def test_a_worker_sees_that_a_part_is_no_longer_complete(
    photos: Path, url: str, object_store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thawline: Any
) -> None:
    """Its copy is whole; on another machine, a row of the part was damaged and marked pending."""
    made = open_cache(extracted(photos, url, part_rows=4).path)
    part = made.parts[1]
    sound = part.path.read_bytes()
    where = sound.index(part.matrix("layer1")[2].tobytes())
    with monkeypatch.context() as other:
        on_another_machine(tmp_path, other)
        object_store.pipe(f"{url}/{part.path.name}", sound[:where] + b"\xff\xff" + sound[where + 2 :])
        assert thawline("cache", "verify", url, "--repair").returncode == 0
    task = "run", f"{url}/{made.path.name}", 1, str(photos), None, parts.Computing("torch"), lambda *_: None
    assert parts.fill_part(*task).computed == 1
    assert (open_catalog(url).files[0].states == 1).all()


def test_a_server_that_ignores_conditions_is_refused(
    photos: Path, url: str, object_store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = type(object_store).call_s3

    def lax(self: Any, *arguments: Any, **options: Any) -> Any:
        return call(self, *arguments, **{key: options[key] for key in options if not key.startswith("If")})

    with monkeypatch.context() as ignoring:
        on_another_machine(tmp_path, ignoring)
        ignoring.setattr(type(object_store), "call_s3", lax)
        with pytest.raises(CacheError, match="ignores the conditions of uploads"):
            extracted(photos, url)
        assert [Path(name).suffix for name in etags(object_store, url)] == [".plan"]
        on_another_machine(tmp_path, ignoring)
        with pytest.raises(CacheError, match="ignores the conditions of uploads"):
            extracted(photos, url)  # the plan is there by now
        assert [Path(name).suffix for name in etags(object_store, url)] == [".plan"]
    assert extracted(photos, url).done == 15


def test_what_fails_says_what_and_is_not_tried_in_vain(
    photos: Path, url: str, object_store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exceptions = pytest.importorskip("botocore.exceptions")
    extracted(photos, url, part_rows=1)

    def failing(error: Exception) -> Callable[..., Any]:
        def fail(*_: Any, **__: Any) -> Any:
            raise error

        return fail

    tried: list[str] = []

    def full(_: str, target: str) -> None:
        tried.append(target)
        time.sleep(0.2 * (len(tried) > 1))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pipeline.images.sources.remote.PAUSES", (30.0,))
    far = locate(f"{url}/x.plan")
    assert isinstance(far, RemotePath)
    there = next(iter(far.parent.listing().values()))
    fs = type(object_store)
    (tmp_path / "file").write_bytes(b"x")
    with monkeypatch.context() as old:
        old.setattr(fs, "call_s3", failing(exceptions.ParamValidationError(report='Unknown parameter "IfNoneMatch"')))
        with pytest.raises(SourceError, match=r"cannot be written: .* update s3fs and botocore"):
            far.upload(tmp_path / "file", None)
    with monkeypatch.context() as denied:
        denied.setattr(fs, "call_s3", failing(PermissionError("Access Denied")))
        with pytest.raises(SourceError, match="cannot be written: Access Denied"):
            far.upload(tmp_path / "file", None)
        with pytest.raises(SourceError, match="cannot be deleted: Access Denied"):
            there.delete(there.stat(), "any")
    with monkeypatch.context() as large:
        large.setattr("pipeline.images.sources.remote.MOST_UPLOADED_BYTES", 0)
        with pytest.raises(SourceError, match="make parts of fewer rows"):
            far.upload(tmp_path / "file", None)
    with pytest.raises(CacheError, match=r"an object store at most 2 GB; .*--part-rows"):
        parts.check_stored(list(open_catalog(url).files[0].layers.values()), 100_000_000)
    on_another_machine(tmp_path, monkeypatch)
    monkeypatch.setattr(locate(url).fs, "get_file", full)  # the instance that is in use, whatever other tests made
    with pytest.raises(CacheError, match=r"cannot write .*the disk is full"):
        open_catalog(url)
    assert len(tried) < 15, "one failure ends the downloads that have not begun"


def test_workers_get_the_password_of_a_url_and_users_do_not(tmp_path: Path) -> None:
    root = RemotePath(fsspec.filesystem("memory"), "/cache", "ftp://me:secret@host/cache")
    store = stored.StoredCache(root, tmp_path)
    register_store(tmp_path, store)
    (tmp_path / "draft").write_bytes(b"x")
    assert stored.url_of(tmp_path / "a.h5") == "ftp://me:secret@host/cache/a.h5"
    assert stored.shown(tmp_path / "a.h5") == str(tmp_path / "a.h5"), "it is not in the store"
    store._keep(tmp_path / "draft", tmp_path / "a.h5", Stamp(1, 1), None)
    assert stored.shown(tmp_path / "a.h5") == "ftp://me@host/cache/a.h5"


def test_damage_is_repaired_in_the_store(
    photos: Path, url: str, object_store: Any, thawline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = extracted(photos, url, part_rows=4)
    part = open_cache(made.path).parts[1]
    sound, status = part.path.read_bytes(), part.path.stat()
    where = sound.index(part.matrix("layer1")[2].tobytes())
    damaged = sound[:where] + b"\xff\xff" + sound[where + 2 :]
    part.path.write_bytes(damaged)  # in the copy alone: what is in the store is fetched again
    os.utime(part.path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert thawline("cache", "verify", url).returncode == 0
    assert part.path.read_bytes() == sound
    object_store.pipe(f"{url}/{part.path.name}", damaged)
    assert thawline("cache", "verify", url).returncode == 1
    with pytest.raises(DamagedCacheError):
        fit(url, heads=["centroid"])

    def full(*_: Any) -> bool:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as unwritable:
        unwritable.setattr(stored.StoredCache, "put", full)
        with pytest.raises(CacheError, match="the disk is full"):
            check(url, mend=True)
    assert thawline("cache", "verify", url, "--repair").returncode == 0
    again = extracted(photos, url)
    assert (again.computed, again.done) == (1, 15)
    assert thawline("cache", "verify", url).returncode == 0


def test_prune_deletes_parts_in_the_store_that_no_image_is_left_for(
    photos: Path, url: str, object_store: Any, thawline: Any
) -> None:
    extracted(photos, url, part_rows=4)
    for path in (photos / "red").iterdir():
        path.unlink()
    assert extracted(photos, url).rows == 10
    before = etags(object_store, url)
    folder = local_path(url)
    records = len(list(folder.glob(".*.etag")))
    pruned = thawline("cache", "prune", url, "--yes", "--json")
    assert all(name.startswith(f"{url}/") for name in pruned.json["deleted"])
    assert len(pruned.json["deleted"]) == 1
    assert len(list(folder.glob(".*.etag"))) == records - 1
    assert len(etags(object_store, url)) == len(before) - 1
    assert extracted(photos, url).reused == 10


def test_prune_deletes_no_part_that_came_to_life(
    photos: Path, url: str, object_store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extracted(photos, url, part_rows=4)
    kept = tmp_path / "kept"
    shutil.copytree(photos, kept)
    last = open_catalog(url).files[0].parts[-1]
    for uri in last.uris.tolist():
        (photos / uri).unlink()
    extracted(photos, url)
    (listed,) = superseded(local_path(url))
    assert listed.name == last.path.name
    with monkeypatch.context() as other:  # while the user reads what would be deleted
        on_another_machine(tmp_path, other)
        shutil.copytree(kept, photos, dirs_exist_ok=True)
        for number in range(9):
            shutil.copyfile(photos / "red" / "1.png", photos / "red" / f"z{number}.png")
        grown = extracted(photos, url)
        there = etags(object_store, url)
        assert len({part.number for part in open_plan(Path(grown.path)).parts} | {3}) == len(there) - 1
    prune([listed])
    there.pop(listed.name)
    assert etags(object_store, url) == there
    file = open_catalog(url).files[0]
    assert not file.missing_rows
    assert (file.states == 1).sum() == 24
    part = file.parts[0].path
    with monkeypatch.context() as other:
        other.setattr(sys.modules["features_cache.prune"], "_may_go", lambda _: True)
        object_store.pipe(f"{url}/{part.name}", part.read_bytes() + b"newer")
        with pytest.raises(CacheError, match=f"{part.name} was replaced in the object store"):
            prune([part])
    with pytest.raises(CacheError, match="not a superseded file, or no longer"):
        prune([part])
    assert part.name in etags(object_store, url)


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    fs = fsspec.filesystem("memory")
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def test_what_cannot_be_done_is_one_line(
    photos: Path, url: str, object_store: Any, tmp_path: Path, memory: Any, thawline: Any, monkeypatch: Any
) -> None:
    made = Path(extracted(photos, tmp_path / "whole").path)
    for store, root in ((memory, "memory://cache"), (object_store, url)):
        store.pipe(f"{root}/{made.name}", made.read_bytes())
        assert_equal(open_catalog(root).files[0], open_cache(made))
    assert extracted(photos, url).computed == 0  # a file that somebody uploaded is read ...
    shutil.copyfile(photos / "red" / "1.png", photos / "red" / "2.png")
    with pytest.raises(CacheError, match="only caches in parts can be written"):  # ... but not continued
        extracted(photos, url)
    with pytest.raises(SourceError, match="only s3:// stores can be written"):
        extract(photos, ["test_resnet@random:0"], ["layer2"], output="memory://cache", **HOW)
    with pytest.raises(CacheError, match="is a file; name the folder"):
        extracted(photos, f"{url}/new.h5")
    with pytest.raises(CacheError, match=r"no cache at s3://.*/none: it holds no cache file"):
        open_catalog(f"{url}/none")
    with pytest.raises(CacheError, match=r"there is no none\.h5 in the object store at s3://"):
        open_catalog(f"{url}/none.h5")
    monkeypatch.setattr("pipeline.images.sources.remote.PAUSES", (0.01,))
    with pytest.raises(SourceError, match=r"s3://no-such-bucket-of-ours/x/.*cannot be written: "):
        extracted(photos, "s3://no-such-bucket-of-ours/x")
    refused = thawline("finetune", photos, "-o", url)
    assert refused.returncode == 2
    assert "a folder on this machine" in refused.stderr
    assert local_path(tmp_path) == tmp_path
