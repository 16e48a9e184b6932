"""Write what was found as a table."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from features_cache import atomic_write, explained


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a .csv file; an existing one is replaced, and stays as it was after an error.

    Raises `CacheError` if it cannot be written.
    """
    with explained(path, "write"), atomic_write(path) as draft, draft.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(columns)
        writer.writerows(rows)
