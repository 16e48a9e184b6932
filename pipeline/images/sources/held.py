"""Parts of packed files that were read last, since images are mostly read in order."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from threading import Lock
from typing import Generic, Protocol, TypeVar


class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


Part = TypeVar("Part", bound=_Sized)


class Held(Generic[Part]):
    """The parts that were asked for last, each read once, by the thread that asks first.

    Parameters
    ----------
    limit : int
        Bytes that they may take together; the latest is held whatever it takes.

    Examples
    --------
    >>> held = Held(limit=1)
    >>> bytes(held.get("a", lambda: memoryview(b"one"))), bytes(held.get("a", lambda: memoryview(b"two")))
    (b'one', b'one')
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._lock = limit, Lock()
        self._parts: OrderedDict[Hashable, Future[Part]] = OrderedDict()

    def get(self, key: Hashable, read: Callable[[], Part]) -> Part:
        """Return the part of this key; `read` returns it if it is not held. What `read` raises is raised."""
        with self._lock:
            part = self._parts.pop(key, None)
            is_new = part is None
            part = part or Future()
            self._parts[key] = part
        if is_new:
            try:
                part.set_result(read())
            except BaseException as error:
                with self._lock:  # first, or another thread that drops the oldest would raise this error
                    del self._parts[key]
                part.set_exception(error)
            else:
                self._drop_oldest()
        return part.result()

    def _drop_oldest(self) -> None:
        with self._lock:
            sizes = {key: part.result().nbytes for key, part in self._parts.items() if part.done()}
            while len(sizes) > 1 and sum(sizes.values()) > self._limit:
                oldest = next(iter(sizes))
                del sizes[oldest], self._parts[oldest]
