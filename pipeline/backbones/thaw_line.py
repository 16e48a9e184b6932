"""The thaw line in a traced network: where it may be drawn, and the networks on both its sides."""

from __future__ import annotations

from typing import NamedTuple

from torch import fx

from features_cache.errors import nearest
from pipeline.backbones.aliases import classifier_input
from pipeline.backbones.backbone import Backbone
from pipeline.backbones.pooling import Layout, layout_of
from pipeline.backbones.trace import SHAPE, Shape, Traced, cut_nodes, nodes_between
from pipeline.errors import BackboneError


class Place(NamedTuple):
    """A node of the graph and how to read what it gives: shape without the batch axis, and layout."""

    node: fx.Node
    shape: Shape
    layout: Layout


def read_place(backbone: Backbone) -> Place:
    """Return what the classifier reads: where the old top comes off.

    Raises
    ------
    BackboneError
        If the network cannot be traced, or its classifier reads no map, tokens or vector.
    """
    if backbone.traced.graph is None:
        raise BackboneError(
            f"{backbone.handle} cannot be traced, so no line can be drawn in it and it cannot be fine-tuned; "
            "fit heads on its features, or take another network"
        )
    place = _place(classifier_input(backbone.traced))
    if place is None:
        raise BackboneError(f"the classifier of {backbone.handle} reads nothing a new top could read; take another")
    return place


def lines(backbone: Backbone) -> dict[str, Place]:
    """Return the layers that the thaw line may follow, in order of computation.

    Every path from the image to the classifier crosses such a layer, nothing above it needs anything else from below,
    and its activations are a map or a vector, which a cache can hold. Where modules give the same activations, the
    names of all of them are there.
    """
    traced, read = backbone.traced, read_place(backbone)
    order = {node: number for number, node in enumerate(read.node.graph.nodes)}
    legal: dict[fx.Node, Place] = {}
    for node in cut_nodes(read.node.graph):
        place = _place(node)
        if place is not None and place.layout != "tokens" and order[node] <= order[read.node]:
            above = nodes_between(node, [read.node])
            if above is not None and not _shares_weights(traced, order, above):
                legal[node] = place
    return {name: legal[node] for name, node in traced.nodes.items() if node in legal}


def find_line(backbone: Backbone, name: str) -> Place:
    """Return the place of the thaw line after layer `name`.

    Raises
    ------
    BackboneError
        If there is no such layer, or paths jump over it; the message says which layers can be the line.
    """
    legal = lines(backbone)
    if name in legal:
        return legal[name]
    known = name in backbone.traced.shapes
    why = "paths jump over it or through it" if known else f"there is no such layer{nearest(name, legal)}"
    raise BackboneError(
        f"the thaw line of {backbone.handle} cannot follow '{name}': {why}; it can follow {_listed(list(legal))}"
    )


def split(traced: Traced, line: fx.Node | None, read: fx.Node) -> tuple[fx.GraphModule | None, fx.GraphModule]:
    """Return the networks from the image to `line`, and from `line` (or the image) to `read`.

    Both share their weights with the network, under the same names; composed they compute what it computes.
    """
    if line is None:
        return None, _between(traced, None, read)
    return _between(traced, None, line), _between(traced, line, read)


def _place(node: fx.Node | None) -> Place | None:
    shape = None if node is None else node.meta.get(SHAPE)
    layout = None if shape is None else layout_of(shape)
    return None if node is None or shape is None or layout is None else Place(node, shape, layout)


def _shares_weights(traced: Traced, order: dict[fx.Node, int], above: list[fx.Node]) -> bool:
    """Tell whether a module or tensor with weights is used on both sides of a line."""
    upper = {str(node.target) for node in above if _has_weights(traced, node)}
    inside = set(above)
    return any(str(node.target) in upper for node in order if node not in inside and _has_weights(traced, node))


def _has_weights(traced: Traced, node: fx.Node) -> bool:
    if node.op == "call_module":
        module = traced.module.get_submodule(str(node.target))
        return next(module.parameters(), None) is not None or next(module.buffers(), None) is not None
    return node.op == "get_attr"


def _between(traced: Traced, start: fx.Node | None, end: fx.Node) -> fx.GraphModule:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    if start is not None:
        copies[start] = graph.placeholder("activations")
    for node in nodes_between(start, [end]) or ():
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[end])
    return fx.GraphModule(traced.module, graph)  # its modules stand in the order of the graph


def _listed(names: list[str], most: int = 12) -> str:
    """Return the outermost names, evenly thinned to `most`."""
    outer = [name for name in names if name.count(".") <= 1] or names
    step = -(-len(outer) // most)
    return ", ".join(outer[::step]) + (f" and others ({len(names)} in all)" if len(outer[::step]) < len(names) else "")
