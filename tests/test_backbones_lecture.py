"""The lecture's networks, against what is published about them and against forward hooks on the plain networks."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn

from pipeline.backbones.graph import describe, resolve_layers, tap
from pipeline.backbones.registry import Backbone, load


class Published(NamedTuple):
    parameters: int
    side: int
    stages: dict[str, tuple[int, int]]  # name: channels, side
    penultimate: int
    classifier: str
    inner: tuple[str, ...]  # some more layers to compare
    whole: int | None = None  # parameters with auxiliary heads


RESNET = {"layer1": (64, 56), "layer2": (128, 28), "layer3": (256, 14), "layer4": (512, 7)}
NETWORKS = {
    "vgg19": Published(
        143_667_240,
        224,
        {
            "features.3": (64, 224),
            "features.8": (128, 112),
            "features.17": (256, 56),
            "features.26": (512, 28),
            "features.35": (512, 14),
        },
        4096,
        "classifier.6",
        ("features.2", "features.36", "classifier.0"),
    ),
    "resnet18": Published(11_689_512, 224, RESNET, 512, "fc", ("bn1", "layer2.0.downsample", "layer3.1.conv2")),
    "resnet34": Published(21_797_672, 224, RESNET, 512, "fc", ("relu", "layer3.5.bn1")),
    "googlenet": Published(
        6_624_904,
        224,
        {"inception3b": (480, 28), "inception4e": (832, 14), "inception5b": (1024, 7)},
        1024,
        "fc",
        ("conv2", "inception4a.branch2", "maxpool4"),
        13_004_888,
    ),
    "inception_v3": Published(
        23_834_568,
        299,
        {"Mixed_5d": (288, 35), "Mixed_6e": (768, 17), "Mixed_7c": (2048, 8)},
        2048,
        "fc",
        ("Conv2d_2b_3x3", "Mixed_6a", "Mixed_7a.branch3x3_2.bn"),
        27_161_264,
    ),
    "inception_v4": Published(
        42_679_816,
        299,
        {"features.4": (192, 71), "features.9": (384, 35), "features.17": (1024, 17), "features.21": (1536, 8)},
        1536,
        "last_linear",
        ("features.0.bn", "features.12.branch1"),
    ),
    "inception_resnet_v2": Published(
        55_843_464,
        299,
        {"repeat": (320, 35), "repeat_1": (1088, 17), "block8": (2080, 8)},
        1536,
        "classif",
        ("mixed_5b", "repeat_1.7", "conv2d_7b"),
    ),
}


@cache
def network(name: str) -> Backbone:
    return load(f"{name}@random:0")


@cache
def plain(name: str) -> nn.Module:
    """The zoo's own network with the same weights, built without our code."""
    options = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with torch.device("meta"):
        if name in torchvision.models.list_models():
            module = torchvision.models.get_model(name, weights=None, **options)
        else:
            module = timm.create_model(name)
    module.load_state_dict(network(name).module.state_dict(), assign=True)
    return module.eval()


def pixels_of(backbone: Backbone, count: int) -> torch.Tensor:
    rng = np.random.default_rng(3)
    return torch.from_numpy(rng.integers(0, 256, (count, *backbone.preprocessing.size, 3), dtype=np.uint8))


def normalised(backbone: Backbone, pixels: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(item) for item in (backbone.preprocessing.mean, backbone.preprocessing.std))
    return ((pixels / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def by_hooks(module: nn.Module, x: torch.Tensor, outputs: list[str], inputs: list[str]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}

    def keep_output(name: str) -> Any:
        return lambda _module, _args, value: found.setdefault(name, value.clone()) is None or None

    def keep_input(name: str) -> Any:
        return lambda _module, args: found.setdefault(f"{name}:input", args[0].clone()) is None or None

    handles = [module.get_submodule(name).register_forward_hook(keep_output(name)) for name in outputs]
    handles += [module.get_submodule(name).register_forward_pre_hook(keep_input(name)) for name in inputs]
    with torch.inference_mode():
        module(x)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_parameters_and_layers_are_the_published_ones(name: str) -> None:
    published, backbone = NETWORKS[name], network(name)
    assert sum(item.numel() for item in backbone.module.parameters()) == published.parameters
    assert backbone.preprocessing.size == (published.side, published.side)
    assert backbone.classifier == published.classifier
    rows = {row.name: row for row in describe(backbone)}
    assert rows["input"].shape == (3, published.side, published.side)
    assert rows["input"].aliases == ("input",)
    assert rows[published.classifier].shape == (1000,)
    assert "logits" in rows[published.classifier].aliases
    for stage, (channels, side) in published.stages.items():
        assert rows[stage].shape == (channels, side, side)
        assert "stages" in rows[stage].aliases
    (read,) = (row for row in rows.values() if "penultimate" in row.aliases)
    assert read.shape == (published.penultimate,)
    assert resolve_layers(backbone, ["stages"]) == tuple(published.stages)


@pytest.mark.parametrize("name", [name for name in NETWORKS if NETWORKS[name].whole])
def test_only_the_auxiliary_heads_are_missing(name: str) -> None:
    with torch.device("meta"):
        whole = torchvision.models.get_model(name, weights=None, aux_logits=True, init_weights=False)
    heads = {"aux1", "aux2", "AuxLogits"}
    assert sum(item.numel() for item in whole.parameters()) == NETWORKS[name].whole
    rest = {key for key in whole.state_dict() if key.partition(".")[0] not in heads}
    assert rest == set(network(name).module.state_dict())


@pytest.mark.parametrize("name", NETWORKS)
def test_one_pass_gives_what_forward_hooks_on_the_plain_network_give(name: str) -> None:
    published, backbone = NETWORKS[name], network(name)
    outputs = [*published.stages, *published.inner, published.classifier]
    pixels = pixels_of(backbone, 1)
    expected = by_hooks(plain(name), normalised(backbone, pixels), outputs, [published.classifier])
    net = tap(backbone, [*outputs, "penultimate", "input"])
    with torch.inference_mode():
        features = dict(zip(net.layers, net(pixels), strict=True))
    assert features["input"].shape == (1, 3072)
    wanted = {layer: expected[layer] for layer in outputs} | {"penultimate": expected[f"{published.classifier}:input"]}
    for layer, activations in wanted.items():
        pooled = activations.mean((2, 3)) if activations.ndim == 4 else activations
        assert features[layer].dtype == torch.float32
        assert features[layer].shape == pooled.shape == (1, net.dims[layer])
        scale = float(pooled.abs().max())
        assert scale > 0
        np.testing.assert_allclose(features[layer] / scale, pooled / scale, atol=1e-4, err_msg=layer)
