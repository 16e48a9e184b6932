"""Terminal tables of what the stages return."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from rich.table import Table

from features_cache import UNREADABLE, open_cache
from pipeline.results import ExtractResult, FinetuneResult, FitResult, Prediction, SeedSummary


def extract_table(results: Iterable[ExtractResult]) -> Table:
    """One row for each cache file."""
    table = _table("cache", "backbone", "layers", "rows", "reused", "computed", "unreadable", "precision", "images/s")
    for result in results:
        layers = layers_text(result.layers)
        counts = (result.rows, result.reused, result.computed, result.unreadable)
        rate = f"{result.images_per_second:.0f}" if result.computed else "-"
        table.add_row(result.path, result.backbone, layers, *map(str, counts), result.precision, rate)
    return table


def layers_text(layers: Mapping[str, int], most: int = 3) -> str:
    """Name layers with their dims, of many the first and the last."""
    named = [f"{name} ({dim})" for name, dim in layers.items()]
    return ", ".join(named) if len(named) <= most else f"{len(named)}: {named[0]} … {named[-1]}"


def unreadable_lines(results: Iterable[ExtractResult], most: int = 10) -> list[str]:
    """Name the unreadable images of each file and why, at most `most` of them."""
    lines = []
    for result in results:
        if not result.unreadable:
            continue
        file = open_cache(result.path)
        rows = np.flatnonzero(file.states == UNREADABLE)
        lines.append(f"{len(rows)} of {result.rows} images are unreadable and were left out:")
        lines += [f"  {file.uris[row]}: {file.reasons[row]}" for row in rows[:most]]
        if len(rows) > most:
            lines.append(f"  … and {len(rows) - most} more")
    return lines


def fit_table(results: Sequence[FitResult]) -> Table:
    """One row for each head, the best accuracy in bold; what is the same in every row stands in the title instead."""
    columns: dict[str, list[str]] = {
        "backbone": [result.backbone for result in results],
        "pool": [result.pool for result in results],
        "layer": [result.layer for result in results],
        "head": [result.head for result in results],
        "seed": [str(result.seed) for result in results],
        "shots": [str(result.shots) for result in results],
        "folds": [str(result.cv or "-") for result in results],
        "train/val/test": [f"{result.n_train}/{result.n_val}/{result.n_test}" for result in results],
        "chosen": [_params(result) for result in results],
        "accuracy": [f"{result.accuracy:.3f}" for result in results],
        "95 % interval": ["{:.3f}–{:.3f}".format(*result.accuracy_ci95) for result in results],
        "per class": [f"{result.mean_per_class_accuracy:.3f}" for result in results],
        "log-loss": [_calibrated(result) for result in results],
        "p vs best": [_p_value(result.p_vs_best) for result in results],
        "seconds": [f"{result.seconds:.1f}" for result in results],
    }
    for name in ("folds", "log-loss", "p vs best"):
        if set(columns[name]) == {"-"}:
            del columns[name]
    until = list(columns).index("chosen")
    fixed = [name for name in list(columns)[:until] if len(set(columns[name])) == 1]
    title = ", ".join(f"{name} {columns.pop(name)[0]}" for name in fixed)
    best = max((result.accuracy for result in results), default=0.0)
    table = _table(*columns, title=title)
    for result, *cells in zip(results, *columns.values(), strict=True):
        table.add_row(*cells, style="bold" if result.accuracy == best else "")
    return table


def finetune_table(results: Sequence[FinetuneResult]) -> Table:
    """One row for each run, the best accuracy in bold."""
    columns = ("freeze", "seed", "shots", "train/val/test", "epochs", "best", "trained weights", "accuracy")
    one = results[0]
    title = f"backbone {one.backbone}, top {one.head}, init {one.params['init']}, learning rate {one.params['lr']:g}"
    table = _table(*columns, "95 % interval", "per class", "log-loss", "p vs best", "seconds", title=title)
    best = max(result.accuracy for result in results)
    for result in results:
        table.add_row(
            result.freeze,
            str(result.seed),
            str(result.shots),
            f"{result.n_train}/{result.n_val}/{result.n_test}",
            str(result.epochs) + ("" if result.converged else " (diverged)"),
            str(result.params["best_epoch"]),
            f"{result.trainable_parameters:,}",
            f"{result.accuracy:.3f}",
            "{:.3f}–{:.3f}".format(*result.accuracy_ci95),
            f"{result.mean_per_class_accuracy:.3f}",
            _calibrated(result),
            _p_value(result.p_vs_best),
            f"{result.seconds:.1f}",
            style="bold" if result.accuracy == best else "",
        )
    return table


def seeds_table(summary: Sequence[SeedSummary]) -> Table:
    """One row for each head over its seeds: what other test rows might give, beside what other draws gave."""
    columns: dict[str, list[str]] = {
        "backbone": [row.backbone for row in summary],
        "pool": [row.pool for row in summary],
        "layer": [row.layer for row in summary],
        "head": [row.head for row in summary],
        "shots": [str(row.shots) for row in summary],
        "mean accuracy": [f"{row.accuracy_mean:.3f}" for row in summary],
        "95 % interval (test rows)": ["{:.3f}–{:.3f}".format(*row.accuracy_ci95) for row in summary],
        "sd over seeds": [f"{row.accuracy_sd:.3f}" for row in summary],
        "lowest–highest seed": [f"{row.accuracy_min:.3f}–{row.accuracy_max:.3f}" for row in summary],
        "p vs best": [_p_value(row.p_vs_best) for row in summary],
    }
    fixed = [name for name in list(columns)[:5] if len(set(columns[name])) == 1]
    title = ", ".join([f"over {summary[0].seeds} seeds", *(f"{name} {columns.pop(name)[0]}" for name in fixed)])
    if set(columns["p vs best"]) == {"-"}:
        del columns["p vs best"]
    best = max(row.accuracy_mean for row in summary)
    table = _table(*columns, title=title)
    for row, *cells in zip(summary, *columns.values(), strict=True):
        table.add_row(*cells, style="bold" if row.accuracy_mean == best else "")
    return table


def _p_value(p: float | None) -> str:
    if p is None:
        return "-"
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _calibrated(result: FitResult) -> str:
    """Log-loss before and after calibration."""
    if result.log_loss is None:
        return "-"
    after = "" if result.log_loss_calibrated is None else f" → {result.log_loss_calibrated:.3f}"
    return f"{result.log_loss:.3f}{after}"


def _params(result: FitResult) -> str:
    shown = " ".join(f"{name}={value:.3g}" for name, value in result.params.items())
    return shown if result.converged else f"{shown} (not converged)"


def prediction_table(predictions: Sequence[Prediction], most: int = 20) -> Table:
    """The first `most` predictions; `count_table` sums up the rest."""
    table = _table("image", "label", "probability")
    for prediction in predictions[:most]:
        shown = "-" if prediction.probability is None else f"{prediction.probability:.3f}"
        table.add_row(prediction.uri, prediction.label or f"unreadable: {prediction.reason}", shown)
    return table


def count_table(predictions: Iterable[Prediction]) -> Table:
    """How many images got each label."""
    table = _table("label", "images")
    counts = Counter(prediction.label or "(unreadable)" for prediction in predictions)
    for label, count in counts.most_common():
        table.add_row(label, str(count))
    return table


def rows_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Plain rows under `columns`."""
    table = _table(*columns)
    for row in rows:
        table.add_row(*row)
    return table


def _table(*columns: str, title: str = "") -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, title=title or None, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
