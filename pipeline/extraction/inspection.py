"""Inspect a cache: what its files hold, whether they are undamaged, and which images they hold twice."""

from __future__ import annotations

import uuid
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from features_cache import (
    DONE,
    PENDING,
    UNREADABLE,
    AmbiguousCacheError,
    CacheError,
    CacheFile,
    VerifyReport,
    digest_keys,
    repair,
    store_of,
    superseded,
    verify,
)
from pipeline.errors import EngineError, UnreadableImageError
from pipeline.extraction.cluster import open_cluster, place_of
from pipeline.extraction.object_store import local_path, open_catalog, url_of
from pipeline.images.sources.registry import ImageSource, Item, open_source
from pipeline.results import Progress, silent


@dataclass(frozen=True)
class FileSummary:
    """One line of ``cache ls``; `changed` is an ISO time, `bytes` the size of the file, or of all its parts.

    `view` names augmentation and number if the file holds an augmented view; it is ``""`` for plain images.
    """

    path: str
    source: str
    location: str
    backbone: str
    pool: str
    view: str
    layers: dict[str, int]
    precision: str
    store: str
    rows: int
    done: int
    unreadable: int
    pending: int
    bytes: int
    changed: str


@dataclass(frozen=True)
class Listing:
    """A cache folder: its files, why others are unusable or do not fit together, and which files are superseded."""

    files: list[FileSummary]
    problems: list[str]
    superseded: list[dict[str, Any]]


@dataclass(frozen=True)
class FileDetails:
    """Everything that ``cache show`` prints about one file.

    Attributes
    ----------
    summary : FileSummary
    classes : dict of str to dict of str to int
        Class name to split (``""`` for none) to count of rows.
    specs : dict of str to dict
        Layer name to its `LayerSpec` as JSON, with the fingerprint.
    request : dict
        The request that the file was made for.
    runs : list of dict
        Provenance of each run, oldest first.
    unreadable : list of dict
        ``uri`` and ``reason`` of each.
    duplicates : list of dict
        Each set of byte-equal images: ``uris``, ``splits``, ``labels``, and whether it lies ``across`` splits.
    """

    summary: FileSummary
    classes: dict[str, dict[str, int]]
    specs: dict[str, dict[str, Any]]
    request: dict[str, Any]
    runs: list[dict[str, Any]]
    unreadable: list[dict[str, str]]
    duplicates: list[dict[str, Any]]


def list_files(cache: str | Path) -> Listing:
    """List the files of a cache folder.

    Raises
    ------
    CacheError
        The folder has no usable file.
    """
    catalog = open_catalog(cache)
    folder = catalog.path if catalog.path.is_dir() else catalog.path.parent
    old = [{"path": str(path), "bytes": path.stat().st_size} for path in superseded(folder)]
    sources = {(file.handles.get("source"), file.handles.get("location")): file for file in catalog.files}
    problems = list(catalog.problems)
    problems += [CacheError(file.missing_note) for file in catalog.files if file.missing_note]
    for file in sources.values():
        try:
            catalog.check_source(file)
        except CacheError as error:
            problems.append(error)
    return Listing([summarize(file) for file in catalog.files], list(map(str, problems)), old)


def summarize(file: CacheFile) -> FileSummary:
    """Return the summary of `file`."""
    done, unreadable, pending = (int(np.count_nonzero(file.states == state)) for state in (DONE, UNREADABLE, PENDING))
    statuses = [path.stat() for path in (one.path for one in file.parts or (file,))]
    first = next(iter(file.layers.values()))
    return FileSummary(
        path=str(file.path),
        source=file.handles.get("source", ""),
        location=file.handles.get("location", ""),
        backbone=file.handles.get("backbone", ""),
        pool=file.handles.get("pool", ""),
        view=file.handles.get("view", ""),
        layers={name: info.dim for name, info in file.layers.items()},
        precision=str(first.spec.get("precision", "")),
        store=first.dtype,
        rows=file.n_rows + file.missing_rows,
        done=done,
        unreadable=unreadable,
        pending=pending + file.missing_rows,
        bytes=sum(status.st_size for status in statuses),
        changed=datetime.fromtimestamp(max(status.st_mtime for status in statuses), UTC).isoformat(timespec="seconds"),
    )


def detail(file: CacheFile) -> FileDetails:
    """Return all details of `file`."""
    unreadable = np.flatnonzero(file.states == UNREADABLE)
    return FileDetails(
        summarize(file),
        _class_counts(file),
        {name: {"fingerprint": info.fingerprint, **info.spec} for name, info in file.layers.items()},
        file.request,
        file.runs,
        [
            {"uri": uri, "reason": reason}
            for uri, reason in zip(file.uris[unreadable].tolist(), file.reasons[unreadable].tolist(), strict=True)
        ],
        _duplicates(file),
    )


def only_layer(file: CacheFile) -> str:
    """Return the only layer of a file.

    Raises
    ------
    AmbiguousCacheError
        The file has several layers.
    """
    if len(file.layers) > 1:
        raise AmbiguousCacheError(f"{file.path} has the layers {', '.join(file.layers)}; name one of them")
    return next(iter(file.layers))


def to_record(report: VerifyReport) -> dict[str, Any]:
    """Return the findings about one file as JSON-ready keys."""
    names = ("rows", "done", "unreadable", "pending", "bytes_checked", "damaged_runs", "sound")
    findings = {
        "damaged": [asdict(finding) for finding in report.damaged],
        "changed": [asdict(finding) for finding in report.changed],
    }
    return {"path": str(report.path)} | {name: getattr(report, name) for name in names} | findings


def _class_counts(file: CacheFile) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    for number, name in [*enumerate(file.classes), (-1, "")]:
        splits, found = np.unique(file.splits[file.labels == number], return_counts=True)
        if len(splits):
            counts[name] = dict(zip(splits.tolist(), found.tolist(), strict=True))
    return counts


def _duplicates(file: CacheFile) -> list[dict[str, Any]]:
    read = np.flatnonzero(file.digests.any(axis=1))
    _, numbers, counts = np.unique(digest_keys(file.digests[read]), return_inverse=True, return_counts=True)
    order = np.argsort(numbers, kind="stable")
    sets = np.split(read[order], np.cumsum(counts)[:-1]) if len(read) else []
    return [_duplicate_set(file, rows) for rows in sorted((rows for rows in sets if len(rows) > 1), key=min)]


def _duplicate_set(file: CacheFile, rows: np.ndarray) -> dict[str, Any]:
    splits = file.splits[rows].tolist()
    labels = [file.classes[label] if label >= 0 else "" for label in file.labels[rows].tolist()]
    return {"uris": file.uris[rows].tolist(), "splits": splits, "labels": labels, "across": len(set(splits)) > 1}


def check(
    cache: str | Path,
    source: str | Path | None = None,
    mend: bool = False,
    cluster: str | None = None,
    progress: Progress | None = None,
) -> tuple[list[VerifyReport], list[str]]:
    """Verify every file of a cache, and every part of one in parts.

    Parameters
    ----------
    cache : str or Path
        A folder of cache files, or one of them.
    source : str or Path, optional
        The image source. If given, each row's digest is compared with its image; files of other sources are skipped.
    mend : bool, default False
        Mark damaged rows pending, so that the next extraction computes them again.
    cluster : str, optional
        Verify the files on the workers of a Dask cluster, see `pipeline.extraction.cluster.parse_cluster`.
    progress : callable, optional
        Called as ``progress(files done, files in total, text)``.

    Returns
    -------
    reports : list of VerifyReport
        One for each file that could be opened.
    problems : list of str
        Why other files could not be opened.

    Raises
    ------
    CacheError
        The cache has no usable file, or none of `source`.
    """
    catalog, tell, run = open_catalog(cache), progress or silent, uuid.uuid4().hex
    files, where = catalog.files, None
    if source is not None:
        where = place_of(source)
        location = _listed(run, where)[0].location
        files = [file for file in files if file.handles.get("location") == location]
        if not files:
            known = ", ".join(sorted({file.handles.get("location", "") for file in catalog.files}))
            raise CacheError(f"{catalog.path} has no file of {location}; its sources are {known}")
    paths = {part.path.name: part.path for file in files for part in file.parts}
    tasks = {name: (run, str(path) if cluster is None else url_of(path), where, mend) for name, path in paths.items()}
    reports: dict[str, VerifyReport] = {}

    def keep(name: str, report: VerifyReport) -> None:
        reports[name] = replace(report, path=paths[name])
        tell(len(reports), len(tasks), "verify")

    if cluster is None:
        for name, arguments in tasks.items():
            keep(name, _check_file(*arguments, silent))
    else:
        with open_cluster(cluster) as workers:
            failed = workers.call_each(
                _check_file, tasks, keep, lambda _, state: tell(len(reports), len(tasks), "verify", state)
            )
        if failed:
            why = "; ".join(f"{name}: {error}" for name, error in failed.items())
            raise EngineError(f"{len(failed)} of {len(tasks)} files could not be verified: {why}")
    return [reports[name] for name in paths], [str(error) for error in catalog.problems]


def _check_file(run: str, place: str, source: str | None, mend: bool, progress: Progress) -> VerifyReport:
    """Verify one file, here or on a worker; see `check`."""
    path, checked = local_path(place, [Path(place).name]), 0
    images, items = (None, {}) if source is None else _listed(run, source)

    def tick() -> None:
        nonlocal checked
        checked += 1
        progress(checked, 0, "verify")

    def read(uri: str) -> bytes:
        if images is None or uri not in items:
            raise UnreadableImageError("it is no longer in the source")
        tick()
        return images.read(items[uri])

    report = verify(path, None if images is None else read, tick)
    if not report.sound and (store := store_of(path.parent)) is not None:
        store.fetch([path.name], anew=True)  # it may be the copy alone that is damaged
        report = verify(path, None if images is None else read, tick)
    if mend and not report.sound:
        repair(path, report)
    return report


@lru_cache(maxsize=1)
def _listed(run: str, source: str) -> tuple[ImageSource, dict[str, Item]]:
    """Return a source and its items by uri, listed once in a run, which `run` names."""
    images = open_source(source)
    return images, {item.uri: item for item in images.items}
