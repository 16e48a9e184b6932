"""Where in the image a unit looks: the effective receptive field around the position of its maximum.

The gradient of the activations at one position with respect to the input says which pixels they depend on. This holds
for every network, also where paths of different length meet, and needs no rules about kernels and strides. Of deep
layers nearly all pixels have some gradient, most of it in a small part (Luo et al. 2016), so the field is the box that
holds `SHARE` of it along each axis. All channels at the position count, since the unit's own gradient is zero where its
activation function is saturated.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.arrays import Float64Array, IntArray
from pipeline.backbones.backbone import Backbone
from pipeline.backbones.layers import pooled_tap
from pipeline.backbones.pooling import Layout
from pipeline.backbones.taps import tap
from pipeline.spec import NO_POOL

SHARE = 0.95
"""Share of the gradient that lies in the box, along each axis."""
_BATCH = 16


class Box(NamedTuple):
    """A square part of the network's input, in pixels; `right` and `bottom` are the first pixels outside."""

    left: int
    top: int
    right: int
    bottom: int


class Maximum(NamedTuple):
    """The greatest activation of a unit in an image, and the receptive field around it."""

    activation: float
    box: Box


def find_maxima(backbone: Backbone, layer: str, pixels: NDArray[np.uint8], channels: IntArray) -> list[Maximum]:
    """Return the maximum of a channel of `layer` in each image.

    Parameters
    ----------
    backbone : Backbone
    layer : str
        Name of a layer that gives maps, tokens or a vector.
    pixels : (n, h, w, 3) uint8
        Inputs of the network.
    channels : (n,) int64
        The channel to look at in each image.
    """
    network, layout = tap(backbone, [layer], NO_POOL), pooled_tap(backbone, layer, NO_POOL).layout
    body: nn.Module = network.body  # type: ignore[assignment]  # None only for the layer `input`, which has no units
    found: list[Maximum] = []
    for start in range(0, len(pixels), _BATCH):
        batch, wanted = torch.from_numpy(pixels[start : start + _BATCH]), channels[start : start + _BATCH]
        x = batch.permute(0, 3, 1, 2).float() * network.scale + network.shift
        x.requires_grad_(True)
        (flat,) = body(x)
        by_position = _by_position(flat, network.shapes[NO_POOL][layer], layout)
        rows = torch.arange(len(batch))
        values, positions = by_position[rows, torch.from_numpy(wanted)].max(1)
        (gradient,) = torch.autograd.grad(by_position[rows, :, positions].sum(), x)
        weight = gradient.abs().sum(1).double().numpy()
        found += [Maximum(float(value), _box(one)) for value, one in zip(values.detach(), weight, strict=True)]
    return found


def _by_position(flat: Tensor, shape: tuple[int, ...], layout: Layout) -> Tensor:
    """Return whole activations (n, d) as (n, channels, positions); of tokens, only patches are positions."""
    if not shape:
        return flat.unsqueeze(2)
    whole = flat.reshape(len(flat), *shape)
    if layout.kind == "tokens":
        return whole[:, layout.order.prefix :].transpose(1, 2)
    return whole.flatten(2)


def _box(weight: Float64Array) -> Box:
    """Return the smallest square around the box that holds `SHARE` of the weight (h, w) along each axis."""
    height, width = weight.shape
    if not weight.any():
        return Box(0, 0, width, height)
    (left, right), (top, bottom) = _interval(weight.sum(0)), _interval(weight.sum(1))
    side = min(max(right - left, bottom - top), width, height)
    left = min(max(0, (left + right - side) // 2), width - side)
    top = min(max(0, (top + bottom - side) // 2), height - side)
    return Box(left, top, left + side, top + side)


def _interval(weight: Float64Array) -> tuple[int, int]:
    """Return the interval that leaves out the same share of the weight on both sides."""
    cumulated = np.cumsum(weight) / weight.sum()
    tail = (1 - SHARE) / 2
    return int(np.searchsorted(cumulated, tail, "right")), int(np.searchsorted(cumulated, 1 - tail, "left")) + 1
