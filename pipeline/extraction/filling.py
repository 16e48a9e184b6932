"""One cache file being filled: batches of images in, features of its pending rows out, an engine in between."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from features_cache import CacheWriter, Donors
from pipeline.errors import SourceError
from pipeline.images.loader import Batch, Duplicate, Known
from pipeline.spec import Preprocessing

if TYPE_CHECKING:
    from pipeline.engines.engine import Engine, Running


@dataclass
class Clock:
    """Seconds that the loop over batches waited for each of its parts; they run at once, so the largest bounds it."""

    decode: float = 0.0
    model: float = 0.0
    disk: float = 0.0

    @property
    def bound(self) -> str:
        """What was waited for most: ``"decode"`` (reading included), ``"model"`` or ``"disk"``."""
        return max(vars(self), key=lambda name: float(vars(self)[name]))

    def spend(self, part: str, since: float) -> None:
        """Add the time from `since` (of `time.perf_counter`) until now."""
        setattr(self, part, getattr(self, part) + time.perf_counter() - since)


class Filling:
    """A file, its engine, and the batches that are under way between them.

    Parameters
    ----------
    writer : CacheWriter
        Open; whoever opened it closes it.
    engine : Engine
        Gives the features of the file's layers, in their order.
    preprocessing : Preprocessing
        What the engine's network expects.
    asked : (n,) bool
        Rows that may be computed; the others stay as they are.
    on_error : {"skip", "stop"}
        Whether an image that cannot be decoded becomes an unreadable row or ends the run.
    clock : Clock
        Where the time is noted.

    Attributes
    ----------
    pending : np.ndarray
        (n,) bool, the rows asked for that were pending at the start.
    computed : int
        Rows whose features were computed and written so far.
    """

    def __init__(
        self,
        writer: CacheWriter,
        engine: Engine,
        preprocessing: Preprocessing,
        asked: np.ndarray,
        on_error: str,
        clock: Clock,
    ) -> None:
        self.writer, self.engine, self.preprocessing = writer, engine, preprocessing
        self._on_error, self._clock = on_error, clock
        self.pending = np.zeros(writer.cache.n_rows, bool)
        self.pending[writer.pending()] = True
        self.pending &= asked
        self.computed = 0
        folder: Path = writer.cache.path.parent
        self._donors = Donors(folder, {info.fingerprint for info in writer.cache.layers.values()})
        self._running: deque[tuple[Batch, np.ndarray, Running]] = deque()

    def knows(self, digest: bytes) -> bool:
        """Tell whether the features of an image exist already, in any file of the folder."""
        return digest in self._donors

    def feed(self, batch: Batch, pixels: np.ndarray) -> None:
        """Start on what a batch has for this file; `pixels` are those of its preprocessing."""
        began = time.perf_counter()
        wanted = self.pending[batch.rows]
        running = self.engine.start(pixels if wanted.all() else pixels[wanted])
        self._running.append((batch, wanted, running))
        self._clock.spend("model", began)
        if len(self._running) > self.engine.ahead:
            self._collect()

    def drain(self) -> None:
        """Finish all that was started."""
        while self._running:
            self._collect()

    def _collect(self) -> None:
        began = time.perf_counter()
        batch, wanted, running = self._running.popleft()
        arrays = running.arrays()
        self._clock.spend("model", began)
        began = time.perf_counter()
        features = dict(zip(self.writer.cache.layers, arrays, strict=True))
        rows = batch.rows[wanted]
        self.writer.write(rows, features, batch.digests[wanted])
        self.computed += len(rows)
        self._write_copies(batch)
        self._write_failures(batch)
        self._clock.spend("disk", began)

    def _write_copies(self, batch: Batch) -> None:
        """Write the rows whose features exist already: seen before in this run, or in any file of the folder."""
        twins = [copy for copy in batch.duplicates if self.pending[copy.row] and self.writer.has([copy.of])[0]]
        known = [copy for copy in batch.known if self.pending[copy.row]]
        copies: list[Duplicate | Known] = [*twins, *known]
        if not copies:
            return
        given = [self._donors[copy.digest] for copy in known]
        features = {
            name: np.concatenate(
                [self.writer.read(name, [copy.of for copy in twins]), *(donor[name][None] for donor in given)]
            )
            for name in self.writer.cache.layers
        }
        digests = np.frombuffer(b"".join(copy.digest for copy in copies), np.uint8).reshape(len(copies), -1)
        self.writer.write([copy.row for copy in copies], features, digests)

    def _write_failures(self, batch: Batch) -> None:
        for failure in batch.failures:
            if not self.pending[failure.row]:
                continue
            if self._on_error == "stop":
                uri = self.writer.cache.uris[failure.row]
                raise SourceError(f"{uri}: {failure.reason}; mend or remove it, or use --on-error skip")
            self.writer.fail(failure.row, failure.reason, failure.digest)
