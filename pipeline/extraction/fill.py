"""Cache files being filled: batches of images in, features of their pending rows out, an engine in between."""

from __future__ import annotations

import platform
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from features_cache import CacheWriter, Donors, published_path
from pipeline.arrays import BoolArray
from pipeline.errors import SourceError
from pipeline.extraction.lookup import older_fingerprints
from pipeline.images.formats import is_tiff
from pipeline.images.loader import DIGEST_SIZE, LoadedImage, load_images
from pipeline.images.sources.registry import ImageSource
from pipeline.provenance import versions
from pipeline.results import Progress
from pipeline.spec import LayerSpec

if TYPE_CHECKING:
    from pipeline.engines.engine import Engine, Running
    from pipeline.engines.select import Resolved


@dataclass
class Clock:
    """Seconds that the loop over batches waited for each part. The parts overlap, so the longest wait is the bound."""

    decode: float = 0.0
    model: float = 0.0
    disk: float = 0.0

    @property
    def bound(self) -> str:
        """What was waited for most: ``"decode"`` (which includes reading), ``"model"`` or ``"disk"``."""
        return max(vars(self), key=lambda name: float(vars(self)[name]))

    def spend(self, part: str, since: float) -> None:
        """Add the time from `since` (of `time.perf_counter`) until now."""
        setattr(self, part, getattr(self, part) + time.perf_counter() - since)


class Opened(NamedTuple):
    """A cache file open for writing; `results` are those of the engine that go into it, a layer each."""

    writer: CacheWriter
    engine: Engine
    results: slice


class CacheFiller:
    """A cache file being filled with what an engine gives.

    Parameters
    ----------
    opened : Opened
        Whoever opened it closes its writer.
    asked : (n,) bool
        Rows that may be computed; the others stay as they are.
    on_error : {"skip", "stop"}
        Whether an image that cannot be decoded becomes an unreadable row or ends the run.

    Attributes
    ----------
    writer : CacheWriter
    engine : Engine
    preprocessing : Preprocessing
        What the engine's network expects.
    pending : np.ndarray
        (n,) bool, the rows asked for that were pending at the start.
    computed : int
        Rows whose features were computed and written so far.
    few_levels : int
        Rows among these whose images lost most grey levels, see `pipeline.images.decode.FEW_LEVELS`.
    bad : list of int
        Rows that were written with NaN or infinite features.
    """

    def __init__(self, opened: Opened, asked: BoolArray, on_error: str) -> None:
        self.writer, self.engine, self._results = opened
        self._on_error = on_error
        writer, layers = self.writer, self.writer.cache.layers
        writer.begin_run(_provenance(self.engine.resolved))
        self.preprocessing = LayerSpec.from_json(next(iter(layers.values())).spec).preprocessing
        self.pending = np.zeros(writer.cache.n_rows, bool)
        self.pending[writer.pending()] = True
        self.pending &= asked
        self.computed = self.few_levels = 0
        self.bad: list[int] = []
        folder: Path = writer.cache.path.parent
        specs = [LayerSpec.from_json(info.spec) for info in layers.values()]
        fingerprints = zip(*([spec.fingerprint, *older_fingerprints(spec)] for spec in specs), strict=True)
        own = published_path(writer.cache.path)
        self._donors = [Donors(folder, set(alike), own) for alike in fingerprints]  # today's decoding rules first
        self._tiffs: set[bytes] = set()

    @property
    def notes(self) -> list[str]:
        """What the user should know about the features that were written."""
        if not self.bad:
            return self.engine.notes
        first = self.writer.cache.uris[min(self.bad)]
        text = f"{len(self.bad)} rows have NaN or infinite features, first {first}; no head can be fitted on them"
        return [*self.engine.notes, text]

    def knows(self, digest: bytes, data: bytes) -> bool:
        """Tell whether the features of an image with this digest and these bytes exist, in any file of the folder.

        Files of older decoding rules count unless the image is a TIFF, which those decoded differently.
        """
        if is_tiff(data):
            self._tiffs.add(digest)
        return any(digest in donors for donors in self._donors_of(digest))

    def _donors_of(self, digest: bytes) -> list[Donors]:
        return self._donors[:1] if digest in self._tiffs else self._donors

    def take(self, images: Sequence[LoadedImage], results: Sequence[np.ndarray]) -> None:
        """Write the pending ones of some images, given all results of the engine for those that have pixels."""
        computed = [image for image in images if image.pixels is not None]
        mine = np.array([self.pending[image.row] for image in computed], bool)
        arrays = [array[mine] for array in results[self._results]]
        computed = [image for image in computed if self.pending[image.row]]
        self._write(computed, dict(zip(self.writer.cache.layers, arrays, strict=True)))
        self.computed += len(computed)
        self.few_levels += sum(image.few_levels for image in computed)
        images = [image for image in images if self.pending[image.row]]
        self._write_copies(images)
        self._write_failures(images)

    def _write(self, images: Sequence[LoadedImage], features: dict[str, np.ndarray]) -> None:
        digests = np.frombuffer(b"".join(image.digest for image in images), np.uint8).reshape(-1, DIGEST_SIZE)
        rows = np.array([image.row for image in images], np.int64)
        self.writer.write(rows, features, digests)
        finite = np.all([np.isfinite(values).all(axis=1) for values in features.values()], axis=0)
        self.bad += rows[~finite].tolist()

    def _write_copies(self, images: Sequence[LoadedImage]) -> None:
        """Write the rows whose features exist already: computed earlier in this run, or in any file of the folder."""
        duplicates = [
            (image, image.duplicate_of)
            for image in images
            if image.duplicate_of is not None and self.writer.has([image.duplicate_of])[0]
        ]
        known = [image for image in images if image.known]
        if not duplicates and not known:
            return
        originals = [row for _, row in duplicates]
        donors = [self._donated(image.digest) for image in known]
        features = {
            name: np.concatenate([self.writer.read(name, originals), *(donor[name][None] for donor in donors)])
            for name in self.writer.cache.layers
        }
        self._write([*(image for image, _ in duplicates), *known], features)

    def _donated(self, digest: bytes) -> dict[str, np.ndarray]:
        holders = self._donors_of(digest)
        return next((donors for donors in holders if digest in donors), holders[0])[digest]

    def _write_failures(self, images: Sequence[LoadedImage]) -> None:
        for image in images:
            if image.failure is None:
                continue
            if self._on_error == "stop":
                uri = self.writer.cache.uris[image.row]
                raise SourceError(f"{uri}: {image.failure}; repair or remove it, or set on-error to skip")
            self.writer.fail(image.row, image.failure, image.digest or None)


class _Pass:
    """The batches on their way through an engine into the files that take its results."""

    def __init__(self, fillers: Sequence[CacheFiller], clock: Clock) -> None:
        self._fillers, self._clock, self._engine = fillers, clock, fillers[0].engine
        self.preprocessing = fillers[0].preprocessing
        self._pending = np.any([filler.pending for filler in fillers], axis=0)
        self._running: deque[tuple[list[LoadedImage], Running]] = deque()

    def feed(self, batch: list[LoadedImage], index: int) -> None:
        """Start on the pending rows of a batch; `index` is that of the preprocessing among the pixels."""
        began = time.perf_counter()
        pending = [image for image in batch if self._pending[image.row]]
        pixels = [image.pixels[index] for image in pending if image.pixels is not None]
        running = self._engine.start(np.array(pixels, np.uint8).reshape(-1, *self.preprocessing.size, 3))
        self._running.append((pending, running))
        self._clock.spend("model", began)
        if len(self._running) > self._engine.ahead:
            self._collect()

    def drain(self) -> None:
        """Finish all that was started."""
        while self._running:
            self._collect()

    def _collect(self) -> None:
        began = time.perf_counter()
        images, running = self._running.popleft()
        results = running()
        self._clock.spend("model", began)
        began = time.perf_counter()
        for filler in self._fillers:
            filler.take(images, results)
        self._clock.spend("disk", began)


def fill(
    images: ImageSource,
    fillers: Sequence[CacheFiller],
    total: int,
    batch_size: int | None,
    workers: int | None,
    clock: Clock,
    progress: Progress,
) -> None:
    """Read and decode the images that any file lacks once, and run them once through each network into all files.

    Parameters
    ----------
    images : ImageSource
    fillers : sequence of CacheFiller
        At least one.
    total : int
        Images asked for, complete ones included, for `progress`.
    batch_size, workers : int, optional
        As for `pipeline.images.loader.load_images`; by default the batch size that suits the device.
    clock : Clock
        Where the time spent waiting for images is noted.
    progress : callable
        Called after every batch.
    """
    pending = np.flatnonzero(np.any([filler.pending for filler in fillers], axis=0))
    handled = total - len(pending)
    size = sum(filler.writer.cache.path.stat().st_size for filler in fillers)
    text = ", ".join(dict.fromkeys(filler.writer.cache.handles["backbone"] for filler in fillers))
    progress(handled, total, text, f"{size / 1e6:,.0f} MB")
    sharing: dict[Any, list[CacheFiller]] = {}  # views share an engine, but not its passes
    for filler in fillers:
        sharing.setdefault((id(filler.engine), filler.preprocessing), []).append(filler)
    passes = [_Pass(some, clock) for some in sharing.values()]
    preprocessings = [one.preprocessing for one in passes]
    batch_size = batch_size or fillers[0].engine.resolved.batch_size

    def known(digest: bytes, data: bytes) -> bool:
        return all(filler.knows(digest, data) for filler in fillers)

    with closing(load_images(images, pending, preprocessings, batch_size, workers, known)) as batches:
        waited = time.perf_counter()
        for batch in batches:
            clock.spend("decode", waited)
            for index, one in enumerate(passes):
                one.feed(batch, index)
            handled += len(batch)
            progress(handled, total, text, f"bound by {clock.bound}")
            waited = time.perf_counter()
    for one in passes:
        one.drain()


def _provenance(resolved: Resolved) -> dict[str, Any]:
    return {
        "engine": resolved.engine,
        "device": resolved.device,
        "precision": resolved.precision,
        "command": " ".join(sys.argv),
        "python": platform.python_version(),
        "versions": versions(),
    }
