"""Layers by name, and the tap: one network that runs from pixels to the pooled features of some layers and no further."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import adaptive_avg_pool2d

from features_cache.errors import nearest
from pipeline.backbones.hooks import HookedBody
from pipeline.backbones.pooling import Layout, Pool, check_pool, layout_of, pooled_dim
from pipeline.backbones.registry import Backbone
from pipeline.backbones.stages import classifier_input, last_map, stages
from pipeline.backbones.trace import SHAPE, Shape, Traced, tapped_graph
from pipeline.errors import BackboneError

INPUT = "input"
PENULTIMATE = "penultimate"
ALIASES = (PENULTIMATE, "stages", "logits", INPUT)
INPUT_SIDE = 32
INPUT_DIM = 3 * INPUT_SIDE**2


class LayerRow(NamedTuple):
    """One line of `describe`: the shape is without the batch axis; aliases that lead here may be several."""

    name: str
    shape: tuple[int, ...]
    aliases: tuple[str, ...]


def resolve_layers(backbone: Backbone, layers: Sequence[str]) -> tuple[str, ...]:
    """Turn what was asked into layer names: order kept, duplicates dropped, ``stages`` and ``logits`` by their modules.

    Parameters
    ----------
    backbone : Backbone
        A loaded or sketched network.
    layers : sequence of str
        Dotted names, or ``penultimate``, ``stages``, ``logits``, ``input``. The aliases win over modules so called.

    Raises
    ------
    BackboneError
        If a layer does not exist, or has no features to give.
    """
    if not layers:
        raise BackboneError(f"no layer was asked for: name one, such as {PENULTIMATE}")
    resolved: list[str] = []
    for layer in layers:
        resolved += _resolve(backbone, layer)
    return tuple(dict.fromkeys(resolved))


def _resolve(backbone: Backbone, layer: str) -> tuple[str, ...]:
    if layer in (INPUT, PENULTIMATE):
        return (layer,)
    traced = backbone.traced
    if layer == "stages":
        found = stages(traced)
        if not found:
            raise BackboneError(f"{backbone.handle} has no stages that end in maps; {_suggest(backbone)}")
        return found
    if layer == "logits":
        if traced.classifier not in traced.shapes:
            raise BackboneError(f"{backbone.handle} has no classifier, so no logits; {_suggest(backbone)}")
        return (str(traced.classifier),)
    shape = traced.shapes.get(layer)
    if shape is None and layer in dict(traced.module.named_modules()):
        raise BackboneError(
            f"layer {layer} of {backbone.handle} gives no tensor of one row an image; {_suggest(backbone)}"
        )
    if shape is None:
        raise BackboneError(
            f"{backbone.handle} has no layer '{layer}'{nearest(layer, [*ALIASES, *traced.shapes])}; "
            f"`thawline layers {backbone.handle}` lists them all"
        )
    if layout_of(shape) is None:
        raise BackboneError(
            f"layer {layer} of {backbone.handle} has the shape {shape}, not c x h x w; {_suggest(backbone)}"
        )
    return (layer,)


def _suggest(backbone: Backbone) -> str:
    """Return layers that work, for an error's end."""
    known = [name for name, shape in backbone.traced.shapes.items() if layout_of(shape) is not None]
    outer = [name for name in known if name.count(".") <= 1]
    some = (outer or known)[:: max(1, len(outer or known) // 4)][:4]
    return f"layers that work: {', '.join([PENULTIMATE, *some])}"


def describe(backbone: Backbone) -> list[LayerRow]:
    """Return all layers of a network in order of computation, with shapes and the aliases that lead to them."""
    traced = backbone.traced
    aliases: dict[str, list[str]] = {}
    for name in stages(traced):
        aliases.setdefault(name, []).append("stages")
    if traced.classifier in traced.shapes:
        aliases.setdefault(str(traced.classifier), []).append("logits")
    read = classifier_input(traced)
    for name in [name for name, node in traced.nodes.items() if node is read][-1:]:
        aliases.setdefault(name, []).append(PENULTIMATE)
    rows = [
        LayerRow(name, shape, tuple(aliases.get(name, ())))
        for name, shape in traced.shapes.items()
        if name != PENULTIMATE
    ]
    return [LayerRow(INPUT, (3, *backbone.preprocessing.size), (INPUT,)), *rows]


class TappedNetwork(nn.Module):
    """A frozen network from pixels to pooled features; always in eval mode.

    Parameters
    ----------
    backbone : Backbone
    layers : tuple of str
        Resolved names.
    pool : str
        One of `pipeline.spec.POOLS`.

    Attributes
    ----------
    dims : dict of str to int
        Length of each layer's features, in the order of the results.
    body : torch.nn.Module or None
        What maps normalised images to features; None where only ``input`` is tapped.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, backbone: Backbone, layers: tuple[str, ...], pool: str) -> None:
        super().__init__()
        check_pool(pool)
        traced = backbone.traced
        inner = [layer for layer in layers if layer != INPUT]
        shapes = {layer: _tapped_shape(traced, layer, pool) for layer in inner}
        pools = {layer: Pool(pool, _layout(shape)) for layer, shape in shapes.items()}
        self.layers = layers
        self.dims = {
            layer: pooled_dim(shapes[layer], pools[layer].layout, pool) if layer in shapes else INPUT_DIM
            for layer in layers
        }
        self.body = _body(traced, pool, pools) if inner else None
        mean = torch.tensor(backbone.preprocessing.mean, dtype=torch.float64)
        std = torch.tensor(backbone.preprocessing.std, dtype=torch.float64)
        self.register_buffer("scale", (1 / (255 * std)).float().view(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", (-mean / std).float().view(1, 3, 1, 1), persistent=False)
        self.eval()

    def train(self, mode: bool = True) -> TappedNetwork:
        """Stay in eval mode: a frozen network has no other."""
        return super().train(False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Map uint8 (n, h, w, 3) to a float32 (n, d) for each layer, in order."""
        x = pixels.permute(0, 3, 1, 2).float() * self.scale + self.shift  # (n, 3, h, w), channels last in memory
        features = iter(self.body(x) if self.body is not None else ())
        return tuple(_small(x) if layer == INPUT else next(features) for layer in self.layers)


def _small(x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return adaptive_avg_pool2d(x, INPUT_SIDE).flatten(1)


def tap(backbone: Backbone, layers: Sequence[str], pool: str = "avg") -> TappedNetwork:
    """Return the network that maps uint8 pixels to the pooled features of `layers`, and computes nothing beyond.

    Parameters
    ----------
    backbone : Backbone
        A loaded network.
    layers : sequence of str
        As for `resolve_layers`.
    pool : str, default "avg"
        One of `pipeline.spec.POOLS`.

    Raises
    ------
    BackboneError
        If a layer or the pooling does not exist.
    """
    return TappedNetwork(backbone, resolve_layers(backbone, layers), pool)


def _source(traced: Traced, layer: str, pool: str) -> fx.Node | None:
    """Return the node to pool for `layer`: with the plain average, ``penultimate`` is what the classifier reads."""
    if layer != PENULTIMATE:
        return traced.nodes.get(layer)
    return (last_map(traced) if pool != "avg" else None) or classifier_input(traced)


def _tapped_shape(traced: Traced, layer: str, pool: str) -> Shape:
    node = _source(traced, layer, pool)
    return traced.shapes.get(layer, ()) if node is None else node.meta.get(SHAPE, ())


def _layout(shape: Shape) -> Layout:
    layout = layout_of(shape)
    if layout is None:
        raise BackboneError(f"activations of shape {shape} cannot be pooled; name another layer")
    return layout


def _body(traced: Traced, pool: str, pools: dict[str, Pool]) -> nn.Module:
    if traced.graph is None:
        taps = [
            (str(traced.classifier) if layer == PENULTIMATE else layer, layer == PENULTIMATE, pools[layer])
            for layer in pools
        ]
        return HookedBody(traced.module, taps)
    sources = [_source(traced, layer, pool) for layer in pools]
    return tapped_graph(traced, [node for node in sources if node is not None], list(pools.values()))
