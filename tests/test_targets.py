from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from sklearn.metrics import (
    average_precision_score,
    f1_score,
    mean_absolute_error,
    r2_score,
    roc_auc_score,
    root_mean_squared_error,
)
from sklearn.preprocessing import Normalizer
from sklearn.svm import LinearSVC

from features_cache import CacheWriter, LayerInfo, Rows
from pipeline.errors import FitError, ModelFileError, TableError
from pipeline.evaluation.bootstrap import Redrawn, compare_redrawn, mean_known
from pipeline.evaluation.labels import read_labels
from pipeline.evaluation.multilabel import average_precisions, best_thresholds, mean_auroc, rate_labels, redraw_labels
from pipeline.evaluation.predictions import Predictions
from pipeline.evaluation.regression import measure_numbers, rate_numbers, redraw_numbers
from pipeline.evaluation.splits import make_splits
from pipeline.evaluation.targets import read_answers
from pipeline.export import HeadScores
from pipeline.extract import extract
from pipeline.finetune import finetune
from pipeline.finetuning.objective import Labels, Numbers
from pipeline.fit import fit
from pipeline.heads import linear, memory
from pipeline.heads.choose import scale, train_final
from pipeline.heads.registry import FAMILIES_OF, Head
from pipeline.heads.saved import load_model, save_model
from pipeline.heads.solvers import blocks
from pipeline.options import METRICS_OF
from pipeline.predict import predict
from pipeline.rank import rank
from pipeline.results import from_json, to_json

Thawline = Callable[..., Any]
TINY = "test_resnet@random:0"
N, D, NAMES = 240, 12, ("fur", "legs", "wings")
OTHERS = [(task, name) for task in ("multilabel", "regression") for name in FAMILIES_OF[task]]


@pytest.fixture(scope="module")
def features() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((N, D)).astype("f")


def labels_of(x: np.ndarray) -> np.ndarray:
    """Return three labels (n, 3) that a few features tell, the last one rare."""
    return np.asarray(x[:, :3] + 0.4 * x[:, 3:6] > np.array([0, 0.3, 1.3]))


def number_of(x: np.ndarray) -> np.ndarray:
    return np.asarray(20 + 5 * (x[:, 0] - x[:, 1]) + x[:, 5], np.float64)


@pytest.fixture(scope="module")
def folder(features: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache without labels, and a table with a number, labels in one column, and a column for each label."""
    folder = tmp_path_factory.mktemp("targets")
    digests = [np.frombuffer(hashlib.blake2b(b"%d" % i, digest_size=16).digest(), np.uint8) for i in range(N)]
    zeros, none = np.zeros(N, np.int64), [""] * N
    rows = Rows([f"{i:03d}.png" for i in range(N)], zeros - 1, none, none, zeros, zeros)
    layers = [LayerInfo(name, D, "float32", {"layer": name, "pool": "avg"}, name) for name in ("deep", "noise")]
    request = {"backbone": "net", "layers": ["deep", "noise"], "pool": "avg", "size": None, "precision": "auto"}
    handles = {"source": "photos", "backbone": "net", "pool": "avg"}
    with CacheWriter.create(folder / "cache.h5", rows, (), layers, handles, request) as writer:
        writer.begin_run({})
        noise = np.random.default_rng(1).standard_normal((N, D)).astype("f")
        writer.write(np.arange(N), {"deep": features, "noise": noise}, np.array(digests))
    y, numbers = labels_of(features), number_of(features)
    with (folder / "table.csv").open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["uri", "parts", "weight", "constant", "site", *NAMES])
        for i in range(N):
            told = "|".join(name for name, has in zip(NAMES, y[i], strict=True) if has) or "|"
            table.writerow([rows.uris[i], told, repr(float(numbers[i])), 3, f"s{i // 6}", *y[i].astype(int)])
    return folder


def run(folder: Path, task: str, **options: Any) -> Any:
    target = {"multilabel": "parts", "regression": "weight"}[task]
    known = {"layers": ["deep"], "labels": folder / "table.csv", "target": target, "jobs": 1}
    return fit(folder / "cache.h5", task=task, **known | options)


@pytest.mark.parametrize(
    ("task", "cells", "message"),
    [
        ("regression", ["1", "2", "old"], "expected a number.*found 'old'.*task 'classification'"),
        ("regression", ["1", "2", "nan"], "expected a number.*found 'nan'"),
        ("regression", ["1", "2", "1_000"], "expected a number.*found '1_000'"),
        ("regression", ["1", "inf"], "expected a number.*found 'inf'"),
        ("regression", ["3", "", "3.0"], "is 3 for all images, so there is nothing to predict"),
        ("regression", ["", ""], "is empty for all images"),
        ("regression", ["1700000000", "1700000230"], "differ by 230 at most.*subtract a constant"),
        ("multilabel", ["a", "a|b", "b|a|b"], "expected at least two labels.*found 1"),
        ("multilabel", ["|", "|"], "expected at least two labels.*found 0"),
    ],
)
def test_cells_that_do_not_fit_their_task_are_refused(task: str, cells: list[str], message: str) -> None:
    with pytest.raises(TableError, match=message):
        read_answers(task, cells, "column 'x' of t.csv")


def test_labels_of_a_cell_are_told_apart_and_useless_ones_left_out() -> None:
    found = read_answers("multilabel", ["b| a", "", "|", "b|all", "all|caf\u00e9", "cafe\u0301|b"], "column 'x'")
    assert found.classes == ("a", "all", "b", "caf\u00e9")
    assert found.values is not None
    assert found.values.astype(int).tolist() == [
        [1, 0, 1, 0],
        [0, 0, 0, 0],
        [0, 0, 0, 0],
        [0, 1, 1, 0],
        [0, 1, 0, 1],
        [0, 0, 1, 1],
    ]
    assert (found.labels >= 0).tolist() == [True, False, True, True, True, True]
    found = read_answers("multilabel", ["a|x", "b|x", "x"], "column 'x'", ("a", "b", "never", "x"))
    assert found.classes == ("a", "b")
    assert found.notes == ("column 'x': labels that every image or no image has are left out: never, x",)


def test_a_class_column_that_looks_like_another_task_is_noted() -> None:
    numbers = read_answers("classification", [f"{i / 7}" for i in range(40)], "column 'age'")
    assert "if they are measurements, use task 'regression'" in numbers.notes[0]
    assert read_answers("classification", [str(i % 10) for i in range(40)], "column 'digit'").notes == ()
    assert "task 'multilabel'" in read_answers("classification", ["a|b", "a"], "column 'x'").notes[0]


def test_columns_of_0_and_1_say_the_same_as_labels_with_bars(folder: Path, tmp_path: Path) -> None:
    uris = np.array([f"{i:03d}.png" for i in range(N)])
    none = np.full(N, "")
    one = read_labels(folder / "table.csv", "parts", task="multilabel").join(uris, none, none)
    several = read_labels(folder / "table.csv", NAMES, task="multilabel").join(uris, none, none)
    assert one.classes == several.classes == NAMES
    np.testing.assert_array_equal(one.values, several.values)
    np.testing.assert_array_equal(one.labels, several.labels)
    path = tmp_path / "t.csv"
    path.write_text("uri,a,b\nx,1,\ny,yes,0\nz,FALSE,1\n")
    found = read_labels(path, ["a", "b"], task="multilabel").join(np.array(["x", "y", "z"]), *[np.full(3, "")] * 2)
    assert found.labels[0] == -1
    assert found.values is not None
    assert found.values[1:].tolist() == [[True, False], [False, True]]
    path.write_text("uri,a,b\nx,1,0\ny,2,0\n")
    with pytest.raises(TableError, match=r"expected 0 or 1 \(no or yes, .*\) in column 'a', found '2' in row 3"):
        read_labels(path, ["a", "b"], task="multilabel")
    path.write_text("uri,a|b,e\u0301\nx,1.0,0.0\ny,0,1\n")
    with pytest.raises(TableError, match="bars stand between labels; rename it"):
        read_labels(path, ["a|b", "e\u0301"], task="multilabel")
    path.write_text("uri,a,e\u0301\nx,1.0,0.0\ny,0,1\n")
    found = read_labels(path, ["a", "e\u0301"], task="multilabel").join(np.array(["x", "y"]), *[np.full(2, "")] * 2)
    assert found.classes == ("a", "\u00e9")
    path = tmp_path / "t.jsonl"
    path.write_text('{"uri": "x", "a ": 1, "b": 0}\n{"uri": "y", "a ": 0, "b": 1}\n')
    found = read_labels(path, ["a ", "b"], task="multilabel").join(np.array(["x", "y"]), *[np.full(2, "")] * 2)
    assert found.classes == ("a", "b")
    path = tmp_path / "t.csv"
    with pytest.raises(TableError, match="several columns are labels of task 'multilabel'"):
        read_labels(path, ["a", "b"], task="regression")


def test_splits_spread_rare_labels_evenly() -> None:
    rng = np.random.default_rng(0)
    shares = np.array([0.02, 0.05, 0.2, 0.5])
    values = rng.random((1000, 4)) < shares
    cells = ["|".join(np.array(list("abcd"))[row]) or "|" for row in values]
    strata = read_answers("multilabel", cells, "x").labels
    none = np.full(1000, "")
    digests = np.frombuffer(rng.bytes(16 * 1000), np.uint8).reshape(1000, 16)
    found = make_splits(strata, none, none, digests, seed=0, values=values, classes=list("abcd"))
    held = values[found.test].sum(axis=0) / values.sum(axis=0)
    assert np.abs(held - 0.2)[:2] == pytest.approx(0, abs=0.03)
    assert np.abs(held - 0.2)[2:] == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize("ties", [False, True])
def test_metrics_of_weighted_rows_are_scikit_learns(ties: bool) -> None:
    rng = np.random.default_rng(0)
    y = rng.random((60, 4)) < [0.1, 0.3, 0.5, 0.9]
    scores = y + rng.standard_normal(y.shape)
    scores = np.round(scores) if ties else scores
    weights = rng.integers(0, 3, (5, 60)).astype(float)
    found = average_precisions(y, scores, weights)
    predicted = scores > 0.5
    for draw, weight in enumerate(weights):
        kept = weight > 0
        for label in range(4):
            expected = average_precision_score(y[kept, label], scores[kept, label], sample_weight=weight[kept])
            assert found[draw, label] == pytest.approx(expected)
        for metric, average in (("macro_f1", "macro"), ("micro_f1", "micro")):
            mine = mean_known(rate_labels(metric, y, predicted, scores, None, weight[None]))[0]
            assert mine == pytest.approx(f1_score(y, predicted, average=average, sample_weight=weight, zero_division=0))
        truth, said = scores[:, 0], scores[:, 1] + y[:, 0]
        for metric, of_sklearn in (
            ("r2", r2_score),
            ("rmse", root_mean_squared_error),
            ("mae", mean_absolute_error),
        ):
            mine = rate_numbers(metric, truth, said, weight[None])[0]
            assert mine == pytest.approx(of_sklearn(truth, said, sample_weight=weight))
    assert mean_auroc(y, scores, None) == pytest.approx(roc_auc_score(y, scores))


def test_what_is_not_defined_is_not_a_number() -> None:
    y = np.array([[True, False, True], [True, False, False]])
    scores = np.array([[0.5, 0.5, 0.9], [0.1, 0.3, 0.1]])
    once = np.ones((1, 2))
    assert average_precisions(y, scores, once).tolist()[0][2] == 1
    assert np.isnan(average_precisions(y, scores, once)[0, :2]).all(), "all rows have the label, or none"
    assert np.isnan(rate_numbers("r2", np.ones(4), np.arange(4.0), np.ones((1, 4)))).all()
    for metric in METRICS_OF["regression"]:  # of several seeds, one may have no row in a test set that is drawn again
        assert np.isnan(rate_numbers(metric, np.arange(4.0), np.ones(4), np.zeros((1, 4)))).all()
    folds = np.array([0, 0, 1, 1])
    two = average_precisions(np.tile(y, (2, 1)), np.vstack([scores, scores + 5]), np.ones((1, 4)), folds)
    assert two[0, 2] == 1, "scores of different folds are not compared"


def test_thresholds_give_the_best_f1() -> None:
    rng = np.random.default_rng(0)
    y = rng.random((50, 3)) < 0.3
    y[:, 2] = False
    scores = np.round(y + rng.standard_normal(y.shape), 1)
    found = best_thresholds(y, scores, 0.25)
    assert found[2] == 0.25
    for label in range(2):
        cuts = [-np.inf, *np.unique(scores[:, label])]
        best = max(f1_score(y[:, label], scores[:, label] >= cut) for cut in cuts)
        assert f1_score(y[:, label], scores[:, label] >= found[label]) == pytest.approx(best)


@pytest.mark.parametrize(("task", "name"), OTHERS)
@pytest.mark.parametrize("wide", [False, True])
def test_a_step_predicts_what_the_final_head_does(task: str, name: str, wide: bool) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((90, 120 if wide else D)).astype("f")
    y = labels_of(x) if task == "multilabel" else number_of(x)
    family = FAMILIES_OF[task][name]
    params = family.grid(60)[len(family.grid(60)) // 2]
    scaled = scale("l2", x[:60].copy(), x[60:].copy(), rotated=wide and family.linear)
    step = next(iter(family.path([params], scaled.train, y[:60], scaled.held)))
    final = train_final(Head("", family, "l2"), params, scaled, y[:60]).estimator
    if task == "regression":
        np.testing.assert_allclose(final.predict(scaled.held), step.predicted, rtol=1e-4)
        return
    scores = step.probabilities if step.scores is None else step.scores()
    np.testing.assert_allclose(family.scores(final, scaled.held), scores, atol=2e-3)
    if name != "knn":  # whose own votes are not smoothed
        np.testing.assert_array_equal(final.predict(scaled.held).astype(bool), step.predicted)


@pytest.mark.parametrize("c", [0.1, 3.0])
def test_heads_of_several_labels_are_scikit_learns_for_each(features: np.ndarray, c: float) -> None:
    y = labels_of(features)
    y = np.column_stack([y, np.zeros(N, bool)])  # a label that no training row has
    features = features.astype(np.float64)
    families = FAMILIES_OF["multilabel"]
    logreg = families["logreg"].fit({"C": c}, features.astype("f"), y).estimator
    svm = families["linear_svm"].fit({"C": c}, features.astype("f"), y).estimator
    ridge = families["ridge"].fit({"alpha": 1 / c}, features, y).estimator
    for label in range(3):
        one = LogisticRegression(C=c, tol=1e-8, max_iter=1000).fit(features, y[:, label])
        np.testing.assert_allclose(logreg.estimators_[label].coef_, one.coef_, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(
            logreg.predict_proba(features)[:, label], one.predict_proba(features)[:, 1], atol=1e-4
        )
        margin = LinearSVC(C=c, tol=1e-8, max_iter=100_000).fit(features, y[:, label]).decision_function(features)
        np.testing.assert_allclose(svm.decision_function(features)[:, label], margin, rtol=0.01, atol=0.03)
        plain = RidgeClassifier(alpha=1 / c).fit(features, y[:, label])
        np.testing.assert_allclose(ridge.decision_function(features)[:, label], plain.decision_function(features))
    for estimator in (logreg, svm, ridge):
        assert not estimator.predict(features)[:, 3].any()


@pytest.mark.parametrize(
    ("task", "head"), [("multilabel", "logreg/l2"), ("multilabel", "ridge/standard"), ("regression", "ridge/l2")]
)
def test_rows_that_do_not_fit_into_memory_give_the_same_model(
    folder: Path, features: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, head: str
) -> None:
    monkeypatch.setattr(linear, "C_GRID", linear.C_GRID[12:25:6])
    whole = run(folder, task, heads=[head], save=tmp_path / "whole.skops")
    monkeypatch.setattr(memory, "free_memory", lambda: 1000)
    monkeypatch.setattr(blocks, "_CELLS_READ", D * 40)
    streamed = run(folder, task, heads=[head], save=tmp_path / "streamed.skops")
    assert any("read from the cache in each pass" in note for note in streamed.notes)
    one, other = whole.results[0], streamed.results[0]
    assert other.params == one.params
    assert other.validation_score == pytest.approx(one.validation_score, rel=1e-6)
    np.testing.assert_allclose(streamed.predictions[0].y_pred, whole.predictions[0].y_pred, rtol=1e-5)
    models = [load_model(tmp_path / f"{name}.skops") for name in ("whole", "streamed")]
    np.testing.assert_allclose(*(model.predict_values(features) for model in models), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "params"), [("logreg", {"C": 3.0}), ("ridge", {"alpha": 0.1})])
def test_streamed_rows_of_a_label_that_none_or_all_have(
    features: np.ndarray, name: str, params: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "_CELLS_READ", D * 40)
    y = np.column_stack([labels_of(features), np.zeros(N, bool), np.ones(N, bool)])
    rows = blocks.StreamedRows(lambda index: features[index].copy(), D, np.arange(N))
    family = FAMILIES_OF["multilabel"][name]
    one, other = (family.scores(family.fit(params, x, y).estimator, features) for x in (features, rows))
    np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-5)


def test_a_regression_is_scikit_learns_ridge_of_scaled_rows(folder: Path, features: np.ndarray, tmp_path: Path) -> None:
    report = run(folder, "regression", heads=["ridge"], save=tmp_path / "m.skops")
    result, found = report.results[0], report.predictions[0]
    test = np.array([int(uri[:3]) for uri in found.uris])
    x = Normalizer().fit_transform(features.astype(float))
    rest = np.setdiff1d(np.arange(N), test)
    oracle = Ridge(**result.params).fit(x[rest], number_of(features)[rest])
    np.testing.assert_allclose(found.y_pred, oracle.predict(x[test]), rtol=1e-4)
    assert result.r2 == pytest.approx(r2_score(number_of(features)[test], found.y_pred))
    assert result.r2_ci95[0] < result.r2 < result.r2_ci95[1]
    assert result.rmse_ci95[0] < result.rmse < result.rmse_ci95[1]
    assert (result.n_train, result.n_val, result.n_test) == (150, 40, 50)
    assert from_json(type(result), json.loads(json.dumps(to_json(result)))) == result
    saved = load_model(tmp_path / "m.skops")
    np.testing.assert_allclose(saved.predict_values(features[test]), found.y_pred, rtol=1e-5)
    in_graph = HeadScores(saved, half=False)(torch.from_numpy(features[test])).numpy()
    np.testing.assert_allclose(in_graph[:, 0], found.y_pred, rtol=1e-4)


def test_labels_are_predicted_from_thresholds_of_validation_rows(
    folder: Path, features: np.ndarray, tmp_path: Path
) -> None:
    report = run(folder, "multilabel", save=tmp_path / "m.skops")
    result, found = report.results[0], report.predictions[0]
    assert (report.classes, result.head, result.metric) == (NAMES, "logreg/l2", "average_precision")
    assert found.probabilities is not None
    expected = average_precision_score(found.y_true, found.probabilities, average="macro")
    assert result.average_precision == pytest.approx(expected)
    assert result.macro_f1 == pytest.approx(f1_score(found.y_true, found.y_pred, average="macro"))
    thresholds = np.array([one.threshold for one in result.labels])
    np.testing.assert_array_equal(found.y_pred, found.probabilities >= thresholds)
    assert [one.positives for one in result.labels] == found.y_true.sum(axis=0).tolist()
    for one in result.labels:
        low, high = one.average_precision_ci95 or (1, 1)  # without a mistake there is no interval
        assert low <= (one.average_precision or 2) <= high
    assert any(one.average_precision_ci95 for one in result.labels)
    assert from_json(type(result), json.loads(json.dumps(to_json(result)))) == result
    saved = load_model(tmp_path / "m.skops")
    assert (saved.task, saved.thresholds) == ("multilabel", thresholds.tolist())
    test = np.array([int(uri[:3]) for uri in found.uris])
    np.testing.assert_allclose(saved.predict_values(features[test]), found.probabilities, atol=1e-6)
    in_graph = HeadScores(saved, half=False)(torch.from_numpy(features[test])).numpy()
    np.testing.assert_allclose(expit(in_graph), found.probabilities, atol=1e-4)


@pytest.mark.parametrize("task", ["multilabel", "regression"])
def test_a_useless_layer_is_told_from_a_good_one(task: str, folder: Path) -> None:
    report = run(folder, task, heads=["ridge/l2", "ridge/standard"], layers=["deep", "noise"])
    results = report.results
    assert results[report.best].layer == "deep"
    assert results[report.best].in_best_set
    for bad in (one for one in results if one.layer == "noise"):
        assert not bad.in_best_set
        assert bad.p_vs_best is not None
        assert bad.p_vs_best < 0.01
    assert sum(one.p_vs_best is None for one in results) == 1


def test_equal_models_are_told_apart_in_at_most_five_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.evaluation.bootstrap.MOST_DRAWS", 199)
    rng = np.random.default_rng(0)
    found, uris = [], np.array([f"{i}" for i in range(60)])
    for _ in range(60):
        y = rng.random((60, 2)) < [0.12, 0.4]
        models = [
            redraw_labels("average_precision", [Predictions(uris, y, y, None, scores=y + rng.standard_normal(y.shape))])
            for _ in range(3)
        ]
        compared = compare_redrawn(models, 0)
        assert compared is not None
        p_values, best = compared
        found.append([min(p for p in p_values if p is not None) <= 0.05, not best.all()])
    assert (np.mean(found, axis=0) <= 0.05 + 2 * 0.028).all(), "two standard errors of 60 simulations"


@pytest.mark.parametrize("groups", [2, 3, 6])
def test_few_groups_tell_equal_models_apart_in_at_most_five_percent(groups: int) -> None:
    rng = np.random.default_rng(0)
    uris, names = np.arange(4 * groups).astype(str), np.repeat(np.arange(groups), 4).astype(str)
    found = []
    for _ in range(60):
        y, errors = np.zeros(4 * groups), rng.standard_normal((9, groups))
        models = [redraw_numbers("mae", [Predictions(uris, y, np.repeat(e, 4), None, groups=names)]) for e in errors]
        compared = compare_redrawn(models, 0)
        assert compared is not None
        found.append([min(p for p in compared[0] if p is not None) <= 0.05, not compared[1].all()])
    assert (np.mean(found, axis=0) <= 0.05 + 2 * 0.028).all(), "two standard errors of 60 simulations"


def test_no_interval_reaches_beyond_what_a_metric_can_be() -> None:
    y, uris = np.arange(12.0), np.arange(12).astype(str)
    groups = np.repeat(["a", "b", "c"], 4)
    said = Predictions(uris, y, y + np.repeat([0.1, 0.5, 2.0], 4), None, groups=groups)
    for less, (low, high) in (("rmse", (0.0, np.inf)), ("mae", (0.0, np.inf)), ("r2", (-np.inf, 1.0))):
        ends = redraw_numbers(less, [said]).interval()
        assert ends is not None
        free = replace(redraw_numbers(less, [said]), bounds=(-np.inf, np.inf)).interval()
        assert free is not None
        assert free[0] < low or free[1] > high, "three groups tell too little"
        assert ends == (max(low, free[0]), min(high, free[1]))


def test_the_mean_over_seeds_has_an_interval_and_rows_of_all_seeds_are_drawn_together(folder: Path) -> None:
    report = run(folder, "regression", heads=["ridge", "knn"], seeds=[0, 1, 2], metric="mae")
    summary = {one.head: one for one in report.summary}["ridge/l2"]
    values = [one.mae for one in report.results if one.head == "ridge/l2"]
    assert (summary.metric, summary.seeds, summary.shared_test) == ("mae", 3, False)
    assert summary.mean == pytest.approx(np.mean(values))
    assert summary.ci95[0] < summary.mean < summary.ci95[1]
    assert (summary.lowest, summary.highest) == (min(values), max(values))
    assert report.results[0].validation_score > 0
    assert report.results[report.best].validation_score == min(one.validation_score for one in report.results)
    assert {one.head for one in report.summary if one.in_best_set} == {"ridge/l2"}


@pytest.mark.parametrize("task", ["multilabel", "regression"])
def test_with_cross_validation_every_row_is_tested_once(task: str, folder: Path) -> None:
    report = run(folder, task, cv=3, heads=["ridge"])
    found = report.predictions[0]
    assert found.uris.tolist() == [f"{i:03d}.png" for i in range(N)]
    assert np.bincount(found.folds).min() >= N // 3 - 2


def test_rows_of_groups_count_together(features: np.ndarray) -> None:
    y = number_of(features)[:60]
    uris = np.array([f"{i}" for i in range(60)])
    groups = np.array([f"g{i // 10}" for i in range(60)])
    off = np.repeat(np.random.default_rng(0).standard_normal(6), 10)
    alone = measure_numbers(Predictions(uris, y, y + off, None))
    together = measure_numbers(Predictions(uris, y, y + off, None, groups=groups))
    assert (alone["n_groups"], together["n_groups"]) == (60, 6)
    width = [ends["rmse_ci95"][1] - ends["rmse_ci95"][0] for ends in (alone, together)]
    assert width[1] > 2 * width[0]


def test_scores_of_more_labels_than_memory_holds_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.heads.parallel.MOST_CELLS", 100)
    with pytest.raises(FitError, match=r"ridge/l2 for 3 labels would need a table of .* GiB; use coarser labels"):
        run(folder, "multilabel", heads=["ridge"], metric="macro_f1")


def test_test_sets_that_cannot_differ_tell_nothing(folder: Path, tmp_path: Path) -> None:
    same = np.full(1999, 0.5)
    model = Redrawn(0.5, same, same[:, None], np.array([9.0]), (0.0, 1.0))
    assert model.interval() is None
    assert compare_redrawn([model, model], 0) is None
    lines = (folder / "table.csv").read_text().splitlines()
    rows = [
        f"{line},{'test' if i < 60 else 'train'},{'one' if i < 60 else f'g{i}'}" for i, line in enumerate(lines[1:])
    ]
    (tmp_path / "t.csv").write_text("\n".join([f"{lines[0]},split,group", *rows]))
    for task in ("regression", "multilabel"):
        report = run(folder, task, labels=tmp_path / "t.csv", heads=["ridge", "knn"])
        for one in report.results:
            assert (one.n_test, one.n_groups) == (60, 1)
            assert getattr(one, f"{one.metric}_ci95") is None
            assert (one.p_vs_best, one.in_best_set) == (None, None)


def test_a_label_that_one_seed_does_not_test_leaves_the_mean_over_seeds_right() -> None:
    rng = np.random.default_rng(0)
    seeds = []
    for seed in range(2):
        y = rng.random((80, 2)) < 0.4
        y[:, 1] &= seed == 0
        uris = np.array([f"{seed}-{i}" for i in range(80)])
        seeds.append(Predictions(uris, y, y, None, scores=y + rng.standard_normal(y.shape)))
    both = redraw_labels("average_precision", seeds)
    alone = [redraw_labels("average_precision", [one]).observed for one in seeds]
    assert both.observed == pytest.approx(np.mean(alone))
    low, high = both.interval() or (1, 0)
    assert low + 0.02 < both.observed < high - 0.02


def test_large_test_sets_are_drawn_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.evaluation.bootstrap._MOST_CELLS", 100 * 3 * 500)
    y = np.random.default_rng(0).random((100, 3)) < 0.3
    uris = np.array([f"{i}" for i in range(100)])
    assert len(redraw_labels("macro_f1", [Predictions(uris, y, ~y, None, scores=y * 1.0)]).draws) == 500


def test_the_area_under_the_curve_is_a_mean_over_folds_of_each_label() -> None:
    y = np.array([[1, 0], [0, 1], [1, 0], [0, 0]], bool)
    scores = np.array([[0.9, 0.1], [0.1, 0.8], [0.2, 0.3], [0.7, 0.4]])
    assert mean_auroc(y, scores, np.array([0, 0, 1, 1])) == pytest.approx(np.mean([np.mean([1, 0]), 1]))


@pytest.mark.parametrize("head", FAMILIES_OF["regression"])
@pytest.mark.parametrize(("scale", "shift"), [(1e-4, 0.0), (1e4, 0.0), (1.0, 1e4)])
def test_numbers_are_predicted_as_well_in_any_unit(features: np.ndarray, head: str, scale: float, shift: float) -> None:
    family, y = FAMILIES_OF["regression"][head], number_of(features)
    params = family.grid(100)[len(family.grid(100)) // 2]
    plain, other = (family.fit(params, features[:150], given[:150]).estimator for given in (y, scale * y + shift))
    found = (other.predict(features[150:]) - shift) / scale
    np.testing.assert_allclose(found, plain.predict(features[150:]), atol=0.05 * y.std())


@pytest.mark.parametrize("metric", ["mae", "rmse", "r2"])
def test_models_of_numbers_are_chosen_and_compared_alike_in_any_unit(metric: str, folder: Path, tmp_path: Path) -> None:
    with (folder / "table.csv").open() as stream:
        lines = [(row["uri"], float(row["weight"])) for row in csv.DictReader(stream)]
    (tmp_path / "t.csv").write_text("\n".join(["uri,weight", *(f"{uri},{1e-12 * number!r}" for uri, number in lines)]))
    options = {"metric": metric, "heads": ["ridge", "knn"], "layers": ["deep", "noise"], "seeds": [0, 1]}
    plain = run(folder, "regression", **options)
    tiny = run(folder, "regression", labels=tmp_path / "t.csv", **options)
    unit = 1.0 if metric == "r2" else 1e-12
    for one, other in zip(plain.results + plain.summary, tiny.results + tiny.summary, strict=True):
        assert one.in_best_set == other.in_best_set
        assert one.p_vs_best == other.p_vs_best
    for one, other in zip(plain.results, tiny.results, strict=True):
        assert one.params == other.params
        assert getattr(other, metric) == pytest.approx(unit * getattr(one, metric), rel=1e-3)
        assert getattr(other, f"{metric}_ci95") == pytest.approx(
            unit * np.array(getattr(one, f"{metric}_ci95")), rel=1e-2
        )


def test_training_rows_that_say_nothing_are_refused_or_told(folder: Path, tmp_path: Path) -> None:
    head = "uri,n,said,split\n"
    rows = [
        f"{i:03d}.png,{5 if i % 2 else i},{'a|b' if i % 4 else 'c'},{'train' if i % 2 else 'test'}" for i in range(N)
    ]
    (tmp_path / "t.csv").write_text(head + "\n".join(rows))
    for stage in (fit, rank):
        with pytest.raises(FitError, match="training rows have the number 5"):
            stage(folder / "cache.h5", labels=tmp_path / "t.csv", target="n", task="regression")
    notes = run(folder, "multilabel", labels=tmp_path / "t.csv", target="said", heads=["ridge"]).notes
    assert "labels without a training row: c" in notes


def test_a_model_of_another_task_predicts_no_class(folder: Path, features: np.ndarray, tmp_path: Path) -> None:
    run(folder, "regression", save=tmp_path / "m.skops")
    with pytest.raises(ModelFileError, match="predicts no class; use predict_values"):
        load_model(tmp_path / "m.skops").predict(features)


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("regression", {"shots": [5]}, "shots is only for classes; leave it out for regression"),
        ("multilabel", {"balanced": True}, "balanced is only for classes"),
        (
            "regression",
            {"metric": "accuracy"},
            "expected a metric for regression, one of r2, rmse, mae; got 'accuracy'",
        ),
        ("multilabel", {"heads": ["rbf_svm"]}, "no head named 'rbf_svm' for multilabel; there are logreg"),
        ("regression", {"heads": ["logreg"]}, "no head named 'logreg' for regression; there are ridge, svr, knn"),
        ("regression", {"target": "constant"}, "is 3 for all images"),
        ("regression", {"target": "parts"}, "expected a number"),
        ("regression", {"labels": None, "target": None}, "is empty for all images"),
        ("classification", {"target": list(NAMES)}, "several columns are labels"),
        ("clustering", {}, "task: expected one of classification, multilabel, regression"),
    ],
)
def test_what_does_not_fit_the_task_is_refused(task: str, options: dict[str, Any], message: str, folder: Path) -> None:
    known = {"labels": folder / "table.csv", "target": "weight"}
    with pytest.raises((FitError, TableError), match=message):
        fit(folder / "cache.h5", ["deep"], task=task, **known | options)


def test_a_table_that_was_read_for_another_task_is_refused(folder: Path) -> None:
    table = read_labels(folder / "table.csv", "weight")
    with pytest.raises(TableError, match="was read for task 'classification'"):
        fit(folder / "cache.h5", ["deep"], task="regression", labels=table)


def test_the_command_prints_metrics_and_labels_and_draws(folder: Path, tmp_path: Path, thawline: Thawline) -> None:
    asked = ("fit", folder / "cache.h5", "-l", "deep", "-l", "noise", "--labels", folder / "table.csv", "--jobs", 1)
    shown = thawline(*asked, "--task", "regression", "--target", "weight", "--plot", tmp_path)
    assert "R²" in shown.stdout
    assert "validation r2" not in shown.stdout, "nothing was saved"
    several = [part for name in NAMES for part in ("--target", name)]
    shown = thawline(*asked, "--task", "multilabel", *several, "--plot", tmp_path)
    assert "target fur, legs, wings" in shown.stdout
    assert "labels by logreg/l2 on deep" in shown.stdout
    names = {path.stem for path in tmp_path.glob("*.png")}
    assert names == {"residuals", "labels", "depth"}
    document = thawline(*asked, "--task", "multilabel", "--target", "parts", "--json", "--seed", 0, "--seed", 1).json
    assert {one["label"] for one in document["results"][0]["labels"]} == set(NAMES)
    assert document["summary"][0]["metric"] == "average_precision"


@pytest.mark.parametrize(("task", "same", "drawn"), [("multilabel", "a", set()), ("regression", "3", {"residuals"})])
@pytest.mark.parametrize("seeds", [1, 2])
def test_what_test_rows_cannot_tell_is_not_drawn(
    task: str, same: str, drawn: set[str], seeds: int, folder: Path, tmp_path: Path, thawline: Thawline
) -> None:
    said = [same if i % 5 == 0 else ("a|b", "b", "a")[i % 3] if task == "multilabel" else i for i in range(N)]
    rows = [f"{i:03d}.png,{said[i]},{'train' if i % 5 else 'test'}" for i in range(N)]
    (tmp_path / "t.csv").write_text("\n".join(["uri,t,split", *rows]))
    asked = ("fit", folder / "cache.h5", "-l", "deep", "-l", "noise", "--labels", tmp_path / "t.csv", "--jobs", 1)
    numbers = [part for seed in range(seeds) for part in ("--seed", seed)]
    shown = thawline(*asked, *numbers, "--target", "t", "--task", task, "--head", "ridge", "--plot", tmp_path)
    assert ("nothing is drawn: each label is on all test images" in shown.stderr) is (not drawn)
    assert {path.stem for path in tmp_path.glob("*.png")} == drawn


@pytest.mark.parametrize("task", ["multilabel", "regression"])
def test_rank_puts_the_layer_first_that_tells_the_target(
    task: str, folder: Path, features: np.ndarray, thawline: Thawline
) -> None:
    target = "parts" if task == "multilabel" else "weight"
    known = {"labels": folder / "table.csv", "target": target, "task": task}
    first, second = rank(folder / "cache.h5", fitted=True, **known).ranking
    assert (first.layer, second.layer) == ("deep", "noise")
    assert (first.h_score, first.leep, first.accuracy) == (None, None, None)
    assert first.test_score is not None
    assert first.test_score == getattr(run(folder, task).results[0], first.metric)
    shown = thawline("rank", folder / "cache.h5", "--labels", folder / "table.csv", "--target", target, "--task", task)
    assert "H-score" not in shown.stdout


@pytest.mark.parametrize("changed", [{"thresholds": [0.5]}, {"thresholds": None}, {"task": "clustering"}])
def test_a_forged_task_is_refused(changed: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    run(folder, "multilabel", heads=["ridge"], save=tmp_path / "m.skops")
    saved = load_model(tmp_path / "m.skops")
    save_model(tmp_path / "f.skops", type(saved)(**vars(saved) | changed))
    with pytest.raises(ModelFileError, match="does not say its task, thresholds"):
        load_model(tmp_path / "f.skops")


@pytest.fixture(scope="module")
def photos(write_photos: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of two colours, and a table that says what they show."""
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder / "photos", ("bright", "dark"), each=12)
    rows = ["uri,said,number"]
    for name, told in (("bright", ("light|even", "light")), ("dark", ("even", "|"))):
        rows += [f"{name}/{i}.png,{told[i % 2]},{100 * (name == 'bright') + i}" for i in range(12)]
    (folder / "table.csv").write_text("\n".join(rows))
    return folder


@pytest.mark.parametrize(
    ("task", "head"), [("regression", "ridge"), ("multilabel", "logreg"), ("multilabel", "knn"), ("regression", "knn")]
)
def test_new_photos_get_numbers_or_labels(
    task: str, head: str, photos: Path, tmp_path: Path, thawline: Thawline
) -> None:
    extract(photos / "photos", [TINY], ["layer1"], output=tmp_path / "cache", size=32, engine="torch")
    target = "number" if task == "regression" else "said"
    model = tmp_path / "m.skops"
    known = {"labels": photos / "table.csv", "target": target, "task": task, "save": model, "jobs": 1}
    report = fit(tmp_path / "cache", heads=[head], **known)
    found = {one.uri: one for one in predict(model, photos / "photos", tmp_path / "cache", engine="torch").predictions}
    shown = thawline(
        "predict", model, photos / "photos", "-o", tmp_path / "cache", "--engine", "torch", "--csv", tmp_path / "p.csv"
    )
    assert shown.returncode == 0, shown.stderr
    written = {row["uri"]: row for row in csv.DictReader((tmp_path / "p.csv").read_text().splitlines())}
    tested = report.predictions[0]
    for index, uri in enumerate(tested.uris.tolist()):
        one = found[uri]
        if task == "regression":
            assert one.value == pytest.approx(tested.y_pred[index], rel=1e-4)
            assert float(written[uri]["value"]) == one.value
            assert one.label is None
        else:
            names = [name for name, has in zip(report.classes, tested.y_pred[index], strict=True) if has]
            assert one.label == ("|".join(names) or "|")
            assert one.scores is not None
            assert float(written[uri][f"score:{report.classes[0]}"]) == one.scores[report.classes[0]]


@pytest.mark.parametrize(("top", "lr"), [("linear", 0.02), ("hidden", 0.005), ("direct", 0.001)])
@pytest.mark.parametrize("task", ["multilabel", "regression"])
def test_a_network_is_fine_tuned_on_labels_or_numbers(
    task: str, top: str, lr: float, photos: Path, tmp_path: Path
) -> None:
    target = "number" if task == "regression" else "said"
    known = {"labels": photos / "table.csv", "target": target, "task": task, "save": tmp_path / "m.safetensors"}
    report = finetune(
        photos / "photos", TINY, top=top, epochs=20, patience=20, lr=lr, size=32, engine="torch", device="cpu",
        output=tmp_path / "cache", **known
    )  # fmt: skip
    result, found = report.results[0], report.predictions[0]
    assert from_json(type(result), json.loads(json.dumps(to_json(result)))) == result
    predicted = {one.uri: one for one in predict(known["save"], photos / "photos", engine="torch").predictions}
    if task == "regression":
        assert result.r2 == pytest.approx(r2_score(found.y_true, found.y_pred))
        assert result.r2 > 0.5, "colours tell most of the number"
        said = [predicted[uri].value for uri in found.uris.tolist()]
        np.testing.assert_allclose(said, found.y_pred, rtol=1e-3)
    else:
        assert found.probabilities is not None
        np.testing.assert_array_equal(found.y_pred, found.probabilities >= [one.threshold for one in result.labels])
        assert {one.label: one.f1 for one in result.labels}["light"] == 1
        said = [list((predicted[uri].scores or {}).values()) for uri in found.uris.tolist()]
        np.testing.assert_allclose(said, found.probabilities, atol=1e-3)
    losses = [epoch["valid_loss"] for epoch in result.history]
    assert result.params["best_epoch"] == 1 + int(np.argmin(losses))
    assert min(losses) < losses[0]


@pytest.mark.parametrize("option", [{"class_weights": True}, {"label_smoothing": 0.1}, {"shots": [2]}])
def test_training_options_for_classes_are_refused_for_others(option: dict[str, Any], photos: Path) -> None:
    with pytest.raises(FitError, match=f"{next(iter(option))} is only for classes"):
        finetune(photos / "photos", TINY, labels=photos / "table.csv", target="number", task="regression", **option)


def test_objectives_of_labels_and_numbers_are_torchs() -> None:
    rng = torch.Generator().manual_seed(0)
    outputs = torch.randn(6, 3, generator=rng)
    labels = torch.rand(6, 3, generator=rng) < 0.5
    expected = torch.nn.BCEWithLogitsLoss()(outputs, labels.float()) * 3
    torch.testing.assert_close(Labels()(outputs, labels), expected)
    numbers = 100 + 10 * torch.randn(6, generator=rng, dtype=torch.float64)
    expected = torch.nn.MSELoss()(outputs[:, :1] * 10 + 100, numbers[:, None].float()) / 100
    torch.testing.assert_close(Numbers(100, 10)(outputs[:, :1], numbers), expected)
