from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from sklearn.metrics import log_loss

from features_cache import DONE, open_cache
from pipeline.backbones.layers import list_layers
from pipeline.backbones.network_file import TOP_LAYER, TunedModel, describe_network, load_network, save_network
from pipeline.backbones.registry import load_backbone, sketch
from pipeline.backbones.taps import tap
from pipeline.backbones.top import Standardise
from pipeline.backbones.weights import weights_digest
from pipeline.errors import BackboneError, ModelFileError
from pipeline.extract import extract
from pipeline.finetune import finetune
from pipeline.finetuning.network import ThawedNetwork
from pipeline.predict import predict
from pipeline.spec import LayerSpec

NET = "timm/test_resnet"
TUNE: dict[str, Any] = {"size": 48, "engine": "torch", "device": "cpu", "precision": "fp32", "batch_size": 8}
Photos = Callable[..., Path]


def saved(path: Path, freeze: str = "layer2", top: str = "linear", seed: int = 0) -> ThawedNetwork:
    """Write a network whose new head is random, and return it."""
    backbone = load_backbone(f"{NET}@random:{seed}", 48)
    network = ThawedNetwork(backbone, freeze, top, 3)
    generator = torch.Generator().manual_seed(seed)
    for item in network.new_head.parameters():
        item.data.normal_(0, 0.1, generator=generator)
    state = network.whole_state()
    scores = LayerSpec(NET, weights_digest(state), TOP_LAYER, "avg", backbone.preprocessing, "fp32")
    model = TunedModel(scores, top, ("blue", "green", "red"), 2.0, {})
    save_network(path, model, {name: item.contiguous().numpy() for name, item in state.items()})
    return network


@pytest.mark.parametrize(("top", "freeze"), [("linear", "all"), ("hidden", "layer2"), ("direct", "none")])
def test_the_backbone_of_a_file_computes_what_the_network_does(tmp_path: Path, top: str, freeze: str) -> None:
    network = saved(tmp_path / "tuned.safetensors", freeze, top)
    backbone = load_backbone(f"{NET}@{tmp_path / 'tuned.safetensors'}")
    pixels = torch.randint(0, 256, (4, 48, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        scores, features, middle = tap(backbone, ["logits", "penultimate", "layer3"])(pixels)
        expected = network(pixels)
        read, _ = network.features(pixels)
    assert backbone.weights_digest == describe_network(tmp_path / "tuned.safetensors").scores.weights_digest
    assert (backbone.handle, backbone.preprocessing.size) == ("test_resnet@tuned.safetensors", (48, 48))
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(features, read, rtol=0, atol=1e-5)
    assert middle.shape == (4, 192)


def test_it_has_the_layers_of_its_backbone_and_a_new_head(tmp_path: Path) -> None:
    saved(tmp_path / "tuned.safetensors")
    known = {row.name for row in list_layers(sketch(f"{NET}@random:0", 48))}
    found = {row.name: row for row in list_layers(sketch(f"{NET}@{tmp_path / 'tuned.safetensors'}"))}
    assert set(found) == known - {"fc"} | {TOP_LAYER}
    assert found[TOP_LAYER].shape == (3,)
    assert found[TOP_LAYER].aliases == ("logits",)
    assert "stages" in found["layer2"].aliases


def test_a_network_that_diverged_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tuned.safetensors"
    saved(path)
    model, tensors = load_network(path)
    tensors["layer4.0.conv1.weight"][0, 0, 0] = np.nan
    save_network(path, model, tensors)
    with pytest.raises(BackboneError, match=r"tuned.safetensors holds 3 NaN .* first in layer4.0.conv1.weight"):
        load_backbone(f"{NET}@{path}")


def test_another_architecture_or_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tuned.safetensors"
    saved(path)
    with pytest.raises(BackboneError, match=r"holds timm/test_resnet for 48 pixels, not torchvision/resnet18"):
        load_backbone(f"resnet18@{path}")
    with pytest.raises(BackboneError, match=r"for 64; use timm/test_resnet@.*, without a size"):
        load_backbone(f"{NET}@{path}", 64)


def test_another_white_level_than_its_own_is_refused(make_photos: Photos, tmp_path: Path) -> None:
    path, photos = tmp_path / "tuned.safetensors", make_photos(each=1)
    saved(path)
    with pytest.raises(BackboneError, match=r"without a white level, .* leave out white, or train it again with 4095"):
        extract(photos, [f"{NET}@{path}"], white=4095, output=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    model, tensors = load_network(path)
    own = replace(model.scores, preprocessing=replace(model.scores.preprocessing, white=4095))
    save_network(path, replace(model, scores=own), tensors)
    for white in (None, 4095):
        assert load_backbone(f"{NET}@{path}", white=white).preprocessing.white == 4095
    with pytest.raises(BackboneError, match=r"with the white level 4095, .* train it again with 1023"):
        load_backbone(f"{NET}@{path}", white=1023)


def test_what_the_libraries_no_longer_build_is_told_with_their_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tuned.safetensors"
    network = saved(path)
    state = {name: item.numpy() for name, item in network.whole_state().items() if not name.startswith("layer4")}
    save_network(path, describe_network(path), state)
    with pytest.raises(ModelFileError, match=r"missing: layer4.*libraries it was made with: thawline .*torch "):
        load_backbone(f"{NET}@{path}")


@pytest.mark.parametrize("field", ["scores", "classes", "temperature"])
def test_a_description_that_lacks_something_is_refused(tmp_path: Path, field: str) -> None:
    path = tmp_path / "tuned.safetensors"
    saved(path)
    wrong: dict[str, Any] = {"scores": {"backbone": 1}, "classes": None, "temperature": "warm"}
    with safe_open(path, "np") as file:
        described = json.loads(file.metadata()["thawline"])
    save_file(load_file(path), path, {"thawline": json.dumps(described | {field: wrong[field]})})
    with pytest.raises(ModelFileError, match=f"does not say its {field}"):
        predict(path, tmp_path)


def test_a_million_classes_are_refused_before_they_take_memory(tmp_path: Path) -> None:
    path = tmp_path / "tuned.safetensors"
    saved(path)
    many = replace(describe_network(path), classes=("",) * 1_000_000)
    save_network(path, many, load_file(path))
    with pytest.raises(ModelFileError, match="holds no linear top of 1000000 outputs for timm/test_resnet"):
        load_backbone(f"{NET}@{path}")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("size", size) for size in ([0, 48], [2**31, 2**31], None)),
        *(("mean", [None] * 3), ("std", [0, 0, 0]), ("resize", -8), ("interpolation", "best")),
        *(("precision", True), ("pool", "x"), ("later", 1)),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    path = tmp_path / "tuned.safetensors"
    saved(path)
    with safe_open(path, "np") as file:
        described = json.loads(file.metadata()["thawline"])
    inner = described["scores"]["preprocessing"] if key in described["scores"]["preprocessing"] else described["scores"]
    inner[key] = value
    save_file(load_file(path), path, {"thawline": json.dumps(described)})
    with pytest.raises(ModelFileError, match="does not say its scores"):
        load_backbone(f"{NET}@{path}")


def test_a_stopped_prediction_goes_on(make_photos: Photos, tmp_path: Path) -> None:
    photos, model = make_photos(each=12), tmp_path / "tuned"
    saved(model)
    (photos / "red" / "broken.png").write_bytes(b"no image")
    expected = predict(model, photos, engine="torch").predictions

    def stop(done: int, total: int, text: str, state: str = "") -> None:
        if done >= total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped:
        predict(model, photos, tmp_path / "cache", engine="torch", progress=stop)
    assert "the same command goes on from there" in stopped.value.__notes__[0]
    (path,) = (tmp_path / "cache").glob("*.h5")
    before = int((open_cache(path).states == DONE).sum())
    assert 8 <= before < 36
    handled: list[int] = []
    found = predict(
        model, photos, tmp_path / "cache", engine="torch", progress=lambda done, *_: handled.append(done)
    ).predictions
    assert min(handled) == before
    assert [item.label for item in found] == [item.label for item in expected]
    assert [item.probability for item in found] == pytest.approx([item.probability for item in expected], nan_ok=True)
    assert [item.uri for item in found if item.state == "unreadable"] == ["red/broken.png"]


def test_a_file_that_changed_under_its_name_is_not_answered_from_the_cache(make_photos: Photos, tmp_path: Path) -> None:
    photos, model = make_photos(), tmp_path / "tuned"
    probabilities = []
    for seed in (0, 1, 0):
        saved(model, seed=seed)
        found = predict(model, photos, tmp_path / "cache", engine="torch").predictions
        probabilities.append([item.probability for item in found])
    assert probabilities[0] == probabilities[2] != probabilities[1]


def test_probabilities_are_calibrated_on_the_validation_images(make_photos: Photos, tmp_path: Path) -> None:
    photos, model, table = make_photos(each=12), tmp_path / "tuned.safetensors", tmp_path / "photos.csv"
    files = sorted(photos.rglob("*.png"))
    splits = [("train", "val", "test")[place % 3] for place in range(len(files))]
    with table.open("w", newline="") as stream:
        rows = [(path, path.parent.name, split) for path, split in zip(files, splits, strict=True)]
        csv.writer(stream).writerows([("path", "label", "split"), *rows])
    result = finetune(table, f"{NET}@random:0", freeze="layer2", epochs=2, output=tmp_path / "a", save=model, **TUNE)
    (one,) = result.results
    (done,) = extract(table, [f"{NET}@{model}"], ["logits"], output=tmp_path / "b", precision="fp32", engine="torch")
    scores = np.array(open_cache(done.path).matrix(TOP_LAYER), np.float64)
    labels = np.repeat(range(3), 12)
    held, test = np.array(splits) == "val", np.array(splits) == "test"

    n = held.sum()
    target = np.where(np.eye(3)[labels[held]] == 1, (n + 1) / (n + 2), 1 / (n + 2) / 2)

    def cross_entropy(log_temperature: np.ndarray) -> float:
        return float(-(target * log_softmax(scores[held] / np.exp(log_temperature[0]), axis=1)).sum() / n)

    temperature = float(np.exp(minimize(cross_entropy, [0.0], method="Nelder-Mead", options={"xatol": 1e-6}).x[0]))
    assert one.temperature == pytest.approx(temperature, rel=1e-2)
    assert one.temperature != pytest.approx(1, rel=1e-2)
    assert describe_network(model).temperature == one.temperature
    before, after = (softmax(scores[test] / by, axis=1) for by in (1.0, one.temperature))
    assert one.log_loss == pytest.approx(log_loss(labels[test], before), rel=1e-3)
    assert one.log_loss_calibrated == pytest.approx(log_loss(labels[test], after), rel=1e-3)
    assert one.ece is not None
    assert one.ece_calibrated is not None
    said = predict(model, table, engine="torch").predictions
    expected = softmax(scores / one.temperature, axis=1).max(axis=1)
    np.testing.assert_allclose([item.probability for item in said], expected, rtol=1e-3)


def test_without_validation_images_there_is_no_temperature(make_photos: Photos, tmp_path: Path) -> None:
    model = tmp_path / "tuned.safetensors"
    report = finetune(
        make_photos(), f"{NET}@random:0", freeze="all", shots=[2], epochs=1, output=tmp_path / "a", save=model, **TUNE
    )
    assert report.results[0].temperature is None
    assert report.results[0].log_loss_calibrated is None
    assert report.predictions[0].calibrated is None
    assert describe_network(model).temperature is None


@pytest.mark.parametrize("n", [3, 10, 500])
def test_the_top_shrinks_the_variances_of_few_rows_to_their_mean(n: int) -> None:
    rows = np.random.default_rng(0).standard_normal((n, 6)) * 2.0 ** np.arange(6) + 3
    rows[:, 0] = 1
    top = Standardise(6)
    top.set_from(torch.from_numpy(rows.astype(np.float32)), frozen=True)
    scaled = top(torch.from_numpy(rows.astype(np.float32))).numpy()
    shrunk = (n * rows.var(axis=0) + 20 * rows.var(axis=0).mean()) / (n + 20)
    plain = (rows - rows.mean(axis=0)) / np.sqrt(shrunk)
    assert scaled == pytest.approx(plain / np.sqrt(plain.var(axis=0).mean()), abs=1e-4)
    assert scaled.var(axis=0).mean() == pytest.approx(1, rel=1e-4)
