"""The thaw line in a traced network: which layers it may follow, and the networks below and above it."""

from __future__ import annotations

from typing import NamedTuple

from torch import fx

from features_cache import nearest
from pipeline.backbones.aliases import classifier_input
from pipeline.backbones.backbone import Backbone
from pipeline.backbones.layers import a_few
from pipeline.backbones.pooling import Layout, layout_of
from pipeline.backbones.subgraph import copy_between, cut_nodes, nodes_between
from pipeline.backbones.trace import SHAPE, Shape, Traced
from pipeline.errors import BackboneError


class LayerNode(NamedTuple):
    """A layer's node in the graph, and its activations: shape without the batch axis, and layout."""

    node: fx.Node
    shape: Shape
    layout: Layout


def top_input(backbone: Backbone) -> LayerNode:
    """Return what a new top reads, the layer that the old classifier read; raises `BackboneError` if there is none."""
    found = _layer_node(backbone.traced, classifier_input(backbone.traced))
    if found is not None:
        return found
    untraced = backbone.traced.graph is None
    why = "its graph cannot be traced" if untraced else "its classifier reads no map, tokens or vector"
    raise BackboneError(
        f"{backbone.handle} cannot be fine-tuned, because {why}; fit heads on its features, or use another network"
    )


def possible_lines(backbone: Backbone) -> dict[str, LayerNode]:
    """Return the layers that the thaw line may follow, by name, in order of computation.

    Every path from the image to the classifier crosses such a layer, nothing above it needs anything else from below,
    and its activations are a map, tokens or a vector, which a cache can hold. Several names may stand for one node.
    """
    traced, read = backbone.traced, top_input(backbone)
    position = {node: index for index, node in enumerate(read.node.graph.nodes)}
    possible: dict[fx.Node, LayerNode] = {}
    for node in cut_nodes(read.node.graph):
        line = _layer_node(traced, node)
        if line is not None and position[node] <= position[read.node]:
            above = nodes_between(node, [read.node])
            if above is not None and not _shares_weights(traced, above):
                possible[node] = line
    return {name: possible[node] for name, node in traced.nodes.items() if node in possible}


def find_line(backbone: Backbone, name: str) -> LayerNode:
    """Return the node that the thaw line follows when everything up to layer `name` is frozen.

    The `BackboneError` for a layer that does not exist, or that paths bypass, says which layers the line can follow.
    """
    possible = possible_lines(backbone)
    if name in possible:
        return possible[name]
    if not possible:
        raise BackboneError(
            f"the thaw line of {backbone.handle} cannot follow '{name}': some paths bypass each of its layers; freeze "
            "'all' or 'none'"
        )
    known = name in backbone.traced.shapes
    why = "some paths bypass it" if known else f"there is no such layer{nearest(name, possible)}"
    named = a_few(list(possible), 12)
    others = f" and others ({len(possible)} in all)" if len(named) < len(possible) else ""
    raise BackboneError(
        f"the thaw line of {backbone.handle} cannot follow '{name}': {why}; it can follow {', '.join(named)}{others}"
    )


def split(backbone: Backbone, line: LayerNode | None) -> tuple[fx.GraphModule | None, fx.GraphModule]:
    """Return the trunk, from the image to `line`, and the thawed part, from there to what the top reads.

    Without a line the trunk is None, and the thawed part starts at the image. Both share their weights with the
    backbone, under the same names; one after the other they compute what it computes.
    """
    traced, read = backbone.traced, top_input(backbone)
    if line is None:
        return None, _between(traced, None, read.node)
    return _between(traced, None, line.node), _between(traced, line.node, read.node)


def _layer_node(traced: Traced, node: fx.Node | None) -> LayerNode | None:
    shape = None if node is None else node.meta.get(SHAPE)
    layout = None if shape is None else layout_of(shape, traced.tokens, traced.size)
    return None if node is None or shape is None or layout is None else LayerNode(node, shape, layout)


def _shares_weights(traced: Traced, above: list[fx.Node]) -> bool:
    """Tell whether a module or tensor with weights is used both in `above` and elsewhere in the network."""
    inside = set(above)
    upper = {str(node.target) for node in above if _has_weights(traced, node)}
    others = (node for node in above[0].graph.nodes if node not in inside) if above else ()
    return any(str(node.target) in upper for node in others if _has_weights(traced, node))


def _has_weights(traced: Traced, node: fx.Node) -> bool:
    if node.op == "call_module":
        module = traced.module.get_submodule(str(node.target))
        return next(module.parameters(), None) is not None or next(module.buffers(), None) is not None
    return node.op == "get_attr"


def _between(traced: Traced, start: fx.Node | None, end: fx.Node) -> fx.GraphModule:
    graph, copies = copy_between(start, [end])
    graph.output(copies[end])
    return fx.GraphModule(traced.module, graph)  # given the whole module, it keeps the order of the graph
