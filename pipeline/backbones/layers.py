"""Layers by name: listing them, resolving what the user asked for, and finding where to tap each."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from torch import fx

from features_cache import nearest
from pipeline.backbones.aliases import (
    ALIASES,
    INPUT,
    LOGITS,
    PENULTIMATE,
    STAGES,
    classifier_input,
    last_map,
    scores_layer,
    stages,
)
from pipeline.backbones.backbone import Backbone
from pipeline.backbones.pooling import Layout, layout_of, misfit
from pipeline.backbones.trace import SHAPE, Shape, Traced
from pipeline.errors import BackboneError


class LayerRow(NamedTuple):
    """One line of `list_layers`: the shape has no batch axis; `aliases` are the other names of the layer."""

    name: str
    shape: tuple[int, ...]
    aliases: tuple[str, ...]


def list_layers(backbone: Backbone) -> list[LayerRow]:
    """Return ``input`` and all layers of a network in order of computation, with their shapes and aliases.

    Examples
    --------
    >>> from pipeline.backbones.registry import sketch
    >>> list_layers(sketch("resnet18"))[-1]
    LayerRow(name='fc', shape=(1000,), aliases=('logits',))
    """
    traced = backbone.traced
    aliases: dict[str | None, list[str]] = {name: [STAGES] for name in stages(traced)}
    aliases.setdefault(scores_layer(traced), []).append(LOGITS)
    read = classifier_input(traced)
    for name in [name for name, node in traced.nodes.items() if node is read][-1:]:  # the outermost
        aliases.setdefault(name, []).append(PENULTIMATE)
    rows = [LayerRow(name, shape, tuple(aliases.get(name, ()))) for name, shape in traced.shapes.items()]
    if traced.joined is not None and traced.joined not in traced.nodes.values():
        rows.insert(-1, LayerRow(PENULTIMATE, traced.joined.meta[SHAPE], (PENULTIMATE,)))
    return [LayerRow(INPUT, (3, *backbone.preprocessing.size), (INPUT,)), *rows]


def resolve_layers(backbone: Backbone, layers: Sequence[str]) -> tuple[str, ...]:
    """Replace ``stages`` and ``logits`` by the layers they stand for, and drop duplicates; the order is kept.

    Layers are dotted names, or ``penultimate``, ``stages``, ``logits``, ``input``; these win over modules of the same
    name. Raises `BackboneError` if a layer does not exist, or its activations cannot be pooled.

    Examples
    --------
    >>> from pipeline.backbones.registry import sketch
    >>> resolve_layers(sketch("resnet18"), ["stages", "logits", "layer4"])
    ('layer1', 'layer2', 'layer3', 'layer4', 'fc')
    """
    if not layers:
        raise BackboneError(f"no layer was asked for; name one, such as {PENULTIMATE}")
    resolved: list[str] = []
    for layer in layers:
        resolved += [layer] if layer == INPUT else _resolve(backbone, layer)
    return tuple(dict.fromkeys(resolved))


def resolved_aliases(backbone: Backbone) -> dict[str, list[str]]:
    """Return the layers that each alias stands for, without the aliases that this network does not have."""
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
            raise BackboneError(f"{handle} has no stages; {_suggestion(traced)}")
        return found
    name = scores_layer(traced) if layer == LOGITS else layer
    if name is not None and find_tap(traced, name) is not None:
        return (name,)
    if layer in (LOGITS, PENULTIMATE):
        raise BackboneError(f"{handle} has no classifier, which '{layer}' refers to; {_suggestion(traced)}")
    if layer in traced.shapes:
        shape = "x".join(map(str, traced.shapes[layer]))
        raise BackboneError(
            f"layer {layer} of {handle} has the shape {shape}, expected cxhxw, tokens x d or d; {_suggestion(traced)}"
        )
    if layer and layer in dict(traced.module.named_modules()):
        raise BackboneError(
            f"layer {layer} of {handle} does not give one tensor with a row for each image; {_suggestion(traced)}"
        )
    raise BackboneError(
        f"{handle} has no layer '{layer}'{nearest(layer, [*ALIASES, *traced.shapes])}; "
        f"`thawline layers {handle}` lists them all"
    )


def _suggestion(traced: Traced) -> str:
    """Return a few layers that work, for the end of an error message."""
    known = [name for name in traced.shapes if find_tap(traced, name) is not None]
    return f"layers that work: {', '.join(a_few(known, 5))}"


def a_few(layers: Sequence[str], most: int) -> list[str]:
    """Return the outermost of some layers; an even choice of them if there are more than `most`."""
    outer = [name for name in layers if name.count(".") <= 1] or list(layers)
    return outer[:: max(1, -(-len(outer) // most))]


class Tap(NamedTuple):
    """What to pool for a layer: a node of the graph or, in a network that cannot be traced, a module's name."""

    source: fx.Node | str
    shape: Shape
    layout: Layout


def find_tap(traced: Traced, layer: str, pool: str = "avg") -> Tap | None:
    """Return where to tap `layer`, or None if it does not exist or its activations cannot be pooled.

    With the pooling ``avg``, ``penultimate`` is what the classifier reads; with others it is the map that the network
    itself averages into that, if there is one.
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
    layout = layout_of(shape, traced.tokens, traced.size) if shape is not None else None
    return Tap(source, shape, layout) if source and shape and layout else None


def pooled_tap(backbone: Backbone, layer: str, pool: str) -> Tap:
    """Return where to tap a layer that `resolve_layers` gave; raises `BackboneError` if `pool` does not suit it."""
    tap = find_tap(backbone.traced, layer, pool)
    if tap is None:
        raise BackboneError(f"{backbone.handle} has no layer '{layer}'")
    if problem := misfit(pool, tap.layout):
        raise BackboneError(
            f"layer {layer} of {backbone.handle} {problem}, which pool '{pool}' needs; use another, such as avg"
        )
    return tap
