"""The loader's two thread stages and the ordered step between them; one lock guards all that they share."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from threading import Condition, Thread, current_thread
from typing import NamedTuple

from pipeline.errors import UnreadableImageError
from pipeline.images.outcomes import Decoded, Duplicate, Failure, Known, Outcome
from pipeline.images.resize import prepare_all
from pipeline.images.sources.items import ImageSource
from pipeline.spec import Preprocessing

DIGEST_SIZE = 16

MIN_READERS = 4
"""Reading waits for disks and networks rather than for the CPU, so even one core gets a few readers."""

WINDOW_BATCHES = 4
"""How far, in batches, the threads may run ahead of the consumer."""


class Job(NamedTuple):
    """An encoded image on its way from a reader to a decoder; `position` counts in the order asked."""

    position: int
    row: int
    digest: bytes
    data: bytes


class Stages:
    """Threads that turn rows into outcomes; iterate `outcomes` in one thread, then always call `stop`."""

    def __init__(
        self,
        source: ImageSource,
        rows: list[int],
        preprocessings: Sequence[Preprocessing],
        workers: int,
        batch_size: int,
        known: Callable[[bytes], bool] | None,
    ) -> None:
        self._source, self._rows, self._preprocessings, self._known = source, rows, preprocessings, known
        self._window = WINDOW_BATCHES * max(batch_size, workers)
        self._jobs_limit = workers
        self._changed = Condition()
        # Guarded by the condition; positions below `_begun` were given to readers, below `_judged` are settled or
        # jobs, below `_taken` went to the consumer.
        self._begun = self._judged = self._taken = 0
        self._jobs: deque[Job] = deque()
        self._outcomes: dict[int, Outcome] = {}
        self._first: dict[bytes, int] = {}
        self._error: BaseException | None = None
        self._stopped = False
        targets = [self._read_all] * max(MIN_READERS, workers) + [self._decode_all] * workers
        self._threads = [Thread(target=self._run, args=(target,), daemon=True) for target in targets]

    def outcomes(self) -> Iterator[Outcome]:
        """Start the threads and yield one outcome for each row, in order.

        Whatever a thread raises that is not an unreadable image is raised here.
        """
        for thread in self._threads:
            thread.start()
        failed: dict[int, Failure] = {}
        for position, row in enumerate(self._rows):
            outcome = self._take(position)
            if isinstance(outcome, Duplicate) and outcome.of in failed:
                first = failed[outcome.of]
                outcome = Failure(row, first.reason, first.digest)
            elif isinstance(outcome, Failure):
                failed[row] = outcome
            yield outcome

    def stop(self) -> None:
        """End the threads, each after the image in its hands, and wait for them."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if current_thread() in self._threads:  # the garbage collector may close a forgotten generator from anywhere
            return
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _take(self, position: int) -> Outcome:
        with self._changed:
            self._changed.wait_for(lambda: position in self._outcomes or self._error is not None)
            if self._error is not None:
                raise self._error
            self._taken = position + 1
            self._changed.notify_all()
            return self._outcomes.pop(position)

    def _run(self, target: Callable[[], None]) -> None:
        try:
            target()
        except BaseException as error:
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()

    def _read_all(self) -> None:
        while (position := self._begin()) is not None:
            self._read(position)

    def _begin(self) -> int | None:
        """Return the next position to read, when it is near enough to the consumer; None when there is none."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._stopped or self._begun == len(self._rows) or self._begun < self._taken + self._window
            )
            if self._stopped or self._begun == len(self._rows):
                return None
            self._begun += 1
            return self._begun - 1

    def _read(self, position: int) -> None:
        """Read and hash a row, then, when all rows before it were judged, settle it or pass it on to be decoded."""
        row = self._rows[position]
        outcome: Outcome | None = None
        data = digest = b""
        try:
            data = self._source.read(self._source.items[row])
            digest = hashlib.blake2b(data, digest_size=DIGEST_SIZE).digest()
        except UnreadableImageError as error:
            outcome = Failure(row, str(error), None)
        with self._changed:
            self._changed.wait_for(
                lambda: self._stopped or (self._judged == position and len(self._jobs) < self._jobs_limit)
            )
            if self._stopped:
                return
            outcome = outcome or self._settled(row, digest)
            if outcome is None:
                self._jobs.append(Job(position, row, digest, data))
            else:
                self._outcomes[position] = outcome
            self._judged += 1
            self._changed.notify_all()

    def _settled(self, row: int, digest: bytes) -> Outcome | None:
        """Return the outcome of a row that needs no decoding; call it in row order."""
        if digest in self._first:
            return Duplicate(row, self._first[digest], digest)
        if self._known is not None and self._known(digest):
            return Known(row, digest)
        self._first[digest] = row
        return None

    def _decode_all(self) -> None:
        while (job := self._next_job()) is not None:
            outcome: Outcome
            try:
                pixels = prepare_all(job.data, self._preprocessings)
                outcome = Decoded(job.row, pixels, job.digest)
            except UnreadableImageError as error:
                outcome = Failure(job.row, str(error), job.digest)
            except MemoryError:
                outcome = Failure(job.row, "not enough memory", None)
            with self._changed:
                self._outcomes[job.position] = outcome
                self._changed.notify_all()

    def _next_job(self) -> Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._jobs or self._judged == len(self._rows))
            if self._stopped or not self._jobs:
                return None
            self._changed.notify_all()
            return self._jobs.popleft()
