"""What a run needs besides its recipe: the network, the labelled rows, and where their inputs come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from features_cache import DONE, CacheFile, Catalog, open_cache
from pipeline.backbones.backbone import Backbone
from pipeline.backbones.cut import read_place
from pipeline.backbones.graph import INPUT, PENULTIMATE
from pipeline.backbones.registry import load
from pipeline.engines.select import Resolved, resolve
from pipeline.errors import FitError
from pipeline.extract import extract
from pipeline.finetuning.data import Activations, Pictures, Reader
from pipeline.finetuning.network import ALL, line_of
from pipeline.heads.cached import Table, select
from pipeline.images.augment import NONE
from pipeline.images.source import open_source
from pipeline.results import Progress
from pipeline.spec import DEFAULT_POOL

FLAT = "flatten"


@dataclass(frozen=True)
class Wanted:
    """What to gather, and how to compute it.

    Parameters
    ----------
    source : str or Path
    backbone : str
        ``NAME`` or ``NAME@WEIGHTS``.
    freeze, top, augment : str
    head_first : bool
    output : Path
        Folder of cache files.
    precision, store, engine, device : str
    size, workers : int, optional
        As for extraction.
    progress : callable
    say : callable
        Takes a sentence that the user should read now.
    """

    source: str | Path
    backbone: str
    freeze: str
    top: str
    augment: str
    head_first: bool
    output: Path
    precision: str
    store: str
    engine: str
    device: str
    size: int | None
    workers: int | None
    progress: Progress
    say: Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Material:
    """A loaded network and its rows.

    Parameters
    ----------
    backbone : Backbone
    resolved : Resolved
        Device and precision.
    table : Table
        Labelled rows that could be read.
    reader : Reader
        Of inputs for training.
    features : Reader or None
        Of what the classifier reads, where the head trains first.
    trunk_precision : str
        In which what is frozen computes, or was computed.
    """

    backbone: Backbone
    resolved: Resolved
    table: Table
    reader: Reader
    features: Reader | None
    trunk_precision: str


def gather(wanted: Wanted) -> Material:
    """Load the network, and extract what does not change while it trains.

    Raises
    ------
    ThawlineError
        Whatever loading and extraction raise.
    """
    resolved = resolve(wanted.engine, wanted.device, wanted.precision)
    backbone = load(wanted.backbone, wanted.size)
    line, read = line_of(backbone, wanted.freeze), read_place(backbone)
    cached = line is not None and wanted.augment == NONE
    pooled = read._replace(layout="vector")
    image = _extract(wanted, INPUT) if wanted.top == "direct" and (cached or wanted.head_first) else None
    features = _extract(wanted, PENULTIMATE) if wanted.head_first else None
    head_reader = None if features is None else Activations(features, PENULTIMATE, pooled, image)
    if line is None or not cached:
        base = features or image or _extract(wanted, INPUT)
        pictures = Pictures(open_source(wanted.source), backbone.preprocessing, wanted.augment, wanted.workers)
        return Material(backbone, resolved, _table([base]), pictures, head_reader, resolved.precision)
    if wanted.freeze == ALL:
        layer, place, file = PENULTIMATE, pooled, _extract(wanted, PENULTIMATE)
    else:
        _announce(wanted, int(np.prod(line.shape)))
        layer, place, file = wanted.freeze, line, _extract(wanted, wanted.freeze, FLAT)
    table = _table([one for one in (file, features, image) if one is not None])
    precision = file.layers[layer].spec["precision"]
    return Material(backbone, resolved, table, Activations(file, layer, place, image), head_reader, precision)


def _extract(wanted: Wanted, layer: str, pool: str = DEFAULT_POOL) -> CacheFile:
    """Return the file that holds `layer`."""
    (result,) = extract(
        wanted.source,
        [wanted.backbone],
        [layer],
        pool,
        wanted.output,
        precision=wanted.precision,
        store=wanted.store,
        size=wanted.size,
        engine=wanted.engine,
        device=wanted.device,
        workers=wanted.workers,
        progress=wanted.progress,
    )
    for note in result.notes:
        wanted.say(note)
    return open_cache(result.path)


def _announce(wanted: Wanted, dim: int) -> None:
    rows = len(open_source(wanted.source).items)
    size = rows * dim * np.dtype(wanted.store).itemsize
    wanted.say(f"activations at {wanted.freeze} of {rows} images take {size / 1e6:,.0f} MB in {wanted.output}")


def _table(files: Sequence[CacheFile]) -> Table:
    """Return the labelled rows of the first file, which must be there in the others too."""
    table = select(Catalog(files[0].path), [next(iter(files[0].layers))])[0].table
    for file in files[1:]:
        if not (file.states[table.rows[0]] == DONE).all():
            raise FitError(f"{file.path.name} lacks rows of {files[0].path.name}: the source changed; run it again")
    return table
