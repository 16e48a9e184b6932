"""Run functions on the workers of a Dask cluster: of this machine, its GPUs, a scheduler elsewhere, or a job queue."""

from __future__ import annotations

import importlib
import logging
import os
import queue
import sys
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from features_cache import ThawlineError
from pipeline.errors import EngineError, first_line
from pipeline.images.sources.registry import ImageSource
from pipeline.options import CLUSTER

if TYPE_CHECKING:
    from distributed import Client, Future

TRIES = 3
"""How often a task is tried whose worker dies or fails."""
PATIENCE_S = 120.0
"""How long to wait for the first worker, and for another when all are gone; job queues may take any time."""
STALL_S = 600.0
"""How long tasks may run without any progress before that is an error."""
_POLL_S = 0.5
_busy = threading.Lock()
"""Held by the task that runs in this process: a network takes all of a worker, however many threads it has."""


class Workers:
    """The workers of a cluster; `open_cluster` makes it.

    Parameters
    ----------
    name : str
        What the user called the cluster, for messages.
    client : distributed.Client
    ask_again : callable
        Asks the cluster for the workers that it lacks.
    patience : float or None
        Seconds to wait for a worker when there is none; None to wait for ever.
    ahead : int
        Tasks that are given to the scheduler even if it has fewer workers, so that it asks for more.
    """

    def __init__(
        self, name: str, client: Client, ask_again: Callable[[], None], patience: float | None, ahead: int
    ) -> None:
        self._name, self._client, self._ask_again = name, client, ask_again
        self._patience, self._ahead = patience, ahead
        self._seen = time.monotonic()

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return ``function(*arguments, progress=...)``, computed on a worker.

        Raises
        ------
        ThawlineError
            What the function raised, or why no worker could run it.
        """
        results: dict[str, Any] = {}
        failed = self.call_each(function, {"": arguments}, results.__setitem__)
        if failed:
            raise failed[""]
        return results[""]

    def call_each(
        self,
        function: Callable[..., Any],
        tasks: Mapping[str, tuple[Any, ...]],
        on_result: Callable[[str, Any], None],
        on_rows: Callable[[Mapping[str, int], str], None] | None = None,
    ) -> dict[str, ThawlineError]:
        """Call a function once for each task, on all workers, and return why some tasks failed.

        A worker has one task at a time. Workers may come and go: a task that is lost with its worker is given to
        another, `TRIES` times in all.

        Parameters
        ----------
        function : callable
            Takes the arguments of a task, and ``progress``.
        tasks : mapping
            Name of each task to its arguments.
        on_result : callable
            Gets the name of a task and what the function returned.
        on_rows : callable, optional
            Gets, a few times a second, how many rows each running task has done, and a line on the workers. If
            given, it is an error if nothing is done for `STALL_S`.
        """
        run = _Run(self._client, function, on_rows)
        waiting, tries = deque(tasks), Counter[str]()
        failed: dict[str, ThawlineError] = {}
        try:
            while waiting or run.running:
                for _ in range(max(self._count(), self._ahead) - len(run.running)):
                    if waiting:
                        name = waiting.popleft()
                        tries[name] += 1
                        run.submit(name, tries[name], tasks[name])
                for name, future in run.finished(_POLL_S):
                    error = run.error_of(future)
                    if error is None:
                        on_result(name, future.result())
                    elif tries[name] < TRIES and not isinstance(error, ThawlineError):
                        waiting.append(name)
                    else:
                        told = error if isinstance(error, ThawlineError) else None
                        failed[name] = told or EngineError(_reason(error))
                run.tell(self._client)
        finally:
            run.cancel()
        return failed

    def _count(self) -> int:
        """Return the number of workers; ask for those that are missing, and raise `EngineError` if none comes."""
        if self._client.status != "running":
            raise EngineError(f"the scheduler of {self._name} has gone; start it and run the same command again")
        count = len(self._client.nthreads())
        self._ask_again()
        if count:
            self._seen = time.monotonic()
        elif self._patience is not None and time.monotonic() - self._seen > self._patience:
            raise EngineError(
                f"no worker of {self._name} came in {self._patience:.0f} s; see whether its workers start, and run the "
                "same command again"
            )
        return count


class _Run:
    """The tasks of one call: futures, and the rows that they report.

    Every future has a key of its own, since a scheduler answers a key that it knows with the old result.
    """

    def __init__(
        self,
        client: Client,
        function: Callable[..., Any],
        on_rows: Callable[[Mapping[str, int], str], None] | None,
    ) -> None:
        self._client, self._function, self._on_rows = client, function, on_rows
        self._topic = f"thawline-{uuid.uuid4().hex}"
        self._done: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
        self.running: dict[Future[Any], str] = {}
        self._rows: dict[str, int] = {}
        self._bound = ""
        self._moved = time.monotonic()
        client.subscribe_topic(self._topic, self._hear)

    def submit(self, name: str, attempt: int, arguments: tuple[Any, ...]) -> None:
        key = f"{self._topic}-{name}-{attempt}"
        future = self._client.submit(_call, self._topic, name, key, self._function, arguments, key=key, pure=False)
        self.running[future] = name
        future.add_done_callback(self._done.put)

    def finished(self, seconds: float) -> Iterator[tuple[str, Future[Any]]]:
        """Yield the futures that are finished, after waiting for the first for some seconds at most."""
        with suppress(queue.Empty):
            future = self._done.get(timeout=seconds)
            while True:
                self._moved = time.monotonic()
                name = self.running.pop(future)
                self._rows.pop(name, None)
                yield name, future
                future.release()
                future = self._done.get_nowait()

    def error_of(self, future: Future[Any]) -> BaseException | None:
        if future.status == "finished":
            return None
        if future.status == "error":
            error: BaseException | None = future.exception()
            return error
        return ConnectionError(f"the scheduler has lost it ({future.status})")

    def tell(self, client: Client) -> None:
        """Show how far the tasks are, and raise `EngineError` if nothing moves."""
        if self._on_rows is None:
            return
        count = len(client.nthreads())
        if not count:
            self._moved = time.monotonic()  # `Workers._count` knows how long to wait for one
        if self.running and time.monotonic() - self._moved > STALL_S:
            raise EngineError(
                f"no row was finished for {STALL_S / 60:.0f} minutes, in {', '.join(self.running.values())}; see what "
                "their workers wait for, and run the same command again"
            )
        self._on_rows(dict(self._rows), f"{count} worker{'s' * (count != 1)}{self._bound}")

    def _hear(self, event: tuple[float, Mapping[str, Any]]) -> None:
        _, told = event
        if self._rows.get(told["name"]) != told["rows"]:
            self._moved = time.monotonic()
        if told["name"] in tuple(self.running.values()):
            self._rows[told["name"]] = told["rows"]
        self._bound = f", {told['state']}" if told["state"] else ""

    def cancel(self) -> None:
        """Stop what still runs: workers notice it at their next batch."""
        self._client.unsubscribe_topic(self._topic)
        if self.running and self._client.status == "running":
            self._client.cancel(list(self.running))


def _call(topic: str, name: str, key: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Run a task on a worker, report its rows once a second, and stop when the run was given up."""
    from distributed import get_worker

    worker = get_worker()
    told = -1.0

    def report(done: int, total: int, text: str, state: str = "", /) -> None:
        nonlocal told
        task = worker.state.tasks.get(key)
        if task is None or task.state == "cancelled":
            raise EngineError("the run was given up")
        if time.monotonic() - told >= 1 or done == total:
            told = time.monotonic()
            worker.log_event(topic, {"name": name, "rows": done, "state": state if state.startswith("bound") else ""})

    with _busy:
        return function(*arguments, progress=report)


def _reason(error: BaseException | None) -> str:
    kind = type(error).__name__
    if kind == "KilledWorker":
        return f"its worker died, {TRIES} times"
    return f"{kind}: {first_line(error)}" if isinstance(error, Exception) else kind


@dataclass(frozen=True)
class _Asked:
    """A cluster as the user names it: its kind, and how many workers at least and at most; None if that is not said."""

    kind: str
    least: int | None = None
    most: int | None = None


def parse_cluster(text: str) -> _Asked:
    """Return what ``"local:4"`` and the like ask for; addresses and files are kept whole.

    Raises `EngineError` for anything else.

    Examples
    --------
    >>> parse_cluster("dask_jobqueue.SLURMCluster:0:200")
    _Asked(kind='dask_jobqueue.SLURMCluster', least=0, most=200)
    """
    if problem := CLUSTER.problem(text):
        raise EngineError(f"cluster: {problem}")
    if "://" in text or text.startswith("file:"):
        return _Asked(text)
    kind, *counts = text.split(":")
    least, most = (int(counts[0]), int(counts[-1])) if counts else (None, None)
    if least is not None and most is not None and not least <= most > 0:
        raise EngineError(f"cluster: expected at least one worker, and no more at least than at most, got {text!r}")
    return _Asked(kind, least, most)


def place_of(source: str | Path | ImageSource) -> str:
    """Return how workers in any folder are told where a source is."""
    where = source.location if isinstance(source, ImageSource) else str(source)
    return str(Path(where).absolute()) if Path(where).exists() else where


@contextmanager
def open_cluster(text: str) -> Iterator[Workers]:
    """Yield the workers of a cluster, see `parse_cluster`; a cluster that was started here is stopped at the end.

    Raises
    ------
    EngineError
        The cluster cannot be had, or distributed is not installed.
    """
    asked = parse_cluster(text)
    try:
        import dask
        from distributed import Client
    except ImportError:
        raise EngineError("a cluster needs distributed; install it with: pip install 'thawline[cluster]'") from None
    with ExitStack() as stack:
        logger = logging.getLogger("distributed")
        stack.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.CRITICAL)  # workers that die are counted here
        # a task whose worker dies is not given to another by the scheduler: that is one of its tries
        stack.enter_context(dask.config.set({"distributed.scheduler.allowed-failures": 0}))
        cluster, ask_again = _start(asked)
        if cluster is not None:
            stack.callback(cluster.close)
        path = asked.kind.removeprefix("file:")
        where = {"scheduler_file": path} if path != asked.kind else {"address": cluster or asked.kind}
        try:
            client = Client(**where, set_as_default=False)
        except (OSError, ValueError, TypeError) as error:  # TypeError: tls without certificates
            raise EngineError(f"cannot reach the cluster {text}: {first_line(error)}") from error
        stack.callback(client.close)
        patience = None if cluster is not None and asked.kind not in ("local", "gpus") else PATIENCE_S
        ahead = 0 if asked.least == asked.most else asked.most or 0
        yield Workers(text, client, ask_again, patience, ahead)


def _start(asked: _Asked) -> tuple[Any, Callable[[], None]]:
    """Start a cluster; return it, or None for one that runs already, and what asks it for workers that are missing."""
    if "://" in asked.kind or asked.kind.startswith("file:"):
        path = asked.kind.removeprefix("file:")
        if path != asked.kind and not Path(path).is_file():
            raise EngineError(
                f"there is no scheduler file {path}; start one with: dask scheduler --scheduler-file {path}"
            )
        return None, lambda: None
    if asked.kind == "local":
        return _start_here([{"THAWLINE_SHARE": f"{index}/{asked.most or 1}"} for index in range(asked.most or 1)])
    if asked.kind == "gpus":
        return _start_here([{"CUDA_VISIBLE_DEVICES": gpu} for gpu in _gpus()])
    module, _, name = asked.kind.rpartition(".")
    try:
        cluster = getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError, TypeError, ValueError, OSError) as error:
        raise EngineError(f"cannot start the cluster {asked.kind}: {first_line(error)}") from error
    if asked.least != asked.most:
        cluster.adapt(minimum=asked.least, maximum=asked.most)
        return cluster, lambda: None
    if asked.most is None:
        return cluster, lambda: None
    cluster.scale(asked.most)
    return cluster, lambda: cluster.scale(asked.most)


def _start_here(environments: list[dict[str, str]]) -> tuple[Any, Callable[[], None]]:
    """Start a process for each environment, which only this machine can reach."""
    import dask
    from distributed import Nanny, Scheduler, SpecCluster

    preload = [__name__, *dask.config.get("distributed.worker.preload")]
    options = {"host": "127.0.0.1", "dashboard": False, "dashboard_address": "127.0.0.1:0"}
    worker = {"nthreads": 1, "memory_limit": 0, "silence_logs": logging.CRITICAL, "preload": preload}
    specs = {
        index: {"cls": Nanny, "options": {**options, **worker, "env": environment}}
        for index, environment in enumerate(environments)
    }
    scheduler = {"cls": Scheduler, "options": {**options, "port": 0}}
    cluster = SpecCluster(dict(specs), scheduler, silence_logs=logging.CRITICAL)

    def ask_again() -> None:
        """Start the workers that gave up, as one does that is killed while it starts."""
        lost = {index: spec for index, spec in specs.items() if index not in cluster.worker_spec}
        if lost:
            cluster.worker_spec.update(lost)
            cluster.scale(len(cluster.worker_spec))

    return cluster, ask_again


def dask_setup(_: Any) -> None:
    """Give a worker of this machine its share of the cores; a worker calls it when it starts."""
    share = os.environ.get("THAWLINE_SHARE")
    if share and sys.platform == "linux":
        index, count = map(int, share.split("/"))
        cores = sorted(os.sched_getaffinity(0))
        if count <= len(cores):
            os.sched_setaffinity(0, cores[index * len(cores) // count : (index + 1) * len(cores) // count])


def _gpus() -> list[str]:
    """Return how CUDA names the devices that this process may use."""
    import torch

    count = torch.cuda.device_count()
    if not count:
        raise EngineError("cluster 'gpus' needs a CUDA device, and torch sees none; use local:N")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:count] if visible else [str(index) for index in range(count)]
