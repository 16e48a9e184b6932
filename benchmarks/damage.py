"""Damage a cache file at random, and count what is noticed: ``python benchmarks/damage.py``.

Outside the arrays (first line, table, HDF5's structure, class names) a damaged file must be refused, or read as if
nothing were damaged. Inside them `verify` must name the row. Each portion runs in a child process with a time limit.
"""

from __future__ import annotations

import argparse
import json
import pickle
import random
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

from features_cache import DONE, CacheError, CacheFile, CacheWriter, LayerInfo, Rows, open_cache, verify

PORTION = 500
LIMIT_S = 120


def make(path: Path, rows: int = 30) -> None:
    """Write a small file: half of its rows done, one unreadable."""
    column = np.arange(rows)
    none = [""] * rows
    listed = Rows([f"{i}.png" for i in range(rows)], column % 2, ["train"] * rows, none, column + 1, column + 1)
    layers = [LayerInfo("a", 6, "float32", {"x": 1}, "f"), LayerInfo("b", 3, "float16", {}, "g")]
    with CacheWriter.create(path, listed, ["cat", "dog"], layers, {"source": "s"}, {"q": 1}) as writer:
        writer.begin_run({"engine": "torch"})
        k = np.arange(0, rows, 2)
        features = {"a": np.outer(k, np.arange(6)), "b": np.outer(k, [1, 2, 3])}
        writer.write(k, features, np.repeat(k, 16).reshape(-1, 16))
        writer.fail(1, "truncated", None)


def everything(file: CacheFile) -> bytes:
    """Return all that a reader can learn from a file."""
    columns = [file.uris, file.labels, file.splits, file.groups, file.digests, file.sizes, file.mtimes_ns]
    columns += [file.states, file.reasons, file.run_ids, *(file.matrix(name) for name in file.layers)]
    facts = file.handles, file.request, file.classes, file.layers, file.n_rows, file.runs
    return pickle.dumps((facts, [column.tolist() for column in columns]))


def damage_structure(path: Path, seeds: range) -> Counter[str]:
    """Change one to twenty bytes before the first array that may change, once for each seed."""
    right, data = everything(open_cache(path)), path.read_bytes()
    end = open_cache(path).header.arrays["/runs"].offset
    table = int(data.split(b" ")[2]) + 128
    counts: Counter[str] = Counter()
    target = path.with_name("damaged.h5")
    for seed in seeds:
        generator, damaged = random.Random(seed), bytearray(data)
        for _ in range(generator.choice([1, 1, 2, 20])):
            place = generator.randrange(generator.choice([128, table, end]))
            damaged[place] = generator.choice([damaged[place] ^ 1 << generator.randrange(8), generator.randrange(256)])
        target.write_bytes(damaged)
        try:
            counts["right" if everything(open_cache(target)) == right else "wrong"] += 1
        except CacheError as error:
            counts["refused" if "\n" not in str(error) else "refused_in_many_lines"] += 1
    return counts


def damage_rows(path: Path, seeds: range) -> Counter[str]:
    """Flip one bit of what was written for a finished row, once for each seed; see whether `verify` names the row."""
    file, data = open_cache(path), path.read_bytes()
    done = np.flatnonzero(file.states == DONE).tolist()
    names = [
        "label",
        "digest",
        "size",
        "mtime_ns",
        "uri",
        "group",
        "split",
        "reason",
        "run",
        "source_crc",
        "result_crc",
    ]
    arrays = [*(f"/rows/{name}" for name in names), *(f"/{kind}/{x}" for kind in ("crc", "features") for x in "ab")]
    counts: Counter[str] = Counter()
    target = path.with_name("damaged.h5")
    for seed in seeds:
        generator, damaged = random.Random(seed), bytearray(data)
        place, row = file.header.arrays[generator.choice(arrays)], generator.choice(done)
        damaged[place.offset + row * place.row_bytes + generator.randrange(place.row_bytes)] ^= (
            1 << generator.randrange(8)
        )
        target.write_bytes(damaged)
        counts["named" if {finding.row for finding in verify(target).damaged} == {row} else "missed"] += 1
    return counts


def in_children(kind: str, path: Path, count: int) -> dict[str, int]:
    """Run `count` damages in portions; a child that hangs or crashes is counted, not waited for."""
    total: Counter[str] = Counter(damages=count)
    for start in range(0, count, PORTION):
        portion = [kind, str(path), str(start), str(min(start + PORTION, count))]
        try:
            child = subprocess.run(
                [sys.executable, __file__, "--child", *portion], capture_output=True, timeout=LIMIT_S
            )
            total.update(json.loads(child.stdout) if child.returncode == 0 else {"children_that_crashed": 1})
        except subprocess.TimeoutExpired:
            total["children_that_hung"] += 1
    return dict(total)


def main() -> None:
    """Parse, damage, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=6000, help="damages outside the arrays, and as many inside")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        kind, name, start, stop = arguments.child
        damage = {"structure": damage_structure, "rows": damage_rows}[kind]
        print(json.dumps(damage(Path(name), range(int(start), int(stop)))))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache.h5"
        make(path)
        print(json.dumps({kind: in_children(kind, path, arguments.count) for kind in ("structure", "rows")}))


if __name__ == "__main__":
    main()
