"""The checkpoint file of a run: the run goes on from it after a kill, and a finished run is not trained twice."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from features_cache import CacheError, atomic_write, explained


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Replace the file at `path` by `state` as a whole; raises `CacheError` if it cannot be written."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with explained(path, "write the checkpoint"), atomic_write(path) as draft:
        draft.write_bytes(buffer.getbuffer())


def read_checkpoint(path: Path) -> dict[str, Any] | None:
    """Return the state that was written to `path`, or None if there is no file; a damaged file is a `CacheError`."""
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes make torch's reader raise nearly anything
        raise CacheError(f"the checkpoint {path} is damaged; delete it and train again") from error
    return state
