"""Which scaling, rule for C and head are best from one label per class to all: the study behind the default head.

    python benchmarks/few_shot.py [SOURCE ...] [--cache DIR] [--seeds 5] [--shots 1 2 ...]

Without SOURCE the image sets are scikit-learn's digits and two made ones (textures and shapes), which need no download.
Each set is extracted once, at `LAYERS`. A cell is one layer of one set with one number of shots; its accuracy is the
mean over seeds. C is chosen on held-out rows by accuracy, unless it is given. ``the default`` takes l2 rows, and
C = 300 up to two labels a class. The regret of a candidate in a cell is the distance to the best candidate there. Which
is best is decided on the other seeds, and the distance is measured on the seed that was left out: the best of many on
the same seed is partly luck. A second table has the distance to that luckiest one. The true best lies between the two,
because a few seeds do not always find it. Fits are kept in ``fits.jsonl`` beside the cache, and a second run goes on
from there.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import joblib
import numpy as np
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.preprocessing import normalize
from threadpoolctl import threadpool_limits

from features_cache import Catalog
from pipeline.arrays import Float32Array, Float64Array, IntArray
from pipeline.evaluation.folds import stratified_folds
from pipeline.evaluation.rows import Layer, select
from pipeline.evaluation.splits import make_splits
from pipeline.extract import extract
from pipeline.heads.choose import Fold, Scaled, make_fold, scale
from pipeline.heads.family import Step
from pipeline.heads.linear import C_GRID
from pipeline.heads.registry import find_head
from pipeline.heads.solvers.span import find_span

LAYERS: dict[str, dict[str, Any]] = {
    "efficientnet_lite0 avg": {"layers": ["input", "blocks.1", "blocks.3", "penultimate"]},
    "efficientnet_lite2 avg": {"layers": ["penultimate"]},
    "efficientnet_lite0 grid2": {"layers": ["blocks.3"]},
    "efficientnet_lite0 flatten": {"layers": ["penultimate"], "size": 64},
    "efficientnet_lite0@random:0 avg": {"layers": ["blocks.3", "penultimate"], "size": 96},
}
"""What is extracted: backbone and pooling, then layers and the size of the images if it is not the network's own."""
JOINED = "input+penultimate"
SHOTS = ("1", "2", "5", "10", "20", "all")
MOST_TESTED = 1000
"""Test rows of a cell; more would cost time only."""
STRENGTH = 20
"""As many rows as the common scale counts for, where standard deviations are shrunk towards it."""


class About(NamedTuple):
    """What a scaling may know besides the rows: moments of all rows that are not test rows, dims of joined layers."""

    moments: tuple[Any, Any]
    dims: list[int]


Scaling = Callable[[Float32Array, Float32Array, About], tuple[Any, Any]]
"""Maps training rows and held-out rows to scaled rows."""


def moments(rows: Float32Array, strength: float = 0) -> tuple[Any, Any]:
    """Return the mean and the deviation of each feature; `strength` rows shrink the variances to their mean."""
    mean, variance = rows.mean(0), rows.var(0)
    variance = (len(rows) * variance + strength * variance.mean()) / (len(rows) + strength)
    return mean, np.sqrt(np.where(variance > 0, variance, 1))


def standard(train: Float32Array, held: Float32Array, _: About, strength: float = 0) -> tuple[Any, Any]:
    """Standardise by the training rows."""
    mean, deviation = moments(train, strength)
    return (train - mean) / deviation, (held - mean) / deviation


def shrunk(train: Float32Array, held: Float32Array, about: About) -> tuple[Any, Any]:
    """Standardise with variances shrunk to a common one."""
    return standard(train, held, about, STRENGTH)


def unlabelled(train: Float32Array, held: Float32Array, about: About) -> tuple[Any, Any]:
    """Standardise by all rows that are not test rows, labelled or not."""
    mean, deviation = about.moments
    return (train - mean) / deviation, (held - mean) / deviation


def l2(train: Float32Array, held: Float32Array, about: About) -> tuple[Any, Any]:
    """Divide each row by its length; each of joined layers by itself."""
    scaled = scale("l2", train, held, rotated=False, dims=about.dims)
    return scaled.train, scaled.held


def whole(train: Float32Array, held: Float32Array, _: About) -> tuple[Any, Any]:
    """Divide each row by its length, joined layers as a whole."""
    return normalize(train), normalize(held)


def centred(train: Float32Array, held: Float32Array, _: About) -> tuple[Any, Any]:
    """Subtract the mean of the training rows, then divide each row by its length."""
    mean = train.mean(0)
    return normalize(train - mean), normalize(held - mean)


SCALINGS: dict[str, Scaling] = {
    "standard": standard,
    "l2": l2,
    "whole l2": whole,
    "centred l2": centred,
    "shrunk": shrunk,
    "unlabelled": unlabelled,
}
FIXED = (1, 3, 10, 30, 100, 300)


C_VALUES = C_GRID[8::2]
"""Every second value from 1e-4 on, to save time."""


def made_images(kind: str, each: int = 100) -> Iterator[tuple[str, Image.Image]]:
    """Yield pictures of 96 x 96 pixels with their class: ten textures or six shapes, in varied colours."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:96, :96] / 96
    for number in range(10 * each if kind == "textures" else 6 * each):
        label = number // each
        if kind == "textures":  # direction and fineness of a wave under noise
            angle = np.pi * (label % 5) / 5 + rng.normal(0, 0.15)
            waves = (5, 9)[label // 5] * np.exp(rng.normal(0, 0.15))
            wave = np.sin(2 * np.pi * waves * (x * np.cos(angle) + y * np.sin(angle)) + rng.uniform(0, 6.3))
            tint = rng.uniform(0.2, 1, 3)
            noise = rng.normal(0, 0.5, (96, 96, 3))
            pixels = 127 + 60 * (wave[..., None] * tint + noise)
            yield str(label), Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        else:  # a polygon or a circle
            picture = Image.new("RGB", (96, 96), tuple(rng.integers(0, 256, 3).tolist()))
            draw, colour = ImageDraw.Draw(picture), tuple(rng.integers(0, 256, 3).tolist())
            centre, radius, turn = rng.uniform(32, 64, 2), rng.uniform(14, 30), rng.uniform(0, 360)
            if label == 0:
                draw.ellipse([*(centre - radius), *(centre + radius)], fill=colour)
            else:
                draw.regular_polygon((*centre, radius), label + 2, turn, fill=colour)
            yield str(label), picture


def write_made(folder: Path, kind: str) -> Path:
    """Write a made set as a folder of classes, unless it is there."""
    if not (folder / kind).exists():
        for number, (label, picture) in enumerate(made_images(kind)):
            path = folder / kind / label / f"{number:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
    return folder / kind


def centroid(fold: Fold) -> IntArray:
    """Predict the class of the nearest mean."""
    means = np.stack([fold.train[fold.y == label].mean(0) for label in np.unique(fold.y)])
    nearest = (np.square(means).sum(1) / 2 - fold.held @ means.T).argmin(1)
    return np.asarray(np.unique(fold.y)[nearest])


def lda(fold: Fold) -> IntArray:
    """Predict by linear discriminants with the covariance shrunk after Ledoit and Wolf; nearest means at one shot."""
    if len(fold.y) == len(np.unique(fold.y)):
        return centroid(fold)
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
    return np.asarray(model.fit(fold.train.astype(np.float64), fold.y).predict(fold.held))


def curve(folds: Sequence[Fold], final: Fold) -> dict[str, list[float]]:
    """Return for each value of C accuracy and log-loss on held-out rows, and accuracy on test rows.

    The held-out part of `final` are the test rows. Without folds, accuracy and log-loss are empty.
    """
    grid = [{"C": c} for c in C_VALUES]
    logreg = find_head("logreg").family
    told = [right_and_loss(logreg.path(grid, fold.train, fold.y, fold.held), fold) for fold in folds]
    right, loss = np.concatenate(told, axis=2).mean(axis=2) if told else np.empty((2, 0))
    test, _ = right_and_loss(logreg.path(grid, final.train, final.y, final.held), final).mean(axis=2)
    return {"held": right.tolist(), "loss": loss.tolist(), "test": test.tolist()}


def right_and_loss(steps: Iterable[Step], fold: Fold) -> Float64Array:
    """Return whether each step predicts each held-out row right, and its log-loss: (2, steps, rows)."""
    classes = np.unique(fold.y)
    columns = np.searchsorted(classes, fold.y_held).clip(max=len(classes) - 1)
    found = []
    for step in steps:
        assert step.probabilities is not None
        told = step.probabilities[np.arange(len(columns)), columns]
        found.append((step.predicted == fold.y_held, -np.log(np.maximum(told, 1e-15))))
    return np.asarray(found, np.float64).transpose(1, 0, 2)


def measure_cell(layer: Layer, seed: int, shots: str) -> dict[str, Any]:
    """Return the curve of each scaling, and the test accuracies of other heads, for one draw of labels."""
    table, labels = layer.table, layer.table.labels
    count: int | str = "all" if shots == "all" else int(shots)
    splits = make_splits(labels, table.splits, table.groups, table.digests, seed, count)
    test = np.random.default_rng(0).permutation(splits.test)[:MOST_TESTED]
    rest = layer.features(np.setdiff1d(np.arange(len(labels)), splits.test))
    about = About(moments(rest), [info.dim for _, info in layer.parts])
    known = np.concatenate([splits.train, splits.val])
    pairs = [(splits.train, splits.val)]
    if not splits.val.size:
        folds = min(5, int(np.bincount(labels[known]).max()))
        cut = stratified_folds(labels[known], splits.units[known], folds, seed) if folds > 1 else []
        pairs = [(known[a], known[b]) for a, b in cut]

    def fold(scaling: str, train: IntArray, held: IntArray) -> Fold:
        x, unseen = SCALINGS[scaling](layer.features(train), layer.features(held), about)
        x, unseen = np.ascontiguousarray(x, np.float32), np.ascontiguousarray(unseen, np.float32)
        return make_fold(Scaled(x, unseen, None, find_span(x)), labels[train], labels[held])

    names = [name for name in SCALINGS if len(layer.parts) > 1 or name != "whole l2"]
    curves = {name: curve([fold(name, *pair) for pair in pairs], fold(name, known, test)) for name in names}
    curves.setdefault("whole l2", curves["l2"])
    final = fold("l2", known, test)
    others = {"lda/l2": lda(final), "centroid/l2": centroid(final)}
    return {"curves": curves, "others": {name: float((y == final.y_held).mean()) for name, y in others.items()}}


def run_cell(folder: str, backbone: str, pool: str, layer: str, seed: int, shots: str) -> str:
    """Fit a cell on one BLAS thread; return a line for the file of fits."""
    began = time.perf_counter()
    with threadpool_limits(1):
        (chosen,) = select(Catalog(folder), [layer], None, backbone, pool)
        found = measure_cell(chosen, seed, shots)
    key = f"{Path(folder).name} {backbone} {layer} {pool}"
    seconds = time.perf_counter() - began
    return json.dumps({"cell": key, "seed": seed, "shots": shots, "seconds": seconds, **found})


def extract_all(sources: Sequence[str], cache: Path) -> list[tuple[str, str, str, str]]:
    """Fill a cache folder for each source; return folder, backbone, pool and layer of each part of the study."""
    parts = []
    for source in sources:
        folder = cache / (Path(source).parent.name if Path(source).suffix else Path(source).name)
        for text, wanted in LAYERS.items():
            backbone, pool = text.split()
            extract(source, [backbone], pool=pool, output=folder, **wanted)
            joined = [JOINED] if "input" in wanted["layers"] else []
            parts += [(str(folder), backbone, pool, layer) for layer in wanted["layers"] + joined]
    return parts


def by_accuracy(curve: dict[str, list[float]]) -> int:
    """Return the index of the C of best accuracy on held-out rows; ties go to the lower log-loss."""
    return max(range(len(C_VALUES)), key=lambda i: (curve["held"][i], -curve["loss"][i]))


def by_loss(curve: dict[str, list[float]]) -> int:
    """Return the index of the C of lowest log-loss on held-out rows."""
    return int(np.argmin(curve["loss"]))


def accuracies(line: dict[str, Any]) -> dict[str, float]:
    """Return the test accuracy of each candidate in a line of the file of fits."""
    curves, found = line["curves"], {}
    nearest = {c: int(np.abs(np.log(np.array(C_VALUES) / c)).argmin()) for c in FIXED}
    for name, one in curves.items():
        found[f"logreg/{name}"] = one["test"][by_accuracy(one) if one["held"] else nearest[1]]
    one = curves["l2"]
    found["the default"] = one["test"][nearest[300] if line["shots"] in ("1", "2") else by_accuracy(one)]
    for c, index in nearest.items():
        found[f"logreg/l2, C = {c:g}"] = one["test"][index]
    found["logreg/l2, C by log-loss"] = one["test"][by_loss(one) if one["held"] else nearest[10]]
    if one["held"]:
        best = max(("l2", "standard"), key=lambda name: curves[name]["held"][by_accuracy(curves[name])])
        found["logreg, scaling chosen"] = found[f"logreg/{best}"]
    else:
        found["logreg, scaling chosen"] = found["logreg/l2"]
    return found | dict(line["others"])


def behind(found: Float64Array, *, left_out: bool) -> Float64Array:
    """Return how far each candidate, (k,), is behind the best one, from accuracies (k, seeds).

    If `left_out`, the best one is that on the other seeds, and the distance to it on this one; means over seeds.
    """
    if not left_out:
        return np.asarray(found.mean(1).max() - found.mean(1))
    others = found.sum(1, keepdims=True) - found
    reference = found[others.argmax(0), np.arange(found.shape[1])]
    return np.asarray((reference - found).mean(1))


def summarise(lines: Sequence[dict[str, Any]], shots: Sequence[str], *, left_out: bool) -> tuple[Table, dict[str, Any]]:
    """Return mean and worst regret of each candidate, in points, by shots; cells with one seed have none."""
    drawn: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    for line in lines:
        drawn[line["cell"], line["shots"]].append(accuracies(line))
    names = list(next(iter(drawn.values()))[0])
    regrets: dict[str, list[Float64Array]] = defaultdict(list)
    lost: dict[str, list[Float64Array]] = defaultdict(list)
    for (_, count), each in drawn.items():
        if len(each) > 1:
            found = 100 * np.array([[one[name] for one in each] for name in names])
            regrets[count].append(behind(found, left_out=left_out))
            lost[count].append(found.mean(1)[names.index("logreg/l2")] - found.mean(1))
    shots = [count for count in shots if count in regrets]
    against = "the best on the other seeds" if left_out else "the best on the same seeds"
    title = f"points behind {against}: mean over cells (worst cell), by shots"
    table = Table("candidate", *shots, "worst behind logreg/l2", title=title)
    report: dict[str, Any] = {"cells": {count: len(regrets[count]) for count in shots}}
    for index, name in enumerate(names):
        of = {count: np.array(regrets[count])[:, index] for count in shots}
        worst = {count: float(np.array(lost[count])[:, index].max()) for count in shots}
        report[name] = {count: [float(of[count].mean()), float(of[count].max()), worst[count]] for count in shots}
        table.add_row(
            name, *(f"{of[count].mean():.1f} ({of[count].max():.1f})" for count in shots), f"{max(worst.values()):.1f}"
        )
    return table, report


@click.command()
@click.argument("sources", nargs=-1)
@click.option("--cache", default="few-shot-cache", show_default=True, type=click.Path(path_type=Path))
@click.option("--seeds", default=5, show_default=True, type=click.IntRange(2))
@click.option("--shots", multiple=True, default=SHOTS, show_default=True)
@click.option("--jobs", default=2, show_default=True)
def main(sources: tuple[str, ...], cache: Path, seeds: int, shots: tuple[str, ...], jobs: int) -> None:
    """Print two tables, and a JSON line for each."""
    cache.mkdir(parents=True, exist_ok=True)
    made = [str(write_made(cache / "made", kind)) for kind in ("textures", "shapes")]
    parts = extract_all(["digits", *made, *sources], cache)
    kept = cache / "fits.jsonl"
    lines = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    done = {(line["cell"], line["seed"], line["shots"]) for line in lines}
    tasks = []
    for seed in range(seeds):
        for count in shots:
            for folder, backbone, pool, layer in parts:
                if (f"{Path(folder).name} {backbone} {layer} {pool}", seed, count) not in done:
                    tasks.append((folder, backbone, pool, layer, seed, count))
    with kept.open("a") as file:
        run = joblib.Parallel(jobs, return_as="generator_unordered")
        for text in run(joblib.delayed(run_cell)(*task) for task in tasks):
            file.write(text + "\n")
            file.flush()
            lines.append(json.loads(text))
    for left_out in (True, False):
        table, report = summarise(lines, shots, left_out=left_out)
        Console(width=140).print(table)
        click.echo(json.dumps(report))


if __name__ == "__main__":
    main()
