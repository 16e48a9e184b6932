"""The loop, which is skorch's: what is ours are the groups of rates, the batches, and the watch over the loss."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from skorch import NeuralNetClassifier
from skorch.callbacks import Callback, GradientNormClipping
from skorch.helper import predefined_split
from skorch.utils import to_device
from torch import Tensor, nn
from torch.nn.functional import softmax

from features_cache import ThawlineError
from pipeline.backbones.hooks import hooked
from pipeline.finetuning.groups import parameter_groups
from pipeline.finetuning.inputs import Part
from pipeline.finetuning.network import Network, layer_name
from pipeline.finetuning.recipe import Recipe

MOMENTUM = 0.9


class DivergedError(ThawlineError):
    """The loss is not a finite number any more."""


class Net(NeuralNetClassifier):  # type: ignore[misc]
    """A network above its thaw line as a scikit-learn classifier of `Part`s.

    Parameters
    ----------
    module : Network
    groups : list of dict
        Parameter groups for the optimizer.
    seed : int
        Draws dropout, in each epoch anew, so that a run that goes on draws what it would have drawn.
    **kwargs
        As for `skorch.NeuralNetClassifier`.
    """

    def __init__(self, module: Network, *, groups: Sequence[dict[str, Any]], seed: int, **kwargs: Any) -> None:
        super().__init__(module, **kwargs)
        self.groups = groups
        self.seed = seed

    def on_epoch_begin(self, net: Any, **kwargs: Any) -> None:
        """Seed torch for the epoch."""
        super().on_epoch_begin(net, **kwargs)
        torch.manual_seed(self.seed * 100_003 + self.history[-1]["epoch"])

    def get_params_for_optimizer(
        self, prefix: str, named_parameters: Iterable[tuple[str, nn.Parameter]]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return our groups in place of skorch's patterns of names."""
        return (self.groups,), {"lr": self.lr} | self.get_params_for(prefix)

    def get_iterator(self, dataset: Part, training: bool = False) -> Part:
        """Return the part itself: iterating it gives batches."""
        return dataset

    def infer(self, x: Any, **fit_params: Any) -> Tensor:
        """Return the logits of a batch's inputs."""
        return self.module_(*to_device(x, self.device))  # type: ignore[no-any-return]

    def get_loss(self, y_pred: Tensor, y_true: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss; raise `DivergedError` before a step is made on one that is not finite."""
        loss: Tensor = super().get_loss(y_pred, y_true, *args, **kwargs)
        if kwargs.get("training") and not math.isfinite(loss.item()):
            epoch, step = self.history[-1]["epoch"], len(self.history[-1]["batches"])
            layer = first_bad_layer(self.module_, to_device(kwargs["X"], self.device))
            raise DivergedError(f"the loss became {loss.item()} at step {step} of epoch {epoch}, first in {layer}")
        return loss

    def predict_part(self, part: Part) -> NDArray[np.float64]:
        """Return the probabilities of a part's rows (n, k)."""
        logits = self.forward(part)
        return softmax(logits.double(), 1).numpy()


def first_bad_layer(network: Network, inputs: tuple[Tensor, ...]) -> str:
    """Return the name of the first thawed layer that has weights, or gives values, that are not finite."""
    for name, item in network.named_parameters():
        if item.requires_grad and not item.isfinite().all():
            return layer_name(name)
    found: list[str] = []

    def look(name: str, module: nn.Module, args: object, value: Any) -> None:
        if not found and isinstance(value, Tensor) and not value.isfinite().all():
            found.append(layer_name(f"{name}."))

    leaves = [name for name, part in network.named_modules() if not list(part.children())]
    with hooked(network, {name: partial(look, name) for name in leaves}), torch.no_grad():
        network(*inputs)
    return found[0] if found else "the loss itself"


def make_net(
    network: Network,
    recipe: Recipe,
    rate: float,
    counts: NDArray[np.int64],
    valid: Part | None,
    callbacks: Sequence[Callback],
    seed: int,
    device: str,
) -> Net:
    """Return a net ready to be initialised.

    Parameters
    ----------
    network : Network
    recipe : Recipe
    rate : float
        Learning rate of the head.
    counts : (k,) int64
        Training images of each class.
    valid : Part or None
        Validation rows.
    callbacks : sequence of Callback
        Ours, in the order in which they are called.
    seed : int
    device : str
    """
    sgd = recipe.optimizer == "sgd"
    clip = [GradientNormClipping(recipe.clip)] if recipe.clip is not None else []
    return Net(
        network,
        groups=parameter_groups(network, rate, recipe.layer_decay, recipe.lr_at, recipe.weight_decay),
        seed=seed,
        criterion=nn.CrossEntropyLoss,
        criterion__weight=class_weights(counts) if recipe.class_weights else None,
        criterion__label_smoothing=recipe.label_smoothing,
        optimizer=torch.optim.SGD if sgd else torch.optim.AdamW,
        **({"optimizer__momentum": MOMENTUM, "optimizer__nesterov": True} if sgd else {}),
        optimizer__fused=True,
        lr=rate,
        classes=list(range(len(counts))),
        train_split=predefined_split(valid) if valid is not None else None,
        callbacks=[*callbacks, *clip],  # gradients are watched as they are, then clipped
        callbacks__print_log=None,
        device=device,
        verbose=0,
    )


def class_weights(counts: NDArray[np.int64]) -> Tensor:
    """Return weights inverse to the counts, 0 for classes without images; their mean over all images is 1."""
    present = counts > 0
    weights = np.where(present, counts.sum() / (np.maximum(counts, 1) * present.sum()), 0.0)
    return torch.tensor(weights, dtype=torch.float32)
