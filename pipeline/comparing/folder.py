"""A run folder: what was planned, what came of every job, and what each model said about each test image.

`results.jsonl` only ever grows by whole, synced lines; everything else is replaced as a whole.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from features_cache import nearest
from features_cache.lock import WriterLock
from features_cache.whole import replacing
from pipeline.errors import RunFolderError
from pipeline.evaluation.predictions import Predictions

Record = dict[str, Any]


class RunFolder:
    """A run's files.

    Parameters
    ----------
    path : str or Path
        The folder; `claim` makes it.

    Attributes
    ----------
    records : dict of str to dict
        Finished results by key, in the order in which they finished.

    Raises
    ------
    RunFolderError
        `results.jsonl` is damaged before its last line, or cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.results = self.path / "results.jsonl"
        self.cache = self.path / "cache"
        self.report = self.path / "report.html"
        self.records: dict[str, Record] = {}
        with _explained(self.path, "read"):
            self._load()

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Make the folder if need be and keep other processes from writing to it."""
        with _explained(self.path, "write"):
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "predictions").mkdir(exist_ok=True)
        lock = WriterLock(self.results)
        try:
            with _explained(self.path, "read"):
                self._load(mend=True)
            yield
        finally:
            lock.release()

    def has(self, key: str) -> bool:
        """Tell whether a job is finished, its predictions included."""
        return key in self.records and self._predictions(key).exists()

    def append(self, record: Record, predictions: Predictions) -> None:
        """Keep a finished result; on return it is on disk."""
        columns: dict[str, Any] = {"uris": predictions.uris, "y_true": predictions.y_true, "y_pred": predictions.y_pred}
        if predictions.probability is not None:
            columns["probability"] = predictions.probability.astype(np.float32)
        with _explained(self.path, "write"):
            with replacing(self._predictions(record["key"])) as draft:
                np.savez_compressed(draft, **columns)
            _append(self.results, [record])
        self.records[record["key"]] = record

    def keep_only(self, keys: Iterable[str]) -> None:
        """Move results of jobs that the plan no longer has, or whose images changed, to `superseded.jsonl`."""
        wanted = set(keys)
        stale = [record for key, record in self.records.items() if key not in wanted]
        if stale:
            with _explained(self.path, "write"):
                _append(self.path / "superseded.jsonl", stale)
            self.records = {key: record for key, record in self.records.items() if key in wanted}
            self.write("results.jsonl", _lines(self.records.values()))

    def judged(self, key: str) -> Predictions:
        """Return what a finished model said about its test images; raises `RunFolderError` where that is damaged."""
        file = self._predictions(key)
        try:
            with _explained(self.path, "read"), file.open("rb") as stream, np.load(stream) as stored:
                return Predictions(stored["uris"], stored["y_true"], stored["y_pred"], stored.get("probability"))
        except RunFolderError:
            raise
        except Exception as error:  # damaged bytes make numpy's reader raise nearly anything
            raise RunFolderError(f"{file} is damaged; remove it to have its job run again") from error

    def write(self, name: str, text: str) -> None:
        """Replace a file of the folder as a whole."""
        with _explained(self.path, "write"), replacing(self.path / name) as draft:
            draft.write_bytes(text.encode("utf-8", "surrogateescape"))

    def read_json(self, name: str) -> Record:
        """Return a JSON document of the folder, an empty one where there is none."""
        with _explained(self.path, "read"):
            file = self.path / name
            try:
                document: Record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
            except ValueError:
                raise RunFolderError(f"{file}: expected JSON, found something else; remove the file") from None
        return document

    def write_json(self, name: str, document: Record) -> None:
        """Replace a JSON document of the folder."""
        self.write(name, json.dumps(document, indent=1, ensure_ascii=False) + "\n")

    def write_csv(self) -> None:
        """Write `results.csv`: the records, one column a key, lists and dictionaries as JSON."""
        columns = list(dict.fromkeys(key for record in self.records.values() for key in record))
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(columns)
        for record in self.records.values():
            table.writerow([_cell(record.get(column)) for column in columns])
        self.write("results.csv", text.getvalue())

    def _predictions(self, key: str) -> Path:
        return self.path / "predictions" / f"{key}.npz"

    def _load(self, *, mend: bool = False) -> None:
        """Read the results; what a kill left of a last line is passed over, and cut off where we may write."""
        self.records = {}
        content = self.results.read_bytes() if self.results.exists() else b""
        whole, _, torn = content.rpartition(b"\n")
        for number, line in enumerate(whole.split(b"\n") if whole else [], 1):
            try:
                record = json.loads(line)
                self.records[record["key"]] = record
            except (ValueError, KeyError, TypeError):
                raise RunFolderError(
                    f"{self.results} line {number}: expected a result as JSON, found something else; "
                    "remove the line to have its job run again"
                ) from None
        if torn and mend:
            os.truncate(self.results, len(content) - len(torn))


def open_finished(path: str | Path) -> RunFolder:
    """Return a run folder that holds results.

    Raises
    ------
    RunFolderError
        There is none.
    """
    folder = RunFolder(path)
    if not folder.records:
        near = nearest(folder.path.name, [other.name for other in folder.path.parent.glob("*/")])
        raise RunFolderError(f"{path}: expected the folder of a run with a results.jsonl, found no result{near}")
    return folder


def _append(path: Path, records: Iterable[Record]) -> None:
    """Add lines to a file; on return they are on disk."""
    with path.open("a", encoding="utf-8") as log:
        log.write(_lines(records))
        log.flush()
        os.fsync(log.fileno())


def _lines(records: Iterable[Record]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, Mapping | list) else value


@contextmanager
def _explained(path: Path, doing: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise RunFolderError(
            f"cannot {doing} {error.filename or path}: {reason}; mend that, then run it again"
        ) from error
