"""Comparisons of heads and fine-tunings that predict several labels or a number."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_rel

from pipeline.compare import CompareReport, compare, dry_run
from pipeline.comparing.folder import RunFolder
from pipeline.comparing.methods import leaderboards
from pipeline.comparing.paired import _shared, best_set, compare_scores
from pipeline.errors import PlanError, RunFolderError
from pipeline.evaluation.bootstrap import compare_redrawn, lead
from pipeline.evaluation.predictions import Predictions
from pipeline.evaluation.regression import redraw_numbers
from pipeline.fit import fit
from pipeline.options import METRICS_OF
from pipeline.reporting.page.model_charts import precision_chart
from pipeline.results import to_json

PLAN = """\
source = "photos"
labels = "table.csv"
target = {target}
task = "{task}"
metric = "{metric}"
seed = [0, 1]

[[extract]]
backbone = "test_resnet@random:0"
layer = ["input", "layer1"]
size = 32
engine = "torch"

[[fit]]
head = ["ridge", "knn"]

[[finetune]]
backbone = "test_resnet@random:0"
size = 32
engine = "torch"
device = "cpu"
epochs = 2
"""
TARGETS = {"multilabel": ["light", "even"], "regression": "number"}


@pytest.fixture(scope="module")
def folder(write_photos: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of two colours, and a table that says what they show."""
    folder = tmp_path_factory.mktemp("targets")
    write_photos(folder / "photos", ("bright", "dark"), each=16)
    rows = ["uri,number,light,even"]
    for bright, name in enumerate(("dark", "bright")):
        rows += [f"{name}/{i}.png,{10 * bright + i % 3},{bright},{int(i % 2 == 0)}" for i in range(16)]
    (folder / "table.csv").write_text("\n".join(rows))
    return folder


def write_plan(folder: Path, task: str, metric: str) -> Path:
    path = folder / f"{task}-{metric}.toml"
    path.write_text(PLAN.format(target=json.dumps(TARGETS[task]), task=task, metric=metric))
    return path


@pytest.fixture(
    scope="module", params=[("multilabel", "average_precision"), ("regression", "rmse")], ids=lambda p: p[0]
)
def finished(request: pytest.FixtureRequest, folder: Path) -> tuple[str, str, Path, CompareReport]:
    task, metric = request.param
    plan = write_plan(folder, task, metric)
    return task, metric, plan, compare(plan, folder / f"run-{task}")


def test_a_run_holds_what_fit_returns_for_the_task(finished: tuple[str, str, Path, CompareReport]) -> None:
    task, metric, plan, report = finished
    run = Path(report.files["results"]).parent
    assert not report.failures, str(report.failures[0])
    assert report.computed == 10
    records = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    assert {record["task"] for record in records} == {task}
    known = {"labels": plan.parent / "table.csv", "target": TARGETS[task], "task": task, "metric": metric}
    alone = fit(run / "cache", heads=["ridge", "knn"], seeds=[0, 1], jobs=1, **known)
    same = ("layer", "head", "seed", "n_test", "validation_score", *METRICS_OF[task])
    expected = {tuple(to_json(result)[key] for key in same) for result in alone.results}
    assert {tuple(record[key] for key in same) for record in records if record["kind"] == "head"} == expected

    again = compare(plan, run)
    assert (again.computed, again.answer) == (0, report.answer)
    planned = dry_run(plan, run)
    assert all(job.done for job in planned.jobs)
    assert planned.power == [], "power is that of tests of accuracy"


def test_methods_are_ordered_and_compared_by_the_metric(finished: tuple[str, str, Path, CompareReport]) -> None:
    task, metric, _, report = finished
    run = RunFolder(Path(report.files["results"]).parent)
    (board,) = leaderboards(run.results.values())
    scores = board.at("all")
    for score in scores:
        values = [getattr(job.result, metric) for job in score.by_seed.values()]
        assert score.value == pytest.approx(np.mean(values))
        ends = [getattr(job.result, f"{metric}_ci95") for job in score.by_seed.values()]
        if None not in ends:
            np.testing.assert_allclose(score.interval, np.mean(ends, axis=0))
    frozen, tuned = scores[0], scores[-1]
    paired = compare_scores(frozen, tuned, run.predictions)
    assert paired is not None
    assert (paired.first, paired.second) == pytest.approx((frozen.value, tuned.value))
    lead_of_first = tuned.value - frozen.value if metric == "rmse" else frozen.value - tuned.value
    assert paired.difference == pytest.approx(lead_of_first), "above 0 for the better one, also where less is better"
    assert paired.low < paired.difference < paired.high
    assert paired.is_real == (paired.p <= 0.05)
    assert [min(scores, key=lambda score: score.rank).value] == [
        (min if metric == "rmse" else max)(score.value for score in scores)
    ]
    among = best_set(board, "all", run.predictions)
    assert among is not None
    assert min(scores, key=lambda score: score.rank).name in among.methods
    title = {"rmse": "RMSE", "average_precision": "average precision"}[metric]
    assert f"reached {title} " in " ".join(report.answer)
    assert "points" not in " ".join(report.answer)
    page = Path(report.files["report"]).read_text()
    for words in (
        title,
        {"multilabel": "Which labels are hard?", "regression": "How far off"}[task],
        "Largest mistakes",
    ):
        assert words in page
    assert ">nan" not in page.lower()
    assert "log-loss" not in page


def test_another_task_or_metric_is_computed_anew(
    finished: tuple[str, str, Path, CompareReport], tmp_path: Path
) -> None:
    task, metric, plan, report = finished
    other = next(name for name in METRICS_OF[task] if name != metric)
    before = RunFolder(Path(report.files["results"]).parent)
    plan.write_text(plan.read_text().replace(f'metric = "{metric}"', f'metric = "{other}"'))
    planned = dry_run(plan, before.path)
    assert {job.done for job in planned.jobs if not job.job.startswith("extract")} == {False}


@pytest.mark.parametrize(
    ("task", "old", "new", "message"),
    [
        ("regression", 'metric = "rmse"', 'metric = "accuracy"', "line 5: expected a metric for regression, one of r2"),
        ("regression", "seed = [0, 1]", "seed = 0\nshots = [2]", "shots is only for classes"),
        ("regression", '["ridge", "knn"]', '"logreg"', "line 15: .*logreg"),
        ("multilabel", '"knn"]', '"knn"]\nbalanced = true', "line 16: balanced is only for classes"),
        (
            "multilabel",
            "epochs = 2",
            "epochs = 2\nlabel-smoothing = 0.1",
            "line 23: label-smoothing is only for classes",
        ),
        ("regression", '"number"', '["number", "light"]', "several columns are labels of task 'multilabel'"),
    ],
)
def test_what_does_not_fit_the_task_is_refused_with_its_line(
    task: str, old: str, new: str, message: str, folder: Path, tmp_path: Path
) -> None:
    text = PLAN.format(
        target=json.dumps(TARGETS[task]), task=task, metric="rmse" if task == "regression" else "macro_f1"
    )
    assert old in text
    path = folder / "bad.toml"
    path.write_text(text.replace(old, new))
    with pytest.raises(PlanError, match=message):
        dry_run(path, tmp_path / "run")


@pytest.mark.parametrize(
    "forge",
    [
        {"y_true": lambda column: column[:3]},
        {"y_pred": lambda column: column[..., None]},
        {"y_true": lambda column: column.astype("i8")},
        {"y_pred": lambda column: np.where(True, np.nan, column)},
        {"probabilities": lambda column: None, "scores": lambda column: None},
        {"scores": lambda column: np.full(len(column), 1.0)},
    ],
    ids=["rows", "shape", "type", "nan", "without scores", "one score"],
)
def test_columns_of_another_task_are_damage(
    forge: dict[str, Callable[[Any], Any]], finished: tuple[str, str, Path, CompareReport], tmp_path: Path
) -> None:
    task, _, _, report = finished
    folder = RunFolder(Path(shutil.copytree(Path(report.files["results"]).parent, tmp_path / "run")))
    key = next(iter(folder.results))
    file = folder.path / "predictions" / f"{key}.npz"
    with np.load(file) as stored:
        columns: dict[str, Any] = dict(stored)
    columns |= {name: change(columns.get(name, columns["uris"])) for name, change in forge.items()}
    np.savez(file, **{name: column for name, column in columns.items() if column is not None})
    if task == "regression" and "probabilities" in forge:
        folder.predictions(key)  # numbers have no scores
        return
    with pytest.raises(RunFolderError, match="is damaged"):
        folder.predictions(key)


def test_the_interval_of_a_lead_agrees_with_its_p_value_and_with_the_t_test() -> None:
    rng = np.random.default_rng(0)
    y, count = rng.normal(size=300), 300
    uris = np.array([f"{i}.png" for i in range(count)])
    noise, better = rng.normal(size=count), rng.normal(size=count)
    models = [Predictions(uris, y, y + 0.5 * noise + size * better, None) for size in (0.05, 0.3)]
    redrawn = [redraw_numbers("mae", [one]) for one in models]
    found, mirrored = lead(*redrawn), lead(*redrawn[::-1])
    assert found is not None
    assert mirrored is not None
    assert (found.low, found.high, found.p) == pytest.approx((-mirrored.high, -mirrored.low, mirrored.p))
    gains = np.abs(models[1].y_pred - y) - np.abs(models[0].y_pred - y)  # a mean over rows, as the t-test takes it
    told = ttest_rel(np.abs(models[1].y_pred - y), np.abs(models[0].y_pred - y)).confidence_interval()
    assert (found.low, found.high) == pytest.approx((told.low, told.high), abs=0.15 * (told.high - told.low))
    assert found.low < gains.mean() < found.high
    compared = compare_redrawn(redrawn, chosen=1)
    assert compared is not None
    assert compared[0][0] == found.p
    assert found.p == 1 / 2000, "no draw is as far off"
    level = 0.9999  # higher than so many draws can tell
    wide = lead(*redrawn, level)
    told = ttest_rel(np.abs(models[1].y_pred - y), np.abs(models[0].y_pred - y)).confidence_interval(level)
    assert wide is not None
    assert (wide.low, wide.high) == pytest.approx((told.low, told.high), abs=0.15 * (told.high - told.low))
    close = [Predictions(uris, y, y + 0.5 * noise + size * better, None) for size in (0.05, 0.12)]
    near = [redraw_numbers("mae", [one]) for one in close]
    told_apart = lead(*near)
    assert told_apart is not None
    assert (told_apart.low > 0 or told_apart.high < 0) == (told_apart.p <= 0.05)
    alone = [redraw_numbers("mae", [Predictions(uris, y, y + 1, None, groups=np.full(count, "g"))]) for _ in range(2)]
    assert lead(*alone) is None, "a single group tells nothing"


@pytest.mark.parametrize("level", [0.95, 0.998])
def test_a_lead_of_few_rows_is_as_unsure_as_the_t_test_says(level: float) -> None:
    widths = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        y, first, second = rng.normal(size=(3, 10))
        uris = np.array([f"{i}.png" for i in range(10)])
        redrawn = [redraw_numbers("mae", [Predictions(uris, y, y + one, None)]) for one in (first, second)]
        found = lead(redrawn[0], redrawn[1], level)
        told = ttest_rel(np.abs(second), np.abs(first)).confidence_interval(level)
        assert found is not None
        widths.append((found.high - found.low) / (told.high - told.low))
    assert 0.85 < np.mean(widths) < 1.15


def test_methods_that_were_told_other_answers_are_not_compared(
    finished: tuple[str, str, Path, CompareReport],
) -> None:
    task, _, _, report = finished
    run = RunFolder(Path(report.files["results"]).parent)
    first, second = leaderboards(run.results.values())[0].at("all")[:2]

    def read_with(change: Callable[[Any], Any]) -> Callable[[str], Predictions]:
        return lambda key: replace(run.predictions(key), y_true=change(run.predictions(key).y_true))

    other = read_with(lambda y: ~y if task == "multilabel" else 2 * y + 1)
    assert compare_scores(first, second, run.predictions, other) is None
    if task == "multilabel":
        assert compare_scores(first, second, run.predictions, read_with(lambda y: y[:, :1])) is None
    same = compare_scores(first, second, run.predictions, read_with(lambda y: y))
    assert same is not None


def test_methods_stay_paired_where_only_one_knows_of_groups() -> None:
    rng, uris = np.random.default_rng(0), np.char.mod("%03d", np.arange(60))
    y = rng.standard_normal(60)
    noise = rng.standard_normal(60)
    groups = np.where(np.arange(60) < 2, "alike", "")
    said = [Predictions(uris, y, y + noise * size, None, groups=own) for size, own in ((1, groups), (1.01, None))]
    scores = [SimpleNamespace(by_seed={0: SimpleNamespace(key=number)}) for number in (0, 1)]
    (first,), (second,) = _shared(scores, [said.__getitem__] * 2)
    assert (first.units == second.units).all()


def test_labels_that_a_method_does_not_test_leave_its_mark_out(finished: tuple[str, str, Path, CompareReport]) -> None:
    task, _, _, report = finished
    if task != "multilabel":
        return
    run = RunFolder(Path(report.files["results"]).parent)
    first, second = leaderboards(run.results.values())[0].at("all")[:2]
    job = second.first
    unknown = [replace(one, average_precision=None, average_precision_ci95=None) for one in job.result.labels[:1]]
    changed = replace(job, result=replace(job.result, labels=[*unknown, *job.result.labels[1:]]))
    chart = precision_chart([first, replace(second, by_seed={job.result.seed: changed})])
    assert chart is not None
    assert "-" in {row[3] for row in chart.rows}


def test_an_error_that_is_not_finite_leaves_the_folder_sound(
    finished: tuple[str, str, Path, CompareReport], tmp_path: Path
) -> None:
    task, _, _, report = finished
    if task != "regression":
        return
    run = RunFolder(Path(report.files["results"]).parent)
    job = next(iter(run.results.values()))
    folder = RunFolder(tmp_path / "run")
    with folder.claim():
        folder.append(replace(job, result=replace(job.result, rmse=math.inf)), run.predictions(job.key))
    assert RunFolder(tmp_path / "run").results[job.key].result.rmse is None
