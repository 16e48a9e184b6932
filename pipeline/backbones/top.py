"""The top: a new classifier in place of the old one, and saved fine-tuned networks, which end in one, as backbones."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import Tensor, fx, nn

from pipeline.backbones.backbone import Backbone
from pipeline.backbones.network_file import TOP_LAYER, load_network
from pipeline.backbones.pooling import Pool, pooled_dim
from pipeline.backbones.subgraph import build_module, copy_between
from pipeline.backbones.taps import INPUT_DIM, small_image
from pipeline.backbones.thaw_line import top_input
from pipeline.backbones.trace import SHAPE, TENSORS, Traced
from pipeline.backbones.weights import check_finite, fill_weights, weights_digest
from pipeline.errors import BackboneError, ModelFileError
from pipeline.spec import DEFAULT_POOL, size_name

HIDDEN = 256
_FLOOR = 1e-3
"""Share of the mean variance of all features that is added to each, so that nearly constant ones are not blown up."""
_COMMON_ROWS = 20
"""How many rows the mean variance of all features counts for, beside the rows that each variance is measured on. The
variances of a handful of rows are noise, and nearly constant features must not be blown up."""


class Standardise(nn.Module):
    """Shift and scale every feature by numbers that training does not change; until they are set, it does nothing."""

    mean: Tensor
    scale: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))

    def set_from(self, features: Tensor, *, frozen: bool) -> None:
        """Choose the numbers that give these features (n, d) mean 0, and a variance of 1.

        If they stay as they are during training (`frozen`), the variances of few rows are shrunk to a common one, with
        a mean of 1 after scaling.
        """
        tiny = torch.finfo(torch.float32).tiny
        variance = features.var(0, unbiased=False)
        if frozen:
            common = _COMMON_ROWS / (len(features) + _COMMON_ROWS)
            shrunk = torch.lerp(variance, variance.mean(), common).clamp(min=tiny)
            spread = shrunk * (variance / shrunk).mean()
        else:
            spread = variance + _FLOOR * variance.mean()
        self.mean.copy_(features.mean(0))
        self.scale.copy_(spread.clamp(min=tiny).rsqrt())

    def forward(self, features: Tensor) -> Tensor:
        """Map (n, d) to (n, d)."""
        return (features - self.mean) * self.scale


class Top(nn.Module):
    """Pool, standardise and classify; the last layer starts at zero, so that all classes are equally likely.

    `pool` maps what the old classifier read to `features` numbers, and `layers` maps them to logits once they are
    standardised. `image` is the length of the small image, which a second linear layer reads; 0 for none.
    """

    def __init__(self, pool: nn.Module, features: int, layers: nn.Module, image: int, classes: int) -> None:
        super().__init__()
        self.pool, self.standardise, self.layers = pool, Standardise(features), layers
        self.standardise_image = Standardise(image) if image else None
        self.direct = _zero(nn.Linear(image, classes, bias=False)) if image else None

    def pooled(self, activations: Tensor) -> Tensor:
        """Map what the classifier read, already pooled (n, d) or not (n, ...), to float32 features (n, d)."""
        features: Tensor = activations.float() if activations.ndim == 2 else self.pool(activations)
        return features

    @torch.no_grad()
    def rescale(self, shift: float, scale: float) -> None:
        """Let the top give its outputs times `scale`, plus `shift`."""
        last = cast("nn.Linear", self.layers[-1] if isinstance(self.layers, nn.Sequential) else self.layers)
        for item in (last.weight, last.bias, *(self.direct.parameters() if self.direct is not None else ())):
            item.mul_(scale)
        last.bias.add_(shift)

    def forward(self, activations: Tensor, image: Tensor | None = None) -> Tensor:
        """Map what `pooled` takes and the small image (n, 3072) to logits (n, k), in float32 even under autocast."""
        with torch.autocast(activations.device.type, enabled=False):
            logits: Tensor = self.layers(self.standardise(self.pooled(activations)))
            if self.direct is not None and self.standardise_image is not None:
                logits = logits + self.direct(self.standardise_image(image))
            return logits


def new_top(backbone: Backbone, kind: str, classes: int) -> Top:
    """Return a new top to replace the classifier of `backbone`, one of `pipeline.options.TOPS`.

    ``hidden`` has one hidden layer; ``direct`` is linear, and linear from the small image. Raises `BackboneError` where
    `top_input` does.
    """
    read = top_input(backbone)
    pool, features = Pool(DEFAULT_POOL, read.layout), pooled_dim(read.shape, read.layout, DEFAULT_POOL)
    if kind == "hidden":
        hidden = nn.Linear(features, HIDDEN)
        return Top(pool, features, nn.Sequential(hidden, nn.ReLU(), _zero(nn.Linear(HIDDEN, classes))), 0, classes)
    image = INPUT_DIM if kind == "direct" else 0
    return Top(pool, features, _zero(nn.Linear(features, classes)), image, classes)


def _zero(layer: nn.Linear) -> nn.Linear:
    for item in layer.parameters():
        nn.init.zeros_(item)
    return layer


def tuned_backbone(base: Backbone, path: Path) -> Backbone:
    """Return the fine-tuned network that a file holds; it takes `base`, whose weights are overwritten.

    Raises `BackboneError` if the file holds another architecture or input size, and `ModelFileError` if it is damaged
    or the libraries here build another network than those it was made with.
    """
    model, tensors = load_network(path)
    name, preprocessing = model.scores.backbone, model.scores.preprocessing
    if (name, preprocessing.size) != (base.name, base.preprocessing.size):
        raise BackboneError(
            f"{path} holds {name} for {size_name(preprocessing.size)} pixels, not {base.name} for "
            f"{size_name(base.preprocessing.size)}; use {name}@{path}, without a size"
        )
    top_input(base)  # traces the network, which cannot be done on the meta device
    with torch.device("meta"):  # takes no memory: the number of classes may be forged
        top = new_top(base, model.top, model.outputs)
    shapes = {f"{TOP_LAYER}.{key}": item.shape for key, item in top.state_dict().items()}
    if any(key not in tensors or tensors[key].shape != shape for key, shape in shapes.items()):
        raise ModelFileError(
            f"{path} holds no {model.top} top of {model.outputs} outputs for {name}; fine-tune and save it again"
        )
    traced = with_top(base, top.to_empty(device="cpu"), model.outputs)
    try:
        fill_weights(traced.module, {name: torch.from_numpy(item) for name, item in tensors.items()}, path.name)
    except BackboneError as error:
        versions = ", ".join(f"{library} {version}" for library, version in model.versions.items())
        raise ModelFileError(f"{error}; or use the libraries it was made with: {versions}") from error
    module = traced.module.eval().requires_grad_(False)
    check_finite(module, str(path))
    handle = f"{base.handle.partition('@')[0]}@{path.name}"
    digest = weights_digest(module.state_dict())
    backbone = Backbone(base.name, handle, path.name, digest, module, preprocessing, (TOP_LAYER,))
    backbone.traced = traced
    return backbone


def with_top(base: Backbone, top: Top, classes: int) -> Traced:
    """Return the graph of `base` up to what its classifier reads, followed by `top` as the layer `TOP_LAYER`.

    Layers and weights up to there are those of `base`, under the same names.
    """
    read = top_input(base).node
    graph, copies = copy_between(None, [read])
    images: list[fx.Node] = []
    if top.direct is not None:
        pixels = next(node for node in graph.nodes if node.op == "placeholder")
        with graph.inserting_after(pixels):
            images.append(graph.call_function(small_image, (pixels,)))
        images[0].meta |= {SHAPE: (INPUT_DIM,), TENSORS: True}
    logits = graph.call_module(TOP_LAYER, (copies[read], *images))
    logits.meta |= {SHAPE: (classes,), TENSORS: True}
    graph.output(logits)
    nodes = {name: copies[node] for name, node in base.traced.nodes.items() if node in copies} | {TOP_LAYER: logits}
    shapes = {name: node.meta[SHAPE] for name, node in nodes.items()}
    module = build_module(graph, base.traced, {TOP_LAYER: top})
    return Traced(module, TOP_LAYER, graph, nodes, shapes, None, base.traced.tokens, base.traced.size)
