"""An index for the nearest neighbours in large caches: an inverted file of faiss, kept beside the cache file.

Rows are put into cells around centres; a query is compared with the rows of the nearest cells only. How many of these
are visited is chosen by measuring what is found among rows of the cache itself, against exact search.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from features_cache import CacheError, DamagedCacheError, atomic_write, explained
from pipeline.arrays import Float32Array, IntArray
from pipeline.errors import first_line
from pipeline.invalidation import stage_key
from pipeline.neighbours.nearest import nearest_rows
from pipeline.neighbours.rows import UnitRows

EXACT_ROWS = 100_000
"""Up to so many rows, search is exact: a query takes a fraction of a second."""
RECALL = 0.95
"""Share of the ten nearest neighbours that is to be found."""
TESTED = 200
"""Rows with which the recall is measured."""
SEED = 0


@dataclass(frozen=True)
class RowIndex:
    """A built index.

    Parameters
    ----------
    faiss_index : faiss.Index
    cells : int
        How many cells are visited for a query.
    recall : float
        Share of the ten nearest neighbours of rows of the cache that are found, other than the row itself.
    """

    faiss_index: Any
    cells: int
    recall: float

    def nearest(self, queries: Float32Array, count: int) -> tuple[IntArray, Float32Array]:
        """Find nearly all that `pipeline.neighbours.nearest.nearest_rows` finds for queries (m, d).

        Where fewer than `count` are found, the rest is -1.
        """
        self.faiss_index.nprobe = self.cells
        similarities, indices = self.faiss_index.search(queries, count)
        return np.asarray(indices, np.int64), np.asarray(similarities, np.float32)


def index_of(rows: UnitRows) -> RowIndex:
    """Return the index of a cache's rows: the one kept beside the file if it is of the same rows, else a new one.

    Raises
    ------
    CacheError
        faiss is not installed, or the index cannot be written.
    """
    try:
        import faiss
    except ImportError:
        raise CacheError(
            f"search among more than {EXACT_ROWS:,} images needs faiss; install it with: pip install 'thawline[search]'"
        ) from None
    path = rows.file.path.with_suffix(f".{rows.layer}.index")
    about = path.with_name(path.name + ".json")
    key = stage_key(
        "index",
        file=rows.file.header.line.hex(),
        layer=rows.file.layer(rows.layer).fingerprint,
        digests=hashlib.blake2b(rows.file.digests[rows.rows].tobytes()).hexdigest(),
    )
    if kept := _kept(about, key):
        try:
            return RowIndex(faiss.read_index(str(path)), **kept)
        except RuntimeError as error:  # faiss has no other
            raise DamagedCacheError(f"{path} is missing or damaged: delete {about}, and it is built again") from error
    index = _build(faiss, rows)
    if os.access(path.parent, os.W_OK):
        _keep(faiss, index, path, about, key)
    return index


def _keep(faiss: Any, index: RowIndex, path: Path, about: Path, key: str) -> None:
    with explained(path, "write"):
        try:
            with atomic_write(path) as draft:
                faiss.write_index(index.faiss_index, str(draft))
        except RuntimeError as error:
            raise CacheError(f"{path} cannot be written: {first_line(error)}") from error
        with atomic_write(about) as draft:
            draft.write_text(json.dumps({"key": key, "cells": index.cells, "recall": index.recall}))


def _kept(about: Path, key: str) -> dict[str, Any] | None:
    """Return what is known of the kept index, None if there is none of these rows."""
    if not about.exists():
        return None
    try:
        found = json.loads(about.read_text())
        return {"cells": int(found["cells"]), "recall": float(found["recall"])} if found["key"] == key else None
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise DamagedCacheError(f"{about} is damaged: delete it, and the index is built again") from error


def _build(faiss: Any, rows: UnitRows) -> RowIndex:
    """Train the centres on a sample, add all rows, and visit as few cells as give `RECALL`."""
    centres = int(4 * np.sqrt(len(rows)))
    drawn = np.sort(np.random.default_rng(SEED).permutation(len(rows))[: 64 * centres])
    index = faiss.index_factory(rows.dim, f"IVF{centres},SQ8", faiss.METRIC_INNER_PRODUCT)
    index.cp.seed = SEED
    index.train(rows.take(drawn))
    for _, block in rows.blocks():
        index.add(block)
    tested = np.sort(np.random.default_rng(SEED + 1).permutation(len(rows))[:TESTED])
    queries = rows.take(tested)
    truth = _without_self(nearest_rows(queries, rows, 11)[0], tested)
    cells, recall = 8, 0.0
    while True:
        found = RowIndex(index, cells, recall).nearest(queries, 11)[0]
        pairs = zip(truth, _without_self(found, tested), strict=True)
        recall = float(np.mean([len(np.intersect1d(a, b)) / len(a) for a, b in pairs]))
        if recall >= RECALL or cells >= centres:
            return RowIndex(index, cells, recall)
        cells = min(2 * cells, centres)


def _without_self(found: IntArray, own: IntArray) -> list[IntArray]:
    return [row[row != number][:10] for row, number in zip(found, own, strict=True)]
