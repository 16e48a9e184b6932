"""Is each layer learning? For every epoch, the norms of its gradients, weights and steps, and its dead units."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm

from pipeline.finetuning.network import layer_name


class GradientWatch:
    """Measures four numbers for every epoch and thawed layer, in order from the thaw line upwards.

    A layer is a module with thawed parameters of its own. Its norms are Euclidean, over all of these parameters.

    - ``gradient``: norm of the gradient before any clipping; mean over steps.
    - ``update``: norm of the change that a step makes; mean over steps.
    - ``weight``: norm of the parameters at the end of the epoch.
    - ``dead``: share of the units that got no gradient from any training image of the epoch; ``None`` if the layer has
      no bias, because this is measured on biases. A ReLU that is zero for every image passes no gradient on, so its
      unit cannot come back.

    Sums stay on the device until the end of the epoch. Each step reads the weights three times and writes them twice,
    and a copy of them is kept in memory. Weights and random numbers are not touched. The network must be on the device
    where it trains.
    """

    def __init__(self, network: nn.Module) -> None:
        named = [(name, item) for name, item in network.named_parameters() if item.requires_grad]
        self.weights = [item for _, item in named]
        self.layers = list(dict.fromkeys(layer_name(name) for name, _ in named))
        layer_of = [self.layers.index(layer_name(name)) for name, _ in named]
        self.layer_of = torch.tensor(layer_of, device=self.weights[0].device)
        self.biases = {layer_name(name): item for name, item in named if name.endswith(".bias")}
        self.before = [torch.empty_like(item) for item in self.weights]
        self._reset()

    def _reset(self) -> None:
        self.steps = 0
        self.gradients = self.updates = torch.zeros((), device=self.layer_of.device)
        self.bias_gradients = {layer: torch.zeros_like(item) for layer, item in self.biases.items()}

    @torch.no_grad()
    def before_step(self) -> None:
        """Measure the gradients, and keep a copy of the weights."""
        self.gradients = self.gradients + self._norms(_gradient(item) for item in self.weights)
        for layer, item in self.biases.items():
            self.bias_gradients[layer] += _gradient(item).abs()
        for before, item in zip(self.before, self.weights, strict=True):
            before.copy_(item)

    @torch.no_grad()
    def after_step(self) -> None:
        """Measure how far the step moved the weights."""
        pairs = zip(self.before, self.weights, strict=True)
        self.updates = self.updates + self._norms(before.sub_(item) for before, item in pairs)
        self.steps += 1

    @torch.no_grad()
    def end_epoch(self) -> dict[str, dict[str, float | None]]:
        """Return the four numbers of each layer, and begin the next epoch."""
        means = (self.gradients / self.steps, self._norms(self.weights), self.updates / self.steps)
        dead = {layer: float((sums == 0).float().mean()) for layer, sums in self.bias_gradients.items()}
        rows = zip(self.layers, *(norms.tolist() for norms in means), strict=True)
        self._reset()
        return {
            layer: {"gradient": gradient, "weight": weight, "update": update, "dead": dead.get(layer)}
            for layer, gradient, weight, update in rows
        }

    def _norms(self, tensors: Iterable[Tensor]) -> Tensor:
        """Return the norm of each layer's tensors together (layers,), float64."""
        squares = torch.stack([vector_norm(item) for item in tensors]).double().square()
        return squares.new_zeros(len(self.layers)).index_add_(0, self.layer_of, squares).sqrt()


def _gradient(item: Tensor) -> Tensor:
    return item.grad if item.grad is not None else torch.zeros_like(item)
