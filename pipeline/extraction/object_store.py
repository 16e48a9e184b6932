"""Caches in object stores: a folder of ours holds a copy, which every command reads and `extract` works in.

Only whole files of the store are in the copy, each with a record of the ETag that it had, and tries at parts. So a
cache in a store is always in parts: nothing is written in place. A finished file is uploaded on the condition that the
object is still the one that was copied, or is not there, see `features_cache.publish`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path

from features_cache import (
    PLAN_SUFFIX,
    CacheError,
    Catalog,
    atomic_write,
    explained,
    is_superseded,
    is_try,
    plan_of,
    register_store,
    scratch_folder,
    store_of,
)
from pipeline.images.sources.remote import LISTED_AT_ONCE, RemotePath, Stamp, is_url, locate, stamp_of
from pipeline.spec import fingerprint_of
from pipeline.user_folder import user_folder

_JUST_NOW_NS = 1_000_000_000
"""A file that another process of this machine made so short ago may be newer than the listing that lacks it."""

_RECORD = ".etag"
"""Ends the name of the record of a file in a copy."""


def open_catalog(cache: str | Path | Catalog) -> Catalog:
    """Return the catalog of a cache, of which a copy is fetched if it is a URL.

    Raises
    ------
    ThawlineError
        As `Catalog`, and as `local_path`.
    """
    return cache if isinstance(cache, Catalog) else Catalog(local_path(cache, to_write=False))


def local_path(cache: str | Path, only: Collection[str] | None = None, *, to_write: bool = True) -> Path:
    """Return the path of a cache folder or file on this machine; what a URL leads to is fetched into a copy.

    Parameters
    ----------
    cache : str or Path
        A path is returned as it is.
    only : collection of str, optional
        Names of the files to fetch, by default all whose ETag is not that of the copy.
    to_write : bool, default True
        Whether the folder need not exist.

    Raises
    ------
    SourceError
        The store cannot be read.
    CacheError
        There is nothing to read, or no place for the copy.
    """
    if not is_url(str(cache)):
        return Path(cache)
    far = locate(str(cache).rstrip("/"))
    if isinstance(far, Path):
        return far
    name = far.name if _is_file(far.name) else ""
    root = far.parent if name else far
    try:
        folder = user_folder("caches") / fingerprint_of(root.as_posix())
    except RuntimeError as error:
        raise CacheError(f"there is no place for a copy of {root}: {error}") from error
    store = store_of(folder) or StoredCache(root, folder)
    register_store(folder, store)
    if not store.fetch(only) and not to_write:
        raise CacheError(f"no cache at {root}: it holds no cache file (.h5); run the extraction with it as the output")
    if name and not to_write and not (folder / name).exists():
        raise CacheError(
            f"there is no {name} in the object store at {root}; thawline cache ls {root} lists what is there"
        )
    return folder / name


def url_of(path: Path) -> str:
    """Return how workers are told where a cache file is: by the URL of what it is a copy of, or its whole path."""
    store = store_of(path.parent)
    return (store.root / path.name).url if isinstance(store, StoredCache) else str(path.absolute())


def shown(path: Path) -> str:
    """Return how the user is told where a cache file is: by the URL of the object that it is a copy of, or its path."""
    store = store_of(path.parent)
    return str(store.root / path.name) if isinstance(store, StoredCache) and store.holds(path) else str(path)


class StoredCache:
    """A cache in an object store, and its copy; a `features_cache.publish.ObjectStore`.

    Parameters
    ----------
    root : RemotePath
        The folder in the store.
    folder : Path
        Of the copy.
    """

    def __init__(self, root: RemotePath, folder: Path) -> None:
        self.root, self.folder = root, folder
        self._knows_conditions = False

    def fetch(self, only: Collection[str] | None = None, *, anew: bool = False) -> bool:
        """Bring the copy up to date, see `features_cache.publish.ObjectStore`."""
        began = time.time_ns()
        self.root.fs.invalidate_cache()
        there = {name: far for name, far in self.root.listing().items() if _is_file(name)}
        with explained(self.folder, "write"):
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.iterdir():
                name = path.name[1 : -len(_RECORD)] if path.name.endswith(_RECORD) else path.name
                if _is_file(name) and name not in there:
                    with suppress(FileNotFoundError):  # another process deleted it
                        if path.stat().st_ctime_ns < began - _JUST_NOW_NS:
                            path.unlink()
            wanted = [
                (name, far)
                for name, far in there.items()
                if (only is None or name in only) and (anew or self._known(name)[0] != far.stat())
            ]
            with scratch_folder(self.folder) as scratch, ThreadPoolExecutor(LISTED_AT_ONCE) as pool:
                tasks = [pool.submit(self._fetch, name, far, Path(scratch)) for name, far in wanted]
                try:
                    for one in as_completed(tasks):
                        one.result()
                except BaseException:  # also Ctrl-C; only the downloads that have begun are waited for
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
        return bool(there)

    def _fetch(self, name: str, far: RemotePath, scratch: Path) -> None:
        if not far.stat().mtime_ns:
            raise CacheError(f"{self.root} does not tell when a file changes; copy it to a folder on this machine")
        try:
            etag = far.download(scratch / name)
        except FileNotFoundError:  # deleted since it was listed
            return
        self._keep(scratch / name, self.folder / name, far.stat(), etag)

    def etag_of(self, path: Path) -> str | None:
        """Return the ETag of the object that a file of the copy equals, see `features_cache.publish.ObjectStore`."""
        return self._known(path.name)[1]

    def put(self, draft: Path, path: Path, replaced: str | None) -> bool:
        """Publish a file in the store and in the copy, see `features_cache.publish.ObjectStore`."""
        plan = path if path.suffix == PLAN_SUFFIX else plan_of(path)
        self._try_conditions(plan)
        etag = (self.root / path.name).upload(draft, replaced)
        if etag is None:
            self.fetch([path.name])
            return False
        self._keep(draft, path, stamp_of({"size": draft.stat().st_size, "ETag": etag}), etag)
        self._try_conditions(plan)
        return True

    def _try_conditions(self, plan: Path | None) -> None:
        """Put the plan in the store there once more as a new object; raise if the server does not refuse that."""
        if plan is None or self._knows_conditions or not (far := self.root / plan.name).is_file():
            return
        if far.write(far.read(), None) is not None:
            raise CacheError(
                f"{self.root}: its server ignores the conditions of uploads (If-None-Match), so machines would "
                "overwrite each other's rows; write to S3, to a server that knows them, or to a folder"
            )
        self._knows_conditions = True

    def holds(self, path: Path) -> bool:
        """Tell whether a file of the copy equals an object of the store, as far as is known."""
        return self._known(path.name)[0] is not None

    def delete(self, path: Path) -> None:
        """Delete the object of a file of the copy, see `features_cache.publish.ObjectStore`."""
        stamp, etag = self._known(path.name)
        far = self.root / path.name
        if stamp is not None and not far.delete(stamp, etag):
            raise CacheError(f"{far} was replaced in the object store meanwhile, and stays there; prune again")
        self._record(path.name).unlink(missing_ok=True)

    def _keep(self, draft: Path, path: Path, stamp: Stamp, etag: str | None) -> None:
        """Rename a file to its name in the copy, and record what it is a copy of."""
        kept = json.dumps([*stamp, etag, *_identity(draft)])
        draft.replace(path)
        with atomic_write(self._record(path.name)) as record:
            record.write_text(kept, encoding="utf-8")

    def _known(self, name: str) -> tuple[Stamp | None, str | None]:
        """Return stamp and ETag of the object that a file of the copy equals; None, None if that is not known."""
        try:
            size, mtime_ns, etag, *identity = json.loads(self._record(name).read_text(encoding="utf-8"))
            same = identity == _identity(self.folder / name)
        except (OSError, ValueError):  # no record, or a damaged one: the file is fetched again
            return None, None
        return (Stamp(size, mtime_ns), etag) if same else (None, None)

    def _record(self, name: str) -> Path:
        return self.folder / f".{name}{_RECORD}"


def _identity(path: Path) -> list[int]:
    """Return what tells a file from the one that another process may have put in its place."""
    status = path.stat()
    return [status.st_ino, status.st_size, status.st_mtime_ns]


def _is_file(name: str) -> bool:
    """Tell whether a name in a store is one that the copy has."""
    path = Path(name)
    return path.suffix in (".h5", PLAN_SUFFIX) and not is_try(path) and not is_superseded(path)
