"""The aliases of layers, and rules that find what they stand for in a traced network.

timm's own `feature_info` is not used: it adds the stems of ResNets (``act1``), leaves out the stages of EfficientNets
that keep the resolution, does not exist for torchvision's networks, and caches of ``stages`` would be computed anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from math import ceil

import torch
from timm.layers import SelectAdaptivePool2d
from torch import fx, nn

from pipeline.backbones.pooling import layout_of
from pipeline.backbones.subgraph import cut_nodes
from pipeline.backbones.trace import SHAPE, TENSORS, Traced
from pipeline.errors import BackboneError

INPUT = "input"
PENULTIMATE = "penultimate"
STAGES = "stages"
LOGITS = "logits"
"""Also the name of a layer, where several classifiers have a part in the class scores."""
ALIASES = (PENULTIMATE, STAGES, LOGITS, INPUT)
_POOLING = (nn.Dropout, nn.Identity, nn.Flatten, nn.AdaptiveAvgPool2d, nn.AvgPool2d, SelectAdaptivePool2d)
_POOLING_FUNCTIONS = {"flatten", "mean", "dropout", "adaptive_avg_pool2d", "avg_pool2d", "squeeze", "view", "reshape"}
_POOLED_TOKENS = {
    "token": "the class token",
    "avg": "the mean of the patch tokens",
    "max": "the maximum of the patch tokens",
    "avgmax": "the mean and the maximum of the patch tokens, averaged",
    "map": "the tokens, pooled by attention",
}
"""What the classifier reads, by timm's `global_pool`."""
_WEIGHTS = (nn.Conv2d, nn.Linear)
_BLOCK_LAYERS = 2
"""A module with fewer weight layers than this is a stem, a head or a transition, not a block."""


def classifier_input(traced: Traced) -> fx.Node | None:
    """Return the node that the classifier reads, or the network's output where the network has no classifier."""
    if traced.graph is None or traced.joined is not None:
        return traced.joined
    reader = traced.nodes.get(traced.classifier or "") or traced.graph.output_node()
    read = reader.args[0]
    return read if isinstance(read, fx.Node) else None


def scores_layer(traced: Traced) -> str | None:
    """Return the layer of the class scores; None if the network has no classifier.

    That is the classifier or, where more than pooling follows it (SqueezeNet has a ReLU there), the network's output.
    """
    classifier = traced.nodes.get(traced.classifier or "")
    output = node = None if traced.graph is None else traced.graph.output_node().args[0]
    while isinstance(node, fx.Node) and node is not classifier and _only_pools(node, traced.module):
        node = node.args[0]
    if classifier is None or node is classifier or not isinstance(output, fx.Node):
        return traced.classifier
    return next((name for name, one in traced.nodes.items() if one is output), traced.classifier)


def join_classifiers(traced: Traced, classifiers: Sequence[str], name: str) -> Traced:
    """Return a network with several classifiers with the layer of its class scores, and what the classifiers read.

    That is the last vector that they all depend on alone. Where there is none, a node is added to the graph that joins
    what each of them reads, tokens averaged. Raises `BackboneError`, about `name`, if they read other things.
    """
    graph, readers = traced.graph, [traced.nodes[path] for path in classifiers if path in traced.nodes]
    scores = graph.output_node().args[0] if graph is not None else None
    if graph is None or not isinstance(scores, fx.Node) or not readers:
        return traced
    order = list(graph.nodes)
    first = min(map(order.index, readers))
    common = [node for node in cut_nodes(graph) if order.index(node) < first][-1:]
    shared = next((node for node in common if _kind(node, traced) == "vector"), None)
    shapes = traced.shapes | {LOGITS: scores.meta[SHAPE]}
    nodes = traced.nodes | {LOGITS: scores}
    joined = shared or _join(traced, graph, readers, name)
    return replace(traced, classifier=LOGITS, nodes=nodes, shapes=shapes, joined=joined)


def _join(traced: Traced, graph: fx.Graph, readers: Sequence[fx.Node], name: str) -> fx.Node:
    reads = [node for node in dict.fromkeys(reader.args[0] for reader in readers) if isinstance(node, fx.Node)]
    if not {_kind(node, traced) for node in reads} <= {"vector", "tokens"}:
        raise BackboneError(f"the classifiers of {name} read neither vectors nor tokens; use another network")
    with graph.inserting_before(graph.output_node()):
        vectors = list(reads)
        for index, node in enumerate(reads):
            if _kind(node, traced) == "tokens":
                vectors[index] = graph.call_method("mean", (node, 1))
                vectors[index].meta |= {SHAPE: node.meta[SHAPE][1:], TENSORS: True}
        joined = graph.call_function(torch.cat, (vectors, 1))
    joined.meta |= {SHAPE: (sum(node.meta[SHAPE][-1] for node in reads),), TENSORS: True}
    return joined


def last_map(traced: Traced) -> fx.Node | None:
    """Return the map that becomes the classifier's input by pooling and flattening alone; None if there is none."""
    vector = node = classifier_input(traced)
    while node is not None and _grid(node, traced) is None:
        read = node.args[0] if node.args and _only_pools(node, traced.module) else None
        node = read if isinstance(read, fx.Node) else None
    if node is None or vector is None or vector.meta[SHAPE][0] != _channels(node, traced):
        return None
    return node


def classifier_reads(traced: Traced) -> str:
    """Return what the classifier reads, in words, as far as torchvision and timm tell; ``""`` if they do not."""
    if last_map(traced) is not None:
        return "the last map, averaged over its positions"
    pooled = getattr(traced.module, "global_pool", "token" if traced.tokens.has_class else "")
    return _POOLED_TOKENS.get(pooled, "") if isinstance(pooled, str) else ""


def _kind(node: fx.Node, traced: Traced) -> str:
    layout = layout_of(node.meta.get(SHAPE, ()), size=traced.size)
    return "" if layout is None else layout.kind


def _grid(node: fx.Node, traced: Traced) -> tuple[int, int] | None:
    """Return height and width of the map that `node` gives; None if that is no map, or a map of 1 x 1."""
    shape, kind = node.meta.get(SHAPE, ()), _kind(node, traced)
    height, width = shape[1:] if kind == "map" else shape[:2] if kind == "map_last" else (1, 1)
    return (int(height), int(width)) if max(height, width) > 1 else None


def _extent(node: fx.Node, traced: Traced) -> object:
    """Return the sides of a map, the rows of a grid of patch tokens, or the number of tokens that lie on no grid."""
    shape = node.meta[SHAPE]
    layout = layout_of(shape, traced.tokens, traced.size)
    return _grid(node, traced) or (layout.rows if layout is not None else 0) or int(shape[0])


def _channels(node: fx.Node, traced: Traced) -> int:
    shape = node.meta[SHAPE]
    return int(shape[0] if _kind(node, traced) == "map" else shape[-1])


def _only_pools(node: fx.Node, module: nn.Module) -> bool:
    if node.op == "call_module":
        return isinstance(module.get_submodule(str(node.target)), _POOLING)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op in ("call_function", "call_method") and name in _POOLING_FUNCTIONS


def stages(traced: Traced) -> tuple[str, ...]:
    """Return the names of the layers that end a stage, in order of computation; () if fewer than two are found.

    A stage ends with the last block before the resolution changes, and where a sequence of blocks ends and the number
    of channels changes. In a network without blocks (VGG, AlexNet) it ends with the last layer before the resolution
    changes. Only layers that every path crosses count, and there are none if most weight layers come after the last.
    Where no maps are found, stages end with blocks that give tokens: before the number of tokens changes or, if it is
    the same throughout, with each quarter of the blocks, as DINOv2 is evaluated (Oquab et al. 2023).
    The name of a stage is that of the outermost module around its end that gives maps of the same size and holds no
    other end.
    """
    if traced.graph is None:
        return ()
    cuts = cut_nodes(traced.graph)
    maps = _names(traced, [node for node in cuts if _grid(node, traced) is not None])
    blocks = _blocks(traced, maps)
    ends = _block_ends(traced, maps, blocks) if len(blocks) > 1 else _resolution_ends(traced, maps)
    if len(ends) > 1 and _is_late(ends[-1], traced):
        return tuple(_outermost(node, ends, maps, traced) for node in ends)
    tokens = _names(traced, [node for node in cuts if len(node.meta.get(SHAPE, ())) == 2])
    blocks = _blocks(traced, tokens)
    ends = _block_ends(traced, tokens, blocks)
    if len(ends) == 1:
        quarters = (ceil(len(blocks) * quarter / 4) for quarter in (1, 2, 3, 4))
        ends = [blocks[count - 1] for count in dict.fromkeys(quarters)]
    return tuple(_outermost(node, ends, tokens, traced) for node in ends) if len(ends) > 1 else ()


def _names(traced: Traced, nodes: list[fx.Node]) -> dict[fx.Node, list[str]]:
    names: dict[fx.Node, list[str]] = {node: [] for node in nodes}
    for name, node in traced.nodes.items():
        if node in names:
            names[node].append(name)
    return names


def _is_late(end: fx.Node, traced: Traced) -> bool:
    """Tell whether at least half of the weight layers come before `end`; otherwise the maps are only a stem."""
    order = list(end.graph.nodes)
    weighted = [index for index, node in enumerate(order) if _has_weights(node, traced)]
    return sum(index <= order.index(end) for index in weighted) * 2 >= len(weighted)


def _has_weights(node: fx.Node, traced: Traced) -> bool:
    return node.op == "call_module" and isinstance(traced.module.get_submodule(str(node.target)), _WEIGHTS)


def _blocks(traced: Traced, names: dict[fx.Node, list[str]]) -> list[fx.Node]:
    """Return the output nodes of the blocks: of the outermost modules that do not consist of several blocks."""
    modules = dict(traced.module.named_modules())
    heavy = {name for crossed in names.values() for name in crossed if name in modules and _is_heavy(modules[name])}
    split = {name for name in heavy if _is_split(name, heavy)}
    whole = {name for name in heavy - split if not any(name.startswith(f"{other}.") for other in heavy - split)}
    return [node for node, crossed in names.items() if whole.intersection(crossed)]


def _is_heavy(module: nn.Module) -> bool:
    """Tell whether a module may be a block: it has several weight layers, and is not just a flat sequence of layers."""
    if isinstance(module, nn.Sequential) and not any(list(child.children()) for child in module):
        return False
    return sum(isinstance(part, _WEIGHTS) for part in module.modules()) >= _BLOCK_LAYERS


def _is_split(name: str, heavy: set[str]) -> bool:
    """Tell whether the module `name` holds two of the `heavy` modules, neither of them inside the other."""
    inside = sorted(other for other in heavy if other.startswith(f"{name}."))
    return any(not inner.startswith(f"{outer}.") for outer, inner in pairwise(inside))


def _block_ends(traced: Traced, names: dict[fx.Node, list[str]], blocks: list[fx.Node]) -> list[fx.Node]:
    modules = dict(traced.module.named_modules())
    return [
        node
        for node, after in pairwise(blocks)
        if _extent(node, traced) != _extent(after, traced)
        or (
            _channels(node, traced) != _channels(after, traced)
            and any(isinstance(modules.get(name), nn.Sequential) for name in names[node])
        )
    ] + blocks[-1:]


def _resolution_ends(traced: Traced, names: dict[fx.Node, list[str]]) -> list[fx.Node]:
    named = [node for node in names if names[node]]
    ends = []
    weighted = False
    for index, node in enumerate(named):
        weighted |= _has_weights(node, traced)
        if index + 1 == len(named) or _grid(node, traced) != _grid(named[index + 1], traced):
            ends += [node] if weighted else []
            weighted = False
    return ends


def _outermost(node: fx.Node, ends: list[fx.Node], names: dict[fx.Node, list[str]], traced: Traced) -> str:
    """Return the outermost module around `node` that gives maps of the same size and holds no other stage's end."""
    others = [name for end in ends if end is not node for name in names[end]]
    around = {name.rsplit(".", depth)[0] for name in names[node] for depth in range(name.count(".") + 1)}
    fitting = [
        name
        for name in around
        if traced.nodes.get(name) in names
        and _extent(traced.nodes[name], traced) == _extent(node, traced)
        and _channels(traced.nodes[name], traced) == _channels(node, traced)
        and not any(other.startswith(f"{name}.") for other in others)
    ]
    return min(fitting, key=lambda name: name.count(".")) if fitting else names[node][0]
