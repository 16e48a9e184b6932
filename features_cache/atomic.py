"""Write a file completely or not at all, and clear up after processes that were killed while they wrote."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from features_cache.rowfile import sync_folder


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; when the block ends, sync that file and rename it to `path`.

    If the block raises, `path` is unchanged. Any step may raise `OSError`.
    """
    with scratch_folder(path.parent) as folder:
        draft = Path(folder) / path.name
        draft.touch()
        mode = draft.stat().st_mode  # from the umask; safetensors makes files that only the owner can read
        yield draft
        draft.chmod(mode)
        with draft.open("rb") as stream:
            os.fsync(stream.fileno())
        draft.replace(path)
    sync_folder(path.parent)


def scratch_folder(parent: str | Path) -> TemporaryDirectory[str]:
    """Return a new temporary folder in `parent`, after deleting those that killed processes left there.

    Its name tells whose it is: machine, process and something random. A name of another machine or container, whose
    processes cannot be seen from here, and folders of other users are left alone.
    """
    _delete_leavings(str(parent))
    return TemporaryDirectory(dir=parent, prefix=f".thawline-{_machine()}-{os.getpid()}-")


@cache
def _delete_leavings(parent: str) -> None:
    with suppress(OSError):  # someone else clears up, too; or the folder may be written, but not listed
        for path in Path(parent).iterdir():
            found = re.fullmatch(rf"\.thawline-{_machine()}-(\d+)-\w+", path.name)
            if found and not _runs(int(found[1])) and path.lstat().st_uid == os.getuid():
                shutil.rmtree(path, ignore_errors=True)


@cache
def _machine() -> str:
    """Return what this process has in common with those whose ids it can see: the host and, on Linux, the container."""
    container = Path("/proc/self/ns/pid")
    names = os.uname().nodename, str(container.readlink()) if container.is_symlink() else ""
    return hashlib.blake2b("".join(names).encode(), digest_size=4).hexdigest()


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (OSError, OverflowError) as error:  # others than this: it is another user's, or the number is no id at all
        return not isinstance(error, ProcessLookupError)
    return True
