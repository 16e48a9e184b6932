"""Whether intervals cover what they should and statements are wrong as rarely as they say: by simulation.

Intervals: models of known accuracy predict n test rows, many times; a 95 % interval should hold the known value in 95 %
of them. Statements: equally good models are compared, many times; "this one is better" should come in at most 5 %.
Forecasts: the upper ends of real curves over labels are hidden; ``fit --shots 1 --shots 2 ... --json`` gives curves.

    python benchmarks/intervals.py [--draws 4000] [--curves FIT.json ...]
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from statistics import NormalDist
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from pipeline.arrays import BoolArray, Float64Array, IntArray
from pipeline.evaluation.bootstrap import compare_redrawn, mean_known
from pipeline.evaluation.comparisons import holm, may_be_best
from pipeline.evaluation.forecast import FEWEST_POINTS, LabelCurve
from pipeline.evaluation.intervals import (
    FEWEST_SPLITS,
    accuracy_interval,
    corrected_t_test,
    effective_rows,
    mcnemar,
    paired_interval,
    smallest_difference,
    wilson,
)
from pipeline.evaluation.metrics import count, macro_f1
from pipeline.evaluation.multilabel import rate_labels, redraw_labels, scores_of
from pipeline.evaluation.predictions import Predictions
from pipeline.evaluation.regression import rate_numbers, redraw_numbers

LEVEL = 0.05
Row = dict[str, float | str]


def models(rng: np.random.Generator, accuracies: Float64Array, n: int, correlation: float) -> BoolArray:
    """Return whether models of these accuracies are right on n rows (k, n), where they tend to err together."""
    bounds = np.array([NormalDist().inv_cdf(accuracy) for accuracy in accuracies])
    common, own = rng.standard_normal(n), rng.standard_normal((len(bounds), n))
    return np.asarray(np.sqrt(correlation) * common + np.sqrt(1 - correlation) * own < bounds[:, None])


def wilson_coverage(n: int, accuracy: float) -> float:
    """Return the exact coverage: the chance of the counts whose interval holds `accuracy`."""
    from scipy.stats import binom

    counts = np.arange(n + 1)
    held = [low <= accuracy <= high for low, high in (wilson(int(right), n) for right in counts)]
    return float(binom.pmf(counts, n, accuracy)[held].sum())


def percentile_coverage(n: int, accuracy: float, draws: int, rng: np.random.Generator) -> float:
    """Return how often the percentile bootstrap of the accuracy holds it."""
    held = 0
    for _ in range(draws):
        share = rng.binomial(n, accuracy) / n
        low, high = np.quantile(rng.binomial(n, share, 1000) / n, [LEVEL / 2, 1 - LEVEL / 2])
        held += low <= accuracy <= high
    return held / draws


def macro_f1_coverage(n: int, accuracy: float, draws: int, rng: np.random.Generator) -> float:
    """Return how often the bootstrap of macro-F1 over ten classes holds its value on a million rows."""

    def sample(size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        true = rng.integers(0, 10, size)
        return true, np.where(rng.random(size) < accuracy, true, (true + rng.integers(1, 10, size)) % 10)

    def score(true: NDArray[np.int64], predicted: NDArray[np.int64]) -> Float64Array:
        return macro_f1(count(true, predicted, 10))

    truth, held = float(score(*sample(1_000_000))), 0
    for _ in range(draws):
        true, predicted = sample(n)
        rows = rng.integers(0, n, (500, n))
        low, high = np.quantile(score(true[rows], predicted[rows]), [LEVEL / 2, 1 - LEVEL / 2])
        held += low <= truth <= high
    return held / draws


def mcnemar_level(n: int, accuracy: float, draws: int, rng: np.random.Generator) -> float:
    """Return how often two models that err independently, equally often, are told apart."""
    found = 0
    for _ in range(draws):
        a, b = rng.random((2, n)) < accuracy
        found += mcnemar(a, b) < LEVEL
    return found / draws


def resampled_levels(splits: int, trained: int, draws: int, rng: np.random.Generator) -> tuple[float, float]:
    """Return how often the corrected and the plain t-test over splits tell two equally good learners apart.

    Both are logistic regressions; each sees five of ten features, which tell the classes equally well. They are trained
    on so many of the 80 rows that are not test.
    """
    corrected = plain = 0
    for _ in range(draws):
        y = np.arange(100) % 2
        x = rng.standard_normal((100, 10)) + 0.4 * y[:, None]
        differences = np.empty(splits)
        for split in range(splits):
            order = rng.permutation(100)
            train, test = order[:trained], order[80:]
            scores = [
                LogisticRegression(tol=1e-2).fit(x[train, part], y[train]).score(x[test, part], y[test])
                for part in (slice(0, 5), slice(5, 10))
            ]
            differences[split] = scores[0] - scores[1]
        corrected += corrected_t_test(differences, 80, 20)[1] < LEVEL
        error = differences.std(ddof=1) / np.sqrt(splits)
        plain += error > 0 and 2 * student.sf(abs(differences.mean()) / error, splits - 1) < LEVEL
    return corrected / draws, plain / draws


def paired_coverage(n: int, accuracy: float, gap: float, draws: int, rng: np.random.Generator) -> tuple[float, float]:
    """Return how often the interval of a difference holds it, and Wald's, of models that err on similar rows."""
    held = wald = 0
    for _ in range(draws):
        a, b = models(rng, np.array([accuracy, accuracy - gap]), n, 0.7)
        low, high = paired_interval(a, b)
        held += low <= gap <= high
        leads = a.astype(float) - b
        wald += abs(leads.mean() - gap) <= 1.96 * leads.std() / np.sqrt(n)
    return held / draws, wald / draws


def grouped_coverage(groups: int, each: int, alike: float, draws: int, rng: np.random.Generator) -> list[float]:
    """Return how often intervals hold an accuracy of 0.9 and a difference of 0, by groups and by rows.

    `alike` is the correlation of the rows of a group: groups differ in how often each model is right.
    """
    clusters, held = np.repeat(np.arange(groups), each), np.zeros(4)
    more = 1 / alike - 1
    for _ in range(draws):
        shares = rng.beta(0.9 * more, 0.1 * more, (2, groups))
        a, b = rng.random((2, groups * each)) < shares[:, clusters]
        for index, of in enumerate((clusters, None)):
            low, high = accuracy_interval(float(a.mean()), len(a), effective_rows(a.astype(float), of))
            held[index] += low <= 0.9 <= high
            low, high = paired_interval(a, b, of)
            held[2 + index] += low <= 0 <= high
    return [float(share) for share in held / draws]


def best_set_errors(k: int, correlation: float, draws: int, rng: np.random.Generator) -> Row:
    """Return how often sets of k models on 300 rows leave out a best one, and how large they are.

    Equal models are all the best; the size is that of models whose accuracies go evenly from 0.95 down to 0.75. Beside
    it, how often a test of all against the one that is best on test finds a difference between equal models.
    """
    one = anywhere = on_test = 0
    size = 0.0
    for _ in range(draws):
        equal = models(rng, np.full(k, 0.9), 300, correlation)
        found = may_be_best(equal)
        one += not found[0]
        anywhere += not found.all()
        top = equal[equal.sum(axis=1).argmax()]
        on_test += min(holm([mcnemar(top, row) for row in equal])) < LEVEL
        size += float(may_be_best(models(rng, np.linspace(0.95, 0.75, k), 300, correlation)).mean()) * k
    row: Row = {"methods": str(k), "correlation": str(correlation), "the best is out": one / draws}
    row |= {"any of equal ones is out": anywhere / draws, "best on test as reference": on_test / draws}
    return row | {"mean size": f"{size / draws:.1f} of {k}"}


def opening_errors(n: int, heads: int, tunes: int, draws: int, rng: np.random.Generator) -> Row:
    """Return how often the opening of a report is wrong about equally good heads and fine-tunings.

    One of each is chosen on validation. The intervals of the chosen head and of the head that is best on test should
    hold 0.9; "Fine-tune" or "Freeze: it is better" should not be said; and of four numbers of labels none should show a
    difference.
    """
    chosen_held = best_held = better = ahead = 0
    for _ in range(draws):
        validated = models(rng, np.full(heads + tunes, 0.9), 200, 0.5).mean(axis=1)
        right = models(rng, np.full(heads + tunes, 0.9), n, 0.5)
        frozen, tuned = right[validated[:heads].argmax()], right[heads + validated[heads:].argmax()]
        for index, model in enumerate((frozen, right[right[:heads].sum(axis=1).argmax()])):
            low, high = wilson(int(model.sum()), n)
            chosen_held += (low <= 0.9 <= high) * (index == 0)
            best_held += (low <= 0.9 <= high) * (index == 1)
        low, high = paired_interval(tuned, frozen)
        better += low > 0 or high < 0
        pairs = (models(rng, np.full(2, 0.9), n, 0.5) for _ in range(4))
        shown = (paired_interval(one, other, confidence=1 - LEVEL / 4) for one, other in pairs)
        ahead += any(low > 0 or high < 0 for low, high in shown)
    row: Row = {
        "test rows": str(n),
        "chosen from": f"{heads} and {tunes}",
        "interval of the chosen": chosen_held / draws,
    }
    row["interval of the best on test"] = best_held / draws
    return row | {"'it is better'": better / draws, "any of 4 numbers of labels": ahead / draws}


def seed_levels(seeds: int, n: int, draws: int, rng: np.random.Generator) -> tuple[float, float]:
    """Return how often two methods are told apart over seeds on the same n rows, by images and by rows of all seeds.

    Every seed of a method is right on similar images, and all are equally good.
    """
    clusters, found = np.tile(np.arange(n), seeds), np.zeros(2)
    bound = NormalDist().inv_cdf(0.9)
    for _ in range(draws):
        image, own, drawn = rng.standard_normal(n), rng.standard_normal((2, 1, n)), rng.standard_normal((2, seeds, n))
        a, b = (np.sqrt(0.4) * image + np.sqrt(0.4) * own + np.sqrt(0.2) * drawn < bound).reshape(2, -1)
        found += mcnemar(a, b, clusters) < LEVEL, mcnemar(a, b) < LEVEL
    return float(found[0] / draws), float(found[1] / draws)


def found_power(n: int, disagreement: float, comparisons: int, draws: int, rng: np.random.Generator) -> float:
    """Return how often a difference of the size that is promised with 80 % power is found."""
    gap = smallest_difference(n, disagreement, comparisons)
    share = max(disagreement, gap)
    found = 0
    for _ in range(draws):
        kind = rng.choice(3, n, p=[(share + gap) / 2, (share - gap) / 2, 1 - share])
        found += mcnemar(kind == 0, kind == 1) < LEVEL / comparisons
    return found / draws


def hidden_ends(results: list[dict[str, object]]) -> Iterator[tuple[int, bool, float]]:
    """Forecast the later points of each curve from its earlier ones; yield the multiple, if it was held, and the width.

    A curve is one layer and head; its points are means over seeds. Points at twice and at four times the labels of the
    last one that is shown are forecast.
    """
    curves: dict[tuple[object, ...], dict[int, list[dict[str, object]]]] = defaultdict(lambda: defaultdict(list))
    for one in results:
        if isinstance(one["shots"], int):
            curves[one["backbone"], one["layer"], one["head"]][one["shots"]].append(one)
    for curve in curves.values():
        labels = np.array(sorted(curve), np.float64)
        seeds = [np.array([one["accuracy"] for one in curve[int(shots)]], np.float64) for shots in labels]
        means = np.array([values.mean() for values in seeds])
        drawn = np.array([values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0 for values in seeds])
        one = next(iter(curve.values()))[0]
        spans = [accuracy_interval(mean, int(str(one["n_test"])), float(str(one["n_effective"]))) for mean in means]
        errors = np.hypot([(high - low) / 3.92 for low, high in spans], drawn)
        for end in range(FEWEST_POINTS, len(labels)):
            for times in (2, 4):
                for index in np.flatnonzero(labels == times * labels[end - 1]):
                    low, high = LabelCurve(labels[:end], means[:end], errors[:end]).interval(float(labels[index]))
                    yield times, bool(low <= means[index] <= high), high - low


def numbers_of(rng: np.random.Generator, groups: IntArray, k: int, correlation: float) -> list[Predictions]:
    """Return what k equally good models predict of numbers, whose errors are alike in a group and between models."""

    def noise() -> Float64Array:
        return np.asarray(0.5 * rng.standard_normal(len(groups)) + 0.4 * rng.standard_normal(len(groups))[groups])

    y, common = noise() * 2, noise()
    errors = [np.sqrt(correlation) * common + np.sqrt(1 - correlation) * noise() for _ in range(k)]
    return [_predictions(groups, y, y + error) for error in errors]


def label_sets_of(rng: np.random.Generator, groups: IntArray, k: int, correlation: float) -> list[Predictions]:
    """Return what k equally good models say of five labels, which 5 to 50 % of the rows have."""

    def noise() -> Float64Array:
        found = rng.standard_normal((len(groups), 5)) + rng.standard_normal((len(groups), 5))[groups]
        return np.asarray(found / np.sqrt(2))

    y = noise() > [NormalDist().inv_cdf(1 - share) for share in (0.05, 0.1, 0.2, 0.4, 0.5)]
    common = noise()
    scores = [y + np.sqrt(correlation) * common + np.sqrt(1 - correlation) * noise() for _ in range(k)]
    return [_predictions(groups, y, score > 0.5, score) for score in scores]


def _predictions(groups: IntArray, y: Any, found: Any, scores: Float64Array | None = None) -> Predictions:
    names = np.char.mod("%d", np.arange(len(groups)))
    return Predictions(names, y, found, None, groups=np.char.mod("%d", groups), scores=scores)


def redrawn_errors(
    metric: str, groups: int, each: int, k: int, correlation: float, draws: int, rng: np.random.Generator
) -> Row:
    """Return how often the interval of a metric holds it, and how often k equally good models are told apart."""
    make = numbers_of if metric == "r2" else label_sets_of
    redraw = redraw_numbers if metric == "r2" else redraw_labels
    many = make(rng, np.repeat(np.arange(400_000 // each), each), 1, 0.0)[0]
    once = np.ones((1, len(many.uris)))
    if metric == "r2":
        truth = rate_numbers(metric, many.y_true, many.y_pred, once)[0]
    else:
        truth = mean_known(rate_labels(metric, many.y_true, many.y_pred, scores_of(many), None, once))[0]
    held, told, out = [], [], []
    for _ in range(draws):
        models = [redraw(metric, [one]) for one in make(rng, np.repeat(np.arange(groups), each), k, correlation)]
        ends, compared = models[0].interval(), compare_redrawn(models, 0)
        held.append(ends is None or ends[0] <= truth <= ends[1])
        told.append(compared is not None and min(p for p in compared[0] if p is not None) <= LEVEL)
        out.append(compared is not None and not compared[1].all())
    row: Row = {
        "metric": metric,
        "test rows": f"{groups} groups of {each}",
        "models": str(k),
        "correlation": str(correlation),
    }
    return row | {"covered": np.mean(held), "told apart": np.mean(told), "one is out": np.mean(out)}


def table_of(title: str, rows: list[Row], good: Callable[[float], bool]) -> Table:
    """Show rows; shares that are not as good as they should be are starred."""
    table = Table(*rows[0], title=title)
    for row in rows:
        cells = [f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()]
        wrong = [isinstance(value, float) and not good(value) for value in row.values()]
        table.add_row(*(f"{cell} *" if bad else cell for cell, bad in zip(cells, wrong, strict=True)))
    return table


@click.command()
@click.option(
    "--draws", default=4000, show_default=True, help="Simulated test sets a setting; a twentieth where each takes long."
)
@click.option("--curves", multiple=True, type=click.Path(path_type=Path), help="What fit --json printed.")
def main(draws: int, curves: tuple[Path, ...]) -> None:
    """Print tables and a JSON line."""
    rng = np.random.default_rng(0)
    few = draws // 20
    tables: dict[str, list[Row]] = defaultdict(list)
    with threadpool_limits(1):
        for n in (50, 200, 1000):
            for accuracy in (0.5, 0.8, 0.9, 0.95, 0.98):
                row: Row = {"test rows": str(n), "accuracy": str(accuracy)}
                row["Wilson"] = wilson_coverage(n, accuracy)
                row["percentile bootstrap"] = percentile_coverage(n, accuracy, draws, rng)
                row["macro-F1, bootstrap"] = macro_f1_coverage(n, accuracy, few, rng)
                tables["coverage"].append(row)
                row = {"test": "McNemar exact", "setting": f"{n} rows at {accuracy}"}
                tables["levels"].append(row | {"told apart": mcnemar_level(n, accuracy, draws, rng)})
            for accuracy, gap in ((0.8, 0.0), (0.9, 0.0), (0.9, 0.03), (0.95, 0.1), (0.98, 0.01)):
                row = {"test rows": str(n), "accuracy": str(accuracy), "difference": str(gap)}
                covered = paired_coverage(n, accuracy, gap, draws, rng)
                tables["paired"].append(row | dict(zip(("Tango, extended", "Wald"), covered, strict=True)))
        for groups, each in ((5, 80), (10, 40), (20, 20), (50, 8)):
            for alike in (0.05, 0.2):
                row = {"groups": f"{groups} of {each} rows", "correlation": str(alike)}
                names = ("accuracy, groups", "accuracy, rows", "difference, groups", "difference, rows")
                shares = grouped_coverage(groups, each, alike, draws, rng)
                tables["groups"].append(row | dict(zip(names, shares, strict=True)))
        for splits, trained in ((FEWEST_SPLITS, 80), (10, 80), (FEWEST_SPLITS, 20), (10, 20)):
            setting = f"{splits} splits, {trained} of 80 rows trained on, 20 test"
            found = resampled_levels(splits, trained, few, rng)
            for name, level in zip(("corrected t", "plain t"), found, strict=True):
                tables["levels"].append({"test": name, "setting": setting, "told apart": level})
        for seeds in (2, 5):
            found = seed_levels(seeds, 300, draws, rng)
            for name, level in zip(("exact, by images", "exact, by rows of all seeds"), found, strict=True):
                row = {"test": name, "setting": f"{seeds} seeds on the same 300 rows"}
                tables["levels"].append(row | {"told apart": level})
        for k in (5, 10, 40):
            for correlation in (0.0, 0.5, 0.9):
                tables["best sets"].append(best_set_errors(k, correlation, draws, rng))
        many, scarce = ((100, 1, 4), (400, 1, 4), (40, 10, 4), (20, 20, 4)), ((10, 20, 11), (5, 20, 11), (3, 20, 11))
        for metric, (groups, each, k), correlation in product(("r2", "average_precision"), many + scarce, (0.0, 0.8)):
            tables["redrawn"].append(redrawn_errors(metric, groups, each, k, correlation, few, rng))
        for n in (100, 400):
            for chosen_from in ((1, 1), (8, 3), (30, 3)):
                tables["opening"].append(opening_errors(n, *chosen_from, draws, rng))
        for n, disagreement, comparisons in ((100, 0.1, 1), (400, 0.1, 1), (400, 0.1, 20), (2000, 0.03, 20)):
            row = {"test rows": str(n), "disagreement": str(disagreement), "comparisons": str(comparisons)}
            row["smallest difference"] = f"{100 * smallest_difference(n, disagreement, comparisons):.1f} points"
            tables["power"].append(row | {"found": found_power(n, disagreement, comparisons, draws, rng)})
    for path in curves:
        forecasts = list(hidden_ends(json.loads(path.read_text())["results"]))
        for times in (2, 4):
            held = [one for multiple, one, _ in forecasts if multiple == times]
            widths = [100 * width for multiple, _, width in forecasts if multiple == times]
            row = {"curves": path.stem, "labels": f"{times} times", "forecasts": str(len(held))}
            row |= {"covered": float(np.mean(held)), "mean width": f"{np.mean(widths):.1f} points"}
            tables["forecasts"].append(row)
    show(tables, draws)
    click.echo(json.dumps(tables))


def show(tables: dict[str, list[Row]], draws: int) -> None:
    """Print the tables; a share that is not as good as it should be is starred."""
    noise = 2 * np.sqrt(LEVEL * (1 - LEVEL) / draws)
    rare = 2 * np.sqrt(LEVEL * (1 - LEVEL) / (draws // 20))
    close, enough = lambda v: 0.93 <= v <= 0.97, lambda v: v >= 1 - LEVEL - noise
    console = Console(width=120)
    for name, title, good in (
        ("coverage", "coverage of 95 % intervals (*: not 93-97 %)", close),
        ("paired", "coverage of 95 % intervals of a difference (*: less than 95 % and noise)", enough),
        ("groups", "coverage of 95 % intervals where rows come in groups (*: less than 95 % and noise)", enough),
        ("levels", "equal models told apart at 5 % (*: more than 5 % and noise)", lambda v: v <= LEVEL + rare),
        ("best sets", "sets of models that may be the best (*: more than 5 % and noise)", lambda v: v <= LEVEL + noise),
        (
            "redrawn",
            "metrics of redrawn test rows, equal models (*: intervals below 95 %, claims above 5 %, and noise)",
            lambda v: v <= LEVEL + rare or v >= 1 - LEVEL - rare,
        ),
        (
            "opening",
            "the report's opening on equal methods (*: intervals below 95 %, claims above 5 %, and noise)",
            lambda v: v <= LEVEL + noise or v >= 1 - LEVEL - noise,
        ),
        ("power", "differences found, of those promised with 80 % power (*: less than 75 %)", lambda v: v >= 0.75),
        ("forecasts", "hidden ends of real curves, held by 95 % forecasts (*: less than 90 %)", lambda v: v >= 0.9),
    ):
        if tables[name]:
            console.print(table_of(title, tables[name], good))


if __name__ == "__main__":
    main()
