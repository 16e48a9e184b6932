"""Images of a source in batches, in order, read and decoded by threads ahead of whoever asks.

    row ─▶ read, hash ─▶ in row order: seen before? ─▶ decode, resize ─▶ in row order: batches

A thread takes a row all the way, so it holds the bytes of one file at a time. Finished images wait in a window of a few
batches.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from threading import Event, Semaphore

import numpy as np

from pipeline.errors import UnreadableImageError
from pipeline.images.ahead import map_ahead
from pipeline.images.resize import prepare_all
from pipeline.images.sources.items import ImageSource
from pipeline.spec import Preprocessing

DIGEST_SIZE = 16

MIN_READERS = 4
"""Reading waits for disks and networks rather than for the CPU, so even one core gets a few readers."""

REMOTE_READERS = 64
"""As `MIN_READERS` for a remote source: 64 requests of 50 ms at once are 1,280 images a second."""

REMOTE_WINDOW_BYTES = 1 << 28
"""Most bytes of pixels in the longer window of a remote source."""

WINDOW_BATCHES = 4
"""How many batches the threads may run ahead of the consumer."""

MOST_OTHERS = 512
"""Images without pixels in a batch: with this many, a batch is yielded even if it is not full."""


@dataclass(frozen=True, eq=False)
class LoadedImage:
    """One image after loading: its pixels, or why it has none.

    Attributes
    ----------
    row : int
        Index into the source's items.
    digest : bytes
        blake2b-128 of the file's bytes; empty if it could not be read, or not be decoded for lack of memory: another
        attempt may succeed.
    pixels : tuple of np.ndarray, optional
        uint8 (h, w, 3) for each preprocessing; None if the image was not decoded.
    duplicate_of : int, optional
        An earlier row with the same bytes, which was decoded.
    failure : str, optional
        Why the image cannot be read or decoded, in a few words.
    few_levels : bool
        Whether it lost most grey levels, see `pipeline.images.decode.FEW_LEVELS`.

    An image with neither pixels nor an original nor a failure is known: the caller said so of its digest.
    """

    row: int
    digest: bytes = b""
    pixels: tuple[np.ndarray, ...] | None = None
    duplicate_of: int | None = None
    failure: str | None = None
    few_levels: bool = False

    @property
    def known(self) -> bool:
        """Whether the caller has the features of this image already."""
        return self.pixels is None and self.duplicate_of is None and self.failure is None


def digest_of(data: bytes) -> bytes:
    """Return the blake2b-128 of an image file's bytes."""
    return hashlib.blake2b(data, digest_size=DIGEST_SIZE).digest()


def default_workers() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "process_cpu_count"):
        return os.process_cpu_count() or 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_images(
    source: ImageSource,
    rows: Sequence[int] | np.ndarray,
    preprocessings: Sequence[Preprocessing],
    batch_size: int,
    workers: int | None = None,
    known: Callable[[bytes, bytes], bool] | None = None,
) -> Generator[list[LoadedImage], None, None]:
    """Yield the images of `rows` in batches, strictly in order.

    Of rows with equal bytes only the first is decoded; the later ones are duplicates of it, or fail like it.

    Parameters
    ----------
    source : ImageSource
        Where the images are.
    rows : sequence of int
        Indices into ``source.items``.
    preprocessings : sequence of Preprocessing
        What the networks expect. A file is read once for all of them.
    batch_size : int
        Decoded images in a batch; at least 1.
    workers : int, optional
        Images that are decoded at once; by default one for each core that this process may use.
    known : callable, optional
        Tells whether the features of an image exist already, by its digest (16 bytes) and its file's bytes; such images
        are not decoded. It is called by one thread at a time, in row order, for each row that could be read and is no
        duplicate.

    Yields
    ------
    list of LoadedImage
        `batch_size` decoded images and what lies between them; fewer decoded ones in the last batch, and in a batch
        that reaches `MOST_OTHERS` images without pixels. A duplicate comes after its original.
    """
    workers = workers or default_workers()
    loading = _Loading(source, preprocessings, workers, known)
    window = WINDOW_BATCHES * max(batch_size, workers)
    if source.remote:
        pixels = sum(3 * height * width for height, width in (one.size for one in preprocessings))
        window = max(window, min(4 * REMOTE_READERS, REMOTE_WINDOW_BYTES // max(1, pixels)))
    numbered = enumerate(int(row) for row in rows)
    with closing(map_ahead(loading.load, numbered, readers_of(source, workers) + workers, window)) as images:
        yield from _batches(_with_failed_duplicates(images), batch_size)


def readers_of(source: ImageSource, workers: int) -> int:
    """Return how many images of a source are read at once where so many are decoded at once."""
    return max(REMOTE_READERS if source.remote else MIN_READERS, workers)


class _Loading:
    """What the threads of one `load_images` share: `load` takes one row from the source to its pixels."""

    def __init__(
        self,
        source: ImageSource,
        preprocessings: Sequence[Preprocessing],
        workers: int,
        known: Callable[[bytes, bytes], bool] | None,
    ) -> None:
        self._source, self._preprocessings, self._known = source, preprocessings, known
        self._decoding = Semaphore(workers)
        self._over: dict[int, Event] = {}  # by position, set after its turn
        self._first: dict[bytes, int] = {}  # digest to the first row that has it

    def load(self, numbered: tuple[int, int]) -> LoadedImage:
        """Load the image of one ``(position, row)``; positions must be begun in order."""
        position, row = numbered
        try:
            data = self._source.read(self._source.items[row])
            digest = digest_of(data)
        except (UnreadableImageError, MemoryError) as error:
            with self._turn(position):
                return LoadedImage(row, failure=_reason(error))
        except BaseException:
            with self._turn(position):  # those behind it wait for theirs
                raise
        with self._turn(position):
            if digest in self._first:
                return LoadedImage(row, digest, duplicate_of=self._first[digest])
            if self._known is not None and self._known(digest, data):
                return LoadedImage(row, digest)
            self._first[digest] = row
        with self._decoding:
            return self._decode(row, digest, data)

    @contextmanager
    def _turn(self, position: int) -> Iterator[None]:
        """Wait until every earlier position has had its turn; each wakes only the next."""
        if position:
            self._over.setdefault(position - 1, Event()).wait()
        try:
            yield
        finally:
            self._over.pop(position - 1, None)
            self._over.setdefault(position, Event()).set()

    def _decode(self, row: int, digest: bytes, data: bytes) -> LoadedImage:
        try:
            prepared = prepare_all(data, self._preprocessings)
            return LoadedImage(row, digest, prepared.pixels, few_levels=prepared.few_levels)
        except UnreadableImageError as error:
            return LoadedImage(row, digest, failure=str(error))
        except MemoryError as error:
            return LoadedImage(row, failure=_reason(error))


def _reason(error: Exception) -> str:
    return "not enough memory" if isinstance(error, MemoryError) else str(error)


def _with_failed_duplicates(images: Iterable[LoadedImage]) -> Iterator[LoadedImage]:
    """Let duplicates of an image that failed fail like it."""
    failed: dict[int, LoadedImage] = {}
    for image in images:
        if image.failure is not None:
            failed[image.row] = image
        elif image.duplicate_of is not None and image.duplicate_of in failed:
            image = replace(failed[image.duplicate_of], row=image.row)
        yield image


def _batches(images: Iterable[LoadedImage], batch_size: int) -> Iterator[list[LoadedImage]]:
    batch: list[LoadedImage] = []
    decoded = 0
    for image in images:
        batch.append(image)
        decoded += image.pixels is not None
        if decoded == batch_size or len(batch) - decoded == MOST_OTHERS:
            yield batch
            batch, decoded = [], 0
    if batch:
        yield batch
