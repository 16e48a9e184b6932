"""Input sizes that are no squares: features, position embeddings, and a whole run from images to predictions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models import create_model
from torch import Tensor, nn

from features_cache import open_cache
from pipeline.backbones.layers import resolve_layers
from pipeline.backbones.registry import load_backbone, sketch
from pipeline.backbones.taps import TappedNetwork
from pipeline.backbones.trace import hooked
from pipeline.errors import BackboneError
from pipeline.spec import Request


@pytest.mark.parametrize(
    ("name", "size", "kind", "sides"),
    [
        ("test_resnet", (96, 160), "map", (3, 5)),
        ("test_resnet", (160, 64), "map", (5, 2)),
        ("swin_t", (96, 160), "map_last", (3, 5)),
        ("test_vit", (64, 256), "tokens", (4, 16)),
    ],
)
def test_features_are_those_of_plain_hooks(name: str, size: tuple[int, int], kind: str, sides: tuple[int, int]) -> None:
    backbone = load_backbone(f"{name}@random:0", size)
    layers, pools = resolve_layers(backbone, ["stages"]), ("avg", "grid2", "max")
    network = TappedNetwork(backbone, layers, pools)
    pixels = torch.randint(0, 256, (2, *size, 3), dtype=torch.uint8)
    seen: dict[str, Tensor] = {}
    images = pixels.permute(0, 3, 1, 2) * network.scale + network.shift
    with torch.inference_mode():
        with hooked(
            backbone.module, {layers[-1]: lambda _module, _args, value: seen.setdefault("last", value.clone())}
        ):
            backbone.module(images)
        found = network(pixels)[len(layers) - 1 :: len(layers)]
    last = seen["last"]
    if kind == "map_last":
        last = last.permute(0, 3, 1, 2)
    elif kind == "tokens":
        last = last[:, 1:].transpose(1, 2).unflatten(2, sides)
    assert last.shape[2:] == sides
    wanted = last.mean((2, 3)), nn.functional.adaptive_avg_pool2d(last, 2).flatten(1), last.amax((2, 3))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_position_embeddings_are_resampled_as_timm_does(tmp_path: Path) -> None:
    state = create_model("test_vit").state_dict()
    save_file(state, path := tmp_path / "vit.safetensors")
    found = load_backbone(f"test_vit@{path}", "96x128")
    wanted = resample_abs_pos_embed(state["pos_embed"], [6, 8], [10, 10], num_prefix_tokens=1)
    torch.testing.assert_close(found.module.pos_embed, wanted)
    assert found.traced.shapes["blocks.3"] == (1 + 6 * 8, 64)


def test_a_network_whose_own_size_is_no_square_has_it() -> None:
    assert sketch("vit_base_patch16_sapiens2").preprocessing.size == (1024, 768)
    assert sketch("vit_base_patch16_sapiens2", 256).preprocessing.size == (256, 256)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("test_vit", "100x128", "takes multiples of 16 pixels, not 100x128; sizes that work: 96x128, 128x160"),
        ("convit_tiny", "64x256", "takes squares only, not 64x256; sizes that work: 64, 256"),
        ("vit_b_16", "192x256", "takes images of 224 pixels only"),
        ("test_vit", "0x128", "from 1 to 4096, or HEIGHTxWIDTH, not 0x128"),
        ("test_vit", "96x128x3", "from 1 to 4096, or HEIGHTxWIDTH, not 96x128x3"),
    ],
)
def test_sizes_that_do_not_work_are_refused(name: str, size: str, message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        sketch(name, size)


def test_patches_that_overlap_take_other_sizes() -> None:
    assert resolve_layers(sketch("pvt_v2_b0", "96x160"), ["penultimate"]) == ("penultimate",)


def test_a_square_is_the_same_however_it_is_written() -> None:
    assert (
        Request("a", ("b",), size="224x224") == Request("a", ("b",), size=(224, 224)) == Request("a", ("b",), size=224)
    )
    assert Request("a", ("b",), size=224).to_json()["size"] == 224
    assert Request("a", ("b",), size="192x256").to_json()["size"] == [192, 256]


def test_a_run_from_images_to_predictions(
    make_photos: Callable[..., Path], tmp_path: Path, thawline: Callable[..., Any]
) -> None:
    photos, cache, model = make_photos(), tmp_path / "cache", tmp_path / "model.skops"
    asked = ("extract", photos, "-b", "test_resnet@random:0", "-l", "layer4", "--size", "64x96", "--precision", "fp32")
    how = ("--engine", "torch", "-o", cache)
    (first,) = thawline(*asked, *how, "--json").json["caches"]
    assert first["computed"] == 24
    spec = open_cache(first["path"]).layers["layer4"].spec
    assert (spec["preprocessing"]["size"], spec["preprocessing"]["resize"]) == ([64, 96], 67)
    (again,) = thawline(*asked, *how, "--json").json["caches"]
    assert (again["computed"], again["path"]) == (0, first["path"])
    thawline("fit", cache, "--save", model, "--json")
    predictions = thawline("predict", model, photos, "--engine", "torch", "--json").json["predictions"]
    right = np.mean([item["uri"].split("/")[0] == item["label"] for item in predictions])
    assert right > 0.9
    plan = tmp_path / "plan.toml"
    plan.write_text(
        f'source = "{photos}"\nsize = "64x96"\n[[extract]]\nbackbone = "test_resnet@random:0"\nlayer = "layer4"\n'
        f'engine = "torch"\nprecision = "fp32"\noutput = "{cache}"\n[[fit]]\nhead = "centroid"\n'
        '[[finetune]]\nbackbone = "test_resnet@random:0"\nepochs = 1\nengine = "torch"\nprecision = "fp32"\n'
    )
    done = thawline("compare", plan, "-o", tmp_path / "run", "--json")
    assert done.returncode == 0, done.stderr
    assert len(list(cache.glob("*.h5"))) == 1, "the plan asks for what the command made"
