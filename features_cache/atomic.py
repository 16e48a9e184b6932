"""Write a file completely or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from features_cache.rowfile import sync_folder


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; when the block ends, sync that file and rename it to `path`.

    If the block raises, `path` is unchanged. Any step may raise `OSError`.
    """
    with TemporaryDirectory(dir=path.parent, prefix=".thawline-") as folder:
        draft = Path(folder) / path.name
        draft.touch()
        mode = draft.stat().st_mode  # from the umask; safetensors makes files that only the owner can read
        yield draft
        draft.chmod(mode)
        with draft.open("rb") as stream:
            os.fsync(stream.fileno())
        draft.replace(path)
    sync_folder(path.parent)
