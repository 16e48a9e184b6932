from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from pipeline.backbones.aliases import classifier_reads
from pipeline.backbones.backbone import Backbone
from pipeline.backbones.layers import list_layers, resolve_layers
from pipeline.backbones.pooling import POOLINGS, TokenOrder
from pipeline.backbones.registry import load_backbone, sketch
from pipeline.backbones.subgraph import cut_nodes
from pipeline.backbones.taps import TappedNetwork, normalisation, tap
from pipeline.backbones.trace import hooked, trace
from pipeline.errors import BackboneError
from pipeline.spec import POOLS, Preprocessing

SIDE = 64
PREPROCESSING = Preprocessing((SIDE, SIDE), 73, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def wrap(module: nn.Module, classifier: str | None = None, side: int = SIDE) -> Backbone:
    """A backbone around a network of our own."""
    frozen = module.eval().requires_grad_(False)
    preprocessing = Preprocessing((side, side), side, "bilinear", PREPROCESSING.mean, PREPROCESSING.std)
    return Backbone("own/net", "net", "random:0", "", frozen, preprocessing, (classifier,) if classifier else ())


@pytest.fixture(scope="module")
def resnet() -> Backbone:
    return load_backbone("resnet18@random:0", size=SIDE)


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.randint(0, 256, (2, SIDE, SIDE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def normalised(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(item).view(1, 3, 1, 1) for item in (PREPROCESSING.mean, PREPROCESSING.std))
    return (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std


def hook_outputs(module: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
    """What each module returns the first time it is called, before anything changes it in place."""
    found: dict[str, Tensor] = {}

    def keep(name: str, _module: nn.Module, _args: object, value: Tensor) -> None:
        found.setdefault(name, value.clone())

    with hooked(module, {name: partial(keep, name) for name, _ in module.named_modules() if name}), torch.no_grad():
        module(normalised(pixels))
    return found


# Taps


def test_every_module_gives_what_a_hook_sees(resnet: Backbone, pixels: Tensor) -> None:
    """Containers too, and ahead of the in-place activations and additions behind them."""
    outputs = hook_outputs(resnet.module, pixels)
    network = tap(resnet, list(outputs), "flatten")
    assert set(network.layers) == set(outputs)
    with torch.no_grad():
        for name, features in zip(network.layers, network(pixels), strict=True):
            torch.testing.assert_close(features, outputs[name].flatten(1), rtol=1e-4, atol=1e-5, msg=name)


def test_torchvisions_node_names_work(resnet: Backbone, pixels: Tensor) -> None:
    names = ["layer1.0.relu_1", "layer1.0.add", "flatten", "layer3.1.conv2"]
    plain = create_feature_extractor(resnet.module, names)
    network = tap(resnet, names, "avg")
    with torch.no_grad():
        wanted, found = plain(normalised(pixels)), network(pixels)
    assert network.layers == tuple(names)
    # The plain extractor's sum has been through the in-place activation behind it; the tap's has not.
    assert torch.equal(wanted["layer1.0.add"], wanted["layer1.0.relu_1"])
    assert not torch.equal(found[0], found[1])
    for name, features in zip(names, found, strict=True):
        if name != "layer1.0.add":
            value = wanted[name]
            torch.testing.assert_close(features, value.mean((2, 3)) if value.ndim == 4 else value, rtol=1e-4, atol=1e-5)


def test_one_pass_equals_many(resnet: Backbone, pixels: Tensor) -> None:
    layers = ["layer2", "input", "fc", "penultimate", "layer1.1.bn2"]
    with torch.no_grad():
        together = tap(resnet, layers, "avg+max")(pixels)
        apart = [tap(resnet, [layer], "avg+max")(pixels)[0] for layer in layers]
    assert all(torch.equal(one, other) for one, other in zip(together, apart, strict=True))


def test_nothing_is_computed_or_kept_beyond_the_last_tap(resnet: Backbone) -> None:
    network = tap(resnet, ["layer1", "layer2.0.bn1"])
    kept = {name for name, _ in network.body.named_modules()}
    assert "layer2.0.bn1" in kept
    assert not kept & {"layer2.0.conv2", "layer2.0.downsample", "layer2.1", "layer3", "fc"}
    assert tap(resnet, ["input"]).body is None


def test_input_is_the_small_normalised_image_whatever_the_pooling(resnet: Backbone, pixels: Tensor) -> None:
    blocks = normalised(pixels).reshape(2, 3, 32, SIDE // 32, 32, SIDE // 32).mean((3, 5)).flatten(1)
    for pool in POOLS:
        network = tap(resnet, ["input"], pool)
        assert network.dims == {pool: {"input": 3072}}
        torch.testing.assert_close(network(pixels)[0], blocks, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(tap(resnet, ["input"])(pixels)[0], blocks, rtol=1e-5, atol=1e-5)


def test_a_tapped_network_cannot_be_put_in_training(resnet: Backbone, pixels: Tensor) -> None:
    network = tap(resnet, ["layer4"])
    assert not any(part.training for part in network.train().modules())
    assert not any(part.training for part in nn.Sequential(network).train()[0].modules())
    state = {name: item.clone() for name, item in resnet.module.state_dict().items()}
    network(pixels)
    assert all(torch.equal(item, state[name]) for name, item in resnet.module.state_dict().items())


class Scribbler(nn.Module):
    """Changes its activations in place, also without using the result, and takes an option that is off."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.conv(x)
        y = self.norm(x)
        x.mul_(2)
        y = y.add_(x)
        if mask is not None:
            y = y * mask
        return self.fc(y.mean((2, 3)))


def test_in_place_changes_come_after_the_tap_and_still_count(pixels: Tensor) -> None:
    torch.manual_seed(0)
    backbone = wrap(Scribbler(), "fc")
    outputs = hook_outputs(backbone.module, pixels)
    with torch.no_grad():
        features = tap(backbone, ["conv", "norm", "fc"], "flatten")(pixels)
    for name, item in zip(("conv", "norm", "fc"), features, strict=True):
        torch.testing.assert_close(item, outputs[name].flatten(1), rtol=1e-4, atol=1e-5)


class Twice(nn.Module):
    """Calls one module twice."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.act(x) - 1).mean((2, 3)))


def test_a_module_called_twice_is_tapped_at_its_first_call(pixels: Tensor) -> None:
    first, second = tap(wrap(Twice(), "head"), ["act", "act_1"], "flatten")(pixels)
    torch.testing.assert_close(first, normalised(pixels).relu().flatten(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(second, (normalised(pixels).relu() - 1).relu().flatten(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pool", POOLINGS)
def test_dims_are_the_lengths_of_the_features(resnet: Backbone, pixels: Tensor, pool: str) -> None:
    network = tap(resnet, ["stages", "penultimate", "logits", "input"], pool)
    with torch.inference_mode():
        features = dict(zip(network.layers, network(pixels), strict=True))
    assert {name: item.shape[1] for name, item in features.items()} == network.dims[pool]
    torch.testing.assert_close(features["penultimate"], features["layer4"])  # what ResNet's classifier averages


# Names


def test_what_is_asked_resolves_in_order_without_duplicates(resnet: Backbone) -> None:
    asked = ["logits", "stages", "input", "fc", "layer2", "penultimate", "input"]
    assert resolve_layers(resnet, asked) == ("fc", "layer1", "layer2", "layer3", "layer4", "input", "penultimate")
    assert resolve_layers(resnet, resolve_layers(resnet, asked)) == resolve_layers(resnet, asked)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            ["layr3"],
            r"resnet18@random:0 has no layer 'layr3'; did you mean layer3.*`thawline layers resnet18@random:0`",
        ),
        (["stage"], r"did you mean stages"),
        (["layer3", "layer9"], "no layer 'layer9'"),
        ([""], "no layer ''"),
        ([], "no layer was asked for; name one, such as penultimate"),
    ],
)
def test_unknown_layers_name_the_nearest(resnet: Backbone, layers: list[str], message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        tap(resnet, layers)


def test_an_unknown_pooling_is_refused(resnet: Backbone) -> None:
    with pytest.raises(BackboneError, match=r"unknown pooling 'mean'; .*expected one of avg"):
        tap(resnet, ["input"], "mean")


class Odd(nn.Module):
    """Gives shapes that cannot be pooled, a tuple, and has a module that is never called and no classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.strip = nn.AdaptiveAvgPool2d((2, 6))
        self.pair = Pair()
        self.idle = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.pair(self.strip(self.conv(x)))
        return first * second


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x + 1


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("strip", "layer strip of net has the shape 4x2x6, expected cxhxw, .*; layers that work: conv"),
        ("pair", "layer pair of net does not give one tensor with a row for each image; layers that work: conv"),
        ("idle", "layer idle of net does not give one tensor with a row for each image"),
        ("logits", "net has no classifier, which 'logits' refers to; layers that work: conv"),
        ("penultimate", "net has no classifier, which 'penultimate' refers to"),
        ("stages", "net has no stages; layers that work: conv"),
    ],
)
def test_layers_without_features_name_some_that_have(layer: str, message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        tap(wrap(Odd()), [layer])


def test_without_a_classifier_penultimate_is_the_output(pixels: Tensor) -> None:
    network = wrap(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()))
    penultimate, output = tap(network, ["penultimate", "1"])(pixels)
    assert torch.equal(penultimate, output)


# Aliases and shapes, without weights


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("efficientnet_lite0", [f"blocks.{number}" for number in range(7)]),
        ("mobilenet_v2", ["features.1", "features.3", "features.6", "features.13", "features.17"]),
        ("efficientnet_b0", [f"features.{number}" for number in range(1, 8)]),
        ("densenet121", [f"features.denseblock{number}" for number in range(1, 5)]),
        ("convnext_tiny", ["features.1", "features.3", "features.5", "features.7"]),
        ("timm/convnext_tiny", [f"stages.{number}" for number in range(4)]),
        ("timm/resnet50d", [f"layer{number}" for number in range(1, 5)]),
        ("regnet_y_400mf", [f"trunk_output.block{number}" for number in range(1, 5)]),
        ("alexnet", ["features.1", "features.4", "features.11"]),
        ("vgg11_bn", ["features.2", "features.6", "features.13", "features.20", "features.27"]),
        ("swin_t", ["features.1", "features.3", "features.5", "features.7"]),
        ("timm/test_maxvit", ["stem", "stages.0", "stages.1", "stages.2", "stages.3"]),
    ],
)
def test_stages_end_where_their_papers_say(name: str, stages: list[str]) -> None:
    assert resolve_layers(sketch(name), ["stages"]) == tuple(stages)


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("vit_b_16", [f"encoder.layers.encoder_layer_{number}" for number in (2, 5, 8, 11)]),
        ("timm/vit_tiny_patch16_224", ["blocks.2", "blocks.5", "blocks.8", "blocks.11"]),
        ("timm/pit_ti_224", [f"transformers.{number}.blocks" for number in range(3)]),
        ("timm/gmlp_ti16_224", ["blocks.7", "blocks.14", "blocks.22", "blocks.29"]),
    ],
)
def test_stages_of_tokens_end_with_their_number_or_with_quarters(name: str, stages: list[str]) -> None:
    assert resolve_layers(sketch(name), ["stages"]) == tuple(stages)


def test_logits_are_what_the_network_returns_where_a_relu_follows_the_classifier() -> None:
    backbone = load_backbone("squeezenet1_1@random:0", size=64)
    network = tap(backbone, ["logits", "classifier.1"])
    pixels = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    with torch.inference_mode():
        logits, before = network(pixels)
        images = pixels.permute(0, 3, 1, 2) * network.scale + network.shift
        torch.testing.assert_close(logits, backbone.module(images))
    assert (logits - before).max() > 0.1, "it averages after the ReLU"


def test_a_network_without_blocks_in_a_row_has_no_stages() -> None:
    with pytest.raises(BackboneError, match="has no stages; layers that work: "):
        resolve_layers(sketch("timm/crossvit_tiny_240"), ["stages"])


@pytest.fixture(scope="module")
def dinov3() -> Backbone:
    return load_backbone("vit_tiny_patch16_dinov3_qkvb@random:0", size=64)


@pytest.mark.parametrize("layer", ["blocks.5", "norm"])
def test_tokens_are_told_apart_by_what_timm_knows(dinov3: Backbone, layer: str) -> None:
    pixels = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    network = tap(dinov3, [layer], "cls")
    images = pixels.permute(0, 3, 1, 2) * network.scale + network.shift
    seen: list[Tensor] = []
    with torch.inference_mode():
        with hooked(dinov3.module, {layer: lambda _module, _args, value: seen.append(value)}):
            dinov3.module(images)
        (tokens,) = seen
        patches = tokens[:, 5:].transpose(1, 2).unflatten(2, (4, 4))
        wanted = {
            "cls": tokens[:, 0],
            "avg": tokens[:, 5:].mean(1),
            "cls+avg": torch.cat([tokens[:, 0], tokens[:, 5:].mean(1)], 1),
            "max": tokens[:, 5:].amax(1),
            "grid2": nn.functional.avg_pool2d(patches, 2).flatten(1),
        }
        for pool, features in wanted.items():
            (found,) = tap(dinov3, [layer], pool)(pixels)
            torch.testing.assert_close(found, features, rtol=1e-4, atol=1e-5)


def test_what_a_tap_computes_is_part_of_its_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """A converted network is found by its identity: one that reads other tokens must not be taken for it."""
    vit, layers = load_backbone("test_vit@random:0"), ["blocks.3", "penultimate"]
    found = [tap(vit, layers), tap(vit, layers, "max"), tap(vit, layers[::-1]), tap(vit, layers[:1])]
    orders = [TokenOrder(), TokenOrder(1), TokenOrder(1, has_class=True), TokenOrder(1, has_class=True, by_row=False)]
    assert vit.traced.tokens == orders[2]
    for order in orders[:2] + orders[3:]:
        vit.traced = replace(vit.traced, tokens=order)
        found.append(tap(vit, layers))
    deit = load_backbone("timm/deit_tiny_distilled_patch16_224@random:0", size=32)
    assert len(deit.classifiers) == 2
    found.append(tap(deit, ["penultimate"]))
    deit.classifiers, deit.traced = deit.classifiers[:1], trace(deit.module, (32, 32), deit.classifiers[0], "deit")
    found.append(tap(deit, ["penultimate"]))  # as the first classifier reads it
    assert len({network.identity for network in found}) == len(found)
    assert tap(load_backbone("test_vit@random:0"), layers).identity == found[0].identity


@pytest.mark.parametrize(
    ("name", "layer", "pool", "message"),
    [
        ("resnet18", "layer4", "cls", "layer layer4 of resnet18 has no class token, which pool 'cls' needs"),
        ("timm/gmlp_ti16_224", "blocks.3", "cls+avg", "has no class token"),
        ("timm/vit_tiny_patch16_224", "blocks.3.attn.q_norm", "avg", "expected cxhxw, tokens x d or d"),
    ],
)
def test_a_pooling_that_does_not_suit_the_layer_is_refused(name: str, layer: str, pool: str, message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        tap(sketch(name), [layer], pool)


@pytest.mark.parametrize(
    ("name", "reads"),
    [
        ("resnet18", "the last map, averaged over its positions"),
        ("vit_b_16", "the class token"),
        ("vit_tiny_patch16_dinov3_qkvb", "the mean of the patch tokens"),
        ("vit_base_patch16_siglip_224", "the tokens, pooled by attention"),
        ("vgg11", ""),
    ],
)
def test_what_the_classifier_reads_is_said(name: str, reads: str) -> None:
    assert classifier_reads(sketch(name).traced) == reads


@pytest.mark.parametrize(
    ("name", "avg", "grid2"),
    [
        ("efficientnet_lite0", 1280, 5120),
        ("densenet121", 1024, 4096),
        ("squeezenet1_1", 512, 2048),
        ("swin_t", 768, 3072),
        ("alexnet", 4096, 4096),
        ("mobilenet_v3_small", 1024, 1024),
        ("convnext_tiny", 768, 768),
        ("vit_b_16", 768, 768),
    ],
)
def test_penultimate_is_pooled_from_its_map_only_where_nothing_else_happens(name: str, avg: int, grid2: int) -> None:
    backbone = sketch(name)
    dims = TappedNetwork(backbone, ("penultimate",), ("avg", "grid2")).dims
    assert dims == {"avg": {"penultimate": avg}, "grid2": {"penultimate": grid2}}


@pytest.mark.parametrize(
    ("name", "count"), [("efficientnet_lite0", 70), ("googlenet", 26), ("inception_resnet_v2", 100)]
)
def test_nodes_that_every_path_crosses(name: str, count: int) -> None:
    assert len(cut_nodes(sketch(name).traced.graph)) == count


@pytest.mark.parametrize("name", ["resnet18", "timm/test_efficientnet", "timm/test_vit"])
def test_shapes_without_weights_are_the_real_ones(name: str) -> None:
    backbone = sketch(name, size=SIDE if name == "resnet18" else None)
    assert {item.device.type for item in backbone.module.parameters()} == {"meta"}
    real = load_backbone(f"{name}@random:0", size=SIDE if name == "resnet18" else None)
    side = real.preprocessing.size[0]
    outputs = hook_outputs(real.module, torch.zeros(2, side, side, 3, dtype=torch.uint8))
    # timm has its batch norms computed in one step: what stands inside them is out of reach.
    whole = [name for name, part in real.module.named_modules() if isinstance(part, BatchNormAct2d)]
    outputs = {name: item for name, item in outputs.items() if not any(name.startswith(f"{norm}.") for norm in whole)}
    rows = {row.name: row for row in list_layers(backbone)}
    assert {name: rows[name].shape for name in outputs} == {name: item.shape[1:] for name, item in outputs.items()}
    assert rows["input"] == ("input", (3, side, side), ("input",))


# Networks that cannot be traced


class Untraceable(nn.Module):
    """Looks at its values; may fail on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.fc = nn.Linear(4, 5)
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = self.act(x if x.sum() > -math.inf else -x)
        if self.fails:
            raise ValueError("on the way")
        return self.fc(x.mean((2, 3)))


def test_untraceable_networks_are_tapped_with_hooks(pixels: Tensor) -> None:
    backbone = wrap(Untraceable(), "fc")
    assert backbone.traced.graph is None
    outputs = hook_outputs(backbone.module, pixels)
    network = TappedNetwork(backbone, ("fc", "input", "conv", "penultimate"), ("avg", "max"))
    assert network.dims == {key: {"fc": 5, "input": 3072, "conv": 4, "penultimate": 4} for key in ("avg", "max")}
    with torch.no_grad():
        logits, _, conv, penultimate, *others = network(pixels)
    torch.testing.assert_close(logits, outputs["fc"])
    torch.testing.assert_close(conv, outputs["conv"].mean((2, 3)))
    torch.testing.assert_close(penultimate, outputs["act"].mean((2, 3)))
    torch.testing.assert_close(others[2], outputs["conv"].amax((2, 3)))
    assert [row.name for row in list_layers(backbone)] == ["input", "conv", "act", "fc"]
    with pytest.raises(BackboneError, match="no layer 'con'; did you mean conv"):
        tap(backbone, ["con"])


@pytest.mark.parametrize("fails", [False, True])
def test_hooks_are_always_taken_off(pixels: Tensor, fails: bool) -> None:
    backbone = wrap(Untraceable(), "fc")
    network = tap(backbone, ["conv", "fc"])
    backbone.module.fails = fails
    if fails:
        with pytest.raises(ValueError, match="on the way"):
            network(pixels)
    else:
        network(pixels)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in backbone.module.modules())


@pytest.mark.parametrize("name", ["timm/test_vit", "timm/test_maxvit", "timm/test_resnet"])
def test_other_families_give_their_own_output(name: str) -> None:
    backbone = load_backbone(f"{name}@random:0")
    nn.init.trunc_normal_(backbone.module.get_submodule(backbone.classifiers[0]).weight, std=0.1)
    side = backbone.preprocessing.size[0]
    pixels = torch.randint(0, 256, (1, side, side, 3), dtype=torch.uint8)
    mean, std = (
        torch.tensor(item).view(1, 3, 1, 1) for item in (backbone.preprocessing.mean, backbone.preprocessing.std)
    )
    with torch.inference_mode():
        wanted = backbone.module((pixels.permute(0, 3, 1, 2) / 255 - mean) / std)
        torch.testing.assert_close(tap(backbone, ["logits"])(pixels)[0], wanted, rtol=1e-3, atol=1e-4)


class KeepsTables(nn.Module):
    """As ConViT does: what it makes of the input's size is kept for later, in a buffer, an attribute, a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("table", torch.zeros(1), persistent=False)
        self.last: Tensor | None = None
        self.by_side: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.table.shape[0] != y.shape[-1]:
            self.table = torch.arange(y.shape[-1]).float() + 0 * y.mean()
        self.last = self.by_side[0] = self.table + 0 * y.mean()
        return y * self.table + self.by_side[0] + self.last


@pytest.mark.parametrize("leaf", [True, False], ids=["traced", "not traced"])
def test_nothing_of_the_shape_pass_stays_in_the_network(leaf: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if leaf:
        monkeypatch.setattr("pipeline.backbones.trace.get_notrace_modules", lambda: [KeepsTables])
    module = nn.Sequential(KeepsTables(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    backbone, keeps = wrap(module, "3"), module[0]
    assert (backbone.traced.graph is not None) == leaf
    assert (type(keeps.table), keeps.table.shape, keeps.last, keeps.by_side) == (Tensor, (1,), None, {})
    pixels = torch.randint(0, 256, (2, SIDE, SIDE, 3), dtype=torch.uint8)
    scale, shift = normalisation(backbone.preprocessing)
    with torch.inference_mode():
        (found,) = tap(backbone, ["logits"])(pixels)
        torch.testing.assert_close(found, module(pixels.permute(0, 3, 1, 2) * scale + shift))
