"""The network that is trained: a frozen trunk below the thaw line, a thawed top, and a new head for the target."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.backbones.backbone import Backbone
from pipeline.backbones.network_file import TOP_LAYER
from pipeline.backbones.taps import normalisation, small_image
from pipeline.backbones.thaw_line import LayerNode, find_line, split, top_input
from pipeline.backbones.top import new_top

ALL = "all"
NOTHING = "none"
"""Where the thaw line is drawn, besides after a layer: above everything, or below everything."""


class Network(nn.Module):
    """From pixels, or from activations at the thaw line, to logits.

    What lies below the line stays in eval mode and gets no gradient, whatever is called on the network.

    Parameters
    ----------
    backbone : Backbone
        A loaded network; the result shares its frozen weights, and trains copies of the others.
    freeze : str
        ``"all"``, ``"none"``, or the layer up to which (itself too) everything is frozen.
    top : str
        One of `pipeline.options.TOPS`.
    classes : int
        Number of logits.

    Attributes
    ----------
    line : LayerNode or None
        Where the trunk ends; None where nothing is frozen.
    trunk_precision, precision : str
        ``"fp32"`` or ``"bf16"`` (by autocast), below and above the line. The new head always computes in float32.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, backbone: Backbone, freeze: str, top: str, classes: int) -> None:
        super().__init__()
        self.line = line_of(backbone, freeze)
        trunk, body = split(backbone, self.line)
        self.trunk = trunk
        self.body = copy.deepcopy(body).requires_grad_(True)
        self.new_head = new_top(backbone, top, classes)
        self.trunk_precision = self.precision = "fp32"
        scale, shift = normalisation(backbone.preprocessing)
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)
        self.eval()

    def train(self, mode: bool = True) -> Network:
        """Set the mode of what is thawed; the trunk stays in eval mode."""
        super().train(mode)
        if self.trunk is not None:
            self.trunk.eval()
        return self

    def forward(self, x: Tensor, image: Tensor | None = None) -> Tensor:
        """Map uint8 pixels (n, h, w, 3), or activations at the line with `image` (n, 3072), to float32 logits (n, k).

        `image`, the pixels area-averaged to 32x32, is only read by a ``direct`` top.
        """
        features, image = self.features(x, image)
        logits: Tensor = self.new_head(features, image)
        return logits

    def features(self, x: Tensor, image: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return what the new head reads of the same input: pooled features (n, d), float32, and the small image."""
        if x.dtype == torch.uint8:
            x, image = self.below(x)
        with _autocast(x, self.precision):
            activations = self.body(x)
        return self.new_head.pooled(activations), image

    def below(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Map uint8 pixels (n, h, w, 3) to float32 activations at the line, and to the small image; no gradients."""
        x = pixels.permute(0, 3, 1, 2).float() * self.scale + self.shift  # (n, 3, h, w), channels last in memory
        image = small_image(x) if self.new_head.reads_image else None
        if self.trunk is None:
            return x, image
        with torch.no_grad(), _autocast(x, self.trunk_precision):
            return self.trunk(x).float(), image

    def thawed_state(self) -> dict[str, Tensor]:
        """Return the tensors that training may change, by name; views, not copies."""
        return {name: item for name, item in self.state_dict().items() if not name.startswith("trunk.")}

    def whole_state(self) -> dict[str, Tensor]:
        """Return all weights by the names that a `pipeline.backbones.tuned.with_top` network has for them."""
        state = {**self.body.state_dict(), **(self.trunk.state_dict() if self.trunk is not None else {})}
        return state | {f"{TOP_LAYER}.{name}": item for name, item in self.new_head.state_dict().items()}

    def load_thawed(self, state: dict[str, Tensor]) -> None:
        """Set the tensors that `thawed_state` names."""
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
    """Return the dotted name, as in the backbone, of the layer that holds a parameter of a `Network`."""
    part, _, name = parameter.partition(".")
    return (name if part in ("trunk", "body") else parameter).rpartition(".")[0]


def _autocast(x: Tensor, precision: str) -> AbstractContextManager[Any]:
    return torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16")
