"""Networks that combine the scores of several classifiers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models import create_model
from timm.models.volo import VOLO
from torch import Tensor, nn

from features_cache import AmbiguousCacheError, open_cache
from pipeline.backbones import layers, zoo_timm
from pipeline.backbones.backbone import Backbone
from pipeline.backbones.layers import list_layers
from pipeline.backbones.taps import normalisation, tap
from pipeline.backbones.thaw_line import find_line
from pipeline.errors import BackboneError
from pipeline.extract import extract
from pipeline.finetuning.network import ThawedNetwork
from pipeline.fit import fit
from pipeline.results import ExtractResult
from pipeline.spec import LayerSpec, Preprocessing

SHALLOW: dict[str, dict[str, Any]] = {
    "crossvit_9_240": {"depth": [[1, 1, 0]]},
    "deit_tiny_distilled_patch16_224": {"depth": 1},
    "efficientvim_m1_dist": {"depths": (1, 1, 1)},
    "pit_ti_distilled_224": {"depth": [1, 1, 1]},
    "volo_d1_224": {},
    "efficientformer_l1": {"depths": (1, 1, 1, 1)},
    "efficientformerv2_s0": {"depths": (1, 1, 1, 1), "mlp_ratios": ((4,), (4,), (4,), (4,)), "num_vit": 1},
    "iformer_m_distilled": {"depths": (1, 1, 1, 1), "attn_groups": (0, 0, 0, 0)},
    "levit_128s": {"depth": (1, 1, 1)},
    "repvit_m0_9": {"depth": (1, 1, 1, 1)},
    "swiftformer_xs": {"layers": [1, 1, 1, 1]},
}
"""One of each family, with fewer blocks."""
SHARED = list(SHALLOW)[5:]
"""Those whose classifiers all start from one vector."""


def build(name: str) -> Backbone:
    """The network with random weights; those of the classifiers are large, so that each of them counts."""
    torch.manual_seed(0)
    if name == "volo_d1_224":
        module: nn.Module = VOLO((1, 1, 1, 1), embed_dims=(48, 96, 96, 96), num_heads=(3, 6, 6, 6))
    else:
        module = create_model(name, num_classes=10, **SHALLOW[name])
    classifiers = zoo_timm.classifiers(name, module.eval().requires_grad_(False))
    for path in classifiers:
        nn.init.normal_(module.get_submodule(path).weight)
    return Backbone(f"timm/{name}", name, "", "", module, zoo_timm.preprocessing(name, None), classifiers)


def compute(backbone: Backbone, layer: str) -> tuple[Tensor, Tensor]:
    """What we make of two noisy images, and the images as the network takes them."""
    pixels = torch.randint(0, 256, (2, *backbone.preprocessing.size, 3), dtype=torch.uint8)
    scale, shift = normalisation(backbone.preprocessing)
    with torch.inference_mode():
        return tap(backbone, [layer])(pixels)[0], pixels.permute(0, 3, 1, 2) * scale + shift


@pytest.mark.parametrize("name", SHALLOW)
def test_logits_and_penultimate_are_those_of_all_classifiers(name: str) -> None:
    backbone = build(name)
    module, read = backbone.module, dict[int, Tensor]()
    assert len(backbone.classifiers) > 1
    logits, x = compute(backbone, "logits")
    with torch.inference_mode():
        torch.testing.assert_close(logits, module(x))
    penultimate, x = compute(backbone, "penultimate")
    for path in backbone.classifiers:
        module.get_submodule(path).register_forward_pre_hook(lambda _, args: read.update({args[0].data_ptr(): args[0]}))
    with torch.inference_mode():
        module(x)
        if name in SHARED:
            expected = module.forward_head(module.forward_features(x), pre_logits=True)
        else:
            expected = torch.cat([item if item.ndim == 2 else item.mean(1) for item in read.values()], 1)
    torch.testing.assert_close(penultimate, expected)


def test_their_layers_are_listed_and_bypassed() -> None:
    backbone = build("crossvit_9_240")
    *_, penultimate, logits = list_layers(backbone)
    assert penultimate == ("penultimate", (384,), ("penultimate",))
    assert logits == ("logits", (10,), ("logits",))
    with pytest.raises(BackboneError, match="some paths bypass each of its layers; freeze 'all' or 'none'"):
        find_line(backbone, "blocks.0")
    shared = next(row for row in list_layers(build("levit_128s")) if "penultimate" in row.aliases)
    assert shared.shape == (384,)


@pytest.mark.parametrize("name", ["crossvit_9_240", "volo_d1_224", "levit_128s"])
def test_fine_tuning_trains_all_of_the_network(name: str) -> None:
    backbone = build(name)
    network = ThawedNetwork(backbone, "none", "linear", 3)
    nn.init.normal_(network.new_head.layers.weight)
    pixels = torch.randint(0, 256, (2, *backbone.preprocessing.size, 3), dtype=torch.uint8)
    network(pixels).pow(2).sum().backward()
    trained = {path.removeprefix("body.") for path, item in network.named_parameters() if item.grad is not None}
    old = {path for path, _ in backbone.module.named_parameters()} - trained
    heads = {part for path in backbone.classifiers for part in (path.rpartition(".")[0], path)} - {""}
    assert not [path for path in old if not path.startswith(tuple(heads))]


def test_features_of_the_first_classifier_alone_are_not_reused(
    make_photos: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, cache, name = make_photos(each=1), tmp_path / "cache", "deit_tiny_distilled_patch16_224@random:0"

    def request(*asked: str) -> ExtractResult:
        return extract(photos, [name], asked, output=cache, engine="torch", precision="fp32")[-1]

    with monkeypatch.context() as former:
        former.setenv("XDG_CACHE_HOME", str(tmp_path / "former"))
        former.setattr(zoo_timm, "classifiers", lambda *_: ("head",))
        former.setattr(layers, "scores_layer", lambda traced: traced.classifier)
        old = request("blocks.0", "penultimate", "logits")
        assert old.layers == {"blocks.0": 192, "penultimate": 192, "head": 1000}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "now"))
    for _ in range(2):
        assert request("blocks.0").computed == 0, "this layer means what it meant"
        new = request("penultimate", "logits")
        assert new.layers == {"penultimate": 384, "logits": 1000}
    assert (new.done, new.computed) == (3, 0)
    info = open_cache(new.path).layers["penultimate"]
    assert LayerSpec.from_json(info.spec).heads == 2
    assert info.fingerprint != open_cache(old.path).layers["penultimate"].fingerprint
    with pytest.raises(AmbiguousCacheError, match="heads"):
        fit(cache, ["penultimate"])


def test_fingerprints_of_all_other_networks_stay() -> None:
    preprocessing = Preprocessing((224, 224), 256, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    spec = LayerSpec("torchvision/resnet18", "00" * 16, "penultimate", "avg", preprocessing, "fp32", decode=1)
    assert spec.fingerprint == "a7ea40c13288c834863963df49938306"
    assert "heads" not in spec.to_json()
    assert replace(spec, heads=2).fingerprint != spec.fingerprint
    assert LayerSpec.from_json(replace(spec, heads=2).to_json()).heads == 2
