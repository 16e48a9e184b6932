"""Is each layer learning? What is measured of every layer in every epoch, and what it says about a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.linalg import vector_norm

from pipeline.arrays import Float64Array
from pipeline.backbones.network_file import TOP_LAYER
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


VANISHED = 1e-3
"""Gradients vanish if those of the lowest third of the layers, divided by those of the highest third, are below this.
With batch norms the ratio is about 1."""
EXPLODED = 1e3
"""Gradients explode on their way down if the same ratio is above this."""
GROWN = 100.0
"""Gradients explode over time if those of an epoch, divided by those of the first epoch, are above this. The loss of
the first epoch is about that of guessing, so gradients should hardly grow after it."""
DEAD = 0.5
"""Units die if at least this share of a layer's units is dead. Pretrained networks have some dead units: 12 % in one
layer of EfficientNet-Lite0."""
LEAP = 0.3
"""Steps are too long if they change the median layer's weights by more than this share; 0.00001 to 0.01 is usual."""
STILL = 1e-7
"""A layer stands still if steps change its weights by less than this share: float32 rounds such a change away."""

LayerNumbers = Mapping[str, Mapping[str, Any]]
"""What a `GradientWatch` measures in an epoch: numbers by layer and name."""


def judge(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a warning for each thing that is wrong with a run, by the ``gradients`` of its epochs.

    A run of one epoch is not judged. The first epoch only serves as a reference: the new top starts from zero, so the
    layers below it get nearly no gradient at first.
    """
    if len(history) < 2:
        return []
    records: list[LayerNumbers] = [epoch["gradients"] for epoch in history]
    layers = list(records[0])
    body = [position for position, layer in enumerate(layers) if not layer.startswith(TOP_LAYER)]
    gradient, weight, update = (_column(records, key) for key in ("gradient", "weight", "update"))
    share = np.divide(update, weight, out=np.full_like(update, np.nan), where=weight > 0)[1:]
    across = _across_depth([layers[position] for position in body], np.median(gradient[1:, body], axis=0))
    return [*across, *_over_time(gradient), *_dead(records[-1]), *_steps(layers, share)]


def _column(records: Sequence[LayerNumbers], key: str) -> Float64Array:
    """Return one of the numbers for every epoch and layer (epochs, layers)."""
    return np.array([[layer[key] for layer in record.values()] for record in records], np.float64)


def _across_depth(layers: Sequence[str], gradient: Float64Array) -> list[str]:
    """Compare the lowest third of the layers with the highest; single layers differ because of their sizes."""
    third = len(layers) // 3
    if not third:
        return []
    low, high = np.median(gradient[:third]), np.median(gradient[-third:])
    if low < VANISHED * high:
        return [
            f"gradients vanish on their way down from {layers[-1]} to {layers[0]}: the lowest third of the layers has "
            f"{low / high:.0e} of what the highest has; freeze more layers, or begin with pretrained weights"
        ]
    if low > EXPLODED * high:
        return [
            f"gradients explode on their way down from {layers[-1]} to {layers[0]}: the lowest third of the layers has "
            f"{_times(low, high)} what the highest has; clip the gradient to norm 1, or begin with pretrained weights"
        ]
    return []


def _over_time(gradient: Float64Array) -> list[str]:
    """Compare the gradient over all layers with that of the first epoch."""
    whole = np.sqrt((gradient**2).sum(axis=1))
    bad = np.flatnonzero(~(whole <= GROWN * whole[0]))  # also finds NaN
    if not len(bad):
        return []
    epoch = bad[0]
    return [
        f"gradients explode: in epoch {epoch + 1} their norm is {whole[epoch]:.3g}, {_times(whole[epoch], whole[0])} "
        "that of the first epoch; use a lower learning rate, or clip the gradient to norm 1"
    ]


def _times(value: float, of: float) -> str:
    return f"{value / of:.0f} times" if of > 0 else "any number of times"


def _dead(last: LayerNumbers) -> list[str]:
    """Name the layer with the most dead units; ties go to the uppermost, because the layers below it die with it."""
    *inner, (_, top_share) = ((layer, numbers["dead"]) for layer, numbers in last.items())
    if top_share == 1:  # the loss is exactly zero: no unit learns any more, and none has to
        return []
    dead = [(share, depth, layer) for depth, (layer, share) in enumerate(inner) if share is not None and share >= DEAD]
    if not dead:
        return []
    share, _, layer = max(dead)
    others = f" (and to at least half of the units of {len(dead) - 1} other layers)" if len(dead) > 1 else ""
    return [
        f"units die: no training image of the last epoch gave a gradient to {share:.0%} of the units of {layer}"
        f"{others}; use a lower learning rate"
    ]


def _steps(layers: Sequence[str], share: Float64Array) -> list[str]:
    """Judge how far steps move the weights (epochs, layers), by the medians over epochs."""
    with np.errstate(invalid="ignore"):
        usual = np.median(share, axis=0)
    found = []
    if np.nanmedian(usual) > LEAP:
        found.append(
            f"steps are too long: each changes the weights of the median layer by {np.nanmedian(usual):.0%} of their "
            "size; use a lower learning rate"
        )
    still = [layer for layer, moved in zip(layers, usual, strict=True) if moved < STILL]
    if still:
        found.append(
            f"{len(still)} of {len(layers)} layers stand still, such as {still[0]}: a step changes their weights by "
            f"less than {STILL:.0e} of their size; use a higher learning rate, or a layer decay nearer to 1"
        )
    return found
