"""The lecture's networks with random weights, against plain torchvision and timm models holding the same weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from pipeline.backbones.backbone import Backbone
from pipeline.backbones.layers import list_layers, resolve_layers
from pipeline.backbones.registry import load_backbone
from pipeline.backbones.taps import tap

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class Expected(NamedTuple):
    """What the papers and the model zoos say; layers are module names with their (c, h, w)."""

    name: str
    plain: Callable[[], nn.Module]
    side: int
    resize: int
    plain_mean_std: tuple[tuple[float, ...], tuple[float, ...]]
    parameters: int
    stages: dict[str, tuple[int, int, int]]
    penultimate: int
    grid2: int
    logits: str


def torchvision_model(name: str, **options: object) -> nn.Module:
    return torchvision.models.get_model(name, weights=None, **options)


RESNET_STAGES = {"layer1": (64, 56, 56), "layer2": (128, 28, 28), "layer3": (256, 14, 14), "layer4": (512, 7, 7)}
VGG_STAGES = {
    "features.3": (64, 224, 224),
    "features.8": (128, 112, 112),
    "features.17": (256, 56, 56),
    "features.26": (512, 28, 28),
    "features.35": (512, 14, 14),
}
GOOGLENET_STAGES = {"inception3b": (480, 28, 28), "inception4e": (832, 14, 14), "inception5b": (1024, 7, 7)}
V3_STAGES = {"Mixed_5d": (288, 35, 35), "Mixed_6e": (768, 17, 17), "Mixed_7c": (2048, 8, 8)}
V4_STAGES = {
    "features.4": (192, 71, 71),
    "features.9": (384, 35, 35),
    "features.17": (1024, 17, 17),
    "features.21": (1536, 8, 8),
}
RESNET_V2_STAGES = {"repeat": (320, 35, 35), "repeat_1": (1088, 17, 17), "block8": (2080, 8, 8)}
# torchvision's Inceptions re-normalise inside: their plain models get ImageNet's mean and std and `transform_input`.
googlenet = partial(torchvision_model, "googlenet", aux_logits=False, init_weights=False, transform_input=True)
inception_v3 = partial(torchvision_model, "inception_v3", aux_logits=False, init_weights=False, transform_input=True)
NETWORKS = [
    Expected(
        "vgg19",
        partial(torchvision_model, "vgg19"),
        224,
        256,
        IMAGENET,
        143_667_240,
        VGG_STAGES,
        4096,
        4096,
        "classifier.6",
    ),
    Expected(
        "resnet18",
        partial(torchvision_model, "resnet18"),
        224,
        256,
        IMAGENET,
        11_689_512,
        RESNET_STAGES,
        512,
        2048,
        "fc",
    ),
    Expected(
        "resnet34",
        partial(torchvision_model, "resnet34"),
        224,
        256,
        IMAGENET,
        21_797_672,
        RESNET_STAGES,
        512,
        2048,
        "fc",
    ),
    Expected("googlenet", googlenet, 224, 256, IMAGENET, 6_624_904, GOOGLENET_STAGES, 1024, 4096, "fc"),
    Expected("inception_v3", inception_v3, 299, 342, IMAGENET, 23_834_568, V3_STAGES, 2048, 8192, "fc"),
    Expected(
        "inception_v4",
        partial(timm.create_model, "inception_v4"),
        299,
        341,
        HALF,
        42_679_816,
        V4_STAGES,
        1536,
        6144,
        "last_linear",
    ),
    Expected(
        "inception_resnet_v2",
        partial(timm.create_model, "inception_resnet_v2"),
        299,
        333,
        HALF,
        55_843_464,
        RESNET_V2_STAGES,
        1536,
        6144,
        "classif",
    ),
]


class Loaded(NamedTuple):
    expected: Expected
    backbone: Backbone
    plain: nn.Module


@pytest.fixture(scope="module", params=NETWORKS, ids=lambda network: network.name)
def loaded(request: pytest.FixtureRequest) -> Loaded:
    expected: Expected = request.param
    backbone = load_backbone(f"{expected.name}@random:0")
    with torch.device("meta"):
        plain = expected.plain().eval()
    plain.load_state_dict(backbone.module.state_dict(), assign=True)
    return Loaded(expected, backbone, plain)


def hooked_features(network: Loaded, pixels: Tensor, names: list[str]) -> dict[str, Tensor]:
    """Return clones of what the named modules of the plain model return, and ``read``: what the classifier reads."""
    found: dict[str, Tensor] = {}

    def keep(name: str, _module: nn.Module, args: tuple[Tensor, ...], value: Tensor) -> None:
        found[name] = value.clone()
        if name == network.expected.logits:
            found["read"] = args[0].clone()

    handles = [
        network.plain.get_submodule(name).register_forward_hook(partial(keep, name))
        for name in [*names, network.expected.logits]
    ]
    mean, std = (torch.tensor(item).view(1, 3, 1, 1) for item in network.expected.plain_mean_std)
    with torch.inference_mode():
        network.plain((pixels.permute(0, 3, 1, 2) / 255 - mean) / std)
    for handle in handles:
        handle.remove()
    return found


def test_the_network_is_the_published_one(loaded: Loaded) -> None:
    expected, backbone = loaded.expected, loaded.backbone
    zoo = "timm" if expected.plain_mean_std is HALF else "torchvision"
    assert backbone.name == f"{zoo}/{expected.name}"
    assert backbone.handle == f"{expected.name}@random:0"
    assert sum(item.numel() for item in backbone.module.parameters()) == expected.parameters
    assert backbone.classifiers == (expected.logits,)
    assert backbone.preprocessing.size == (expected.side, expected.side)
    assert backbone.preprocessing.resize == expected.resize
    assert not any(part.training for part in backbone.module.modules())
    assert not any(item.requires_grad for item in backbone.module.parameters())


def test_layers_and_shapes(loaded: Loaded) -> None:
    expected, backbone = loaded.expected, loaded.backbone
    rows = {row.name: row for row in list_layers(backbone)}
    assert resolve_layers(backbone, ["stages"]) == tuple(expected.stages)
    assert {name: rows[name].shape for name in expected.stages} == expected.stages
    assert all("stages" in rows[name].aliases for name in expected.stages)
    assert rows[expected.logits].shape == (1000,)
    assert "logits" in rows[expected.logits].aliases
    assert [row.shape for row in rows.values() if "penultimate" in row.aliases] == [(expected.penultimate,)]


def test_features_equal_those_of_hooks_on_the_plain_model(loaded: Loaded) -> None:
    expected, backbone = loaded.expected, loaded.backbone
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (1, expected.side, expected.side, 3), dtype=torch.uint8, generator=generator)
    names = list(expected.stages)
    network = tap(backbone, [*names, "penultimate", "logits"])
    with torch.inference_mode():
        features = dict(zip(network.layers, network(pixels), strict=True))
    hooked = hooked_features(loaded, pixels, names)
    wanted = {name: hooked[name].mean((2, 3)) for name in names}
    wanted |= {"penultimate": hooked["read"], expected.logits: hooked[expected.logits]}
    assert network.dims["avg"] == {name: item.shape[1] for name, item in wanted.items()}
    for name, item in wanted.items():
        scale = max(item.abs().max().item(), 1e-12)
        np.testing.assert_allclose(features[name] / scale, item / scale, atol=1e-4, err_msg=name)


def test_penultimate_keeps_its_map_for_other_poolings(loaded: Loaded) -> None:
    expected, backbone = loaded.expected, loaded.backbone
    assert tap(backbone, ["penultimate"], "avg").dims["avg"] == {"penultimate": expected.penultimate}
    assert tap(backbone, ["penultimate"], "grid2").dims["grid2"] == {"penultimate": expected.grid2}
