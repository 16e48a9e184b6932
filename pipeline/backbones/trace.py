"""A network as a graph: every name one can tap, the node behind it, and its shape."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import torch
import torchvision
from timm.layers import get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from torchvision.models.feature_extraction import NodePathTracer

from pipeline.errors import BackboneError, first_line

Shape = tuple[int, ...]
SHAPE = "shape"
"""Key in a node's `meta` of its value's shape without the batch axis."""
TENSORS = "tensors"
"""Key in a node's `meta`: whether its value is or holds a tensor, rather than sizes alone."""
_BATCH = 2
"""Images in the pass that finds the shapes; some networks drop the batch axis of a single one."""


@dataclass(frozen=True)
class Traced:
    """A network and the names that can be tapped in it.

    Parameters
    ----------
    module : torch.nn.Module
        The network itself.
    classifier : str or None
        Dotted name of its classifier.
    graph : torch.fx.Graph or None
        None where the network cannot be traced; then `nodes` is empty and only modules can be tapped, by hooks.
    nodes : dict of str to torch.fx.Node
        By module name, containers included (a container's node is what its forward returns), and by torchvision's
        names of functions and repeated calls (``layer1.0.add``, ``layer1.0.relu_1``).
    shapes : dict of str to tuple of int
        Name to shape without the batch axis, in order of computation; only names whose value is one batch of tensors.
    read : tuple of int or None
        Shape of what the classifier reads; only where the network cannot be traced.
    """

    module: nn.Module
    classifier: str | None
    graph: fx.Graph | None
    nodes: dict[str, fx.Node]
    shapes: dict[str, Shape]
    read: Shape | None


class _Tracer(NodePathTracer):  # type: ignore[misc]
    """torchvision's tracer, which also keeps what each module's forward returned, containers included."""

    def __init__(self) -> None:
        super().__init__(
            leaf_modules=(*get_notrace_modules(), torchvision.ops.StochasticDepth),
            autowrap_functions=tuple(get_notrace_functions()),
        )
        self.returned: dict[str, fx.Node] = {}

    def create_args_for_root(self, root_fn: Callable[..., Any], *rest: Any) -> tuple[Callable[..., Any], list[Any]]:
        """Let only the images be an input; symbols for masks and options would turn on what defaults leave off."""

        def images_only(self: nn.Module, x: Tensor) -> Any:
            return root_fn(self, x)

        return super().create_args_for_root(images_only, *rest)  # type: ignore[no-any-return]

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        out = super().call_module(m, forward, args, kwargs)
        if isinstance(out, fx.Proxy):
            self.returned.setdefault(self.path_of_module(m), out.node)
        return out


class _Shapes(fx.Interpreter):
    """Runs a graph and leaves in each node the shape of its value."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        shape = _shape(value)
        if shape is not None and n.op != "get_attr":
            n.meta[SHAPE] = shape
        n.meta[TENSORS] = any(isinstance(item, Tensor) for item in tree_leaves(value))
        return value


def _shape(value: Any) -> Shape | None:
    if isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == _BATCH and value.is_floating_point():
        return tuple(value.shape[1:])
    return None


def trace(module: nn.Module, size: tuple[int, int], classifier: str | None, name: str) -> Traced:
    """Trace `module`, which is in eval mode, and find all shapes without computing anything where that is possible.

    Parameters
    ----------
    module : torch.nn.Module
        Takes float32 (n, 3, height, width).
    size : tuple of int
        Height and width of its input.
    classifier : str or None
        Dotted name of its classifier.
    name : str
        How to call the network in an error.

    Raises
    ------
    BackboneError
        If the network does not run on images of this size.
    """
    tracer = _Tracer()
    try:
        graph = tracer.trace(module)
    except Exception:  # tracing runs foreign code on symbols: it fails in as many ways as there are networks
        shapes, read = _module_shapes(module, size, classifier, name)
        return Traced(module, classifier, None, {}, shapes, read)
    _run(lambda images: _Shapes(module, graph=graph).run(images), module, size, name)
    order = {node: place for place, node in enumerate(graph.nodes)}
    named = {path: node for node, path in tracer.node_to_qualname.items()} | tracer.returned
    named = {path: node for path, node in named.items() if path and node.op != "placeholder" and SHAPE in node.meta}
    nodes = dict(sorted(named.items(), key=lambda item: order[item[1]]))
    return Traced(module, classifier, graph, nodes, {path: node.meta[SHAPE] for path, node in nodes.items()}, None)


def cut_nodes(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes that every path from the input to the output crosses, in order; input and output left out."""
    from_input: dict[fx.Node, int] = {}
    for node in graph.nodes:
        fed = node.op == "placeholder" or any(source in from_input for source in node.all_input_nodes)
        if node.op == "output" or (fed and node.meta.get(TENSORS)):
            from_input[node] = len(from_input)
    cuts = []
    reach = 0  # the farthest place that an edge starting before this node leads to
    for node, place in from_input.items():
        if reach <= place and node.op not in ("placeholder", "output"):
            cuts.append(node)
        reach = max([reach, *(from_input[user] for user in node.users if user in from_input)])
    return cuts


def tapped_graph(traced: Traced, sources: Sequence[fx.Node], pools: Sequence[nn.Module]) -> fx.GraphModule:
    """Return the part of the network that `sources` need, each pooled in the moment when it has been computed.

    A pool stands right behind its source, so that nothing done in place later on can change what it reads.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    parts: dict[str, Any] = {}
    results: dict[int, fx.Node] = {}
    for node in nodes_between(None, set(sources)) or ():
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if node.op in ("call_module", "get_attr"):
            parts[str(node.target)] = attrgetter(str(node.target))(traced.module)
        for place in [place for place, source in enumerate(sources) if source is node]:
            parts[f"tap_{place}"] = pools[place]
            results[place] = graph.call_module(f"tap_{place}", (copies[node],))
    graph.output(tuple(results[place] for place in range(len(sources))))
    return fx.GraphModule(parts, graph)


def nodes_between(start: fx.Node | None, ends: Collection[fx.Node]) -> list[fx.Node] | None:
    """Return the nodes that `ends` need, in order, down to `start` (left out) or to the image (which is one of them).

    None where they need the image past `start`.
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
    # what works in place and gives no result stands in nobody's inputs
    effects = {
        node
        for node in nodes[: max(map(nodes.index, ends))]
        if not node.users and node.all_input_nodes and reached.issuperset(node.all_input_nodes) and node is not start
    }
    return [node for node in nodes if node in needed or node in effects]


def _run(network: Callable[[Tensor], Any], module: nn.Module, size: tuple[int, int], name: str) -> None:
    """Call `network` on fake tensors, or on real ones where the network needs to look at values."""
    device = next((item.device for item in module.parameters()), torch.device("cpu"))
    try:
        if device.type == "meta":
            network(torch.empty(_BATCH, 3, *size, device=device))
            return
        with FakeTensorMode(allow_non_fake_inputs=True):
            network(torch.empty(_BATCH, 3, *size))
        return
    except Exception as error:  # as above; the real pass below decides
        failed = error
    try:
        if device.type == "meta":
            raise failed
        with torch.inference_mode():
            network(torch.zeros(_BATCH, 3, *size))
    except Exception as error:
        raise BackboneError(
            f"{name} does not run on {size[0]}x{size[1]} images ({first_line(error)}); "
            "leave out the size or give another"
        ) from error


def _module_shapes(
    module: nn.Module, size: tuple[int, int], classifier: str | None, name: str
) -> tuple[dict[str, Shape], Shape | None]:
    """Return what `Traced` calls `shapes` and `read`, for a network that cannot be traced."""
    shapes: dict[str, Shape] = {}
    read: list[Shape | None] = []

    def note(path: str, _module: nn.Module, args: tuple[Any, ...], value: Any) -> None:
        shape = _shape(value)
        if shape is not None:
            shapes.setdefault(path, shape)
        if path == classifier:
            read.append(_shape(args[0]))

    with hooked(module, {path: partial(note, path) for path, _ in module.named_modules() if path}):
        _run(module, module, size, name)
    return shapes, read[0] if read else None


@contextmanager
def hooked(module: nn.Module, hooks: dict[str, Callable[[nn.Module, Any, Any], Any]]) -> Iterator[None]:
    """Keep forward hooks on the named modules of `module`, and take them off whatever happens."""
    handles = [module.get_submodule(path).register_forward_hook(hook) for path, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
