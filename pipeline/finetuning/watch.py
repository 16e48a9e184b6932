"""Is each layer learning? The norms of its gradient, of its weights and of its steps, and its dead units, by epoch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from skorch.callbacks import Callback
from torch import Tensor
from torch.linalg import vector_norm

from pipeline.finetuning.network import layer_name


class Watch(Callback):  # type: ignore[misc]
    """Records under ``gradients``, for every epoch and thawed layer, from the line upwards, four numbers.

    A layer is a module with thawed parameters of its own; its norms are Euclidean, over all of them.

    - ``gradient``: norm of the gradient as backpropagation gives it, before any clipping; mean over steps.
    - ``update``: norm of what a step changes; mean over steps.
    - ``weight``: norm of the parameters at the end of the epoch.
    - ``dead``: share of the units that no training image of the epoch gave a gradient, ``None`` where the layer has no
      bias to see it by. A ReLU that is zero for every image passes none on: its unit cannot come back.

    Sums stay on the device until the epoch is over. They cost three reads and two writes of the weights a step, and
    the memory of a copy of them; neither the weights nor the random numbers are touched.
    """

    def on_train_begin(self, net: Any, **kwargs: Any) -> None:
        """List the layers."""
        named = [(name, item) for name, item in net.module_.named_parameters() if item.requires_grad]
        self.weights_ = [item for _, item in named]
        self.layers_ = list(dict.fromkeys(layer_name(name) for name, _ in named))
        places = [self.layers_.index(layer_name(name)) for name, _ in named]
        self.places_ = torch.tensor(places, device=self.weights_[0].device)
        self.biases_ = {layer_name(name): item for name, item in named if name.endswith(".bias")}
        self.before_ = [torch.empty_like(item) for item in self.weights_]

    def on_epoch_begin(self, net: Any, **kwargs: Any) -> None:
        """Begin new sums."""
        self.steps_ = 0
        self.gradients_ = self.updates_ = torch.zeros((), device=self.places_.device)
        self.reached_ = {layer: torch.zeros_like(item) for layer, item in self.biases_.items()}

    @torch.no_grad()
    def on_grad_computed(self, net: Any, **kwargs: Any) -> None:
        """Measure the gradients, and keep the weights as they are before the step."""
        self.gradients_ = self.gradients_ + self._norms(_gradient(item) for item in self.weights_)
        for layer, item in self.biases_.items():
            self.reached_[layer] += _gradient(item).abs()
        for before, item in zip(self.before_, self.weights_, strict=True):
            before.copy_(item)

    @torch.no_grad()
    def on_batch_end(self, net: Any, training: bool = False, **kwargs: Any) -> None:
        """Measure the step."""
        if training:
            pairs = zip(self.before_, self.weights_, strict=True)
            self.updates_ = self.updates_ + self._norms(before.sub_(item) for before, item in pairs)
            self.steps_ += 1

    @torch.no_grad()
    def on_epoch_end(self, net: Any, **kwargs: Any) -> None:
        """Put the epoch's record into the history."""
        means = (self.gradients_ / self.steps_, self._norms(self.weights_), self.updates_ / self.steps_)
        dead = {layer: float((sums == 0).float().mean()) for layer, sums in self.reached_.items()}
        rows = zip(self.layers_, *(norms.tolist() for norms in means), strict=True)
        record = {
            layer: {"gradient": gradient, "weight": weight, "update": update, "dead": dead.get(layer)}
            for layer, gradient, weight, update in rows
        }
        net.history.record("gradients", record)

    def _norms(self, tensors: Iterable[Tensor]) -> Tensor:
        """Return the norm of each layer's tensors together, float64."""
        squares = torch.stack([vector_norm(item) for item in tensors]).double().square()
        return squares.new_zeros(len(self.layers_)).index_add_(0, self.places_, squares).sqrt()


def _gradient(item: Tensor) -> Tensor:
    return item.grad if item.grad is not None else torch.zeros_like(item)
