"""Find labels that are probably wrong, and say how far the list can be trusted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from features_cache import CacheFile, Catalog, digest_keys
from pipeline.arrays import Float32Array, Float64Array, IntArray
from pipeline.diagnostics.confident import Doubts, doubt_labels
from pipeline.diagnostics.out_of_fold import FOLDS, choose_params, out_of_fold
from pipeline.errors import FitError
from pipeline.evaluation.keyed import each_once
from pipeline.evaluation.leaks import join_units
from pipeline.evaluation.rows import Layer, Table, require_finite, select
from pipeline.evaluation.splits import labelled_rows
from pipeline.extraction.object_store import open_catalog
from pipeline.heads.registry import find_head
from pipeline.neighbours.leaks import keep_near_together
from pipeline.neighbours.nearest import nearest_rows
from pipeline.neighbours.rows import UnitRows, find_layer
from pipeline.neighbours.table import write_rows
from pipeline.results import Conflict, Neighbour, PlantedLabels, Progress, Suspect, silent
from pipeline.tables import read_columns, row_number

PLANTED = 0.05
"""Share of labels that is changed on purpose."""
BESIDE = 3
"""Neighbours of each suspect."""


@dataclass(frozen=True)
class SuspectsReport:
    """Labels that are probably wrong.

    Parameters
    ----------
    conflicts : list of Conflict
        Images of equal bytes with different labels: at least one of them is wrong.
    suspects : list of Suspect
        Other labels that are probably wrong, the most doubtful first.
    planted : PlantedLabels
        How well labels were found that were changed on purpose.
    accuracy : float
        How often heads that have not seen an image give it its label.
    layer, head : str
    notes : list of str
    file : CacheFile
    table : Table
        The rows whose labels were looked at.
    """

    conflicts: list[Conflict]
    suspects: list[Suspect]
    planted: PlantedLabels
    accuracy: float
    layer: str
    head: str
    notes: list[str]
    file: CacheFile
    table: Table


def suspects(
    cache: str | Path | Catalog,
    layer: str | None = None,
    source: str | None = None,
    backbone: str | None = None,
    pool: str | None = None,
    head: str = "logreg",
    threshold: float | None = None,
    seed: int = 0,
    *,
    progress: Progress | None = None,
) -> SuspectsReport:
    """Find labels that are probably wrong, in all rows, whatever their split.

    Each label is compared with the calibrated probabilities of a head trained on other folds, which hold no image of
    its group and no near-duplicate of it (confident learning). Then 5 % of the labels that look right are changed on
    purpose and the list is made again, to see how many of these it finds.

    Parameters
    ----------
    cache : str, Path or Catalog
        A folder of cache files, or one file.
    layer : str, optional
        By default ``penultimate``, or the only layer.
    source, backbone, pool : str, optional
        Select a file if the cache holds several.
    head : str, default "logreg"
        One with probabilities.
    threshold : float, optional
        Least similarity of near-duplicates; by default measured, see `pipeline.duplicates.duplicates`.
    seed : int, default 0
        Draws folds and planted labels.
    progress : callable, optional
        Called as ``progress(done, total, text)``.

    Raises
    ------
    CacheError
        If the cache or the layer cannot be found.
    FitError
        If there are too few rows, labels or groups, or features are not finite.

    Examples
    --------
    ::

        report = suspects("cache")
        for one in report.suspects[:10]:
            print(one.uri, one.label, one.suggested)
    """
    chosen = find_head(head)
    catalog = open_catalog(cache)
    file, layer = find_layer(catalog, layer, source, backbone, pool)
    (found,) = select(Catalog(file.path), [layer])
    labelled_rows(found.table.labels)
    require_finite(found)
    (found,), near_notes = keep_near_together([found], catalog, progress, threshold)
    table = found.table
    units = join_units(table.groups, table.digests, table.near)
    counted = _Counter(progress or silent, 2 * min(FOLDS, len(np.unique(units))))

    def probabilities_of(labels: IntArray) -> Float64Array:
        params = choose_params(found.features, labels, units, chosen, seed)
        return out_of_fold(found.features, labels, units, len(table.classes), chosen, params, seed, counted.count)

    probabilities = probabilities_of(table.labels)
    doubts = doubt_labels(probabilities, table.labels)
    planted = _plant(doubts, table.labels, len(table.classes), seed)
    trust = _judge(doubt_labels(probabilities_of(planted), planted).flagged, doubts, planted != table.labels)
    conflicts, in_conflict = _conflicts(table, probabilities)
    listed = doubts.order[doubts.flagged[doubts.order]]
    rows = np.array([row for row in listed.tolist() if row not in in_conflict], np.int64)
    notes = [*table.notes, *near_notes]
    if (table.splits == "test").any():
        notes.append("labels of test images are among those looked at: change them only after looking at the images")
    return SuspectsReport(
        conflicts,
        _suspects(found, rows, doubts, probabilities),
        trust,
        float(np.mean(probabilities.argmax(axis=1) == table.labels)),
        layer,
        chosen.name,
        notes,
        file,
        table,
    )


class _Counter:
    """Tells `progress` of folds, whichever thread is done with one."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def count(self) -> None:
        self._done += 1
        self._progress(self._done, self._total, "fit")


def _plant(doubts: Doubts, labels: IntArray, n_classes: int, seed: int) -> IntArray:
    """Give another label, drawn at random, to a share of the rows whose labels are not in doubt."""
    rng = np.random.default_rng(seed)
    learnt = np.unique(labels)
    clean = np.flatnonzero(~doubts.flagged)
    drawn = rng.permutation(clean)[: max(1, round(PLANTED * len(labels)))]
    codes = np.searchsorted(learnt, labels[drawn])
    planted = labels.copy()
    planted[drawn] = learnt[(codes + rng.integers(1, len(learnt), len(drawn))) % len(learnt)]
    return planted


def _judge(flagged: np.ndarray, before: Doubts, planted: np.ndarray) -> PlantedLabels:
    found = int((flagged & planted).sum())
    new = int((flagged & ~before.flagged).sum())
    return PlantedLabels(
        share=PLANTED,
        planted=int(planted.sum()),
        found=found,
        recall=found / max(1, int(planted.sum())),
        flagged=int(flagged.sum()),
        precision=found / max(1, int(flagged.sum())),
        precision_new=found / max(1, new),
    )


def _conflicts(table: Table, probabilities: Float64Array) -> tuple[list[Conflict], set[int]]:
    """Return the images of equal bytes with different labels, and all of their rows."""
    _, images, counts = np.unique(digest_keys(table.digests), return_inverse=True, return_counts=True)
    order = np.argsort(images, kind="stable")
    found, rows = [], set()
    for members in np.split(order, np.cumsum(counts)[:-1]):
        given = np.unique(table.labels[members])
        if len(given) < 2:
            continue
        best = int(given[probabilities[members].mean(axis=0)[given].argmax()])
        names = [(str(table.uris[row]), table.classes[table.labels[row]]) for row in members]
        found.append(Conflict([name for name, _ in names], [label for _, label in names], table.classes[best]))
        rows |= set(members.tolist())
    return found, rows


def _suspects(layer: Layer, rows: IntArray, doubts: Doubts, probabilities: Float64Array) -> list[Suspect]:
    """Describe rows, with the images that are most like them."""
    table, (file, info) = layer.table, layer.parts[0]
    images = UnitRows(file, info.name, table.rows[0])
    indices, similarities = nearest_rows(images.take(rows), images, BESIDE + 1)
    return [
        Suspect(
            uri=str(table.uris[row]),
            label=table.classes[table.labels[row]],
            suggested=table.classes[doubts.suggested[row]],
            probability=float(probabilities[row, table.labels[row]]),
            suggested_probability=float(probabilities[row, doubts.suggested[row]]),
            split=str(table.splits[row]),
            neighbours=_neighbours(table, row, near, how_near),
        )
        for row, near, how_near in zip(rows.tolist(), indices, similarities, strict=True)
    ]


def _neighbours(table: Table, row: int, near: IntArray, similarities: Float32Array) -> list[Neighbour]:
    found = [
        Neighbour(str(table.uris[index]), float(min(similarity, 1)), table.classes[table.labels[index]])
        for index, similarity in zip(near.tolist(), similarities, strict=True)
        if index != row
    ]
    return found[:BESIDE]


def read_corrections(path: str | Path) -> dict[str, str]:
    """Return the labels by uri that the page of suspects saved.

    Raises
    ------
    FitError
        The table has other columns.
    TableError
        It cannot be read, or gives an image two labels.
    """

    def choose(header: Sequence[str]) -> list[str]:
        if not {"uri", "label"} <= set(header):
            raise FitError(f"{path}: expected the columns uri and label, got {', '.join(header)}")
        return ["uri", "label"]

    columns = read_columns(Path(path), choose)
    if "" in columns["label"]:
        row = row_number(Path(path), columns["label"].index(""))
        raise FitError(f"{path}: expected a label in each row, found none in row {row}")
    if columns["uri"]:  # the page writes no row where nothing is marked
        columns = each_once(Path(path), "uri", columns)
    return dict(zip(columns["uri"], columns["label"], strict=True))


def write_labels(report: SuspectsReport, path: Path, corrections: Mapping[str, str] | None = None) -> int:
    """Write all labels that were looked at with their uri, and split and group where there are any.

    Parameters
    ----------
    report : SuspectsReport
    path : Path
        A .csv file.
    corrections : mapping of str to str, optional
        Labels by uri, which are written instead of those of the cache. By default what the report suggests.

    Returns
    -------
    int
        How many labels differ from those of the cache.

    Raises
    ------
    FitError
        A correction is of an image that was not looked at.
    CacheError
        The file cannot be written.
    """
    table = report.table
    if corrections is None:
        corrections = {one.uri: one.suggested for one in report.suspects}
        corrections |= {uri: one.suggested for one in report.conflicts for uri in one.uris}
    uris = table.uris.tolist()
    if unknown := sorted(set(corrections) - set(uris)):
        raise FitError(
            f"{len(unknown)} corrections are of images without a label in {report.file.path.name}, first {unknown[0]}"
        )
    given = [table.classes[label] for label in table.labels.tolist()]
    labels = [corrections.get(uri, label) for uri, label in zip(uris, given, strict=True)]
    columns: dict[str, Sequence[str]] = {"uri": uris, "label": labels}
    columns |= {
        name: column.tolist()
        for name, column in {"split": table.splits, "group": table.groups}.items()
        if (column != "").any()
    }
    write_rows(path, tuple(columns), zip(*columns.values(), strict=True))
    return sum(before != after for before, after in zip(given, labels, strict=True))
