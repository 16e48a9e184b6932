"""Check all trials before the first one, then run them in parallel."""

from __future__ import annotations

import atexit
import itertools
import os
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import joblib
from sklearn.pipeline import Pipeline
from threadpoolctl import threadpool_limits

from features_cache import scratch_folder
from pipeline.errors import FitError
from pipeline.evaluation.comparisons import preference
from pipeline.evaluation.metrics import OF_SCORES, check_metric
from pipeline.evaluation.rows import require_finite
from pipeline.evaluation.split_layers import SplitLayer
from pipeline.heads.memory import find_streamed, free_memory, is_wide, memory_of_trial
from pipeline.heads.solvers.blocks import StreamedRows
from pipeline.heads.solvers.device import T, Task, run_one_by_one
from pipeline.heads.trial import Prepared, Trial, TrialOutcome, prepare_trial, run_trial
from pipeline.options import CLASSIFICATION, MULTILABEL
from pipeline.results import Progress

MOST_CELLS = 1 << 27
"""Weights of a linear head, or probabilities of test rows: 1 GiB of float64."""

_ROOM = 2_000_000_000
"""Bytes that must be free in memory for rows that workers share, as joblib has it."""


def check_trials(trials: Sequence[Trial], *, balanced: bool, metric: str) -> list[Trial]:
    """Refuse what rows, heads and memory do not allow, before anything is trained; return what `find_streamed` does."""
    for data, head in trials:
        rows, most = len(data.splits.train) + len(data.splits.val), head.family.most_rows
        if most is not None and rows > most:
            raise FitError(
                f"{head.name} compares all pairs of training rows and takes at most {most} of them, got {rows}, "
                f"which would need {2 * rows**2 * 8 / 2**30:.0f} GiB and {(rows / most) ** 2:.0f} times as long; "
                "use linear_svm, or fewer shots"
            )
        if balanced and not head.family.weighted:
            raise FitError(f"{head.name} cannot weight its training rows; leave out {head.name} or 'balanced'")
        classes, tested = len(data.layer.table.classes), len(data.splits.test)
        task = data.layer.table.task
        weights = classes * data.layer.dim if head.family.linear else 0
        scores = classes * tested if head.family.probabilities or metric in OF_SCORES or task == MULTILABEL else 0
        if max(weights, scores) > MOST_CELLS:
            ways = ["another metric"] if scores > MOST_CELLS and metric in OF_SCORES else []
            if weights > MOST_CELLS or head.family.probabilities:
                ways.insert(0, "centroid")
            way = f"{' with '.join(ways)}, or " if task == CLASSIFICATION else ""
            raise FitError(
                f"{head.name} for {classes} {'classes' if task == CLASSIFICATION else 'labels'} would need a table of "
                f"{max(weights, scores) * 8 / 2**30:.1f} GiB; use {way}coarser labels"
            )
        if task == CLASSIFICATION:
            check_metric(metric, classes)
    streamed = find_streamed(trials)
    for layer in dict.fromkeys(data.layer for data, _ in trials):
        if layer.joined is None:  # a layer with joined columns comes without them, too
            require_finite(layer)
    return streamed


def run_trials(
    trials: Sequence[Trial],
    streamed: Collection[Trial],
    jobs: int | None,
    progress: Progress | None,
    *,
    balanced: bool,
    metric: str,
    keep: bool,
    finished: Callable[[int, TrialOutcome], None],
) -> Pipeline | None:
    """Run all trials: first those on a device, one by one, then those on the CPU, several at a time, then the streamed.

    Parameters
    ----------
    trials : sequence of Trial
    streamed : collection of Trial
        Those that read their rows in each pass, one trial after another, with all cores.
    jobs : int or None
        Number of processes, by default one per core, or as many as memory has room for; never more than there are
        trials.
    progress : callable or None
        Called as ``progress(done, total, "fit")``.
    balanced : bool
        Whether every class counts alike.
    metric : str
        What parameters are chosen by.
    keep : bool
        Whether to keep the best model.
    finished : callable
        Called as ``finished(index, outcome)`` as soon as a trial is done; the outcome comes without its model.

    Returns
    -------
    Pipeline or None
        The best model by `preference`, if asked for.
    """
    best: tuple[float, float, float, int] | None = None
    model = None
    on_device, on_cpu, passing = _order(trials, streamed)
    most = max((memory_of_trial(trials[index], shared=True) for index in on_cpu), default=1)
    workers = min(jobs or min(joblib.cpu_count(), max(1, free_memory() // most)), len(on_cpu)) or 1
    # one trial prepared ahead keeps the workers busy without holding more rows than they use
    parallel = joblib.Parallel(
        workers,
        return_as="generator",
        batch_size=1,
        pre_dispatch="n_jobs + 1",
        temp_folder=_shared_folder() if workers > 1 else None,
        initializer=_end_with,
        initargs=(os.getpid(),),
    )
    with threadpool_limits(1 if workers > 1 else None):
        outcomes = itertools.chain.from_iterable(
            run(_tasks([trials[index] for index in part], streamed, balanced=balanced, metric=metric, keep=keep))
            for run, part in ((run_one_by_one, on_device), (parallel, on_cpu), (_in_turn, passing))
        )
        for done, (index, outcome) in enumerate(zip(on_device + on_cpu + passing, outcomes, strict=True), 1):
            rank = preference(trials[index].data.shots, outcome.choice.score, index, outcome.choice.log_loss)
            if best is None or rank > best:
                best, model = rank, outcome.pipeline
            finished(index, replace(outcome, pipeline=None))
            if progress is not None:
                progress(done, len(trials), "fit")
    return model


def _order(trials: Sequence[Trial], streamed: Collection[Trial]) -> tuple[list[int], list[int], list[int]]:
    """Return indices of trials on a device, on the CPU and streamed; those of the same data together."""
    first: dict[SplitLayer, int] = {}
    for index, trial in enumerate(trials):
        first.setdefault(trial.data, index)
    indices = sorted(range(len(trials)), key=lambda index: first[trials[index].data])
    passing = [index for index in indices if trials[index] in streamed]
    on_device = [index for index in indices if trials[index].head.family.device is not None and index not in passing]
    return on_device, [index for index in indices if index not in {*on_device, *passing}], passing


def _tasks(
    trials: Sequence[Trial], streamed: Collection[Trial], *, balanced: bool, metric: str, keep: bool
) -> Iterator[Any]:
    """Prepare rows when a worker is about to need them, once for all heads on the same data that need the same."""
    prepared: dict[tuple[str, bool], Prepared] = {}
    current = None
    for trial in trials:
        data, head = trial
        if data is not current:
            prepared, current = {}, data
        table = data.layer.table
        scaling, rotated = head.scaling, is_wide(trial)
        if (scaling, rotated) not in prepared:
            dims = [info.dim for _, info in data.layer.parts]
            read: Any = data.layer.features
            if trial in streamed:
                read = partial(StreamedRows, data.layer.features, data.layer.dim)
            prepared[scaling, rotated] = prepare_trial(
                read,
                table.y,
                table.labels,
                data.splits,
                scaling,
                rotated=rotated,
                seed=data.seed,
                dims=dims,
                joined=data.layer.joined,
            )
        how: Any = {"task": table.task, "balanced": balanced, "metric": metric, "keep": keep}
        yield joblib.delayed(run_trial)(head, prepared[scaling, rotated], len(table.classes), **how)


def _in_turn(tasks: Iterable[Task[T]]) -> Iterator[T]:
    return (function(*arguments, **options) for function, arguments, options in tasks)


def _end_with(parent: int) -> None:
    """Let this worker end soon after its parent, even if that is killed: joblib's keep their rows for minutes."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    if os.getpid() != parent:
        threading.Thread(target=watch, daemon=True).start()


@cache
def _shared_folder() -> str:
    """Return the folder in which joblib shares rows with the workers of this process: in memory where there is room."""
    memory = Path("/dev/shm")  # noqa: S108 (the folder's name is not guessable, and only its owner may enter it)
    roomy = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > _ROOM
    parent = Path(os.environ.get("JOBLIB_TEMP_FOLDER") or (memory if roomy else gettempdir())).expanduser()
    parent.mkdir(parents=True, exist_ok=True)
    folder = scratch_folder(parent)
    atexit.register(folder.cleanup)
    return folder.name
