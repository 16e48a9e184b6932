"""Files and folders behind URLs that fsspec opens (``s3://``, ``https://``, …), used as local paths are."""

from __future__ import annotations

import errno
import io
import posixpath
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from pipeline.errors import SourceError, first_line
from pipeline.images.ahead import map_ahead

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

T = TypeVar("T")

EXTRAS = {
    **dict.fromkeys(("s3", "s3a"), "s3"),
    **dict.fromkeys(("gs", "gcs"), "gcs"),
    **dict.fromkeys(("az", "abfs", "abfss", "adl"), "azure"),
    **dict.fromkeys(("http", "https"), "http"),
}
"""The extra of this project that brings what a protocol needs."""

PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds between the tries of a request that fails."""

MISSING_SIZE = -1
"""The size of an item whose file was missing when the source was listed, or of which the listing tells no size."""

_VERSIONS = (
    *("ETag", "etag", "generation", "blob_id", "sha", "Content-MD5"),
    *("LastModified", "last_modified", "Last-Modified", "updated", "mtime", "modified", "created"),
)
"""Entries of a listing that tell the version of an object; the first that is there counts."""

_GONE = (404, 410, 416)
"""What HTTP answers if an object is not there, or is shorter than it was."""

_SIGNATURES = {"sig", "signature", "x-amz-signature", "x-goog-signature"}
"""Parameters, in lower case, that sign a URL for some time."""

_SIGNED = re.compile(r"x-(amz|goog)-.*|expires|policy|key-pair-id|(aws|google)access(key)?id|s(e|p|v|r|t|ip|pr|s|rt)")
"""Parameters, in lower case, that go with a signature."""

HELD_BYTES = 1 << 30
"""Most bytes of remote shards that are kept in memory after they were listed."""

MOST_UPLOADED_BYTES = 5_000_000_000
"""S3 takes no more in one request, and only one request can have a condition."""

_LOST = ("PreconditionFailed", "ConditionalRequestConflict")
"""What S3 answers if another process was faster."""

_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Errors of this machine's disk, which no further try mends."""

LISTED_AT_ONCE = 8
"""Shards, or folders of a manifest, that are listed at once."""


class Stamp(NamedTuple):
    """What tells whether a file changed: its size in bytes, and its time in ns or a number that stands for it."""

    size: int = MISSING_SIZE
    mtime_ns: int = 0


def is_url(text: str) -> bool:
    """Tell whether `text` is a URL rather than a path.

    Examples
    --------
    >>> is_url("s3://bucket/photos"), is_url("photos/cat.jpg")
    (True, False)
    """
    return re.match(r"([A-Za-z][A-Za-z0-9+.-]*::)*[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def locate_all(urls: Iterable[str]) -> Iterator[Path | RemotePath]:
    """Yield what each URL leads to, as `locate`, but open the library once for each server or bucket."""
    opened: dict[str, AbstractFileSystem] = {}
    for url in urls:
        server = "/".join(url.split("/")[:3])
        if "::" not in url and server in opened:
            yield RemotePath(opened[server], opened[server]._strip_protocol(url), url)
            continue
        found = locate(url)
        if isinstance(found, RemotePath):
            opened[server] = found.fs
        yield found


def locate(url: str) -> Path | RemotePath:
    """Return what a URL leads to; ``file://`` leads to a local path.

    Raises
    ------
    SourceError
        The protocol is unknown, or the library that it needs is not installed.
    """
    import fsspec  # late: local sources need none of it

    protocol = re.split("::|://", url)[0].lower()
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        remedy = f"pip install 'thawline[{EXTRAS[protocol]}]'" if protocol in EXTRAS else _told(error)
        raise SourceError(f"{_shown(url)}: reading {protocol}:// needs another library: {remedy}") from error
    except Exception as error:  # each library has its own errors for what is no URL of it
        raise SourceError(f"{_shown(url)}: expected a URL that fsspec can open: {_told(error)}") from error
    return Path(path) if "file" in _protocols(fs) else RemotePath(fs, path, url)


_LOCKS = [Lock() for _ in range(64)]
"""So that threads fetch an object once; several objects may share one."""


class RemotePath:
    """A file or folder behind a URL, with those members of `pathlib.Path` that sources use.

    A request that fails is tried again, see `PAUSES`. If no try succeeds, it raises `SourceError`, which ends the run;
    only an object that is not there raises `FileNotFoundError`.

    Parameters
    ----------
    fs : fsspec.AbstractFileSystem
    path : str
        As `fs` writes it.
    url : str
        As the user writes it.
    listed : Stamp, optional
        Of an object in a listing.

    Attributes
    ----------
    hold : bool
        Whether to fetch the object whole when it is opened, and to keep its bytes in memory.
    """

    def __init__(self, fs: AbstractFileSystem, path: str, url: str, listed: Stamp | None = None) -> None:
        self.fs, self._path, self._url, self._listed = fs, path, url, listed
        self.hold, self._held = False, b""

    def __str__(self) -> str:
        return _shown(self._url).rstrip("/")

    def as_posix(self) -> str:
        """Return the URL without passwords and signatures; a folder on a web server keeps its last slash."""
        return f"{self}/" if self.is_http and self._path.endswith("/") else str(self)

    @property
    def url(self) -> str:
        """The URL as the user wrote it, with passwords: for workers, not for messages."""
        return self._url

    def __truediv__(self, relative: str) -> RemotePath:
        first, *outer = self._url.split("::")
        if self.is_http:
            path, first = _joined(_bare(self._path), quote(relative)), _bare(first)
        else:
            path = _joined(self._path, relative)
        return RemotePath(self.fs, path, "::".join([_joined(first, relative), *outer]))

    @property
    def name(self) -> str:
        """The last part, without a query."""
        path = _bare(self._path) if self.is_http else self._path
        name = path.rstrip("/").rpartition("/")[2]
        return unquote(name) if self.is_http else name

    @property
    def stem(self) -> str:
        """The name without its extension."""
        return Path(self.name).stem

    @property
    def suffix(self) -> str:
        """The extension of the name, with its dot."""
        return Path(self.name).suffix

    @property
    def parent(self) -> RemotePath:
        """The folder that this is in."""
        first, *outer = self._url.split("::")
        if self.is_http:
            first = _bare(first)
        path = _bare(self._path) if self.is_http else self._path
        url = "::".join([first.rstrip("/").rpartition("/")[0], *outer])
        return RemotePath(self.fs, path.rstrip("/").rpartition("/")[0], url)

    @property
    def is_http(self) -> bool:
        """Whether a web server answers: its pages list names at most, neither sizes nor versions."""
        return "http" in _protocols(self.fs)

    def may_name(self, uri: str) -> bool:
        """Tell whether a manifest here may name `uri`: what is beside it, or in a store or on a web server.

        What else fsspec opens may be on the machine of the reader.
        """
        if not is_url(uri):
            return not uri.startswith("/")
        protocol = uri.partition("://")[0].lower()
        return "::" not in uri and (protocol in EXTRAS or protocol in _protocols(self.fs))

    @property
    def key(self) -> tuple[int, str]:
        """The same for all paths to one object."""
        return id(self.fs), self._path

    def is_dir(self) -> bool:
        """Tell whether this is a folder; of a web server, what has no extension."""
        if self._listed is not None:
            return False
        if self.is_http:
            return self._path.endswith("/") or not self.suffix
        return bool(self._info and self._info["type"] == "directory")

    def is_file(self) -> bool:
        """Tell whether this is an object."""
        return self._listed is not None or (not self.is_dir() and self._info is not None)

    def stat(self) -> Stamp:
        """Return what tells whether the object changes; from the listing, if it was listed."""
        return self._listed if self._listed is not None else stamp_of(self._info or {})

    def ask_size(self) -> RemotePath:
        """Return the same object, of which the server is asked what its listing does not tell."""
        return self.afresh() if self.stat().size == MISSING_SIZE else self

    @cached_property
    def _info(self) -> Mapping[str, Any] | None:
        try:
            self.fs.invalidate_cache()  # of an earlier call in this process
            info: Mapping[str, Any] = self._patiently(lambda: self.fs.info(self._path), PAUSES[:2])
            return info
        except FileNotFoundError:
            return None

    @cached_property
    def files(self) -> dict[str, RemotePath]:
        """All files below, by their path relative to this one; listed once, by as few requests as the protocol allows.

        Hidden names are left out.
        """
        whole = {} if _finds_at_once(self.fs) else {"on_error": "raise"}  # else it would skip folders in silence
        try:
            self.fs.invalidate_cache()
            found = self._patiently(lambda: self.fs.find(self._path, detail=True, **whole))
        except FileNotFoundError:
            return {}
        self.fs.invalidate_cache()  # which takes much memory
        return {uri: file for uri, file in self._below(found) if not uri.startswith(".") and "/." not in uri}

    def listing(self) -> dict[str, RemotePath]:
        """Return the files in this folder, without those in folders below; empty if it does not exist."""
        try:
            found = self._patiently(lambda: self.fs.ls(self._path, detail=True))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return dict(self._below({info["name"]: info for info in found if info["type"] != "directory"}))

    def _below(self, found: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, RemotePath]]:
        above = self._path.rstrip("/") + "/"
        for path, info in found.items():
            uri = path.removeprefix(above)
            if self.is_http:
                if "?" in uri or "#" in uri:  # links that sort the page
                    continue
                uri = unquote(uri)
            if path.startswith(above) and uri and not uri.endswith("/"):
                yield uri, RemotePath(self.fs, path, _joined(self._url, uri), stamp_of(info))

    def read(self, start: int | None = None, stop: int | None = None) -> bytes:
        """Return the bytes of the object, or those from `start` to `stop`: fewer only if it ends earlier."""
        if self.hold:
            return self._whole()[start:stop]
        return self._fetch(start, stop)

    def _whole(self) -> bytes:
        """Return all bytes, which are fetched once."""
        with _LOCKS[(id(self) >> 4) % len(_LOCKS)]:
            self._held = self._held or self._fetch(None, None)
        return self._held

    def _fetch(self, start: int | None, stop: int | None) -> bytes:
        kept = "; what was finished is kept, and the same command goes on from there"
        data: bytes = self._patiently(lambda: self.fs.cat_file(self._path, start=start, end=stop), remedy=kept)
        if start is not None and stop is not None and len(data) > stop - start:  # a server that knows no ranges
            return data[start:stop]
        return data

    def download(self, target: Path) -> str | None:
        """Write the whole object to a local file, and return its ETag, if it has one.

        Raises `FileNotFoundError` if there is no such object.
        """
        while True:
            self._patiently(lambda: self.fs.get_file(self._path, str(target)))
            now = self.afresh()
            if not now.is_file():
                raise FileNotFoundError(str(self))
            if now.stat() == self.stat():
                return (now._info or {}).get("ETag")
            self._listed = now.stat()  # replaced meanwhile, maybe in the middle of what was fetched

    def upload(self, file: Path, replaced: str | None) -> str | None:
        """Write a local file as this object if the object has the ETag `replaced`; None stands for no object.

        Return its new ETag; None if the object is another, and stays as it is. Only S3 has such a request. Raises
        `OSError` if the file cannot be read.
        """
        if file.stat().st_size > MOST_UPLOADED_BYTES:
            raise SourceError(f"{self}: cannot be written: S3 takes files of at most 5 GB; make parts of fewer rows")
        return self.write(file.read_bytes(), replaced)

    def write(self, data: bytes, replaced: str | None) -> str | None:
        """Write bytes as this object, as `upload` writes a file."""
        if "s3" not in _protocols(self.fs):
            raise SourceError(
                f"{self}: only s3:// stores can be written, whose uploads may require that nobody else was faster; "
                "write to a folder on this machine, and copy it"
            )
        bucket, key, _ = self.fs.split_path(self._path)
        condition = {"IfNoneMatch": "*"} if replaced is None else {"IfMatch": replaced}

        def request() -> str | None:
            try:
                put = self.fs.call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)
                return str(put["ETag"])
            except Exception as error:
                if _answer(error)[0] in _LOST or (replaced is not None and isinstance(error, FileNotFoundError)):
                    return None
                raise

        try:
            return self._patiently(request, doing="written")
        except FileNotFoundError as error:
            raise SourceError(f"{self}: cannot be written: {_told(error)}") from error

    def delete(self, stamp: Stamp, etag: str | None) -> bool:
        """Delete the object, if there is one; return False if it is another than that of this stamp and ETag.

        S3 compares the ETag when it deletes; other servers are asked for it just before.
        """
        now = self.afresh()
        if not now.is_file():
            return True
        if now.stat() != stamp:
            return False
        conditional = etag is not None and "s3" in _protocols(self.fs)

        def request() -> bool:
            try:
                if conditional:
                    bucket, key, _ = self.fs.split_path(self._path)
                    self.fs.call_s3("delete_object", Bucket=bucket, Key=key, IfMatch=etag)
                    return True
            except Exception as error:
                if _answer(error)[0] in _LOST:
                    return False
                if _answer(error)[0] != "NotImplemented":
                    raise
            self.fs.rm_file(self._path)
            return True

        try:
            return self._patiently(request, doing="deleted")
        except FileNotFoundError:
            return True

    def afresh(self) -> RemotePath:
        """Return the same object, of which nothing is known from a listing."""
        return RemotePath(self.fs, self._path, self._url)

    def open(self, mode: str = "rb") -> io.RawIOBase | io.BytesIO:
        """Return the object as a file of bytes whose parts are fetched as they are read; at once if `hold` is set."""
        size = self.stat().size
        if self.hold or size == MISSING_SIZE:
            self.hold = True
            return io.BytesIO(self._whole())
        return _RemoteFile(self, size)

    def _patiently(
        self,
        request: Callable[[], T],
        pauses: tuple[float, ...] | None = None,
        remedy: str = "",
        doing: str = "read",
    ) -> T:
        for pause in (*(PAUSES if pauses is None else pauses), None):
            try:
                return request()
            except (IsADirectoryError, NotADirectoryError):
                raise
            except Exception as caught:  # each library has its own errors for what may pass
                hidden = caught.__cause__ if self.is_http and isinstance(caught, FileNotFoundError) else None
                error = hidden if isinstance(hidden, Exception) else caught  # fsspec calls all failures of info so
                if isinstance(error, FileNotFoundError):
                    raise
                if _status(error) in _GONE:
                    raise FileNotFoundError(str(self)) from error
                if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
                    raise
                if doing != "read" and type(error).__name__ == "ParamValidationError":  # of botocore
                    raise SourceError(
                        f"{self}: cannot be {doing}: the S3 library here knows no conditional requests; update "
                        "s3fs and botocore: pip install -U s3fs aiobotocore botocore"
                    ) from error
                if pause is None or (doing != "read" and _is_final(error)):
                    raise SourceError(f"{self}: cannot be {doing}: {_told(error)}{remedy}") from error
                time.sleep(pause * random.uniform(1, 1.5))  # noqa: S311
        raise AssertionError("the last try returns or raises")


def hold_if_small(files: Iterable[Path | RemotePath]) -> None:
    """Let remote files be fetched whole when they are opened, and kept, if they take at most `HELD_BYTES` together."""
    remote = [file for file in files if isinstance(file, RemotePath)]
    stamps = map_ahead(RemotePath.stat, remote, LISTED_AT_ONCE, LISTED_AT_ONCE)
    if sum(max(0, one.size) for one in stamps) <= HELD_BYTES:
        for file in remote:
            file.hold = True


class _RemoteFile(io.RawIOBase):
    """A remote object as a file that can be searched."""

    def __init__(self, path: RemotePath, size: int) -> None:
        self._source, self._size, self._position = path, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = max(0, offset + (0, self._position, self._size)[whence])
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        stop = min(self._position + len(buffer), self._size)
        data = self._source.read(self._position, stop) if stop > self._position else b""
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def stamp_of(info: Mapping[str, Any]) -> Stamp:
    """Return the stamp of an object by its entry in a listing.

    Examples
    --------
    >>> stamp_of({"size": 7, "ETag": "abc"}) == stamp_of({"size": 7, "ETag": "abc", "LastModified": "later"})
    True
    >>> stamp_of({"name": "a.jpg"})
    Stamp(size=-1, mtime_ns=0)
    """
    size = info.get("size")
    version = next((f"{name}={info[name]}" for name in _VERSIONS if info.get(name)), None)
    number = 0 if version is None else int.from_bytes(blake2b(version.encode(), digest_size=8).digest()) >> 1
    return Stamp(MISSING_SIZE if size is None else int(size), number)


def _status(error: Exception) -> object:
    """Return the HTTP status that a library's error carries, if any."""
    found = (getattr(error, name, None) for name in ("status", "status_code", "code"))
    return next((status for status in found if status is not None), None)


def _answer(error: BaseException) -> tuple[str, int]:
    """Return code and HTTP status of what S3 answered; 0 if it did not."""
    response = getattr(error.__cause__, "response", None) or getattr(error, "response", None)
    found = response if isinstance(response, Mapping) else {}
    return found.get("Error", {}).get("Code", ""), int(found.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _is_final(error: Exception) -> bool:
    """Tell whether S3 would give the same answer to the same request."""
    code, status = _answer(error)
    passing = status in (408, 429) or code == "RequestTimeout"
    return isinstance(error, PermissionError) or (400 <= status < 500 and not passing)


def _protocols(fs: AbstractFileSystem) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _finds_at_once(fs: AbstractFileSystem) -> bool:
    """Tell whether a library has its own way to list all below a folder, instead of fsspec's folder by folder."""
    from fsspec import AbstractFileSystem
    from fsspec.asyn import AsyncFileSystem

    if isinstance(fs, AsyncFileSystem):
        return type(fs)._find is not AsyncFileSystem._find
    return type(fs).find is not AbstractFileSystem.find


def _bare(url: str) -> str:
    """Return a web address without its query."""
    return url.partition("?")[0]


def _joined(above: str, relative: str) -> str:
    if not {"..", "."} & set(relative.split("/")):
        return f"{above.rstrip('/')}/{relative}"
    scheme, mark, path = above.rpartition("://")
    return scheme + mark + posixpath.normpath(f"{path}/{relative}")


def _told(error: Exception) -> str:
    """Return the first line of what a library says, without passwords and signatures of URLs."""
    text = re.sub(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+", lambda url: _shown(url[0]), str(error))
    return first_line(OSError(text or type(error).__name__))


def _shown(url: str) -> str:
    """Return a URL without password and signature."""
    first, *outer = url.split("::")
    if "@" not in first and "?" not in first:
        return "::".join([first, *map(_shown, outer)])
    parts = urlsplit(first)
    pairs = {one: one.partition("=")[0].lower() for one in parts.query.split("&")}
    if _SIGNATURES & {*pairs.values()}:
        pairs = {one: name for one, name in pairs.items() if name not in _SIGNATURES and not _SIGNED.fullmatch(name)}
    user, at, host = parts.netloc.rpartition("@")
    shown = parts._replace(netloc=user.partition(":")[0] + at + host, query="&".join(pairs))
    return "::".join([urlunsplit(shown), *map(_shown, outer)])
