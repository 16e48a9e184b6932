"""Parts of a traced graph: the nodes where it can be cut, the nodes between two cuts, and modules that run them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from operator import attrgetter

from torch import fx, nn

from pipeline.backbones.trace import TENSORS, Traced


def cut_nodes(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes that every path from the input to the output crosses, in order, without input and output."""
    from_input: dict[fx.Node, int] = {}
    for node in graph.nodes:
        fed = node.op == "placeholder" or any(source in from_input for source in node.all_input_nodes)
        if node.op == "output" or (fed and node.meta.get(TENSORS)):
            from_input[node] = len(from_input)
    cuts = []
    reach = 0  # the farthest position that an edge from before this node leads to
    for node, position in from_input.items():
        if reach <= position and node.op not in ("placeholder", "output"):
            cuts.append(node)
        reach = max([reach, *(from_input[user] for user in node.users if user in from_input)])
    return cuts


def nodes_between(start: fx.Node | None, ends: Collection[fx.Node]) -> list[fx.Node] | None:
    """Return the nodes that `ends` need, in order: those after `start`, or all from the image on where that is None.

    The result is None if `ends` need something that does not come through `start`.
    """
    needed: set[fx.Node] = set()
    waiting = list(ends)
    while waiting:
        node = waiting.pop()
        if node is not start and node not in needed:
            if node.op == "placeholder" and start is not None:
                return None
            needed.add(node)
            waiting += node.all_input_nodes
    reached = needed | ({start} if start is not None else set())
    nodes = list(next(iter(ends)).graph.nodes)
    # operations in place whose result is not used are nobody's input, but change what others read
    effects = {
        node
        for node in nodes[: max(map(nodes.index, ends))]
        if not node.users and node.all_input_nodes and reached.issuperset(node.all_input_nodes) and node is not start
    }
    return [node for node in nodes if node in needed or node in effects]


def copy_between(start: fx.Node | None, ends: Collection[fx.Node]) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """Return a graph of `nodes_between`, still without output, and its node for each of the original ones."""
    graph = fx.Graph()
    copies = {} if start is None else {start: graph.placeholder("activations")}
    for node in nodes_between(start, ends) or ():
        copies[node] = graph.node_copy(node, copies.__getitem__)
    return graph, copies


def build_module(graph: fx.Graph, traced: Traced, added: Mapping[str, nn.Module]) -> fx.GraphModule:
    """Return the module that runs `graph`, whose nodes refer to parts of the traced network or to `added` ones."""
    targets = [str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")]
    return fx.GraphModule(
        {target: added[target] if target in added else attrgetter(target)(traced.module) for target in targets}, graph
    )
