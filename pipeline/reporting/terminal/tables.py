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
        **_measured(results),
    }
    return _compared(columns, list(columns).index("chosen"), [result.accuracy for result in results])


def _measured(results: Sequence[FitResult]) -> dict[str, list[str]]:
    """Return the columns that heads and fine-tuned networks share."""
    return {
        "accuracy": [f"{result.accuracy:.3f}" for result in results],
        "95 % interval": ["{:.3f}–{:.3f}".format(*result.accuracy_ci95) for result in results],
        "per class": [f"{result.mean_per_class_accuracy:.3f}" for result in results],
        "log-loss": [_calibrated(result) for result in results],
        "p vs best": [_p_value(result.p_vs_best) for result in results],
        "seconds": [f"{result.seconds:.1f}" for result in results],
    }


def _compared(columns: dict[str, list[str]], until: int, accuracies: list[float], *title: str) -> Table:
    """Put what is the same in every row, of the first `until` columns, into the title, and the best row in bold."""
    fixed = [name for name in list(columns)[:until] if len(set(columns[name])) == 1 and columns[name][0] != "-"]
    heading = ", ".join([*title, *(f"{name} {columns.pop(name)[0]}" for name in fixed)])
    shown = {name: cells for name, cells in columns.items() if set(cells) != {"-"}}
    table = _table(*shown, title=heading)
    for accuracy, *cells in zip(accuracies, *shown.values(), strict=True):
        table.add_row(*cells, style="bold" if accuracy == max(accuracies) else "")
    return table


def finetune_table(results: Sequence[FinetuneResult]) -> Table:
    """One row for each run, the best accuracy in bold; what is the same in every row stands in the title instead."""
    columns: dict[str, list[str]] = {
        "freeze": [result.freeze for result in results],
        "seed": [str(result.seed) for result in results],
        "shots": [str(result.shots) for result in results],
        "train/val/test": [f"{result.n_train}/{result.n_val}/{result.n_test}" for result in results],
        "trained weights": [f"{result.trainable_parameters:,}" for result in results],
        "epochs": [str(result.epochs) + ("" if result.converged else " (diverged)") for result in results],
        "kept": [str(result.params["best_epoch"]) for result in results],
        **_measured(results),
    }
    one = results[0]
    title = f"backbone {one.backbone}, top {one.head}, init {one.params['init']}, learning rate {one.params['lr']:g}"
    return _compared(columns, list(columns).index("epochs"), [result.accuracy for result in results], title)


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
    means = [row.accuracy_mean for row in summary]
    return _compared(columns, list(columns).index("mean accuracy"), means, f"over {summary[0].seeds} seeds")


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
    if len(predictions) > most:
        table.add_row(f"… and {len(predictions) - most} more; --csv has all", "", "")
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


def facts_table(facts: Iterable[tuple[str, str]]) -> Table:
    """What is said of one thing, a line each."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for fact in facts:
        table.add_row(*fact)
    return table


def _table(*columns: str, title: str = "") -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, title=title or None, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
