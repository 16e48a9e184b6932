"""From a catalog of cache files to layers and labelled rows to train a head on."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features_cache import DONE, PENDING, UNREADABLE, CacheFile, Catalog, LayerInfo, as_float32
from pipeline.arrays import IntArray
from pipeline.errors import FitError
from pipeline.evaluation.joined import JoinedColumns
from pipeline.evaluation.labels import LabelsTable, labels_of
from pipeline.evaluation.leaks import NearDuplicates, clusters_of
from pipeline.options import CLASSIFICATION
from pipeline.spec import REDECODED, aliases_of, canonical_json, is_outdated

_CHUNK = 4096


@dataclass(frozen=True, eq=False)
class Table:
    """The rows that are done and labelled in every file of a layer; columns of length n.

    Parameters
    ----------
    files : tuple of CacheFile
        One, or several if a layer is joined across files.
    rows : tuple of (n,) int64
        Numbers of the rows in each file.
    notes : tuple of str
        On where labels come from, and rows that were left out.
    target : str or None
        The column of a table that labels came from; None for the labels of the source.
    near : NearDuplicates, optional
        Of the rows, if near-duplicates are to be kept together.
    task : str
        What is predicted, one of `pipeline.options.TASKS`.
    values : (n, K) bool or (n,) float64, optional
        Which of several labels each row has, or its number; `labels` then only tell what splits are stratified by.
    joined : JoinedColumns, optional
        Columns of a table of labels that are to be joined to features.
    """

    files: tuple[CacheFile, ...]
    rows: tuple[IntArray, ...]
    classes: tuple[str, ...]
    uris: NDArray[np.str_]
    labels: IntArray
    splits: NDArray[np.str_]
    groups: NDArray[np.str_]
    digests: NDArray[np.uint8]
    notes: tuple[str, ...]
    target: str | None = None
    near: NearDuplicates | None = None
    task: str = CLASSIFICATION
    values: NDArray[Any] | None = None
    joined: JoinedColumns | None = None

    @property
    def y(self) -> NDArray[Any]:
        """What heads learn, by row: class numbers (n,), labels (n, K) or numbers (n,)."""
        return self.labels if self.values is None else self.values

    @cached_property
    def clusters(self) -> NDArray[np.str_]:
        """What counts together in intervals and tests, by row (n,); see `pipeline.evaluation.leaks.clusters_of`."""
        return clusters_of(self.groups, self.digests, self.near)


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer, or several whose features are joined.

    Parameters
    ----------
    name : str
        ``"blocks.4"``, or ``"blocks.4+input"``; the names of joined columns follow after a ``+`` each.
    parts : tuple of (CacheFile, LayerInfo)
        In the order in which features are joined.
    table : Table
        Shared by all layers of the same files.
    joined : JoinedColumns, optional
        Columns of a table, in the order of the rows of `table`, that stand behind the features.
    """

    name: str
    parts: tuple[tuple[CacheFile, LayerInfo], ...]
    table: Table
    joined: JoinedColumns | None = None

    @property
    def dim(self) -> int:
        """Number of features, with those of joined columns."""
        return sum(info.dim for _, info in self.parts) + (self.joined.dim if self.joined else 0)

    @property
    def unjoined(self) -> str:
        """Name of the layer without joined columns."""
        return "+".join(info.name for _, info in self.parts)

    def handle(self, key: str) -> str:
        """Return a handle (``"backbone"``, ``"pool"``) of the files, joined with ``+`` if they differ."""
        return "+".join(dict.fromkeys(file.handles.get(key, "") for file, _ in self.parts))

    def features(self, index: IntArray) -> NDArray[np.float32]:
        """Read the features of the rows `index` (k,) of the table into a new array (k, dim) of float32."""
        found = [
            as_float32(file.features(info.name, self.table.rows[self.table.files.index(file)][index]))
            for file, info in self.parts
        ]
        if self.joined is not None:
            found.append(self.joined.features(index))
        return found[0] if len(found) == 1 else np.hstack(found)

    def describe(self) -> list[dict[str, Any]]:
        """Return what a saved model needs to extract each part again, in order: spec, fingerprint, dim and request."""
        described = []
        for file, info in self.parts:
            asked = {key: value for key, value in file.request.items() if key != "layers"}
            described.append(
                {
                    "spec": dict(info.spec),
                    "fingerprint": info.fingerprint,
                    "dim": info.dim,
                    "request": asked | {"layer": info.name},
                }
            )
        return described


def select(
    catalog: Catalog,
    layers: Sequence[str] | None = None,
    source: str | None = None,
    backbone: str | None = None,
    pool: str | None = None,
    labels: LabelsTable | None = None,
    task: str = CLASSIFICATION,
) -> list[Layer]:
    """Find layers by name; if the table has columns to join, each layer comes twice, without them and with them.

    Parameters
    ----------
    catalog : Catalog
        A folder of cache files, or one of them.
    layers : sequence of str, optional
        Names, or the aliases by which they were extracted (``stages``); ``A+B`` joins two. By default every layer of
        the files that fit, which must be of one source, backbone and pool.
    source, backbone, pool : str, optional
        Handles that narrow the files. Without a pool, files of whole activations are passed over if there are others.
    labels : LabelsTable, optional
        Labels, splits and groups to take instead of those of the source.
    task : str, default "classification"
        What is predicted, one of `pipeline.options.TASKS`; that of a table of labels counts more.

    Raises
    ------
    CacheError
        If a layer does not exist, or fits several files.
    FitError
        If joined files have different classes, nothing is extracted yet, or a column to join is called like a layer.
    """
    catalog, older = _by_todays_rules(catalog)
    narrowed = {"source": source, "backbone": backbone, "pool": pool}
    if pool is None:
        catalog = catalog.only(pooled(catalog.files) or catalog.files)
    tables: dict[tuple[CacheFile, ...], Table] = {}
    selected = []
    for joined in _names(catalog, catalog.fitting(**narrowed), layers):
        names = joined.split("+")
        files = [catalog.find(layer=name, **narrowed) for name in names]
        key = tuple(dict.fromkeys(files))
        if key not in tables:
            table = _tabulate(key, labels, task)
            tables[key] = replace(table, notes=(*table.notes, *older, *_misread(key)))
        parts = tuple((file, file.layer(name)) for file, name in zip(files, names, strict=True))
        selected.append(Layer(joined, parts, tables[key]))
        if (columns := tables[key].joined) is not None:
            selected.append(_with_columns(selected[-1], columns))
    return selected


def _with_columns(layer: Layer, joined: JoinedColumns) -> Layer:
    """Return a layer with columns of a table behind its features."""
    for name in joined.names:
        if any(name in file.layers for file, _ in layer.parts):
            raise FitError(f"column {name!r} of the table is called like a layer of the cache; rename the column")
    return replace(layer, name="+".join([layer.name, *joined.names]), joined=joined)


def pooled(files: Iterable[CacheFile]) -> list[CacheFile]:
    """Return the files that hold no whole activations, only vectors."""
    return [file for file in files if not any(info.shape for info in file.layers.values())]


def _by_todays_rules(catalog: Catalog) -> tuple[Catalog, list[str]]:
    """Leave out files of older rules if one of today's has the same layers; name those in notes."""
    made_for = {file: [_apart_from_rules(file, info) for info in file.layers.values()] for file in catalog.files}
    of_today = {key: file for file, keys in made_for.items() if not is_outdated(file) for key in keys}
    replaced = {
        file: of_today[keys[0]] for file, keys in made_for.items() if is_outdated(file) and of_today.keys() >= set(keys)
    }
    return catalog.only(file for file in catalog.files if file not in replaced), [
        f"{old.path.name} is not read: {new.path.name} has its layers by today's rules" for old, new in replaced.items()
    ]


def _apart_from_rules(file: CacheFile, info: LayerInfo) -> str:
    return canonical_json([file.handles, {**info.spec, "decode": None, "heads": None, "prefix_tokens": None}])


def _misread(files: Sequence[CacheFile]) -> Iterator[str]:
    """Name the TIFFs that older decoding rules may have misread."""
    uris = {uri for file in files if is_outdated(file) for uri in file.uris[file.states == DONE].tolist()}
    if tiffs := sum(uri.lower().endswith(REDECODED) for uri in uris):
        yield (
            f"{tiffs} TIFFs were decoded by older rules, which misread grey ones of more than 8 bits: "
            "run the same extract again"
        )


def _names(catalog: Catalog, files: Sequence[CacheFile], asked: Sequence[str] | None) -> list[str]:
    """Return the layer names asked for, with aliases resolved and none twice; by default all of `files`."""
    if asked is not None and not len(asked):
        raise FitError("expected at least one layer, got none")
    if asked is None:
        if not catalog.is_one_cache(files):
            raise catalog.ambiguous(files)
        return list(dict.fromkeys(name for file in files for name in file.layers))
    joins = (itertools.product(*(stands_for(files, part) for part in one.split("+"))) for one in asked)
    return list(dict.fromkeys("+".join(parts) for product in joins for parts in product))


def stands_for(files: Sequence[CacheFile], name: str) -> Sequence[str]:
    """Return the layers that a name or alias (``stages``) stands for in `files`; an unknown name is returned as is."""
    if any(name in file.layers for file in files):
        return [name]
    return next((found for file in files if (found := aliases_of(file.request).get(name))), [name])


def require_finite(layer: Layer) -> None:
    """Read the whole layer and refuse rows with NaN or infinite features."""
    bad: list[int] = []
    for start in range(0, len(layer.table.labels), _CHUNK):
        index = np.arange(start, min(start + _CHUNK, len(layer.table.labels)))
        finite = np.isfinite(layer.features(index)).all(axis=1)
        bad += index[~finite].tolist()
    if bad:
        precisions = {str(info.spec.get("precision")) for _, info in layer.parts}
        raise not_finite(layer.name, layer.table.uris[bad], len(layer.table.labels), precisions)


def not_finite(layer: str, bad: NDArray[np.str_], count: int, precisions: Collection[str]) -> FitError:
    """Return the error that the `bad` ones of `count` images have NaN or infinite features in these precisions."""
    way = "extract again with precision fp32"
    if set(precisions) == {"fp32"}:
        way = "they were computed in fp32, so look at the weights of the network, or use another"
    return FitError(f"layer {layer} has NaN or infinite features in {len(bad)} of {count} rows, first {bad[0]}; {way}")


def check_readable(file: CacheFile) -> None:
    """Raise `FitError` if no image of a file can be read: it says what is wrong with the first, and what may be."""
    if not file.n_rows or not (file.states == UNREADABLE).all():
        return
    hints = [f"{file.n_rows} of {file.n_rows} rows are unreadable, first: {file.uris[0]}: {file.reasons[0]}"]
    missing = bool((file.sizes < 0).all()) and file.reasons[0] == "no such file"
    location = file.handles.get("location", "")
    if missing and "\\" in str(file.uris[0]):
        hints.append("write / between folders instead of \\")
    if missing and location.lower().endswith((".csv", ".tsv", ".jsonl", ".parquet")):
        hints.append(f"paths are relative to the manifest's folder, {location.rpartition('/')[0]}")
    raise FitError("; ".join(hints))


def _tabulate(files: tuple[CacheFile, ...], labels: LabelsTable | None, task: str) -> Table:
    first = files[0]
    for file in files:
        file.check_columns()
    check_readable(first)
    own = np.asarray(first.labels)
    known = labels_of(labels, first.uris, first.classes, own, first.splits, first.groups, task)
    usable = (first.states == DONE) & (known.labels >= 0)
    if (first.states == PENDING).all():
        raise FitError(f"no image of {first.path} is extracted yet; run the same extract again")
    reasons = {
        "unreadable": first.states == UNREADABLE,
        "not extracted yet": first.states == PENDING,
        f"without a label{' or a joined column' if known.joined else ''}": (first.states == DONE) & (known.labels < 0),
    }
    for other in files[1:]:
        if labels is None and other.classes != first.classes:
            raise FitError(f"{first.path.name} and {other.path.name} have different classes; join layers of one source")
    rows = join_rows(files, usable)
    counts = {reason: int(mask.sum()) for reason, mask in reasons.items()}
    counts["not in every joined file"] = int(usable.sum()) - len(rows[0])
    left_out = ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)
    notes = known.notes
    if left_out:
        notes += (f"{first.n_rows - len(rows[0])} of {first.n_rows} rows are left out: {left_out}",)
    notes += tuple(file.missing_note for file in files if file.missing_note)
    kept = rows[0]
    return Table(
        files,
        tuple(rows),
        known.classes,
        first.uris[kept],
        np.array(known.labels[kept]),
        known.splits[kept],
        known.groups[kept],
        np.array(first.digests[kept]),
        notes,
        None if labels is None else labels.target,
        task=task if labels is None else labels.task,
        values=None if known.values is None else known.values[kept],
        joined=None if known.joined is None else known.joined.take(kept),
    )


def join_rows(files: Sequence[CacheFile], usable: NDArray[np.bool_]) -> list[IntArray]:
    """Find the same images in several files: by uri and digest, because files may differ in their rows.

    Parameters
    ----------
    files : sequence of CacheFile
    usable : (n_rows,) bool
        The rows of the first file to look for.

    Returns
    -------
    list of (k,) int64
        For each file, the rows of the images that are done in all.
    """
    rows = [np.flatnonzero(usable & (files[0].states == DONE))]
    for other in files[1:]:
        done = np.flatnonzero(other.states == DONE)
        row_of = dict(zip(_keys(other, done), done.tolist(), strict=True))
        found = np.array([row_of.get(key, -1) for key in _keys(files[0], rows[0])], np.int64)
        rows = [numbers[found >= 0] for numbers in rows] + [found[found >= 0]]
    return rows


def _keys(file: CacheFile, rows: IntArray) -> list[tuple[str, bytes]]:
    return [(str(uri), digest.tobytes()) for uri, digest in zip(file.uris[rows], file.digests[rows], strict=True)]
