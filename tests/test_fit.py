from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import cohen_kappa_score, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler, normalize
from threadpoolctl import threadpool_limits

from features_cache import AmbiguousCacheError, CacheError, CacheWriter, Catalog, LayerInfo, Rows, scratch_folder
from pipeline.errors import FitError, ModelFileError
from pipeline.evaluation.calibration import fit_temperature
from pipeline.evaluation.comparisons import may_be_best
from pipeline.evaluation.intervals import corrected_t_test, effective_rows, mcnemar, number_clusters, wilson
from pipeline.evaluation.metrics import expected_calibration_error, log_loss
from pipeline.evaluation.rows import Layer
from pipeline.evaluation.seeds import pool_seeds
from pipeline.fit import fit
from pipeline.heads import linear, memory, parallel
from pipeline.heads.registry import FAMILIES
from pipeline.heads.saved import load_model
from pipeline.heads.solvers import blocks
from pipeline.heads.trial import TrialOutcome
from pipeline.reporting.terminal.tables import fit_table
from pipeline.results import to_json

ROOT = Path(__file__).resolve().parents[1]
CLASSES = ("ape", "bee", "cat")
DIMS = {"low": 6, "top": 200}
Make = Callable[..., Path]


def clouds(labels: np.ndarray, dim: int, noise: float = 1.0, seed: int = 0) -> np.ndarray:
    """Features around one point a class."""
    rng = np.random.default_rng(seed)
    return (1.2 * rng.standard_normal((3, dim))[labels] + noise * rng.standard_normal((len(labels), dim))).astype("f")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Two threads on a busy machine wait for each other most of the time."""
    with threadpool_limits(1):
        yield


@pytest.fixture
def make_cache(tmp_path: Path) -> Make:
    """Write a cache file of n rows; see the arguments."""

    def make(
        n: int = 90,
        name: str = "cache/file.h5",
        dims: dict[str, int] = DIMS,
        labels: Any = None,
        splits: Sequence[str] | None = None,
        images: Sequence[int] | None = None,
        uris: Sequence[str] | None = None,
        dtype: str = "float32",
        backbone: str = "net",
        unreadable: Sequence[int] = (),
        pending: Sequence[int] = (),
        features: dict[str, np.ndarray] | None = None,
        classes: Sequence[str] = CLASSES,
        groups: Sequence[str] | None = None,
        source: str = "photos",
    ) -> Path:
        labels = np.arange(n) % 3 if labels is None else np.asarray(labels)
        layers = [
            LayerInfo(key, dim, dtype, {"layer": key, "pool": "avg"}, f"{backbone}{key}") for key, dim in dims.items()
        ]
        zeros = np.zeros(n, np.int64)
        rows = Rows(
            uris or [f"{i:03d}.png" for i in range(n)],
            labels.astype(np.int64),
            splits or [""] * n,
            groups or [""] * n,
            zeros,
            zeros,
        )
        handles = {"source": source, "backbone": backbone, "pool": "avg"}
        request = {"backbone": backbone, "layers": list(dims), "pool": "avg", "size": None, "precision": "auto"}
        request["aliases"] = {"stages": list(dims)}
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        digests = np.frombuffer(
            b"".join(hashlib.blake2b(b"%d" % i, digest_size=16).digest() for i in (images or range(n))), np.uint8
        ).reshape(n, 16)
        done = np.setdiff1d(np.arange(n), [*unreadable, *pending])
        values = features or {key: clouds(labels, dim, seed=dim) for key, dim in dims.items()}
        with CacheWriter.create(path, rows, classes, layers, handles, request) as writer:
            writer.begin_run({})
            writer.write(done, {key: value[done] for key, value in values.items()}, digests[done])
            for row in unreadable:
                writer.fail(row, "truncated", digests[row])
        return path

    return make


def test_one_result_a_cell_in_the_order_layers_heads_seeds_shots(make_cache: Make) -> None:
    calls = []
    report = fit(
        make_cache(),
        heads=["centroid", "knn/none"],
        seeds=[0, 3],
        shots=["all", 4],
        jobs=1,
        progress=lambda *call: calls.append(call),
    )
    cells = [(r.layer, r.head, r.seed, r.shots) for r in report.results]
    assert cells == [
        (layer, head, seed, shots)
        for layer in DIMS
        for head in ("centroid/l2", "knn/none")
        for seed in (0, 3)
        for shots in ("all", 4)
    ]
    assert calls == [(done, 16, "fit") for done in range(1, 17)]
    assert len(report.predictions) == 16
    assert report.saved is None


def test_what_was_said_of_test_rows_is_held_once(make_cache: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes: weakref.WeakSet[TrialOutcome] = weakref.WeakSet()

    def noted(outcome: TrialOutcome, **changes: Any) -> TrialOutcome:
        outcomes.add(changed := replace(outcome, **changes))
        return changed

    monkeypatch.setattr(parallel, "replace", noted)
    alive: list[int] = []
    fit(make_cache(), ["low"], seeds=[0, 1], cv=3, jobs=1, on_result=lambda *_: alive.append(len(outcomes)))
    assert alive == [3, 3], "the predictions of a result's folds, and of no other result"


@pytest.mark.parametrize("head", FAMILIES)
def test_parameters_are_chosen_by_the_metric_that_is_named(head: str, make_cache: Make) -> None:
    labels = np.arange(120) % 3
    path = make_cache(120, features={"low": clouds(labels, 6, noise=3.0)}, dims={"low": 6})
    report = fit(path, heads=[head], metric="auroc", jobs=1)
    (result,), (found,) = report.results, report.predictions
    scores = found.scores if found.probabilities is None else found.probabilities
    expected = [roc_auc_score(found.y_true == label, scores[:, label]) for label in range(3)]
    assert result.auroc == pytest.approx(np.mean(expected))
    assert (result.metric, result.validation_accuracy) == ("auroc", None)
    assert result.validated == result.validation_score
    assert 0.5 < result.validation_score < 1
    plain = fit(path, heads=[head], jobs=1).results[0]
    assert plain.validation_score == plain.validation_accuracy
    assert plain.kappa == pytest.approx(cohen_kappa_score(*labels_of_fit(path, head)))


def labels_of_fit(path: Path, head: str) -> tuple[np.ndarray, np.ndarray]:
    (found,) = fit(path, heads=[head], jobs=1).predictions
    return found.y_true, found.y_pred


def test_the_best_validation_metric_is_what_was_chosen(make_cache: Make) -> None:
    """Every value of C on the same rows, by scikit-learn: the chosen one has the largest AUROC on validation rows."""
    labels = np.arange(150) % 2
    rows = clouds(labels, 6, noise=4.0)
    given = ["train", "train", "val", "val", "test"] * 30
    path = make_cache(150, features={"low": rows}, dims={"low": 6}, labels=labels, splits=given, classes=("ape", "bee"))
    result = fit(path, heads=["ridge/none"], metric="auroc", jobs=1).results[0]
    train, val = (np.array(given) == part for part in ("train", "val"))
    found = [
        roc_auc_score(labels[val], Ridge(alpha=1 / c).fit(rows[train], labels[train]).predict(rows[val]))
        for c in np.logspace(-6, 5, 45)
    ]
    assert result.validation_score == pytest.approx(max(found), abs=1e-6)


def test_top5_needs_ten_classes_and_an_unknown_metric_is_named(make_cache: Make) -> None:
    path = make_cache()
    with pytest.raises(FitError, match="for 10 classes or more, got 3"):
        fit(path, metric="top5_accuracy")
    with pytest.raises(FitError, match="did you mean accuracy"):
        fit(path, metric="acuracy")


def test_keys_of_a_result_are_the_contract(make_cache: Make) -> None:
    result = to_json(fit(make_cache(), ["low"], ["ridge"]).results[0])
    shared = (
        "kind backbone layer pool head params seed shots n_train n_val n_test seconds converged cv n_pool n_groups "
    )
    shared += "target metric validation_score p_vs_best in_best_set columns"
    own = "accuracy accuracy_ci95 mean_per_class_accuracy macro_f1 log_loss ece balanced temperature "
    own += "log_loss_calibrated ece_calibrated validation_accuracy n_effective validation_log_loss leak_price "
    own += "kappa top5_accuracy auroc average_precision"
    assert " ".join(result) == f"{shared} {own}"
    expected = {"kind": "head", "backbone": "net", "layer": "low", "pool": "avg", "head": "ridge/l2", "seed": 0}
    assert expected.items() <= result.items()
    assert result["shots"] == "all"
    assert (result["n_train"], result["n_val"], result["n_test"]) == (57, 15, 18)
    assert result["log_loss"] is None
    assert result["ece"] is None
    assert result["seconds"] > 0
    assert result["converged"] is True


@pytest.mark.parametrize("layer", ["low", "top"])
@pytest.mark.parametrize(("head", "scaler"), [("logreg", Normalizer()), ("logreg/standard", StandardScaler())])
def test_a_fit_is_a_logistic_regression_of_scaled_rows_chosen_on_val_and_refitted(
    make_cache: Make, layer: str, head: str, scaler: Normalizer | StandardScaler
) -> None:
    names = (["train"] * 60 + ["val"] * 15 + ["test"] * 45) * 2
    labels = np.arange(240) % 3
    values = {key: clouds(labels, dim, noise=2.5 * dim**0.4, seed=dim) for key, dim in DIMS.items()}
    report = fit(make_cache(240, splits=names, features=values), [layer], [head])
    result, found = report.results[0], report.predictions[0]
    parts = {name: np.flatnonzero(np.array(names) == name) for name in ("train", "val", "test")}
    x = values[layer].astype(float)

    def model(rows: np.ndarray, c: float) -> Any:
        return make_pipeline(scaler, LogisticRegression(C=c, tol=1e-6, max_iter=5000)).fit(x[rows], labels[rows])

    def right(c: float) -> float:
        return float(model(parts["train"], c).score(x[parts["val"]], labels[parts["val"]]))

    assert right(result.params["C"]) >= max(right(c) for c in np.logspace(-6, 5, 45)[::4])
    oracle = model(np.concatenate([parts["train"], parts["val"]]), result.params["C"])
    assert (found.y_pred == oracle.predict(x[parts["test"]])).mean() > 0.985
    assert found.probabilities is not None
    assert found.probabilities.max(axis=1) == pytest.approx(
        oracle.predict_proba(x[parts["test"]]).max(axis=1), abs=0.01
    )
    assert found.y_true.tolist() == labels[parts["test"]].tolist()
    assert found.uris.tolist() == [f"{i:03d}.png" for i in parts["test"]]
    assert result.accuracy == pytest.approx((found.y_pred == found.y_true).mean())
    assert result.accuracy_ci95 == wilson(int((found.y_pred == found.y_true).sum()), 90)
    assert (result.n_train, result.n_val, result.n_test) == (120, 30, 90)
    assert 0.4 < result.accuracy < 1
    assert report.classes == CLASSES


@pytest.mark.parametrize("head", FAMILIES)
def test_every_head_beats_chance_and_saves_what_it_reports(make_cache: Make, tmp_path: Path, head: str) -> None:
    path = make_cache()
    report = fit(path, ["top"], [head], save=tmp_path / "model.skops")
    model = load_model(tmp_path / "model.skops")
    found = report.predictions[0]
    rows = np.flatnonzero(np.isin(Catalog(path).files[0].uris, found.uris))
    labels, probability = model.predict(Catalog(path).files[0].matrix("top")[rows])
    assert report.results[0].accuracy > 0.8
    assert labels.tolist() == found.y_pred.tolist()
    assert (probability is None) == (found.probability is None) == (not FAMILIES[head].probabilities)
    if probability is not None:
        assert probability == pytest.approx(found.probability, abs=1e-9)
    assert model.metrics == to_json(report.results[0])
    assert model.head == f"{head}/l2"


def test_the_model_of_best_validation_accuracy_is_saved_or_of_lowest_log_loss_on_a_tie(
    make_cache: Make, tmp_path: Path
) -> None:
    labels = np.arange(90) % 3
    noise = np.random.default_rng(0).standard_normal((90, 5)).astype("f")
    values = {"noise": noise, "good": clouds(labels, 5, 0.2), "better": clouds(labels, 5, 0.1)}
    path = make_cache(dims=dict.fromkeys(values, 5), features=values)
    for order in (["noise", "good", "better"], ["better", "good", "noise"]):
        report = fit(path, order, ["logreg"], jobs=1, save=tmp_path / "m.skops")
        assert order[report.best] == "better"
        assert [layer["spec"]["layer"] for layer in load_model(tmp_path / "m.skops").layers] == ["better"]
        validated = {result.layer: result for result in report.results}
        assert validated["good"].validation_accuracy == validated["better"].validation_accuracy == 1
        assert validated["good"].validation_log_loss > validated["better"].validation_log_loss


def test_the_model_trained_on_everything_is_saved_before_one_of_few_shots(make_cache: Make, tmp_path: Path) -> None:
    path = make_cache(dims={"low": 6}, features={"low": clouds(np.arange(90) % 3, 6, 0.7, seed=1)})
    report = fit(path, heads=["logreg/standard"], shots=[2, "all"], jobs=1, save=tmp_path / "m.skops")
    few, everything = (result.validation_accuracy or 0 for result in report.results)
    assert few > everything, "all right by chance, of six rows"
    assert report.best == 1
    assert load_model(report.saved or "").metrics == to_json(report.results[1])


def test_processes_change_nothing(make_cache: Make) -> None:
    path = make_cache()
    alone, together = (fit(path, heads=["logreg", "knn"], seeds=[0, 1], jobs=jobs) for jobs in (1, 2))
    assert [r.params for r in alone.results] == [r.params for r in together.results]
    for a, b in zip(alone.predictions, together.predictions, strict=True):
        assert a.y_pred.tolist() == b.y_pred.tolist()
        assert a.probability == pytest.approx(b.probability, abs=1e-6)


def test_no_worker_and_no_memory_map_outlives_the_process(make_cache: Make, tmp_path: Path) -> None:
    path, temporary = make_cache(300, dims={"wide": 2000}), tmp_path / "joblib"
    temporary.mkdir()
    code = (
        "import os, sys, threading\nfrom pipeline.fit import fit\nmapped, over = threading.Event(), threading.Event()\n"
        "def watch():\n"
        "    while not over.wait(0.002):\n"
        "        if any(names for *_, names in os.walk(sys.argv[2])): mapped.set()\n"
        "watcher = threading.Thread(target=watch)\nwatcher.start()\n"
        "results = fit(sys.argv[1], heads=['knn', 'centroid'], jobs=2).results\n"
        "over.set()\nwatcher.join()\nprint(len(results), mapped.is_set(), 'torch' in sys.modules)"
    )
    child = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code, path, temporary],
        env=os.environ | {"JOBLIB_TEMP_FOLDER": str(temporary), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    out, err = child.communicate(timeout=120)
    assert (child.returncode, out, err) == (0, "2 True False\n", ""), "no torch is needed, whose import takes long"
    for _ in range(100):  # the tracker of temporary files ends a moment after the process whose files it removes
        try:
            os.killpg(child.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        pytest.fail("a worker still runs")
    assert not list(temporary.rglob("*"))


def test_layers_of_sources_with_other_classes_are_refused(make_cache: Make) -> None:
    first = make_cache(name="cache/a.h5", dims={"low": 4})
    make_cache(name="cache/b.h5", dims={"top": 4}, classes=("x", "y", "z"), source="drawings")
    with pytest.raises(FitError, match="different classes"):
        fit(first.parent, layers=["low", "top"])


@pytest.mark.parametrize("known", [2, 3])
def test_where_each_class_is_one_group_a_fixed_rule_holds(make_cache: Make, known: int) -> None:
    splits = ["train"] * 60 + ["test"] * 30
    labels = np.arange(90) % known
    path = make_cache(dims={"low": 6}, labels=labels, splits=splits, groups=[f"g{label}" for label in labels],
                      features={"low": clouds(labels, 6, 0.5)})  # fmt: skip
    report = fit(path, jobs=1)
    (result,) = report.results
    assert (result.params, result.validation_accuracy, result.n_train, result.n_val) == ({"C": 300.0}, None, 60, 0)
    assert result.accuracy > 0.9
    assert any(note.startswith("logreg/l2: nothing could be validated") for note in report.notes)
    assert not any("drawn as val" in note for note in report.notes)


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1", "kappa", "auroc"])
def test_a_given_val_set_of_unknown_classes_chooses_nothing(make_cache: Make, metric: str) -> None:
    labels = np.repeat([0, 1, 2, 0, 1], 18)
    path = make_cache(dims={"low": 6}, labels=labels, splits=["train"] * 36 + ["val"] * 18 + ["test"] * 36)
    assert fit(path, jobs=1, metric=metric).results[0].params == {"C": 300.0}


@pytest.mark.parametrize("shots", [1, 3])
def test_with_shots_val_takes_no_part(make_cache: Make, shots: int) -> None:
    names = ["train"] * 45 + ["val"] * 24 + ["test"] * 21
    labels = np.arange(90) % 3
    plain = {"low": clouds(labels, 6)}
    spoilt = {"low": plain["low"].copy()}
    spoilt["low"][45:69] = 1e3
    reports = [
        fit(
            make_cache(dims={"low": 6}, splits=names, features=values, name=f"{i}/x.h5"),
            heads=["logreg", "knn"],
            shots=[shots],
        )
        for i, values in enumerate((plain, spoilt))
    ]
    first, second = (report.results for report in reports)
    assert [(r.n_train, r.n_val, r.n_test, r.params, r.accuracy) for r in first] == [
        (r.n_train, r.n_val, r.n_test, r.params, r.accuracy) for r in second
    ]
    assert (first[0].n_train, first[0].n_val, first[0].n_test) == (3 * shots, 0, 21)
    fixed = "logreg/l2: nothing could be validated, as with few rows (or groups), so C=300 is used"
    assert (fixed in reports[0].notes) == (shots == 1)


def test_rows_that_cannot_be_used_are_left_out_and_counted(make_cache: Make) -> None:
    labels = np.arange(90) % 3
    labels[10:15] = -1
    values = {"low": clouds(np.abs(labels), 6)}
    path = make_cache(dims={"low": 6}, labels=labels, features=values, unreadable=[0, 1], pending=[2, 3, 4])
    report = fit(path)
    assert "10 of 90 rows are left out: 2 unreadable, 3 not extracted yet, 5 without a label" in report.notes
    result = report.results[0]
    assert result.n_train + result.n_val + result.n_test == 80


def test_a_cache_in_which_nothing_is_extracted_yet_says_so(make_cache: Make) -> None:
    with pytest.raises(FitError, match="is extracted yet; run the same extract again"):
        fit(make_cache(pending=range(90)))


def test_layers_of_one_file_join(make_cache: Make, tmp_path: Path) -> None:
    path = make_cache()
    file = Catalog(path).files[0]
    both = np.hstack([normalize(file.matrix("top")), normalize(file.matrix("low"))])
    joined = fit(path, ["top+low"], save=tmp_path / "m.skops")
    direct = fit(make_cache(dims={"x": 206}, features={"x": both}, name="other/x.h5"), ["x"], save=tmp_path / "x.skops")
    assert joined.results[0].layer == "top+low"
    by_alias = [result.layer for result in fit(path, ["low+stages", "stages"], ["centroid"], jobs=1).results]
    assert by_alias == ["low+low", "low+top", "low", "top"]
    assert joined.predictions[0].y_pred.tolist() == direct.predictions[0].y_pred.tolist()
    model = load_model(tmp_path / "m.skops")
    assert [layer["request"]["layer"] for layer in model.layers] == ["top", "low"]
    assert [layer["dim"] for layer in model.layers] == [200, 6]
    assert model.layers[0]["request"]["backbone"] == "net"
    assert model.layers[0]["fingerprint"] == "nettop"
    rows = np.hstack([file.matrix("top"), file.matrix("low")])
    assert model.predict(rows)[0].tolist() == load_model(tmp_path / "x.skops").predict(both)[0].tolist()


def test_layers_of_two_files_join_by_name_and_bytes(make_cache: Make) -> None:
    labels = np.arange(90) % 3
    order = np.random.default_rng(0).permutation(90)
    low, other = clouds(labels, 6), clouds(labels, 7, seed=1)
    make_cache(dims={"low": 6}, features={"low": low}, pending=[8])
    changed = order.tolist()
    changed[0] = 1000
    path = make_cache(
        dims={"other": 7},
        features={"other": other[order]},
        labels=labels[order],
        images=changed,
        uris=[f"{i:03d}.png" for i in order],
        backbone="second",
        name="cache/second.h5",
    )
    report = fit(path.parent, ["low+other"], ["logreg/standard"])
    usable = [i for i in range(90) if i not in (8, order[0])]
    direct = fit(
        make_cache(
            len(usable),
            dims={"x": 13},
            features={"x": np.hstack([low, other])[usable]},
            labels=labels[usable],
            images=usable,
            uris=[f"{i:03d}.png" for i in usable],
            name="joined/x.h5",
        ),
        heads=["logreg/standard"],
    )
    assert report.results[0].backbone == "net+second"
    assert "2 of 90 rows are left out: 1 not extracted yet, 1 not in every joined file" in report.notes
    assert report.predictions[0].uris.tolist() == direct.predictions[0].uris.tolist()
    assert report.predictions[0].y_pred.tolist() == direct.predictions[0].y_pred.tolist()


def test_half_precision_features_are_computed_with_in_single(make_cache: Make) -> None:
    labels = np.arange(90) % 3
    halves = clouds(labels, 6).astype(np.float16)
    stored = fit(make_cache(dims={"low": 6}, dtype="float16", features={"low": halves.astype("f")}, name="a/x.h5"))
    plain = fit(make_cache(dims={"low": 6}, features={"low": halves.astype("f")}, name="b/x.h5"))
    assert stored.predictions[0].probability == pytest.approx(plain.predictions[0].probability, abs=1e-9)


def test_a_class_of_test_that_was_never_trained_counts_as_wrong(make_cache: Make) -> None:
    labels = np.array([0, 1] * 40 + [2] * 10)
    names = ["train"] * 60 + ["test"] * 30
    report = fit(make_cache(labels=labels, splits=names, dims={"low": 6}), heads=["logreg", "ridge"])
    for result in report.results:
        assert result.accuracy <= 20 / 30
        assert result.log_loss is None or result.log_loss == np.inf
    assert to_json(report.results[0])["log_loss"] is None
    assert any("each of its test rows counts as an error: class cat" in note for note in report.notes)


def test_seeds_that_change_nothing_are_told(make_cache: Make) -> None:
    note = "all splits are given, so 2 seeds give the same results; one seed is enough"
    given = make_cache(splits=["train"] * 60 + ["val"] * 15 + ["test"] * 15)
    assert note in fit(given, ["low"], ["centroid"], seeds=[0, 1], jobs=1).notes
    assert note not in fit(given, ["low"], ["centroid"], seeds=[0]).notes
    assert note not in fit(given, ["low"], ["centroid"], seeds=[0, 1], shots=[3], jobs=1).notes
    assert note not in fit(make_cache(name="b/x.h5"), ["low"], ["centroid"], seeds=[0, 1], jobs=1).notes


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_features_that_are_no_numbers_are_refused_by_layer_and_count(make_cache: Make, bad: float) -> None:
    values = {key: clouds(np.arange(90) % 3, dim) for key, dim in DIMS.items()}
    values["top"][[5, 50], 3] = bad
    with pytest.raises(FitError, match=r"layer top has NaN or infinite features in 2 of 90 rows, first 005.png"):
        fit(make_cache(features=values))


@pytest.mark.parametrize(
    ("precision", "way"),
    [("bf16", "extract again with precision fp32"), ("fp32", "look at the weights of the network")],
)
def test_what_to_do_about_features_that_are_no_numbers_depends_on_the_precision(
    make_cache: Make, precision: str, way: str
) -> None:
    values = {"low": clouds(np.arange(90) % 3, 6)}
    values["low"][5] = np.nan
    cache = make_cache(features=values, dims={"low": 6})
    catalog = Catalog(cache)
    catalog.files[0].layers["low"].spec["precision"] = precision
    with pytest.raises(FitError, match=way):
        fit(catalog, ["low"])


def test_bad_features_of_rows_that_are_not_used_do_no_harm(make_cache: Make) -> None:
    values = {"low": clouds(np.arange(90) % 3, 6)}
    values["low"][5] = np.nan
    labels = np.arange(90) % 3
    labels[5] = -1
    assert fit(make_cache(labels=labels, dims={"low": 6}, features=values)).results[0].accuracy > 0.8


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"heads": ["logrg"]}, FitError, "did you mean logreg"),
        ({"heads": []}, FitError, "expected at least one head, got none"),
        ({"layers": ["tip"]}, CacheError, "did you mean top"),
        ({"layers": ["low+tip"]}, CacheError, "did you mean top"),
        ({"seeds": [-1]}, FitError, "seed: expected a whole number, at least 0, got -1"),
        ({"shots": [0]}, FitError, "positive number of images per class, or 'all', got 0"),
        ({"shots": ["some"]}, FitError, "got 'some'"),
        ({"backbone": "nit"}, CacheError, "did you mean net"),
        ({"save": "nowhere/m.skops"}, ModelFileError, "no folder nowhere"),
        ({"save": "m.skops", "cv": 3}, FitError, "use either cv or save"),
        ({"cv": 91}, FitError, "cannot make 91 folds of 90 rows"),
        ({"heads": ["logreg", "knn"], "balanced": True}, FitError, "leave out knn/l2 or 'balanced'"),
    ],
)
def test_wrong_choices_are_refused_before_anything_is_fitted(
    make_cache: Make, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    calls: list[Any] = []
    with pytest.raises(error, match=message) as caught:
        fit(make_cache(), progress=lambda *call: calls.append(call), **arguments)
    assert "\n" not in str(caught.value)
    assert calls == []


def test_a_kernel_of_too_many_rows_is_refused(make_cache: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(FAMILIES["rbf_svm"]), "most_rows", 50)
    with pytest.raises(FitError, match=r"at most 50 of them, got 72, which would need .* GiB and 2 times as long"):
        fit(make_cache(), heads=["logreg", "rbf_svm"])


@pytest.mark.parametrize(
    ("labels", "message"),
    [([-1] * 90, "no row has a label"), ([0] * 90, "found only class ape")],
)
def test_labels_that_cannot_be_fitted_are_refused(make_cache: Make, labels: list[int], message: str) -> None:
    values = {key: np.ones((90, dim), "f") for key, dim in DIMS.items()}
    with pytest.raises(FitError, match=message):
        fit(make_cache(labels=labels, features=values))


def test_two_files_are_ambiguous_until_one_is_named(make_cache: Make) -> None:
    make_cache()
    path = make_cache(backbone="second", name="cache/second.h5")
    with pytest.raises(AmbiguousCacheError, match="second"):
        fit(path.parent)
    assert {r.backbone for r in fit(path.parent, backbone="second", heads=["centroid"]).results} == {"second"}


def test_cross_validation_predicts_every_row_once_by_models_that_did_not_see_it(make_cache: Make) -> None:
    groups = [f"g{i // 3}" for i in range(90)]
    labels = np.arange(90) // 3 % 3
    path = make_cache(dims={"low": 6}, labels=labels, features={"low": clouds(labels, 6, 2.0)}, groups=groups)
    report = fit(path, heads=["ridge", "knn"], seeds=[0, 1], cv=3, jobs=1)
    assert [(r.head, r.seed, r.cv, r.n_train, r.n_val, r.n_test) for r in report.results] == [
        (head, seed, 3, 51, 9, 90) for head in ("ridge/l2", "knn/l2") for seed in (0, 1)
    ]
    for result, found in zip(report.results, report.predictions, strict=True):
        assert found.uris.tolist() == [f"{i:03d}.png" for i in range(90)]
        assert found.y_true.tolist() == labels.tolist()
        assert found.folds is not None
        assert len(set(zip(groups, found.folds.tolist(), strict=True))) == 30
        assert result.accuracy == pytest.approx((found.y_pred == labels).mean())
        assert found.accuracies().mean() == pytest.approx(result.accuracy)
    assert report.predictions[2].probabilities is not None
    assert report.results[2].log_loss == log_loss(labels, report.predictions[2].probabilities)
    splits = [np.concatenate([each.accuracies() for each in report.predictions[start : start + 2]]) for start in (0, 2)]
    p = corrected_t_test(splits[0] - splits[1], 60, 30)[1]
    (chosen,) = [index for index, row in enumerate(report.summary) if row.p_vs_best is None]
    assert report.summary[1 - chosen].p_vs_best == pytest.approx(p)
    validated = [[r.validation_accuracy for r in report.results[start : start + 2]] for start in (0, 2)]
    assert sum(validated[chosen]) >= sum(validated[1 - chosen])


def test_an_image_that_is_listed_twice_counts_once(make_cache: Make) -> None:
    labels, once = np.arange(120) % 3, list(range(120))
    features = {"low": clouds(labels, 6, 4.0), "top": clouds(labels, 200, 30.0)}
    splits = ["train"] * 60 + ["test"] * 60
    twice = np.r_[:120, 60:120]
    single = fit(make_cache(120, features=features, splits=splits), heads=["centroid"], jobs=1)
    double = fit(
        make_cache(
            180,
            "twice/file.h5",
            labels=labels[twice],
            features={name: rows[twice] for name, rows in features.items()},
            splits=splits + ["test"] * 60,
            images=[*once, *once[60:]],
        ),
        heads=["centroid"],
        jobs=1,
    )
    for one, other in zip(single.results, double.results, strict=True):
        assert (other.n_test, other.n_groups, other.accuracy) == (120, 60, one.accuracy)
        assert other.n_effective <= one.n_effective
        assert other.accuracy_ci95[0] <= one.accuracy_ci95[0] < one.accuracy_ci95[1] <= other.accuracy_ci95[1]
        assert other.p_vs_best == one.p_vs_best
    assert any("equal and nearly equal images are of one group" in note for note in double.notes)


def test_cross_validation_reports_what_most_folds_chose(make_cache: Make) -> None:
    labels = np.arange(90) % 3
    values = {"low": clouds(labels, 6, seed=1), "top": clouds(labels, 200, 9.0)}
    chosen: list[dict[str, Any]] = []

    def note(outcome: TrialOutcome) -> TrialOutcome:
        chosen.append(outcome.choice.params)
        return outcome

    with pytest.MonkeyPatch.context() as patch:
        real = parallel.run_trial
        patch.setattr(parallel, "run_trial", lambda *args, **how: note(real(*args, **how)))
        (result,) = fit(make_cache(features=values), ["low"], ["rbf_svm"], cv=5, jobs=1).results
    most = max(chosen, key=chosen.count)
    assert len(chosen) == 5
    assert chosen.index(most) != 0, "the first fold would hide a fault"
    assert result.params["C"] == most["C"]


def test_a_fold_without_calibration_leaves_that_of_the_others(make_cache: Make) -> None:
    labels = np.arange(90) % 3
    values = {"low": clouds(labels, 6, 1.5), "top": clouds(labels, 200, 9.0)}
    report = fit(make_cache(features=values), ["low"], ["knn"], cv=4, jobs=1)
    (result,), (said,) = report.results, report.predictions
    (note,) = (note for note in report.notes if "not calibrated" in note)
    uncalibrated = [fold for fold in range(4) if set(said.temperatures[said.folds == fold]) == {1.0}]
    assert 0 < len(uncalibrated) < 4
    assert note.startswith(f"knn/l2: {len(uncalibrated)} of 4 models are not calibrated")
    assert result.log_loss_calibrated == pytest.approx(log_loss(said.y_true, said.calibrated))
    assert result.log_loss_calibrated != result.log_loss


def test_numbers_of_numpy_are_numbers_and_parts_of_shots_are_refused(make_cache: Make, tmp_path: Path) -> None:
    cache, model = make_cache(), tmp_path / "model.skops"
    report = fit(cache, ["low"], ["ridge"], seeds=np.arange(1), shots=[np.int64(5)], save=model, jobs=1)
    assert (report.results[0].seed, report.results[0].shots) == (0, 5)
    assert model.exists()
    for wrong, got in (
        ({"shots": [2.5]}, r"shots: expected a positive number .*, got 2\.5"),
        ({"shots": ["5"]}, "shots: expected a positive number .*, got '5'"),
        ({"seeds": [0.5]}, r"seed: expected a whole number, at least 0, got 0\.5"),
        ({"seeds": [True]}, "seed: expected a whole number, at least 0, got True"),
        ({"cv": 2.0}, r"cv: expected a whole number, at least 2, got 2\.0"),
    ):
        with pytest.raises(FitError, match=got):
            fit(cache, ["low"], ["ridge"], jobs=1, **wrong)
    with pytest.raises(FitError, match="at least one layer"):
        fit(cache, [], ["ridge"])


def test_seeds_are_summed_up_beside_the_interval(make_cache: Make) -> None:
    labels = np.arange(90) % 3
    values = {"low": clouds(labels, 6, 2.5), "top": clouds(labels, 200, 9.0)}
    report = fit(make_cache(features=values), heads=["centroid"], seeds=[0, 1, 2], jobs=1)
    assert [(row.layer, row.head, row.shots, row.seeds) for row in report.summary] == [
        ("low", "centroid/l2", "all", 3),
        ("top", "centroid/l2", "all", 3),
    ]
    for row in report.summary:
        of_seeds = np.array([result.accuracy for result in report.results if result.layer == row.layer])
        assert (row.accuracy_mean, row.accuracy_sd) == (
            pytest.approx(of_seeds.mean()),
            pytest.approx(of_seeds.std(ddof=1)),
        )
        assert (row.accuracy_min, row.accuracy_max) == (of_seeds.min(), of_seeds.max())
        assert row.accuracy_ci95 == pytest.approx(wilson(of_seeds.mean() * 18, 18))
    low, top = (pool_seeds(report.predictions[start : start + 3]) for start in (0, 3))
    p = mcnemar(low[0], top[0], number_clusters(low[1]))
    assert sorted([row.p_vs_best for row in report.summary], key=bool) == [None, pytest.approx(p)], "three test sets"
    best = may_be_best(np.array([low[0], top[0]]), low[1])
    assert [(row.in_best_set, row.shared_test) for row in report.summary] == [(one, False) for one in best.tolist()]
    assert fit(make_cache(name="b/x.h5"), heads=["centroid"]).summary == []


def test_few_shots_are_compared_over_seeds_as_draws_from_all_that_is_not_test(make_cache: Make) -> None:
    labels = np.arange(90) % 3
    values = {"low": clouds(labels, 6, 1.0), "top": clouds(labels, 200, 9.0)}
    report = fit(make_cache(features=values), heads=["centroid"], seeds=range(5), shots=[2], jobs=1)
    assert {(result.n_train, result.n_pool, result.n_test) for result in report.results} == {(6, 72, 18)}
    low, top = (np.array([r.accuracy for r in report.results if r.layer == name]) for name in ("low", "top"))
    assert low.mean() > top.mean()
    assert [row.p_vs_best for row in report.summary] == [None, pytest.approx(corrected_t_test(low - top, 72, 18)[1])]


def test_seeds_of_one_test_set_are_not_taken_for_resamples(make_cache: Make) -> None:
    path = make_cache(splits=["train"] * 60 + ["test"] * 30)
    report = fit(path, heads=["centroid"], seeds=range(6), shots=[3], jobs=1)
    low, top = (pool_seeds(report.predictions[start : start + 6]) for start in (0, 6))
    assert low[1].tolist() == top[1].tolist() == 6 * [f"image {i:03d}.png" for i in range(60, 90)]
    totals = low[0].reshape(6, 30).sum(0) - top[0].reshape(6, 30).sum(0)
    flips = np.random.default_rng(0).choice([-1, 1], (20000, 30)) @ totals
    expected = (np.abs(flips) >= abs(totals.sum())).mean()
    p_values = sorted([row.p_vs_best for row in report.summary], key=bool)
    assert p_values == [None, pytest.approx(expected, abs=0.015)], "by images, not by rows of all seeds"
    assert all(row.shared_test for row in report.summary)


def test_results_on_one_test_set_are_compared_with_the_one_chosen_on_validation(make_cache: Make) -> None:
    labels = np.arange(300) % 3
    values = {"good": clouds(labels, 5, 0.8), "bad": clouds(labels, 5, 4.0)}
    report = fit(make_cache(300, dims=dict.fromkeys(values, 5), features=values), heads=["centroid"], jobs=1)
    good, bad = report.predictions
    assert report.results[0].validation_accuracy > report.results[1].validation_accuracy  # type: ignore[operator]
    assert report.results[0].p_vs_best is None
    assert [result.in_best_set for result in report.results] == [True, False]
    table = fit_table(report.results)
    cells = {str(column.header): list(column.cells) for column in table.columns}
    assert (cells["may be best"], cells["p vs chosen"]) == (["yes", "no"], ["-", "<0.001"])
    assert [row.style for row in table.rows] == ["bold", ""]
    assert report.results[1].p_vs_best == pytest.approx(mcnemar(good.right, bad.right))
    assert report.results[1].p_vs_best < 0.05
    assert any(
        "1 of 2 results may be the best of those on the same test images (95 % confidence)" in note
        for note in report.notes
    )


def test_calibration_is_fitted_before_the_refit_told_on_test_and_kept_in_the_model(
    make_cache: Make, tmp_path: Path
) -> None:
    names, labels = np.array((["train"] * 60 + ["val"] * 15 + ["test"] * 25) * 3), np.arange(300) % 3
    values = clouds(labels, 6, 2.0)
    path = make_cache(300, dims={"low": 6}, splits=names.tolist(), features={"low": values})
    report = fit(path, save=tmp_path / "m.skops")
    result, found = report.results[0], report.predictions[0]
    train, val = names == "train", names == "val"
    oracle = make_pipeline(Normalizer(), LogisticRegression(C=result.params["C"], tol=1e-8, max_iter=5000))
    told = oracle.fit(values[train].astype(float), labels[train]).predict_proba(values[val])
    assert result.temperature == pytest.approx(fit_temperature(told, labels[val]), rel=0.01)
    assert found.calibrated is not None
    assert result.log_loss_calibrated == log_loss(found.y_true, found.calibrated)
    assert result.ece_calibrated == expected_calibration_error(found.y_true, found.calibrated)
    assert load_model(tmp_path / "m.skops").temperature == result.temperature


@pytest.mark.parametrize("head", [name for name, family in FAMILIES.items() if family.weighted])
def test_balanced_classes_count_alike(make_cache: Make, head: str) -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random(1200) < 0.08).astype(int)
    values = {"low": (rng.standard_normal((1200, 3)) + 1.2 * labels[:, None]).astype("f")}
    path = make_cache(1200, dims={"low": 3}, labels=labels, features=values)
    plain, balanced = (fit(path, heads=[head], balanced=each, jobs=1).results[0] for each in (False, True))
    assert (plain.balanced, balanced.balanced) == (False, True)
    assert balanced.mean_per_class_accuracy >= plain.mean_per_class_accuracy
    assert balanced.mean_per_class_accuracy > 0.7


@pytest.mark.parametrize("head", FAMILIES)
def test_constant_features_give_a_result_at_chance(make_cache: Make, head: str) -> None:
    path = make_cache(dims={"low": 4}, features={"low": np.full((90, 4), 2.5, "f")})
    assert fit(path, heads=[head], jobs=1).results[0].accuracy == pytest.approx(1 / 3)


@pytest.mark.parametrize("head", FAMILIES)
def test_a_class_of_one_row_is_fitted_and_told(make_cache: Make, head: str) -> None:
    labels = np.arange(90) % 2
    labels[7] = 2
    report = fit(make_cache(labels=labels, dims={"low": 6}), heads=[head], jobs=1)
    assert any("class cat" in note for note in report.notes)
    assert report.results[0].accuracy > 0.8


def test_more_classes_than_a_head_can_hold_are_refused(make_cache: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_cache(dims={"top": 200})
    monkeypatch.setattr(parallel, "MOST_CELLS", 500)
    for head in ("logreg", "linear_svm"):
        with pytest.raises(FitError, match=f"{head}/l2 for 3 classes would need a table of .* GiB; use centroid"):
            fit(path, heads=[head])
    assert fit(path, heads=["centroid"]).results
    monkeypatch.setattr(parallel, "MOST_CELLS", 30)
    for head, way in (("logreg", "centroid with another metric"), ("linear_svm", "another metric")):
        with pytest.raises(FitError, match=f"GiB; use {way}, or coarser labels"):
            fit(make_cache(name=f"{head}/f.h5", dims={"low": 6}), heads=[head], metric="auroc")


def test_groups_in_test_widen_intervals_and_are_told(make_cache: Make) -> None:
    groups = [f"g{i // 3}" for i in range(90)]
    splits = ["train"] * 60 + ["test"] * 30
    labels = np.arange(90) // 3 % 3
    values = {"low": clouds(labels, 6, 3.0), "top": np.repeat(clouds(labels[::3], 6, 3.0), 3, axis=0)}
    same = {"dims": {"low": 6, "top": 6}, "features": values, "labels": labels, "splits": splits}
    grouped = fit(make_cache(groups=groups, **same), heads=["centroid"], jobs=1)
    assert any("30 test rows come from 10 groups" in note for note in grouped.notes)
    assert "train/val/test 51/9/30 in 10 groups" in str(fit_table(grouped.results).title)
    alone = fit(make_cache(name="b/x.h5", **same), heads=["centroid"], jobs=1)
    assert [result.accuracy for result in grouped.results] == [result.accuracy for result in alone.results]
    for with_groups, found, without in zip(grouped.results, grouped.predictions, alone.results, strict=True):
        n = effective_rows(found.right.astype(float), np.repeat(np.arange(10), 3))
        assert (with_groups.n_groups, with_groups.n_effective) == (10, pytest.approx(n))
        assert with_groups.accuracy_ci95 == pytest.approx(wilson(with_groups.accuracy * n, n))
        assert (without.n_groups, without.n_effective) == (30, 30)
    top = grouped.results[1]
    assert top.n_effective is not None
    assert top.n_effective < 10, "the rows of a group are equal there"
    p = mcnemar(*(one.right for one in grouped.predictions), np.repeat(np.arange(10), 3))
    assert p in [result.p_vs_best for result in grouped.results]


def test_nothing_is_left_of_a_fit_that_was_killed(make_cache: Make, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from pipeline.fit import fit\n"
        "def kill(*_):\n"
        "    tasks = Path(f'/proc/{os.getpid()}/task').iterdir()\n"
        "    print(*(child for task in tasks for child in (task / 'children').read_text().split()), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "fit(sys.argv[1], ['top'], ['centroid'], seeds=(0, 1, 2), jobs=2, on_result=kill)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JOBLIB_TEMP_FOLDER": str(shared)}
    cache = make_cache(n=2000)
    killed = subprocess.run(
        [sys.executable, "-c", code, str(cache)], env=environment, stdout=subprocess.PIPE, text=True
    )
    children = [Path("/proc", number) for number in killed.stdout.split()]
    assert len(children) > 2, "two workers, and who clears up after them"
    deadline = time.monotonic() + 30
    while any(child.exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [child for child in children if child.exists()] == []
    with scratch_folder(shared) as folder:
        assert list(shared.iterdir()) == [Path(folder)]


def little_memory(monkeypatch: pytest.MonkeyPatch, most: int = 80) -> list[int]:
    """Let rows of 26 features or more be streamed in blocks of at most `most`; return how many are read at once."""
    reads: list[int] = []
    features = Layer.features

    def counted(layer: Layer, index: np.ndarray) -> np.ndarray:
        reads.append(len(index))
        return features(layer, index)

    monkeypatch.setattr(memory, "free_memory", lambda: 1000)
    monkeypatch.setattr(blocks, "_CELLS_READ", 26 * most)
    monkeypatch.setattr(parallel, "require_finite", lambda layer: None)  # reads rows, too
    monkeypatch.setattr(Layer, "features", counted)
    return reads


@pytest.mark.parametrize(
    ("head", "case"),
    [
        ("logreg/l2", "three classes"),
        ("logreg/standard", "two classes"),
        ("logreg/none", "folds"),
        ("ridge/l2", "two classes"),
        ("ridge/standard", "balanced"),
        ("centroid/l2", "three classes"),
    ],
)
def test_rows_that_do_not_fit_into_memory_give_the_same_model(
    make_cache: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, head: str, case: str
) -> None:
    labels = np.random.default_rng(0).integers(0, 2 if case == "two classes" else 3, 300)
    splits = [*["train"] * 150, *["val"] * 50, *["test"] * 100]
    made = {name: 0.5 + clouds(labels, dim, 4.0, seed=dim) for name, dim in {"a": 20, "b": 6}.items()}
    cache = make_cache(300, dims={"a": 20, "b": 6}, labels=labels, splits=splits, dtype="float16", features=made)
    options: dict[str, Any] = {"layers": ["a+b"], "heads": [head], "balanced": case == "balanced", "jobs": 1}
    options["shots"] = [40] if case == "folds" else ["all"]
    monkeypatch.setattr(linear, "C_GRID", linear.C_GRID[12:25:6])
    whole = fit(cache, save=tmp_path / "whole.skops", **options)
    reads = little_memory(monkeypatch)
    streamed = fit(cache, save=tmp_path / "streamed.skops", **options)
    assert len(reads) > 5
    assert max(reads) <= 80 or head.startswith("logreg")  # which reads a sample at once
    one, other = whole.results[0], streamed.results[0]
    assert other.params == one.params
    assert other.validation_score == one.validation_score
    assert other.accuracy == one.accuracy > 0.5
    assert streamed.predictions[0].y_pred.tolist() == whole.predictions[0].y_pred.tolist()
    assert other.log_loss == (None if one.log_loss is None else pytest.approx(one.log_loss, rel=1e-6))
    assert other.temperature == (None if one.temperature is None else pytest.approx(one.temperature, rel=1e-3))
    noted = [any("read from the cache in each pass" in note for note in report.notes) for report in (whole, streamed)]
    assert noted == [False, True]
    fresh = 0.5 + clouds(np.arange(99) % 3, 26, 4.0, seed=5)
    models = [load_model(tmp_path / f"{name}.skops").pipeline for name in ("whole", "streamed")]
    family = FAMILIES[head.partition("/")[0]]
    scores = [family.scores(model[-1], model[:-1].transform(fresh) if len(model) > 1 else fresh) for model in models]
    assert scores[1] == pytest.approx(scores[0], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("head", "dims"), [("linear_svm", {"low": 26}), ("knn", {"low": 26}), ("logreg", {"top": 200})]
)
def test_a_head_that_needs_all_rows_in_memory_says_so_before_it_reads_any(
    make_cache: Make, monkeypatch: pytest.MonkeyPatch, head: str, dims: dict[str, int]
) -> None:
    reads = little_memory(monkeypatch)
    with pytest.raises(FitError, match=r"would take .* GB of memory, and 1e-06 GB are free; use fewer shots"):
        fit(make_cache(90, dims=dims), heads=["centroid", head])
    assert reads == []


@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_is_that_of_the_batch_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int) -> None:
    files = {
        1: (
            "memory",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file 70\ntotal_active_file 30\ncache 7",
        ),
        2: ("", "memory.max", "memory.current", "anon 7\ninactive_file 70\nactive_file 30"),
    }
    folder, limit, usage, stat = files[version]
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 99 kB\nMemAvailable: 50 kB\n")
    (tmp_path / "proc/self/cgroup").write_text(
        "4:memory,other:/job/step\n3:cpuset:/\n" if version == 1 else "0::/job/step\n"
    )
    for group, most in (("job/step", "max"), ("job", "3000")):
        made = tmp_path / "sys" / folder / group
        made.mkdir(parents=True, exist_ok=True)
        for name, text in ((limit, most), (usage, "1000"), ("memory.stat", stat)):
            (made / name).write_text(text)
    monkeypatch.setattr(memory, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path / "sys")
    assert memory.free_memory() == 3000 - 1000 + 100
    (tmp_path / "sys" / folder / "job/memory.stat").unlink()
    assert memory.free_memory() == 3000 - 1000
    (tmp_path / "sys" / folder / "job" / limit).write_text("999999")
    assert memory.free_memory() == 50 * 1024


def test_free_memory_is_some_of_what_there_is() -> None:
    assert 1 << 20 < memory.free_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
