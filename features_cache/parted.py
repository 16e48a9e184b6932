"""Read a cache in parts as if it were one file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import DTypeLike, NDArray

from features_cache.errors import CacheError
from features_cache.header import Header
from features_cache.layout import DTYPES, LayerInfo, lay_out_arrays
from features_cache.parts import Part, PartPlan, open_plan
from features_cache.reader import CacheFile, open_cache


def open_parts(path: Path) -> PartedCache:
    """Open all parts of a plan that exist; raises as `features_cache.parts.open_plan`."""
    return PartedCache(open_plan(path))


def open_part(plan: PartPlan, number: int) -> CacheFile | None:
    """Return the published file of a part; None if there is none, or one that holds other layers or is damaged."""
    try:
        file = open_cache(plan.path_of(number))
    except CacheError:
        return None
    return file if file.layers == {layer.name: layer for layer in plan.layers} else None


class PartedCache(CacheFile):
    """The parts of one plan with the interface of one file, read-only; `features_cache.open_cache` makes it.

    Rows are those of the parts that exist, sorted by uri. Classes are the union of theirs. Columns are copies; features
    are read when they are asked for.

    Parameters
    ----------
    plan : PartPlan

    Attributes
    ----------
    plan : PartPlan
    parts : tuple of CacheFile
        The files that exist, in the order of their uris.
    missing : tuple of Part
        Parts without a file that can be read. A file of other layers, or with uris outside the range of its part, does
        not count: it is left from another plan or listing.
    """

    def __init__(self, plan: PartPlan) -> None:
        self.plan = plan
        files: list[CacheFile] = []
        missing: list[Part] = []
        for part, end in zip(plan.parts, [*(other.first for other in plan.parts[1:]), None], strict=True):
            file = open_part(plan, part.number)
            if file is None or not _lies_in(file, part.first, end):
                missing.append(part)
            else:
                files.append(file)
        classes = tuple(sorted({name for file in files for name in file.classes}))
        header = Header(
            line=hashlib.blake2b(b"".join(file.header.line for file in files)).digest(),
            file_bytes=sum(file.header.file_bytes for file in files),
            n_rows=sum(file.n_rows for file in files),
            classes=classes,
            layers={layer.name: layer for layer in plan.layers},
            handles=dict(plan.handles),
            request=dict(plan.request),
            created=min((file.header.created for file in files), default=""),
            arrays={},
        )
        super().__init__(plan.path, header)
        self._files, self.missing = tuple(files), tuple(missing)
        self._starts = np.cumsum([0, *(file.n_rows for file in files)])

    @property
    def parts(self) -> tuple[CacheFile, ...]:
        """The files that exist, in the order of their uris."""
        return self._files

    def array(self, name: str) -> np.memmap[Any, Any]:
        """Return one array of the rows, such as ``"/rows/label"``, joined over the parts, as a copy.

        Checksums of features are joined, too. Those in ``"/rows/source_crc"`` are of labels and widths of each part.
        """
        if name.startswith("/features/"):
            return self.matrix(name.removeprefix("/features/"))
        if name not in self._views:
            found: list[NDArray[Any]] = [file.array(name) for file in self._files]
            if name == "/rows/label":
                found = [self._labels_of(file) for file in self._files]
            if not found:
                layout = lay_out_arrays(0, 0, {"classes": 8, "uri": 8, "group": 8}, tuple(self.layers.values()))
                found = [np.empty(layout[name][1], layout[name][0])]
            joined = np.concatenate(found)
            joined.flags.writeable = False
            self._views[name] = cast("np.memmap[Any, Any]", joined)
        return self._views[name]

    def _labels_of(self, file: CacheFile) -> Any:
        """Return the labels of a part as indices into the union of classes; damaged ones stay damaged."""
        if file.classes == self.classes:
            return file.labels
        number = {name: index for index, name in enumerate(self.classes)}
        numbers = np.array([*(number[name] for name in file.classes), -1], np.int64)
        labels = np.asarray(file.labels)
        sound = (labels >= -1) & (labels < len(file.classes))
        return np.where(sound, numbers[np.where(sound, labels, -1)], len(self.classes))

    def matrix(self, layer: str) -> np.memmap[Any, Any]:
        """Return the features of one layer as a `PartedMatrix`, which reads rows when it is indexed."""
        info = self.layer(layer)
        return cast("np.memmap[Any, Any]", PartedMatrix(self._files, info, self._starts))

    def features(self, layer: str, rows: NDArray[np.int64] | slice) -> NDArray[Any]:
        """Read the features of finished rows, and check them against their checksums; see `CacheFile.features`."""
        info = self.layer(layer)
        reads = [lambda own, file=file: file.features(layer, own) for file in self._files]
        numbers = np.arange(self.n_rows)[rows] if isinstance(rows, slice) else np.asarray(rows)
        return _gather(reads, info, self._starts, numbers)

    def check_columns(self) -> None:
        """Check every part as `CacheFile.check_columns` does."""
        for file in self._files:
            file.check_columns()

    @property
    def runs(self) -> list[dict[str, Any]]:
        """Provenance of the runs that wrote the parts, each with the name of its ``"part"``; numbers are the part's."""
        return [{**run, "part": file.path.name} for file in self._files for run in file.runs]

    @property
    def missing_note(self) -> str:
        """What is missing, in words; ``""`` if nothing is."""
        if not self.missing:
            return ""
        return (
            f"{self.path.name} lacks {len(self.missing)} of {len(self.plan.parts)} parts, about {self.missing_rows} "
            "rows: run the same extract again"
        )

    @property
    def missing_rows(self) -> int:
        """Rows that the missing parts had when the plan was written."""
        return sum(part.rows for part in self.missing)


class PartedMatrix:
    """The features of one layer over several files; rows are read when it is indexed.

    Parameters
    ----------
    files : sequence of CacheFile
    info : LayerInfo
    starts : ndarray of int64, shape (len(files) + 1,)
        Number of the first row of each file, and of all rows.
    """

    ndim = 2

    def __init__(self, files: Sequence[CacheFile], info: LayerInfo, starts: NDArray[np.int64]) -> None:
        self._files, self._info, self._starts = files, info, starts
        self.shape = (int(starts[-1]), info.dim)
        self.dtype = np.dtype(DTYPES[info.dtype])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> NDArray[Any]:
        rows, *columns = key if isinstance(key, tuple) else (key,)
        numbers = np.asarray(np.arange(len(self))[rows])
        reads = [lambda own, file=file: np.asarray(file.matrix(self._info.name))[own] for file in self._files]
        found = _gather(reads, self._info, self._starts, np.atleast_1d(numbers))
        return np.asarray((found if numbers.ndim else found[0])[(..., *columns)])

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("the rows lie in several files, so an array of them is a copy")
        return self[:].astype(self.dtype if dtype is None else dtype, copy=False)


def _gather(
    reads: Sequence[Callable[[NDArray[np.int64]], NDArray[Any]]],
    info: LayerInfo,
    starts: NDArray[np.int64],
    rows: NDArray[np.int64],
) -> NDArray[Any]:
    """Read rows, (k,), from the files that hold them into one array (k, dim)."""
    holders = np.searchsorted(starts, rows, "right") - 1
    different = np.unique(holders).tolist()
    if len(different) == 1:
        return np.asarray(reads[different[0]](rows - starts[different[0]]))
    found = np.empty((len(rows), info.dim), DTYPES[info.dtype])
    for holder in different:
        where = np.flatnonzero(holders == holder)
        found[where] = reads[holder](rows[where] - starts[holder])
    return found


def _lies_in(file: CacheFile, first: str, end: str | None) -> bool:
    """Tell whether the uris of a part's file, which are sorted, lie from `first` up to `end`."""
    ends = file.array("/rows/uri")[[0, -1]].tolist()
    return first.encode() <= ends[0] and (end is None or ends[1] < end.encode())
