from __future__ import annotations

from collections import OrderedDict
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.backbones.graph import describe, resolve_layers, tap
from pipeline.backbones.registry import Backbone, load, sketch
from pipeline.errors import BackboneError
from pipeline.spec import POOLS, Preprocessing

SIDE = 16


def backbone(module: nn.Module, classifier: str | None = "head", side: int = SIDE) -> Backbone:
    preprocessing = Preprocessing((side, side), side, "bilinear", (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    module = module.eval().requires_grad_(False)
    return Backbone("toy/net", "net", "random:0", "0" * 32, module, preprocessing, classifier)


@cache
def named(name: str) -> Backbone:
    return load(name, 64)


def pixels(count: int = 2, side: int = SIDE) -> Tensor:
    return torch.from_numpy(np.random.default_rng(5).integers(0, 256, (count, side, side, 3), dtype=np.uint8))


def run(net: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
    with torch.inference_mode():
        return tuple(net(images))


class Convolutions(nn.Module):
    """Two stages, everything behind a convolution in place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.late = nn.Conv2d(6, 8, 1)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        x = self.norm(self.down(x))
        x += 1
        x = self.late(x).clamp_(min=0)
        return self.head(self.drop(x.mean((2, 3))))


class Untraceable(Convolutions):
    """Decides by the values it sees, so that no one graph describes it."""

    broken = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        if float(x.sum()) < 0:
            return x
        x = self.norm(self.down(x))
        if self.broken:
            raise RuntimeError("out of luck")
        return self.head(self.drop(self.late(x).clamp_(min=0).mean((2, 3))))


def expected(module: nn.Module, layer: str, images: Tensor) -> Tensor:
    """The pooled output of a module by an ordinary, cloning hook."""
    mean, std = torch.tensor((0.5, 0.4, 0.3)), torch.tensor((0.2, 0.3, 0.4))
    kept: list[Tensor] = []
    handle = module.get_submodule(layer).register_forward_hook(lambda _m, _a, value: kept.append(value.clone()))
    with torch.inference_mode():
        module(((images / 255 - mean) / std).permute(0, 3, 1, 2))
    handle.remove()
    return kept[0].mean((2, 3)) if kept[0].ndim == 4 else kept[0]


@pytest.mark.parametrize("kind", [Convolutions, Untraceable])
@pytest.mark.parametrize("layer", ["stem", "relu", "down", "norm", "late", "head"])
def test_what_follows_in_place_changes_no_tap(kind: type[nn.Module], layer: str) -> None:
    module = kind()
    (features,) = run(tap(backbone(module), [layer]), pixels())
    np.testing.assert_allclose(features, expected(module, layer, pixels()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [Convolutions, Untraceable])
def test_penultimate_is_what_the_classifier_reads(kind: type[nn.Module]) -> None:
    module = kind()
    features, logits = run(tap(backbone(module), ["penultimate", "logits"]), pixels())
    np.testing.assert_allclose(module.head(features), logits, rtol=1e-5, atol=1e-6)


def test_the_graph_ends_with_the_last_tap() -> None:
    net = tap(backbone(Convolutions()), ["down", "stem"])
    kept = {name for name, _ in net.body.named_modules()}
    assert {"stem", "relu", "down"} <= kept
    assert not kept & {"norm", "late", "drop", "head"}
    assert list(net.dims) == ["down", "stem"]


def test_a_tap_leaves_the_network_alone() -> None:
    module = Convolutions()
    before = {key: item.clone() for key, item in module.state_dict().items()}
    run(tap(backbone(module), ["late", "penultimate"], "max"), pixels())
    assert all(torch.equal(item, before[key]) for key, item in module.state_dict().items())


@pytest.mark.parametrize("kind", [Convolutions, Untraceable])
def test_a_tapped_network_never_trains(kind: type[nn.Module]) -> None:
    net = tap(backbone(kind()), ["logits"])
    before = run(net, pixels())[0]
    net.train()
    after = run(net, pixels())[0]
    assert not any(part.training for part in net.modules())
    assert torch.equal(before, after)


def hooks(module: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


def test_hooks_are_taken_off_also_after_an_error() -> None:
    module = Untraceable()
    net = tap(backbone(module), ["norm", "penultimate"])
    run(net, pixels())
    assert hooks(module) == 0
    Untraceable.broken = True
    try:
        with pytest.raises(RuntimeError, match="out of luck"):
            run(net, pixels())
    finally:
        Untraceable.broken = False
    assert hooks(module) == 0


def test_an_untraceable_network_has_layers_but_no_stages() -> None:
    net = backbone(Untraceable())
    shapes = {row.name: row.shape for row in describe(net)}
    assert shapes["down"] == (6, SIDE // 2, SIDE // 2)
    assert shapes["head"] == (3,)
    with pytest.raises(BackboneError, match="no stages"):
        resolve_layers(net, ["stages"])


def test_one_module_called_twice_is_tapped_at_its_first_call() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()
            self.head = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.act(self.act(x) - 1).mean((2, 3)))

    module = Twice()
    first, second = run(tap(backbone(module), ["act", "act_1"]), pixels())
    np.testing.assert_allclose(first, expected(module, "act", pixels()), rtol=1e-5, atol=1e-6)
    assert (second < first).all()


def test_input_is_the_area_average_of_the_normalised_image() -> None:
    images = pixels(2, 64)
    (features,) = run(tap(backbone(Convolutions(), side=64), ["input"], "flatten"), images)
    normalised = (images.numpy() / 255 - (0.5, 0.4, 0.3)) / (0.2, 0.3, 0.4)
    blocks = normalised.reshape(2, 32, 2, 32, 2, 3).mean((2, 4)).transpose(0, 3, 1, 2).reshape(2, -1)
    np.testing.assert_allclose(features, blocks, rtol=1e-4, atol=1e-5)


def test_input_alone_runs_no_network() -> None:
    assert tap(backbone(Convolutions()), ["input"]).body is None


@pytest.mark.parametrize("pool", POOLS)
def test_dims_are_the_lengths_of_the_features(pool: str) -> None:
    net = tap(named("resnet18@random:0"), ["stages", "penultimate", "logits", "input"], pool)
    assert [item.shape[1] for item in run(net, pixels(1, 64))] == list(net.dims.values())


def test_pooled_penultimate_is_the_map_that_the_classifier_averages() -> None:
    layers = ["penultimate", "layer4"]
    averaged, _ = run(tap(named("resnet18@random:0"), layers), pixels(1, 64))
    for pool in ("grid2", "max", "flatten"):
        penultimate, last_map = run(tap(named("resnet18@random:0"), layers, pool), pixels(1, 64))
        assert torch.equal(penultimate, last_map)
        assert penultimate.shape != averaged.shape or not torch.allclose(penultimate, averaged)


def test_tokens_are_averaged() -> None:
    vit = load("vit_tiny_patch16_224@random:0")
    (features,) = run(tap(vit, ["blocks.2"]), images := pixels(1, 224))
    kept: list[Tensor] = []
    handle = vit.module.blocks[2].register_forward_hook(lambda _m, _a, value: kept.append(value.clone()))
    mean, std = torch.tensor(vit.preprocessing.mean), torch.tensor(vit.preprocessing.std)
    with torch.inference_mode():
        vit.module(((images / 255 - mean) / std).permute(0, 3, 1, 2))
    handle.remove()
    assert kept[0].shape == (1, 197, 192)
    np.testing.assert_allclose(features, kept[0].mean(1), rtol=1e-4, atol=1e-5)


# Names


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("efficientnet_lite0", [f"blocks.{place}" for place in range(7)]),
        ("resnet50", [f"layer{place}" for place in range(1, 5)]),
        ("timm/resnet18", [f"layer{place}" for place in range(1, 5)]),
    ],
)
def test_stages(name: str, stages: list[str]) -> None:
    assert list(resolve_layers(sketch(name), ["stages"])) == stages


def test_layers_keep_their_order_and_lose_their_twins() -> None:
    asked = ["input", "layer3", "stages", "logits", "fc", "penultimate", "input"]
    found = resolve_layers(sketch("resnet18"), asked)
    assert found == ("input", "layer3", "layer1", "layer2", "layer4", "fc", "penultimate")


def test_a_sketch_knows_what_the_network_has() -> None:
    assert describe(sketch("resnet18", 64)) == describe(named("resnet18@random:0"))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "no layer was asked for"),
        (["layer5"], r"no layer 'layer5'; did you mean layer.*`thawline layers resnet18` lists them all"),
        (["penultimat"], "did you mean penultimate"),
        (["layer1", ""], "no layer ''"),
    ],
)
def test_a_layer_that_is_not_there(layers: list[str], message: str) -> None:
    with pytest.raises(BackboneError, match=message) as caught:
        resolve_layers(sketch("resnet18"), layers)
    assert "\n" not in str(caught.value)


class Odd(nn.Module):
    """Gives shapes that nobody can pool."""

    def __init__(self) -> None:
        super().__init__()
        self.split = nn.Unflatten(1, (1, 3))  # (1, 3, h, w)
        self.pair = nn.AdaptiveMaxPool2d(1, return_indices=True)
        self.never = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(self.split(x).flatten(1, 2))[0].flatten(1)


@pytest.mark.parametrize(("layer", "message"), [("split", "shape"), ("pair", "no tensor"), ("never", "no tensor")])
def test_a_layer_that_cannot_be_pooled_names_some_that_can(layer: str, message: str) -> None:
    with pytest.raises(BackboneError, match=f"{message}.*layers that work"):
        resolve_layers(backbone(Odd(), None), [layer])


def test_without_a_classifier_penultimate_is_the_output() -> None:
    net = backbone(nn.Sequential(OrderedDict(flat=nn.Flatten(), line=nn.Linear(3 * SIDE**2, 5))), None)
    features, line = run(tap(net, ["penultimate", "line"]), pixels())
    assert torch.equal(features, line)
    for alias in ("logits", "stages"):
        with pytest.raises(BackboneError, match="has no"):
            resolve_layers(net, [alias])


def test_an_unknown_pooling() -> None:
    with pytest.raises(BackboneError, match=r"pooling 'average'.*avg, max"):
        tap(backbone(Convolutions()), ["stem"], "average")


def test_a_network_that_does_not_run_at_this_size_says_so() -> None:
    tiny: Any = sketch("inception_v3", 20)
    with pytest.raises(BackboneError, match="does not run on 20x20 images"):
        resolve_layers(tiny, ["stages"])
