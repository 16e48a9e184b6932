"""Extract in parts with an engine that sleeps, kill what computes, and count what was lost: ``benchmarks/cluster.py``.

The engine waits for each image and returns its pixels, so that every row can be checked, and logs which images it
computed. What is measured is all but the network: planning, scheduling, publishing, and going on after kills.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from features_cache import DONE, Catalog, PartedCache
from pipeline.spec import LayerSpec, Preprocessing, Request

ROOT = Path(__file__).resolve().parents[1]
DIM = 48
WAYS = ("one process", "two workers")
LOG, SECONDS = "SLEEPER_LOG", "SLEEPER_SECONDS"


class SleepingEngine:
    """Waits for each image, then returns its pixels."""

    resolved = SimpleNamespace(engine="sleeping", device="cpu", precision="fp32", batch_size=8)
    ahead = 0
    notes: list[str] = []  # noqa: RUF012

    def start(self, pixels: np.ndarray) -> Any:
        """Compute a batch at once."""
        time.sleep(len(pixels) * float(os.environ[SECONDS]))
        numbers = pixels[:, 0, 0].astype(np.int64) @ [65536, 256, 1]
        with Path(os.environ[LOG]).open("a") as log, Path(os.environ[LOG] + ".times").open("a") as times:
            print(*numbers.tolist(), file=log)
            print(os.getpid(), time.time(), len(pixels), file=times)
        return lambda: [pixels.reshape(len(pixels), DIM).astype(np.float32)]


class SleepingExtractor:
    """Stands for a network: one layer, whose features are the pixels."""

    layers, identity, aliases = ("pixels",), ("sleeper", "0" * 32), {"pixels": ["pixels"]}

    def __init__(self, requests: list[Request], *_: Any) -> None:
        self.requests = requests

    def spec(self, layer: str, request: Request) -> LayerSpec:
        """Return what the features are."""
        plain = Preprocessing((4, 4), 4, "nearest", (0, 0, 0), (1, 1, 1))
        return LayerSpec("sleeper", "0" * 32, layer, request.pool, plain, "fp32")

    def tapped(self, layers: tuple[str, ...], pools: tuple[str, ...]) -> Any:
        """Return their sizes."""
        dims, shapes = dict.fromkeys(layers, DIM), dict.fromkeys(layers, ())
        return SimpleNamespace(name="sleeper", dims=dict.fromkeys(pools, dims), shapes=dict.fromkeys(pools, shapes))

    def engine(self, *_: tuple[str, ...]) -> SleepingEngine:
        """Return what sleeps."""
        return SleepingEngine()

    def engine_name(self, _: str) -> str:
        """Return how the plan calls it."""
        return "sleeping"


def dask_setup(_: Any = None) -> None:
    """Let this process sleep instead of running networks; dask calls it in each worker."""
    from pipeline import extract
    from pipeline.extraction import parts

    for module in (extract, parts):
        vars(module)["FeatureExtractor"] = SleepingExtractor


class Trial:
    """A source and a cache, and the processes that fill the cache.

    Parameters
    ----------
    folder : Path
        Empty.
    count, part_rows : int
        Images of the source, and rows of a part.
    seconds : float
        That each image takes.
    """

    def __init__(self, folder: Path, count: int, part_rows: int, seconds: float) -> None:
        self.folder, self.count, self.part_rows = folder, count, part_rows
        (folder / "photos").mkdir()
        for number in range(count):
            Image.fromarray(self.pixels(number)).save(folder / "photos" / f"{number:06}.png")
        self.environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            LOG: str(folder / "computed.log"),
            SECONDS: str(seconds),
            "DASK_DISTRIBUTED__WORKER__PRELOAD": json.dumps([str(Path(__file__).resolve())]),
        }

    @staticmethod
    def pixels(number: int) -> np.ndarray:
        """Return the picture of a number: its first pixel tells it."""
        return np.tile(np.array([number >> 16, number >> 8 & 255, number & 255], np.uint8), (4, 4, 1))

    def start(self, **options: Any) -> subprocess.Popen[str]:
        """Start an extraction."""
        options |= {"output": str(self.folder / "cache"), "part_rows": self.part_rows, "workers": 1}
        command = [sys.executable, __file__, "--child", str(self.folder / "photos"), json.dumps(options)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=self.environment, stdout=pipe, stderr=pipe, text=True)

    def finish(self, **options: Any) -> dict[str, Any]:
        """Extract until nothing fails, twenty times at most, and return the last result."""
        for _ in range(20):
            with self.start(**options) as child:
                out, err = child.communicate()
            if child.returncode == 0:
                result: dict[str, Any] = json.loads(out)
                return result
            print(f"again: {err.strip().splitlines()[-1][:200]}", file=sys.stderr)
        raise RuntimeError(err)

    def check(self) -> dict[str, int]:
        """Compare every row with what it must be, and count the work."""
        (file,) = Catalog(self.folder / "cache").files
        assert isinstance(file, PartedCache)
        wanted = np.array([self.pixels(number).reshape(-1) for number in range(self.count)], np.float32)
        right = file.n_rows == self.count and [f"{number:06}.png" for number in range(self.count)] == file.uris.tolist()
        file.check_columns()
        wrong = int((file.features("pixels", np.arange(file.n_rows)) != wanted[: file.n_rows]).any(axis=1).sum())
        computed = (self.folder / "computed.log").read_text().split()
        return {
            "rows": self.count,
            "rows_lost": self.count - int((file.states == DONE).sum()),
            "rows_wrong": wrong + (not right),
            "rows_computed_again": len(computed) - len(set(computed)),
            "tries_left": len([path for path in (self.folder / "cache").iterdir() if ".try-" in path.name]),
        }


def workers_of(process: int) -> list[int]:
    """Return the worker processes of a command."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            if parent == process and b"spawn_main" in (status.parent / "cmdline").read_bytes():
                found.append(int(status.parent.name))
        except (OSError, ValueError):
            continue  # it has ended
    return found


def strike(number: int, how: int) -> bool:
    """Send a signal; return whether the process was there."""
    try:
        os.kill(number, how)
    except ProcessLookupError:
        return False
    return True


def kill_workers(make: Callable[[], Trial], kills: int, generator: random.Random, pause: float) -> dict[str, int]:
    """Kill workers at random moments, also while they start, until so many are dead; then let the rest be done.

    A source that is complete before is checked, and a new one is begun.
    """
    counts, dead, trial = Counter[str](kills=kills), 0, make()
    while dead < kills:
        counts["commands"] += 1
        with trial.start(cluster="local:3") as child:
            while child.poll() is None and dead < kills:
                time.sleep(generator.uniform(0, pause))
                if alive := workers_of(child.pid):
                    dead += strike(generator.choice(alive), signal.SIGKILL)
            child.communicate()
        if child.returncode == 0 and dead < kills:
            counts.update(trial.check())
            trial = make()
    trial.finish(cluster="local:2")
    counts.update(trial.check())
    return dict(counts)


def kill_commands(trial: Trial, kills: int, generator: random.Random, pause: float) -> dict[str, int]:
    """Kill whole commands; their workers must end by themselves."""
    left = 0
    for _ in range(kills):
        with trial.start(cluster="local:2") as child:
            time.sleep(generator.uniform(0.5, 1) * pause)
            workers = workers_of(child.pid)
            child.kill()
        deadline = time.monotonic() + 20
        while any(strike(worker, 0) for worker in workers) and time.monotonic() < deadline:
            time.sleep(0.1)
        left += sum(strike(worker, 0) for worker in workers)
    trial.finish(cluster="local:2")
    return {"kills": kills, "workers_left": left} | trial.check()


def execute_thrice(trial: Trial, stop: bool, generator: random.Random, pause: float) -> dict[str, int]:
    """Let three processes without a scheduler fill the same parts; stop one until the others are done, if asked."""
    children = [trial.start(part="1/1") for _ in range(3)]
    if stop:
        time.sleep(generator.uniform(0.5, 1) * pause)
        strike(children[0].pid, signal.SIGSTOP)
        for child in children[1:]:
            child.wait()
        strike(children[0].pid, signal.SIGCONT)
    errors = [child.communicate()[1] for child in children]
    failed = [error for child, error in zip(children, errors, strict=True) if child.returncode]
    print(*failed, sep="\n", end="", file=sys.stderr)
    return {"processes_failed": len(failed)} | trial.check()


def measure_rates(folder: Path, counts: list[int], images: int, seconds: float) -> list[dict[str, float]]:
    """Extract with one worker and with several, ten parts each; count images while all workers work."""
    found: list[dict[str, float]] = []
    for workers in counts:
        each = folder / f"rate-{workers}"
        each.mkdir()
        trial = Trial(each, images * workers, images // 10, seconds)
        trial.finish(cluster=f"local:{workers}")
        lines = [line.split() for line in (each / "computed.log.times").read_text().splitlines()]
        process, ended, rows = (np.array(column, float) for column in zip(*lines, strict=True))
        own = [ended[process == one] for one in np.unique(process)]
        since, until = max(times.min() for times in own), min(times.max() for times in own)
        rate = rows[(ended > since) & (ended <= until)].sum() / (until - since)
        share = rate / workers / found[0]["images_per_second"] if found else 1.0
        found.append({"workers": len(own), "images_per_second": round(rate, 1), "efficiency": round(share, 3)})
    return found


def compare_engines(folder: Path, times: int, images: int) -> dict[str, Any]:
    """Extract with a real network: one process with two threads, and two workers with one each, in turn.

    What starts and parts cost is left out: each way extracts some images and four times as many, each worker in one
    part, and the difference counts.
    """
    generator = np.random.default_rng(0)
    for count in (images // 4, images):
        (folder / f"pictures-{count}").mkdir()
        for number in range(count):
            rough = Image.fromarray(generator.integers(0, 256, (24, 32, 3), np.uint8))
            rough.resize((320, 240)).save(folder / f"pictures-{count}" / f"{number:05}.jpg", quality=90)

    def used(way: str, count: int) -> tuple[float, float]:
        """Return wall and processor seconds."""
        cache = folder / f"cache-{len(list(folder.iterdir()))}"
        command = [sys.executable, str(ROOT / "cli.py"), "extract", str(folder / f"pictures-{count}"), "-o", str(cache)]
        command += ["--json", *(["--cluster", "local:2", "--part-rows", str(count // 2)] if way == WAYS[1] else [])]
        before = os.times()
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        after = os.times()
        (result,) = json.loads(done.stdout)["caches"]
        spent = after.children_user + after.children_system - before.children_user - before.children_system
        return result["seconds"], spent

    found = np.empty((times, 2, 2))
    for number, index in np.ndindex(times, 2):
        few, many = used(WAYS[index], images // 4), used(WAYS[index], images)
        found[number, index] = (np.array(many) - few) / (images - images // 4)
    middle = np.median(found, axis=0)
    return {
        "images_per_second": dict(zip(WAYS, (1 / middle[:, 0]).round(1).tolist(), strict=True)),
        "processor_ms_per_image": dict(zip(WAYS, (1000 * middle[:, 1]).round(2).tolist(), strict=True)),
        "share_of_one_process": (found[:, 0, 0] / found[:, 1, 0]).round(3).tolist(),
        "share_by_processor_time": (found[:, 0, 1] / found[:, 1, 1]).round(3).tolist(),
    }


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="workers to kill")
    parser.add_argument("--commands", type=int, default=20, help="commands to kill")
    parser.add_argument("--thrice", type=int, default=20, help="sources that three processes fill at once")
    parser.add_argument("--stops", type=int, default=10, help="the same, one process stopped until the others are done")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2, 4, 8], help="numbers of workers to measure")
    parser.add_argument("--engine", type=int, default=3, help="times that two workers run a real network")
    parser.add_argument("--rows", type=int, default=600, help="images of a source")
    parser.add_argument("--images", type=int, default=2000, help="images for each worker that is measured")
    parser.add_argument("--seconds", type=float, default=0.01, help="that an image takes")
    parser.add_argument("--pause", type=float, default=4.0, help="longest time between two kills, in seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run_child(*arguments.child)
        return
    generator = random.Random(arguments.seed)
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:

        def trial() -> Trial:
            folder = Path(tempfile.mkdtemp(dir=name))
            return Trial(folder, arguments.rows, max(1, arguments.rows // 6), arguments.seconds)

        if arguments.kills:
            report["workers"] = kill_workers(trial, arguments.kills, generator, arguments.pause)
        if arguments.commands:
            report["commands"] = kill_commands(trial(), arguments.commands, generator, 2 * arguments.pause)
        for what, times, stop in (("thrice", arguments.thrice, False), ("stops", arguments.stops, True)):
            each = [execute_thrice(trial(), stop, generator, arguments.pause) for _ in range(times)]
            if each:
                report[what] = {"times": times} | {key: sum(one[key] for one in each) for key in each[0]}
        if arguments.workers:
            report["rates"] = measure_rates(Path(name), arguments.workers, arguments.images, arguments.seconds)
        if arguments.engine:
            report["engine"] = compare_engines(Path(name), arguments.engine, arguments.images)
    print(json.dumps(report))


def run_child(source: str, options: str) -> None:
    """Extract as a user would, in a process of its own; print the result or the error."""
    from features_cache import ThawlineError
    from pipeline.extract import extract

    dask_setup()
    try:
        (result,) = extract(source, ["sleeper"], ["pixels"], **json.loads(options))
    except ThawlineError as error:
        sys.exit(str(error))
    print(json.dumps(vars(result)))


if __name__ == "__main__":
    main()
