"""Layers by name, and the tap: a network that runs from pixels to the features of some layers and no further."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import adaptive_avg_pool2d

from features_cache.errors import nearest
from pipeline.backbones.aliases import classifier_input, last_map, stages
from pipeline.backbones.backbone import Backbone
from pipeline.backbones.hooks import HookedBody
from pipeline.backbones.pooling import Layout, Pool, check_pool, layout_of, pooled_dim
from pipeline.backbones.trace import SHAPE, Shape, Traced, tapped_graph
from pipeline.errors import BackboneError
from pipeline.spec import Preprocessing, fingerprint_of

INPUT = "input"
PENULTIMATE = "penultimate"
STAGES = "stages"
LOGITS = "logits"
ALIASES = (PENULTIMATE, STAGES, LOGITS, INPUT)
INPUT_SIDE = 32
INPUT_DIM = 3 * INPUT_SIDE**2


class LayerRow(NamedTuple):
    """One line of `describe`: the shape is without the batch axis; `aliases` are those that lead here."""

    name: str
    shape: tuple[int, ...]
    aliases: tuple[str, ...]


def describe(backbone: Backbone) -> list[LayerRow]:
    """Return ``input`` and all layers of a network in order of computation, with their shapes and aliases."""
    traced = backbone.traced
    aliases: dict[str | None, list[str]] = {name: [STAGES] for name in stages(traced)}
    aliases.setdefault(traced.classifier, []).append(LOGITS)
    read = classifier_input(traced)
    outermost = [name for name, node in traced.nodes.items() if node is read][-1:]
    for name in outermost:
        aliases.setdefault(name, []).append(PENULTIMATE)
    rows = [LayerRow(name, shape, tuple(aliases.get(name, ()))) for name, shape in traced.shapes.items()]
    return [LayerRow(INPUT, (3, *backbone.preprocessing.size), (INPUT,)), *rows]


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
        resolved += [layer] if layer == INPUT else _resolve(backbone, layer)
    return tuple(dict.fromkeys(resolved))


def resolved_aliases(backbone: Backbone) -> dict[str, list[str]]:
    """Return the layer names that each alias stands for; aliases for which the network has nothing are left out."""
    found = {}
    for alias in ALIASES:
        with suppress(BackboneError):
            found[alias] = list(resolve_layers(backbone, [alias]))
    return found


def _resolve(backbone: Backbone, layer: str) -> tuple[str, ...]:
    traced, handle = backbone.traced, backbone.handle
    if layer == STAGES:
        found = stages(traced)
        if not found:
            raise BackboneError(f"{handle} has no stages that end in maps; {_suggestion(traced)}")
        return found
    name = traced.classifier if layer == LOGITS else layer
    if name is not None and _find(traced, name) is not None:
        return (name,)
    if layer in (LOGITS, PENULTIMATE):
        raise BackboneError(f"{handle} has no classifier that '{layer}' could go by; {_suggestion(traced)}")
    if layer in traced.shapes:
        shape = "x".join(map(str, traced.shapes[layer]))
        raise BackboneError(
            f"layer {layer} of {handle} has the shape {shape}: expected cxhxw, tokens x d or d; {_suggestion(traced)}"
        )
    if layer and layer in dict(traced.module.named_modules()):
        raise BackboneError(f"layer {layer} of {handle} gives no tensor with a row an image; {_suggestion(traced)}")
    raise BackboneError(
        f"{handle} has no layer '{layer}'{nearest(layer, [*ALIASES, *traced.shapes])}; "
        f"`thawline layers {handle}` lists them all"
    )


def _suggestion(traced: Traced) -> str:
    """Return layers that work, for an error's end."""
    known = [name for name in traced.shapes if _find(traced, name) is not None]
    outer = [name for name in known if name.count(".") <= 1] or known
    return f"layers that work: {', '.join(outer[:: max(1, len(outer) // 4)][:5])}"


class _Tap(NamedTuple):
    """What to pool for a layer: a node of the graph, or, in a network that cannot be traced, a module's name."""

    source: fx.Node | str
    shape: Shape
    layout: Layout


def _find(traced: Traced, layer: str, pool: str = "avg") -> _Tap | None:
    """Return the tap for `layer`, or None if there is nothing that could be pooled.

    With the plain average, ``penultimate`` is what the classifier reads; otherwise the map that is pooled into that.
    """
    source: fx.Node | str | None = layer if traced.graph is None else traced.nodes.get(layer)
    if layer == PENULTIMATE:
        source = traced.classifier
        if traced.graph is not None:
            source = (last_map(traced) if pool != "avg" else None) or classifier_input(traced)
    if isinstance(source, fx.Node):
        shape = source.meta.get(SHAPE)
    else:
        shape = traced.read if layer == PENULTIMATE else traced.shapes.get(layer)
    layout = layout_of(shape) if shape is not None else None
    return _Tap(source, shape, layout) if source and shape and layout else None


class TappedNetwork(nn.Module):
    """A frozen network from pixels to pooled features; always in eval mode.

    Parameters
    ----------
    backbone : Backbone
        A loaded network.
    layers : tuple of str
        As `resolve_layers` returns them.
    pool : str
        One of `pipeline.spec.POOLS`.

    Attributes
    ----------
    name : str
        The backbone's handle.
    identity : str
        Digest of all that tells this network from another: weights, layers, pooling, preprocessing.
    size : tuple of int
        Height and width of the pixels.
    layers : tuple of str
        The layers, in the order of the results.
    dims : dict of str to int
        Length of each layer's features, in the same order.
    body : torch.nn.Module or None
        What maps normalised images to features; None where only ``input`` is tapped.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, backbone: Backbone, layers: tuple[str, ...], pool: str) -> None:
        super().__init__()
        check_pool(pool)
        found = {layer: _find(backbone.traced, layer, pool) for layer in layers if layer != INPUT}
        taps = {layer: item for layer, item in found.items() if item is not None}
        self.name, self.size = backbone.handle, backbone.preprocessing.size
        preprocessing = asdict(backbone.preprocessing)
        self.identity = fingerprint_of([backbone.name, backbone.weights_digest, layers, pool, preprocessing])
        self.layers = layers
        self.dims = {
            layer: INPUT_DIM if layer == INPUT else pooled_dim(taps[layer].shape, taps[layer].layout, pool)
            for layer in layers
        }
        self.body = _body(backbone.traced, taps, pool) if taps else None
        scale, shift = normalisation(backbone.preprocessing)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)
        self.eval()

    def train(self, mode: bool = True) -> TappedNetwork:
        """Stay in eval mode: a frozen network has no other."""
        return super().train(False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Map uint8 (n, h, w, 3) to a float32 (n, d) for each layer, in order."""
        x = pixels.permute(0, 3, 1, 2).float() * self.scale + self.shift  # (n, 3, h, w), channels last in memory
        features = iter(self.body(x) if self.body is not None else ())
        return tuple(small_image(x) if layer == INPUT else next(features) for layer in self.layers)


def normalisation(preprocessing: Preprocessing) -> tuple[Tensor, Tensor]:
    """Return scale and shift, (1, 3, 1, 1) float32, that make a network's input of pixels from 0 to 255."""
    mean, std = (
        torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (preprocessing.mean, preprocessing.std)
    )
    return (1 / (255 * std)).float(), (-mean / std).float()


def small_image(x: Tensor) -> Tensor:
    """Return what `INPUT` stands for: normalised images (n, 3, h, w) area-averaged and flattened, (n, 3072) float32."""
    with torch.autocast(x.device.type, enabled=False):
        return adaptive_avg_pool2d(x, INPUT_SIDE).flatten(1)


def _body(traced: Traced, taps: dict[str, _Tap], pool: str) -> nn.Module:
    pools = [Pool(pool, item.layout) for item in taps.values()]
    nodes = [item.source for item in taps.values() if isinstance(item.source, fx.Node)]
    if nodes:
        return tapped_graph(traced, nodes, pools)
    return HookedBody(traced.module, [(str(item.source), layer == PENULTIMATE) for layer, item in taps.items()], pools)


def tap(backbone: Backbone, layers: Sequence[str], pool: str = "avg") -> TappedNetwork:
    """Return the network that maps uint8 pixels to the pooled features of `layers`, and computes nothing beyond.

    Parameters
    ----------
    backbone : Backbone
        A loaded network; the result shares its weights.
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
