"""Fold batch norm into the convolution before it: the same function in eval mode, with half the layers to run."""

from __future__ import annotations

from collections import Counter

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def fold_batch_norms(network: fx.GraphModule) -> fx.GraphModule:
    """Return `network` with every convolution and the batch norm that alone reads it made one.

    Parameters
    ----------
    network : torch.fx.GraphModule
        In eval mode; left as it is. What is not folded is shared with the result.

    Notes
    -----
    timm's ``BatchNormAct2d`` keeps its activation, which is called in its place.
    """
    modules = dict(network.named_modules())
    calls = Counter(node.target for node in network.graph.nodes if node.op == "call_module")
    graph = fx.Graph()
    output = graph.graph_copy(network.graph, copies := {})
    graph.output(output)
    folded = fx.GraphModule(network, graph)
    for old, node in copies.items():
        conv_node = node.args[0] if node.args else None
        norm = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(norm, nn.BatchNorm2d) or not isinstance(conv_node, fx.Node) or conv_node.op != "call_module":
            continue
        conv = modules[str(conv_node.target)]
        alone = len(conv_node.users) == 1 and calls[conv_node.target] == calls[node.target] == 1
        if not isinstance(conv, nn.Conv2d) or not alone or not norm.track_running_stats:
            continue
        folded.set_submodule(str(conv_node.target), fuse_conv_bn_eval(conv, norm))
        rest = [part for part in (getattr(norm, "drop", None), getattr(norm, "act", None)) if part is not None]
        folded.set_submodule(str(node.target), nn.Sequential(*rest))
    return folded
