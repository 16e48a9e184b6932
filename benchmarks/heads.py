"""How fast heads are chosen and trained beside scikit-learn as most people call it, on the same rows in the same run.

    python benchmarks/heads.py [search] [wide] [grid] [large] [streamed] [--rows 3068] [--dim 1280] [--classes 10]
        [--shrink 1] [--cache CACHE --layer LAYER]

- search: a head over 45 values of C on ROWS x DIM. The peer is a loop over C of cold float64 scikit-learn fits: with as
  many BLAS threads as there are cores, as a user runs it, with one, and with one and a tolerance of 1e-8: what the
  choice and the labels should be, for at its own tolerance scikit-learn stops early where training rows are all fitted.
  With --cache the rows are a cached layer's instead: 60 % to train on, 20 % to choose on, 20 % fresh.
- wide: 200 rows x 20,480 features, where rows are first rotated onto their span. The peer is that loop with one thread.
- grid: eight layers x logreg, linear SVM, k-NN x three seeds on 2,000 rows through `fit`, cache file and all: seconds
  by head and by layer, and the memory of each worker (pages shared with others are divided among them).
- large: each head on ROWS x DIM rows of length 1 (say 50,000 x 1,280): processor time of one thread, and the peak of
  memory in units of the features to train on, which `fit` holds once for both choosing and final training. The peers
  are one fit each with the C that was chosen, in float32: scikit-learn's solver, and its stochastic gradients
  (`SGDClassifier` with early stopping). It runs only if it is named.
- streamed: `fit` on ROWS x DIM float16 rows (say 2,000,000 x 1,280) in a cache in parts, with each head in a process of
  its own that takes itself to have no free memory, so that it reads rows from the cache in each pass. It runs only if
  it is named.

Both sides choose C on the same validation rows; the table says which, with what validation accuracy, and how many of
2,000 fresh rows they label right, and like thawline does. Features are made: ten classes in 60 of the directions of a
spectrum that falls like that of a CNN's features. SHRINK divides all sizes, to see whether it runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, SGDClassifier
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler, normalize
from sklearn.svm import LinearSVC
from threadpoolctl import threadpool_limits

from features_cache import CacheWriter, Catalog, LayerInfo, PartPlan, Rows, divide
from pipeline.arrays import Float32Array, IntArray
from pipeline.fit import fit
from pipeline.heads import memory
from pipeline.heads.choose import Scaled, make_fold, scale, search, train_final
from pipeline.heads.linear import C_GRID
from pipeline.heads.registry import find_head
from pipeline.heads.trial import Prepared, run_trial
from pipeline.options import METRICS

STAGES = {"b0": 16, "b1": 24, "b2": 40, "b3": 80, "b4": 112, "b5": 192, "b6": 320, "penultimate": 1280}
FRESH = 2000


class Task(NamedTuple):
    """Raw features and labels to train on, to choose C on, and to compare predictions on."""

    x: tuple[Float32Array, Float32Array, Float32Array]
    y: tuple[IntArray, IntArray, IntArray]


class Chosen(NamedTuple):
    """Seconds until a trained head was there, its C and validation accuracy, its labels of the fresh rows."""

    seconds: float
    c: float
    score: float
    unconverged: int
    labels: IntArray


def make_features(n: int, dim: int, classes: int, seed: int = 0) -> tuple[Float32Array, IntArray]:
    """Return features (n, dim) and labels (n,)."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    hidden = rng.standard_normal((n, 400)).astype(np.float32)
    means = np.random.default_rng(99).standard_normal((classes, 60))
    hidden[:, :60] += (0.55 * means)[y]
    spectrum = np.arange(1, 401) ** -0.5
    mixing = np.random.default_rng(98).standard_normal((400, dim)) * spectrum[:, None]
    features = hidden @ mixing.astype(np.float32) + 0.1 * rng.standard_normal((n, dim), np.float32)
    return np.maximum(features, 0), y  # features are what a ReLU let through


def make_task(rows: int, dim: int, classes: int) -> Task:
    """Cut 80 % of `rows` for training and the rest for choosing C; fresh rows come on top."""
    x, y = make_features(rows + FRESH, dim, classes)
    cuts = [rows * 4 // 5, rows]
    a, b, c = np.split(x, cuts)
    return Task((a, b, c), tuple(np.split(y, cuts)))  # type: ignore[arg-type]


def cached_task(cache: str, layer: str) -> Task:
    """Cut the rows of a cached layer at random."""
    x, y = Catalog(cache).find(layer).xy(layer)
    order = np.random.default_rng(0).permutation(len(y))
    cuts = [len(y) * 3 // 5, len(y) * 4 // 5]
    a, b, c = np.split(np.asarray(x, np.float32)[order], cuts)
    return Task((a, b, c), tuple(np.split(np.asarray(y, np.int64)[order], cuts)))  # type: ignore[arg-type]


class Peer(NamedTuple):
    """How the peer runs: number of BLAS threads (all by default), and the solver's tolerance (its own by default)."""

    threads: int | None = None
    tol: float | None = None


def cold(task: Task, make: Callable[..., Any], peer: Peer) -> Chosen:
    """Loop over C as a user would: float64, every fit from zero; of equals the lower log-loss, or the smaller C."""
    began = time.perf_counter()
    with threadpool_limits(peer.threads), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        scaler = StandardScaler().fit(task.x[0].astype(np.float64))
        train, held = (scaler.transform(part.astype(np.float64)) for part in task.x[:2])
        scores = [rate(make(c, peer.tol).fit(train, task.y[0]), held, task.y[1]) for c in C_GRID]
        c = C_GRID[scores.index(max(scores))]
        known = np.concatenate(task.x[:2]).astype(np.float64)
        scaler = StandardScaler().fit(known)
        model = make(c, peer.tol).fit(scaler.transform(known), np.concatenate(task.y[:2]))
        seconds = time.perf_counter() - began
        labels = model.predict(scaler.transform(task.x[2].astype(np.float64)))
        return Chosen(seconds, c, max(scores)[0], len(caught), labels)


def rate(model: Any, held: NDArray[np.float64], y: IntArray) -> tuple[float, float]:
    """Return accuracy, and the log-loss turned round where the model has one."""
    if not hasattr(model, "predict_proba"):
        return model.score(held, y), 0.0
    told = model.predict_proba(held)
    return float((model.classes_[told.argmax(1)] == y).mean()), -log_loss(y, told, labels=model.classes_)


def ours(task: Task, name: str) -> Chosen:
    """Choose and train the head `name` as `fit` does in a worker."""
    head = find_head(name)
    began = time.perf_counter()
    with threadpool_limits(1):
        rotated = task.x[0].shape[1] > len(task.x[0])
        fold = make_fold(scale("standard", task.x[0].copy(), task.x[1].copy(), rotated=rotated), *task.y[:2])
        choice = search(head, [fold])
        final = scale("standard", np.concatenate(task.x[:2]), task.x[2].copy(), rotated=rotated)
        fitted = train_final(head, choice.params, final, np.concatenate(task.y[:2]))
        seconds = time.perf_counter() - began
        labels = fitted.estimator.predict(final.held)
        return Chosen(seconds, choice.params["C"], choice.score, choice.unconverged, labels)


def logreg(c: float, tol: float | None) -> LogisticRegression:
    """Return the peer's model, with enough iterations to converge."""
    return LogisticRegression(C=c, tol=tol or 1e-4, max_iter=1000 if tol is None else 10_000)


def linear_svm(c: float, tol: float | None) -> LinearSVC:
    """Return the peer's model."""
    return LinearSVC(C=c, tol=tol or 1e-4)


def compare(title: str, task: Task, heads: Sequence[str], peers: dict[str, Peer]) -> tuple[Table, list[Any]]:
    """Measure heads and peers in turn."""
    table = Table(
        "head", "run", "seconds", "times as long", "C", "val accuracy", "fresh accuracy", "alike", title=title
    )
    report = []
    for name in heads:
        mine = ours(task, name)
        runs = {"thawline": mine} | {run: cold(task, globals()[name], peer) for run, peer in peers.items()}
        for run, found in runs.items():
            row = {
                "head": name,
                "run": run,
                "seconds": found.seconds,
                "ratio": found.seconds / mine.seconds,
                "C": found.c,
                "val_accuracy": found.score,
                "unconverged": found.unconverged,
                "fresh_accuracy": float((found.labels == task.y[2]).mean()),
                "alike": float((found.labels == mine.labels).mean()),
            }
            report.append(row)
            cells = (f"{row['seconds']:.2f}", f"{row['ratio']:.1f}", f"{found.c:.3g}", f"{found.score:.4f}")
            table.add_row(name, run, *cells, f"{row['fresh_accuracy']:.4f}", f"{row['alike']:.2%}")
    return table, report


class PeakMemory(threading.Thread):
    """Watch this process; `peak` is the most resident memory that was added since it began, bytes (Linux only)."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.begin, self.peak = self._size(), 0
        self.over = threading.Event()

    def __enter__(self) -> PeakMemory:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.join()

    def run(self) -> None:
        """Look every 20 ms."""
        while not self.over.wait(0.02):
            self.peak = max(self.peak, self._size() - self.begin)

    @staticmethod
    def _size() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def large(task: Task, name: str) -> Iterator[dict[str, Any]]:
    """Choose and train a head on many rows, then its peers; the features to train on count as memory of each."""
    known, y, n = np.concatenate(task.x[:2]), np.concatenate(task.y[:2]), len(task.y[0])

    def report(run: str, began: float, memory: PeakMemory, labels: IntArray) -> dict[str, Any]:
        peak = 1 + memory.peak / known.nbytes
        accuracy = float((labels == task.y[2]).mean())
        seconds = time.process_time() - began
        return {"head": name, "run": run, "seconds": seconds, "memory": peak, "fresh_accuracy": accuracy}

    prepared = Prepared((), Scaled(known, task.x[2], None, None), y, 0.0, n)
    with threadpool_limits(1):
        began = time.process_time()
        with PeakMemory() as memory:
            head, classes = find_head(f"{name}/none"), int(y.max()) + 1
            found = run_trial(head, prepared, classes, balanced=False, metric=METRICS[0], keep=False)
        c = found.params["C"]
        yield report(f"thawline, {found.choice.tried} values of C", began, memory, found.y_pred)
        loss = {"logreg": "log_loss", "linear_svm": "squared_hinge"}[name]
        peers = {
            "scikit-learn": globals()[name](c, None),
            "SGDClassifier": SGDClassifier(loss=loss, alpha=1 / (c * len(y)), early_stopping=True, random_state=0),
        }
        for title, peer in peers.items():
            began = time.process_time()
            with PeakMemory() as memory:
                model = peer.fit(known, y)
            yield report(f"{title}, C = {c:.3g} alone", began, memory, model.predict(task.x[2]))


def write_parts(folder: Path, n: int, dim: int, classes: int) -> Path:
    """Write made features as a cache in parts of 100,000 rows."""
    most, names = 100_000, tuple(str(number) for number in range(classes))
    layer = LayerInfo("penultimate", dim, "float16", {"layer": "penultimate", "pool": "avg"}, "made")
    handles = {"source": "made", "location": "made", "backbone": "net", "pool": "avg"}
    uris = [f"{number:08d}.png" for number in range(n)]
    plan = PartPlan(
        folder / "made.plan", (layer,), handles, {"backbone": "net"}, {}, most, divide(uris, most)
    ).publish()
    for part, where in plan.ranges(uris):
        x, y = make_features(part.rows, dim, classes, seed=part.number)
        no, zeros = [""] * part.rows, np.zeros(part.rows, np.int64)
        digests = np.random.default_rng(part.number).integers(0, 256, (part.rows, 16), np.uint8)
        rows = Rows(uris[where], y, no, no, zeros, zeros)
        with CacheWriter.create(plan.path_of(part.number), rows, names, [layer], handles, {}) as writer:
            writer.begin_run({})
            for start in range(0, part.rows, 10_000):
                some = np.arange(start, min(start + 10_000, part.rows))
                writer.write(some, {layer.name: x[some]}, digests[some])
    return plan.path


def fit_streamed(cache: str, head: str) -> None:
    """Fit a head in this process, and print seconds and peak memory (Linux only)."""
    memory.free_memory = lambda: 0
    begin, began = memory_peak(), time.perf_counter()
    (result,) = fit(cache, heads=[head]).results
    print(
        json.dumps(
            {
                "head": result.head,
                "seconds": time.perf_counter() - began,
                "fit_seconds": result.seconds,
                "before_gb": begin,
                "peak_gb": memory_peak(),
                "params": result.params,
                "accuracy": result.accuracy,
            }
        )
    )


def memory_peak() -> float:
    """Return the most resident memory that this process has had, in GB, with pages of files that were mapped."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024 / 1e9


def streamed(rows: int, dim: int, classes: int, heads: Sequence[str]) -> list[dict[str, Any]]:
    """Fit each head on a large cache in parts."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_parts(Path(folder), rows, dim, classes)
        commands = [[sys.executable, __file__, "--streamed-cache", str(path), "--head", head] for head in heads]
        found = [subprocess.run(command, capture_output=True, check=True, text=True).stdout for command in commands]
    return [json.loads(line) for line in found]


def write_cache(path: Path, n: int) -> None:
    """Write made features of all stages of a network as a cache file."""
    zeros = np.zeros(n, np.int64)
    made = {name: make_features(n, dim, 10) for name, dim in STAGES.items()}
    layers = [LayerInfo(name, dim, "float32", {"layer": name, "pool": "avg"}, name) for name, dim in STAGES.items()]
    labels = made["penultimate"][1]
    rows = Rows([f"{i:05d}.png" for i in range(n)], labels, [""] * n, [""] * n, zeros, zeros)
    handles = {"source": "made", "backbone": "net", "pool": "avg"}
    request = {"backbone": "net", "layers": list(STAGES), "pool": "avg", "size": None, "precision": "auto"}
    digests = np.random.default_rng(1).integers(0, 256, (n, 16), np.uint8)
    with CacheWriter.create(path, rows, [str(i) for i in range(10)], layers, handles, request) as writer:
        writer.begin_run({})
        writer.write(np.arange(n), {name: x for name, (x, _) in made.items()}, digests)


class WorkerMemory(threading.Thread):
    """Watch the children of this process; the largest proportional set size of each, MiB (Linux only)."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peaks: dict[str, float] = {}
        self.over = threading.Event()

    def run(self) -> None:
        """Look every 50 ms."""
        while not self.over.wait(0.05):
            for listing in Path("/proc/self/task").glob("*/children"):
                for child in listing.read_text().split():
                    self.peaks[child] = max(self.peaks.get(child, 0.0), self._size(child))

    @staticmethod
    def _size(child: str) -> float:
        try:
            lines = Path(f"/proc/{child}/smaps_rollup").read_text().splitlines()
        except OSError:  # it ended
            return 0.0
        return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def grid(n: int, jobs: int, heads: Sequence[str]) -> dict[str, Any]:
    """Fit every head on every stage with three seeds; return seconds and memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made.h5"
        write_cache(path, n)
        memory = WorkerMemory()
        memory.start()
        began = time.perf_counter()
        results = fit(path, heads=heads, seeds=(0, 1, 2), jobs=jobs).results
        seconds = time.perf_counter() - began
        memory.over.set()
        memory.join()
    by_head: dict[str, float] = defaultdict(float)
    by_layer: dict[str, float] = defaultdict(float)
    for result in results:
        by_head[result.head] += result.seconds
        by_layer[result.layer] += result.seconds
    workers = sorted(memory.peaks.values(), reverse=True)[:jobs]
    return {
        "jobs": jobs,
        "fits": len(results),
        "seconds": seconds,
        "by_head": by_head,
        "by_layer": by_layer,
        "worker_mib": workers,
    }


@click.command()
@click.argument("parts", nargs=-1, type=click.Choice(["search", "wide", "grid", "large", "streamed"]))
@click.option("--rows", default=3068, show_default=True)
@click.option("--dim", default=1280, show_default=True)
@click.option("--classes", default=10, show_default=True)
@click.option("--head", "heads", multiple=True, default=("logreg",), help="Of all parts but grid.")
@click.option("--cache", help="Take the rows of search from this cache.")
@click.option("--layer", default="penultimate", show_default=True, help="Of the cache.")
@click.option("--streamed-cache", hidden=True)
@click.option("--shrink", default=1, show_default=True, help="Divide all sizes, to see whether it runs.")
def main(
    parts: tuple[str, ...],
    rows: int,
    dim: int,
    classes: int,
    heads: tuple[str, ...],
    cache: str | None,
    layer: str,
    streamed_cache: str | None,
    shrink: int,
) -> None:
    """Print a table for each part and a JSON line."""
    if streamed_cache is not None:
        fit_streamed(streamed_cache, *heads)
        return
    parts = parts or ("search", "wide", "grid")
    console = Console(width=110)
    report: dict[str, Any] = {"cores": os.cpu_count()}
    peers = {"cold, all threads": Peer(), "cold, 1 thread": Peer(1), "cold, 1 thread, tol 1e-8": Peer(1, 1e-8)}
    if "search" in parts:
        task = cached_task(cache, layer) if cache else make_task(rows // shrink, dim // shrink, classes)
        known, width = sum(map(len, task.y[:2])), task.x[0].shape[1]
        size = f"{known} x {width}, {len(np.unique(task.y[0]))} classes, 45 values of C"
        table, report["search"] = compare(size, task, heads, peers)
        console.print(table)
    if "wide" in parts:
        x, y = make_features(250 + FRESH, 20_480 // shrink, classes)
        task = Task(tuple(np.split(x, [200, 250])), tuple(np.split(y, [200, 250])))  # type: ignore[arg-type]
        table, report["wide"] = compare(f"200 x {20_480 // shrink}", task, heads, {"cold, 1 thread": Peer(1)})
        console.print(table)
    if "large" in parts:
        task = make_task(rows // shrink, dim // shrink, classes)
        for part in task.x:
            normalize(part, copy=False)
        report["large"] = []
        title = f"{rows // shrink} x {dim // shrink}, {classes} classes"
        table = Table("head", "run", "CPU seconds", "memory", "fresh accuracy", title=title)
        for row in (row for name in heads for row in large(task, name)):
            report["large"].append(row)
            cells = f"{row['seconds']:.1f}", f"{row['memory']:.2f}", f"{row['fresh_accuracy']:.4f}"
            table.add_row(row["head"], row["run"], *cells)
            click.echo(json.dumps(row), err=True)
        console.print(table)
    if "streamed" in parts:
        report["streamed"] = streamed(rows // shrink, dim // shrink, classes, heads)
        table = Table("head", "seconds", "peak GB", "accuracy", title=f"{rows} x {dim} in parts, not held in memory")
        for row in report["streamed"]:
            table.add_row(row["head"], f"{row['seconds']:.0f}", f"{row['peak_gb']:.2f}", f"{row['accuracy']:.4f}")
        console.print(table)
    if "grid" in parts:
        runs = [grid(2000 // shrink, jobs, ("logreg", "linear_svm", "knn")) for jobs in (2, 4)]
        report["grid"] = runs
        table = Table("jobs", "fits", "seconds", "seconds by head", "by layer", "MiB of each worker")
        for run in runs:
            by = [
                ", ".join(f"{key} {value:.1f}" for key, value in run[side].items()) for side in ("by_head", "by_layer")
            ]
            memory = ", ".join(f"{size:.0f}" for size in run["worker_mib"])
            table.add_row(str(run["jobs"]), str(run["fits"]), f"{run['seconds']:.1f}", *by, memory)
        console.print(table)
    click.echo(json.dumps(report))


if __name__ == "__main__":
    main()
