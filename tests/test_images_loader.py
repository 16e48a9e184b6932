"""The loader: order, batches, what needs no decoding, bounded memory, and threads that end whatever happens."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from io import BytesIO
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import pipeline.images.decode
import pipeline.images.loader
from pipeline.errors import UnreadableImageError
from pipeline.images.loader import MIN_READERS, WINDOW_BATCHES, LoadedImage, default_workers, load_images
from pipeline.images.resize import PreparedImage
from pipeline.images.sources.items import ImageSource, Item, Items
from pipeline.images.sources.registry import open_source
from pipeline.spec import Preprocessing

SMALL = Preprocessing(size=(4, 5), resize=(4, 5), interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3)
BAD, MISSING = -1, -2


def encoded(level: int) -> bytes:
    """Return a picture of one grey, or bytes that are none."""
    if level == BAD:
        return b"not an image"
    file = BytesIO()
    Image.new("L", (5, 4), level).save(file, "PNG")
    return file.getvalue()


FILES = {level: encoded(level) for level in range(-1, 256)}


def digest(level: int) -> bytes:
    return hashlib.blake2b(FILES[level], digest_size=16).digest()


def source_of(levels: list[int], before: Callable[[int], None] = lambda row: None) -> ImageSource:
    """Return a source whose row i is a picture of grey ``levels[i]``; `before` is called with the row read."""

    def read(item: Item) -> bytes:
        row = int(item.uri)
        before(row)
        if levels[row] == MISSING:
            raise UnreadableImageError("no such file")
        return FILES[levels[row]]

    items = [Item(str(row), -1, "", "", 100 + row, 1000 + row) for row in range(len(levels))]
    return ImageSource(name="greys", location="/greys", classes=(), items=Items.of(items), reader=read)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    wait_until(lambda: not any(thread.name.startswith("ahead") for thread in threading.enumerate()))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)


def decoded(batch: list[LoadedImage]) -> list[LoadedImage]:
    return [image for image in batch if image.pixels is not None]


def rows_of(batch: list[LoadedImage]) -> list[int]:
    return [image.row for image in batch]


def duplicates(batch: list[LoadedImage]) -> list[tuple[int, int, bytes]]:
    return [(image.row, image.duplicate_of, image.digest) for image in batch if image.duplicate_of is not None]


def failures(batch: list[LoadedImage]) -> list[tuple[int, str, bytes]]:
    return [(image.row, image.failure, image.digest) for image in batch if image.failure is not None]


def known_ones(batch: list[LoadedImage]) -> list[tuple[int, bytes]]:
    return [(image.row, image.digest) for image in batch if image.known]


def summary(batches: list[list[LoadedImage]]) -> list[object]:
    return [
        [(i.row, i.digest, i.pixels and i.pixels[0].tobytes(), i.duplicate_of, i.failure, i.known) for i in batch]
        for batch in batches
    ]


# -- What comes out ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 4])
def test_full_batches_in_order(workers: int) -> None:
    levels = list(range(10, 33))
    batches = list(load_images(source_of(levels), np.arange(23), [SMALL], batch_size=5, workers=workers))
    assert [len(batch) for batch in batches] == [5, 5, 5, 5, 3]
    images = [image for batch in batches for image in batch]
    assert rows_of(images) == list(range(23))
    for image in images:
        (pixels,) = image.pixels
        assert pixels.dtype == np.uint8
        np.testing.assert_array_equal(pixels, np.full((4, 5, 3), levels[image.row]))
        assert image.digest == digest(levels[image.row])
        assert (image.duplicate_of, image.failure, image.known) == (None, None, False)


def test_rows_that_need_no_decoding_do_not_pile_up() -> None:
    levels = [7, *range(20, 20 + 100), *[7] * 1500]
    batches = list(
        load_images(source_of(levels), np.arange(len(levels)), [SMALL], 512, known=lambda found, _: found != digest(7))
    )
    assert [len(decoded(batch)) for batch in batches] == [1, 0, 0, 0]
    assert [len(known_ones(batch)) + len(duplicates(batch)) for batch in batches] == [512, 512, 512, 64]


def test_only_the_rows_asked_in_the_order_asked() -> None:
    batches = list(load_images(source_of(list(range(50))), [40, 3, 17], [SMALL], batch_size=2))
    assert [rows_of(batch) for batch in batches] == [[40, 3], [17]]
    assert [image.pixels[0][0, 0, 0] for batch in batches for image in batch] == [40, 3, 17]


def test_no_rows_no_batches() -> None:
    assert list(load_images(source_of([1, 2]), [], [SMALL], batch_size=2)) == []


def test_duplicates_and_failures() -> None:
    levels = [7, BAD, 7, MISSING, 9, BAD, 9, MISSING, 7]
    (batch,) = load_images(source_of(levels), range(9), [SMALL], batch_size=4, workers=3)
    assert rows_of(batch) == list(range(9))
    assert rows_of(decoded(batch)) == [0, 4]
    assert duplicates(batch) == [
        (2, 0, digest(7)),
        (6, 4, digest(9)),
        (8, 0, digest(7)),
    ]
    reason = "not an image of a known format"
    assert failures(batch) == [
        (1, reason, digest(BAD)),
        (3, "no such file", b""),
        (5, reason, digest(BAD)),
        (7, "no such file", b""),
    ]


def test_equal_bytes_are_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    prepare = pipeline.images.loader.prepare_all
    monkeypatch.setattr(
        pipeline.images.loader, "prepare_all", lambda data, wanted: seen.append(data) or prepare(data, wanted)
    )
    batches = list(load_images(source_of([5, 6] * 30), range(60), [SMALL], batch_size=1, workers=4))
    assert sorted(seen) == sorted([FILES[5], FILES[6]])
    assert sum(len(duplicates(batch)) for batch in batches) == 58


def test_known_rows_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def known(key: bytes, _: bytes) -> bool:
        asked.append(key)
        return key in {digest(1), digest(BAD)}

    (batch,) = load_images(source_of([1, 2, BAD, 1, 2, 3]), range(6), [SMALL], batch_size=9, workers=2, known=known)
    assert asked == [digest(level) for level in (1, 2, BAD, 1, 3)]
    assert rows_of(decoded(batch)) == [1, 5]
    assert known_ones(batch) == [(0, digest(1)), (2, digest(BAD)), (3, digest(1))]
    assert duplicates(batch) == [(4, 1, digest(2))]
    assert failures(batch) == []


def test_a_batch_without_pixels() -> None:
    (batch,) = load_images(source_of([BAD, MISSING]), range(2), [SMALL], batch_size=2)
    assert decoded(batch) == []
    assert [row for row, *_ in failures(batch)] == [0, 1]


def test_what_follows_the_last_full_batch_comes_too() -> None:
    batches = list(load_images(source_of([1, 2, 2, BAD]), range(4), [SMALL], batch_size=2))
    assert [rows_of(decoded(batch)) for batch in batches] == [[0, 1], []]
    assert [row for row, *_ in duplicates(batches[1])] == [2]
    assert [row for row, *_ in failures(batches[1])] == [3]


@given(
    levels=st.lists(st.sampled_from([BAD, MISSING, 1, 2, 3, *range(40, 60)]), max_size=40),
    batch_size=st.integers(1, 9),
)
@settings(max_examples=25, deadline=None)
def test_the_number_of_workers_changes_nothing(levels: list[int], batch_size: int) -> None:
    one, four = (
        list(
            load_images(
                source_of(levels), range(len(levels)), [SMALL], batch_size, workers, lambda key, _: key == digest(3)
            )
        )
        for workers in (1, 4)
    )
    assert summary(one) == summary(four)
    assert all(len(decoded(batch)) == batch_size for batch in one[:-1])
    seen: list[int] = []
    for image in chain.from_iterable(one):
        assert (image.pixels is not None) + (image.duplicate_of is not None) + (image.failure is not None) == (
            not image.known
        )
        assert image.duplicate_of is None or image.duplicate_of in seen
        seen.append(image.row)
    assert seen == list(range(len(levels)))


def test_a_file_that_vanishes(make_photos: Callable[..., Path]) -> None:
    root = make_photos(classes=("a", "b"), each=3)
    source = open_source(root)
    (root / "a/1.png").unlink()
    (root / "b/2.png").write_bytes(b"")
    (batch,) = load_images(source, range(6), [SMALL], batch_size=8)
    assert rows_of(decoded(batch)) == [0, 2, 3, 4]
    assert [(row, reason) for row, reason, _ in failures(batch)] == [(1, "no such file"), (5, "empty file")]


def test_workers_follow_the_cores_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.process_cpu_count", lambda: 3, raising=False)
    assert default_workers() == 3


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to cores")
def test_a_process_that_is_bound_to_one_core_decodes_with_one_thread() -> None:
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        assert default_workers() == 1
    finally:
        os.sched_setaffinity(0, cores)


# -- Bounded memory ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 1), (3, 2), (2, 5)])
def test_threads_run_ahead_but_not_far(batch_size: int, workers: int) -> None:
    begun: set[int] = set()
    levels = list(range(200))
    window = WINDOW_BATCHES * max(batch_size, workers)
    with closing(load_images(source_of(levels, begun.add), range(200), [SMALL], batch_size, workers)) as batches:
        for number in range(1, 4):
            next(batches)
            ahead = number * batch_size + window
            wait_until(lambda ahead=ahead: len(begun) >= ahead)
            time.sleep(0.01)
            assert begun == set(range(ahead))


@pytest.mark.parametrize("workers", [1, 6])
def test_few_files_wait_to_be_decoded(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    monkeypatch.setattr(
        pipeline.images.loader,
        "prepare_all",
        lambda data, wanted: PreparedImage((go.wait(20) and np.zeros((4, 5, 3), np.uint8),), few_levels=False),
    )
    begun: set[int] = set()
    limit = max(MIN_READERS, workers) + workers
    found: list[int] = []

    def watch() -> None:
        wait_until(lambda: len(begun) >= limit)
        time.sleep(0.02)
        found.append(len(begun))
        go.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    batches = list(
        load_images(source_of(list(range(200)), begun.add), range(200), [SMALL], batch_size=64, workers=workers)
    )
    watcher.join()
    assert found == [limit]
    assert sum(len(decoded(batch)) for batch in batches) == 200


# -- Endings: `no_thread_is_left` checks each --------------------------------------------------------------------------


@pytest.mark.parametrize("taken", [0, 1, 3])
@pytest.mark.parametrize("workers", [1, 4])
def test_an_early_close(taken: int, workers: int) -> None:
    batches = load_images(source_of(list(range(200))), range(200), [SMALL], batch_size=4, workers=workers)
    assert len([next(batches) for _ in range(taken)]) == taken
    batches.close()
    assert next(batches, None) is None


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_the_consumer_is_interrupted(interruption: type[BaseException]) -> None:
    batches = load_images(source_of(list(range(200))), range(200), [SMALL], batch_size=4, workers=2)
    next(batches)
    with pytest.raises(interruption):
        batches.throw(interruption())


@pytest.mark.skipif(sys.platform == "win32", reason="a thread cannot signal another there")
def test_control_c_while_waiting() -> None:
    def interrupt(row: int) -> None:
        if row == 9:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            time.sleep(0.05)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs start with it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            list(load_images(source_of(list(range(30)), interrupt), range(30), [SMALL], batch_size=2, workers=2))
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("error", [ZeroDivisionError("in a reader"), KeyboardInterrupt()], ids=repr)
def test_what_a_reader_raises_reaches_the_consumer(error: BaseException) -> None:
    def fail(row: int) -> None:
        if row == 11:
            raise error

    batches = load_images(source_of(list(range(40)), fail), range(40), [SMALL], batch_size=1, workers=2)
    with pytest.raises(type(error)) as caught:
        list(batches)
    assert caught.value is error


def test_what_a_decoder_raises_reaches_the_consumer(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(data: bytes, wanted: Preprocessing) -> np.ndarray:
        raise ZeroDivisionError("in a decoder")

    monkeypatch.setattr(pipeline.images.loader, "prepare_all", prepare)
    with pytest.raises(ZeroDivisionError, match="in a decoder"):
        list(load_images(source_of(list(range(40))), range(40), [SMALL], batch_size=3, workers=2))


def test_what_memory_does_not_suffice_for_is_a_failure_that_may_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(pipeline.images.decode, "_upright", short)
    (batch,) = load_images(source_of([7, BAD, 7]), range(3), [SMALL], batch_size=3)
    assert [(reason, key) for _, reason, key in failures(batch)] == [
        ("not enough memory", b""),
        ("not an image of a known format", digest(BAD)),
        ("not enough memory", b""),
    ]


def test_a_file_that_memory_does_not_suffice_for_is_a_failure_that_may_pass() -> None:
    def short(row: int) -> None:
        if row == 1:
            raise MemoryError

    (batch,) = load_images(source_of([7, 8, 9], short), range(3), [SMALL], batch_size=3)
    assert failures(batch) == [(1, "not enough memory", b"")]
    assert len(decoded(batch)) == 2


def test_what_known_raises_reaches_the_consumer() -> None:
    def known(key: bytes, _: bytes) -> bool:
        raise LookupError("in known")

    with pytest.raises(LookupError, match="in known"):
        list(load_images(source_of(list(range(40))), range(40), [SMALL], batch_size=3, workers=2, known=known))
