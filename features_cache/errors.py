"""The project's error family, and the errors of the store.

Every error that a user can cause is a `ThawlineError`. Its message is one line: what was expected, what came, what
to do. The command line prints that line and exits with 1.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

_NO_TEXT = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class ThawlineError(Exception):
    """Base of all errors that thawline raises on purpose.

    Control characters in the message, which come from files and their names, are escaped: it is one line.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_NO_TEXT.sub(lambda found: ascii(found[0])[1:-1], message))


class CacheError(ThawlineError):
    """A feature cache cannot be found, opened, created or written."""


class DamagedCacheError(CacheError):
    """A file is not a cache of this format, or its structure does not match its own digest."""


class CacheLockedError(CacheError):
    """Another process is writing to the same file."""


class AmbiguousCacheError(CacheError):
    """Several files or layers match the selection; the message lists them."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """Return ``"; did you mean A, B?"`` with the known names closest to `name`, or an empty string.

    Parameters
    ----------
    name : str
        The name that the user gave.
    known : iterable of str
        The valid names.
    count : int, default 3
        Maximum number of suggestions.
    """
    close = get_close_matches(name, list(known), n=count, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else ""


def nearest_beside(path: Path) -> str:
    """Return the suggestion of `nearest` among the names in the folder of `path`."""
    try:
        return nearest(path.name, sorted(entry.name for entry in path.parent.iterdir()))
    except OSError:
        return ""


@contextmanager
def explained(path: Path, doing: str) -> Iterator[None]:
    """Turn an `OSError` in the block into a one-line `CacheError` that says what to do.

    Parameters
    ----------
    path : Path
        The file or folder concerned.
    doing : str
        The verb phrase of the message, such as ``"write"``.

    Raises
    ------
    CacheError
        In place of any `OSError`.
    """
    try:
        yield
    except OSError as error:
        reason = _REMEDIES.get(error.errno or 0, error.strerror or str(error))
        raise CacheError(f"cannot {doing} {path}: {reason}") from error


_AGAIN = "then run the same command again; finished rows are kept"
_REMEDIES = {
    errno.ENOSPC: f"the disk is full; free some space, {_AGAIN}",
    errno.EDQUOT: f"the disk quota is used up; free some space, {_AGAIN}",
    errno.EFBIG: f"the file would pass the file-size limit; raise it (ulimit -f), {_AGAIN}",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.EACCES: "permission denied; choose another folder or change its rights",
    errno.EPERM: "permission denied; choose another folder or change its rights",
    errno.ENOENT: "no such file or folder; check the path",
    errno.EEXIST: "its folder is a file; choose another folder",
    errno.ENOTDIR: "a part of the path is a file, not a folder; choose another folder",
    errno.ENAMETOOLONG: "the name is too long for this file system; choose a shorter one",
}
