"""Which scaling, rule for C and head are best from one label per class to all: the study behind the default head.

    python benchmarks/few_shot.py [SOURCE ...] [--cache DIR] [--seeds 5] [--shots 1 2 ...]

Without SOURCE the image sets are scikit-learn's digits and two made ones (textures and shapes), which need no download.
Each set is extracted once, at `LAYERS`. A cell is one layer of one set with one number of shots; its accuracy is the
mean over seeds. The regret of a candidate in a cell is the distance to the best candidate there. The best of many is
partly luck, so even the best candidate has a regret above zero. Fits are kept in ``fits.jsonl`` beside the cache, and a
second run goes on from there.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

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
from pipeline.arrays import Float32Array
from pipeline.evaluation.folds import stratified_folds
from pipeline.evaluation.rows import Layer, select
from pipeline.evaluation.splits import Splits, make_splits
from pipeline.extract import extract
from pipeline.heads.choose import Choice, Scaled, make_fold, search, train_final
from pipeline.heads.family import Params
from pipeline.heads.logreg import Logreg
from pipeline.heads.registry import Head, find_head
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

Scaling = Callable[[Float32Array, Float32Array, Any], tuple[Any, Any]]
"""Maps training rows, held-out rows, and the moments of all rows that are not test rows to scaled rows."""


def moments(rows: Float32Array, strength: float = 0) -> tuple[Any, Any]:
    """Return the mean and the deviation of each feature; variances are shrunk to their mean as if by `strength` rows."""
    mean, variance = rows.mean(0), rows.var(0)
    variance = (len(rows) * variance + strength * variance.mean()) / (len(rows) + strength)
    return mean, np.sqrt(np.where(variance > 0, variance, 1))


def standard(train: Float32Array, held: Float32Array, _: Any, strength: float = 0) -> tuple[Any, Any]:
    """Standardise by the training rows."""
    mean, deviation = moments(train, strength)
    return (train - mean) / deviation, (held - mean) / deviation


def shrunk(train: Float32Array, held: Float32Array, pool: Any) -> tuple[Any, Any]:
    """Standardise with variances shrunk to a common one."""
    return standard(train, held, pool, STRENGTH)


def unlabelled(train: Float32Array, held: Float32Array, pool: Any) -> tuple[Any, Any]:
    """Standardise by all rows that are not test rows, labelled or not."""
    mean, deviation = pool
    return (train - mean) / deviation, (held - mean) / deviation


def l2(train: Float32Array, held: Float32Array, _: Any) -> tuple[Any, Any]:
    """Divide each row by its length."""
    return normalize(train), normalize(held)


def centred(train: Float32Array, held: Float32Array, _: Any) -> tuple[Any, Any]:
    """Subtract the mean of the training rows, then divide each row by its length."""
    mean = train.mean(0)
    return normalize(train - mean), normalize(held - mean)


SCALINGS: dict[str, Scaling] = {
    "standard": standard,
    "l2": l2,
    "centred l2": centred,
    "shrunk": shrunk,
    "unlabelled": unlabelled,
}
FIXED = (1.0, 10.0, 100.0)


class Coarse(Logreg):
    """Logistic regression with every second value of C, to save time."""

    def grid(self, n_rows: int) -> Sequence[Params]:
        """Return the values from 1e-4 on."""
        return super().grid(n_rows)[8::2]


HEAD = Head("logreg", Coarse(), "none")


def made_images(kind: str, each: int = 100) -> Iterator[tuple[str, Image.Image]]:
    """Yield pictures of 96 x 96 pixels with their class: ten textures or six shapes, in varied colours."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:96, :96] / 96
    for number in range(10 * each if kind == "textures" else 6 * each):
        label = number // each
        if kind == "textures":  # direction and fineness of a wave under noise
            angle, waves = np.pi * (label % 5) / 5 + rng.normal(0, 0.15), (5, 9)[label // 5] * np.exp(rng.normal(0, 0.15))
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


def prepared(scaling: str, train: Float32Array, held: Float32Array, pool: Any, *, rotate: bool) -> Scaled:
    """Scale rows as `pipeline.heads.choose.scale` does, with any of `SCALINGS`."""
    train, held = (np.ascontiguousarray(part, np.float32) for part in SCALINGS[scaling](train, held, pool))
    return Scaled(train, held, None, find_span(train) if rotate and train.shape[1] > len(train) else None)


def lda(train: Float32Array, y: Any, held: Float32Array) -> Any:
    """Predict by linear discriminants with the covariance shrunk after Ledoit and Wolf; nearest means at one shot."""
    span = find_span(train)
    if span is not None:
        train, held = span.rotated, span.rotate(train, held)
    means = np.stack([train[y == label].mean(0) for label in np.unique(y)])
    if len(y) == len(means):
        return np.unique(y)[((held[:, None] - means) ** 2).sum(2).argmin(1)]
    return LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(train, y).predict(held)


def fit_cell(layer: Layer, seed: int, shots: str) -> dict[str, float]:
    """Return the test accuracy of each candidate on one draw of labels."""
    table = layer.table
    count: int | str = "all" if shots == "all" else int(shots)
    splits = make_splits(table.labels, table.splits, table.groups, table.digests, seed, count)
    test = np.random.default_rng(0).permutation(splits.test)[:MOST_TESTED]
    pool = np.setdiff1d(np.arange(len(table.labels)), splits.test)
    return dict(candidates(layer, splits, test, moments(layer.features(pool)), seed))


def candidates(layer: Layer, splits: Splits, test: Any, pool: Any, seed: int) -> Iterator[tuple[str, float]]:
    """Yield each candidate with its accuracy."""
    labels = layer.table.labels
    known = np.concatenate([splits.train, splits.val])
    x, y, unseen, truth = layer.features(known), labels[known], layer.features(test), labels[test]
    if splits.val.size:
        pairs = [(splits.train, splits.val)]
    else:
        folds = min(5, int(np.bincount(y).max()))
        cut = stratified_folds(labels[splits.train], splits.units[splits.train], folds, seed) if folds > 1 else []
        pairs = [(splits.train[a], splits.train[b]) for a, b in cut]
    rows = [(layer.features(a), layer.features(b), labels[a], labels[b]) for a, b in pairs]
    found: dict[str, tuple[Choice, float]] = {}
    for scaling in SCALINGS:
        final = prepared(scaling, x, unseen, pool, rotate=True)
        fold_rows = [make_fold(prepared(scaling, a, b, pool, rotate=True), ya, yb) for a, b, ya, yb in rows]
        choice = search(HEAD, fold_rows)
        accuracy = float((train_final(HEAD, choice.params, final, y).estimator.predict(final.held) == truth).mean())
        found[f"logreg/{scaling}"] = choice, accuracy
        yield f"logreg/{scaling}", accuracy
    first, second = found["logreg/l2"], found["logreg/standard"]
    yield "logreg, scaling chosen", (second if second[0].score > first[0].score else first)[1]
    final = prepared("l2", x, unseen, pool, rotate=True)
    if len(known) <= 5 * len(np.unique(y)):
        for c in FIXED:
            model = train_final(HEAD, {"C": c}, final, y).estimator
            yield f"logreg/l2, C = {c:g}", float((model.predict(final.held) == truth).mean())
    yield "lda/l2", float((lda(final.train, y, final.held) == truth).mean())
    model = train_final(find_head("centroid"), {}, Scaled(final.train, final.held, None, None), y).estimator
    yield "centroid/l2", float((model.predict(final.held) == truth).mean())


def run_cell(folder: str, backbone: str, pool: str, layer: str, seed: int, shots: str) -> str:
    """Fit a cell on one BLAS thread; return a line for the file of fits."""
    began = time.perf_counter()
    with threadpool_limits(1):
        (chosen,) = select(Catalog(folder), [layer], None, backbone, pool)
        accuracies = fit_cell(chosen, seed, shots)
    key = f"{Path(folder).name} {backbone} {layer} {pool}"
    seconds = time.perf_counter() - began
    return json.dumps({"cell": key, "seed": seed, "shots": shots, "seconds": seconds, "accuracy": accuracies})


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


def summarise(lines: Sequence[dict[str, Any]], shots: Sequence[str]) -> tuple[Table, dict[str, Any]]:
    """Return mean and worst regret of each candidate, in points, by shots."""
    drawn: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        for name, accuracy in line["accuracy"].items():
            drawn[line["cell"], line["shots"]][name].append(100 * accuracy)
    regrets: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    behind: dict[str, dict[str, list[tuple[float, str]]]] = defaultdict(lambda: defaultdict(list))
    for (cell, count), values in drawn.items():
        means = {name: float(np.mean(each)) for name, each in values.items()}
        for name, mean in means.items():
            regrets[name][count].append(max(means.values()) - mean)
            behind[name][count].append((means["logreg/l2"] - mean, cell))
    table = Table("candidate", *shots, "worst behind logreg/l2", title="mean regret (worst cell), points, by shots")
    report: dict[str, Any] = {}
    for name, by in regrets.items():
        report[name] = {n: [float(np.mean(by[n])), max(by[n]), *max(behind[name][n])] for n in shots if by[n]}
        cells = [f"{report[name][n][0]:.1f} ({report[name][n][1]:.1f})" if n in report[name] else "" for n in shots]
        table.add_row(name, *cells, f"{max(row[2] for row in report[name].values()):.1f}")
    return table, report


@click.command()
@click.argument("sources", nargs=-1)
@click.option("--cache", default="few-shot-cache", show_default=True, type=click.Path(path_type=Path))
@click.option("--seeds", default=5, show_default=True)
@click.option("--shots", multiple=True, default=SHOTS, show_default=True)
@click.option("--jobs", default=2, show_default=True)
def main(sources: tuple[str, ...], cache: Path, seeds: int, shots: tuple[str, ...], jobs: int) -> None:
    """Print the table and a JSON line."""
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
        for text in joblib.Parallel(jobs, return_as="generator_unordered")(joblib.delayed(run_cell)(*task) for task in tasks):
            file.write(text + "\n")
            file.flush()
            lines.append(json.loads(text))
    table, report = summarise(lines, shots)
    Console(width=140).print(table)
    click.echo(json.dumps(report))


if __name__ == "__main__":
    main()
