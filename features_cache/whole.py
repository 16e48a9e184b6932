"""Files that are there as a whole or not at all, whatever ends the writing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from features_cache.rowfile import sync_folder


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path of the same name to write to, whose file takes the place of `path`, on disk, when the block ends.

    After an error in the block `path` is as it was. Any step may raise `OSError`.
    """
    with TemporaryDirectory(dir=path.parent, prefix=".thawline-") as folder:
        draft = Path(folder) / path.name
        draft.touch()
        mode = draft.stat().st_mode  # as the umask has it; safetensors makes files that only their owner reads
        yield draft
        draft.chmod(mode)
        with draft.open("rb") as stream:
            os.fsync(stream.fileno())
        draft.replace(path)
    sync_folder(path.parent)
