"""How well are wrong labels found? 5 % of the labels of a cache are changed, and three orders of doubt are compared.

``python benchmarks/suspects.py [CACHE ...]`` prints, for each cache (by default digits, extracted for it), the share of
changed labels among the 5 % that an order doubts most (mean and range over seeds). The orders are that of `suspects`,
the rising probability of the label, and chance. Labels are changed to any other class, or to the most similar one.
"""

from __future__ import annotations

import argparse
from tempfile import TemporaryDirectory

import numpy as np

from features_cache import Catalog
from pipeline.arrays import Float32Array, IntArray
from pipeline.diagnostics.confident import doubt_labels
from pipeline.diagnostics.out_of_fold import choose_params, out_of_fold
from pipeline.evaluation.leaks import join_units
from pipeline.evaluation.rows import select
from pipeline.extract import extract
from pipeline.heads.registry import find_head

WRONG = 0.05


def measure(cache: str, layer: str, seeds: int) -> None:
    """Print the table of one cache."""
    (found,) = select(Catalog(cache), [layer])
    table, head = found.table, find_head("logreg")
    units = join_units(table.groups, table.digests)
    truth, classes = table.labels, len(table.classes)
    alike = nearest_class(found.features(np.arange(len(truth))), truth)
    print(f"{cache}: {len(truth)} rows, {layer}")
    for kind in ("to any other class", "to the class most like it"):
        results: dict[str, list[float]] = {}
        for seed in range(seeds):
            rng = np.random.default_rng(seed)
            labels, drawn = truth.copy(), rng.permutation(len(truth))[: round(WRONG * len(truth))]
            others = (truth[drawn] + rng.integers(1, classes, len(drawn))) % classes
            labels[drawn] = others if kind == "to any other class" else alike[truth[drawn]]
            wrong = labels != truth
            params = choose_params(found.features, labels, units, head, seed)
            given = out_of_fold(found.features, labels, units, classes, head, params, seed, lambda: None)
            doubts = doubt_labels(given, labels)
            orders = {
                "order of `suspects`": doubts.order,
                "low probability of the label": np.argsort(given[np.arange(len(labels)), labels], kind="stable"),
                "chance": rng.permutation(len(labels)),
            }
            for name, order in orders.items():
                results.setdefault(name, []).append(float(wrong[order[: len(drawn)]].mean()))
            results.setdefault("precision of the flags", []).append(float(wrong[doubts.flagged].mean()))
            results.setdefault("recall of the flags", []).append(float(doubts.flagged[wrong].mean()))
            results.setdefault("accuracy of the head", []).append(float(np.mean(given.argmax(axis=1) == truth)))
        for name, values in results.items():
            print(f"| {kind} | {name} | {np.mean(values):.3f} | {min(values):.3f}–{max(values):.3f} |", flush=True)


def nearest_class(features: Float32Array, labels: IntArray) -> IntArray:
    """Return for each class (K,) the other class whose mean features are most like its own."""
    means = np.stack([features[labels == label].mean(axis=0) for label in range(int(labels.max()) + 1)])
    means -= means.mean(axis=0)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    likeness = means @ means.T
    np.fill_diagonal(likeness, -2)
    return np.asarray(likeness.argmax(axis=1), np.int64)


def main() -> None:
    """Measure the caches that were named, or digits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("caches", nargs="*", help="with a layer as CACHE:LAYER")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    for named in arguments.caches:
        cache, _, layer = named.partition(":")
        measure(cache, layer or "penultimate", arguments.seeds)
    if not arguments.caches:
        with TemporaryDirectory() as folder:
            extract("digits", layers=["blocks.4"], pool="grid2", output=folder)
            measure(folder, "blocks.4", arguments.seeds)


if __name__ == "__main__":
    main()
