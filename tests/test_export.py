from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from features_cache import Catalog
from pipeline import export as export_module
from pipeline.errors import ModelFileError
from pipeline.evaluation.calibration import tempered
from pipeline.export import HeadScores, export
from pipeline.extract import extract
from pipeline.finetune import finetune
from pipeline.fit import fit
from pipeline.heads.registry import find_head
from pipeline.heads.saved import load_model
from pipeline.images.decode import from_pillow
from pipeline.images.resize import resize_and_crop
from pipeline.predict import predict
from pipeline.spec import Preprocessing

NETWORK = "timm/test_resnet@random:0"
CLASSES = ("blue", "green", "red")
HOW: dict[str, Any] = {"precision": "fp32", "engine": "torch", "size": 48}


def trained(photos: Path, folder: Path, head: str, layer: str = "layer2", **options: Any) -> Path:
    """Extract in float32, fit, and return the model's path."""
    layers = layer.split("+")
    extract(photos, [NETWORK], layers, output=folder / "cache", **HOW, **options)
    model = folder / f"{head.replace('/', '-')}.skops"
    fit(folder / "cache", [layer], [head], save=model, jobs=1)
    return model


def run(path: Path, pixels: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return what ONNX Runtime makes of pixels, by output name, and the metadata."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [item.name for item in session.get_inputs()] == ["pixels"]
    names = [item.name for item in session.get_outputs()]
    metadata = {name: json.loads(text) for name, text in session.get_modelmeta().custom_metadata_map.items()}
    return dict(zip(names, session.run(None, {"pixels": pixels}), strict=True)), metadata


def doubtful_photos(folder: Path) -> tuple[Path, list[np.ndarray]]:
    """Write photos whose colours are less clear than in training, so that scores are no foregone conclusion."""
    rng = np.random.default_rng(1)
    tints = 60 * np.eye(3, dtype=int)[np.arange(11) % 3]
    mixed = [(rng.integers(0, 160, (60, 50, 3)) + tint).astype(np.uint8) for tint in tints]
    fresh = folder / "fresh"
    fresh.mkdir()
    for number, image in enumerate(mixed):
        Image.fromarray(image).save(fresh / f"{number:02d}.png")
    return fresh, mixed


def run_on_images(path: Path, images: list[np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Prepare images as the file's metadata says, and run it on them."""
    _, metadata = run(path, np.zeros((1, 48, 48, 3), np.uint8))
    preprocessing = Preprocessing.from_json(metadata["preprocessing"])
    return run(
        path, np.stack([resize_and_crop(from_pillow(Image.fromarray(image)), preprocessing) for image in images])
    )


@pytest.mark.parametrize(
    ("head", "layer", "classes", "options"),
    [
        ("logreg", "layer2+input", CLASSES, {}),
        ("logreg", "layer2", CLASSES[:2], {"pool": "avg+max"}),
        ("linear_svm/standard", "penultimate", CLASSES, {"pool": "grid2", "store": "float16"}),
    ],
)
def test_the_graph_says_what_predict_says(
    make_photos: Callable[..., Path], tmp_path: Path, head: str, layer: str, classes: tuple[str, ...], options: Any
) -> None:
    photos = make_photos(classes, each=9)
    model = trained(photos, tmp_path, head, layer, **options)
    result = export(model, tmp_path / "model.onnx")
    fresh, images = doubtful_photos(tmp_path)
    expected = predict(model, fresh, tmp_path / "predicted", engine="torch").predictions
    found, metadata = run_on_images(tmp_path / "model.onnx", images)

    assert result.outputs == list(found)
    assert metadata["classes"] == list(classes)
    assert [classes[label] for label in found["label"]] == [item.label for item in expected]
    assert len({item.label for item in expected}) > 1
    assert found["scores"].shape == (11, len(classes))
    saved = load_model(model)
    specs = [layer["spec"] for layer in saved.layers]
    assert (metadata["model"]["head"], metadata["model"]["layers"]) == (find_head(head).name, specs)
    assert metadata["model"]["metrics"]["accuracy"] == saved.metrics["accuracy"]
    assert metadata["preprocessing"] == specs[0]["preprocessing"]
    catalog = Catalog(tmp_path / "predicted")
    features = np.hstack([catalog.find(layer=name).matrix(name).astype("f") for name in layer.split("+")])
    if head.startswith("logreg"):
        calibrated = tempered(saved.pipeline.predict_proba(features), saved.temperature or 1)
        np.testing.assert_allclose(found["probabilities"], calibrated, atol=1e-3)
        np.testing.assert_allclose(found["probabilities"].max(axis=1), [i.probability for i in expected], atol=1e-3)
    else:
        np.testing.assert_allclose(found["scores"], saved.pipeline.decision_function(features), atol=1e-3)


@pytest.mark.parametrize(("top", "freeze"), [("hidden", "all"), ("direct", "none")])
def test_the_graph_of_a_fine_tuned_network_says_what_predict_says(
    make_photos: Callable[..., Path], tmp_path: Path, top: str, freeze: str
) -> None:
    photos, model = make_photos(CLASSES, each=9), tmp_path / "tuned.safetensors"
    how = {"output": tmp_path / "cache", "save": model, "epochs": 2, "lr": 0.01, "batch_size": 8}
    report = finetune(photos, NETWORK, freeze=freeze, top=top, **HOW, **how)
    result = export(model, tmp_path / "model.onnx")
    fresh, images = doubtful_photos(tmp_path)
    expected = predict(model, fresh, tmp_path / "predicted", engine="torch").predictions
    found, metadata = run_on_images(tmp_path / "model.onnx", images)

    assert result.outputs == list(found)
    assert (metadata["classes"], metadata["model"]["head"]) == (list(CLASSES), top)
    assert metadata["model"]["temperature"] == report.results[0].temperature
    assert [CLASSES[label] for label in found["label"]] == [item.label for item in expected]
    scores = Catalog(tmp_path / "predicted").find(layer="new_head").matrix("new_head")
    np.testing.assert_allclose(found["scores"], scores, atol=1e-3)
    np.testing.assert_allclose(found["probabilities"].max(axis=1), [i.probability for i in expected], atol=1e-3)


@pytest.mark.parametrize(("task", "head"), [("multilabel", "logreg"), ("regression", "")])
def test_the_graph_gives_labels_or_a_number(
    make_photos: Callable[..., Path], tmp_path: Path, task: str, head: str
) -> None:
    photos, table, model = make_photos(CLASSES, each=9), tmp_path / "table.csv", tmp_path / "model.safetensors"
    rows = [
        f"{name}/{i}.png,{'|'.join(CLASSES[: k + 1])},{10 * k + i}" for k, name in enumerate(CLASSES) for i in range(9)
    ]
    table.write_text("\n".join(["uri,parts,weight", *(row.replace("|".join(CLASSES), "|", 1) for row in rows)]))
    told = {"labels": table, "target": "parts" if task == "multilabel" else "weight", "task": task}
    if head:
        extract(photos, [NETWORK], ["layer2"], output=tmp_path / "cache", **HOW)
        model = tmp_path / "model.skops"
        fit(tmp_path / "cache", heads=[head], save=model, **told)
    else:
        finetune(photos, NETWORK, output=tmp_path / "cache", save=model, epochs=3, lr=0.01, **HOW, **told)
    result = export(model, tmp_path / "model.onnx")
    fresh, images = doubtful_photos(tmp_path)
    expected = predict(model, fresh, tmp_path / "predicted", engine="torch").predictions
    found, metadata = run_on_images(tmp_path / "model.onnx", images)
    assert result.outputs == list(found)
    if task == "regression":
        np.testing.assert_allclose(found["value"], [one.value for one in expected], rtol=1e-3, atol=1e-2)
        return
    names = metadata["classes"]
    scores = np.array([[(one.scores or {})[name] for name in names] for one in expected])
    np.testing.assert_allclose(found["probabilities"], scores, atol=1e-3)
    said = ["|".join(name for name, has in zip(names, row, strict=True) if has) or "|" for row in found["labels"]]
    assert said == [one.label for one in expected]


def test_pixels_are_to_be_made_with_the_white_level_of_the_features(
    make_photos: Callable[..., Path], tmp_path: Path
) -> None:
    model = trained(make_photos(each=9), tmp_path, "ridge", "layer1", white=4095)
    parts = export_module._head_parts(load_model(model))
    assert export_module._metadata(parts)["preprocessing"]["white"] == 4095


def test_other_heads_score_as_scikit_learn_does(make_photos: Callable[..., Path], tmp_path: Path) -> None:
    photos, (first, second) = make_photos(), ("ridge/none", "centroid")
    ridge, centroid = load_model(trained(photos, tmp_path, first)), load_model(trained(photos, tmp_path, second))
    features = np.random.default_rng(0).standard_normal((20, ridge.layers[0]["dim"])).astype("f")
    found = [HeadScores(saved, half=False)(torch.from_numpy(features)).numpy() for saved in (ridge, centroid)]
    np.testing.assert_allclose(found[0], ridge.pipeline.decision_function(features), rtol=1e-3, atol=1e-3)
    scaler, classifier = (centroid.pipeline.named_steps[name] for name in ("scaler", "classifier"))
    distances, numbers = classifier.kneighbors(scaler.transform(features), 3)
    nearness = -np.square(np.take_along_axis(distances, np.argsort(numbers, axis=1), 1)) / 2
    np.testing.assert_allclose(found[1] - found[1][:, :1], nearness - nearness[:, :1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("head", ["rbf_svm", "knn"])
def test_heads_without_hyperplanes_are_refused(make_photos: Callable[..., Path], tmp_path: Path, head: str) -> None:
    model = trained(make_photos(), tmp_path, head)
    with pytest.raises(ModelFileError, match=f"{head}/l2 has none; fit another, such as logreg"):
        export(model, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_layers_of_two_poolings_are_refused(make_photos: Callable[..., Path], tmp_path: Path) -> None:
    photos = make_photos()
    for layer, pool in (("layer1", "avg"), ("layer2", "max")):
        extract(photos, [NETWORK], [layer], pool, tmp_path / "cache", **HOW)
    fit(tmp_path / "cache", ["layer1+layer2"], ["ridge"], save=tmp_path / "m.skops", jobs=1)
    with pytest.raises(ModelFileError, match=r"all layers to be of one backbone and pooling, got .*layer1 \(avg\)"):
        export(tmp_path / "m.skops", tmp_path / "model.onnx")


def test_another_network_under_the_same_name_is_refused(
    make_photos: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained(make_photos(), tmp_path, "ridge")
    monkeypatch.setattr(export_module, "load_backbone", lambda name, size: load_other(size))
    with pytest.raises(ModelFileError, match=r"other weights or another preprocessing"):
        export(model, tmp_path / "model.onnx")


def load_other(size: int) -> Any:
    from pipeline.backbones.registry import load_backbone

    return load_backbone(NETWORK.replace(":0", ":1"), size)


def test_what_cannot_be_written_leaves_nothing(
    make_photos: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = trained(make_photos(), tmp_path, "ridge"), tmp_path / "model.onnx"
    with pytest.raises(ModelFileError, match=r"no folder"):
        export(model, tmp_path / "nowhere" / "model.onnx")

    whole = torch.onnx.export

    def lacking(*given: Any, **options: Any) -> Any:
        """Export, and lose the node that the last one reads."""
        program = whole(*given, **options)
        assert program is not None
        program.model.graph.remove(
            next(one.producer() for one in reversed(program.model.graph[-1].inputs) if one.producer())
        )
        return program

    with monkeypatch.context() as broken:
        broken.setattr(torch.onnx, "export", lacking)
        with pytest.raises(ModelFileError, match="cannot be written as ONNX: torch's exporter makes a damaged graph"):
            export(model, path)

    def fail(*_: Any, **__: Any) -> None:
        raise torch.onnx.OnnxExporterError("step 3 failed") from AssertionError("no operator\nfor that")

    monkeypatch.setattr(torch.onnx, "export", fail)
    before = set(tmp_path.iterdir())
    with pytest.raises(ModelFileError, match=r"cannot be written as ONNX: no operator$"):
        export(model, path)
    monkeypatch.setattr(export_module, "find_spec", lambda name: None)
    with pytest.raises(ModelFileError, match=r"pip install 'thawline\[onnx\]'"):
        export(model, path)
    assert set(tmp_path.iterdir()) == before
