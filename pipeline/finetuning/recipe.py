"""How to train: all options that change the outcome, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from features_cache import nearest
from pipeline.errors import FitError
from pipeline.options import FINETUNE, RECIPE, check_options
from pipeline.spec import NO_AUGMENT

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


def make_recipe(options: Mapping[str, Any]) -> Recipe:
    """Return the recipe of `options`, the fields of `Recipe` by name (None for the default), after checking them.

    Raises
    ------
    FitError
        If an option does not exist or has an impossible value; names the option and what was expected.

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
        raise FitError(
            "views are augmented images, but nothing is augmented; name an augmentation, such as augment crop+flip"
        )
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
    """Raise `FitError` if an option of `pipeline.finetune.finetune` has no such value, or two do not go together."""
    check_options(FINETUNE, {"init": init, "head_first": head_first, "precision": precision, "watch": watch})
    if init == "random" and "@" in backbone:
        raise FitError(f"init random draws its own weights; name {backbone.partition('@')[0]} without weights")
    if head_first and freeze == "all":
        raise FitError("with freeze all only the new top is trained; leave out head-first")
    if recipe.views is not None and freeze == "none":
        raise FitError("with freeze none there is no trunk to cache; leave out views, or freeze up to a layer")
