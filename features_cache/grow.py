"""Rebuild a file for a changed source, carrying over every row that is still valid."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features_cache.catalog import superseded_files
from features_cache.checksums import chunks, crc_rows, records_of, sound_results, sound_sources
from features_cache.convert import digest_keys, fixed_text
from features_cache.errors import CacheError, explained
from features_cache.layout import DONE, RUN_BYTES, RUN_SLOTS, UNREADABLE, LayerInfo, Rows
from features_cache.ledger import Ledger
from features_cache.lock import locking, temporary_path
from features_cache.parts import plan_of
from features_cache.reader import CacheFile, open_cache
from features_cache.rowfile import sync_folder
from features_cache.runs import encode_run
from features_cache.writer import CacheWriter

_CHUNK_BYTES = 32 << 20
_ROW_BYTES = 512  # of a row's texts, far more than most: for chunks of rows, which a long one widens
_CARRIED_BYTES = 500  # of a row that is carried over, beside its features


def same_rows(file: CacheFile, rows: Rows, classes: Sequence[str]) -> bool:
    """Return whether a source lists exactly the images, labels, splits and groups of `file`."""
    if len(rows) != file.n_rows or tuple(classes) != file.classes:
        return False
    texts = {"uri": rows.uris, "split": rows.splits, "group": rows.groups}
    numbers = {"label": rows.labels, "size": rows.sizes, "mtime_ns": rows.mtimes_ns}
    return all(np.array_equal(file.array(f"/rows/{name}"), values) for name, values in numbers.items()) and all(
        np.array_equal(file.array(f"/rows/{name}")[part], fixed_text(values[part], name))
        for name, values in texts.items()
        for part in chunks(len(rows), _ROW_BYTES)  # so that one long text does not widen all
    )


def match_rows(
    file: CacheFile, rows: Rows, digests: NDArray[np.uint8] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Match finished rows of `file` to `rows`: by digest where it is known, else by uri, size and modification time.

    Parameters
    ----------
    file : CacheFile
    rows : Rows
    digests : ndarray of uint8, shape (n, 16), optional
        Digests of the images of `rows`; zeros where one is not known.

    Returns
    -------
    new, old : ndarray of int64, shape (k,)
        Row numbers in `rows` (ascending) and in `file`.
    """
    pending, column = file.pending, np.asarray(file.array("/rows/uri"))
    in_order = all((column[part][1:] > column[part][:-1]).all() for part in _overlapping(len(column)))
    order = None if in_order else np.argsort(column, kind="stable")
    located = [_find(column, order, fixed_text(rows.uris[part], "uri")) for part in chunks(len(rows), _ROW_BYTES)]
    old = np.concatenate([np.empty(0, np.int64), *located])
    same = (file.sizes[old] == np.asarray(rows.sizes)) & (file.mtimes_ns[old] == np.asarray(rows.mtimes_ns))
    old[~same | pending[old]] = -1
    if digests is not None:
        known, finished = np.flatnonzero(digests.any(axis=1)), np.flatnonzero(~pending)
        keys = digest_keys(file.digests[finished])
        found = _find(keys, np.argsort(keys, kind="stable"), digest_keys(digests[known]))
        old[known] = np.append(finished, -1)[found]
    new = np.flatnonzero(old >= 0)
    return new, old[new]


def _find(column: NDArray[np.bytes_], order: NDArray[np.int64] | None, wanted: NDArray[np.bytes_]) -> NDArray[np.int64]:
    """Return where each of `wanted` (k,) is last in a column (n,), -1 for none; `order` sorts an unsorted one."""
    if not len(column):
        return np.full(len(wanted), -1)
    fits = np.strings.str_len(wanted) <= column.dtype.itemsize  # the others would widen the whole column
    wanted = np.where(fits, wanted, b"").astype(column.dtype)
    places = np.maximum(np.searchsorted(column, wanted, "right", sorter=order) - 1, 0)
    found = places if order is None else order[places]
    return np.where(fits & (column[found] == wanted), found, -1)


def _overlapping(count: int) -> Iterator[slice]:
    return (slice(part.start, part.stop + 1) for part in chunks(count, _ROW_BYTES))


def grow(
    path: str | Path,
    rows: Rows,
    classes: Sequence[str],
    layers: Sequence[LayerInfo],
    handles: Mapping[str, str],
    request: Mapping[str, Any],
    *,
    carry: bool | NDArray[np.bool_] = True,
    digests: NDArray[np.uint8] | None = None,
) -> CacheWriter:
    """Replace the file at `path` by one for `rows`, and open it for writing.

    The new file is completed under a temporary name, with all rows that could be carried over. Then the old one is
    renamed to ``STEM.superseded-N.h5`` and the new one takes its name. The superseded file stays a donor of rows until
    `drop_redundant` or the user removes it.

    Parameters
    ----------
    path : str or Path
        An existing file.
    rows, classes, layers, handles, request
        As for `CacheWriter.create`; the layers must be those of the old file if its rows are carried over.
    carry : bool or ndarray of bool, shape (n,), default True
        Which rows may be carried over, see `match_rows`; the others are pending until their images have been read.
    digests : ndarray of uint8, shape (n, 16), optional
        As for `match_rows`.

    Raises
    ------
    CacheError, CacheLockedError
        As `CacheWriter.create`; the old file is then unchanged.
    """
    from features_cache.create import build_file  # h5py

    path = Path(path)
    with locking(path) as lock:
        old = open_cache(path)
        same_layers = [layer.fingerprint for layer in layers] == [layer.fingerprint for layer in old.layers.values()]
        if np.any(carry) and not same_layers:
            raise CacheError(f"{path} holds other layers than the requested ones; make a new file for them")
        temporary = temporary_path(path)
        build_file(temporary, rows, classes, layers, handles, request)
        if np.any(carry):
            new_rows, old_rows = match_rows(old, rows, digests)
            chosen = np.broadcast_to(carry, len(rows))[new_rows]
            carry_rows(old, temporary, new_rows[chosen], old_rows[chosen])
        with explained(path, "write"):
            set_aside(path)
            temporary.replace(path)
            sync_folder(path.parent)
        return CacheWriter(path, lock)


def carry_rows(old: CacheFile, target: Path, new_rows: NDArray[np.int64], old_rows: NDArray[np.int64]) -> None:
    """Copy the records of runs and all finished rows whose checksums hold into a file that nobody else writes."""
    new_file = open_cache(target)
    runs = old.runs  # read once, since another process may write to `old`
    number_of = _renumbered(runs, new_file.runs)
    ledger = Ledger(new_file)
    chunk = max(1, _CHUNK_BYTES // (_CARRIED_BYTES + sum(layer.row_bytes for layer in old.layers.values())))
    try:
        records = [encode_run({**run, "run": number_of[run["run"]]}) for run in runs]
        if records:
            slots = np.array([number_of[run["run"]] % RUN_SLOTS for run in runs])
            ledger.put_now("/runs", slots, np.array(records, f"S{RUN_BYTES}"))
        for start in range(0, len(new_rows), chunk):
            new, before = new_rows[start : start + chunk], old_rows[start : start + chunk]
            stored = {}
            for name in old.layers:
                stored[name] = np.asarray(old.matrix(name))[before]
                old.release(name, before)
            states = old.states[before]
            sound = sound_sources(old, before) & sound_results(old, before)
            for name, values in stored.items():
                sound &= (crc_rows(values) == old.array(f"/crc/{name}")[before]) | (states == UNREADABLE)
            found = records_of(old, before)
            found["size"], found["mtime_ns"] = new_file.sizes[new], new_file.mtimes_ns[new]
            found["run"] = [number_of.get(run, -1) for run in found["run"].tolist()]  # -1 where the record is lost
            for state in (DONE, UNREADABLE):
                take = np.flatnonzero(sound & (states == state))
                taken = {name: values[take] for name, values in stored.items()} if state == DONE else {}
                ledger.put(new[take], taken, found[take], state)
        ledger.commit()
    finally:
        ledger.close()


def _renumbered(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    """Return the numbers that the runs of an old file get in a new one: their own, if that has none yet.

    A run that the new file has already, because another file carried its record, keeps its number there.
    """
    known = {_told(run): run["run"] for run in new}
    if not known:
        return {run["run"]: run["run"] for run in old}
    numbers: dict[int, int] = {}
    following = max(known.values(), default=-1) + 1
    for run in old:
        numbers[run["run"]] = known.setdefault(_told(run), following)
        following += numbers[run["run"]] == following
    return numbers


def _told(run: Mapping[str, Any]) -> str:
    return json.dumps({key: value for key, value in run.items() if key != "run"}, sort_keys=True)


def set_aside(path: Path) -> None:
    """Link the old file under its superseded name; it also keeps its own name until the new file replaces it."""
    kept = path.with_name(f"{path.stem}.superseded-{max(superseded_files(path), default=0) + 1}.h5")
    try:
        kept.hardlink_to(path)
    except FileExistsError:  # another process, which superseded the same part, took the number
        set_aside(path)
    except OSError:  # a file system without hard links
        path.rename(kept)


class Donors:
    """The finished rows of a folder whose features can be copied, by the digest of their image.

    Parameters
    ----------
    folder : Path
        All of its usable cache files are searched, superseded ones included, but no parts: those of a large source
        would take too long.
    fingerprints : collection of str
        Only files that hold all of these layers count.
    own_part : Path, optional
        A part that is searched nevertheless.
    """

    def __init__(self, folder: Path, fingerprints: Collection[str], own_part: Path | None = None) -> None:
        self._files: list[tuple[CacheFile, list[str]]] = []
        keys, places = [np.empty(0, np.uint64)], [np.empty((0, 2), np.int64)]
        for path in sorted(folder.glob("*.h5")):
            if plan_of(path) is not None and path != own_part:
                continue
            try:
                file = open_cache(path)
                rows = np.flatnonzero(file.states == DONE)
            except CacheError:
                continue  # `Catalog.problems` reports it
            names = {info.fingerprint: name for name, info in file.layers.items()}
            if names.keys() >= set(fingerprints):
                keys.append(np.ascontiguousarray(file.digests[rows][:, :8]).view("<u8").reshape(-1))
                places.append(np.column_stack([np.full(len(rows), len(self._files)), rows]))
                self._files.append((file, [names[one] for one in fingerprints]))
        joined = np.concatenate(keys)
        order = np.argsort(joined, kind="stable")
        self._keys, self._places = joined[order], np.concatenate(places)[order]

    def __contains__(self, digest: bytes) -> bool:
        return self.find(digest) is not None

    def __getitem__(self, digest: bytes) -> dict[str, NDArray[Any]]:
        features = self.find(digest)
        if features is None:
            raise CacheError("a cache file changed while rows were copied from it; run the same command again")
        return features

    def find(self, digest: bytes) -> dict[str, NDArray[Any]] | None:
        """Return an image's features by layer name, each of shape (dim,), or None if no undamaged row has them."""
        key = np.frombuffer(digest[:8], "<u8")[0]
        for place in range(int(np.searchsorted(self._keys, key)), len(self._keys)):
            if self._keys[place] != key:
                break
            number, row = self._places[place].tolist()
            file, names = self._files[number]
            if file.digests[row].tobytes() == digest and (features := _sound(file, names, row)) is not None:
                return features
        return None


def _sound(file: CacheFile, names: Sequence[str], row: int) -> dict[str, NDArray[Any]] | None:
    features = {name: np.array(file.matrix(name)[row]) for name in names}
    sound = all(crc_rows(values[None])[0] == file.array(f"/crc/{name}")[row] for name, values in features.items())
    return features if sound and sound_results(file, np.array([row]))[0] else None
