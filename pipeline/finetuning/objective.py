"""What training minimises: an objective maps the outputs of a network and the targets of a batch to a loss."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.arrays import IntArray


class Objective(nn.Module):
    """A loss and, where outputs are class scores, which of them are right."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of a batch, a mean over its rows."""
        raise NotImplementedError

    def right(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """Return what is right of each row of outputs: 0 or 1, or a share; None if outputs are no class scores."""
        return None


class Classification(Objective):
    """Cross-entropy of class scores (n, k), for class numbers (n,)."""

    def __init__(self, weights: Tensor | None = None, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.loss = nn.CrossEntropyLoss(weights, label_smoothing=label_smoothing)

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of a batch."""
        loss: Tensor = self.loss(outputs, targets)
        return loss

    def right(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return whether the highest score is that of the target (n,)."""
        return outputs.argmax(1) == targets


class Labels(Objective):
    """The sum of binary cross-entropies of scores (n, k), for labels (n, k) of 0 and 1."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean over rows of the sum over labels."""
        loss = nn.functional.binary_cross_entropy_with_logits(outputs, targets.float(), reduction="sum")
        return loss / len(outputs)


class Numbers(Objective):
    """The squared error of outputs (n, 1) for numbers (n,) that are shifted and scaled by those of training rows."""

    def __init__(self, mean: float, spread: float) -> None:
        super().__init__()
        self.mean, self.spread = mean, spread

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean squared error of a batch."""
        return nn.functional.mse_loss(outputs[:, 0], ((targets - self.mean) / self.spread).float())


def class_weights(counts: IntArray) -> Tensor:
    """Return weights inverse to the counts (k,), 0 for classes without images; their mean over all images is 1."""
    present = counts > 0
    weights = np.where(present, counts.sum() / (np.maximum(counts, 1) * present.sum()), 0.0)
    return torch.tensor(weights, dtype=torch.float32)
