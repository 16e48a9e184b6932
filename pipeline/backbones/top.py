"""What replaces a network's classifier: linear, with a hidden layer, or with direct connections from the image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

HIDDEN = 256
_FLOOR = 1e-3
"""Variances count as at least this share of their mean over all features: a nearly constant one is not blown up."""


class Standardise(nn.Module):
    """Shift and scale every feature by numbers that training does not change; one that does nothing, at first.

    Parameters
    ----------
    features : int
        Number of features.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))

    def set_from(self, features: Tensor) -> None:
        """Make these features (n, d) have mean 0 and variance 1 afterwards."""
        variance = features.var(0, unbiased=False)
        floor = _FLOOR * variance.mean()
        self.mean.copy_(features.mean(0))
        self.scale.copy_((variance + floor).clamp(min=torch.finfo(torch.float32).tiny).rsqrt())

    def forward(self, features: Tensor) -> Tensor:
        """Map (n, d) to (n, d)."""
        return (features - self.mean) * self.scale


class Top(nn.Module):
    """Pool, standardise, and classify; the last layer starts from zero, so that all classes are equally likely.

    Parameters
    ----------
    pool : torch.nn.Module
        Makes features (n, d) of what the old classifier read.
    features : int
        d.
    layers : torch.nn.Module
        From standardised features to logits.
    image : int
        Length of the small image that a linear layer of its own reads; 0 for none.
    classes : int
        Number of logits.
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
        """Whether the small image is needed."""
        return self.direct is not None

    def pooled(self, activations: Tensor) -> Tensor:
        """Map what the classifier read, pooled already (n, d) or not (n, ...), to float32 features (n, d)."""
        features: Tensor = activations.float() if activations.ndim == 2 else self.pool(activations)
        return features

    def forward(self, activations: Tensor, image: Tensor | None = None) -> Tensor:
        """Map what `pooled` takes and the small image (n, 3072) to logits (n, k), in float32 whatever surrounds it."""
        with torch.autocast(activations.device.type, enabled=False):
            logits: Tensor = self.layers(self.standardise(self.pooled(activations)))
            if self.direct is not None and self.standardise_image is not None:
                logits = logits + self.direct(self.standardise_image(image))
            return logits

    def set_scales(self, features: Tensor, image: Tensor | None) -> None:
        """Standardise by these features (n, d) and small images (n, 3072) from now on."""
        self.standardise.set_from(features)
        if image is not None and self.standardise_image is not None:
            self.standardise_image.set_from(image)


def make_top(kind: str, pool: nn.Module, features: int, image: int, classes: int) -> Top:
    """Return a new top.

    Parameters
    ----------
    kind : str
        ``"linear"``, ``"hidden"`` or ``"direct"``.
    pool : torch.nn.Module
        Makes features of activations.
    features, image, classes : int
        Lengths of features, of the small image, and of the logits.
    """
    if kind == "hidden":
        hidden = nn.Linear(features, HIDDEN)
        return Top(pool, features, nn.Sequential(hidden, nn.ReLU(), _zero(nn.Linear(HIDDEN, classes))), 0, classes)
    return Top(pool, features, _zero(nn.Linear(features, classes)), image if kind == "direct" else 0, classes)


def _zero(layer: nn.Linear) -> nn.Linear:
    for item in layer.parameters():
        nn.init.zeros_(item)
    return layer
