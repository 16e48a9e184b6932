"""Computing ahead: results in order, few begun beyond the consumer, errors in their turn, and threads that end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from pipeline.images.ahead import map_ahead


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)


def test_results_are_in_order_whatever_ends_first() -> None:
    later = threading.Event()

    def square(number: int) -> int:
        if number == 0:
            assert later.wait(20)
        if number == 1:
            later.set()
        return number * number

    assert list(map_ahead(square, range(20), threads=3, depth=5)) == [number**2 for number in range(20)]


def test_nothing_gives_nothing() -> None:
    assert list(map_ahead(len, [], threads=2, depth=2)) == []


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_depth_bounds_what_is_begun_beyond_the_last_result(depth: int) -> None:
    begun: set[int] = set()
    results = map_ahead(begun.add, range(50), threads=6, depth=depth)
    for taken in range(1, 6):
        next(results)
        wait_until(lambda taken=taken: len(begun) >= taken + depth)
        time.sleep(0.01)
        assert begun == set(range(taken + depth))
    results.close()


def test_no_more_calls_at_once_than_threads() -> None:
    lock, running, most = threading.Lock(), 0, 0

    def call(_: int) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.002)
        with lock:
            running -= 1

    list(map_ahead(call, range(30), threads=3, depth=30))
    assert most == 3


@pytest.mark.parametrize("error", [ZeroDivisionError("third"), KeyboardInterrupt()], ids=repr)
def test_an_error_comes_after_the_results_before_it(error: BaseException) -> None:
    def call(number: int) -> int:
        if number == 3:
            raise error
        return number

    results = map_ahead(call, range(20), threads=4, depth=8)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(type(error)) as caught:
        next(results)
    assert caught.value is error


def test_closing_ends_it_without_beginning_the_rest() -> None:
    begun: list[int] = []
    results = map_ahead(lambda number: (begun.append(number), time.sleep(0.01)), range(1000), threads=2, depth=500)
    next(results)
    results.close()
    assert len(begun) < 100
    assert next(results, None) is None
