"""The one way to compute ahead of whoever asks: calls run in threads, results come in order, and few wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def map_ahead(function: Callable[[T], R], items: Iterable[T], threads: int, depth: int) -> Generator[R, None, None]:
    """Yield ``function(item)`` for each item, in order, while threads work on the items that follow.

    Parameters
    ----------
    function : callable
        Runs in the threads. What it raises is raised here when its item's turn comes.
    items : iterable
        Calls begin in this order.
    threads : int
        Calls that run at once.
    depth : int
        Items that may be begun beyond the one that was yielded last.

    Notes
    -----
    The threads end when the iterator is exhausted or closed, each after the call that it is running.

    Examples
    --------
    >>> list(map_ahead(len, ["a", "bc", "def"], threads=2, depth=2))
    [1, 2, 3]
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="ahead")
    begun: deque[Future[R]] = deque()
    try:
        for item in items:
            begun.append(pool.submit(function, item))
            if len(begun) > depth:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
