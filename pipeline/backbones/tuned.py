"""A saved fine-tuned network as a backbone: its graph ends in the new top instead of the old classifier."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import fx

from pipeline.backbones.backbone import Backbone
from pipeline.backbones.network_file import TOP_LAYER, load_network
from pipeline.backbones.subgraph import build_module, copy_between
from pipeline.backbones.taps import INPUT_DIM, small_image
from pipeline.backbones.thaw_line import top_input
from pipeline.backbones.top import Top, new_top
from pipeline.backbones.trace import SHAPE, TENSORS, Traced
from pipeline.backbones.weights import fill_weights, weights_digest
from pipeline.errors import BackboneError, ModelFileError


def tuned_backbone(base: Backbone, path: Path) -> Backbone:
    """Return the fine-tuned network that a file holds; it takes `base`, whose weights are overwritten.

    Raises `BackboneError` if the file holds another architecture or input size, and `ModelFileError` if it is damaged
    or the libraries here build another network than those it was made with.
    """
    model, tensors = load_network(path)
    name, preprocessing = model.scores.backbone, model.scores.preprocessing
    if (name, preprocessing.size) != (base.name, base.preprocessing.size):
        raise BackboneError(
            f"{path} holds {name} for {preprocessing.size[0]} pixels, not {base.name} for "
            f"{base.preprocessing.size[0]}; use {name}@{path}, without a size"
        )
    traced = with_top(base, new_top(base, model.top, len(model.classes)), len(model.classes))
    try:
        fill_weights(traced.module, {name: torch.from_numpy(item) for name, item in tensors.items()}, path.name)
    except BackboneError as error:
        versions = ", ".join(f"{library} {version}" for library, version in model.versions.items())
        raise ModelFileError(f"{error}; or use the libraries it was made with: {versions}") from error
    module = traced.module.eval().requires_grad_(False)
    handle = f"{base.handle.partition('@')[0]}@{path.name}"
    digest = weights_digest(module.state_dict())
    backbone = Backbone(base.name, handle, path.name, digest, module, preprocessing, TOP_LAYER)
    backbone.traced = traced
    return backbone


def with_top(base: Backbone, top: Top, classes: int) -> Traced:
    """Return the graph of `base` up to what its classifier reads, followed by `top` as the layer `TOP_LAYER`.

    Layers and weights up to there are those of `base`, under the same names.
    """
    read = top_input(base).node
    graph, copies = copy_between(None, [read])
    images: list[fx.Node] = []
    if top.reads_image:
        pixels = next(node for node in graph.nodes if node.op == "placeholder")
        with graph.inserting_after(pixels):
            images.append(graph.call_function(small_image, (pixels,)))
        images[0].meta |= {SHAPE: (INPUT_DIM,), TENSORS: True}
    logits = graph.call_module(TOP_LAYER, (copies[read], *images))
    logits.meta |= {SHAPE: (classes,), TENSORS: True}
    graph.output(logits)
    nodes = {name: copies[node] for name, node in base.traced.nodes.items() if node in copies} | {TOP_LAYER: logits}
    shapes = {name: node.meta[SHAPE] for name, node in nodes.items()}
    return Traced(build_module(graph, base.traced, {TOP_LAYER: top}), TOP_LAYER, graph, nodes, shapes, None)
