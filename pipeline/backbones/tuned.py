"""A fine-tuned network as a backbone: what the old classifier read goes to the new head, as a graph like any other."""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import fx

from pipeline.backbones.backbone import Backbone
from pipeline.backbones.network_file import HEAD, read_network
from pipeline.backbones.pooling import Pool, pooled_dim
from pipeline.backbones.taps import INPUT_DIM, small_image
from pipeline.backbones.thaw_line import read_place
from pipeline.backbones.top import Top, make_top
from pipeline.backbones.trace import SHAPE, TENSORS, Traced, nodes_between
from pipeline.backbones.weights import fill, weights_digest
from pipeline.errors import BackboneError, ModelFileError
from pipeline.spec import DEFAULT_POOL


def new_top(backbone: Backbone, kind: str, classes: int) -> Top:
    """Return a new top of a kind for `backbone`, in place of its classifier."""
    read = read_place(backbone)
    pool = Pool(DEFAULT_POOL, read.layout)
    return make_top(kind, pool, pooled_dim(read.shape, read.layout, DEFAULT_POOL), INPUT_DIM, classes)


def tuned_backbone(base: Backbone, path: Path) -> Backbone:
    """Return the network that a file holds.

    Parameters
    ----------
    base : Backbone
        The architecture, with any weights, which are overwritten.
    path : Path
        A file that ``finetune --save`` wrote.

    Raises
    ------
    ModelFileError
        If the file is damaged, or was made with a network that is another one here.
    BackboneError
        If the file's network is of another architecture, or of another input size.
    """
    model, tensors = read_network(path)
    named, preprocessing = model.scores.backbone, model.scores.preprocessing
    if (named, preprocessing.size) != (base.name, base.preprocessing.size):
        raise BackboneError(
            f"{path} holds {named} for {preprocessing.size[0]} pixels, not {base.name} for "
            f"{base.preprocessing.size[0]}; name {named}@{path}, and no size"
        )
    traced = grafted(base, new_top(base, model.top, len(model.classes)), len(model.classes))
    try:
        fill(traced.module, {name: torch.from_numpy(item) for name, item in tensors.items()}, path.name)
    except BackboneError as error:
        made = ", ".join(f"{name} {number}" for name, number in model.versions.items())
        raise ModelFileError(f"{error}; or use the libraries it was made with: {made}") from error
    module = traced.module.eval().requires_grad_(False)
    handle = f"{base.handle.partition('@')[0]}@{path.name}"
    digest = weights_digest(module.state_dict())
    backbone = Backbone(base.name, handle, path.name, digest, module, preprocessing, HEAD)
    backbone.traced = traced
    return backbone


def grafted(base: Backbone, top: Top, classes: int) -> Traced:
    """Return the graph of `base` up to what its classifier reads, and `top`, which reads that, as the layer `HEAD`.

    The weights up to there are those of `base`, under the same names; so are the layers.
    """
    read, traced = read_place(base).node, base.traced
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    parts: dict[str, Any] = {HEAD: top}
    images: list[fx.Node] = []
    for node in nodes_between(None, [read]) or ():
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if node.op in ("call_module", "get_attr"):
            parts[str(node.target)] = attrgetter(str(node.target))(traced.module)
        if node.op == "placeholder" and top.reads_image:
            images.append(graph.call_function(small_image, (copies[node],)))
            images[0].meta |= {SHAPE: (INPUT_DIM,), TENSORS: True}
    head = graph.call_module(HEAD, (copies[read], *images))
    head.meta |= {SHAPE: (classes,), TENSORS: True}
    graph.output(head)
    nodes = {name: copies[node] for name, node in traced.nodes.items() if node in copies} | {HEAD: head}
    shapes = {name: node.meta[SHAPE] for name, node in nodes.items()}
    return Traced(fx.GraphModule(parts, graph), HEAD, graph, nodes, shapes, None)
