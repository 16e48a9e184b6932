"""Find damaged rows, and mark them for computing again."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from features_cache.checksums import chunks, crc_rows, damaged_columns
from features_cache.errors import CacheError, ThawlineError, explained
from features_cache.layout import DIGEST_BYTES, DONE, PENDING, RUN_BYTES, UNREADABLE, LayerInfo
from features_cache.ledger import Ledger
from features_cache.lock import WriterLock
from features_cache.parts import is_try, new_try
from features_cache.publish import store_of
from features_cache.reader import CacheFile, open_cache
from features_cache.runs import decode_run


@dataclass(frozen=True)
class Finding:
    """One faulty row: its number, its uri, what is wrong, and the layer if one is concerned."""

    row: int
    uri: str
    what: str
    layer: str | None = None


@dataclass
class VerifyReport:
    """What `verify` found in one file.

    Attributes
    ----------
    path : Path
        The file.
    line : bytes
        Its first line, which identifies the file to `repair`.
    rows, done, unreadable, pending : int
        Counts by state.
    bytes_checked : int
        Feature bytes whose checksums were computed.
    damaged : list of Finding
        Rows whose bytes do not match their checksums; a row may occur more than once.
    changed : list of Finding
        Rows whose image in the source has changed or is gone; only if the source was read.
    damaged_runs : list of int
        Slots of the provenance table that cannot be read.
    """

    path: Path
    line: bytes
    rows: int
    done: int
    unreadable: int
    pending: int
    bytes_checked: int = 0
    damaged: list[Finding] = field(default_factory=list)
    changed: list[Finding] = field(default_factory=list)
    damaged_runs: list[int] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether the file is undamaged."""
        return not self.damaged and not self.damaged_runs


def verify(
    path: str | Path, read: Callable[[str], bytes] | None = None, tick: Callable[[], None] = lambda: None
) -> VerifyReport:
    """Check all checksums of a file; a writer may be adding rows meanwhile.

    Parameters
    ----------
    path : str or Path
        The file. Its structure is checked first, as on every opening.
    read : callable, optional
        Maps a uri to the bytes of its image. If given, the digest of each finished row is compared with the source. It
        may raise `OSError` or a `ThawlineError` for an image that is gone.
    tick : callable, optional
        Called whenever some rows have been checked.

    Raises
    ------
    CacheError, DamagedCacheError
        As `open_cache` does.
    """
    cache = open_cache(path)
    states = np.array(cache.states)  # rows that a writer finishes meanwhile are not checked
    done, unreadable, pending = [int(np.count_nonzero(states == state)) for state in (DONE, UNREADABLE, PENDING)]
    report = VerifyReport(cache.path, cache.header.line, cache.n_rows, done, unreadable, pending)
    report.damaged_runs = [
        slot for slot, raw in enumerate(cache.array("/runs").tolist()) if raw and decode_run(raw) is None
    ]
    for rows, what in damaged_columns(cache, states):
        report.damaged += [Finding(row, str(cache.uris[row]), what) for row in rows.tolist()]
    for layer in cache.layers.values():
        what = f"its features of {layer.name} are damaged"
        for rows in _damaged_features(cache, layer, states == DONE, report):
            report.damaged += [Finding(row, str(cache.uris[row]), what, layer.name) for row in rows.tolist()]
            tick()
    if read is not None:
        for row in np.flatnonzero((states != PENDING) & cache.digests.any(axis=1)).tolist():
            what = _compare(cache.digests[row].tobytes(), str(cache.uris[row]), read)
            if what:
                report.changed.append(Finding(row, str(cache.uris[row]), what))
    report.damaged.sort(key=lambda finding: finding.row)
    return report


def repair(path: str | Path, report: VerifyReport) -> int:
    """Mark the damaged rows pending, so that the next extraction computes them; return how many were marked.

    Rows whose image changed are not damaged and stay. A damaged name, label, split or group comes right when the next
    extraction sees that the source differs. Provenance records that cannot be read are emptied. A part in an object
    store is replaced there.

    Raises
    ------
    CacheLockedError
        Another process writes the file.
    CacheError
        The file is not the one that was verified, or the disk refuses.
    """
    path = Path(path)
    if (store := store_of(path.parent)) is not None and not is_try(path):
        draft, replaced = new_try(path), store.etag_of(path)
        try:
            with explained(draft, "write"):
                shutil.copyfile(path, draft)
            count = repair(draft, report)
            with explained(path, "write"):
                published = store.put(draft, path, replaced)
            if not published:
                raise CacheError(f"{path.name} was replaced in the object store meanwhile; verify it again")
        finally:
            draft.unlink(missing_ok=True)
        return count
    rows = np.unique(np.array([finding.row for finding in report.damaged], np.int64))
    slots = np.array(report.damaged_runs, np.int64)
    lock = WriterLock(path)
    try:
        cache = open_cache(path)
        if cache.header.line != report.line:
            raise CacheError(f"{path} is not the file that was verified; verify it again")
        ledger = Ledger(cache)
        try:
            ledger.reopen(rows)
            ledger.put_now("/runs", slots, np.zeros(len(slots), f"S{RUN_BYTES}"))
        finally:
            ledger.close()
    finally:
        lock.release()
    return len(rows)


def _damaged_features(
    cache: CacheFile, layer: LayerInfo, done: NDArray[np.bool_], report: VerifyReport
) -> Iterator[NDArray[np.int64]]:
    """Yield the done rows of one layer whose features do not match their checksums."""
    matrix, sums = cache.matrix(layer.name), cache.array(f"/crc/{layer.name}")
    for part in chunks(cache.n_rows, layer.row_bytes):
        if done[part].any():
            yield part.start + np.flatnonzero(done[part] & (crc_rows(matrix[part]) != sums[part]))
            report.bytes_checked += int(np.count_nonzero(done[part])) * layer.row_bytes


def _compare(digest: bytes, uri: str, read: Callable[[str], bytes]) -> str:
    try:
        data = read(uri)
    except (OSError, ThawlineError) as error:
        return f"its image cannot be read: {error}"
    same = hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest() == digest
    return "" if same else "its image in the source has changed"
