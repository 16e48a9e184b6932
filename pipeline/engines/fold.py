"""Batch norms folded into the convolutions before them: the same function, with less to do."""

from __future__ import annotations

from collections import Counter

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def folded(body: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of `body` in which every batch norm that alone reads a convolution has become part of it.

    `body` and its modules stay as they are. timm's batch norms with an activation leave the activation behind.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(body.graph, {}))
    copy = fx.GraphModule(body, graph)
    modules = dict(copy.named_modules())
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    for node in list(graph.nodes):
        source = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) != 1:
            continue
        norm, convolution = modules[str(node.target)], modules[str(source.target)]
        once = calls[node.target] == calls[source.target] == 1
        if once and isinstance(convolution, nn.Conv2d) and _is_plain(norm):
            _replace(copy, str(source.target), fuse_conv_bn_eval(convolution, norm))
            _replace(copy, str(node.target), getattr(norm, "act", nn.Identity()))
    copy.recompile()
    return copy


def _is_plain(norm: nn.Module) -> bool:
    """Tell whether `norm` is a batch norm over fixed statistics, with nothing after it but perhaps an activation."""
    if not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None:
        return False
    return isinstance(getattr(norm, "drop", nn.Identity()), nn.Identity)


def _replace(body: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(body.get_submodule(parent), name, module)
