"""The top: the new classifier, linear, with a hidden layer, or with direct connections from the image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.backbones.backbone import Backbone
from pipeline.backbones.pooling import Pool, pooled_dim
from pipeline.backbones.taps import INPUT_DIM
from pipeline.backbones.thaw_line import top_input
from pipeline.spec import DEFAULT_POOL

HIDDEN = 256
_FLOOR = 1e-3
"""Share of the mean variance of all features that is added to each, so that nearly constant ones are not blown up."""


class Standardise(nn.Module):
    """Shift and scale every feature by numbers that training does not change; until they are set, it does nothing."""

    mean: Tensor
    scale: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))

    def set_from(self, features: Tensor) -> None:
        """Choose the numbers that give these features (n, d) mean 0 and variance 1."""
        variance = features.var(0, unbiased=False)
        floor = _FLOOR * variance.mean()
        self.mean.copy_(features.mean(0))
        self.scale.copy_((variance + floor).clamp(min=torch.finfo(torch.float32).tiny).rsqrt())

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
        self.pool = pool
        self.standardise = Standardise(features)
        self.layers = layers
        self.standardise_image = Standardise(image) if image else None
        self.direct = _zero(nn.Linear(image, classes, bias=False)) if image else None

    @property
    def reads_image(self) -> bool:
        """Whether `forward` needs the small image."""
        return self.direct is not None

    def pooled(self, activations: Tensor) -> Tensor:
        """Map what the classifier read, already pooled (n, d) or not (n, ...), to float32 features (n, d)."""
        features: Tensor = activations.float() if activations.ndim == 2 else self.pool(activations)
        return features

    def forward(self, activations: Tensor, image: Tensor | None = None) -> Tensor:
        """Map what `pooled` takes and the small image (n, 3072) to logits (n, k), in float32 even under autocast."""
        with torch.autocast(activations.device.type, enabled=False):
            logits: Tensor = self.layers(self.standardise(self.pooled(activations)))
            if self.direct is not None and self.standardise_image is not None:
                logits = logits + self.direct(self.standardise_image(image))
            return logits

    def set_scales(self, features: Tensor, image: Tensor | None) -> None:
        """Standardise with the means and variances of these features (n, d) and small images (n, 3072)."""
        self.standardise.set_from(features)
        if image is not None and self.standardise_image is not None:
            self.standardise_image.set_from(image)


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
