"""A run folder: the plan, the result of every job, and every model's predictions on its test images.

`results.jsonl` grows by whole, synced lines; every other file is replaced as a whole.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from features_cache import WriterLock, atomic_write, nearest, open_own
from pipeline.comparing.records import JobResult, RunInfo
from pipeline.errors import RunFolderError
from pipeline.evaluation.predictions import Predictions
from pipeline.results import from_json, to_json


class RunFolder:
    """A run's files.

    Parameters
    ----------
    path : str or Path
        The folder; `claim` makes it.

    Attributes
    ----------
    results : dict of str to JobResult
        Finished results by key, in the order in which they finished.

    Raises
    ------
    RunFolderError
        `results.jsonl` cannot be read, or a line other than a torn last one holds no result.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.cache = self.path / "cache"
        self.report = self.path / "report.html"
        self.results: dict[str, JobResult] = {}
        self._lines = self.path / "results.jsonl"
        with _explained(self.path, "read"):
            self._load()

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Make the folder if need be and keep other processes from writing to it."""
        with _explained(self.path, "write"):
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "predictions").mkdir(exist_ok=True)
        lock = WriterLock(self._lines)
        try:
            with _explained(self.path, "read"):
                self._load(mend=True)
            yield
        finally:
            lock.release()

    def has(self, key: str) -> bool:
        """Tell whether a job is finished and its predictions are there."""
        return key in self.results and self._predictions_file(key).exists()

    def append(self, result: JobResult, predictions: Predictions) -> None:
        """Keep a finished result; on return it is on disk."""
        columns: dict[str, Any] = {"uris": predictions.uris, "y_true": predictions.y_true, "y_pred": predictions.y_pred}
        if predictions.probability is not None:
            columns["probability"] = predictions.probability.astype(np.float32)
        with _explained(self.path, "write"):
            with atomic_write(self._predictions_file(result.key)) as draft:
                np.savez_compressed(draft, **columns)
            _append(self._lines, [result])
        self.results[result.key] = JobResult.from_json(result.to_json())  # as a later run reads it

    def keep_only(self, keys: Iterable[str]) -> None:
        """Move results of jobs that the plan no longer has, or whose images changed, to `superseded.jsonl`."""
        wanted = set(keys)
        stale = [result for key, result in self.results.items() if key not in wanted]
        if stale:
            with _explained(self.path, "write"):
                _append(self.path / "superseded.jsonl", stale)
            self.results = {key: result for key, result in self.results.items() if key in wanted}
            self.write("results.jsonl", _to_lines(self.results.values()))

    def predictions(self, key: str) -> Predictions:
        """Return what a finished model predicted on its test images; raises `RunFolderError` if that is damaged."""
        file = self._predictions_file(key)
        try:
            with _explained(self.path, "read"), file.open("rb") as stream, np.load(stream) as stored:
                return Predictions(stored["uris"], stored["y_true"], stored["y_pred"], stored.get("probability"))
        except RunFolderError:
            raise
        except Exception as error:  # damaged bytes make numpy's reader raise nearly anything
            raise RunFolderError(f"{file} is damaged; remove it to have its job run again") from error

    def write(self, name: str, text: str) -> None:
        """Replace a file of the folder as a whole."""
        with _explained(self.path, "write"), atomic_write(self.path / name) as draft:
            draft.write_bytes(text.encode("utf-8", "surrogateescape"))

    def read_info(self) -> RunInfo:
        """Return what `run.json` holds, the defaults if there is no such file.

        Raises
        ------
        RunFolderError
            The file is damaged.
        """
        file = self.path / "run.json"
        with _explained(self.path, "read"):
            content = file.read_bytes() if file.exists() else b"{}"
        try:
            return from_json(RunInfo, _parse(content))
        except ValueError as error:
            raise RunFolderError(f"{file} is damaged: {error}; remove the file") from None

    def write_info(self, info: RunInfo) -> None:
        """Replace `run.json`."""
        self.write("run.json", json.dumps(to_json(info), indent=1, ensure_ascii=False) + "\n")

    def write_csv(self) -> None:
        """Write `results.csv`: a row for each result, a column for each key, lists and dictionaries as JSON."""
        documents = [result.to_json() for result in self.results.values()]
        columns = list(dict.fromkeys(key for document in documents for key in document))
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(columns)
        for document in documents:
            table.writerow([_cell(document.get(column)) for column in columns])
        self.write("results.csv", text.getvalue())

    def _predictions_file(self, key: str) -> Path:
        return self.path / "predictions" / f"{key}.npz"

    def _load(self, *, mend: bool = False) -> None:
        """Read the results; a last line torn by a kill is passed over, and cut off if `mend`."""
        self.results = {}
        content = self._lines.read_bytes() if self._lines.exists() else b""
        whole, _, torn = content.rpartition(b"\n")
        for number, line in enumerate(whole.split(b"\n") if whole else [], 1):
            try:
                result = JobResult.from_json(_parse(line))
            except ValueError as error:
                raise RunFolderError(
                    f"{self._lines} line {number} is damaged: {error}; remove the line to have its job run again"
                ) from None
            self.results[result.key] = result
        if torn and mend:
            descriptor = open_own(self._lines, os.O_WRONLY)
            try:
                os.ftruncate(descriptor, len(content) - len(torn))
            finally:
                os.close(descriptor)


def open_finished(path: str | Path) -> RunFolder:
    """Return a run folder that holds results.

    Raises
    ------
    RunFolderError
        There are none.
    """
    folder = RunFolder(path)
    if not folder.results:
        near = nearest(folder.path.name, [other.name for other in folder.path.parent.glob("*/")])
        raise RunFolderError(f"{path}: expected a run folder with results in results.jsonl, found none{near}")
    return folder


def _append(path: Path, results: Iterable[JobResult]) -> None:
    """Add lines to a file; on return they are on disk."""
    with os.fdopen(open_own(path, os.O_WRONLY | os.O_APPEND), "a", encoding="utf-8") as log:
        log.write(_to_lines(results))
        log.flush()
        os.fsync(log.fileno())


def _to_lines(results: Iterable[JobResult]) -> str:
    return "".join(json.dumps(one.to_json(), ensure_ascii=False, allow_nan=False) + "\n" for one in results)


def _parse(content: bytes) -> Any:
    """Return strict JSON; raises `ValueError` also for NaN and infinities, which we never write."""
    try:
        return json.loads(content, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise ValueError("expected JSON, found something else") from None


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value


@contextmanager
def _explained(path: Path, doing: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise RunFolderError(
            f"cannot {doing} {error.filename or path}: {reason}; mend that, then run it again"
        ) from error
