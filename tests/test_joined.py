"""Columns of a table that are joined to features: `fit --with` and `predict --table`."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler, normalize

from features_cache import CacheWriter, LayerInfo, Rows
from pipeline.compare import dry_run
from pipeline.errors import FitError, ModelFileError, PlanError, TableError
from pipeline.evaluation.intervals import paired_interval
from pipeline.evaluation.labels import read_labels
from pipeline.export import export
from pipeline.extract import extract
from pipeline.fit import fit
from pipeline.heads import memory
from pipeline.heads.choose import COLUMNS_LENGTH
from pipeline.heads.saved import load_model, save_model
from pipeline.predict import predict
from pipeline.results import from_json, to_json

Thawline = Callable[..., Any]
N, D = 240, 8
SITES = ("north", "south", "west")


@pytest.fixture(scope="module")
def features() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {name: rng.standard_normal((N, D)).astype("f") for name in ("deep", "low")}


@pytest.fixture(scope="module")
def table() -> dict[str, list[Any]]:
    """Columns of the table, of which weight and site say much of the target."""
    rng = np.random.default_rng(5)
    site, weight = rng.integers(0, 3, N), rng.normal(70, 12, N)
    value = weight / 4 + 3 * site + rng.normal(0, 1, N)
    return {
        "uri": [f"{i:03d}.png" for i in range(N)],
        "split": [("train", "train", "val", "test")[i % 4] for i in range(N)],
        "weight": weight.tolist(),
        "site": [SITES[number] for number in site],
        "noise": rng.standard_normal(N).tolist(),
        "value": value.tolist(),
        "size": np.where(value > np.median(value), "large", "small").tolist(),
        "traits": [
            "|".join(n for n, has in (("heavy", w > 70), ("far", s == 2)) if has) or "|"
            for w, s in zip(weight, site, strict=True)
        ],
    }


@pytest.fixture(scope="module")
def folder(
    features: dict[str, np.ndarray], table: dict[str, list[Any]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("joined")
    digests = [np.frombuffer(hashlib.blake2b(b"%d" % i, digest_size=16).digest(), np.uint8) for i in range(N)]
    zeros, none = np.zeros(N, np.int64), [""] * N
    rows = Rows(table["uri"], zeros - 1, none, none, zeros, zeros)
    layers = [LayerInfo(name, D, "float32", {"layer": name, "pool": "avg"}, name) for name in features]
    request = {"backbone": "net", "layers": list(features), "pool": "avg", "size": None, "precision": "auto"}
    handles = {"source": "photos", "backbone": "net", "pool": "avg"}
    with CacheWriter.create(folder / "cache.h5", rows, (), layers, handles, request) as writer:
        writer.begin_run({})
        writer.write(np.arange(N), features, np.array(digests))
    write_table(folder / "table.csv", table)
    return folder


def write_table(path: Path, columns: dict[str, list[Any]]) -> Path:
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([columns, *zip(*columns.values(), strict=True)])
    return path


def run(folder: Path, columns: list[str], **options: Any) -> Any:
    known: dict[str, Any] = {"layers": ["deep"], "labels": folder / "table.csv", "target": "size", "jobs": 1}
    return fit(folder / "cache.h5", columns=columns, **known | options)


@pytest.mark.parametrize(
    ("scaling", "layers"), [("l2", ["deep"]), ("l2", ["deep", "low"]), ("standard", ["deep"]), ("none", ["deep"])]
)
def test_columns_are_scaled_by_training_rows_and_stand_beside_the_features(
    scaling: str,
    layers: list[str],
    folder: Path,
    features: dict[str, np.ndarray],
    table: dict[str, list[Any]],
    tmp_path: Path,
) -> None:
    how: dict[str, Any] = {"task": "regression", "target": "value", "heads": [f"ridge/{scaling}"]}
    report = run(folder, ["weight", "site"], layers=["+".join(layers)], save=tmp_path / "m.skops", **how)
    plain, joined = report.results
    assert (joined.layer, joined.columns) == (f"{plain.layer}+weight+site", ["weight", "site"])
    assert (report.best, plain.columns) == (1, None)
    test = np.array(table["split"]) == "test"
    weight = np.array(table["weight"], np.float64)
    numbers = (weight - weight[~test].mean()) / weight[~test].std()
    dummies = np.array(table["site"])[:, None] == np.array(SITES)
    x = np.hstack([features[name] for name in layers]).astype(np.float64)
    if scaling == "l2":
        x = np.hstack([normalize(features[name]) for name in layers]) / len(layers) ** 0.5
        numbers, dummies = (part * COLUMNS_LENGTH / 2**0.5 for part in (numbers, dummies))
    elif scaling == "standard":
        x = StandardScaler().fit(x[~test]).transform(x)
    x = np.column_stack([x, numbers, dummies])
    y = np.array(table["value"])
    oracle = Ridge(**joined.params).fit(x[~test], y[~test])
    np.testing.assert_allclose(report.predictions[1].y_pred, oracle.predict(x[test]), rtol=2e-4)
    raw = np.column_stack(
        [*(features[name] for name in layers), weight, np.array(table["site"])[:, None] == np.array(SITES)]
    )
    saved = load_model(tmp_path / "m.skops")
    np.testing.assert_allclose(saved.predict_values(raw[test]), report.predictions[1].y_pred, rtol=1e-5)


@pytest.mark.parametrize(
    ("task", "target"), [("classification", "size"), ("multilabel", "traits"), ("regression", "value")]
)
def test_what_columns_add_is_told_in_pairs_with_an_interval(task: str, target: str, folder: Path) -> None:
    how: dict[str, Any] = {"task": task, "target": target, "heads": ["ridge"], "seeds": [0, 1]}
    useful, useless = run(folder, ["weight", "site"], **how), run(folder, ["noise"], **how)
    for gain in useful.gains:
        low, high = gain.gain_ci95
        assert 0 < low < gain.gain < high
        assert (gain.layer, gain.columns, gain.seeds) == ("deep", ["weight", "site"], 2)
        metric = "accuracy" if task == "classification" else gain.metric
        with_them = [getattr(one, metric) for one in useful.results if one.columns and one.head == gain.head]
        assert gain.value_with == pytest.approx(np.mean(with_them))
        assert gain.gain == pytest.approx(gain.value_with - gain.value_without)
        assert from_json(type(gain), json.loads(json.dumps(to_json(gain)))) == gain
    assert len(useful.gains) == 1
    assert all(gain.gain_ci95[0] <= 0 <= gain.gain_ci95[1] for gain in useless.gains)
    if task == "classification":
        single = run(folder, ["noise"], heads=["knn"])
        without, joined = (one.right for one in single.predictions)
        assert single.gains[0].gain_ci95 == paired_interval(joined, without)


@pytest.mark.parametrize("scaling", ["l2", "standard", "none"])
def test_rows_that_are_read_in_passes_have_their_columns(
    scaling: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = run(folder, ["weight", "site"], heads=[f"ridge/{scaling}"])
    monkeypatch.setattr(memory, "free_memory", lambda: 1000)
    read = run(folder, ["weight", "site"], heads=[f"ridge/{scaling}"])
    assert any("read from the cache in each pass" in note for note in read.notes)
    for one, other in zip(held.predictions, read.predictions, strict=True):
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-4)


def test_errors_that_become_smaller_are_a_gain(folder: Path) -> None:
    (gain,) = run(folder, ["weight"], task="regression", target="value", metric="rmse").gains
    assert gain.gain == pytest.approx(gain.value_without - gain.value_with)
    assert 0 < gain.gain_ci95[0] < gain.gain < gain.gain_ci95[1]


def test_without_columns_nothing_is_compared_and_no_result_changes(folder: Path) -> None:
    alone, beside = run(folder, [], heads=["knn"]), run(folder, ["noise"], heads=["knn"])
    assert alone.gains == []
    assert alone.results[0].accuracy == beside.results[0].accuracy
    assert (
        read_labels(folder / "table.csv", "size").digest
        != read_labels(folder / "table.csv", "size", columns=["site"]).digest
    )


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (["1", "2", "heavy"], "mixes numbers with text, such as '1' and 'heavy'"),
        (["1", "1_2"], "mixes numbers with text, such as '1' and '1_2'"),
        (["1", "１２"], "mixes numbers with text, such as '1' and '１２'"),
        (["1", "2", "nan"], "mixes numbers with text, such as '1' and 'nan'"),
        (["2", "2.0"], "is 2 for all images, so it adds nothing"),
        (["a", "a"], "is 'a' for all images, so it adds nothing"),
        (["1700000000", "1700000001"], "differ by 1 at most.*subtract a constant"),
        (["1", "1e39"], "expected numbers, found '1e39'"),
        ([f"row {i}" for i in range(N)], f"has {N} different texts, and at most 100 can be categories"),
        ([""], "all images of this source have an empty cell in extra"),
    ],
)
def test_columns_that_can_tell_nothing_are_refused(
    cells: list[str],
    message: str,
    folder: Path,
    table: dict[str, list[Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipeline.evaluation.joined.MOST_CATEGORIES", 100)
    path = write_table(tmp_path / "t.csv", table | {"extra": [cells[i % len(cells)] for i in range(N)]})
    with pytest.raises(TableError, match=message) as caught:
        run(folder, ["extra"], labels=path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        (["size"], {}, "column 'size' is the target"),
        (["uri"], {}, "column 'uri' is the key"),
        (["site"], {"key": "site"}, "column 'site' is the key"),
        (["split"], {}, "column 'split' is the split"),
        (["wight"], {}, "no column 'wight'.*did you mean weight"),
        (["weight"], {"labels": None, "target": None}, r"columns to join \(with\) are of a table; also name"),
    ],
)
def test_columns_that_are_not_there_or_say_something_else_are_refused(
    columns: list[str], options: dict[str, Any], message: str, folder: Path
) -> None:
    with pytest.raises(TableError, match=message):
        run(folder, columns, **options)


def test_a_column_called_like_a_layer_is_refused(folder: Path, table: dict[str, list[Any]], tmp_path: Path) -> None:
    path = write_table(tmp_path / "t.csv", table | {"low": table["noise"]})
    with pytest.raises(FitError, match="'low' of the table is called like a layer"):
        run(folder, ["low"], labels=path)


def test_rows_with_an_empty_cell_are_left_out_of_both(
    folder: Path, table: dict[str, list[Any]], tmp_path: Path
) -> None:
    weight = ["" if i in (3, 8) else one for i, one in enumerate(table["weight"])]
    site = ["" if i == 7 else one for i, one in enumerate(table["site"])]
    path = write_table(tmp_path / "t.csv", table | {"weight": weight, "site": site})
    report = run(folder, ["weight", "site"], labels=path, heads=["knn"])
    assert [one.n_test for one in report.results] == [58, 58]
    assert [one.n_train for one in report.results] == [119, 119]
    told = f"3 of {N} images have an empty cell in weight, site of t.csv: 003.png, 007.png, 008.png"
    assert told in report.notes
    assert not any("fit no image" in note for note in report.notes)


def test_what_training_rows_do_not_tell_counts_as_nothing(
    folder: Path, table: dict[str, list[Any]], tmp_path: Path
) -> None:
    """A column that varies only in test rows changes no prediction, as its training rows say nothing of it."""
    late = [1000 * i if split == "test" else 1 for i, split in enumerate(table["split"])]
    site = ["far" if split == "test" else "near" for split in table["split"]]
    path = write_table(tmp_path / "t.csv", table | {"late": late, "where": site})
    for head in ("ridge/standard", "ridge/none", "ridge/l2"):
        report = run(folder, ["late", "where"], labels=path, heads=[head], task="regression", target="value")
        np.testing.assert_allclose(report.predictions[0].y_pred, report.predictions[1].y_pred, rtol=1e-5)


@pytest.fixture(scope="module")
def photos(write_photos: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos, a cache, a table whose columns alone tell the class, and a model of it."""
    folder = tmp_path_factory.mktemp("photos")
    photos = write_photos(folder / "photos", each=10)
    extract(photos, ["test_resnet@random:0"], ["layer1"], output=folder / "cache", size=32, engine="torch")
    names = sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.png"))
    kinds = [i % 3 for i in range(len(names))]
    columns = {
        "file": names,
        "kind": [f"kind {k}" for k in kinds],
        "dose": [10.0 * k + i % 2 for i, k in enumerate(kinds)],
    }
    write_table(folder / "table.csv", columns | {"site": [SITES[k] for k in kinds]})
    how: dict[str, Any] = {"labels": folder / "table.csv", "target": "kind", "columns": ["dose", "site"]}
    fit(folder / "cache", heads=["logreg"], save=folder / "kind.skops", jobs=1, **how)
    return folder


def test_new_photos_need_the_columns_and_what_is_unknown_is_told(
    photos: Path, thawline: Thawline, tmp_path: Path
) -> None:
    saved = load_model(photos / "kind.skops")
    assert [(one.name, one.categories) for one in saved.joined] == [("dose", None), ("site", SITES)]
    (photos / "photos/red/broken.png").write_bytes(b"no image")
    cells = {"file": ["blue/0.png", "blue/1.png", "blue/2.png", "blue/3.png", "red/broken.png"]}
    new = cells | {"dose": [0, 20, 20, "", 1], "site": ["north", "west", "moon", "west", "west"]}
    report = predict(
        photos / "kind.skops", photos / "photos", table=write_table(tmp_path / "new.csv", new), engine="torch"
    )
    (photos / "photos/red/broken.png").unlink()
    found = {one.uri: one for one in report.predictions}
    assert [found[f"blue/{i}.png"].label for i in (0, 1)] == ["kind 0", "kind 2"]
    assert found["blue/2.png"].state == "done"
    assert (found["blue/3.png"].state, found["blue/3.png"].label) == ("incomplete", None)
    assert found["blue/3.png"].reason == "an empty cell in dose, site of new.csv"
    assert found["red/9.png"].reason == "new.csv does not name it"
    assert found["red/broken.png"].state == "unreadable"
    assert "dose, site come from new.csv, joined by uri" in report.notes
    assert "column 'site' of new.csv: 1 of 4 images have categories that the model never saw: moon" in report.notes
    raw = np.zeros((1, saved.pipeline.n_features_in_), "f")
    raw[0, -4:] = 20, 0, 0, 1
    assert saved.predict(raw)[0].tolist() == [2], "dose, then a column for each site, after the features"
    shown = thawline(
        "predict", photos / "kind.skops", photos / "photos", "--table", photos / "table.csv", "--json"
    ).json
    assert [one["label"] for one in shown["predictions"]] == [f"kind {i % 3}" for i in range(30)]
    thawline("predict", photos / "kind.skops", photos / "photos").assert_one_line(
        "reads dose, site beside the images", "table"
    )
    bad = write_table(tmp_path / "bad.csv", {"file": ["a.png"], "dose": ["much"], "site": ["west"]})
    with pytest.raises(TableError, match=r"column 'dose' of bad.csv: expected numbers, found 'much'"):
        predict(photos / "kind.skops", photos / "photos", table=bad)


def test_a_model_without_columns_takes_no_table_and_one_with_columns_is_not_exported(
    photos: Path, tmp_path: Path
) -> None:
    fit(photos / "cache", heads=["centroid"], save=tmp_path / "plain.skops", jobs=1)
    with pytest.raises(TableError, match="reads images alone"):
        predict(tmp_path / "plain.skops", photos / "photos", table=photos / "table.csv")
    with pytest.raises(ModelFileError, match=re.escape("reads columns of a table (dose, site) and cannot be exported")):
        export(photos / "kind.skops", tmp_path / "m.onnx")


@pytest.mark.parametrize(
    "columns", [[1], [{"name": 1, "categories": None}], [{"name": "a"}], [{"name": "a", "categories": []}]]
)
def test_forged_columns_are_refused(columns: list[Any], photos: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    save_model(tmp_path / "m.skops", replace(load_model(photos / "kind.skops"), columns=columns))
    with pytest.raises(ModelFileError, match="does not say its columns"):
        load_model(tmp_path / "m.skops")


def test_the_command_prints_what_columns_add_and_a_plan_refuses_them(
    folder: Path, tmp_path: Path, thawline: Thawline
) -> None:
    options = ["-l", "deep", "--labels", folder / "table.csv", "--target", "size", "--head", "knn", "--jobs", 1]
    options += ["--with", "weight"]
    shown = thawline("fit", folder / "cache.h5", *options, "--with", "site").stdout
    assert "gained by weight, site on the same test images, layer deep, shots all\nhead " in shown
    assert re.search("accuracy without +with +gain +95 % interval", shown)
    assert thawline("fit", folder / "cache.h5", *options, "--json").json["gains"][0]["columns"] == ["weight"]
    plan = 'source = "digits"\nlabels = "t.csv"\n[[extract]]\n[[fit]]\nwith = ["weight"]\n'
    (tmp_path / "plan.toml").write_text(plan)
    with pytest.raises(PlanError, match=r"plan.toml line 5: \[\[fit\]\] has no key 'with'"):
        dry_run(tmp_path / "plan.toml", tmp_path / "out")
