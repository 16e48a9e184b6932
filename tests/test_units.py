from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import mannwhitneyu, norm

from features_cache import open_cache
from pipeline.backbones.receptive_field import SHARE, Box, find_maxima
from pipeline.backbones.registry import load_backbone
from pipeline.backbones.taps import normalisation
from pipeline.backbones.trace import hooked
from pipeline.diagnostics.selectivity import selectivity
from pipeline.errors import FitError, SourceError
from pipeline.extract import extract
from pipeline.units import units

OPTIONS: dict[str, Any] = {"size": 32, "engine": "torch", "device": "cpu", "precision": "fp32"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, write_photos: Callable[..., Path]) -> Path:
    return write_photos(tmp_path_factory.mktemp("units") / "photos", ("<b>blue", "green", "red"), each=10)


@pytest.fixture(scope="module")
def cache(photos: Path) -> Path:
    folder = photos.parent / "cache"
    extract(photos, ["test_resnet@random:0"], ["layer1", "layer3"], "max", folder, **OPTIONS)
    return folder


def test_the_statistic_is_that_of_the_rank_sum_test() -> None:
    rng = np.random.default_rng(0)
    labels = np.array([4] * 12 + [7] * 20 + [9] * 8)
    features = np.maximum(rng.normal(size=(40, 6)) + (labels == 7)[:, None] * np.arange(6) / 3, 0).astype(np.float32)
    features[:, 0] = 1.5
    found = selectivity(features, labels, np.full(40, ""), permutations=19)
    assert found.statistic[0] == 0
    for unit in range(1, 6):
        tests = {}
        for label in (4, 7, 9):
            own, other = features[labels == label, unit], features[labels != label, unit]
            u, p = mannwhitneyu(own, other, alternative="greater", use_continuity=False, method="asymptotic")
            tests[label] = (norm.isf(p), u / (len(own) * len(other)))
        best = max(tests, key=lambda label: tests[label][0])
        assert found.label[unit] == best
        assert (found.statistic[unit], found.auc[unit]) == pytest.approx(tests[best], rel=1e-4)


@pytest.mark.parametrize("grouped", ["none", "inside", "whole"])
def test_units_without_a_class_are_called_selective_as_often_as_stated(grouped: str) -> None:
    rng = np.random.default_rng(1)
    false, runs = 0, 100
    for _ in range(runs):
        number = np.repeat(np.arange(15), 4)
        labels = rng.permutation(np.repeat([0, 1, 2], 5))[number] if grouped == "whole" else rng.integers(0, 3, 60)
        groups = np.full(60, "") if grouped == "none" else number.astype(str)
        common = rng.normal(size=(60, 1)) + (rng.normal(size=(15, 12))[number] * 2 if grouped != "none" else 0)
        features = (rng.normal(size=(60, 12)) + common).astype(np.float32)
        false += bool((selectivity(features, labels, groups, permutations=19).p_value <= 0.05).any())
    assert false / runs <= 0.05 + 2.5 * np.sqrt(0.05 * 0.95 / runs)


def test_a_selective_unit_is_found_among_many() -> None:
    rng = np.random.default_rng(2)
    labels = np.repeat([0, 1], 30)
    features = rng.normal(size=(60, 200)).astype(np.float32)
    features[labels == 1, 123] += 2
    found = selectivity(features, labels, np.full(60, ""), permutations=199)
    assert np.flatnonzero(found.p_value <= 0.05).tolist() == [123]


def activations_of(backbone: Any, layer: str, pixels: np.ndarray) -> torch.Tensor:
    kept: list[torch.Tensor] = []
    scale, shift = normalisation(backbone.preprocessing)
    with hooked(backbone.module, {layer: lambda _, __, value: kept.append(value.clone())}), torch.no_grad():
        backbone.module(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() * scale + shift)
    return kept[0]


def test_a_box_lies_in_the_receptive_field_of_the_maximum() -> None:
    backbone = load_backbone("resnet18@random:0", 64)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3)).astype(np.uint8)
    channels = np.array([0, 5, 5, 9, 63])
    maps = activations_of(backbone, "conv1", pixels)
    for index, found in enumerate(find_maxima(backbone, "conv1", pixels, channels)):
        one = maps[index, channels[index]]
        row, column = divmod(int(one.argmax()), 32)
        assert found.activation == pytest.approx(float(one.max()), rel=1e-5)
        for low, high, place in ((found.box.left, found.box.right, column), (found.box.top, found.box.bottom, row)):
            assert max(0, 2 * place - 3) <= low < high <= min(64, 2 * place + 4)  # 7 x 7, stride 2, padding 3
        assert 4 <= found.box.right - found.box.left <= 7


def test_deeper_layers_look_at_more_and_tokens_are_patches() -> None:
    backbone = load_backbone("test_vit@random:0")
    side = backbone.preprocessing.size[0]
    pixels = np.random.default_rng(0).integers(0, 256, (2, side, side, 3)).astype(np.uint8)
    tokens = activations_of(backbone, "blocks.1", pixels)
    found = find_maxima(backbone, "blocks.1", pixels, np.array([3, 60]))
    expected = [float(tokens[0, 1:, 3].max()), float(tokens[1, 1:, 60].max())]
    assert [one.activation for one in found] == pytest.approx(expected, rel=1e-4)
    whole = load_backbone("resnet18@random:0", 64)
    noise = np.random.default_rng(1).integers(0, 256, (4, 64, 64, 3)).astype(np.uint8)
    sides = [
        np.mean([one.box.right - one.box.left for one in find_maxima(whole, layer, noise, np.arange(4))])
        for layer in ("conv1", "layer1", "layer2", "layer4")
    ]
    assert sides == sorted(sides)
    assert sides[-1] > 4 * sides[0]


def test_a_vector_and_a_dead_position_see_the_whole_image() -> None:
    backbone = load_backbone("test_resnet@random:0", 32)
    pixels = np.zeros((1, 32, 32, 3), np.uint8)
    (found,) = find_maxima(backbone, "fc", pixels, np.array([7]))
    assert found.activation == pytest.approx(float(activations_of(backbone, "fc", pixels)[0, 7]), rel=1e-4)
    for item in backbone.module.conv1.parameters():
        item.zero_()
    assert find_maxima(backbone, "layer1", pixels, np.array([0]))[0].box == Box(0, 0, 32, 32)
    assert SHARE < 1


def test_the_strongest_images_are_those_of_the_cache(cache: Path, photos: Path) -> None:
    report = units(cache, ["layer1", "layer3"], [2, 0])
    assert [(unit.layer, unit.channel) for unit in report.units] == [
        ("layer1", 2), ("layer1", 0), ("layer3", 2), ("layer3", 0),
    ]  # fmt: skip
    from features_cache import Catalog

    file = Catalog(cache).find("layer3")
    column = file.features("layer3", np.arange(30))[:, 2]
    best = np.argsort(-column)[:8]
    examples = report.units[2].examples
    assert [one.uri for one in examples] == file.uris[best].tolist()
    assert [one.activation for one in examples] == pytest.approx(column[best].tolist(), rel=1e-4)
    assert [one.label for one in examples] == [one.uri.split("/")[0] for one in examples]
    assert all(
        crop.shape[0] == crop.shape[1] == one.box[2] - one.box[0]
        for crop, one in zip(report.crops[2], examples, strict=True)
    )


def test_inputs_need_not_be_squares(photos: Path, tmp_path: Path) -> None:
    (made,) = extract(photos, ["test_resnet@random:0"], ["layer1"], "max", tmp_path, **OPTIONS | {"size": (32, 64)})
    file = open_cache(made.path)
    report = units(tmp_path, ["layer1"], channels=[3])
    (unit,) = report.units
    strongest = np.sort(np.asarray(file.matrix("layer1"))[:, 3])[::-1][: len(unit.examples)]
    assert [one.activation for one in unit.examples] == pytest.approx(strongest.tolist(), rel=1e-4)


def test_each_class_gets_its_most_selective_unit_first(cache: Path) -> None:
    report = units(cache, ["layer3"])
    tested = {unit.prefers for unit in report.units[:3]}
    assert len(tested) == 3, "colours are told by random filters"
    assert report.units[0].p_value is not None
    assert report.units[0].p_value <= 0.05
    assert report.layers["layer3"]["selective"]
    first = [unit for unit in report.units if unit.prefers == report.units[0].prefers]
    statistics = [unit.statistic for unit in first if unit.statistic is not None]
    assert statistics == sorted(statistics, reverse=True)


def test_the_command_writes_one_page_that_loads_nothing(
    thawline: Callable[..., Any], cache: Path, tmp_path: Path
) -> None:
    page = tmp_path / "units.html"
    document = thawline("units", cache, "-l", "layer1", "-o", page, "--json").json
    assert document["page"] == str(page)
    assert set(document) == {"units", "layers", "notes", "page"}
    assert {"layer", "channel", "prefers", "auc", "p_value", "examples"} <= set(document["units"][0])
    text = page.read_text()
    assert "<b>" not in text
    assert "&lt;b&gt;blue/" in text
    assert text.count("data:image/webp;base64,") == sum(len(unit["examples"]) for unit in document["units"])
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", text)
    assert "prefers-color-scheme: dark" in text
    printed = thawline("units", cache, "-l", "layer1", "--channel", 3, "-o", page).stdout
    assert f"page: {page}" in printed
    assert "layer1: " in printed


def test_images_without_classes_have_units_too(tmp_path: Path, photos: Path) -> None:
    (tmp_path / "flat").mkdir()
    for number, path in enumerate(sorted(photos.rglob("*.png"))[::3]):
        (tmp_path / "flat" / f"{number}.png").write_bytes(path.read_bytes())
    extract(tmp_path / "flat", ["test_resnet@random:0"], ["layer1"], "max", tmp_path / "c", **OPTIONS)
    report = units(tmp_path / "c", ["layer1"])
    assert len(report.units) == 8
    assert report.units[0].prefers is None
    assert any("without two classes" in note for note in report.notes)
    Image.new("RGB", (9, 9)).save(tmp_path / "flat" / Path(report.units[0].examples[0].uri))
    with pytest.raises(SourceError, match="changed since it was extracted"):
        units(tmp_path / "c", ["layer1"])


def test_what_cannot_be_shown_is_refused(cache: Path, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(FitError, match=r"layer1 has the channels 0 to \d+, not 5000"):
        units(cache, ["layer1"], [5000])
    with pytest.raises(FitError, match="expected at most 128 units on a page, got 129"):
        units(cache, ["layer3"], range(129))
    extract(photos, ["test_resnet@random:0"], ["layer1"], "avg", tmp_path / "c", **OPTIONS)
    with pytest.raises(FitError, match="extract with pool max"):
        units(tmp_path / "c", ["layer1"])
    (tmp_path / "alike").mkdir()
    for name in ("a.png", "b.bmp"):  # equal pixels, other bytes
        Image.new("RGB", (64, 64), (90, 30, 200)).save(tmp_path / "alike" / name)
    extract(tmp_path / "alike", ["test_resnet@random:0"], ["layer1"], "max", tmp_path / "a", **OPTIONS)
    with pytest.raises(FitError, match="each channel of layer1 is the same in all images"):
        units(tmp_path / "a", ["layer1"])
    extract(photos, ["test_resnet@random:0"], ["input"], "max", tmp_path / "i", **OPTIONS)
    with pytest.raises(FitError, match="has no units"):
        units(tmp_path / "i", ["input"])
