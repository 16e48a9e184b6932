"""Time and memory of `duplicates`, `similar` and `suspects` on synthetic features.

``python benchmarks/search.py --rows 60000 --what duplicates similar suspects`` writes a cache of that many rows of
1,280 features in ten classes, with some near-duplicates, to a temporary folder, and prints for each command seconds,
seconds of CPU time, and the most memory of the process, mapped files included. Features are rectified like those of
networks, and vary mostly in some hundred directions, as those do. `similar-index` builds an index and searches it,
however few the rows.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np

from features_cache import CacheWriter, LayerInfo, Rows
from pipeline.arrays import Float32Array, IntArray
from pipeline.duplicates import duplicates
from pipeline.similar import similar
from pipeline.suspects import suspects

DIM, DIRECTIONS, CLASSES, THRESHOLD = 1280, 200, 10, 0.97
CHUNK = 10_000
COPIED = 0.05


def write_cache(folder: Path, count: int) -> None:
    """Write rows in ten classes; one in twenty nearly repeats the row before it."""
    fixed, rng = np.random.default_rng(0), np.random.default_rng(1)
    basis = fixed.standard_normal((DIRECTIONS, DIM)) * np.arange(1, DIRECTIONS + 1)[:, None] ** -0.6
    centres = 0.8 * fixed.standard_normal((CLASSES, DIRECTIONS))
    labels = rng.integers(0, CLASSES, count)
    rows = Rows([f"{i:08d}" for i in range(count)], labels, [""] * count, [""] * count, *np.ones((2, count), int))
    layer = LayerInfo("penultimate", DIM, "float32", {"precision": "fp32"}, "f")
    names = [f"class {number}" for number in range(CLASSES)]
    with CacheWriter.create(folder / "synthetic.h5", rows, names, [layer], {"source": "s"}, {}) as writer:
        for start in range(0, count, CHUNK):
            numbers = np.arange(start, min(start + CHUNK, count))
            digests = numbers.astype("<u8").repeat(2).view(np.uint8).reshape(-1, 16)
            writer.write(numbers, {"penultimate": _features(rng, basis, centres, labels[numbers])}, digests)


def _features(rng: np.random.Generator, basis: np.ndarray, centres: np.ndarray, labels: IntArray) -> Float32Array:
    scores = centres[labels] + rng.standard_normal((len(labels), DIRECTIONS))
    own = 0.3 * rng.standard_normal((len(labels), DIM), np.float32)
    features = np.maximum(scores.astype(np.float32) @ basis.astype(np.float32) + own, 0)
    copies = np.flatnonzero(rng.random(len(labels)) < COPIED)
    copies = copies[copies > 0]
    features[copies] = features[copies - 1] * (1 + 0.05 * rng.standard_normal((len(copies), DIM), np.float32))
    return np.asarray(np.maximum(features, 0), np.float32)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--what", nargs="+", default=["duplicates", "similar", "suspects"])
    parser.add_argument("--folder", help="where the temporary folder is made")
    arguments = parser.parse_args()
    with TemporaryDirectory(dir=arguments.folder) as name, patch("pipeline.similar.EXACT_ROWS", 10**9) as _:
        folder = Path(name)
        write_cache(folder, arguments.rows)
        calls: dict[str, Callable[[], str]] = {
            "duplicates": lambda: f"{len(duplicates(folder, threshold=THRESHOLD).groups)} groups",
            "similar": lambda: f"{len(similar(folder, ['00000007']).found[0].neighbours)} neighbours",
            "similar-index": lambda: _through_index(folder),
            "suspects": lambda: f"{len(suspects(folder, threshold=THRESHOLD).suspects)} suspects",
        }
        print("| command | rows | s | CPU s | most MB | found |\n|---|---|---|---|---|---|", flush=True)
        for what in arguments.what:
            began, cpu = time.perf_counter(), time.process_time()
            found = calls[what]()
            spent = time.perf_counter() - began, time.process_time() - cpu
            print(
                f"| {what} | {arguments.rows:,} | {spent[0]:.1f} | {spent[1]:.1f} | {_peak():.0f} | {found} |",
                flush=True,
            )


def _through_index(folder: Path) -> str:
    with patch("pipeline.similar.EXACT_ROWS", 0):
        recall = similar(folder, ["00000007"]).recall
        began = time.perf_counter()
        similar(folder, ["00000007"])
    return f"recall {recall:.3f}, again in {time.perf_counter() - began:.2f} s"


def _peak() -> float:
    """Return the most memory (resident set) of this process so far, mapped files included, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
