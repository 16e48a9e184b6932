"""How to train: every choice that changes the outcome, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from features_cache.errors import nearest
from pipeline.errors import FitError
from pipeline.options import FINETUNE, RECIPE, check_options
from pipeline.spec import NO_AUGMENT, json_fields

DEFAULT_RATES = {("adamw", True): 1e-3, ("adamw", False): 3e-4, ("sgd", True): 5e-2, ("sgd", False): 1e-2}
"""Learning rates by optimizer and by whether only new or random weights are trained."""


@dataclass(frozen=True)
class Recipe:
    """Everything about the training itself.

    Parameters
    ----------
    lr : float, optional
        Highest learning rate of the uppermost layers; by default one that suits the optimizer (`DEFAULT_RATES`).
    layer_decay : float, default 1.0
        Each group of layers further down learns this much slower than the one above it; 0 < decay <= 1.
    lr_at : tuple of (str, float)
        Layers with learning rates of their own, instead of what the decay gives them.
    epochs : int, default 30
        Most passes over the training images.
    patience : int, default 5
        Stop after this many epochs without a lower validation loss.
    optimizer : {"adamw", "sgd"}
        SGD has momentum 0.9.
    weight_decay : float, default 0.01
        Not on biases and norms.
    schedule : {"cosine", "plateau"}
        Cosine to zero by step, or a tenth after each ``patience // 2`` epochs without progress; after `warmup`.
    warmup : int, default 1
        Epochs in which the rates rise linearly from zero.
    batch_size : int, default 32
        Images a step; batches are evened out, so that none is a lone rest.
    label_smoothing : float, default 0.0
        Share of the target spread over all classes.
    class_weights : bool, default False
        Weigh classes by the inverse of their number of training images.
    augment : str, default "none"
        ``"crop"``, ``"flip"`` and ``"colour"``, joined by ``+``.
    views : int, optional
        Augmented views of each image whose activations at the thaw line are cached, an epoch taking one after the
        other; by default every epoch decodes new ones, and runs what is frozen on them.
    clip : float, optional
        Longest gradient, over all weights.
    top : {"linear", "hidden", "direct"}
        What replaces the classifier: a linear layer, one with a hidden layer before it, or one with direct connections
        from the image (area-averaged to 32x32) beside it.
    """

    lr: float | None = None
    layer_decay: float = 1.0
    lr_at: tuple[tuple[str, float], ...] = ()
    epochs: int = 30
    patience: int = 5
    optimizer: str = "adamw"
    weight_decay: float = 0.01
    schedule: str = "cosine"
    warmup: int = 1
    batch_size: int = 32
    label_smoothing: float = 0.0
    class_weights: bool = False
    augment: str = NO_AUGMENT
    views: int | None = None
    clip: float | None = None
    top: str = "linear"

    def rate(self, *, new_only: bool) -> float:
        """Return the learning rate; `new_only` where no pretrained weight is trained."""
        return DEFAULT_RATES[self.optimizer, new_only] if self.lr is None else self.lr

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        return json_fields(self)


def make_recipe(options: Mapping[str, Any]) -> Recipe:
    """Check `options`, the fields of `Recipe` by name (None for the default), and return the recipe.

    Raises
    ------
    FitError
        Naming the first option whose value does not fit, with what was expected.

    Examples
    --------
    >>> make_recipe({"epochs": 5}).epochs
    5
    >>> make_recipe({"epochs": 0})
    Traceback (most recent call last):
    ...
    pipeline.errors.FitError: epochs: expected a whole number, at least 1, got 0
    """
    from pipeline.images.augment import AUGMENTS, parse_augment  # late: it imports Pillow

    known = [field.name for field in fields(Recipe)]
    for name in options:
        if name not in known:
            raise FitError(f"fine-tuning has no option '{name}'{nearest(name, known)}; it has {', '.join(known)}")
    check_options(RECIPE, options)
    recipe = Recipe(**{name: value for name, value in options.items() if value is not None})
    parts = parse_augment(recipe.augment)
    if recipe.views is not None and not parts:
        raise FitError("views are of augmented images; choose an augmentation, such as crop+flip")
    return replace(recipe, augment="+".join(part for part in AUGMENTS if part in parts) or NO_AUGMENT)


def check_start(
    recipe: Recipe,
    backbone: str,
    freeze: str,
    *,
    init: str = "pretrained",
    head_first: bool = False,
    precision: str = "auto",
    watch: str | None = None,
) -> None:
    """Raise `FitError` where these options of `pipeline.finetune.finetune` do not exist, or exclude each other."""
    check_options(FINETUNE, {"init": init, "head_first": head_first, "precision": precision, "watch": watch})
    if init == "random" and "@" in backbone:
        raise FitError(f"init random draws its own weights, so name {backbone.partition('@')[0]} without any")
    if head_first and freeze == "all":
        raise FitError("with freeze all nothing but the new top is trained; leave out head-first")
    if recipe.views is not None and freeze == "none":
        raise FitError("with freeze none there are no frozen activations to cache; leave out views, or freeze a layer")
