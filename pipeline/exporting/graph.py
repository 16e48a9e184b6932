"""A saved model as one module: from pixels to labels, scores and probabilities, all in float32."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.backbones.taps import TappedNetwork
from pipeline.errors import ModelFileError
from pipeline.heads.registry import find_head
from pipeline.heads.saved import SavedModel


class Classifier(nn.Module):
    """A network, what makes scores of its features, and what makes probabilities of these.

    Parameters
    ----------
    network : TappedNetwork
        From uint8 pixels (n, h, w, 3) to the features of some layers, joined to (n, d).
    scores : torch.nn.Module
        From features (n, d) to scores (n, K), the largest of which is the label.
    temperature : float or None
        What calibrates probabilities; None leaves them as they are.
    probable : bool
        Whether the softmax of the scores is a probability.
    """

    def __init__(self, network: TappedNetwork, scores: nn.Module, temperature: float | None, *, probable: bool) -> None:
        super().__init__()
        self.network = network
        self.scores = scores
        self.temperature = temperature
        self.outputs = ["label", "scores", *(["probabilities"] if probable else [])]
        self.eval()

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Map uint8 (n, h, w, 3) to labels (n,), scores (n, K) and perhaps probabilities (n, K)."""
        scores = self.scores(torch.cat(self.network(pixels), 1))
        found = scores.argmax(1), scores, (scores / (self.temperature or 1.0)).softmax(1)
        return found[: len(self.outputs)]


class HeadScores(nn.Module):
    """Scaling and hyperplanes of a scikit-learn head.

    Parameters
    ----------
    saved : SavedModel
    half : bool
        Whether the head was trained on features that the cache had rounded to float16.

    Raises
    ------
    ModelFileError
        If the head is not linear.
    """

    weights: Tensor
    bias: Tensor
    mean: Tensor
    deviation: Tensor

    def __init__(self, saved: SavedModel, *, half: bool) -> None:
        super().__init__()
        head = find_head(saved.head)
        hyperplanes = head.family.hyperplanes(saved.pipeline.named_steps["classifier"])
        if hyperplanes is None:
            raise ModelFileError(
                f"only heads with one hyperplane per class can be exported, and {saved.head} has none; "
                "fit another, such as logreg"
            )
        buffers = hyperplanes._asdict()
        if head.scaling == "standard":
            scaler = saved.pipeline.named_steps["scaler"]
            buffers |= {"mean": scaler.mean_, "deviation": scaler.scale_}
        for name, values in buffers.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32))
        self.scaling = head.scaling
        self.half_features = half

    def forward(self, features: Tensor) -> Tensor:
        """Map features (n, d) to scores (n, K)."""
        if self.half_features:
            features = features.half().float()
        return self._scaled(features) @ self.weights.T + self.bias

    def _scaled(self, features: Tensor) -> Tensor:
        if self.scaling == "standard":
            return (features - self.mean) / self.deviation
        if self.scaling == "l2":
            length = features.norm(dim=1, keepdim=True)
            return features / torch.where(length == 0, 1.0, length)
        return features
