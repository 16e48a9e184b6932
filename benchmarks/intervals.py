"""Where 95 % intervals cover what they should, and whether tests between models keep their level: by simulation.

Intervals: a model of known accuracy predicts n test rows, many times; an interval should hold the known value in 95 %
of them. Tests: two equally good models are compared, many times; a test at 5 % should see a difference in at most 5 %.

    python benchmarks/intervals.py [--draws 4000]
"""

from __future__ import annotations

import json
from collections.abc import Callable

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from pipeline.arrays import Float64Array
from pipeline.evaluation.intervals import FEWEST_SPLITS, bootstrap, corrected_t_test, mcnemar, wilson
from pipeline.evaluation.metrics import count, macro_f1

LEVEL = 0.05


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
        low, high = bootstrap(lambda rows, t=true, p=predicted: score(t[rows], p[rows]), n, 500)  # type: ignore[misc]
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
        for place in range(splits):
            order = rng.permutation(100)
            train, test = order[:trained], order[80:]
            scores = [
                LogisticRegression(tol=1e-2).fit(x[train, part], y[train]).score(x[test, part], y[test])
                for part in (slice(0, 5), slice(5, 10))
            ]
            differences[place] = scores[0] - scores[1]
        corrected += corrected_t_test(differences, 80, 20)[1] < LEVEL
        error = differences.std(ddof=1) / np.sqrt(splits)
        plain += error > 0 and 2 * student.sf(abs(differences.mean()) / error, splits - 1) < LEVEL
    return corrected / draws, plain / draws


def table_of(title: str, rows: list[dict[str, float | str]], good: Callable[[float], bool]) -> Table:
    """Show rows; shares that are not as good as they should be are starred."""
    table = Table(*rows[0], title=title)
    for row in rows:
        cells = [f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()]
        wrong = [isinstance(v, float) and key != "accuracy" and not good(v) for key, v in row.items()]
        table.add_row(*(f"{cell} *" if bad else cell for cell, bad in zip(cells, wrong, strict=True)))
    return table


@click.command()
@click.option("--draws", default=4000, show_default=True, help="Simulated test sets a setting.")
def main(draws: int) -> None:
    """Print two tables and a JSON line."""
    rng = np.random.default_rng(0)
    coverage: list[dict[str, float | str]] = []
    levels: list[dict[str, float | str]] = []
    with threadpool_limits(1):
        for n in (50, 200, 1000):
            for accuracy in (0.5, 0.8, 0.9, 0.95, 0.98):
                row: dict[str, float | str] = {"test rows": str(n), "accuracy": accuracy}
                row["Wilson"] = wilson_coverage(n, accuracy)
                row["percentile bootstrap"] = percentile_coverage(n, accuracy, draws // 4, rng)
                row["macro-F1, bootstrap"] = macro_f1_coverage(n, accuracy, draws // 20, rng)
                coverage.append(row)
                levels.append({"test": "McNemar exact", "setting": f"{n} rows at {accuracy}"})
                levels[-1]["told apart"] = mcnemar_level(n, accuracy, draws, rng)
        for splits, trained in ((FEWEST_SPLITS, 80), (10, 80), (FEWEST_SPLITS, 20), (10, 20)):
            setting = f"{splits} splits, {trained} of 80 rows trained on, 20 test"
            found = resampled_levels(splits, trained, draws // 20, rng)
            for name, level in zip(("corrected t", "plain t"), found, strict=True):
                levels.append({"test": name, "setting": setting, "told apart": level})
    console = Console(width=110)
    console.print(table_of("coverage of 95 % intervals (*: not 93–97 %)", coverage, lambda v: 0.93 <= v <= 0.97))
    noise = 2 * np.sqrt(LEVEL * (1 - LEVEL) / (draws // 20))
    console.print(
        table_of("equal models told apart at 5 % (*: more than 5 % and noise)", levels, lambda v: v <= LEVEL + noise)
    )
    click.echo(json.dumps({"coverage": coverage, "levels": levels}))


if __name__ == "__main__":
    main()
