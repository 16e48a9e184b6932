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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features_cache import WriterLock, atomic_write, nearest, open_own, parse_json
from pipeline.errors import RunFolderError
from pipeline.evaluation.predictions import Predictions
from pipeline.options import CLASSIFICATION, METRICS_OF, MULTILABEL, REGRESSION, SHOTS_OR_ALL, TASK, choice
from pipeline.results import (
    FinetuneMultilabelResult,
    FinetuneRegressionResult,
    FinetuneResult,
    FitResult,
    HeadResult,
    MultilabelResult,
    RegressionResult,
    from_json,
    to_json,
)

HEAD, FINETUNE = "head", "finetune"
RECORDS: dict[str, dict[str, type[HeadResult]]] = {
    HEAD: {CLASSIFICATION: FitResult, MULTILABEL: MultilabelResult, REGRESSION: RegressionResult},
    FINETUNE: {
        CLASSIFICATION: FinetuneResult,
        MULTILABEL: FinetuneMultilabelResult,
        REGRESSION: FinetuneRegressionResult,
    },
}
"""The record of a result, by its kind and task."""

PREDICTIONS_LIMIT = 1 << 30
"""Most bytes of a model's predictions, unpacked: a forged file of some kilobytes must not take all memory."""

_OF_VALUES = ("probabilities", "scores", "folds")
"""Columns of `Predictions` that metrics of labels need."""

OptionValue = str | int | float | bool | None


@dataclass(frozen=True)
class JobResult:
    """The result of one job, as `fit` or `finetune` returned it, and what the comparison adds.

    `key` says what the result depends on, see `pipeline.invalidation`; `n_classes` counts classes or labels, and is 0
    for numbers and in run folders made before it was kept. `task` is one of `pipeline.options.TASKS`. `precision`,
    `store`, `size`, `white` and `drop_leaks` are those of a head, see `pipeline.spec.LayerSpec`, and `depth` is the
    index of its layer in the order of computation, None for joined layers. `options` are those of a fine-tune, as the
    plan names them, without backbone and freeze, and `weights` is a digest of those it began with and of their
    preprocessing, None in older run folders.
    """

    key: str
    source: str
    result: HeadResult
    n_classes: int = 0
    task: str = CLASSIFICATION
    precision: str | None = None
    store: str | None = None
    size: tuple[int, int] | None = None
    white: int | None = None
    drop_leaks: bool | str = False
    depth: int | None = None
    options: dict[str, OptionValue] = field(default_factory=dict)
    weights: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the line of `results.jsonl`: the result's own keys, and what a comparison adds."""
        own = to_json(self)
        result = own.pop("result")
        of_head = ("precision", "store", "size", "white", "drop_leaks", "depth")
        kept = ("options", "weights") if self.result.kind == FINETUNE else of_head
        return {
            **{name: own[name] for name in ("key", "source", "n_classes", "task")},
            **result,
            **{k: own[k] for k in kept},
        }

    @classmethod
    def from_json(cls, document: Any) -> JobResult:
        """Return the result of a line; raises `ValueError` if a key is missing or holds something impossible."""
        kind = document.get("kind") if isinstance(document, dict) else None
        if kind not in list(RECORDS):
            raise ValueError(f"expected 'kind' to be one of {', '.join(RECORDS)}, got {kind!r:.40}")
        task = document.get("task", CLASSIFICATION)
        if problem := TASK.kind.problem(task):
            raise ValueError(f"'task': {problem}")
        result = from_json(RECORDS[kind][task], document)
        if kind != FINETUNE and "/" not in result.head:  # of an older version, which standardised by default
            result = replace(result, head=f"{result.head}/standard")
        if result.n_test <= 0:
            raise ValueError(f"expected 'n_test' above 0, got {result.n_test}")
        if isinstance(result, FitResult) and not 0 <= result.accuracy <= 1:
            raise ValueError(f"expected 'accuracy' from 0 to 1, got {result.accuracy}")
        for name, kind_of_value in (("shots", SHOTS_OR_ALL), ("metric", choice(*METRICS_OF[task]))):
            if problem := kind_of_value.problem(getattr(result, name)):
                raise ValueError(f"'{name}': {problem}")
        return from_json(cls, document | {"result": result})


@dataclass(frozen=True)
class Failure:
    """A job that could not be done, and why in one line."""

    job: str
    reason: str


@dataclass(frozen=True)
class ExtractionCost:
    """What computing images of one cache file, which has so many rows, took in all runs into the folder together."""

    computed: int = 0
    seconds: float = 0.0
    source: str = ""
    backbone: str = ""
    rows: int = 0
    unreadable: int = 0


@dataclass(frozen=True)
class Invocation:
    """One call of `compare` that computed something, with the keys of `pipeline.provenance.machine`.

    `seconds`, `computed` and `failed` are None if the process was killed.
    """

    started: str = ""
    command: str = ""
    cpu: str = ""
    cores: int | None = None
    memory_gib: float | None = None
    system: str = ""
    python: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float | None = None
    computed: int | None = None
    failed: int | None = None


@dataclass(frozen=True)
class RunInfo:
    """What `run.json` holds: the plan's path (``""`` in a new folder) and content, and how it was run.

    `extractions` are by name of the cache file, `runs` are all calls so far with the latest last, `notes` tell what the
    user should know, and `failures` are those of the latest call.
    """

    plan_file: str = ""
    plan: dict[str, Any] = field(default_factory=dict)
    extractions: dict[str, ExtractionCost] = field(default_factory=dict)
    runs: list[Invocation] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)


class RunFolder:
    """A run's files; `claim` makes the folder. `results` are by key, in the order in which they finished.

    A `results.jsonl` that cannot be read, or in which a line other than a torn last one holds no result, is a
    `RunFolderError`.
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
        kept = JobResult.from_json(result.to_json())  # as a later run reads it
        columns: dict[str, Any] = {"uris": predictions.uris, "y_true": predictions.y_true, "y_pred": predictions.y_pred}
        if predictions.probability is not None:
            columns["probability"] = predictions.probability.astype(np.float32)
        if predictions.groups is not None and predictions.groups.any():
            columns["groups"] = predictions.groups
        if result.task != CLASSIFICATION:
            given = {name: getattr(predictions, name) for name in _OF_VALUES}
            columns |= {name: _single_precision(column) for name, column in given.items() if column is not None}
        with _explained(self.path, "write"):
            with atomic_write(self._predictions_file(result.key)) as draft:
                np.savez_compressed(draft, **columns)
            _append(self._lines, [result])
        self.results[result.key] = kept

    def keep_only(self, keys: Iterable[str]) -> None:
        """Move all other results, which no longer hold or lack their predictions, to `superseded.jsonl`."""
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
                if sum(member.file_size for member in stored.zip.infolist()) > PREDICTIONS_LIMIT:
                    raise ValueError("it would unpack to more than any predictions")
                columns = (stored["uris"], stored["y_true"], stored["y_pred"], stored.get("probability"))
                others = {name: stored.get(name) for name in ("groups", *_OF_VALUES)}
                found = Predictions(*columns, **others)
                _check(found, self.results[key])
                return found
        except RunFolderError:
            raise
        except Exception as error:  # damaged bytes make numpy's reader raise nearly anything
            raise RunFolderError(f"{file} is damaged; remove it to have its job run again") from error

    def write(self, name: str, text: str) -> None:
        """Replace a file of the folder as a whole."""
        with _explained(self.path, "write"), atomic_write(self.path / name) as draft:
            draft.write_bytes(text.encode("utf-8", "surrogateescape"))

    def read_info(self) -> RunInfo:
        """Return what `run.json` holds, the defaults if there is no such file."""
        file = self.path / "run.json"
        with _explained(self.path, "read"):
            content = file.read_bytes() if file.exists() else b"{}"
        try:
            return from_json(RunInfo, parse_json(content))
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
                result = JobResult.from_json(parse_json(line))
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


def _single_precision(column: NDArray[Any]) -> NDArray[Any]:
    """Return scores as float32, which take half the space; other columns as they are."""
    return column.astype(np.float32) if column.dtype == np.float64 else column


def _check(found: Predictions, job: JobResult) -> None:
    """Raise `ValueError` unless the columns are those of the test images of a job."""
    rows, each = (job.result.n_test,), (job.result.n_test, job.n_classes)
    kind, shape = {CLASSIFICATION: ("i", rows), MULTILABEL: ("b", each), REGRESSION: ("f", rows)}[job.task]
    columns = [
        (found.uris, "U", rows),
        (found.y_true, kind, shape),
        (found.y_pred, kind, shape),
        (found.probability, "f", rows),
        (found.groups, "U", rows),
        (found.folds, "i", rows),
        (found.probabilities, "f", each),
        (found.scores, "f", each),
    ]
    if not all(column is None or (column.dtype.kind, column.shape) == (kind, shape) for column, kind, shape in columns):
        raise ValueError("a column is of another type or length")
    if len(set(found.uris)) < len(found.uris):
        raise ValueError("an image occurs twice")
    labels = np.concatenate([found.y_true, found.y_pred])
    if job.task == CLASSIFICATION and (labels.min() < 0 or (job.n_classes and labels.max() >= job.n_classes)):
        raise ValueError("a label has no class")
    if job.task == MULTILABEL and found.probabilities is None and found.scores is None:
        raise ValueError("the scores of the labels are missing")
    numbers = [labels, *(column for column in (found.probabilities, found.scores) if column is not None)]
    if any(np.isnan(column).any() for column in numbers):
        raise ValueError("a number is missing")


def open_finished(path: str | Path) -> RunFolder:
    """Return a run folder that holds results; raises `RunFolderError` if there are none."""
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
