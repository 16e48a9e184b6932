"""Sources behind URLs: what is listed and read, by how many requests, and what happens if a server fails."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
import tarfile
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features_cache import DONE, UriRange, open_cache
from pipeline.errors import SourceError, UnreadableImageError
from pipeline.extract import extract
from pipeline.images.loader import load_images
from pipeline.images.sources import remote, shards
from pipeline.images.sources.registry import open_source
from pipeline.spec import Preprocessing

BUCKET = "photos"
RULE = Preprocessing((32, 32), 32, "bilinear", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@pytest.fixture(scope="module")
def web() -> ModuleType:
    """The benchmark, whose server the tests share."""
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "remote.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_remote_sources", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSES", (0.01, 0.02, 0.04))


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    fs = fsspec.filesystem("memory")
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def upload(fs: fsspec.AbstractFileSystem, folder: Path, root: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            fs.pipe(f"{root}/{path.relative_to(folder).as_posix()}", path.read_bytes())


def write_packed(photos: Path, folder: Path) -> dict[str, Path]:
    """The photos in each kind of source."""
    folder.mkdir()
    files = [path for path in sorted(photos.rglob("*")) if path.is_file()]
    relative = [path.relative_to(photos).as_posix() for path in files]
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        for path, name in zip(files, relative, strict=True):
            archive.write(path, name)
    for name, mode in (("a.tar", "w"), ("a.tar.gz", "w:gz")):
        with tarfile.open(folder / name, mode) as shard:
            shard.add(photos, "photos")
    columns = {"image": [{"bytes": path.read_bytes(), "path": path.name} for path in files]}
    table = pa.table(columns | {"label": [path.parent.name for path in files]})
    pq.write_table(table, folder / "a.parquet", row_group_size=7)
    with pa.OSFile(str(folder / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=7)
    rows = [{"path": f"../photos/{name}", "label": name.partition("/")[0]} for name in relative]
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "list.tsv").write_text("path\tlabel\n" + "".join(f"{row['path']}\t{row['label']}\n" for row in rows))
    return {path.name: path for path in folder.iterdir()}


KINDS = ["a.zip", "a.tar", "a.tar.gz", "a.parquet", "a.arrow", "list.jsonl", "list.tsv"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_photos: Callable[..., Path]) -> Path:
    root = tmp_path_factory.mktemp("remote")
    write_packed(write_photos(root / "photos", each=4), root / "packed")
    return root


def content(source: Any) -> list[tuple[str, bytes, int, str]]:
    return [(item.uri, source.read(item), item.label, item.split) for item in source.items]


# ------------------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("name", ["photos", "photos/blue/1.png", *(f"packed/{kind}" for kind in KINDS)])
def test_a_url_is_read_as_the_local_path_is(folder: Path, memory: Any, name: str) -> None:
    upload(memory, folder, "/set")
    local, far = open_source(folder / name), open_source(f"memory://set/{name}")
    assert content(far) == content(local)
    assert (far.name, far.classes, far.passed_over) == (local.name, local.classes, local.passed_over)
    assert far.location == f"memory://set/{name}"
    assert (far.remote, local.remote) == (True, False)
    assert [item.size for item in far.items] == [item.size for item in local.items]
    assert all(item.mtime_ns > 0 for item in far.items)
    assert far.remarks == local.remarks


def test_a_file_url_is_the_local_path(folder: Path) -> None:
    local, same = open_source(folder / "photos"), open_source((folder / "photos").as_uri())
    assert (same.location, same.items, same.remote) == (local.location, local.items, False)


def test_a_local_manifest_may_name_urls(tmp_path: Path, folder: Path, memory: Any) -> None:
    upload(memory, folder, "/set")
    urls = ["memory://set/photos/blue/0.png", "memory://set/photos/gone.png"]
    (tmp_path / "1.png").write_bytes(b"local")
    (tmp_path / "list.csv").write_text("\n".join(["path", *urls, "1.png"]))
    source = open_source(tmp_path / "list.csv")
    assert [item.uri for item in source.items] == ["1.png", *urls]
    assert [item.size for item in source.items] == [5, (folder / "photos/blue/0.png").stat().st_size, -1]
    assert [source.read(item) for item in source.items[:2]] == [b"local", (folder / "photos/blue/0.png").read_bytes()]
    with pytest.raises(UnreadableImageError, match=r"^no such file$"):
        source.read(source.items[2])


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "file:///etc/passwd", "local:///etc/passwd", "simplecache::file:///etc/passwd", "git://etc/passwd"],
)
def test_a_remote_manifest_reads_no_local_file(memory: Any, path: str) -> None:
    memory.pipe("/list.csv", f"path\n{path}\n".encode())
    with pytest.raises(SourceError, match="expected a path relative to the manifest or a URL in row 2"):
        open_source("memory://list.csv")


def test_hidden_names_and_files_of_other_kinds(memory: Any) -> None:
    for name in ("cat/a.png", "cat/.b.png", ".c/d.png", "cat/e.heic", "cat/f", "notes.txt"):
        memory.pipe(f"/set/{name}", b"P5\n1 1\n255\n\0")
    source = open_source("memory://set")
    assert [item.uri for item in source.items] == ["cat/a.png"]
    assert source.passed_over == {".heic": 1, "without extension": 1, ".txt": 1}


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://nowhere", r"^memory://nowhere: expected a folder of images.*found nothing there$"),
        ("memory://set/a.txt", r"found another kind of file$"),
        ("nosuch://a/b", r"expected a URL that fsspec can open: Protocol not known: nosuch"),
        ("gs://bucket/photos", r"gs:// needs another library: pip install 'thawline\[gcs\]'"),
        ("az://box/photos", r"az:// needs another library: pip install 'thawline\[azure\]'"),
        ("box://photos", r"box:// needs another library: .*boxfs"),
    ],
)
def test_refusals_are_one_line(memory: Any, monkeypatch: pytest.MonkeyPatch, url: str, message: str) -> None:
    memory.pipe("/set/a.txt", b"text")
    for module in ("gcsfs", "adlfs", "boxfs"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SourceError, match=message) as caught:
        open_source(url)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://h.x/a.zip?X-Amz-Signature=s&v=2&X-Amz-Date=d", "https://h.x/a.zip?v=2"),
        ("https://me:secret@h.x/a.zip", "https://me@h.x/a.zip"),
        ("https://h.x/a.zip?st=1&policy=2", "https://h.x/a.zip?st=1&policy=2"),
        (
            "https://x.blob.core.windows.net/c/a.zip?sv=2024&sp=r&se=2030&sig=s",
            "https://x.blob.core.windows.net/c/a.zip",
        ),
        ("s3://bucket/a@2x/b?.png", "s3://bucket/a@2x/b?.png"),
        ("abfs://box@account.dfs.core.windows.net/a", "abfs://box@account.dfs.core.windows.net/a"),
        ("simplecache::https://me:secret@h.x/a", "simplecache::https://me@h.x/a"),
    ],
)
def test_secrets_are_left_out_of_what_is_stored_and_said(url: str, shown: str) -> None:
    path = remote.RemotePath(fsspec.filesystem("memory"), "/a", url)
    assert (path.as_posix(), str(path)) == (shown, shown)


def test_paths_beside_a_signed_url() -> None:
    manifest = remote.locate("https://h.x/set/list.csv?sig=s")
    assert isinstance(manifest, remote.RemotePath)
    assert (manifest.name, manifest.stem, manifest.suffix, manifest.parent.name) == ("list.csv", "list", ".csv", "set")
    assert str(manifest.parent / "a/../b.png") == "https://h.x/set/b.png"
    assert str(remote.locate("https://h.x/set?sig=s") / "b.png") == "https://h.x/set/b.png"


# ------------------------------------------------------------------------------------------------------- web servers


def test_a_web_server_is_asked_once_an_image(web: ModuleType, folder: Path, tmp_path: Path) -> None:
    names = ["a b.png", "100%.png", "ü/é+&.png", "x#1.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    with web.Server(tmp_path) as server:
        source = open_source(f"{server.url}/")
        assert {item.uri: source.read(item) for item in source.items} == {name: name.encode() for name in names}
        assert len(server.requests) == 2 + len(names), "two pages, and each image once"
        assert [(item.size, item.mtime_ns) for item in source.items] == [(-1, 0)] * len(names)
        (note,) = source.remarks
        assert "4 images are on web servers" in note
        assert "only if it rehashes" in note


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranges", [True, False])
def test_packed_files_on_a_web_server(web: ModuleType, folder: Path, kind: str, ranges: bool) -> None:
    local = content(open_source(folder / "packed" / kind))
    with web.Server(folder, ranges=ranges) as server:
        source = open_source(f"{server.url}/packed/{kind}")
        listed = len(server.requests)
        assert content(source) == local
        fetched = [request for request in server.requests if request[0] == "GET"]
        if kind in ("a.tar", "a.tar.gz", "a.arrow"):
            assert len(fetched) == 1, "the shard is fetched whole, once"
        elif ranges:
            assert listed < 10
            assert len(fetched) <= listed + len(local)


@pytest.mark.parametrize("kind", ["a.tar", "a.tar.gz", "a.arrow"])
def test_shards_too_large_to_be_held_are_read_in_parts(
    web: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(remote, "HELD_BYTES", 0)
    monkeypatch.setattr(shards, "FETCHED_AT_ONCE", 30_000)
    local = content(open_source(folder / "packed" / kind))
    with web.Server(folder) as server:
        source = open_source(f"{server.url}/packed/{kind}")
        assert content(source) == local
        assert {bool(part) for method, _, part in server.requests if method == "GET"} == {True}


def test_a_folder_of_shards_on_a_web_server(web: ModuleType, folder: Path, tmp_path: Path) -> None:
    for name in ("train-0.tar", "test-0.tar"):
        (tmp_path / name).write_bytes((folder / "packed/a.tar").read_bytes())
    local = content(open_source(tmp_path))
    with web.Server(tmp_path) as server:
        source = open_source(f"{server.url}/")
        assert content(source) == local
        assert all(item.size > 0 < item.mtime_ns for item in source.items), "the server was asked for the shards"


def test_faults_that_pass_are_not_noticed(web: ModuleType, folder: Path) -> None:
    tries: Counter[str] = Counter()
    faults = [503, "cut", 429, None]

    def fault(path: str) -> int | str | None:
        tries[path] += 1
        return faults[min(tries[path], 4) - 1] if path.endswith(".png") else None

    with web.Server(folder, fault=fault) as server:
        source = open_source(f"{server.url}/photos")
        assert [source.read(item) for item in source.items] == [
            source_.read_bytes() for source_ in sorted((folder / "photos").rglob("*.png"))
        ]
        assert {count for path, count in tries.items() if path.endswith(".png")} == {4}


@pytest.mark.parametrize("status", [404, 410])
def test_what_is_not_there_is_an_unreadable_row_at_once(web: ModuleType, folder: Path, status: int) -> None:
    with web.Server(folder, fault=lambda path: status if path.endswith("blue/1.png") else None) as server:
        source = open_source(f"{server.url}/photos")
        with pytest.raises(UnreadableImageError, match=r"^no such file$"):
            source.read(source.items[1])
        assert sum(path.endswith("blue/1.png") for _, path, _ in server.requests) == 1


@pytest.mark.parametrize("fault", [503, 403, "cut"])
def test_faults_that_stay_raise_after_all_that_came_before(web: ModuleType, folder: Path, fault: int | str) -> None:
    with web.Server(folder, fault=lambda path: fault if path.endswith("red/2.png") else None) as server:
        batches = load_images(open_source(f"{server.url}/photos"), range(12), [RULE], batch_size=2)
        rows = [image.row for _, batch in zip(range(5), batches, strict=False) for image in batch]
        with pytest.raises(SourceError, match=r"red/2\.png: cannot be read: .*what was finished is kept") as caught:
            next(batches)
        assert "\n" not in str(caught.value)
        assert rows == [*range(10)]
        assert sum(path.endswith("red/2.png") for _, path, _ in server.requests) == len(remote.PAUSES) + 1


def test_what_was_done_before_a_fault_is_not_done_again(web: ModuleType, folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"layers": ["input"], "size": 32, "engine": "torch", "batch_size": 2}
    with web.Server(folder, fault=lambda path: 503 if path.endswith("red/2.png") else None) as server:
        source = f"{server.url}/photos"
        with pytest.raises(SourceError, match="cannot be read"):
            extract(source, output=tmp_path, **options)
        (path,) = tmp_path.glob("*.h5")
        done = int((open_cache(path).states == DONE).sum())
        assert 6 <= done <= 10
        server.fault = lambda path: None
        server.requests.clear()
        (result,) = extract(source, output=tmp_path, **options)
        assert (result.done, result.computed, result.reused) == (12, 12 - done, done)
        assert sum(path.endswith(".png") for _, path, _ in server.requests) == 12 - done


def test_a_dead_server_ends_the_run(web: ModuleType, folder: Path) -> None:
    with web.Server(folder) as server:
        source = open_source(f"{server.url}/photos")
    with pytest.raises(SourceError, match="cannot be read"):
        source.read(source.items[0])
    with pytest.raises(SourceError, match="cannot be read") as caught:
        open_source(f"{server.url}/photos/")
    assert "\n" not in str(caught.value)


def test_nobody_waits_for_an_answer_before_the_next_request(web: ModuleType, folder: Path) -> None:
    at_once = most = 0
    lock = threading.Lock()

    class Counting(web.Server):  # type: ignore[name-defined,misc]
        async def _answer(self, request: Any) -> Any:
            nonlocal at_once, most
            with lock:
                at_once += 1
                most = max(most, at_once)
            try:
                return await super()._answer(request)
            finally:
                with lock:
                    at_once -= 1

    with Counting(folder, delay=0.3) as server:
        far = list(load_images(open_source(f"{server.url}/photos"), range(12), [RULE], batch_size=2, workers=1))
    assert most == 12, "all images are asked for at once"
    near = list(load_images(open_source(folder / "photos"), range(12), [RULE], batch_size=2, workers=1))
    for one, other in zip(far, near, strict=True):
        for image, same in zip(one, other, strict=True):
            assert (image.row, image.digest) == (same.row, same.digest)
            assert image.pixels is not None
            assert image.pixels[0].tobytes() == same.pixels[0].tobytes()


# ------------------------------------------------------------------------------------------------------- object stores


@pytest.fixture(scope="module")
def s3(folder: Path, object_store: Any) -> Any:
    object_store.mkdir(BUCKET)
    upload(object_store, folder, BUCKET)
    return object_store


@pytest.mark.parametrize("name", ["photos", "packed/a.zip", "packed/a.tar.gz", "packed/a.parquet", "packed/list.tsv"])
def test_an_object_store_is_read_as_the_local_path_is(folder: Path, s3: Any, name: str) -> None:
    local, far = open_source(folder / name), open_source(f"s3://{BUCKET}/{name}")
    assert content(far) == content(local)
    assert [item.size for item in far.items] == [item.size for item in local.items]


def test_a_long_listing_takes_a_request_a_thousand_and_none_an_object(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs
    from moto.s3.models import s3_backends

    backend = s3_backends["123456789012"]["aws"]
    for number in range(1100):
        backend.put_object(BUCKET, f"many/{'ab'[number % 2]}/{number:04d}.png", b"x" * number)
    backend.put_object(BUCKET, "many/list.csv", b"path\n" + b"".join(b"a/%04d.png\n" % number for number in range(50)))
    calls: list[str] = []
    call = s3fs.S3FileSystem._call_s3

    async def counted(self: Any, method: str, *arguments: Any, **keywords: Any) -> Any:
        calls.append(method)
        return await call(self, method, *arguments, **keywords)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", counted)
    source = open_source(f"s3://{BUCKET}/many")
    assert (len(source.items), source.classes) == (1100, ("a", "b"))
    assert [item.size for item in source.items] == sorted(range(1100), key=lambda number: (number % 2, number))
    assert len({item.mtime_ns for item in source.items}) == 1100, "an ETag each"
    listed = open_source(f"s3://{BUCKET}/many/list.csv")
    assert [item.size for item in listed.items] == [number if number % 2 == 0 else -1 for number in range(50)]
    assert Counter(calls)["head_object"] <= 4
    assert Counter(calls)["get_object"] == 1


def test_changes_are_seen_by_the_etag(s3: Any, folder: Path, tmp_path: Path) -> None:
    upload(s3, folder / "photos", f"{BUCKET}/changing")
    source = f"s3://{BUCKET}/changing"

    def run() -> tuple[int, int, int]:
        (result,) = extract(source, layers=["input"], size=32, engine="torch", output=tmp_path)
        return result.rows, result.computed, result.unreadable

    assert run() == (12, 12, 0)
    assert run() == (12, 0, 0)
    s3.pipe(f"{BUCKET}/changing/blue/1.png", s3.cat(f"{BUCKET}/changing/blue/1.png"))
    assert run() == (12, 0, 0), "the same bytes, written again"
    other = s3.cat(f"{BUCKET}/changing/blue/1.png")
    s3.pipe(f"{BUCKET}/changing/blue/1.png", other[:-1] + b"x")  # of the same size
    assert run() == (12, 1, 0)
    s3.rm(f"{BUCKET}/changing/blue/1.png")
    assert run() == (11, 0, 0)


def test_an_object_that_goes_is_an_unreadable_row(s3: Any) -> None:
    s3.pipe(f"{BUCKET}/going/a.png", b"a")
    source = open_source(f"s3://{BUCKET}/going")
    s3.rm(f"{BUCKET}/going/a.png")
    with pytest.raises(UnreadableImageError, match=r"^no such file$"):
        source.read(source.items[0])


def test_an_archive_that_is_a_folder_too_is_refused(s3: Any, folder: Path) -> None:
    for key in ("a.zip", "a.zip/b.zip"):  # only an object store can hold both
        s3.pipe(f"{BUCKET}/both/{key}", (folder / "packed" / "a.zip").read_bytes())
    with pytest.raises(SourceError, match=r"expected a file or a folder, found a\.zip to be both: rename the file"):
        open_source(f"s3://{BUCKET}/both")


@pytest.mark.parametrize("url", ["s3://nobody-has-this/photos", f"s3://{BUCKET}/nothing"])
def test_an_empty_place_is_named(s3: Any, url: str) -> None:
    with pytest.raises(SourceError, match=rf"^{url}: .*found nothing there$") as caught:
        open_source(url)
    assert "\n" not in str(caught.value)


def test_a_dead_endpoint_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(SourceError, match="s3://photos/a: cannot be read: ") as caught:
        open_source("s3://photos/a")
    assert "\n" not in str(caught.value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The requests for three equal shards of five images, ``memory://once/a.tar`` and so on."""

    fs, packed = fsspec.filesystem("memory"), io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for number in range(5):
            member = tarfile.TarInfo(f"{number}.png")
            member.size = 3
            archive.addfile(member, io.BytesIO(b"%03d" % number))
    fs.pipe({f"/once/{name}.tar": packed.getvalue() for name in "abc"})
    requests: list[object] = []
    fetch = type(fs).cat_file
    monkeypatch.setattr(type(fs), "cat_file", lambda *args, **more: requests.append(args) or fetch(*args, **more))
    return requests


def test_a_small_shard_is_fetched_once_also_if_its_listing_is_known(asked: list[object]) -> None:
    for _ in range(2):
        source = open_source("memory://once/a.tar")
        assert [source.read(item) for item in source.items] == [b"%03d" % number for number in range(5)]
    assert len(asked) == 2


@pytest.mark.parametrize(("limit", "requests"), [(30_720, 0), (30_719, 5)], ids=["all are held", "none is held"])
def test_the_whole_source_decides_whether_shards_are_held(
    asked: list[object], monkeypatch: pytest.MonkeyPatch, limit: int, requests: int
) -> None:
    monkeypatch.setattr(remote, "HELD_BYTES", limit)  # a shard has 10,240 bytes
    source = open_source("memory://once", UriRange("", "b.tar/"))
    assert [item.uri for item in source.items] == [f"a.tar/{number}.png" for number in range(5)]
    asked.clear()
    assert [source.read(item) for item in source.items] == [b"%03d" % number for number in range(5)]
    assert len(asked) == requests
