"""Gzip files that can be read at any position, without unpacking them from the start each time or to a disk."""

from __future__ import annotations

import io
import zlib
from bisect import bisect_right
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from pipeline.images.sources.held import Held

SPACING = 1 << 20
"""Least bytes of content between two states."""

MOST_STATES = 2048
"""A state takes about 50 kB of memory."""

HELD_BYTES = 1 << 27
"""Bytes of content that are held."""

_CHUNK = 1 << 14
"""Packed bytes that are read at once."""

_GZIP = 31
"""zlib's word for a stream with gzip's header and checksum."""


class _State(NamedTuple):
    """A decompressor after `position` bytes of content, which goes on with the packed bytes from `packed` on."""

    position: int
    packed: int
    unpacker: Any


class Gzipped:
    """The content of a gzip file, from which many threads may read at once after it was read through `open`.

    That leaves states of the decompressor behind, between which the content is unpacked again, block by block.

    Parameters
    ----------
    open_packed : callable
        Opens the gzip file.
    """

    def __init__(self, open_packed: Callable[[], io.BufferedIOBase]) -> None:
        self.open_packed = open_packed
        self._states = [_State(0, 0, zlib.decompressobj(_GZIP))]
        self._spacing, self.length = SPACING, 0  # as far as it was read
        self._blocks = Held[memoryview](HELD_BYTES)

    def open(self) -> io.RawIOBase:
        """Return the content as a file; reading it raises `OSError` if the gzip file is damaged."""
        return _Content(self, index=True)

    def read(self, start: int, size: int) -> bytes:
        """Return `size` bytes of the content from `start` on; raises `OSError` if they are damaged or missing."""
        data = bytearray()
        for index in range(self._before(start), len(self._states)):
            block = self._blocks.get(index, partial(self._unpack, index))
            first = start + len(data) - self._states[index].position
            data += block[first : first + size - len(data)]
            if len(data) == size:
                return bytes(data)
        raise OSError("the gzip file ends early")

    def state_before(self, position: int) -> _State:
        """Return the state from which to unpack what is at `position`; its decompressor belongs to the caller."""
        state = self._states[self._before(position)]
        return state._replace(unpacker=state.unpacker.copy())

    def _before(self, position: int) -> int:
        return bisect_right(self._states, position, key=lambda state: state.position) - 1

    def _unpack(self, index: int) -> memoryview:
        """Return the block between a state and the next."""
        start = self._states[index].position
        stop = self._states[index + 1].position if index + 1 < len(self._states) else self.length
        with io.BufferedReader(_Content(self)) as content:
            content.seek(start)
            return memoryview(content.read(stop - start))

    def keep(self, position: int, packed: int, unpacker: Any) -> None:
        """Keep a state if it is far enough behind the last one; of too many states, every other one is dropped."""
        if position - self._states[-1].position < self._spacing:
            return
        self._states.append(_State(position, packed, unpacker.copy()))
        if len(self._states) > MOST_STATES:
            self._states, self._spacing = self._states[::2], 2 * self._spacing


class _Content(io.RawIOBase):
    """The content as a file; reading it leaves states behind if it is to `index`."""

    def __init__(self, gzipped: Gzipped, *, index: bool = False) -> None:
        self._gzipped, self._index, self._packed = gzipped, index, gzipped.open_packed()
        self._position = self._wanted = 0  # where the decompressor is, and where the next read begins
        self._unpacker: Any = gzipped.state_before(0).unpacker
        self._rest = b""  # packed bytes that the decompressor has not taken yet

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._packed.close()
        super().close()

    def tell(self) -> int:
        return self._wanted

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END:
            raise io.UnsupportedOperation("the length of a gzip file's content is not known")
        self._wanted = max(0, offset + (self._wanted if whence == io.SEEK_CUR else 0))
        return self._wanted

    def readinto(self, buffer: Any) -> int:
        state = self._gzipped.state_before(self._wanted)
        if not state.position <= self._position <= self._wanted:
            self._position, self._unpacker, self._rest = state.position, state.unpacker, b""
            self._packed.seek(state.packed)
        while self._position < self._wanted:
            if not self._unpack(min(self._wanted - self._position, SPACING)):
                return 0
        data = self._unpack(len(buffer))
        buffer[: len(data)] = data
        self._wanted += len(data)
        return len(data)

    def _unpack(self, most: int) -> bytes:
        """Return the next bytes of content, `most` at most; none at the end."""
        while True:
            if not self._rest:
                if self._index:
                    self._gzipped.keep(self._position, self._packed.tell(), self._unpacker)
                self._rest = self._packed.read(_CHUNK) or b""
            if self._unpacker.eof:  # what follows is padding, or another stream whose content belongs to this one
                self._rest = self._rest.lstrip(b"\0")
                if self._rest:
                    self._unpacker = zlib.decompressobj(_GZIP)
            if not self._rest:
                if not self._unpacker.eof:
                    raise OSError("the gzip file ends early")
                return b""
            try:
                data: bytes = self._unpacker.decompress(self._rest, most)
            except zlib.error as error:
                raise OSError(f"the gzip file is damaged: {error}") from None
            self._rest = self._unpacker.unused_data if self._unpacker.eof else self._unpacker.unconsumed_tail
            self._position += len(data)
            if self._index:
                self._gzipped.length = max(self._gzipped.length, self._position)
            if data:
                return data
