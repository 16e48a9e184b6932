"""Images as batches, in order, prepared by threads ahead of whoever asks.

    rows ─▶ readers: read, hash ─▶ in row order: seen before? ─▶ decoders: decode, resize ─▶ in row order: batches

Each thread holds the bytes of one file; a few more wait between the two stages, however large a batch is. Finished
images wait in a window of a few batches.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline.images.decode_ahead import Stages
from pipeline.images.outcomes import Decoded, Duplicate, Failure, Known, Outcome
from pipeline.images.sources.items import ImageSource
from pipeline.spec import Preprocessing

MOST_OTHERS = 512
"""Rows without an image in a batch: so many that are known already are written, and reported, together."""

__all__ = ["Batch", "Duplicate", "Failure", "Known", "default_workers", "load"]


@dataclass(frozen=True)
class Batch:
    """Decoded images, and what was found about rows that need no decoding.

    Attributes
    ----------
    rows : np.ndarray
        (k,) int64, ascending in the order asked.
    pixels : tuple of np.ndarray
        (k, h, w, 3) uint8 for each preprocessing; k is the batch size but where many rows need no decoding, and for
        the last batch: there it may be less, even 0.
    digests : np.ndarray
        (k, 16) uint8, blake2b-128 of each file's bytes.
    duplicates : list of Duplicate
        Rows equal to one in this batch or an earlier one.
    failures : list of Failure
        Rows that could not be read or decoded.
    known : list of Known
        Rows whose digest the caller knows already.
    """

    rows: np.ndarray
    pixels: tuple[np.ndarray, ...]
    digests: np.ndarray
    duplicates: list[Duplicate] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    known: list[Known] = field(default_factory=list)


def default_workers() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "process_cpu_count"):
        return os.process_cpu_count() or 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load(
    source: ImageSource,
    rows: Sequence[int] | np.ndarray,
    preprocessings: Sequence[Preprocessing],
    batch_size: int,
    workers: int | None = None,
    known: Callable[[bytes], bool] | None = None,
) -> Iterator[Batch]:
    """Yield the images of `rows` as batches, strictly in order.

    Of rows with equal bytes only the first is decoded; the later ones are duplicates of it, or failures like it.

    Parameters
    ----------
    source : ImageSource
        Where the images are.
    rows : sequence of int
        Positions in ``source.items``.
    preprocessings : sequence of Preprocessing
        What the networks expect, those of equal geometry only once; a file is read once for all.
    batch_size : int
        Images in a batch; at least 1.
    workers : int, optional
        Decoding threads; by default one for each core that this process may use.
    known : callable, optional
        Says of a digest (16 bytes) that its features exist already; such rows are not decoded. Called by one thread at
        a time, in row order, for each row that could be read and is no duplicate.

    Yields
    ------
    Batch
        With `batch_size` images, but for the last and where `MOST_OTHERS` rows without any have gathered. A duplicate
        comes with its original or after it.
    """
    numbers = [int(row) for row in rows]
    stages = Stages(source, numbers, preprocessings, workers or default_workers(), batch_size, known)
    try:
        yield from _batches(stages.outcomes(), preprocessings, batch_size)
    finally:
        stages.stop()


def _batches(outcomes: Iterator[Outcome], preprocessings: Sequence[Preprocessing], batch_size: int) -> Iterator[Batch]:
    decoded: list[Decoded] = []
    others: list[Duplicate | Failure | Known] = []
    for outcome in outcomes:
        if isinstance(outcome, Decoded):
            decoded.append(outcome)
        else:
            others.append(outcome)
        if len(decoded) == batch_size or len(others) == MOST_OTHERS:
            yield _batch(decoded, others, preprocessings)
            decoded, others = [], []
    if decoded or others:
        yield _batch(decoded, others, preprocessings)


def _batch(
    decoded: list[Decoded], others: list[Duplicate | Failure | Known], preprocessings: Sequence[Preprocessing]
) -> Batch:
    pixels = tuple(np.empty((len(decoded), *wanted.size, 3), np.uint8) for wanted in preprocessings)
    for number, image in enumerate(decoded):
        for place, prepared in enumerate(image.pixels):
            pixels[place][number] = prepared
    return Batch(
        rows=np.array([image.row for image in decoded], np.int64),
        pixels=pixels,
        digests=np.frombuffer(b"".join(image.digest for image in decoded), np.uint8).reshape(-1, 16),
        duplicates=[other for other in others if isinstance(other, Duplicate)],
        failures=[other for other in others if isinstance(other, Failure)],
        known=[other for other in others if isinstance(other, Known)],
    )
