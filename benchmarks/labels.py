"""How long a table of labels takes to join to a cache, and how much memory: ``python benchmarks/labels.py``."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from pipeline.evaluation.labels import read_labels
from pipeline.tables import ENDINGS


def write_table(path: Path, count: int, prefix: str) -> None:
    """Write `count` rows with a key, one of 1,000 labels, a split, and one of 10,000 groups."""
    rows = [
        (f"{prefix}{i:07d}.jpg", f"label {i % 1000}", ("train", "test")[i % 5 == 0], f"g{i % 10_000}")
        for i in range(count)
    ]
    names = ("uri", "label", "split", "group")
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))), path)
        return
    with path.open("w") as stream:
        if path.suffix == ".jsonl":
            stream.writelines(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows)
        else:
            separator = "\t" if path.suffix == ".tsv" else ","
            stream.writelines(separator.join(row) + "\n" for row in (names, *rows))


def most_memory() -> int:
    """Return the most megabytes that this process has had in memory."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024


def join(path: Path, count: int) -> None:
    """Join the table to a cache's columns in this process, and print the figures."""
    uris = np.array([f"photos/{i:07d}.jpg" for i in range(count)])
    none = np.full(count, "", "U1")
    began = time.perf_counter(), time.process_time()
    known = read_labels(path).join(uris, none, none)
    seconds, busy = time.perf_counter() - began[0], time.process_time() - began[1]
    assert (known.labels >= 0).all()
    way = known.notes[0].partition("joined by ")[2].partition(",")[0]
    print(f"{path.suffix:>8} by {way:<9}: {seconds:4.1f} s ({busy:.1f} s of CPU), {most_memory()} MB at most")


def main() -> None:
    """Measure each kind of table in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--table", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.table:
        join(arguments.table, arguments.rows)
        return
    with tempfile.TemporaryDirectory() as folder:
        for ending in ENDINGS:
            for name, prefix in (("uris", "photos/"), ("names", "")):
                path = Path(folder) / f"{name}{ending}"
                write_table(path, arguments.rows, prefix)
                subprocess.run(
                    [sys.executable, __file__, "--rows", str(arguments.rows), "--table", str(path)], check=True
                )


if __name__ == "__main__":
    main()
