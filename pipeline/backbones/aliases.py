"""Rules that find, in a traced network, what the aliases stand for. Nothing is computed here."""

from __future__ import annotations

from itertools import pairwise

from timm.layers import SelectAdaptivePool2d
from torch import fx, nn

from pipeline.backbones.pooling import layout_of
from pipeline.backbones.trace import SHAPE, Traced, cut_nodes

_POOLING = (nn.Dropout, nn.Identity, nn.Flatten, nn.AdaptiveAvgPool2d, nn.AvgPool2d, SelectAdaptivePool2d)
_POOLING_FUNCTIONS = {"flatten", "mean", "dropout", "adaptive_avg_pool2d", "avg_pool2d", "squeeze", "view", "reshape"}
_WEIGHTS = (nn.Conv2d, nn.Linear)
_BLOCK_LAYERS = 2
"""Fewer layers of weights than this make a stem, a head or a transition, not a block."""


def classifier_input(traced: Traced) -> fx.Node | None:
    """Return the node that the classifier reads, or the network's output where the graph has no classifier."""
    if traced.graph is None:
        return None
    reader = traced.nodes.get(traced.classifier or "") or traced.graph.output_node()
    read = reader.args[0]
    return read if isinstance(read, fx.Node) else None


def last_map(traced: Traced) -> fx.Node | None:
    """Return the map that is merely pooled and flattened into what the classifier reads, or None if there is more."""
    vector = node = classifier_input(traced)
    while node is not None and _grid(node) is None:
        read = node.args[0] if node.args and _only_pools(node, traced.module) else None
        node = read if isinstance(read, fx.Node) else None
    if node is None or vector is None or vector.meta[SHAPE][0] != _channels(node):
        return None
    return node


def _grid(node: fx.Node) -> int | None:
    """Return the side of the map that `node` gives, or None if that is no map of more than one place."""
    shape = node.meta.get(SHAPE, ())
    if layout_of(shape) in ("map", "map_last") and shape[1] > 1:
        return int(shape[1])
    return None


def _channels(node: fx.Node) -> int:
    shape = node.meta[SHAPE]
    return int(shape[0] if layout_of(shape) == "map" else shape[-1])


def _only_pools(node: fx.Node, module: nn.Module) -> bool:
    if node.op == "call_module":
        return isinstance(module.get_submodule(str(node.target)), _POOLING)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op in ("call_function", "call_method") and name in _POOLING_FUNCTIONS


def stages(traced: Traced) -> tuple[str, ...]:
    """Return the names of the stages' ends, in order; empty where fewer than two are crossed by every path.

    A stage ends with the last block before the resolution changes, and where a sequence of blocks ends and the number
    of channels changes; in a network without blocks (VGG, AlexNet) with the last layer before the resolution changes.
    A stage is called by the outermost module around its end that gives maps as large and holds no other stage's end.
    Networks whose weights mostly come after the last of these maps have none.
    """
    if traced.graph is None:
        return ()
    names: dict[fx.Node, list[str]] = {node: [] for node in cut_nodes(traced.graph) if _grid(node) is not None}
    for name, node in traced.nodes.items():
        if node in names:
            names[node].append(name)
    named = [node for node in names if names[node]]
    blocks = _blocks(traced, names)
    ends = _block_ends(traced, names, blocks) if len(blocks) > 1 else _resolution_ends(traced, named)
    if len(ends) < 2 or not _is_late(ends[-1], traced):
        return ()
    return tuple(_outermost(node, ends, names, traced) for node in ends)


def _is_late(end: fx.Node, traced: Traced) -> bool:
    """Tell whether most layers of weights stand before `end`; where most come after, the maps are only a stem."""
    order = list(end.graph.nodes)
    layers = [place for place, node in enumerate(order) if _has_weights(node, traced)]
    return sum(place <= order.index(end) for place in layers) * 2 >= len(layers)


def _has_weights(node: fx.Node, traced: Traced) -> bool:
    return node.op == "call_module" and isinstance(traced.module.get_submodule(str(node.target)), _WEIGHTS)


def _blocks(traced: Traced, names: dict[fx.Node, list[str]]) -> list[fx.Node]:
    """Return the nodes that are the output of a block: of an outermost module that is not itself several blocks."""
    modules = dict(traced.module.named_modules())
    heavy = {name for crossed in names.values() for name in crossed if name in modules and _is_heavy(modules[name])}
    split = {name for name in heavy if _is_split(name, heavy)}
    whole = {name for name in heavy - split if not any(name.startswith(f"{other}.") for other in heavy - split)}
    return [node for node, crossed in names.items() if whole.intersection(crossed)]


def _is_heavy(module: nn.Module) -> bool:
    """Tell a possible block from a stem, a head or a transition: several layers of weights, not merely in a row."""
    if isinstance(module, nn.Sequential) and not any(list(child.children()) for child in module):
        return False
    return sum(isinstance(part, _WEIGHTS) for part in module.modules()) >= _BLOCK_LAYERS


def _is_split(name: str, heavy: set[str]) -> bool:
    """Tell whether two of the `heavy` modules inside `name` stand side by side."""
    inside = sorted(other for other in heavy if other.startswith(f"{name}."))
    return any(not inner.startswith(f"{outer}.") for outer, inner in pairwise(inside))


def _block_ends(traced: Traced, names: dict[fx.Node, list[str]], blocks: list[fx.Node]) -> list[fx.Node]:
    modules = dict(traced.module.named_modules())
    return [
        node
        for node, after in pairwise(blocks)
        if _grid(node) != _grid(after)
        or (
            _channels(node) != _channels(after)
            and any(isinstance(modules.get(name), nn.Sequential) for name in names[node])
        )
    ] + blocks[-1:]


def _resolution_ends(traced: Traced, named: list[fx.Node]) -> list[fx.Node]:
    ends = []
    weighty = False
    for place, node in enumerate(named):
        weighty |= _has_weights(node, traced)
        if place + 1 == len(named) or _grid(node) != _grid(named[place + 1]):
            ends += [node] if weighty else []
            weighty = False
    return ends


def _outermost(node: fx.Node, ends: list[fx.Node], names: dict[fx.Node, list[str]], traced: Traced) -> str:
    """Return the outermost name of `node`, or of a module around it that gives a map as large and has no other end."""
    others = [name for end in ends if end is not node for name in names[end]]
    around = {name.rsplit(".", depth)[0] for name in names[node] for depth in range(name.count(".") + 1)}
    fitting = [
        name
        for name in around
        if traced.nodes.get(name) in names
        and (_grid(traced.nodes[name]), _channels(traced.nodes[name])) == (_grid(node), _channels(node))
        and not any(other.startswith(f"{name}.") for other in others)
    ]
    return min(fitting, key=lambda name: name.count(".")) if fitting else names[node][0]
