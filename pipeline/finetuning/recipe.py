"""How to train: all options that change the outcome, checked before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from features_cache.errors import nearest
from pipeline.errors import FitError
from pipeline.spec import NO_AUGMENT, json_fields

OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("cosine", "plateau")
TOPS = ("linear", "hidden", "direct")
INITS = ("pretrained", "random")
TRAIN_PRECISIONS = ("auto", "fp32", "bf16")
WATCHES = ("gradients",)
DEFAULT_RATES = {("adamw", True): 1e-3, ("adamw", False): 3e-4, ("sgd", True): 5e-2, ("sgd", False): 1e-2}
"""Default learning rates, by optimizer and by whether only new or random weights are trained."""


@dataclass(frozen=True)
class Recipe:
    """The options of the training itself.

    Parameters
    ----------
    lr : float, optional
        Highest learning rate of the new top and the layers next to it; by default one that suits the optimizer
        (`DEFAULT_RATES`).
    layer_decay : float, default 1.0
        Learning rate of each group of layers, divided by that of the group above it; 0 < decay <= 1.
    lr_at : tuple of (str, float), default ()
        Layers with learning rates of their own, instead of what the decay gives them.
    epochs : int, default 30
        Largest number of passes over the training images.
    patience : int, default 5
        Stop after this many epochs without a lower validation loss.
    optimizer : {"adamw", "sgd"}
        SGD has Nesterov momentum 0.9.
    weight_decay : float, default 0.01
        Not applied to biases and norms.
    schedule : {"cosine", "plateau"}
        After `warmup`, learning rates either follow a cosine to zero, or are divided by ten after every
        ``patience // 2`` epochs without a lower loss.
    warmup : int, default 1
        Epochs in which the rates rise linearly from zero.
    batch_size : int, default 32
        Largest number of images in a step. Batches are evened out, so that none has a single image.
    label_smoothing : float, default 0.0
        Share of the target that is spread over all classes.
    class_weights : bool, default False
        Weigh classes by the inverse of their number of training images.
    augment : str, default "none"
        ``"crop"``, ``"flip"`` and ``"colour"``, joined by ``+``.
    views : int, optional
        Number of augmented views of each image whose activations at the thaw line are cached; epochs use them in turn.
        By default every epoch decodes new views and runs the trunk on them.
    clip : float, optional
        Clip the gradient over all weights to this norm.
    top : {"linear", "hidden", "direct"}
        The new classifier: a linear layer, a hidden layer before it, or direct connections from the image (averaged
        down to 32x32) beside it.
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
        """Return the learning rate; `new_only` says that no pretrained weight is trained."""
        return DEFAULT_RATES[self.optimizer, new_only] if self.lr is None else self.lr

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        return json_fields(self)


def make_recipe(options: Mapping[str, Any]) -> Recipe:
    """Return the recipe of `options`, the fields of `Recipe` by name (None for the default), after checking them.

    Raises
    ------
    FitError
        If an option does not exist or has an impossible value; names the option and what was expected.
    """
    from pipeline.images.augment import (
        AUGMENTS,
        parse_augment,
    )  # late: it imports Pillow, and --help imports this module

    known = [field.name for field in fields(Recipe)]
    for name in options:
        if name not in known:
            raise FitError(f"fine-tuning has no option '{name}'{nearest(name, known)}; it has {', '.join(known)}")
    recipe = Recipe(**{name: value for name, value in options.items() if value is not None})
    parts = parse_augment(recipe.augment)
    recipe = replace(recipe, augment="+".join(part for part in AUGMENTS if part in parts) or NO_AUGMENT)
    for name, names in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("top", TOPS)):
        check_choice(name, getattr(recipe, name), names)
    rates = [("lr", recipe.lr), ("clip", recipe.clip), *((f"lr_at {name}", rate) for name, rate in recipe.lr_at)]
    for name, value in rates:
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise FitError(f"{name} must be a positive number, got {value}")
    for name, least in (("epochs", 1), ("patience", 1), ("batch_size", 1), ("warmup", 0)):
        if getattr(recipe, name) < least:
            raise FitError(f"{name} must be a whole number of at least {least}, got {getattr(recipe, name)}")
    if not 0 < recipe.layer_decay <= 1:
        raise FitError(f"layer_decay must be above 0 and at most 1, got {recipe.layer_decay}")
    if not 0 <= recipe.label_smoothing < 1:
        raise FitError(f"label_smoothing must be at least 0 and below 1, got {recipe.label_smoothing}")
    if recipe.views is not None and recipe.views < 1:
        raise FitError(f"views must be a whole number of at least 1, got {recipe.views}")
    if recipe.views is not None and recipe.augment == NO_AUGMENT:
        raise FitError(
            "views are augmented images, but nothing is augmented; name an augmentation, such as augment crop+flip"
        )
    if not recipe.weight_decay >= 0:
        raise FitError(f"weight_decay must be a number of at least 0, got {recipe.weight_decay}")
    return recipe


def parse_rate(text: str) -> tuple[str, float]:
    """Return layer and learning rate of ``LAYER=RATE``; raises `FitError` if `text` is not of this form."""
    layer, _, rate = text.rpartition("=")
    try:
        found = layer.strip(), float(rate)
    except ValueError:
        found = "", 0.0
    if not found[0]:
        raise FitError(f"expected LAYER=RATE, such as blocks.5=0.0001, got {text!r}")
    return found


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
    """Raise `FitError` if an option of `pipeline.finetune.finetune` has no such value, or two do not go together."""
    check_choice("init", init, INITS)
    check_choice("precision", precision, TRAIN_PRECISIONS)
    if watch is not None:
        check_choice("watch", watch, WATCHES)
    if init == "random" and "@" in backbone:
        raise FitError(f"init random draws its own weights; name {backbone.partition('@')[0]} without any weights")
    if head_first and freeze == "all":
        raise FitError("with freeze all only the new top is trained; leave out head-first")
    if recipe.views is not None and freeze == "none":
        raise FitError(
            "with freeze none there are no frozen activations to cache; leave out views, or freeze up to a layer"
        )


def check_choice(name: str, value: str, known: Sequence[str]) -> None:
    """Raise `FitError` unless `value` is one of `known`."""
    if value not in known:
        raise FitError(f"unknown {name} '{value}'{nearest(value, known)}; expected one of {', '.join(known)}")
