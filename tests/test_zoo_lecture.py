"""Plain and residual nets and GoogLeNet, against the papers, torchvision, and convolutions written out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.googlenet import Inception

from pipeline.backbones import zoo_lecture
from pipeline.backbones.registry import check_weights, load_backbone, sketch
from pipeline.backbones.zoo_lecture import NaiveInception, ReducedInception, ResidualBlock
from pipeline.errors import BackboneError
from pipeline.finetune import finetune

GOOGLENET_MODULES = [  # side and channels of the input, then table 1 of Szegedy et al. (2015)
    (28, 192, 64, 96, 128, 16, 32, 32),
    (28, 256, 128, 128, 192, 32, 96, 64),
    (14, 480, 192, 96, 208, 16, 48, 64),
    (14, 512, 160, 112, 224, 24, 64, 64),
    (14, 512, 128, 128, 256, 24, 64, 64),
    (14, 512, 112, 144, 288, 32, 64, 64),
    (14, 528, 256, 160, 320, 32, 128, 128),
    (7, 832, 256, 160, 320, 32, 128, 128),
    (7, 832, 384, 192, 384, 48, 128, 128),
]


def built(name: str, classes: int | None = None) -> nn.Module:
    with torch.device("meta"):
        return zoo_lecture.build(name, None, classes).eval()


def multiply_adds(module: nn.Module, channels: int, side: int) -> float:
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        module(torch.zeros(1, channels, side, side))
    return counter.get_total_flops() / 2


def parameters(module: nn.Module) -> int:
    return sum(item.numel() for item in module.parameters())


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85)])
def test_small_nets_have_the_papers_parameters(depth: int, millions: float) -> None:
    """He et al. (2016), table 6; identity shortcuts with zeros add none."""
    assert round(parameters(built(f"resnet{depth}", 10)) / 1e6, 2) == millions
    assert parameters(built(f"plain{depth}", 10)) == parameters(built(f"resnet{depth}", 10))


@pytest.mark.parametrize(("depth", "billions"), [(18, 1.8), (34, 3.6)])
def test_large_nets_have_the_papers_multiply_adds(depth: int, billions: float) -> None:
    """He et al. (2016), table 1, which cuts the numbers off."""
    assert multiply_adds(built(f"plain{depth}"), 3, 224) / 1e9 == pytest.approx(billions, abs=0.05)


@pytest.mark.parametrize("name", ["resnet18", "resnet34"])
def test_residual_nets_compute_what_torchvisions_do(name: str) -> None:
    ours, theirs = zoo_lecture.build(name, None, 7).eval(), torchvision.models.get_model(name, num_classes=7).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images))


def by_hand(block: ResidualBlock, x: Tensor, shortcut: str, act: Callable[[Tensor], Tensor]) -> Tensor:
    out = x
    layers = [module for name, module in block.named_children() if name.startswith("conv")]
    for number, layer in enumerate(layers):
        out = nn.functional.conv2d(out, layer.weight, layer.bias, stride=2 if number == 0 else 1, padding=1)
        out = out if number == len(layers) - 1 else act(out)
    if shortcut == "zero-padded":
        out[:, : x.shape[1]] += x[:, :, ::2, ::2]
    elif shortcut != "none":
        projection = block.downsample[0]
        out += torch.einsum("oi,nihw->nohw", projection.weight[:, :, 0, 0], x[:, :, ::2, ::2])
        out += projection.bias[:, None, None]
    return act(out)


@pytest.mark.parametrize("shortcut", ["zero-padded", "identity", "projection", "none"])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize(
    ("activation", "act"), [("relu", torch.relu), ("tanh", torch.tanh), ("logistic", torch.sigmoid)]
)
def test_a_block_adds_its_shortcut(shortcut: str, layers: int, activation: str, act: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    block, x = ResidualBlock(3, 5, 2, shortcut, layers, activation, "none"), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(block(x), by_hand(block, x, shortcut, act))


def test_shortcuts_project_where_they_should() -> None:
    kinds = ("zero-padded", "identity", "projection")
    modules = {kind: dict(built(f"resnet20[shortcut={kind}]").named_modules()) for kind in kinds}
    count = {kind: sum("downsample.0" in name for name in found) for kind, found in modules.items()}
    assert count == {"zero-padded": 0, "identity": 2, "projection": 9}


def test_naive_modules_cost_three_and_a_half_times_the_reduced_ones() -> None:
    cost = {NaiveInception: 0.0, ReducedInception: 0.0}
    for side, inputs, *channels in GOOGLENET_MODULES:
        for kind in cost:
            with torch.device("meta"):
                cost[kind] += multiply_adds(kind(inputs, *channels).eval(), inputs, side)
    assert {kind.__name__: round(total / 1e6) for kind, total in cost.items()} == {
        "NaiveInception": 3881,
        "ReducedInception": 1104,
    }


def test_googlenet_differs_from_torchvisions_in_its_larger_convolutions_alone() -> None:
    theirs = torchvision.models.googlenet(weights=None, aux_logits=False, init_weights=False)
    modules = [module for module in theirs.modules() if isinstance(module, Inception)]
    third = [module.branch3[1].conv.weight for module in modules]  # 3x3 where the paper has 5x5
    more = sum((25 - 9) * weight.numel() // 9 for weight in third)
    assert parameters(built("googlenet")) == parameters(theirs) + more
    assert sketch("lecture/googlenet").traced.shapes["inception4e"] == (832, 14, 14)
    # the pooled channels of naive modules are passed on, so that their number grows: 4,112 where the paper has 1,024
    grown = 192 + sum(c1 + c3 + c5 for _, _, c1, _, c3, _, c5, _ in GOOGLENET_MODULES)
    assert sketch("lecture/googlenet[modules=naive]").traced.shapes["inception5b"] == (grown, 7, 7)


@pytest.mark.parametrize(
    ("asked", "handle"),
    [
        ("plain20", "plain20"),
        ("lecture/plain20[ layers=1 , width=8 ]", "plain20[width=8,layers=1]"),
        ("resnet56[shortcut=none,width=16]", "plain56"),
        ("lecture/resnet18[width=64]", "lecture/resnet18"),
        ("lecture/googlenet[width=8,modules=naive]", "lecture/googlenet[width=8,modules=naive]"),
    ],
)
def test_equal_networks_have_one_name(asked: str, handle: str) -> None:
    assert sketch(asked).handle == handle
    assert sketch(handle).name == sketch(asked).name


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("resnet18[width=8]", "torchvision/resnet18 takes no options in brackets"),
        ("resnet20[widht=8]", "lecture/resnet20 has no option 'widht'; did you mean width?; it has width, shortcut,"),
        ("resnet20[shortcut=identiti]", "expected shortcut to be one of zero-padded, identity, projection, none"),
        ("resnet20[width=0]", "expected width to be a number from 1 to 9999, got '0'"),
        ("resnet20[width=8", "expected ] after the options"),
        ("plain20[shortcut=identity]", "lecture/plain20 has no option 'shortcut'"),
        ("resnet32[layers=3]", "cannot be grouped by 3; those of 20 and 56 layers can"),
        ("resnet20", "no pretrained weights for resnet20; use resnet20@FILE.safetensors or resnet20@random:0"),
    ],
)
def test_what_does_not_exist_is_refused_in_one_line(asked: str, message: str) -> None:
    with pytest.raises(BackboneError) as raised:
        check_weights(asked)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_they_train_save_and_extract_as_any_other(
    make_photos: Callable[..., Path], tmp_path: Path, thawline: Callable[..., Any]
) -> None:
    name, model = "resnet20[width=4,shortcut=projection]", tmp_path / "net.safetensors"
    report = finetune(
        make_photos(each=5), name, freeze="none", init="random", epochs=1, output=tmp_path / "c", save=model, size=16
    )
    assert report.results[0].backbone == f"{name}@random:0"
    trained = load_backbone(f"{name}@{model}")
    assert trained.name == f"lecture/{name}"
    given = ("-b", f"{name}@random:0", "-l", "stages", "-o", tmp_path / "cache", "--engine", "torch")
    found = thawline("extract", tmp_path / "photos", *given, "--json").json
    assert found["caches"][0]["layers"] == {"layer1": 4, "layer2": 8, "layer3": 16}
    assert thawline("cache", "show", tmp_path / "cache", "-b", f"{name}@random:0").returncode == 0
