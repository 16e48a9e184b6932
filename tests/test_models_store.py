from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skops.io
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler

from pipeline.errors import ModelFileError
from pipeline.evaluation.calibration import tempered
from pipeline.heads import saved as store
from pipeline.heads.choose import scale, search
from pipeline.heads.registry import FAMILIES, SCALINGS, find_head
from pipeline.heads.saved import FORMAT, SavedModel, load_model, save_model
from pipeline.heads.trial import Prepared, run_trial
from pipeline.model_file import check_destination

SPEC = {"backbone": "zoo/net", "layer": "top", "pool": "avg"}
LAYER = {
    "spec": SPEC,
    "fingerprint": "f" * 32,
    "dim": 30,
    "request": {"backbone": "net", "layer": "top", "pool": "avg", "size": None, "precision": "auto"},
}


def trained(name: str = "logreg", **changes: Any) -> SavedModel:
    """A model of twelve rows of thirty features, so that linear heads are trained in the span."""
    rng = np.random.default_rng(0)
    y = np.arange(12) % 3
    features = (rng.standard_normal((12, 30)) + 2 * rng.standard_normal((3, 30))[y]).astype(np.float32)
    head = find_head(name)
    final = scale(head.scaling, features.copy(), features.copy(), rotated=head.family.linear)
    outcome = run_trial(head, Prepared((), final, y, 0.0), 3, balanced=False, metric="accuracy", keep=True)
    assert outcome.pipeline is not None
    fields = {
        "pipeline": outcome.pipeline,
        "head": head.name,
        "params": outcome.params,
        "layers": [LAYER],
        "classes": ("ape", "bee", "çat"),
        "temperature": 2.0,
        "metrics": {"accuracy": 1.0, "log_loss": None},
        "versions": FORMAT.versions(),
    }
    return SavedModel(**(fields | changes))


def rewrite(path: Path, *, drop: bool = False, **changes: Any) -> None:
    """Change or drop a model's description, with a digest that fits what else is in the file."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    description = json.loads(members.pop("thawline.json")) | changes
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        description["digest"] = FORMAT.digest(description, store._content(archive))
        if not drop:
            archive.writestr("thawline.json", json.dumps(description))


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_comes_back_as_it_went(tmp_path: Path, name: str, scaling: str) -> None:
    model = trained(f"{name}/{scaling}")
    save_model(tmp_path / "m.skops", model)
    back = load_model(tmp_path / "m.skops")
    fresh = np.random.default_rng(1).standard_normal((40, 30)).astype(np.float32)
    untouched = fresh.copy()
    labels, probability = back.predict(fresh)
    expected, expected_probability = model.predict(fresh)
    assert (fresh == untouched).all()
    assert labels.tolist() == expected.tolist() == model.pipeline.predict(fresh).tolist()
    assert {key: value for key, value in vars(back).items() if key != "pipeline"} == {
        key: value for key, value in vars(model).items() if key != "pipeline"
    }
    if probability is None:
        assert name not in ("logreg", "knn")
    else:
        assert probability.tolist() == expected_probability.tolist()
        shares = model.pipeline.predict_proba(fresh)
        smoothed = (shares + 1 / 3) / 2 if name == "knn" else shares  # k is 1
        assert probability == pytest.approx(tempered(smoothed, 2.0).max(axis=1))


def test_a_model_of_an_older_version_predicts_as_it_did(tmp_path: Path) -> None:
    features = np.random.default_rng(0).standard_normal((12, 30)).astype(np.float32)
    y = np.arange(12) % 3
    for head, classifier in (("knn", KNeighborsClassifier(5, metric="cosine")), ("logreg", LogisticRegression())):
        before = Pipeline([("scaler", StandardScaler()), ("classifier", classifier)]).fit(features, y)
        save_model(tmp_path / "m.skops", trained(pipeline=before, head=head))
        labels, probability = load_model(tmp_path / "m.skops").predict(features)
        assert (labels == before.predict(features)).all()
        lifted = np.maximum(before.predict_proba(features), np.finfo(float).eps)
        assert probability == pytest.approx(tempered(lifted, 2.0)[np.arange(12), labels])


@pytest.mark.parametrize("name", FAMILIES)
def test_skops_alone_reads_the_pipeline_and_trusts_all_of_it(tmp_path: Path, name: str) -> None:
    save_model(tmp_path / "m.skops", trained(name))
    assert skops.io.get_untrusted_types(file=tmp_path / "m.skops") == []
    assert isinstance(skops.io.load(tmp_path / "m.skops"), Pipeline)


def test_saving_replaces_a_file_at_once_and_leaves_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.skops"
    save_model(path, trained("ridge"))
    save_model(path, trained("centroid"))
    assert load_model(path).head == "centroid/l2"
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(skops.io, "dump", full)
    with pytest.raises(ModelFileError, match=r"cannot write the model .*No space left"):
        save_model(path, trained())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_places_that_cannot_take_a_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"m\.pth: expected a name that ends in \.skops, such as m\.skops"):
        check_destination(tmp_path / "m.pth", ".skops")
    (tmp_path / "folder.skops").mkdir()
    with pytest.raises(ModelFileError, match="which is a folder; name a file in it"):
        check_destination(tmp_path / "folder.skops", ".skops")
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(ModelFileError, match="no regular file"):
        check_destination(tmp_path / "pipe.csv", ".csv")
    with pytest.raises(ModelFileError, match="no folder"):
        check_destination(tmp_path / "no" / "m.skops", ".skops")
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelFileError, match="no folder"):
        check_destination(tmp_path / "file" / "m.skops", ".skops")
    assert check_destination(tmp_path / "m.SKOPS", ".skops") == tmp_path / "m.SKOPS"


def test_features_of_another_width_are_refused() -> None:
    with pytest.raises(ModelFileError, match="takes 30 features of top, got 29"):
        trained().predict(np.zeros((2, 29)))


def test_any_changed_byte_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    path, fresh = tmp_path / "m.skops", np.random.default_rng(1).standard_normal((9, 30))
    model = trained()
    save_model(path, model)
    whole, rng = path.read_bytes(), np.random.default_rng(2)
    refused = intact = 0
    for place in rng.choice(len(whole), 150, replace=False):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            back = load_model(path)
        except ModelFileError as error:
            refused += "\n" not in str(error)
        else:
            assert back.predict(fresh)[0].tolist() == model.predict(fresh)[0].tolist()
            assert (back.classes, back.layers) == (model.classes, model.layers)
            intact += 1
    assert refused > 75
    assert refused + intact == 150


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_cut_file_is_refused(tmp_path: Path, share: float) -> None:
    path = tmp_path / "m.skops"
    save_model(path, trained())
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ModelFileError, match="damaged or no model file"):
        load_model(path)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.skops"
    with pytest.raises(ModelFileError, match="No such file"):
        load_model(path)
    with pytest.raises(ModelFileError, match="cannot read the model"):
        load_model(tmp_path)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ModelFileError, match="damaged or no model file"):
        load_model(path)
    skops.io.dump(trained().pipeline, path)
    with pytest.raises(ModelFileError, match="no model of thawline"):
        load_model(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "has thawline-model format 2, expected 1"),
        ({"version": None}, "has thawline-model format None, expected 1"),
        ({"format": "other"}, "no model of thawline"),
        ({"drop": True}, "no model of thawline"),
        ({"layers": "top"}, "does not say its layers"),
        ({"layers": []}, "does not say its layers"),
        ({"layers": [{"spec": {}}]}, "does not say its layers"),
        ({"classes": None, "head": 3}, "does not say its head, classes"),
        ({"head": "forest"}, "no head named 'forest'"),
    ],
)
def test_descriptions_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "m.skops"
    save_model(path, trained())
    rewrite(path, **change)
    with pytest.raises(ModelFileError, match=message):
        load_model(path)


def test_a_pipeline_exchanged_for_another_is_noticed(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "a.skops", tmp_path / "b.skops"
    save_model(ours, trained("logreg"))
    save_model(theirs, trained("ridge"))
    with zipfile.ZipFile(ours) as archive:
        description = archive.read("thawline.json")
    skops.io.dump(trained("ridge").pipeline, ours)
    with zipfile.ZipFile(ours, "a") as archive:
        archive.writestr("thawline.json", description)
    with pytest.raises(ModelFileError, match="was changed after it was saved"):
        load_model(ours)
    assert load_model(theirs).head == "ridge/l2"


@pytest.mark.parametrize("key", ["classes", "layers", "head", "params", "metrics"])
def test_a_changed_description_is_noticed(tmp_path: Path, key: str) -> None:
    path = tmp_path / "m.skops"
    save_model(path, trained())
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    description = json.loads(members["thawline.json"])
    description[key] = {"classes": ["bee", "ape", "çat"], "head": "knn"}.get(key, type(description[key])())
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (members | {"thawline.json": json.dumps(description)}).items():
            archive.writestr(name, content)
    with pytest.raises(ModelFileError, match="was changed after it was saved"):
        load_model(path)


def forge(path: Path, content: Any) -> None:
    """Put another object into a model file, with a digest that fits."""
    save_model(path, trained())
    with zipfile.ZipFile(path) as archive:
        description = archive.read("thawline.json")
    skops.io.dump(content, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("thawline.json", description)
    rewrite(path)


class Harmful:
    """Leaves a trace where it is rebuilt."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("trace"),)


def test_nothing_of_a_forged_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "m.skops"
    forge(path, Pipeline([("classifier", Harmful())]))
    with pytest.raises(ModelFileError, match=r"was not loaded: it holds types that no saved head has: .*Harmful"):
        load_model(path)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(("content", "named"), [({"a": 1}, "dict"), (PCA(), "PCA")])
def test_something_else_than_a_pipeline_is_refused(tmp_path: Path, content: Any, named: str) -> None:
    forge(tmp_path / "m.skops", content)
    with pytest.raises(ModelFileError, match=f"holds a {named}, expected a scikit-learn pipeline"):
        load_model(tmp_path / "m.skops")


def test_what_takes_more_memory_than_its_file_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "m.skops"
    forge(path, Pipeline([("classifier", PolynomialFeatures(30))]))
    with pytest.raises(ModelFileError, match="types that no saved head has: PolynomialFeatures"):
        load_model(path)
    save_model(path, trained())
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    schema = json.loads(members["schema.json"])
    first = next(name for name in members if name.endswith(".npy"))
    array = {"__class__": "ndarray", "__module__": "numpy", "__loader__": "NdArrayNode", "type": "numpy", "file": first}
    schema["content"]["content"]["more"] = {"a": array | {"__id__": 1}, "b": array | {"__id__": 2}}
    with zipfile.ZipFile(path, "w") as archive:
        for name, member in members.items():
            archive.writestr(name, json.dumps(schema) if name == "schema.json" else member)
    rewrite(path)
    with pytest.raises(ModelFileError, match=r"no saved head has: .*\.npy, twice"):
        load_model(path)


def test_a_forged_schema_is_an_error_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "m.skops"
    save_model(path, trained())
    with zipfile.ZipFile(path) as archive:
        description = archive.read("thawline.json")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            "schema.json", json.dumps({"__loader__": "ObjectNode", "__class__": "Pipeline", "content": []})
        )
        archive.writestr("thawline.json", description)
    rewrite(path)
    with pytest.raises(ModelFileError, match="does not hold a scikit-learn pipeline"):
        load_model(path)


def test_without_folds_the_fixed_parameters_are_saved() -> None:
    assert trained("logreg").params == search(find_head("logreg"), []).params == {"C": 300.0}


def test_an_archive_that_unpacks_to_more_than_its_size_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.skops"
    save_model(path, trained())
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.npy", bytes(50_000_000))
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_: pytest.fail("a member was read"))
    with pytest.raises(ModelFileError, match=r"m\.skops was not loaded: it would unpack to 5\d{7} bytes; fit and save"):
        load_model(path)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_temperature_is_refused(tmp_path: Path, temperature: float) -> None:
    with pytest.raises(ModelFileError, match="does not say its temperature"):
        FORMAT.read_fields(
            tmp_path, {**dict.fromkeys(FORMAT.fields), **vars(trained()), "classes": [], "temperature": temperature}
        )


def test_a_classifier_that_fails_or_knows_other_classes_is_told_in_one_line() -> None:
    features = np.zeros((2, 30), np.float32)
    with pytest.raises(ModelFileError, match=r"the model's classifier fails: .*; fit and save it again"):
        trained(pipeline=Pipeline([("pca", PCA())])).predict(features)
    with pytest.raises(ModelFileError, match="gives other classes than its description"):
        trained(classes=()).predict(features)


@pytest.mark.parametrize("spec", [SPEC, {"layer": "top", "preprocessing": 3}, {"layer": "top", "preprocessing": None}])
def test_a_layer_that_is_not_fully_described_is_told_in_one_line(spec: dict[str, Any]) -> None:
    with pytest.raises(ModelFileError, match=r"does not say how its layers were extracted: .*; fit and save it again"):
        trained(layers=[LAYER | {"spec": spec}]).specs  # noqa: B018
