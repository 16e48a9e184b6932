"""Kill a cache's writer again and again, and count what was lost: ``python benchmarks/kills.py``.

Children fill a cache whose source changes on the way (images added, edited, renamed, a folder that comes and goes), so
that kills also hit the making and the growing of files. After each kill the files are opened, by the reader and by
h5py, and every row marked done is compared with what it must be. Then the last child ends in peace. With ``--extract``,
the same is done to whole ``thawline extract`` processes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from features_cache import (
    DONE,
    CacheError,
    CacheWriter,
    Donors,
    LayerInfo,
    Rows,
    drop_redundant,
    grow,
    ledger,
    open_cache,
    same_rows,
)

LAYERS = [LayerInfo("a", 40, "float32", {}, "f"), LayerInfo("b", 3, "float16", {}, "g")]
CHUNK = 7
FILLING_S = 3.0
"""How long a writer takes, at least, for a whole source: several kills long."""


def images_at(step: int, count: int) -> dict[str, int]:
    """Return the source as it stands after some changes: uri to number of the content."""
    generator = random.Random(step)
    away = set(range(count // 3, count // 2)) if step % 2 else set()  # a folder that is not mounted
    images = {}
    for number in range(count):
        change = generator.random()
        if number in away or change < 0.02:
            continue
        name = f"renamed-{step}-{number}" if change < 0.04 else f"{number}"
        images[f"{name}.png"] = number + count * (step + 1) if change > 0.99 else number
    return images


def digests_of(contents: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return the digests (k, 16) of contents (k,)."""
    joined = b"".join(hashlib.blake2b(b"%d" % content, digest_size=16).digest() for content in contents)
    return np.frombuffer(joined, np.uint8).reshape(-1, 16)


def features_of(contents: NDArray[np.int64]) -> dict[str, Any]:
    """Return what the layers must hold for contents (k,)."""
    return {
        "a": np.sin(np.outer(contents + 1, np.arange(40))).astype(np.float32),
        "b": np.outer(contents % 1000, [1, 2, 3]).astype(np.float16),
    }


def write(folder: Path, step: int, count: int, pause: float) -> None:
    """Bring the cache up to date with the source, as an extraction would; log what is computed.

    Commits come ten times as often as in earnest, so that a kill each half second meets what a kill each five would.
    """
    ledger.COMMIT_SECONDS = 0.1
    ledger.COMMIT_SHARE = 1.0
    images = images_at(step, count)
    contents = np.array(list(images.values()))
    none = [""] * len(images)
    rows = Rows(list(images), np.zeros(len(images), np.int64), none, none, contents + 1, contents + 1)
    path = folder / "cache.h5"
    if not path.exists():
        writer = CacheWriter.create(path, rows, ["c"], LAYERS, {"source": "s"}, {})
    elif same_rows(open_cache(path), rows, ["c"]):
        writer = CacheWriter.resume(path)
    else:
        writer = grow(path, rows, ["c"], LAYERS, {"source": "s"}, {})
    with writer, (folder / "computed.log").open("a") as log:
        writer.begin_run({})
        donors = Donors(folder, [layer.fingerprint for layer in LAYERS])
        pending = writer.pending()
        for start in range(0, len(pending), CHUNK):
            chunk = pending[start : start + CHUNK]
            digests = digests_of(contents[chunk])
            known = np.array([digest.tobytes() in donors for digest in digests])
            print(*contents[chunk[~known]], file=log, flush=True)
            features: dict[str, Any] = features_of(contents[chunk])
            for place in np.flatnonzero(known):
                given = donors[digests[place].tobytes()]
                for name, values in features.items():
                    values[place] = given[name]
            writer.write(chunk, features, digests)
            time.sleep(0 if known.all() else pause)
    drop_redundant(path)


def look(folder: Path, counts: Counter[str]) -> set[bytes]:
    """Open every file, check every row that is done, and return the digests of these rows."""
    found: set[bytes] = set()
    for path in folder.glob("*.h5"):
        try:
            file = open_cache(path)
            with h5py.File(path, "r") as plain:
                plain["features/a"][:1]
        except (CacheError, OSError) as error:
            print(f"{path.name} does not open: {error}", file=sys.stderr)
            counts["files_that_failed_to_open"] += 1
            continue
        rows = np.flatnonzero(file.states == DONE)
        contents = file.sizes[rows] - 1
        right = (file.digests[rows] == digests_of(contents)).all(axis=1)
        for name, values in features_of(contents).items():
            right &= (file.matrix(name)[rows] == values).all(axis=1)
        counts["wrong_rows"] += int((~right).sum())
        found |= {digest.tobytes() for digest in file.digests[rows[right]]}
    return found


def kill_writers(kills: int, count: int, seed: int) -> dict[str, int]:
    """Kill `kills` writers at random moments; return the counts."""
    counts: Counter[str] = Counter(kills=kills, rows_lost=0, files_that_failed_to_open=0, wrong_rows=0)
    generator = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        have: set[bytes] = set()
        for kill in range(kills):
            command = [sys.executable, __file__, "--child", name, str(kill // 8), str(count)]
            with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
                if child.stdout:
                    child.stdout.readline()  # its imports are done, which take long on a busy machine
                time.sleep(generator.uniform(0, 0.9))
                child.send_signal(signal.SIGKILL)
            now = look(folder, counts)
            counts["rows_lost"] += len(have - now)
            have = now
        subprocess.run(
            [sys.executable, __file__, "--child", name, str(kills // 8), str(count), "0"],
            stdout=subprocess.DEVNULL,
            check=True,
        )
        file = open_cache(folder / "cache.h5")
        complete = (file.states == DONE).all() and file.uris.tolist() == list(images_at(kills // 8, count))
        computed = (folder / "computed.log").read_text().split()
        look(folder, counts)
        counts["rows_computed"], counts["rows_recomputed"] = len(set(computed)), len(computed) - len(set(computed))
        counts["left_incomplete"] = int(not complete)
    return dict(counts)


def kill_extractions(kills: int, seed: int) -> dict[str, int]:
    """Kill whole ``thawline extract`` processes; compare the finished matrix with an uninterrupted one."""
    counts: Counter[str] = Counter(kills=kills, rows_lost=0, files_that_failed_to_open=0)
    generator = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        photos = Path(name) / "photos"
        photos.mkdir()
        pixels = np.random.default_rng(seed)
        for number in range(600):
            Image.fromarray(pixels.integers(0, 256, (96, 96, 3), np.uint8)).save(photos / f"{number}.jpg")

        def command(cache: str) -> list[str]:
            start = [sys.executable, "-m", "cli", "extract", str(photos), "-b", "resnet18@random:0", "-l", "stages"]
            return [*start, "-o", f"{name}/{cache}", "--json"]

        began = time.perf_counter()
        plain = json.loads(subprocess.run(command("plain"), check=True, capture_output=True).stdout)["caches"][0]
        seconds = time.perf_counter() - began
        done = 0
        for _ in range(kills):
            with subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
                time.sleep(generator.uniform(0.3, 0.9) * seconds)
                child.send_signal(signal.SIGKILL)
            for path in Path(f"{name}/killed").glob("*.h5"):
                try:
                    now = int((open_cache(path).states == DONE).sum())
                except CacheError:
                    counts["files_that_failed_to_open"] += 1
                    continue
                counts["rows_lost"] += max(0, done - now)
                done = now
        last = json.loads(subprocess.run(command("killed"), check=True, capture_output=True).stdout)["caches"][0]
        whole, pieces = open_cache(plain["path"]), open_cache(last["path"])
        equal = [np.array_equal(whole.matrix(layer), pieces.matrix(layer)) for layer in whole.layers]
        counts["rows"], counts["left_for_the_last_run"] = last["rows"], last["computed"]
        counts["matrices_that_differ"] = equal.count(False)
    return dict(counts)


def main() -> None:
    """Parse, kill, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="writers to kill")
    parser.add_argument("--rows", type=int, default=6000, help="images of the source")
    parser.add_argument("--extract", type=int, default=20, metavar="KILLS", help="whole extractions to kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        folder, step, count, *pause = arguments.child
        print("begins", flush=True)
        write(Path(folder), int(step), int(count), float(pause[0]) if pause else FILLING_S * CHUNK / int(count))
        return
    report = {"writers": kill_writers(arguments.kills, arguments.rows, arguments.seed)}
    if arguments.extract:
        report["extractions"] = kill_extractions(arguments.extract, arguments.seed)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
