"""How long joined columns should be beside features of length 1: ``python benchmarks/columns.py CACHE``.

Two made columns tell the class, with errors; four others tell nothing. Printed is the mean accuracy without them and
with them, for several lengths.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from pathlib import Path

import numpy as np

from features_cache import Catalog
from pipeline.fit import fit
from pipeline.heads import choose

LENGTHS = (0.05, 0.1, 0.2, 0.4, 1.0)
TELLING, EMPTY = ["parity", "hint"], ["noise", "more_noise", "even_more_noise", "site"]


def write_table(cache: Path, path: Path) -> None:
    """Write the labels of a cache with made columns."""
    file = Catalog(cache).files[0]
    rng = np.random.default_rng(0)
    with path.open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["uri", "label", *TELLING, *EMPTY])
        for uri, label in zip(file.uris.tolist(), file.labels.tolist(), strict=True):
            odd = (label % 2 == 1) != (rng.random() < 0.1)
            noise = rng.standard_normal(3).tolist()
            told = ["odd" if odd else "even", label + 1.5 * rng.standard_normal()]
            rows.writerow([uri, file.classes[label], *told, *noise, f"site {'abcde'[rng.integers(5)]}"])


def main() -> None:
    """Print a line for each length and kind of columns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "table.csv"
        write_table(arguments.cache, table)
        for names in (TELLING, EMPTY):
            for length in LENGTHS:
                choose.COLUMNS_LENGTH = length
                report = fit(
                    arguments.cache,
                    ["penultimate"],
                    ["logreg", "ridge", "knn"],
                    seeds=(0, 1),
                    shots=(20,),
                    labels=table,
                    target="label",
                    columns=names,
                    jobs=1,
                )
                found = (f"{one.head} {one.value_without:.3f} -> {one.value_with:.3f}" for one in report.gains)
                print(f"{', '.join(names)}, length {length:g}: {', '.join(found)}", flush=True)


if __name__ == "__main__":
    main()
