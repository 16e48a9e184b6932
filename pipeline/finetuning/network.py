"""The network that is fine-tuned: a frozen trunk up to the thaw line, a thawed part above it, and a new top."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.backbones.backbone import Backbone
from pipeline.backbones.network_file import TOP_LAYER, TunedModel, save_network
from pipeline.backbones.taps import normalisation, small_image
from pipeline.backbones.thaw_line import LayerNode, find_line, split, top_input
from pipeline.backbones.top import new_top
from pipeline.backbones.weights import weights_digest
from pipeline.engines.select import Resolved, has_bf16
from pipeline.results import FinetuneMultilabelResult, FinetuneResult, TunedResult, to_json
from pipeline.spec import DEFAULT_POOL, LayerSpec

ALL = "all"
NOTHING = "none"
"""Values of `freeze` besides a layer: everything but the new top is frozen, or nothing is."""


class ThawedNetwork(nn.Module):
    """Maps pixels, or activations at the thaw line, to logits.

    The trunk shares its weights with the backbone, stays in eval mode and gets no gradients, whatever is called on the
    network; the thawed part is a copy. `trunk_precision` and `precision` (of the thawed part) are ``"fp32"`` or
    ``"bf16"`` (by autocast); the new top always computes in float32.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, backbone: Backbone, freeze: str, top: str, n_classes: int) -> None:
        super().__init__()
        self.trunk, body = split(backbone, line_of(backbone, freeze))
        self.body = copy.deepcopy(body).requires_grad_(True)
        self.new_head = new_top(backbone, top, n_classes)
        self.trunk_precision = self.precision = "fp32"
        scale, shift = normalisation(backbone.preprocessing)
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)
        self.eval()

    def train(self, mode: bool = True) -> ThawedNetwork:
        """Set the mode of what is thawed; the trunk stays in eval mode."""
        super().train(mode)
        if self.trunk is not None:
            self.trunk.eval()
        return self

    def forward(self, x: Tensor, image: Tensor | None = None) -> Tensor:
        """Map uint8 pixels (n, h, w, 3), or activations at the line with `image` (n, 3072), to float32 logits (n, k).

        `image` holds the pixels averaged down to 32x32; only a ``direct`` top reads it.
        """
        features, image = self.features(x, image)
        logits: Tensor = self.new_head(features, image)
        return logits

    def features(self, x: Tensor, image: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return what the new top reads of the same inputs: pooled features (n, d), float32, and the small image."""
        if x.dtype == torch.uint8:
            x, image = self.below(x)
        with _autocast(x, self.precision):
            activations = self.body(x)
        return self.new_head.pooled(activations), image

    def below(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Map uint8 pixels (n, h, w, 3) to float32 activations at the line, and to the small image; no gradients."""
        x = pixels.permute(0, 3, 1, 2).float() * self.scale + self.shift  # (n, 3, h, w), channels last in memory
        image = small_image(x) if self.new_head.direct is not None else None
        if self.trunk is None:
            return x, image
        with torch.no_grad(), _autocast(x, self.trunk_precision):
            return self.trunk(x).float(), image

    def thawed_state(self) -> dict[str, Tensor]:
        """Return the tensors that training may change, by name; they are views, not copies."""
        return {name: item for name, item in self.state_dict().items() if not name.startswith("trunk.")}

    def whole_state(self) -> dict[str, Tensor]:
        """Return all weights by the names that a `pipeline.backbones.top.with_top` network has for them."""
        state = {**self.body.state_dict(), **(self.trunk.state_dict() if self.trunk is not None else {})}
        return state | {f"{TOP_LAYER}.{name}": item for name, item in self.new_head.state_dict().items()}

    def load_thawed(self, state: dict[str, Tensor]) -> None:
        """Set the tensors that `thawed_state` returns."""
        own = self.thawed_state()
        if state.keys() != own.keys():
            raise KeyError(f"expected the tensors {sorted(own)}, got {sorted(state)}")
        self.load_state_dict(state, strict=False)


def line_of(backbone: Backbone, freeze: str) -> LayerNode | None:
    """Return where the trunk ends for ``all``, ``none`` or a layer; raises `BackboneError` where it cannot."""
    if freeze == NOTHING:
        return None
    return top_input(backbone) if freeze == ALL else find_line(backbone, freeze)


def layer_name(parameter: str) -> str:
    """Return the name, as in the backbone, of the layer that holds a parameter of a `ThawedNetwork`.

    Examples
    --------
    >>> layer_name("body.blocks.6.0.conv_pw.weight"), layer_name("new_head.layers.bias")
    ('blocks.6.0.conv_pw', 'new_head.layers')
    """
    part, _, name = parameter.partition(".")
    return (name if part in ("trunk", "body") else parameter).rpartition(".")[0]


def train_precision(network: ThawedNetwork, resolved: Resolved, asked: str) -> str:
    """Return the precision in which the thawed part trains: ``"fp32"`` or ``"bf16"``.

    ``auto`` is bf16 where the hardware computes it and training is faster in it. On a CPU, depthwise convolutions
    train slower in bf16 (all of EfficientNet-Lite0: 20 images/s instead of 25) and other convolutions faster
    (ResNet-18: more than twice as fast).
    """
    if asked != "auto":
        return resolved.precision
    convolutions = [module for module in network.body.modules() if isinstance(module, nn.Conv2d)]
    depthwise = any(module.groups == module.in_channels > 1 for module in convolutions)
    pays = resolved.device_kind != "cpu" or (bool(convolutions) and not depthwise)
    return "bf16" if pays and has_bf16(resolved.device) else "fp32"


def save_finetuned(
    path: Path, network: ThawedNetwork, backbone: Backbone, classes: tuple[str, ...], task: str, result: TunedResult
) -> None:
    """Write `network`, trained from `backbone`, with its classes, its result, and its calibration or thresholds."""
    state = network.cpu().whole_state()
    digest, precision = weights_digest(state), _scores_precision(network)
    spec = LayerSpec(backbone.name, digest, TOP_LAYER, DEFAULT_POOL, backbone.preprocessing, precision)
    temperature = result.temperature if isinstance(result, FinetuneResult) else None
    thresholds = None
    if isinstance(result, FinetuneMultilabelResult):
        thresholds = [one.threshold for one in result.labels]
    model = TunedModel(spec, result.head, classes, temperature, to_json(result), task, thresholds)
    save_network(path, model, {name: item.contiguous().numpy() for name, item in state.items()})


def _scores_precision(network: ThawedNetwork) -> str:
    """Return the precision in which the trained network is used: bf16 if both its parts were trained in it."""
    trunk = network.trunk_precision if network.trunk is not None else network.precision
    body = network.precision if any(True for _ in network.body.parameters()) else trunk
    return "bf16" if trunk == body == "bf16" else "fp32"


def _autocast(x: Tensor, precision: str) -> AbstractContextManager[Any]:
    return torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16")
