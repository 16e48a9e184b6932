"""Trace a network: the names of everything that can be tapped in it, the graph node behind each, and its shape."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torchvision
from timm.layers import get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from torchvision.models.feature_extraction import NodePathTracer

from pipeline.backbones.pooling import TokenOrder
from pipeline.errors import BackboneError, first_line

Shape = tuple[int, ...]
SHAPE = "shape"
"""Key in a node's `meta` for the shape of its value, without the batch axis."""
TENSORS = "tensors"
"""Key in a node's `meta` for whether its value is or holds a tensor; some nodes only compute sizes."""
_NUMBER = re.compile(r"(?<=.)_([0-9]+)$")
_BATCH = 2
"""Images in the pass that finds the shapes; some networks drop the batch axis of a single image."""
_SMALL, _SMALL_INPUT = 30_000_000, 512 * 512
"""Weights and pixels up to which that pass takes a fifth of the time on real tensors."""


@dataclass(frozen=True)
class Traced:
    """A network and the names that can be tapped in it.

    `nodes` is by module name (the node is what the module's forward returns, for containers too), and by torchvision's
    names for functions and repeated calls (``layer1.0.add``, ``layer1.0.relu_1``). `shapes` are those of the values
    that are one tensor with a row an image, without the batch axis, in order of computation.

    `tokens` is the order of the tokens in layers that give some, and `size` the height and width of the input.

    Where the network cannot be traced, `graph` is None and `nodes` is empty: only modules can be tapped, by hooks. Then
    `read` is the shape of what the classifier reads; else the graph says so.

    In a network with several classifiers, `classifier` is ``"logits"``, the layer of the scores that the network makes
    of theirs, and `joined` is the node of what they read.
    """

    module: nn.Module
    classifier: str | None
    graph: fx.Graph | None
    nodes: dict[str, fx.Node]
    shapes: dict[str, Shape]
    read: Shape | None
    tokens: TokenOrder
    size: tuple[int, int]
    joined: fx.Node | None = None


class _Tracer(NodePathTracer):  # type: ignore[misc]
    """torchvision's tracer, which also records the node that each module's forward returned, for containers too."""

    def __init__(self) -> None:
        super().__init__(
            leaf_modules=(*get_notrace_modules(), torchvision.ops.StochasticDepth),
            autowrap_functions=tuple(get_notrace_functions()),
        )
        self.returned: dict[str, fx.Node] = {}
        self._numbers: dict[str, int] = {}  # by name without its number, that of the newest node

    def _get_node_qualname(self, module_qualname: str, node: fx.Node) -> str:
        """Return torchvision's name of a node, which compares all names before: 18 s for the 3,813 of MobileNetV5."""
        name = module_qualname if node.op == "call_module" else f"{module_qualname}.{node}".removeprefix(".")
        name = _NUMBER.sub("", name)
        if name in self._numbers:
            name = f"{name}_{self._numbers[name] + 1}"
        self._numbers[name] = 0
        if number := _NUMBER.search(name):
            self._numbers[name[: number.start()]] = int(number[1])
        return name

    def create_args_for_root(self, root_fn: Callable[..., Any], *rest: Any) -> tuple[Callable[..., Any], list[Any]]:
        """Trace with the images as the only input; symbols for masks and options would not keep their defaults."""

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
    """Run a graph and note in each node the shape of its value."""

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
    """Trace a network in eval mode and find the shapes of all values.

    Raises `BackboneError`, about the network `name`, if it does not run on images of `size` (height, width).
    """
    tracer = _Tracer()
    with _unchanged(module):
        try:
            graph = tracer.trace(module)
        except Exception:  # tracing runs the network's code on symbols, which can raise anything
            shapes, read = _module_shapes(module, size, classifier, name)
            return Traced(module, classifier, None, {}, shapes, read, _token_order(module), size)
        _run(lambda images: _Shapes(module, graph=graph).run(images), module, size, name)
    position = {node: index for index, node in enumerate(graph.nodes)}
    named = {path: node for node, path in tracer.node_to_qualname.items()} | tracer.returned
    named = {path: node for path, node in named.items() if path and node.op != "placeholder" and SHAPE in node.meta}
    nodes = dict(sorted(named.items(), key=lambda item: position[item[1]]))
    shapes = {path: node.meta[SHAPE] for path, node in nodes.items()}
    return Traced(module, classifier, graph, nodes, shapes, None, _token_order(module), size)


def _token_order(module: nn.Module) -> TokenOrder:
    """Return the order of the tokens in a transformer, as far as timm and torchvision tell."""
    names = {name.rpartition(".")[2] for name, _ in module.named_parameters()}
    kinds = [any(name.startswith(kind) for name in names) for kind in ("cls_token", "class_token", "dist_token")]
    prefix = getattr(module, "num_prefix_tokens", None) or sum(kinds)
    return TokenOrder(prefix, has_class=any(kinds[:2]), by_row=not hasattr(module, "reroll"))  # Hiera's own order


def _run(network: Callable[[Tensor], Any], module: nn.Module, size: tuple[int, int], name: str) -> None:
    """Call `network` on real tensors if it is small, else on fake ones; on real ones, too, if it looks at values."""
    device = next((item.device for item in module.parameters()), torch.device("cpu"))
    modes: list[AbstractContextManager[Any]] = [torch.inference_mode()]
    if device.type == "meta":
        modes = [nullcontext()]
    elif sum(item.numel() for item in module.parameters()) > _SMALL or math.prod(size) > _SMALL_INPUT:
        modes.insert(0, FakeTensorMode(allow_non_fake_inputs=True))
    for mode in modes:
        try:
            with mode, _silent(FakeTensorMode.__module__):
                network(torch.zeros(_BATCH, 3, *size, device=device))
            return
        except Exception as error:  # anything, as in `trace`; the last pass decides
            failed = error
    raise BackboneError(f"{name} does not run on {size[0]}x{size[1]} images ({first_line(failed)})") from failed


@contextmanager
def _silent(name: str) -> Iterator[None]:
    """Keep a logger from printing the stack of an error that is raised anyway."""
    logger = logging.getLogger(name)
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled


@contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    """Put back all attributes and buffers after the block: networks that keep tables would keep symbols and fakes.

    Constants that tracing made attributes of `module` stay, because the graph refers to them.
    """
    parts = [vars(part) for part in module.modules()]
    containers = [item for part in parts for item in (part, *part.values()) if isinstance(item, dict | list)]
    before = [(container, container.copy()) for container in containers]
    try:
        yield
    finally:
        constants = {name: value for name, value in vars(module).items() if name.startswith("_tensor_constant")}
        for container, contents in before:
            container.clear()
            (container.update if isinstance(container, dict) else container.extend)(contents)
        vars(module).update(constants)


@contextmanager
def hooked(module: nn.Module, hooks: Mapping[str, Callable[[nn.Module, Any, Any], Any]]) -> Iterator[None]:
    """Keep forward hooks on the named modules of `module` for the block, and remove them even after an error."""
    handles = [module.get_submodule(path).register_forward_hook(hook) for path, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _module_shapes(
    module: nn.Module, size: tuple[int, int], classifier: str | None, name: str
) -> tuple[dict[str, Shape], Shape | None]:
    """Return `shapes` and `read` of a `Traced` network that cannot be traced."""
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
