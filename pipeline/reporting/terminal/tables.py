"""What a table on the terminal looks like, and those of the stages' results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest

import numpy as np
from rich.table import Table

from features_cache import UNREADABLE, open_cache
from pipeline.evaluation.targets import BAR
from pipeline.evaluation.wording import METRIC_TITLES, four_digits, metric_text, three_decimals
from pipeline.options import METRICS_OF, MULTILABEL, REGRESSION
from pipeline.results import (
    Agreement,
    ColumnsGain,
    DriftResult,
    ExtractResult,
    FitResult,
    HeadResult,
    LayerScore,
    LectureFigure,
    LectureResult,
    MetricSummary,
    MultilabelResult,
    Prediction,
    PretrainResult,
    RegressionResult,
    SeedSummary,
    TunedResult,
    UnitResult,
)

LEVEL = 0.05  # up to this p-value, two sets are said to differ
_SCORES = {"logme": "LogME", "h_score": "H-score", "leep": "LEEP"}


def extract_table(results: Iterable[ExtractResult]) -> Table:
    """One row for each cache file."""
    rows = []
    for result in results:
        layers = layers_text(result.layers)
        counts = (result.rows, result.reused, result.computed, result.unreadable)
        rate = f"{result.images_per_second:.0f}" if result.computed else "-"
        rows.append((result.path, result.backbone, layers, *map(str, counts), result.precision, rate))
    columns = ("cache", "backbone", "layers", "rows", "reused", "computed", "unreadable", "precision", "images/s")
    return rows_table(columns, rows)


def layers_text(layers: Mapping[str, int], most: int = 3) -> str:
    """Name layers with their dims; of more than `most`, the first and the last."""
    named = [f"{name} ({dim})" for name, dim in layers.items()]
    return ", ".join(named) if len(named) <= most else f"{len(named)}: {named[0]} … {named[-1]}"


def unreadable_lines(results: Iterable[ExtractResult], most: int = 10) -> list[str]:
    """Name at most `most` unreadable images of each file, and say why they are."""
    lines = []
    for result in results:
        if not result.unreadable:
            continue
        file = open_cache(result.path)
        rows = np.flatnonzero(file.states == UNREADABLE)
        lines.append(f"{len(rows)} of {result.rows} images are unreadable and were left out:")
        lines += [f"  {line}" for line in shortened([f"{file.uris[row]}: {file.reasons[row]}" for row in rows], most)]
    return lines


def fit_table(results: Sequence[HeadResult]) -> Table:
    """One row for each result, those that may be the best in bold; values that all rows share are in the title."""
    settings = {
        "target": _targets(results),
        **_columns(results, "backbone", "pool", "layer", "head", "seed", "shots"),
        "folds": [str(result.cv or "-") for result in results],
        "train/val/test": [_counts(result) for result in results],
    }
    measured = {"chosen": [_params(result) for result in results], **_measured(results)}
    return _compared(settings, measured, results)


def labels_table(result: MultilabelResult) -> Table:
    """One row for each of several labels, the commonest first."""
    rows = []
    for one in sorted(result.labels, key=lambda one: -one.positives):
        known = (three_decimals(one.average_precision), _ends("", one.average_precision_ci95), three_decimals(one.f1))
        rows.append((one.label, str(one.positives), *known, f"{one.threshold:.3f}"))
    title = f"labels by {result.head} on {result.layer}, {result.n_test} test images"
    columns = ("label", "test images", "average precision", "95 % interval", "F1", "threshold")
    return rows_table(columns, rows, title)


def gains_table(gains: Sequence[ColumnsGain]) -> Table:
    """One row for each head and layer that was trained without joined columns and with them."""
    settings = _columns(gains, "layer", "shots")
    shared = [name for name, cells in settings.items() if len(set(cells)) == 1]
    named = METRIC_TITLES[gains[0].metric]
    columns = {name: cells for name, cells in settings.items() if name not in shared} | {
        "head": [one.head for one in gains],
        f"{named} without": [metric_text(one.metric, one.value_without) for one in gains],
        "with": [metric_text(one.metric, one.value_with) for one in gains],
        "gain": [_signed(one.metric, one.gain) for one in gains],
        "95 % interval": [
            "-" if one.gain_ci95 is None else " to ".join(_signed(one.metric, end) for end in one.gain_ci95)
            for one in gains
        ],
    }
    told = "".join(f", {name} {settings[name][0]}" for name in shared)
    rows = list(zip(*columns.values(), strict=True))
    return rows_table(columns, rows, f"gained by {', '.join(gains[0].columns)} on the same test images{told}")


def _signed(metric: str, value: float) -> str:
    return f"{'' if value < 0 else '+'}{metric_text(metric, value)}"


def finetune_table(results: Sequence[TunedResult]) -> Table:
    """One row for each run, those that may be the best in bold; values that all rows share are in the title."""
    settings = {
        "target": _targets(results),
        **_columns(results, "freeze", "seed", "shots"),
        "train/val/test": [_counts(result) for result in results],
        "trained weights": [f"{result.trainable_parameters:,}" for result in results],
    }
    measured = {
        "epochs": [str(result.epochs) + ("" if result.converged else " (diverged)") for result in results],
        "kept": [str(result.params["best_epoch"]) for result in results],
        **_measured(results),
    }
    one = results[0]
    title = f"backbone {one.backbone}, top {one.head}, init {one.params['init']}, learning rate {one.params['lr']:g}"
    return _compared(settings, measured, results, title)


def pretrain_table(result: PretrainResult) -> Table:
    """What the task was, and how well it was learnt, a line each."""
    accuracy = "-" if result.valid_accuracy is None else f"{result.valid_accuracy:.3f} ({result.chance:.3g} is a guess)"
    facts = {
        "task": f"{result.task}, {result.shown}",
        "begun with": result.backbone,
        "train/val": f"{result.n_train}/{result.n_val} images, {result.inputs_per_image} inputs of each in a step",
        "epochs": f"{result.epochs}" + ("" if result.converged else " (diverged)"),
        "kept": f"epoch {result.best_epoch}, after {result.steps} steps",
        "train loss": f"{result.train_loss:.3f}",
        "validation loss": "-" if result.valid_loss is None else f"{result.valid_loss:.3f}",
        "validation accuracy": accuracy,
        "seconds": f"{result.seconds:.1f}",
    }
    return facts_table(facts.items())


def seeds_table(summary: Sequence[SeedSummary] | Sequence[MetricSummary]) -> Table:
    """One row for each head over its seeds: an interval for other test rows, and the spread over the seeds' draws."""
    settings = _columns(summary, "backbone", "pool", "layer", "head", "shots")
    shared = all(row.shared_test for row in summary)
    drawn = "of training rows; all have the same test rows" if shared else "of training and test rows"
    metric, columns = "accuracy", [_over_seeds(row) for row in summary]
    if isinstance(summary[0], MetricSummary):
        metric = METRIC_TITLES[summary[0].metric]
    names = (f"mean {metric}", "95 % interval (test rows)", "sd over seeds", "lowest–highest seed")
    measured = dict(zip(names, map(list, zip(*columns, strict=True)), strict=True)) | _judged(summary)
    return _compared(settings, measured, summary, f"over {summary[0].seeds} seeds, each a draw {drawn}")


def _over_seeds(row: SeedSummary | MetricSummary) -> tuple[str, str, str, str]:
    """Return mean, interval, spread, lowest and highest value over seeds."""
    if isinstance(row, MetricSummary):
        name, ends = row.metric, (row.lowest, row.highest)
        return metric_text(name, row.mean), _ends(name, row.ci95), metric_text(name, row.sd), _ends(name, ends)
    ends = (row.accuracy_min, row.accuracy_max)
    return (
        three_decimals(row.accuracy_mean),
        _ends("", row.accuracy_ci95),
        three_decimals(row.accuracy_sd),
        _ends("", ends),
    )


def _columns(records: Sequence[object], *names: str) -> dict[str, list[str]]:
    """Return fields of the records as columns."""
    return {name: [str(getattr(record, name)) for record in records] for name in names}


def _measured(results: Sequence[HeadResult]) -> dict[str, list[str]]:
    """Return the columns that heads and fine-tuned networks share; the results are all of one task."""
    of_classes = [result for result in results if isinstance(result, FitResult)]
    names = METRICS_OF[REGRESSION if isinstance(results[0], RegressionResult) else MULTILABEL]
    return {
        **(_of_classes(of_classes) if of_classes else _of_values(results, names)),
        **_judged(results),
        "seconds": [f"{result.seconds:.1f}" for result in results],
    }


def _of_values(results: Sequence[HeadResult], names: Sequence[str]) -> dict[str, list[str]]:
    """Return metrics of labels or numbers; the one that parameters were chosen by has its interval beside it."""
    columns = {}
    for name in names:
        columns[METRIC_TITLES[name]] = [metric_text(name, getattr(result, name)) for result in results]
        if name == results[0].metric:
            columns["95 % interval"] = [_ends(name, getattr(result, f"{name}_ci95")) for result in results]
    return columns


def _ends(metric: str, interval: tuple[float, float] | None) -> str:
    return "-" if interval is None else "–".join(metric_text(metric, end) for end in interval)


def _of_classes(results: Sequence[FitResult]) -> dict[str, list[str]]:
    return {
        "accuracy": [f"{result.accuracy:.3f}" for result in results],
        "95 % interval": ["{:.3f}–{:.3f}".format(*result.accuracy_ci95) for result in results],
        METRIC_TITLES["mean_per_class_accuracy"]: [f"{result.mean_per_class_accuracy:.3f}" for result in results],
        METRIC_TITLES["top5_accuracy"]: [three_decimals(result.top5_accuracy) for result in results],
        METRIC_TITLES["auroc"]: [three_decimals(result.auroc) for result in results],
        **_chosen_by(results),
        "log-loss": [_calibrated(result) for result in results],
    }


def _chosen_by(results: Sequence[FitResult]) -> dict[str, list[str]]:
    """Return the metric that parameters were chosen by, if no other column has it."""
    chosen = dict.fromkeys(one.metric for one in results if one.metric in ("macro_f1", "kappa", "average_precision"))
    return {METRIC_TITLES[metric]: [three_decimals(getattr(result, metric)) for result in results] for metric in chosen}


def _judged(records: Sequence[HeadResult] | Sequence[SeedSummary] | Sequence[MetricSummary]) -> dict[str, list[str]]:
    """Return the columns on which results differ by more than chance; the chosen result has no p-value."""
    return {
        "p vs chosen": [_p_value(record.p_vs_best) for record in records],
        "may be best": [
            "-" if record.in_best_set is None else "yes" if record.in_best_set else "no" for record in records
        ],
    }


def _targets(results: Sequence[HeadResult]) -> list[str]:
    return [result.target or "-" for result in results]


def _counts(result: HeadResult) -> str:
    """Return the numbers of training, validation and test rows, and in how many groups the test rows come."""
    grouped = result.n_groups is not None and result.n_groups < result.n_test
    return f"{result.n_train}/{result.n_val}/{result.n_test}" + (f" in {result.n_groups} groups" if grouped else "")


def _compared(
    settings: dict[str, list[str]],
    measured: dict[str, list[str]],
    records: Sequence[HeadResult] | Sequence[SeedSummary] | Sequence[MetricSummary],
    *title: str,
) -> Table:
    """Return a table of results, those that may be the best in bold; settings that all share are in the title."""
    shared = [name for name, cells in settings.items() if len(set(cells)) == 1 and cells[0] != "-"]
    heading = ", ".join([*title, *(f"{name} {settings[name][0]}" for name in shared)])
    columns = {
        name: cells for name, cells in (settings | measured).items() if name not in shared and set(cells) != {"-"}
    }
    bold = [bool(record.in_best_set) for record in records]
    return rows_table(columns, zip(*columns.values(), strict=True), heading, bold)


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


def _params(result: HeadResult) -> str:
    shown = " ".join(f"{name}={value:.3g}" for name, value in result.params.items())
    return shown if result.converged else f"{shown} (not converged)"


def prediction_table(predictions: Sequence[Prediction], target: str, most: int = 20) -> Table:
    """The first `most` predictions of a target; `count_table` sums up the rest."""
    rows = []
    for prediction in predictions[:most]:
        told = prediction.label if prediction.value is None else four_digits(prediction.value)
        rows.append((prediction.uri, told or f"{prediction.state}: {prediction.reason}", _certainty(prediction)))
    if len(predictions) > most:
        rows.append((f"… and {len(predictions) - most} more; --csv has all", "", ""))
    heading = "score" if any(one.scores for one in predictions) else "probability"
    columns = ("image", target, heading)
    shown = 3 if any(row[2] != "-" for row in rows) else 2
    return rows_table(columns[:shown], [row[:shown] for row in rows])


def _certainty(prediction: Prediction) -> str:
    """Return the probability of the label, or the scores of all labels that are predicted."""
    if prediction.scores is None:
        return three_decimals(prediction.probability)
    names = [name for name in (prediction.label or "").split(BAR) if name]
    return " ".join(f"{prediction.scores[name]:.3f}" for name in names) or "-"


def count_table(predictions: Iterable[Prediction], target: str) -> Table:
    """How many images got each label."""
    counts: Counter[str] = Counter()
    for prediction in predictions:
        label = prediction.label or f"({prediction.state})"
        counts.update([label] if prediction.scores is None or label == BAR else label.split(BAR))
    return rows_table((target, "images"), [(label, str(count)) for label, count in counts.most_common()])


def rank_table(ranking: Sequence[LayerScore]) -> Table:
    """One row for each layer, the best first; columns that are empty or say the same everywhere are left out."""
    reached = METRIC_TITLES[ranking[0].metric]
    columns = {
        "": [str(rank) for rank in range(1, len(ranking) + 1)],
        **_columns(ranking, "backbone", "pool", "layer"),
        "features": [str(score.dim) for score in ranking],
        "LogME": [f"{score.logme:.3f}" for score in ranking],
        "H-score": ["" if score.h_score is None else f"{score.h_score:.2f}" for score in ranking],
        "LEEP": ["" if score.leep is None else f"{score.leep:.3f}" for score in ranking],
        reached: ["" if score.test_score is None else f"{score.test_score:.3f}" for score in ranking],
    }
    needless = [name for name in ("backbone", "pool") if len(set(columns[name])) == 1]
    needless += [name for name in ("H-score", "LEEP", reached) if not any(columns[name])]
    shown = {name: cells for name, cells in columns.items() if name not in needless}
    return rows_table(tuple(shown), list(zip(*shown.values(), strict=True)))


def agreement_lines(agreement: Sequence[Agreement], metric: str = "accuracy") -> list[str]:
    """Say how well the order by each score agrees with the order by a metric on test."""
    return [
        f"{_SCORES[found.score]} against test {METRIC_TITLES[metric]} over {found.layers} layers: "
        f"Kendall's tau {found.kendall_tau:.2f}, Spearman's rho {found.spearman_rho:.2f}"
        for found in agreement
    ]


def units_table(units: Sequence[UnitResult]) -> Table:
    """One row for each unit; columns that are empty are left out."""
    columns = {
        **_columns(units, "layer", "channel"),
        "prefers": [unit.prefers or "-" for unit in units],
        "AUC": ["-" if unit.auc is None else f"{unit.auc:.3f}" for unit in units],
        "p (all units)": [_p_value(unit.p_value) for unit in units],
        "looks at": [f"{np.median([one.box[2] - one.box[0] for one in unit.examples]):.0f} px" for unit in units],
        "excited most by": [unit.examples[0].uri for unit in units],
    }
    shown = {name: cells for name, cells in columns.items() if set(cells) != {"-"}}
    return rows_table(tuple(shown), list(zip(*shown.values(), strict=True)))


def drift_lines(result: DriftResult) -> list[str]:
    """Say whether the two sets differ, and how many images were compared."""
    shared = f"; {result.shared} are in both sets and left out" if result.shared else ""
    verdict = (
        "the two sets differ"
        if result.p_value <= LEVEL
        else "no sign that the two sets differ; the images below look no more foreign than by chance"
    )
    return [
        f"{result.images[0]} and {result.images[1]} images{shared}; {result.compared} of each set compared on "
        f"{result.layer}",
        f"a classifier tells held-out images of the two sets apart with an accuracy of {result.accuracy:.3f} "
        f"(0.5 is a guess), p = {result.p_value:.3g}: {verdict}",
    ]


def foreign_table(result: DriftResult) -> Table:
    """The images that look most foreign, a column for each set."""
    pairs = zip_longest(result.foreign_in_first, result.foreign_in_second)
    rows = [tuple("" if image is None else f"{image.uri} ({image.score:.2f})" for image in pair) for pair in pairs]
    return rows_table(("most foreign in the first", "most foreign in the second"), rows)


def lecture_table(result: LectureResult) -> Table:
    """One row for each figure of a claim, in bold where the claim expects something of it."""
    rows = [
        (one.name, number_text(one.value), interval_text(one), one.verdict or "-", one.published)
        for one in result.figures
    ]
    title = f"{result.claim}: {result.statement}"
    columns = (f"on {result.source}", "measured", "95 % interval", "verdict", "published")
    return rows_table(columns, rows, title, [bool(one.verdict) for one in result.figures])


def number_text(value: float) -> str:
    """Return a number with thousands grouped, or three significant digits if it is small."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def interval_text(figure: LectureFigure) -> str:
    """Return the interval of a figure as text; ``–`` for none."""
    return "–" if figure.interval is None else " to ".join(map(number_text, figure.interval))


def rows_table(
    columns: Iterable[str], rows: Iterable[Sequence[str]], title: str = "", bold: Sequence[bool] | None = None
) -> Table:
    """Rows of text under headings, some of them perhaps in bold."""
    table = Table(box=None, header_style="bold", pad_edge=False, title=title or None, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for index, row in enumerate(rows):
        table.add_row(*row, style="bold" if bold and bold[index] else "")
    return table


def facts_table(facts: Iterable[tuple[str, str]]) -> Table:
    """Names and values of one thing, a line each, without headings."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for fact in facts:
        table.add_row(*fact)
    return table


def shortened(lines: Sequence[str], most: int) -> list[str]:
    """Return the first `most` lines, and a line that says how many more there are."""
    return [*lines[:most], *([f"… and {len(lines) - most} more"] if len(lines) > most else [])]
